"""``python -m msf.cli`` is ``msf``."""

import sys

from . import process

sys.exit(process())
