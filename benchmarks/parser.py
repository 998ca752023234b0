"""A parser of command lines whose errors are one line."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

MINUTES = "measure what matters most, and end in time (default: all)"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def minutes(text: str) -> float:
    """Parse how many minutes a command may take. Raise ArgumentTypeError unless above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return value
