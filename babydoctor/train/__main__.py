"""``python -m babydoctor.train CONFIG [key=value ...] [--resume]``, for ``accelerate launch``."""

import sys

from babydoctor.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
