"""Ctrl-C, SIGTERM and a closed terminal's SIGHUP, which end a command."""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from types import FrameType

from ..training.interrupts import STOPS

ONE_WISH = 1.0  # seconds


class Interrupt:
    """An Interrupt raises KeyboardInterrupt, once for all signals within a second of the first:
    what ends the command is not to be cut. Where the exception meets a destructor, in which Python
    drops it, a later signal raises another.

    While a module is imported it ends the process instead, as libraries drop the exception there,
    or fail later for want of what they were about to load.
    """

    def __init__(self) -> None:
        self._last = -ONE_WISH

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):
            with suppress(OSError):
                os.write(2, b"msf: interrupted\n")
            os._exit(130)
        if time.monotonic() - self._last > ONE_WISH:
            self.heard()
            raise KeyboardInterrupt

    def heard(self) -> None:
        """Ignore signals for a second."""
        self._last = time.monotonic()


def _is_importing(frame: FrameType | None) -> bool:
    while frame and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None


def interrupt() -> None:
    """Let all raise KeyboardInterrupt, but for one that is ignored already, as Ctrl-C is in a
    script's background and SIGHUP under nohup."""
    handler = Interrupt()
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def heard() -> None:
    """Let signals within a second not cut the line about why the command ends, which may be one of
    them that something else has heard."""
    for number in STOPS:
        handler = signal.getsignal(number)
        if isinstance(handler, Interrupt):
            handler.heard()


def terminal_is_closed() -> bool:
    """Return whether stdout or stderr is a terminal that was closed, where writing fails."""
    for number in (1, 2):
        try:
            os.tcgetpgrp(number)
        except OSError as error:
            if error.errno == errno.EIO:
                return True
    return False


def ignore() -> None:
    """Ignore all."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
