"""The factorization of an image into a low-resolution base and residuals (arXiv 2501.13349)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msf_kernels import guided_euler_merge, pyramid_merge, pyramid_split

from .checks import check_real


class Pyramid(nn.Module):
    """A Pyramid splits, merges and holds the statistics that standardise what the stages see.

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
        self.register_buffer("mean", torch.zeros(levels + 1, channels, dtype=torch.float32))
        self.register_buffer("std", torch.ones(levels + 1, channels, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Set the statistics that change nothing."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    @property
    def is_measured(self) -> bool:
        """Return False as long as the statistics are those that change nothing."""
        return bool(self.mean.any()) or bool((self.std != 1).any())

    def split(self, x: Tensor) -> list[Tensor]:
        """Split x (B, C, H, W) into [f_0 .. f_N], f_i (B, C, H / 2^{N-i}, W / 2^{N-i})."""
        self._check(x)
        components: list[Tensor] = []
        for _ in range(self.levels):
            x, residual = pyramid_split(x, mode=self.mode)
            components.insert(0, residual)
        return [x, *components]

    def stage_data(self, x: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Split x (B, C, H, W) into what stage i learns from: (f_i, x_hat_{i-1}).

        f_i is standardised, and x_hat_{i-1}, the image below it, is in data units; the base has
        none.
        """
        self._check(x)
        data: list[tuple[Tensor, Tensor | None]] = []
        for i in range(self.levels, 0, -1):
            mean, std = self._statistics(i)
            x, residual = pyramid_split(x, mode=self.mode, mean=mean, std=std)
            data.insert(0, (residual, x))
        return [(self.standardize_base(x), None), *data]

    def _check(self, x: Tensor) -> None:
        check_real(x, "Pyramid.split: x must be a tensor (B, C, H, W)")
        channels, multiple = self.mean.shape[1], 2**self.levels
        if x.dim() != 4 or x.shape[1] != channels or any(n % multiple for n in x.shape[2:]):
            raise ValueError(
                f"Pyramid.split: x must be (B, {channels}, H, W) with sides a multiple "
                f"of {multiple}, got {tuple(x.shape)}"
            )

    def merge(self, components: Sequence[Tensor]) -> Tensor:
        """Merge [f_0 .. f_i] into x_hat_i (B, C, h, w) at the last one's scale."""
        if isinstance(components, Tensor):
            raise TypeError("Pyramid.merge: components must be a list of tensors, got one tensor")
        if not 1 <= len(components) <= self.levels + 1:
            raise ValueError(
                f"Pyramid.merge: expected 1 to {self.levels + 1} components, got {len(components)}"
            )
        x = components[0]
        check_real(x, "Pyramid.merge: components[0] must be a tensor (B, C, h, w)")
        for residual in components[1:]:
            x = pyramid_merge(x, residual, mode=self.mode)
        return x

    def upsample(self, x: Tensor) -> Tensor:
        """Return U(x) (B, C, 2h, 2w) of x (B, C, h, w)."""
        return F.interpolate(x, scale_factor=2, mode=self.mode)

    def standardize_base(self, x: Tensor) -> Tensor:
        """Bring x (B, C, h, w) by the base's statistics to mean 0 and variance 1 a channel."""
        mean, std = self._statistics(0)
        return (x - mean[:, None, None]) / std[:, None, None]

    def unstandardize_base(self, z: Tensor) -> Tensor:
        """Invert ``standardize_base``."""
        mean, std = self._statistics(0)
        return z * std[:, None, None] + mean[:, None, None]

    def _statistics(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mean and deviation (C,) in float32, whatever the model was cast to."""
        return self.mean[index].float(), self.std[index].float()

    def last_step(self, below: Tensor, index: int, patch: int) -> Callable[..., Tensor]:
        """Return the step that ends the sampling of f_i and, in the same pass, adds it to the image
        ``below`` (B, C, h, w): it takes the arguments of ``guided_euler_step`` and returns x_hat_i
        (B, C, 2h, 2w) in data units."""
        mean, std = self._statistics(index)
        return partial(
            guided_euler_merge, base=below, patch=patch, mode=self.mode, mean=mean, std=std
        )

    def project(self, x: Tensor, base: Tensor) -> Tensor:
        """Return the image closest to x (B, C, 2h, 2w) whose pool is base (B, C, h, w)."""
        if self.mode != "nearest":
            raise ValueError(
                f"projection needs upsample='nearest', this pyramid uses {self.mode!r}"
            )
        _, residual = pyramid_split(x)
        return pyramid_merge(base, residual)

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set ``mean`` and ``std`` from images (B, C, H, W), accumulated in float64."""
        count = torch.zeros(self.levels + 1, 1, dtype=torch.float64, device="cpu")
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
