"""Tensors of a DiT (arXiv 2212.09748), by the names of its published code, as those of a stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import MSFConfig
from ..embeddings import FREQUENCIES, sincos_2d
from ..rotary import in_halves, qk_in_halves
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Outputs:
    """Outputs says what the last layer gives: the first ``channels`` of ``out_channels`` are kept
    (the others are DiT's learned variance), ``negated`` where time runs from data to noise."""

    channels: int
    out_channels: int
    negated: bool


def stage_state(source: Checkpoint, config: MSFConfig, outputs: Outputs) -> dict[str, Tensor]:
    """Take from ``source`` the weights of a stage of ``config``, which compute the same.

    What differs: DiT's table of positions has its four quarters in the opposite order (columns
    before rows, sines before cosines), so the channels of everything that reads or adds to the
    residual stream are put in ours. A patch's pixels are (row, column, channel) here and (channel,
    row, column) there. The weight of an RMS norm goes into the scale that follows. And a block
    there begins with its normalisation, here with its first gate.
    """
    (stage,), classes = config.stages, config.num_classes
    width, patch = stage.width, stage.patch
    order = torch.arange(width).unflatten(0, (4, -1)).flip(0).flatten()  # its own inverse
    rows = torch.cat([k * width + order for k in range(6)])  # of six modulations
    is_rms = config.norm == "rms"

    kernel = source.take("x_embedder.proj.weight", width, config.channels, patch, patch)
    state = {
        "patch_embedding.weight": kernel.permute(0, 2, 3, 1).flatten(1)[order],
        "patch_embedding.bias": source.take("x_embedder.proj.bias", width)[order],
        "label_embedding.weight": source.take(
            "y_embedder.embedding_table.weight", classes + 1, width
        ),
    }
    for layer, inputs in ((0, FREQUENCIES), (2, width)):
        name = f"t_embedder.mlp.{layer}"
        state[f"time_embedding.{layer}.weight"] = source.take(f"{name}.weight", width, inputs)
        state[f"time_embedding.{layer}.bias"] = source.take(f"{name}.bias", width)
    _check_positions(source, config, order)

    modulations = []
    for i in range(stage.depth):
        block = f"blocks.{i}"  # there and here
        modulation = _of_block(source, f"{block}.adaLN_modulation.1", width, rows)
        if is_rms:
            for name, part in (("norm1", 1), ("norm2", 4)):
                _scale_by(source.take(f"{block}.{name}.weight", width)[order], modulation, part)
        modulations.append(modulation)
        state |= _attention(source, block, config, order) | _mlp(source, block, config, order)
    modulation = _modulation(source, "final_layer.adaLN_modulation.1", width, 2, rows)
    if is_rms:
        _scale_by(source.take("final_layer.norm_final.weight", width)[order], modulation, 1)
    modulations.append(modulation)
    state |= _recut(modulations, width)
    return state | _output(source, config, outputs, order)


def _check_positions(source: Checkpoint, config: MSFConfig, order: Tensor) -> None:
    """Raise ValueError unless the table of positions is that of sines and cosines, which a stage
    computes for itself."""
    (stage,), (height, width) = config.stages, config.image_size
    grid = height // stage.patch, width // stage.patch
    if "pos_embed" not in source.tensors:  # diffusers computes it too
        return
    table = source.take("pos_embed", 1, grid[0] * grid[1], stage.width)[0]
    expected = sincos_2d(*grid, stage.width, torch.device("cpu"))[:, order]
    if not float((table - expected).abs().max()) <= 0.01:  # NaN too; bfloat16 errs by 0.004
        raise source.error("pos_embed is not DiT's table of sines and cosines, but a learned one")


def _of_block(source: Checkpoint, name: str, width: int, rows: Tensor) -> Tensor:
    """Return the six modulations of a block, whose shifts are zero where it has only four
    (LightningDiT's ``wo_shift``)."""
    if source.dims(f"{name}.weight", 2)[0] != 4 * width:
        return _modulation(source, name, width, 6, rows)
    first, second = _modulation(source, name, width, 4, rows).split(2 * width)
    shift = torch.zeros_like(first[:width])
    return torch.cat([shift, first, shift, second])


def _modulation(source: Checkpoint, name: str, width: int, parts: int, rows: Tensor) -> Tensor:
    """Return weight and bias (parts * D, D + 1) of a modulation, as one matrix."""
    weight = source.take(f"{name}.weight", parts * width, width)
    bias = source.take(f"{name}.bias", parts * width)
    return torch.cat([weight, bias[:, None]], dim=1)[rows[: parts * width]]


def _scale_by(weight: Tensor, modulation: Tensor, part: int) -> None:
    """Put the weight (D,) of a norm into the scale, part ``part`` of a modulation (parts * D,
    D + 1): weight * (1 + scale) is 1 + the new scale."""
    scale = modulation.unflatten(0, (-1, len(weight)))[part]
    scale *= weight[:, None]
    scale[:, -1] += weight - 1


def _recut(modulations: list[Tensor], width: int) -> dict[str, Tensor]:
    """Cut modulations anew: those of a block from (shift, scale, gate; shift, scale, gate), which
    begin with the normalisation before attention, to ours, which end with the one that follows."""
    whole = torch.cat(modulations)
    parts = {"modulation": whole[: 2 * width]}
    for i, part in enumerate(whole[2 * width :].split(6 * width)):
        parts[f"blocks.{i}.modulation"] = part
    weights = {f"{name}.weight": part[:, :-1] for name, part in parts.items()}
    return weights | {f"{name}.bias": part[:, -1] for name, part in parts.items()}


def _attention(
    source: Checkpoint, block: str, config: MSFConfig, order: Tensor
) -> dict[str, Tensor]:
    (stage,), there, here = config.stages, f"{block}.attn", f"{block}.attention"
    width, head_dim = stage.width, stage.head_dim
    qkv = {
        f"{here}.qkv.weight": source.take(f"{there}.qkv.weight", 3 * width, width)[:, order],
        f"{here}.qkv.bias": source.take(f"{there}.qkv.bias", 3 * width),
    }
    names = {"weight": "weight"} if config.qk_norm else {}  # there and here
    if config.qk_norm == "layer":
        names["bias"] = "norm_bias"
    norms = {
        f"{here}.{x}_{ours}": source.take(f"{there}.{x}_norm.{name}", head_dim)
        for name, ours in names.items()
        for x in "qk"
    }
    if config.positions != "sincos":
        qkv = {name: qk_in_halves(x, head_dim) for name, x in qkv.items()}
        norms = {name: in_halves(x, head_dim) for name, x in norms.items()}
    return {
        **qkv,
        **norms,
        f"{here}.proj.weight": source.take(f"{there}.proj.weight", width, width)[order],
        f"{here}.proj.bias": source.take(f"{there}.proj.bias", width)[order],
    }


def _mlp(source: Checkpoint, block: str, config: MSFConfig, order: Tensor) -> dict[str, Tensor]:
    (stage,), is_swiglu = config.stages, config.mlp == "swiglu"
    width, hidden = stage.width, stage.hidden
    first, second = ("w12", "w3") if is_swiglu else ("fc1", "fc2")
    outs = 2 * hidden if is_swiglu else hidden
    mlp = f"{block}.mlp"  # there and here
    return {
        f"{mlp}.0.weight": source.take(f"{mlp}.{first}.weight", outs, width)[:, order],
        f"{mlp}.0.bias": source.take(f"{mlp}.{first}.bias", outs),
        f"{mlp}.2.weight": source.take(f"{mlp}.{second}.weight", width, hidden)[order],
        f"{mlp}.2.bias": source.take(f"{mlp}.{second}.bias", width)[order],
    }


def _output(
    source: Checkpoint, config: MSFConfig, outputs: Outputs, order: Tensor
) -> dict[str, Tensor]:
    (stage,) = config.stages
    count, sign = stage.patch**2 * outputs.out_channels, -1.0 if outputs.negated else 1.0
    weight = source.take("final_layer.linear.weight", count, stage.width)[:, order]
    bias = source.take("final_layer.linear.bias", count)
    return {
        f"output.{key}": sign
        * x.unflatten(0, (-1, outputs.out_channels))[:, : outputs.channels].flatten(0, 1)
        for key, x in (("weight", weight), ("bias", bias))
    }
