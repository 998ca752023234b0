"""The factorization: an image as a low-resolution base and one residual a scale (arXiv
2501.13349)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msf_kernels import guided_euler_merge, pyramid_merge, pyramid_split


class Pyramid(nn.Module):
    """Split, merge and the per-scale statistics that standardise what the stages see.

    With D a 2x2 average pool and U the upsampling ("nearest" or "bilinear"), N = ``levels``:

        f_0 = D^N(x),   f_i = D^{N-i}(x) - U(D^{N-i+1}(x))

    With nearest upsampling UD is an orthogonal projection, so D(f_i) = 0 and pooling a merged image
    gives its base. ``mean`` and ``std`` (N + 1, C) are buffers: they travel inside the checkpoint.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, levels: int, channels: int, mode: str = "nearest") -> None:
        super().__init__()
        self.levels, self.mode = levels, mode
        self.register_buffer("mean", torch.zeros(levels + 1, channels))
        self.register_buffer("std", torch.ones(levels + 1, channels))

    def split(self, x: Tensor) -> list[Tensor]:
        """x (B, C, H, W) -> [f_0 .. f_N], f_i (B, C, H / 2^{N-i}, W / 2^{N-i})."""
        if not isinstance(x, Tensor):
            kind = type(x).__name__
            raise TypeError(f"Pyramid.split: x must be a tensor (B, C, H, W), got {kind}")
        multiple = 2**self.levels
        if (
            x.dim() != 4
            or x.shape[1] != self.mean.shape[1]
            or any(n % multiple for n in x.shape[2:])
        ):
            raise ValueError(
                f"Pyramid.split: x must be (B, {self.mean.shape[1]}, H, W) with sides a multiple "
                f"of {multiple}, got {tuple(x.shape)}"
            )
        components: list[Tensor] = []
        for _ in range(self.levels):
            x, residual = pyramid_split(x, mode=self.mode)
            components.insert(0, residual)
        return [x, *components]

    def merge(self, components: Sequence[Tensor]) -> Tensor:
        """[f_0 .. f_i] -> x_hat_i (B, C, h, w) at the last one's scale; inverse of ``split``."""
        if isinstance(components, Tensor):
            raise TypeError("Pyramid.merge: components must be a list of tensors, got one tensor")
        if not 1 <= len(components) <= self.levels + 1:
            raise ValueError(
                f"Pyramid.merge: expected 1 to {self.levels + 1} components, got {len(components)}"
            )
        x = components[0]
        for residual in components[1:]:
            x = pyramid_merge(x, residual, mode=self.mode)
        return x

    def upsample(self, x: Tensor) -> Tensor:
        """U: (B, C, h, w) -> (B, C, 2h, 2w)."""
        return F.interpolate(x, scale_factor=2, mode=self.mode)

    def standardize(self, index: int, f: Tensor) -> Tensor:
        """Component ``index`` (B, C, h, w) in data units -> zero mean, unit variance a channel."""
        mean, std = self._statistics(index)
        return (f - mean[:, None, None]) / std[:, None, None]

    def unstandardize(self, index: int, z: Tensor) -> Tensor:
        """The inverse of ``standardize``."""
        mean, std = self._statistics(index)
        return z * std[:, None, None] + mean[:, None, None]

    def _statistics(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and deviation (C,) in float32, as the images are, whatever the model was cast to."""
        return self.mean[index].float(), self.std[index].float()

    def last_step(self, below: Tensor, index: int, patch: int) -> Callable[..., Tensor]:
        """The step that ends the sampling of f_i and, in the same pass, adds it to what lies
        ``below``: it takes the arguments of ``guided_euler_step`` and returns x_hat_i in data
        units."""
        mean, std = self._statistics(index)
        return partial(
            guided_euler_merge, base=below, patch=patch, mode=self.mode, mean=mean, std=std
        )

    def project(self, x: Tensor, base: Tensor) -> Tensor:
        """The image closest to x (B, C, 2h, 2w) with D(x) == base (B, C, h, w); nearest only."""
        if self.mode != "nearest":
            raise ValueError(
                f"projection needs upsample='nearest', this pyramid uses {self.mode!r}"
            )
        _, residual = pyramid_split(x)
        return pyramid_merge(base, residual)

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set ``mean`` and ``std`` from images (B, C, H, W), accumulated in float64."""
        count = torch.zeros(self.levels + 1, 1, dtype=torch.float64)
        total, squares = (
            torch.zeros_like(self.mean, dtype=torch.float64, device="cpu") for _ in range(2)
        )
        for x in batches:
            for i, f in enumerate(self.split(x)):
                f = f.double()
                count[i] += f.numel() / f.shape[1]
                total[i] += f.sum((0, 2, 3)).cpu()
                squares[i] += f.square().sum((0, 2, 3)).cpu()
        if not count.all():
            raise ValueError("Pyramid.measure: no images to measure the statistics on")
        mean = total / count
        if not squares.isfinite().all():
            raise ValueError("Pyramid.measure: the images hold NaN or infinity")
        # A constant component (the residual of flat images) has no scale: keep it as it is.
        variance = (squares / count - mean.square()).clamp(min=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(variance > 1e-12, variance.sqrt(), 1.0))
