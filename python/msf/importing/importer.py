"""A released checkpoint becomes a model: which format it has, its sizes, and what is left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from msf_kernels import rope_2d

from ..config import MSFConfig, StageConfig
from ..files import printable
from ..model import MSF
from ..modes import no_memory
from ..weights import check_tensors
from .checkpoint import Checkpoint, read_checkpoint
from .convert import Outputs, stage_state
from .diffusers import PERIOD, Sizes, read_folder

STEPS = 250  # with which DiT, SiT and LightningDiT report their results
LINEAR = {"path_type": ("linear",), "prediction": ("velocity", "v")}
# (width, depth) of the published sizes S, B, L, XL, 1p0B and 1p6B: heads.
HEADS = {
    (384, 12): 6,
    (768, 12): 12,
    (1024, 24): 16,
    (1152, 28): 16,
    (1536, 24): 24,
    (1792, 28): 28,
}
ROPE_THETA = 10_000.0
OPTIONS = ("blocks.0.norm1.weight", "blocks.0.mlp.w12.weight", "blocks.0.attn.q_norm.weight")
LIGHTNING = {"feat_rope.freqs_cos", *OPTIONS[:2]}  # LightningDiT's alone, as QK-norm is not


@dataclass(frozen=True)
class Format:
    """A Format is how a family of models reads time and what it predicts, as fields of
    ``MSFConfig``; ``negated`` where its velocity points from data to noise."""

    prediction: str
    time_range: tuple[float, float]
    negated: bool = False
    times: str = "uniform"
    time_period: float = 10_000.0


FORMATS = {
    "dit": Format("noise", (0.0, 1.0)),
    "sit": Format("velocity", (0.0, 1.0)),
    "lightningdit": Format("velocity", (0.0, 1.0), times="logit-normal"),
    "repa": Format("velocity", (1.0, 0.0), negated=True),
    "diffusers": Format("noise", (0.0, 1.0), time_period=PERIOD),
}


class Imported(NamedTuple):
    """An Imported has the model, the name of its format, and what was left out, a line each."""

    model: MSF
    format: str
    notes: list[str]


def import_checkpoint(path: Path, format: str = "auto", *, heads: int | None = None) -> Imported:
    """Return the model of one stage that computes what the checkpoint's does, in evaluation mode.

    Args:
        path: a .safetensors file, what ``torch.save`` wrote, or a folder of diffusers.
        format: one of ``FORMATS``, or "auto": known by names and shapes of the tensors.
        heads: of attention, where neither a configuration nor a published size tells them.

    Raises:
        ValueError: (one line) a file that is damaged or would run something; tensors that are
            missing, unknown or of another shape; what a stage cannot compute.
        FileNotFoundError: no such file.
    """
    source, format, sizes, notes = _read(path, format)
    _check_expressible(source)
    _check_training(source, FORMATS[format])
    notes += _dropped(source)
    config, outputs = _config(source, FORMATS[format], heads, sizes)
    if outputs.out_channels > outputs.channels:
        notes.append("the learned variance is dropped")
    if format == "lightningdit" and config.positions == "sincos":
        notes.append("without RoPE, because the file has no tables of it (feat_rope)")
    state = stage_state(source, config, outputs)
    source.finish()
    is_double = all(x.dtype == torch.float64 for x in state.values())
    dtype = torch.float64 if is_double else torch.float32
    state = {f"stages.0.{name}": x.to(dtype).contiguous() for name, x in state.items()}
    check_tensors(state, source.path)
    state["pyramid.mean"] = torch.zeros(1, config.channels, dtype=torch.float32)
    state["pyramid.std"] = torch.ones(1, config.channels, dtype=torch.float32)
    with no_memory():
        model = MSF(config)
    model.load_state_dict(state, assign=True)
    return Imported(model.eval(), format, notes)


def _read(path: Path, format: str) -> tuple[Checkpoint, str, Sizes, list[str]]:
    """Return what is at ``path``, the name of its format, sizes that its tensors do not tell, and
    what is to be noted of it. Raise ValueError where ``format`` cannot be."""
    if format not in ("auto", *FORMATS):
        raise ValueError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}")
    if not path.is_dir():
        if format == "diffusers":
            raise ValueError(f"{printable(path)}: is no folder; give the one that diffusers wrote")
        source = read_checkpoint(path)
        format = _recognised(source) if format == "auto" else format
        told = _told(source)
        notes = [] if told in (None, format) else [f"the file says that it is of format {told}"]
        return source, format, Sizes(), notes
    if format not in ("auto", "diffusers"):
        raise ValueError(
            f"{printable(path)}: is a folder, which --format diffusers is for; {format} is a file"
        )
    source, sizes, notes = read_folder(path)
    return source, "diffusers", sizes, notes


def _told(source: Checkpoint) -> str | None:
    """Return the format that a file says it has, by its training's options or by what only one
    format has beside its weights."""
    has_projectors = any(name.startswith("projectors.") for name in source.tensors)
    if has_projectors or "encoder_depth" in source.settings:
        return "repa"  # whose options call the model a SiT
    trained = str(source.settings.get("model", "")).partition("-")[0].lower()
    if trained in FORMATS:
        return trained
    return "lightningdit" if source.tensors.keys() & LIGHTNING else None


def _recognised(source: Checkpoint) -> str:
    """Return the name of a file's format. Raise ValueError where several have such tensors."""
    if told := _told(source):
        return told
    raise source.error(
        "DiT, SiT and others have tensors of the same names and shapes; say which it is with "
        "--format dit, sit, lightningdit or repa"
    )


