"""``python -m msf.cli`` is ``msf``."""

import sys

from . import main

sys.exit(main())
