"""One stage over several processes: whole in each (DDP), or a part of every weight (FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .config import TrainingConfig
from .ranks import Ranks

# What selective checkpointing keeps: the results that cost the most to compute again.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.msf.attention.default,
}


def checkpointed(blocks: Iterable[nn.Module], kind: str) -> None:
    """Let the backward compute again what blocks keep for it: "full", all; "selective", all but
    matrix products and attention; "none" changes nothing."""
    context: dict[str, Any] = {}
    if kind == "selective":
        context["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    if kind == "none":
        return
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **context)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    kept = operator in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def distribute(
    stage: nn.Module, averages: Sequence[nn.Module], config: TrainingConfig, ranks: Ranks
) -> nn.Module:
    """Return what to call in place of ``stage`` in each process. With FSDP2 each holds a part of
    every weight of ``stage`` and its ``averages``, which change in place."""
    if config.parallel == "fsdp":
        _shard(stage, torch.bfloat16 if config.precision == "pure-bf16" else None)
        for average in averages:
            _shard(average, None)
    elif ranks.count > 1:
        return nn.parallel.DistributedDataParallel(stage, gradient_as_bucket_view=True)
    return stage


def _shard(stage: Any, dtype: torch.dtype | None) -> None:
    """Shard a stage block by block, so that one block's weights at a time are whole. Products are
    in ``dtype``; the weights that are kept, and the sums of gradients, stay in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # It warns of views, as a stage returns, that are then changed in place. Ours are not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    reduced = torch.float32 if dtype else None
    policy = MixedPrecisionPolicy(dtype, reduced, cast_forward_inputs=False)
    for module in (*stage.blocks, stage):
        fully_shard(module, mp_policy=policy)


@contextmanager
def synchronised(stage: Any, last: bool) -> Iterator[None]:
    """Let the backward in the body add up gradients over processes only where it is the ``last``
    of a step."""
    if isinstance(stage, nn.parallel.DistributedDataParallel):
        with nullcontext() if last else stage.no_sync():
            yield
        return
    if hasattr(stage, "set_requires_gradient_sync"):
        stage.set_requires_gradient_sync(last)
    yield


def parted(stage: Any) -> None:
    """Let each process hold its part alone of a stage that was called without a backward, after
    which FSDP2 leaves the weights outside of blocks whole: what then changed in them is lost."""
    if hasattr(stage, "reshard"):
        stage.reshard()


def like(whole: Tensor, parameter: Any) -> Tensor:
    """Return of ``whole`` what this process holds of ``parameter``, on its device."""
    if not hasattr(parameter, "device_mesh"):
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        whole.to(parameter.device), parameter.device_mesh, parameter.placements
    )
