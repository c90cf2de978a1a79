"""Drag one image, or a folder of samples: python edit.py --help."""

import sys

from dragdiff.cli import main_edit

if __name__ == "__main__":
    sys.exit(main_edit())
