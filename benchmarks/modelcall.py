"""What blocks, training steps and sampling have in common as what arms are compared on."""

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
    """One call of a model with drawn weights and inputs.

    No arm rounds more often than plain PyTorch without compilation does, so none may err more than
    that does in the same precision.
    """

    whole = True

    def exact(self) -> tuple[Tensor, ...]:
        """Return what a call should give, in higher precision."""
        raise NotImplementedError

    def make_work(self, arm: Arm) -> Work:
        """Make the one call of an arm. What it compiles is compiled at its first run."""
        raise NotImplementedError

    def expected(self) -> list[Expected]:
        return self._expected_and_error[0]

    def tolerance(self, arm: Arm) -> Tolerance:
        return Tolerance(error=self._expected_and_error[1])

    def results(self, arm: Arm) -> tuple[Tensor, ...]:
        (results,) = self.work(arm).run()
        return results

    def work(self, arm: Arm) -> Work:
        """Return the same work each time: compiling it once more would take minutes."""
        if arm.name not in self._works:
            self._works[arm.name] = self.make_work(arm)
        return self._works[arm.name]

    @cached_property
    def _works(self) -> dict[str, Work]:
        return {}

    @cached_property
    def _expected_and_error(self) -> tuple[list[Expected], float]:
        """The right results, and the error of the worst of plain PyTorch's."""
        # Not on the device: a result of the float64 pass would keep all of a larger block of memory
        # in use, whose rest the arms then fill, and `peak_mib` would say they need nothing.
        exact = [tensor.cpu() for tensor in self.exact()]
        gc.collect()  # the model in higher precision lies in a cycle with its work
        plain = self.results(EAGER)
        expected = [
            Expected(f"result {i}", right, got.dtype)
            for i, (right, got) in enumerate(zip(exact, plain, strict=True))
        ]
        errors = [relative_error(got, right) for got, right in zip(plain, exact)]
        return expected, torch.tensor(errors).max().item()  # NaN where any is
