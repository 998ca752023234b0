"""The Inception-v3 of the Frechet inception distance (Szegedy et al. 2015, Heusel et al. 2017).

It is the network of TensorFlow's release of 2015-12-05, which all published figures are measured
in, with its peculiarities: its average pools do not count padding, its last block has a max pool,
and it resizes images by bilinear interpolation that neither filters nor aligns corners. Its weights
are those that torch-fidelity and pytorch-fid publish, under the same names.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..files import check_is_file
from ..modes import no_memory, own_modes
from ..weights import check_tensors

SIZE = 299
POOL_DIM, CLASSES = 2048, 1008
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
PUBLISHED = "6726825d"
WEIGHTS = (
    f"pt_inception-2015-12-05-{PUBLISHED}.pth of pytorch-fid's releases "
    "(github.com/mseitzer/pytorch-fid), or the same of torch-fidelity's"
)

average_pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
max_pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halving_pool = partial(F.max_pool2d, kernel_size=3, stride=2)


class Features(NamedTuple):
    """Features of B images are pool (B, 2048), of which FID is, and spatial (B, 2023), of which
    sFID is (Nash et al. 2021), float32."""

    pool: Tensor
    spatial: Tensor


class Convolution(nn.Module):
    """A Convolution without bias, batch normalisation and ReLU. Its shape is "channels height x
    width / stride"; without a stride, and if ``padded``, it keeps the image's size."""

    def __init__(self, channels: int, shape: str, *, padded: bool = True) -> None:
        super().__init__()
        shape, _, stride = shape.partition("/")
        self.out_channels, kernel = int(shape.split()[0]), shape.split()[1]
        height, width = map(int, kernel.split("x"))
        self.conv = nn.Conv2d(
            channels,
            self.out_channels,
            (height, width),
            stride=int(stride or 1),
            padding=(height // 2, width // 2) if padded and not stride else 0,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(self.out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """A Block concatenates its branches, chains of convolutions of which two may stand side by side
    (+). That called branch_pool begins with ``pool``."""

    def __init__(
        self, channels: int, branches: dict[str, str], pool: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.pool, self.out_channels = pool, 0
        self.branches: dict[str, list[list[str]]] = {}  # names of convolutions
        for branch, chain in branches.items():
            self.branches[branch], width = [], channels
            steps = chain.split(", ") if chain else []
            for number, step in enumerate(steps, 1):
                layers = [Convolution(width, shape) for shape in step.split(" + ")]
                prefix = branch if len(steps) == 1 else f"{branch}_{number}"
                names = [prefix] if len(layers) == 1 else [f"{prefix}{letter}" for letter in "ab"]
                for name, layer in zip(names, layers, strict=True):
                    self.add_module(name, layer)
                self.branches[branch].append(names)
                width = sum(layer.out_channels for layer in layers)
            self.out_channels += width

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch, chain in self.branches.items():
            y = self.pool(x) if branch == "branch_pool" else x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _block_35(pool_channels: int) -> dict[str, str]:
    return {
        "branch1x1": "64 1x1",
        "branch5x5": "48 1x1, 64 5x5",
        "branch3x3dbl": "64 1x1, 96 3x3, 96 3x3",
        "branch_pool": f"{pool_channels} 1x1",
    }


def _block_17(c: int) -> dict[str, str]:
    return {
        "branch1x1": "192 1x1",
        "branch7x7": f"{c} 1x1, {c} 1x7, 192 7x1",
        "branch7x7dbl": f"{c} 1x1, {c} 7x1, {c} 1x7, {c} 7x1, 192 1x7",
        "branch_pool": "192 1x1",
    }


TO_17: dict[str, str] = {
    "branch3x3": "384 3x3/2",
    "branch3x3dbl": "64 1x1, 96 3x3, 96 3x3/2",
    "branch_pool": "",
}
TO_8: dict[str, str] = {
    "branch3x3": "192 1x1, 320 3x3/2",
    "branch7x7x3": "192 1x1, 192 1x7, 192 7x1, 192 3x3/2",
    "branch_pool": "",
}
BLOCK_8: dict[str, str] = {
    "branch1x1": "320 1x1",
    "branch3x3": "384 1x1, 384 1x3 + 384 3x1",
    "branch3x3dbl": "448 1x1, 384 3x3, 384 1x3 + 384 3x1",
    "branch_pool": "192 1x1",
}
BLOCKS: dict[str, tuple[dict[str, str], Callable[[Tensor], Tensor]]] = {
    "Mixed_5b": (_block_35(32), average_pool),
    "Mixed_5c": (_block_35(64), average_pool),
    "Mixed_5d": (_block_35(64), average_pool),
    "Mixed_6a": (TO_17, halving_pool),
    "Mixed_6b": (_block_17(128), average_pool),
    "Mixed_6c": (_block_17(160), average_pool),
    "Mixed_6d": (_block_17(160), average_pool),  # TensorFlow's mixed_6
    "Mixed_6e": (_block_17(192), average_pool),
    "Mixed_7a": (TO_8, halving_pool),
    "Mixed_7b": (BLOCK_8, average_pool),
    "Mixed_7c": (BLOCK_8, max_pool),
}


class Inception(nn.Module):
    """Inception maps images to ``Features``; ``fc`` makes the logits of its 1,008 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, "32 3x3/2")
        self.Conv2d_2a_3x3 = Convolution(32, "32 3x3", padded=False)
        self.Conv2d_2b_3x3 = Convolution(32, "64 3x3")
        self.Conv2d_3b_1x1 = Convolution(64, "80 1x1")
        self.Conv2d_4a_3x3 = Convolution(80, "192 3x3", padded=False)
        channels = 192
        for name, (branches, pool) in BLOCKS.items():
            block = Block(channels, branches, pool)
            self.add_module(name, block)
            channels = block.out_channels
        self.fc = nn.Linear(POOL_DIM, CLASSES)

    def forward(self, images: Tensor) -> Features:
        """Map images (B, 3, H, W) of 0..255, uint8 or float32, to features.

        The spatial ones are in TensorFlow's order, row, column, channel.
        """
        x = (resize(images.float()) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halving_pool(x)))
        x = halving_pool(x)
        for name in BLOCKS:
            block = self.get_submodule(name)
            if name == "Mixed_6d":
                spatial = block.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS]
            x = block(x)
        return Features(x.mean((2, 3)), spatial.permute(0, 2, 3, 1).flatten(1))


