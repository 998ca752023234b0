import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

from msf.data import load_data
from msf.training.batches import batches
from msf.training.interrupts import StopSignal


def test_sigterm_ends_the_workers_when_it_is_the_parents(tmp_path):
    (tmp_path / "class").mkdir()
    for index in range(40):
        Image.new("L", (8, 8)).save(tmp_path / "class" / f"{index}.png")
    data = load_data(str(tmp_path), split="train", image_size=(8, 8), channels=1)
    steps = iter(batches(data, 2, 0, 60, seed=0))
    for _ in range(8):
        next(steps)  # every worker is at work
    workers = multiprocessing.active_children()
    assert workers
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(40):
        next(steps)
    for worker in workers:
        worker.terminate()
        worker.join(10)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_a_terminal_sends_does_not_end_the_workers(photos, number):
    data = load_data(str(photos), split="train", image_size=(8, 8), channels=1)
    steps = iter(batches(data, 2, 0, 90, seed=0))
    for _ in range(8):
        next(steps)
    workers = multiprocessing.active_children()
    for worker in workers:
        for _ in range(2):
            os.kill(worker.pid, number)
    assert workers and len(list(steps)) == 82


class Slow:
    """Presses Ctrl-C twice while it is destroyed, where Python drops the exception."""

    def __del__(self):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


class Wrong:
    def __del__(self):
        raise OSError("not to be hidden")


def test_an_interrupt_in_a_destructor_is_not_told(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_type))
    hook = sys.unraisablehook
    with StopSignal() as stop:
        Slow()
        Wrong()
    assert stop.received and told == [OSError] and sys.unraisablehook is hook


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.received
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