def _check_expressible(source: Checkpoint) -> None:
    if "blocks.0.norm1.bias" in source.tensors:
        what = "a norm with weight and bias, a block here has none, or RMS norm"
        raise source.error(f"cannot be imported: {what}")


def _check_training(source: Checkpoint, format: Format) -> None:
    """Raise ValueError where the file says that it was trained for another path or prediction."""
    for key, known in LINEAR.items():
        value = str(source.settings.get(key, known[0]))
        if format.prediction == "velocity" and value.lower() not in known:
            raise source.error(
                f"was trained with {key} {printable(value)}; only {known[0]} can be imported"
            )


def _dropped(source: Checkpoint) -> list[str]:
    """Forget the tensors that sampling does not need; return what they are for."""
    heads = [name for name in source.tensors if name.startswith("projectors.")]
    for name in heads:
        del source.tensors[name]
    return ["REPA's projectors are dropped"] if heads else []


def _config(
    source: Checkpoint, format: Format, heads: int | None, sizes: Sizes
) -> tuple[MSFConfig, Outputs]:
    """Return the sizes that the tensors have. Raise ValueError where these cannot be."""
    width, channels, patch, _ = source.dims("x_embedder.proj.weight", 4)
    rows, _ = source.dims("y_embedder.embedding_table.weight", 2)
    has_rms, is_swiglu, has_qk_norm = (name in source.tensors for name in OPTIONS)
    _, hidden = source.dims(f"blocks.0.mlp.{'w3' if is_swiglu else 'fc2'}.weight", 2)
    outs, _ = source.dims("final_layer.linear.weight", 2)
    depth = source.depth()
    if outs not in (patch**2 * channels, 2 * patch**2 * channels):
        raise source.error(
            f"final_layer.linear.weight must have {patch**2 * channels} rows, or twice as many, "
            f"got {outs}"
        )
    side = _side(source, patch) if sizes.side is None else sizes.side
    if rows < 2:
        raise source.error("y_embedder.embedding_table.weight must be of a class and of none")
    rotated = "feat_rope.freqs_cos" in source.tensors
    known = width // source.dims("feat_rope.freqs_cos", 2)[1] if rotated else sizes.heads
    if None not in (heads, known) and heads != known:
        raise source.error(f"has {known} heads, which --heads {heads} contradicts")
    heads = heads or known or HEADS.get((width, depth))
    if heads is None:
        raise source.error(
            f"no published model has width {width} and depth {depth}; give its --heads"
        )
    try:
        config = MSFConfig(
            image_size=(side, side),
            channels=channels,
            num_classes=rows - 1,
            stages=(StageConfig(width, depth, heads, patch, hidden / width),),
            steps=(STEPS,),
            positions="both" if rotated else "sincos",
            qk_norm="layer" if "blocks.0.attn.q_norm.bias" in source.tensors else has_qk_norm,
            norm="rms" if has_rms else "layer",
            mlp="swiglu" if is_swiglu else "gelu",
            standardize=False,
            rope_theta=ROPE_THETA if rotated else 100.0,
            **_fields(format),
        )
    except ValueError as error:
        raise source.error(str(error)) from None
    if rotated:
        _check_rope(source, config)
    return config, Outputs(channels, outs // patch**2, format.negated)


def _side(source: Checkpoint, patch: int) -> int:
    """Return how large the images are, or latents, which are square."""
    _, tokens, _ = source.dims("pos_embed", 3)
    if math.isqrt(tokens) ** 2 != tokens:
        raise source.error(f"pos_embed must be of a square of tokens, got {tokens}")
    return math.isqrt(tokens) * patch


def _fields(format: Format) -> dict[str, Any]:
    names = ("prediction", "time_range", "times", "time_period")
    return {name: getattr(format, name) for name in names}


def _check_rope(source: Checkpoint, config: MSFConfig) -> None:
    """Raise ValueError unless the rotations are those that attention computes for itself."""
    (stage,), (height, width) = config.stages, config.image_size
    grid = height // stage.patch, width // stage.patch
    table = rope_2d(*grid, stage.head_dim, theta=ROPE_THETA).repeat_interleave(2, dim=2)
    for name, expected in zip(("freqs_cos", "freqs_sin"), table):
        got = source.take(f"feat_rope.{name}", *expected.shape)
        if not float((got - expected).abs().max()) <= 0.01:
            raise source.error(f"feat_rope.{name} is not RoPE with theta {ROPE_THETA:g}")
