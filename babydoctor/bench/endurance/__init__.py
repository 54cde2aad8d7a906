"""Long loads on a serving trio: ``soak`` has many clients, ``chaos`` adds kills, idle clients and hostile files."""
