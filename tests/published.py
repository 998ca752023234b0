"""A published transformer as a whole, at a tiny size, from the equations of DiT (arXiv 2212.09748),
RoPE (arXiv 2104.09864) and REPA (arXiv 2410.06940), with the names of the released weights."""

import math
from functools import partial

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from drop_in.transformers import (
    GELUMLP,
    HEADS,
    WIDTH,
    Attention,
    Block,
    Last,
    PlainNorm,
    RMSNorm,
    Rotation,
    SwiGLU,
)
from msf.importing import import_checkpoint

DEPTH, PATCH, CHANNELS, SIDE, CLASSES = 3, 2, 3, 8, 4
GRID = SIDE // PATCH


def axis_table(positions, dim):
    """Sines, then cosines, of the positions along one axis."""
    angles = np.outer(positions, 10_000.0 ** -(np.arange(dim // 2) / (dim // 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def position_table():
    """Half of the channels for columns, half for rows."""
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    halves = [axis_table(axis, WIDTH // 2) for axis in (columns, rows)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()[None]


def rotation():
    """The angles of the token's row in the first half of a head, of its column in the second."""
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    pairs = WIDTH // HEADS // 4
    speeds = 10_000.0 ** -(np.arange(pairs) / pairs)
    angles = np.concatenate([np.outer(rows, speeds), np.outer(columns, speeds)], axis=1)
    return Rotation(torch.from_numpy(angles))


class Published(nn.Module):
    """A DiT, whose ``forward`` returns the ``CHANNELS`` that samplers use; every parameter is
    random. ``projectors`` are REPA's; RoPE and all after it are options of LightningDiT (arXiv
    2501.01423)."""

    def __init__(
        self,
        *,
        learn_sigma=True,
        projectors=False,
        rope=False,
        without_shift=False,
        rms=False,
        swiglu=False,
        qk_norm=False,
    ):
        super().__init__()
        torch.manual_seed(0)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(CHANNELS, WIDTH, PATCH, stride=PATCH)})
        mlp = nn.Sequential(nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, WIDTH)})
        self.pos_embed = nn.Parameter(position_table(), requires_grad=False)
        norm, mlp = RMSNorm if rms else PlainNorm, SwiGLU if swiglu else GELUMLP
        qk_norm = (RMSNorm if rms else nn.LayerNorm) if qk_norm else None
        attn = partial(Attention, qk_norm=qk_norm)
        parts = 4 if without_shift else 6
        self.blocks = nn.ModuleList(Block(norm, attn, mlp, parts) for _ in range(DEPTH))
        self.outs = CHANNELS * (2 if learn_sigma else 1)
        self.final_layer = Last(norm, outs=PATCH**2 * self.outs)
        if rope:
            self.feat_rope = rotation()
        if projectors:
            self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 8), nn.SiLU())])
        for parameter in self.parameters():
            if parameter is not self.pos_embed:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, x, t, y):
        x = self.x_embedder["proj"](x).flatten(2).mT + self.pos_embed
        speeds = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
        angles = t.float()[:, None] * speeds
        c = self.t_embedder["mlp"](torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype))
        c = c + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c, getattr(self, "feat_rope", None))
        x = self.final_layer(x, c)
        x = x.reshape(len(x), GRID, GRID, PATCH, PATCH, self.outs).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.outs, SIDE, SIDE)[:, :CHANNELS]


MODELS = {
    "dit": {},
    "sit": {},
    "lightningdit": {"learn_sigma": False, "rope": True, "rms": True, "swiglu": True},
    "repa": {"learn_sigma": False, "projectors": True},
}


def inputs(dtype=torch.float32):
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(4, CHANNELS, SIDE, SIDE, generator=draws, dtype=torch.float64).to(dtype)
    return x, torch.tensor([0.0, 0.07, 0.5, 0.998]), torch.tensor([0, 2, 3, CLASSES])


def import_state(path, model, format="auto", heads=HEADS):
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, path)
    return import_checkpoint(path, format, heads=heads)


def error(got, expected):
    assert got.dtype == expected.dtype
    return float((got - expected).abs().max() / expected.abs().max())
