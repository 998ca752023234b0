"""Makes a file (argument 1), sleeps, and ends on Ctrl-C with a status (argument 2)."""

import pathlib
import sys
import time

try:
    pathlib.Path(sys.argv[1]).touch()
    time.sleep(60)
except KeyboardInterrupt:
    sys.exit(int(sys.argv[2]))
