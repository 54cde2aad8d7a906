"""What ``babydoctor eval`` measures of a run, and its tables in the terminal."""
