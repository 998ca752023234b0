"""What q, k and v of packed qkv pass on their way into attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

NORMS = ("rms", "layer")


class Preparation(NamedTuple):
    """A Preparation is what operators on packed qkv take besides it, in the order of their schemas.

    q, k and v get a bias. Then q and k each pass, if there is a weight for it, a norm of every head
    with perhaps a bias of its own, and both a rotation.
    """

    qkv_bias: Tensor | None  # (3 * H * d,)
    q_weight: Tensor | None  # (d,)
    k_weight: Tensor | None  # (d,)
    q_norm_bias: Tensor | None  # (d,)
    k_norm_bias: Tensor | None  # (d,)
    rope: Tensor | None  # (2, N, d / 2)
    num_heads: int
    eps: float
    norm: str

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return the tensors that get a gradient, in the order of their names in PARAMETERS."""
        return tuple(getattr(self, name) for name in PARAMETERS)

    def map(self, function: Callable[[Tensor | None], Tensor | None]) -> Preparation:
        """Return a Preparation with the function's results in place of the tensors."""
        named: dict[str, Any] = {x: function(getattr(self, x)) for x in (*PARAMETERS, "rope")}
        return self._replace(**named)

    @property
    def is_empty(self) -> bool:
        """Tell whether q, k and v stay as they are."""
        return all(x is None for x in (*self.parameters, self.rope))


PARAMETERS = Preparation._fields[:5]
