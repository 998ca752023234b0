"""Published transformers at tiny sizes, from the equations of DiT (arXiv 2212.09748), RoPE (arXiv
2104.09864) and REPA (arXiv 2410.06940), with the attribute names of their released weights."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCH, CHANNELS, SIDE, CLASSES = 32, 2, 3, 2, 3, 8, 4
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


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs)


def modulation(parts):
    return nn.Sequential(nn.SiLU(), linear(WIDTH, parts * WIDTH))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a weight (arXiv 1910.07467)."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self.weight


def norm(rms):
    return RMSNorm(WIDTH) if rms else nn.LayerNorm(WIDTH, 1e-6, elementwise_affine=False)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class SwiGLU(nn.Module):
    """The product of silu(a) * b (arXiv 2002.05202), of two thirds of the channels."""

    def __init__(self):
        super().__init__()
        self.hidden = int(2 / 3 * 4 * WIDTH)
        self.w12, self.w3 = linear(WIDTH, 2 * self.hidden), linear(self.hidden, WIDTH)

    def forward(self, x):
        a, b = self.w12(x).split(self.hidden, dim=-1)
        return self.w3(a * a.sigmoid() * b)


class GELUMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = linear(WIDTH, 4 * WIDTH), linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Rotation(nn.Module):
    """Neighbouring channels turn by the token's row in the first half of a head, by its column in
    the second."""

    def __init__(self):
        super().__init__()
        rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
        pairs = WIDTH // HEADS // 4
        speeds = 10_000.0 ** -(np.arange(pairs) / pairs)
        angles = np.concatenate([np.outer(rows, speeds), np.outer(columns, speeds)], axis=1)
        angles = torch.from_numpy(angles.repeat(2, axis=1))
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x):
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


class Block(nn.Module):
    def __init__(self, without_shift, rms, swiglu, qk_norm):
        super().__init__()
        self.norm1, self.norm2 = norm(rms), norm(rms)
        self.attn = nn.ModuleDict({"qkv": linear(WIDTH, 3 * WIDTH), "proj": linear(WIDTH, WIDTH)})
        for name in ("q_norm", "k_norm"):
            self.attn[name] = RMSNorm(WIDTH // HEADS) if qk_norm else nn.Identity()
        self.mlp = SwiGLU() if swiglu else GELUMLP()
        self.adaLN_modulation = modulation(4 if without_shift else 6)
        self.without_shift = without_shift

    def forward(self, x, c, rotate):
        parts = list(self.adaLN_modulation(c).chunk(4 if self.without_shift else 6, dim=1))
        if self.without_shift:
            parts.insert(2, torch.zeros_like(parts[0]))
            parts.insert(0, torch.zeros_like(parts[0]))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = x + gate[:, None] * self.attend(modulate(self.norm1(x), shift, scale), rotate)
        return x + mlp_gate[:, None] * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))

    def attend(self, x, rotate):
        q, k, v = self.attn["qkv"](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.attn["q_norm"](q)), rotate(self.attn["k_norm"](k))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.attn["proj"]((weights @ v).transpose(1, 2).flatten(2))


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
        mlp = nn.Sequential(linear(256, WIDTH), nn.SiLU(), linear(WIDTH, WIDTH))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(CLASSES + 1, WIDTH)})
        self.pos_embed = nn.Parameter(position_table(), requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(without_shift, rms, swiglu, qk_norm) for _ in range(DEPTH)
        )
        self.outs = CHANNELS * (2 if learn_sigma else 1)
        last = {"linear": linear(WIDTH, PATCH**2 * self.outs), "adaLN_modulation": modulation(2)}
        self.final_layer = nn.ModuleDict(last | {"norm_final": norm(rms)})
        if rope:
            self.feat_rope = Rotation()
        if projectors:
            self.projectors = nn.ModuleList([nn.Sequential(linear(WIDTH, 8), nn.SiLU())])
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
            x = block(x, c, getattr(self, "feat_rope", lambda part: part))
        shift, scale = self.final_layer["adaLN_modulation"](c).chunk(2, dim=1)
        x = self.final_layer["linear"](modulate(self.final_layer["norm_final"](x), shift, scale))
        x = x.reshape(len(x), GRID, GRID, PATCH, PATCH, self.outs).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.outs, SIDE, SIDE)[:, :CHANNELS]
