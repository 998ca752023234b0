"""A folder of diffusers' ``DiTTransformer2DModel``: its tensors by the names of DiT's own code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import printable, read_file
from ..parsing import parse_number, parse_object, parse_whole
from .checkpoint import OWN, Checkpoint, read_checkpoint

KIND = "DiTTransformer2DModel"
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
NEEDED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
SIZES = {  # and their defaults
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "patch_size": 2,
    "sample_size": 32,
}
# exp(-log(10000) i / 127), the frequencies here, is exp(-log(PERIOD) i / 128).
PERIOD = 10_000.0 ** (128 / 127)
EPS = 1e-6

NAMES = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.attn1\.", r"blocks.\1.attn."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
)
EMBEDDERS = re.compile(
    r"transformer_blocks\.(\d+)\.norm1\.emb\.(timestep_embedder|class_embedder)\.(.*)"
)
EMBEDDINGS = {
    "linear_1": "t_embedder.mlp.0",
    "linear_2": "t_embedder.mlp.2",
    "embedding_table": "y_embedder.embedding_table",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes are what the configuration of diffusers says and weights alone do not: the heads of
    attention, and the side of an image or latent. None where nothing says it."""

    heads: int | None = None
    side: int | None = None


def read_folder(folder: Path) -> tuple[Checkpoint, Sizes, list[str]]:
    """Read a folder that diffusers wrote: its weights, sizes, and what a stage computes otherwise.
    Raise ValueError (one line) for what DiT does not have, or where blocks embed time or class each
    in another way."""
    name = printable(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name}: holds no config.json; give a checkpoint, or a folder of {KIND}")
    config = parse_object(read_file(folder / "config.json"), folder / "config.json")
    if "stages" in config:
        raise ValueError(f"{name}: {OWN}")
    if (kind := config.get("_class_name", "what config.json gives no _class_name")) != KIND:
        raise ValueError(f"{name}: must hold a {KIND}, holds {printable(str(kind))}")
    for key, needed in NEEDED.items():
        if config.get(key, needed) != needed:
            got = printable(str(config[key]))
            raise ValueError(f"{name}: {key} must be {needed}, got {got}")
    file = next((folder / file for file in FILES if (folder / file).is_file()), None)
    if file is None:
        raise ValueError(f"{name}: {FILES[0]} is missing")
    source = read_checkpoint(file)
    source.tensors = _renamed(source)
    heads, head_dim, depth, patch, side = (
        parse_whole(config.get(key, default), f"{name}: {key}") for key, default in SIZES.items()
    )
    width, _, _, kernel = source.dims("x_embedder.proj.weight", 4)
    for what, told, held in (
        ("num_attention_heads x attention_head_dim", heads * head_dim, width),
        ("num_layers", depth, source.depth()),
        ("patch_size", patch, kernel),
    ):
        if told != held:
            raise ValueError(f"{name}: config.json has {told} for {what}, the weights {held}")
    eps = parse_number(config.get("norm_eps", 1e-5), f"{name}: norm_eps")
    notes = []
    if eps != EPS:
        notes.append(
            f"the norm before each MLP has eps {EPS:g}, as in DiT, where diffusers has {eps:g}: "
            "outputs differ a little"
        )
    return source, Sizes(heads, side), notes


def _renamed(source: Checkpoint) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for old, x in source.tensors.items():
        if found := EMBEDDERS.fullmatch(old):
            layer, _, kind = found[3].partition(".")
            new = f"{EMBEDDINGS.get(layer, layer)}.{kind}"
            if new in tensors and not torch.equal(tensors[new], x):
                raise source.error(
                    f"{old} differs from that of another block; DiT embeds time and class once"
                )
        else:
            new = next((re.sub(a, b, old) for a, b in NAMES if re.match(a, old)), old)
        tensors[new] = x
    for kind in ("weight", "bias"):
        parts = re.compile(rf"(blocks\.\d+\.attn)\.to_q\.{kind}")
        for prefix in [found[1] for name in tensors if (found := parts.fullmatch(name))]:
            names = [f"{prefix}.to_{part}.{kind}" for part in "qkv"]
            for name in names:
                if name not in tensors:
                    raise source.error(f"{name} is missing")
            tensors[f"{prefix}.qkv.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    return tensors
