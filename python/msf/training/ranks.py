"""The processes of one training job, as torchrun starts them: one a GPU."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .interrupts import uncut

T = TypeVar("T")


class FailedElsewhere(Exception):
    """Another process of the job has failed, and says why."""


@dataclass(frozen=True)
class Ranks:
    """A Ranks says which of ``count`` processes this is. The first alone writes files and speaks.

    Its methods are collective: all processes call them, in one order.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether it is set in any process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all processes' x."""
        if self.count > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite each tensor with the first process's."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def gather(self, value: T) -> list[T]:
        """Return every process's value."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], T], *, shared: bool = True) -> T:
        """Return what ``function`` returns in the first process, where alone it runs; in the others
        None, if it cannot be ``shared``. Where it raises, the others raise FailedElsewhere."""
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, "ended"]
        try:
            if self.is_first:
                value = function()
                outcome = [value if shared else None, None]
        except BaseException as error:
            outcome[1] = str(error)
            raise
        finally:
            dist.broadcast_object_list(outcome, 0, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise FailedElsewhere(outcome[1])
        return value if self.is_first else outcome[0]

    def each(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns here, once it has returned in every process. Where it
        raises, the first process in which it does raises that, the others FailedElsewhere."""
        error: BaseException | None = None
        try:
            value = function()
        except BaseException as raised:
            error = raised
        with uncut():  # what ended one process here would leave the others waiting
            if not self.any(error is not None):
                return value
            failed = self.gather(error is not None)
        if error and failed.index(True) == self.rank:
            raise error
        raise FailedElsewhere(f"in process {failed.index(True)}")


ONE_PROCESS = Ranks()


def _wait_for_threads() -> None:
    """Wait until no other thread of this process of a job runs, a second at most."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    own, deadline = str(threading.get_native_id()), time.monotonic() + 1
    while any(_runs(thread) for thread in Path("/proc/self/task").glob("*") if thread.name != own):
        if time.monotonic() > deadline:
            return
        time.sleep(0.001)


def _runs(thread: Path) -> bool:
    with suppress(OSError):  # it has ended
        return (thread / "stat").read_text().rpartition(") ")[2][0] == "R"
    return False


# Threads of torch.distributed free tensors after a collective, for which Python makes them known to
# itself under a lock. A process that was forked at that moment, as a worker that reads images is,
# waits for the lock for ever (python/cpython issue 112275): one of some 7,500 did, on busy cores.
if sys.version_info < (3, 12):
    os.register_at_fork(before=_wait_for_threads)


@contextmanager
def started(device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Yield the processes that this is one of, and its own device; in a job of torchrun they talk
    to each other for the body. Without torchrun there is one.

    A group that the caller has started already is used as it is.
    """
    if not dist.is_available() or "WORLD_SIZE" not in os.environ:
        yield ONE_PROCESS, device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), device
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if ours:
            # What still refers to the group, as DDP does in cycles, and an error's frames, would
            # end it later, with the interpreter's lock: two of eight jobs then hung for ever.
            gc.collect()
            dist.destroy_process_group()
