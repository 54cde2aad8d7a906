"""``python -m babydoctor COMMAND ...``, for ``accelerate launch -m babydoctor eval ...``."""

from babydoctor.cli.main import main

if __name__ == "__main__":
    main()
