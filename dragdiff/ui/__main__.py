"""`python -m dragdiff.ui`."""

import sys

from dragdiff.cli import main_ui

if __name__ == "__main__":
    sys.exit(main_ui(prog="python -m dragdiff.ui"))
