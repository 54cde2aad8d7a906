"""``babydoctor bench rehearse``: every command of the project in turn, on random weights in the published layouts."""
