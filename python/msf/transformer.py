"""One stage: the adaLN-Zero transformer of DiT (arXiv 2212.09748), predicting a velocity, or the
noise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msf_kernels import adaln_modulate, attention, bias_gelu, gate_residual_adaln, rope_2d

from .config import MSFConfig, StageConfig
from .embeddings import ScalarEmbedding, sincos_2d
from .weights import dtype_of, initialize, weight_of

NORMAL = partial(nn.init.normal_, std=0.02)


def patchify(x: Tensor, patch: int) -> Tensor:
    """Cut x (B, C, H, W) into tokens (B, H/p * W/p, p * p * C), row by row."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(x: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Invert ``patchify``: tokens (B, H/p * W/p, p * p * C) become (B, C, H, W); ``size`` is (H,
    W)."""
    x = x.unflatten(2, (patch, patch, x.shape[2] // patch**2))
    x = x.unflatten(1, (size[0] // patch, size[1] // patch))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class SkipBiasLinear(nn.Linear):
    """A SkipBiasLinear is a Linear layer whose bias the operator that follows adds, and sums the
    gradient of, in a pass over memory that it makes anyway (Megatron's ``skip_bias_add``)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the product without the bias."""
        return F.linear(x, self.weight)


def skipped_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias that a layer, or one that another in its place wraps and calls, leaves to the
    operator that follows; None for what adds its own, such as a Linear layer in its place."""
    kinds = (SkipBiasLinear, Attention, MLP)
    inner = next((module for module in layer.modules() if isinstance(module, kinds)), None)
    if isinstance(inner, SkipBiasLinear):
        return handed_on(inner.bias)
    return None if inner is None else inner.bias


def handed_on(bias: Tensor | None) -> Tensor | None:
    """Return a bias that is read outside of its layer, None where that has none.

    Raise ValueError where FSDP wraps that layer alone and has freed its weights by then: a kernel
    would read what is not there.
    """
    if bias is not None and bias.numel() and not _memory(bias):
        raise ValueError("FSDP has freed a bias that its block still reads: wrap whole blocks")
    return bias


def _memory(x: Tensor) -> int:
    """Return the bytes that x lies in, 1 where that cannot be known."""
    if torch.compiler.is_compiling():
        return 1
    try:
        return x.untyped_storage().nbytes()
    except NotImplementedError:  # what vmap and jvp run with
        return 1


class Attention(nn.Module):
    """Attention is multi-head self-attention; QK-norm (ViT-22B, arXiv 2302.05442) and 2-D RoPE are
    part of the operator.

    RoPE is for tokens of a ``grid`` (height, width); None for no RoPE. It takes no table, because
    wrappers such as FSDP cast the tensors that they pass on, and a table must stay in float32.
    """

    def __init__(self, stage: StageConfig, config: MSFConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rope_theta = stage.heads, stage.head_dim, config.rope_theta
        self.qkv = SkipBiasLinear(stage.width, 3 * stage.width)
        self.proj = SkipBiasLinear(stage.width, stage.width)
        is_layer = config.qk_norm == "layer"
        # LayerNorm has PyTorch's eps, with which other people train it here.
        self.norm, self.eps = ("layer", 1e-5) if is_layer else ("rms", 1e-6)
        self.q_weight = nn.Parameter(torch.ones(stage.head_dim)) if config.qk_norm else None
        self.k_weight = nn.Parameter(torch.ones(stage.head_dim)) if config.qk_norm else None
        self.q_norm_bias = nn.Parameter(torch.zeros(stage.head_dim)) if is_layer else None
        self.k_norm_bias = nn.Parameter(torch.zeros(stage.head_dim)) if is_layer else None

    def forward(self, x: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """Return the output of ``proj``, whose ``bias`` the block hands on."""
        rope = None
        if grid is not None:
            rope = rope_2d(*grid, self.head_dim, theta=self.rope_theta, device=x.device)
        out = attention(
            self.qkv(x),
            num_heads=self.heads,
            qkv_bias=skipped_bias(self.qkv),
            q_weight=self.q_weight,
            k_weight=self.k_weight,
            q_norm_bias=self.q_norm_bias,
            k_norm_bias=self.k_norm_bias,
            rope=rope,
            eps=self.eps,
            norm=self.norm,
        )
        return self.proj(out)

    @property
    def bias(self) -> Tensor | None:
        return skipped_bias(self.proj)


class MLP(nn.Sequential):
    """An MLP is two products with an activation in between: a GELU, which adds the bias of the
    first, or SwiGLU."""

    def __init__(self, stage: StageConfig, kind: str) -> None:
        width, hidden = stage.width, stage.hidden
        first: tuple[nn.Module, nn.Module] = (
            (nn.Linear(width, 2 * hidden), SwiGLU())
            if kind == "swiglu"
            else (SkipBiasLinear(width, hidden), nn.GELU(approximate="tanh"))
        )
        super().__init__(*first, SkipBiasLinear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the second product, whose ``bias`` the block hands on."""
        layers: Any = self
        first, activation, second = layers
        if isinstance(activation, SwiGLU):
            return second(activation(first(x)))
        bias = skipped_bias(first)
        return second(bias_gelu(first(x), bias, approximate=activation.approximate))

    @property
    def bias(self) -> Tensor | None:
        return skipped_bias(self[2])


class SwiGLU(nn.Module):
    """SwiGLU is silu(a) * b of the halves a and b of the channels (arXiv 2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b


class Block(nn.Module):
    """A Block of adaLN-Zero is attention and an MLP, each after a normalisation, before a gate.

    A gate and the normalisation after it are one operator. So a block begins with its input already
    normalised and ends with the normalisation of whatever follows it, and its six modulations are
    those from its first gate to that normalisation.
    """

    def __init__(self, stage: StageConfig, config: MSFConfig) -> None:
        super().__init__()
        self.norm = config.norm
        self.modulation = nn.Linear(stage.width, 6 * stage.width)
        self.attention = Attention(stage, config)
        self.mlp = MLP(stage, config.mlp)

    def forward(
        self, x: Tensor, h: Tensor, c: Tensor, grid: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Take and return the residual stream x (B, N, D) and h, x normalised and modulated; the
        condition c is (B, D), ``grid`` as in ``Attention``."""
        modulations = self.modulation(c).chunk(6, dim=1)
        attention_gate, mlp_shift, mlp_scale, mlp_gate, next_shift, next_scale = modulations
        x, h = gate_residual_adaln(
            x,
            self.attention(h, grid),
            attention_gate,
            mlp_shift,
            mlp_scale,
            y_bias=skipped_bias(self.attention),
            norm=self.norm,
        )
        return gate_residual_adaln(
            x,
            self.mlp(h),
            mlp_gate,
            next_shift,
            next_scale,
            y_bias=skipped_bias(self.mlp),
            norm=self.norm,
        )


class StageTransformer(nn.Module):
    """A StageTransformer predicts the velocity of a component f_i, given all below it (its prior).

    The prior is concatenated to the noisy component channel by channel. An input-side prior, as in
    cascaded diffusion (arXiv 2106.15282), is our choice: the paper's abstract does not say.
    """

    def __init__(self, config: MSFConfig, index: int) -> None:
        super().__init__()
        stage, classes, has_prior = config.stages[index], config.num_classes, index > 0
        self.stage, self.positions, self.norm = stage, config.positions, config.norm
        width, pixels = stage.width, stage.patch**2 * config.channels
        self.patch_embedding = nn.Linear(pixels * (2 if has_prior else 1), width)
        self.time_embedding = ScalarEmbedding(width, config.time_range, config.time_period)
        self.label_embedding = nn.Embedding(classes + 1, width) if classes else None
        self.prior_noise_embedding = ScalarEmbedding(width) if has_prior else None
        self.modulation = nn.Linear(width, 2 * width)  # shift and scale before the first block
        self.blocks = nn.ModuleList(Block(stage, config) for _ in range(stage.depth))
        self.output = nn.Linear(width, pixels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DiT's published code does: every block starts as the identity, the output
        as zero."""
        zeros = [self.modulation, *(block.modulation for block in self.blocks), self.output]
        scalars = [m for m in self.modules() if isinstance(m, ScalarEmbedding)]
        embeddings = [layer for embedding in scalars for layer in embedding]
        # The zeros come last, so that no other weight's draw depends on where they stand.
        for module in sorted(self.modules(), key=zeros.__contains__):
            if isinstance(module, nn.Linear):
                small = module in embeddings
                initialize(module, "weight", NORMAL if small else nn.init.xavier_uniform_)
                initialize(module, "bias", nn.init.zeros_)
                if module in zeros:
                    initialize(module, "weight", nn.init.zeros_)
            elif isinstance(module, nn.Embedding):
                initialize(module, "weight", NORMAL)
            elif isinstance(module, Attention):
                for name, fill in (("weight", nn.init.ones_), ("norm_bias", nn.init.zeros_)):
                    for x in "qk":
                        if getattr(module, f"{x}_{name}") is not None:
                            initialize(module, f"{x}_{name}", fill)

    @property
    def is_trained(self) -> bool:
        """Return True once the output is no longer the zero that it is initialised to."""
        weight = weight_of(self.output)
        return weight is None or bool(weight.any())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        prior: Tensor | None = None,
        prior_noise: Tensor | None = None,
        *,
        as_tokens: bool = False,
    ) -> Tensor:
        """Return the velocity (B, C, H, W) at x (B, C, H, W) and time t (B,) in [0, 1], noise being
        at 0; of a model that predicts noise, the noise at the diffusion step of number t.

        Args:
            x: any H and W that the patch divides.
            y: (B,) int64 labels, ``num_classes`` for none of them.
            prior: (B, C, H, W), standardised.
            prior_noise: (B,) deviations of the noise in the prior.
            as_tokens: leave the velocity in patches (B, N, p * p * C), which the sampler's step
                reads as they are.
        """
        size = (x.shape[2], x.shape[3])
        grid = (size[0] // self.stage.patch, size[1] // self.stage.patch)
        c = self.condition(t, y, prior_noise)
        if prior is not None:
            x = torch.cat([x, prior], dim=1)
        # The state stays in float32 whatever the model was cast to.
        patches = patchify(x, self.stage.patch).to(dtype_of(self.patch_embedding))
        x = self.patch_embedding(patches)
        if self.positions != "rope":
            x = x + sincos_2d(*grid, self.stage.width, x.device).to(x.dtype)

        h = adaln_modulate(x, *self.modulation(c).chunk(2, dim=1), norm=self.norm)
        for block in self.blocks:
            x, h = block(x, h, c, grid if self.positions != "sincos" else None)
        tokens = self.output(h)
        return tokens if as_tokens else unpatchify(tokens, self.stage.patch, size)

    def condition(self, t: Tensor, y: Tensor | None, prior_noise: Tensor | None) -> Tensor:
        """Return c (B, D), from which every modulation is computed."""
        c = self.time_embedding(t)
        if self.label_embedding is not None:
            c = c + self.label_embedding(y)
        if self.prior_noise_embedding is not None:
            c = c + self.prior_noise_embedding(prior_noise)
        return F.silu(c)
