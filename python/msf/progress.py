"""Progress on stderr: a bar on a terminal, a line now and then where it is a file or a pipe.

Several processes may have bars on one terminal, whose cursor is on the row of the first. So a line
erases all bars and goes where the first was; each process then draws its own below it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TextIO, TypeVar

Part = TypeVar("Part")

SECONDS = 30.0  # from one line to the next
ERASE_BELOW = "\r\x1b[J"


def say(text: str, file: TextIO | None = None) -> None:
    """Print ``text`` to ``file``, stderr by default, unless that is closed; above the bars where it
    is a terminal."""
    file = file or sys.stderr
    if file is None:
        return
    if file.isatty():
        try:
            from tqdm import tqdm
        except ImportError:  # then there are no bars
            pass
        else:
            tqdm.write(ERASE_BELOW + text, file)
            file.flush()
            return
    print(text, file=file, flush=True)


class Bar(Protocol):
    """What tells how far something is."""

    def update(self, n: int = 1) -> object: ...

    def set_postfix(self, **values: Any) -> object: ...

    def close(self) -> object: ...


class Lines:
    """Lines say how far ``name`` is, one in SECONDS, and once more at its end if it took longer."""

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        units: str = "steps",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.done, self.units, self.clock = name, total, done, units, clock
        self.values, self.first, self.said = "", done, False
        self.start = self.last = clock()

    def update(self, n: int = 1) -> None:
        self.done += n
        if self.clock() - self.last >= SECONDS:
            self._say()

    def set_postfix(self, **values: Any) -> None:
        self.values = "".join(f", {name} {value}" for name, value in values.items())

    def close(self) -> None:
        if self.said:
            self._say()

    def _say(self) -> None:
        self.last, self.said = self.clock(), True
        rate = (self.done - self.first) / max(self.last - self.start, 1e-9)
        left = f", {_clock((self.total - self.done) / rate)} left" if self.done < self.total else ""
        say(
            f"{self.name}: {self.done} of {self.total} {self.units}, "
            f"{rate:.3g} {self.units}/s{self.values}{left}"
        )


def _clock(seconds: float) -> str:
    """Write a time as hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Row:
    """A Row is tqdm's bar on a row of the terminal; closed, it becomes a line above all bars."""

    def __init__(self, name: str, total: int, done: int, units: str, row: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, initial=done, desc=name, unit=units, position=row, leave=False
        )
        self.update, self.set_postfix = self._bar.update, self._bar.set_postfix

    def close(self) -> None:
        end = str(self._bar)
        self._bar.close()
        say(end)


class Silence:
    """Silence says nothing."""

    def update(self, n: int = 1) -> None: ...

    def set_postfix(self, **values: Any) -> None: ...

    def close(self) -> None: ...


def bar(
    name: str,
    total: int,
    *,
    done: int = 0,
    units: str = "steps",
    row: int = 0,
    shown: bool = True,
) -> Bar:
    """Return a bar where stderr is a terminal and tqdm is installed, and lines elsewhere.

    ``row`` is the bar's line on the terminal, which other processes may write bars on too. What is
    not ``shown`` says nothing.
    """
    if not shown:
        return Silence()
    if sys.stderr and sys.stderr.isatty():
        try:
            return Row(name, total, done, units, row)
        except ImportError:
            pass
    return Lines(name, total, done, units)


def follow(
    parts: Iterable[Part], name: str, total: int, units: str, *, shown: bool = True
) -> Iterator[Part]:
    """Yield ``parts`` and, if that is to be ``shown``, say how many of ``total`` there were."""
    progress = bar(name, total, units=units, shown=shown)
    try:
        for part in parts:
            yield part
            progress.update()
    finally:
        progress.close()
