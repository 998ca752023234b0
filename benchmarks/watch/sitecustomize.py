"""What Python imports at its start where this folder is on PYTHONPATH: it notes in $HOSTILE_LOG
that the process is watched, and each time it unpickles what a bomb is made of.

A DataLoader pickles too, between its own processes: tensors and what rebuilds them. Every bomb
calls ``os.mkdir``, which nothing else has in a pickle, so that name alone says that a file of the
user was unpickled, whichever unpickler did it and whether or not the call went on.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

MEMORY = 8 * 2**30  # bytes of address space: what asks for more fails and takes no machine down


def note(line: str) -> None:
    with open(os.environ["HOSTILE_LOG"], "a") as file:
        file.write(line + "\n")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and arguments == (os.mkdir.__module__, "mkdir"):
        note("unpickled")


resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
note("watched")
sys.addaudithook(watch)
