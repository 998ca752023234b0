"""A call of launchers, recorded so that others of its signature repeat it without its Python.

A recording is to the host what a CUDA graph is to the device. It knows which tensors a call makes
and what it launches; a replay makes such tensors and launches the same with their addresses and
with those of its own arguments, or their numbers. A call that does anything else, such as a copy,
cannot be replayed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FACTORIES = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}
ALIGNMENT = 16  # bytes: a call may look at what is left of an address, and copy what has less


class Address(int):
    """An address in a recording: so many bytes behind the start of one of its tensors."""

    place: int
    offset: int


@dataclass(frozen=True)
class Number:
    """A number in a recording: the argument at a place of the call.

    A launcher takes it as it is. It is no float, because what is computed from one would be
    replayed as it was.
    """

    value: float
    place: int

    def __float__(self) -> float:
        return self.value


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def current() -> Recording | None:
    """Return what this thread is recording into."""
    return _thread.recording


def number(x: Tensor) -> float | Number:
    """Return what x, a tensor on the CPU that stands for a number, holds."""
    into = current()
    return float(x) if into is None else into.number(x)


class Recording(TorchDispatchMode):
    """A recording takes down one call.

    Args:
        tensors: those that come in.
        numbers: {place of an argument that is a number: the tensor that stands for it}.
    """

    def __init__(self, tensors: Sequence[Tensor], numbers: Mapping[int, Tensor] = {}) -> None:
        super().__init__()
        self.inputs = len(tensors)
        self.tensors = list(tensors)  # those that come in, then those that are made
        self.places = {id(x): place for place, x in enumerate(tensors)}
        self.numbers = {id(x): Number(float(x), place) for place, x in numbers.items()}
        self.views: list[Tensor] = []  # kept, so that no other tensor gets the id of one
        self.launches: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.complete = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping it would import it, which takes a second

    def __enter__(self) -> Recording:
        _thread.recording = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _thread.recording = None
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in FACTORIES:
            self.places[id(result)] = len(self.tensors)
            self.tensors.append(result)
            return result
        views = [result] if isinstance(result, Tensor) else result
        if func._schema.is_mutable or not _are_views(views, args[0]):
            self.complete = False  # it computes, copies or reads a value
        elif id(args[0]) in self.places:
            self.views += views
            self.places |= dict.fromkeys(map(id, views), self.places[id(args[0])])
        return result

    def address(self, x: Tensor) -> int:
        """Return where x lies in memory, as an Address if it is one of the recording's."""
        place = self.places.get(id(x))
        if place is None:
            self.complete = False
            return x.data_ptr()
        found = Address(x.data_ptr())
        found.place, found.offset = place, found - self.tensors[place].data_ptr()
        return found

    def number(self, x: Tensor) -> float | Number:
        """Return what x holds, as a Number if x stands for one; else it cannot be replayed."""
        found = self.numbers.get(id(x))
        return float(x) if found is None else found

    def replay(
        self,
        result: Tensor | Sequence[Tensor | None],
        tensors_of: Callable[[tuple[Any, ...]], Sequence[Tensor]],
        otherwise: Callable[..., Any],
    ) -> Callable[..., Any] | None:
        """Return a function that repeats the call, which gave `result`, for other arguments.

        It runs `otherwise` where these are not aligned as those of the call. Return None where it
        could not repeat all that the call did.

        The function is made of source that has no loop and looks nothing up:

            def replay(*args):
                x0, x1, = tensors_of(args)
                a0, a1, = x0.data_ptr(), x1.data_ptr(),
                if (a0 | a1) % 16: return otherwise(*args)
                x2 = empty_like(pattern2); a2 = x2.data_ptr()
                start0(2, 6, 8, a0, (a1, 2, ), a2, )
                return x2
        """
        results = (result,) if isinstance(result, Tensor) else result
        returned = [None if x is None else self._place_of_result(x) for x in results]
        places = [place for place in returned if place is not None]
        if not self.complete or min(places) < self.inputs or len({*places}) < len(places):
            return None
        made = dict(enumerate(self.tensors[self.inputs :], self.inputs))
        # As they are handed out, perhaps in another shape.
        made |= zip(places, (x for x in results if x is not None))
        names: dict[str, Any] = {f"pattern{i}": _pattern(x) for i, x in made.items()}
        names |= {f"start{i}": start for i, (start, _) in enumerate(self.launches)}
        names |= {"tensors_of": tensors_of, "otherwise": otherwise, "empty_like": torch.empty_like}
        try:
            exec("\n    ".join(["def replay(*args):", *self._body(returned)]), names)
        except ValueError:
            return None
        return names["replay"]

    def _body(self, returned: Sequence[int | None]) -> Iterator[str]:
        inputs, made = range(self.inputs), range(self.inputs, len(self.tensors))
        yield f"{_each('x{}', inputs)} = tensors_of(args)"
        yield f"{_each('a{}', inputs)} = {_each('x{}.data_ptr()', inputs)}"
        left = [x.data_ptr() % ALIGNMENT for x in self.tensors]
        moved = " | ".join(f"a{i} ^ {left[i]}" if left[i] else f"a{i}" for i in inputs)
        yield f"if ({moved}) % {ALIGNMENT}: return otherwise(*args)"
        for i in made:
            yield f"x{i} = empty_like(pattern{i}); a{i} = x{i}.data_ptr()"
        for i, (_, arguments) in enumerate(self.launches):
            yield f"start{i}{self._source(arguments)}"
        yield "return " + ", ".join("None" if i is None else f"x{i}" for i in returned)

    def _place_of_result(self, x: Tensor) -> int:
        """Return the place of the tensor that x is all of, -1 where it is not all of one."""
        place = self.places.get(id(x), -1)
        whole = self.tensors[place]
        return place if (x.data_ptr(), x.nbytes) == (whole.data_ptr(), whole.nbytes) else -1

    def _source(self, value: Any) -> str:
        """Return what a launcher got as Python source.

        Raises:
            ValueError: it is of no known type, or an address that nobody asked `address` for.
        """
        if isinstance(value, Address):
            return f"a{value.place} + {value.offset}" if value.offset else f"a{value.place}"
        if isinstance(value, Number):
            return f"args[{value.place}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._source(item)}, ' for item in value)})"
        if value is None or (isinstance(value, (int, float)) and not self._is_inside(value)):
            return repr(value) if math.isfinite(value or 0) else f"float('{value}')"
        raise ValueError(value)

    def _is_inside(self, value: float) -> bool:
        """Tell whether a number may be the address of something inside one of the tensors."""
        memory = (x.untyped_storage() for x in self.tensors)
        return any(m.data_ptr() <= value < m.data_ptr() + m.nbytes() for m in memory)


def _are_views(values: Any, x: Any) -> bool:
    """Tell whether the values are tensors that lie in the memory of x."""
    return (
        isinstance(x, Tensor)
        and isinstance(values, (list, tuple))
        and all(isinstance(y, Tensor) and _memory(y) == _memory(x) for y in values)
    )


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _pattern(x: Tensor) -> Tensor:
    """Return a tensor like x without memory, of which `empty_like` makes others.

    That takes two thirds of the time of other ways to make a tensor.
    """
    pattern = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    pattern.untyped_storage().resize_(0)
    return pattern


def _each(form: str, places: Sequence[int]) -> str:
    return "".join(form.format(place) + ", " for place in places)
