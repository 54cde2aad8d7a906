"""Long loads on a serving trio: ``soak`` for minutes of clients, ``chaos`` with kills, idle clients and hostile files."""
