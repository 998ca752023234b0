"""Diffusion transformers as others write them, from the papers' equations: tiny, every weight
random, with the names that the published models give to their modules."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, TOKENS, CONDITION = 32, 2, 9, 32
HEAD_DIM = WIDTH // HEADS
PlainNorm = partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32 or wider, rounded, times a weight (arXiv 1910.07467)."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().mean(-1, keepdim=True)
        return (wide / (mean_square + self.eps).sqrt()).to(x.dtype) * self.weight


class Rotation(nn.Module):
    """Rotates the pairs (2i, 2i + 1) of each head by angles (tokens, pairs) (arXiv 2104.09864)."""

    def __init__(self, angles):
        super().__init__()
        angles = angles.repeat_interleave(2, 1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, x):
        even, odd = x[..., ::2], x[..., 1::2]
        turned = torch.stack((-odd, even), -1).flatten(-2)
        return x * self.freqs_cos + turned * self.freqs_sin


def angles():
    return torch.linspace(-3, 3, TOKENS * HEAD_DIM // 2).view(TOKENS, -1)


class Attention(nn.Module):
    def __init__(self, bias=True, qk_norm=None, drop=0.0):
        super().__init__()
        self.num_heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias), nn.Linear(WIDTH, WIDTH, bias)
        self.q_norm, self.k_norm = (qk_norm(HEAD_DIM) if qk_norm else nn.Identity() for _ in "qk")
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(drop)

    def forward(self, x, rope=None, **options):
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.q_norm(heads[0]), self.k_norm(heads[1]), heads[2]
        if rope is not None:
            q, k = rope(q), rope(k)
        out = F.scaled_dot_product_attention(q, k, v, **options)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class GELUMLP(nn.Module):
    def __init__(self, bias=True, approximate="tanh"):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 48, bias), nn.Linear(48, WIDTH, bias)
        self.act = nn.GELU(approximate=approximate)
        self.drop1, self.norm, self.drop2 = nn.Dropout(0.0), nn.Identity(), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 96), nn.Linear(48, WIDTH)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * value)


def modulate(h, shift, scale):
    return h * (1 + scale[:, None]) + shift[:, None]


def modulation(parts):
    return nn.Sequential(nn.SiLU(), nn.Linear(CONDITION, parts * WIDTH))


class Block(nn.Module):
    """x + gate * attention(adaLN(x)), then the same with an MLP (arXiv 2212.09748, figure 3)."""

    def __init__(self, norm=PlainNorm, attn=Attention, mlp=GELUMLP, parts=6):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = norm(WIDTH), attn(), norm(WIDTH), mlp()
        if parts:
            self.adaLN_modulation = modulation(parts)

    def forward(self, x, c, feat_rope=None):
        if isinstance(c, torch.Tensor):
            c = self.adaLN_modulation(c)
            c = c.unflatten(-1, (-1, WIDTH)).unbind(1)
        if len(c) == 4:
            zero = torch.zeros_like(c[0])
            c = zero, c[0], c[1], zero, c[2], c[3]
        h = modulate(self.norm1(x), c[0], c[1])
        rope = {} if feat_rope is None else {"rope": feat_rope}
        x = x + c[2][:, None] * self.attn(h, **rope)
        return x + c[5][:, None] * self.mlp(modulate(self.norm2(x), c[3], c[4]))


class SharedBlock(Block):
    """A block whose six modulations come from outside."""

    def __init__(self):
        super().__init__(parts=0)

    def forward(self, x, time_modulation):
        return super().forward(x, time_modulation)


class Last(nn.Module):
    def __init__(self, norm=PlainNorm, own=True, outs=5):
        super().__init__()
        self.norm_final, self.linear = norm(WIDTH), nn.Linear(WIDTH, outs)
        if own:
            self.adaLN_modulation = modulation(2)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, 1) if torch.is_tensor(c) else c[3:5]
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Transformer(nn.Module):
    """Takes tokens x (B, N, D) and a condition c (B, C)."""

    def __init__(self, block=Block, last=Last, rope=False):
        super().__init__()
        self.feat_rope = Rotation(angles()) if rope else None
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.final_layer = last()

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c) if self.feat_rope is None else block(x, c, self.feat_rope)
        return self.final_layer(x, c)


class SharedTransformer(nn.Module):
    """Computes the modulations once for all blocks, as MPDiT does."""

    def __init__(self):
        super().__init__()
        self.time_modulation = modulation(6)
        self.downsample_blocks = nn.ModuleList([SharedBlock()])
        self.upsample_blocks = nn.ModuleList([SharedBlock()])
        self.final_layer = Last(own=False)

    def forward(self, x, c):
        modulations = self.time_modulation(c).chunk(6, 1)
        for block in (*self.downsample_blocks, *self.upsample_blocks):
            x = block(x, modulations)
        return self.final_layer(x, modulations)


def lightning(norm, qk_norm, mlp=SwiGLU, parts=4):
    attn = partial(Attention, qk_norm=qk_norm)
    return Transformer(partial(Block, norm, attn, mlp, parts), partial(Last, norm), rope=True)


def without_biases():
    attn, mlp = partial(Attention, bias=False), partial(GELUMLP, bias=False, approximate="none")
    return Transformer(partial(Block, attn=attn, mlp=mlp))


class OfDiffusers(nn.Module):
    """diffusers' DiT on what the others take, which becomes its image (B, 3, 8, 8) and times."""

    def __init__(self):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.dit = DiTTransformer2DModel(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=3,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=4,
            norm_num_groups=2,
        )

    def forward(self, x, c):
        image = x.flatten(1)[:, :192].view(-1, 3, 8, 8)
        times, labels = (c[:, 0].abs() * 300).long(), (c[:, 1] > 0).long()
        return self.dit(image, times, labels).sample


MODELS = {
    "DiT and SiT": Transformer,
    "REPA": lambda: Transformer(partial(Block, attn=partial(Attention, qk_norm=nn.LayerNorm))),
    "LightningDiT": lambda: lightning(RMSNorm, RMSNorm),
    "LightningDiT with LayerNorm": lambda: lightning(PlainNorm, nn.LayerNorm, GELUMLP, 6),
    "RMSNorm of PyTorch": lambda: lightning(partial(nn.RMSNorm, eps=1e-5), RMSNorm, GELUMLP, 6),
    "norms with weights": lambda: lightning(nn.LayerNorm, RMSNorm, GELUMLP, 6),
    "no biases": without_biases,
    "MPDiT": SharedTransformer,
    "diffusers": OfDiffusers,
}


def make(name, dtype=torch.float32, seed=0):
    """Make a model whose every weight matters, of numbers that bfloat16 has. Products keep the size
    of what they multiply: larger weights amplify one rounding, so that chance decides which of two
    models errs more."""
    torch.manual_seed(seed)
    model = MODELS[name]().train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            noise, inputs = torch.randn_like(parameter), parameter.shape[1:].numel()
            parameter.copy_(noise / inputs**0.5 if inputs > 1 else parameter + 0.2 * noise)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.copy_(tensor.bfloat16())
    return model.to(dtype)


def inputs(dtype=torch.float32, batch=3, seed=1):
    torch.manual_seed(seed)
    x, c = torch.randn(batch, TOKENS, WIDTH), torch.randn(batch, CONDITION)
    return x.bfloat16().to(dtype), c.bfloat16().to(dtype)
