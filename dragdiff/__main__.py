"""`python -m dragdiff`."""

import sys

from dragdiff.cli import main

sys.exit(main())
