"""Ctrl-C and SIGTERM: the step under way is finished and kept; workers leave it to the parent."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Training was asked to stop, and did after saving everything."""


class StopSignal:
    """A StopSignal turns the first Ctrl-C or SIGTERM into the flag ``received``; a second one acts
    as if there were no StopSignal.

    Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._previous[number])


def leave_sigterm_to_the_parent(_: int) -> None:
    """Start a worker of a DataLoader such that only its parent's SIGTERM ends it.

    Sent to all of a job's processes, SIGTERM lets the parent save, for which it needs its workers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_await_sigterm_of_the_parent, daemon=True).start()


def _await_sigterm_of_the_parent() -> None:
    parent = parent_process()
    assert parent
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)
