"""Some of the subcommands of ``babydoctor bench``; ``cli/bench.py`` has the others."""
