"""Ctrl-C, SIGTERM and a closed terminal's SIGHUP: the step under way is finished and kept; workers
leave them to the parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """Training was asked to stop, and did after saving everything."""


_uncut = 0


@contextmanager
def uncut() -> Iterator[None]:
    """Let no signal that a StopSignal handles end the body before its end."""
    global _uncut
    _uncut += 1
    try:
        yield
    finally:
        _uncut -= 1


class StopSignal:
    """A StopSignal turns the first Ctrl-C, SIGTERM or SIGHUP into the flag ``received``. A second
    one raises a KeyboardInterrupt, for a step that takes too long. All others do nothing, and so do
    those in an ``uncut`` body: the flag is looked at soon. Where the exception meets a destructor,
    in which Python drops it, nobody is told. What is ignored stays so, as SIGHUP under nohup.

    Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = self._raised = False

    def __enter__(self) -> StopSignal:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOPS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        if self._previous:
            self._hook, sys.unraisablehook = sys.unraisablehook, self._silent_if_interrupted
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._previous:
            sys.unraisablehook = self._hook

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received = True
        elif not _uncut and not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    def _silent_if_interrupted(self, unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            self._hook(unraisable)


def leave_signals_to_the_parent(_: int) -> None:
    """Start a worker of a DataLoader such that neither Ctrl-C nor SIGHUP ends it, and SIGTERM only
    when it is its parent's.

    Sent to all of a job's processes, they let the parent save, for which it needs its workers.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_sigterm_of_the_parent, daemon=True).start()


def _await_sigterm_of_the_parent() -> None:
    parent = parent_process()
    assert parent
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
