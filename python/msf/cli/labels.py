"""The classes of images that are sampled, as ``--labels`` names them."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import quoted
from ..training.identity import listed

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import MSF

NUM = 16  # images where neither --num-images nor --labels says how many
NAMED = 3
RANDOM = "random"
DRAW = (0, 2)  # the purpose of a label's random number; those of noise are (i,) and (i, 1)


def choose(
    text: str | None, names: Sequence[str], model: MSF, folder: Path
) -> tuple[list[int], bool]:
    """Return the numbers of the classes that --labels gives, none for all, and whether labels are
    to be drawn from them at random. Raise ValueError (one line) for what the model in ``folder``
    does not have."""
    classes = model.config.num_classes
    if text is not None and not classes:
        raise ValueError(f"{folder} was trained without classes; leave --labels out")
    if text is None or (text == RANDOM and RANDOM not in names):
        return [], text is not None
    return [class_number(label, names, classes) for label in split_labels(text, names)], False


def of_classes(numbers: Sequence[int], model: MSF) -> Tensor | None:
    """Return the labels (K,) int64 of these classes, or of all for none: what they were trained as.
    None for a model without classes."""
    import torch

    if numbers:
        return torch.tensor(numbers)
    return model.trained_labels(torch.arange(model.config.num_classes))


def of_numbers(numbers: Sequence[int], classes: Tensor | None, *, drawn: bool) -> Tensor | None:
    """Return the label of each image by its number, of ``classes`` (K,): (B,) int64. None without
    classes.

    They are taken in turn, class n modulo K for image n, or ``drawn``, each by a random number
    that is a function of n alone.
    """
    import torch

    from ..seeds import generator

    if classes is None:
        return None
    count = len(classes)
    if not drawn:
        return classes[torch.tensor([number % count for number in numbers])]
    draws = [torch.randint(count, (), generator=generator(number, *DRAW)) for number in numbers]
    return classes[torch.stack(draws)]


def split_labels(text: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the labels in ``text``, between commas; a class's name may hold commas itself. Raise
    ValueError where its parts are names too."""
    parts = text.split(",")
    while parts:
        joined = (",".join(parts[:n]) for n in range(len(parts), 1, -1))
        label = next((label for label in joined if label in names), parts[0])
        if _is_of_names(label, names):
            raise ValueError(
                f"--labels: {quoted(label)} is ambiguous, it is a class and its parts are classes "
                f"too; give their numbers, {names.index(label)} for the former"
            )
        yield label
        del parts[: label.count(",") + 1]


def _is_of_names(label: str, names: Sequence[str]) -> bool:
    """Return whether ``label`` can be parted at commas into classes' names."""
    parts = label.split(",")
    splits = ((",".join(parts[:n]), ",".join(parts[n:])) for n in range(1, len(parts)))
    return any(
        first in names and (rest in names or _is_of_names(rest, names)) for first, rest in splits
    )


def class_number(label: str, names: Sequence[str], classes: int) -> int:
    """Return the number of the class with this name or, where none has it, with this number, of
    which ``classes`` means no class."""
    if label in names:
        return names.index(label)
    try:
        number = int(label)
    except ValueError:
        number = -1
    if 0 <= number <= classes:
        return number
    named = f"{listed(list(map(quoted, names)), NAMED)}, or " if names else ""
    raise ValueError(
        f"--labels: no class is named or numbered {reprlib.repr(label)}; choose from {named}"
        f"0 to {classes - 1}, or {classes} for no class"
    )
