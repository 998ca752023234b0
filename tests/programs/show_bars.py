"""Bars and lines as standard input asks for them, a statement a line."""

import sys

from msf.progress import bar, say

names = {"bar": bar, "say": say}
for statement in sys.stdin:
    exec(statement, names)
    print("done", flush=True)
