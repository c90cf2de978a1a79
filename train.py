"""Fine-tune a LoRA on one image: python train.py --help."""

import sys

from dragdiff.cli import main_train

if __name__ == "__main__":
    sys.exit(main_train())
