"""`python -m perfusion_pytorch` is the `perfusion` command."""

import sys

from perfusion_pytorch.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
