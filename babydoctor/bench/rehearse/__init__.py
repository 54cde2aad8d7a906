"""``babydoctor bench rehearse``: run every command of the project on random weights in the published layouts."""