def resize(x: Tensor) -> Tensor:
    """Resize x (B, C, H, W) to (B, C, 299, 299) as TensorFlow 1 does: pixel i is taken at i * H /
    299, between its two neighbours, however many lie between that and the next."""
    for axis in (3, 2):
        n = x.shape[axis]
        at = torch.arange(SIZE, device=x.device) * torch.tensor(n / SIZE, device=x.device)
        below = at.long()
        weight = (at - below).view(-1, *[1] * (3 - axis))
        low, high = (x.index_select(axis, i) for i in (below, (below + 1).clamp(max=n - 1)))
        x = low + (high - low) * weight
    return x


def load_inception(path: Path) -> Inception:
    """Return the network with the weights in a file of safetensors or of ``torch.save``, in
    evaluation mode on the CPU. Raise ValueError, one line, where there are none or others."""
    check_is_file(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file; get {WEIGHTS}")
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the protocol of a pickle that it then refuses
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds: any byte may be another
        raise ValueError(f"{path}: not a readable file of weights; get {WEIGHTS}") from None
    with own_modes(), no_memory():
        network = Inception()
    state = _fitted(found, network.state_dict(), path)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _fitted(found: Any, expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return the weights ``found``. Raise ValueError unless they have the ``expected`` shapes and
    are finite numbers."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not weights; get {WEIGHTS}")
    state, counters = {}, {}
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):  # for training; not every file has them
            counters[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            continue
        right, got = list(tensor.shape), list(getattr(found.get(name), "shape", [])) or "none"
        if right != got:
            raise ValueError(
                f"{path}: {name} must be {right}, got {got}, in FID's network; get {WEIGHTS}"
            )
        state[name] = found[name].float()
    check_tensors(state, path)
    return state | counters


@own_modes()
@torch.no_grad()
def extract(network: Inception, images: Tensor) -> Features:
    """Map images (B, 3, H, W) uint8 to features, in float32 without TensorFloat-32."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        return network(images)
