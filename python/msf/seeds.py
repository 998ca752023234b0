"""Random numbers as a function of a seed and a purpose, never of what was drawn before.

So an image does not depend on its batch, and a resumed training run repeats the uninterrupted one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .checks import check_kind


def drawn_from(generator: torch.Generator | None) -> dict[str, Any]:
    """Return the generator as an argument of a function that draws numbers, none for None.
    Raise TypeError for what is neither.

    A graph for batches of any size cannot take ``generator=None``.
    """
    if generator is None:
        return {}
    check_kind(generator, torch.Generator, "generator")
    return {"generator": generator}


def generator(seed: int, *purpose: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on ``device`` for this ``seed`` and ``purpose``, both of non-negative
    ints.

    The spawn key keeps purposes apart from seeds: [5 + 2**32, 1] and [5, 1, 1] are one sequence.
    """
    state = np.random.SeedSequence(seed, spawn_key=purpose).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> np.uint64(1)))
