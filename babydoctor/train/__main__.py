"""``python -m babydoctor.train CONFIG [key=value ...] [--resume]``, the form that ``accelerate launch`` can start."""

import sys

from babydoctor.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
