"""The base class of the subjects that call a model: blocks, training steps and sampling."""

from __future__ import annotations

import gc
from functools import cached_property

import torch
from torch import Tensor

from .arms import Arm
from .gate import Expected, Tolerance, relative_error
from .timing import Work
from .transformers import EAGER


class ModelCall:
    """A ModelCall is one call of a model with drawn weights and inputs.

    No arm rounds more often than plain PyTorch without compilation. So none may err more than that
    does in the same precision.
    """

    whole = True

    def exact(self) -> tuple[Tensor, ...]:
        """Return what a call should give, in higher precision."""
        raise NotImplementedError

    def make_work(self, arm: Arm) -> Work:
        """Return an arm's one call as Work. What it compiles is compiled at its first run."""
        raise NotImplementedError

    def expected(self) -> list[Expected]:
        return self._expected_and_error[0]

    def tolerance(self, arm: Arm) -> Tolerance:
        return Tolerance(error=self._expected_and_error[1])

    def results(self, arm: Arm) -> tuple[Tensor, ...]:
        (results,) = self.work(arm).run()
        return results

    def work(self, arm: Arm) -> Work:
        """Return the arm's work, the same each time: compiling it again would take minutes."""
        if arm.name not in self._works:
            self._works[arm.name] = self.make_work(arm)
        return self._works[arm.name]

    @cached_property
    def _works(self) -> dict[str, Work]:
        return {}

    @cached_property
    def _expected_and_error(self) -> tuple[list[Expected], float]:
        """Return the right results, and the largest error among those of plain PyTorch."""
        # These leave the device: a result of the float64 pass would keep a larger block of memory
        # in use. Arms would fill the rest of it, and `peak_mib` would say that they need nothing.
        exact = [tensor.cpu() for tensor in self.exact()]
        gc.collect()  # the model in higher precision lies in a cycle with its work
        plain = self.results(EAGER)
        expected = [
            Expected(f"result {i}", right, got.dtype)
            for i, (right, got) in enumerate(zip(exact, plain, strict=True))
        ]
        errors = [relative_error(got, right) for got, right in zip(plain, exact)]
        return expected, torch.tensor(errors).max().item()  # NaN where any is
