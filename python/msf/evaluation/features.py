"""The small network whose features the distances are measured in, trained on a split of its own.

A network trained on the generator's images would know them by heart and tell them from unseen real
ones: the real-against-real distance becomes meaningless. Hence the third split.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import ImageData
from ..modes import own_modes
from ..progress import follow

WIDTH, FEATURE_DIM = 16, 64
STEPS, BATCH_SIZE, LEARNING_RATE = 150, 64, 3e-3
MAX_NOISE = 0.05


class FeatureNetwork(nn.Module):
    """A FeatureNetwork has convolutions down to about 4x4, pooled to 2x2, then a feature and a
    class for every image.

    The features are the inputs of the last ReLU, layer-normalised: their length, and with it the
    scale of every distance, does not depend on how confident the classifier became. There are 64 of
    them, because their covariance is estimated from a few hundred images.
    """

    def __init__(self, image_size: tuple[int, int], channels: int, num_classes: int) -> None:
        super().__init__()
        halvings = max(0, round(math.log2(min(image_size) / 4)))
        widths = [WIDTH * min(2**i, 4) for i in range(halvings + 1)]
        layers = [*_convolution(channels, WIDTH), *_convolution(WIDTH, WIDTH)]
        for narrow, wide in pairwise(widths):
            layers += [*_convolution(narrow, wide, stride=2), *_convolution(wide, wide)]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.project = nn.Linear(4 * widths[-1], FEATURE_DIM)
        self.classifier = nn.Linear(FEATURE_DIM, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (B, C, H, W) in [-1, 1] to features (B, 64) and logits (B, K)."""
        features = F.layer_norm(self.project(self.trunk(x)), (FEATURE_DIM,))
        return features, self.classifier(features.relu())


def _convolution(in_channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


@own_modes()
def train_feature_network(
    data: ImageData, *, seed: int = 0, steps: int = STEPS, progress: bool = False
) -> FeatureNetwork:
    """Train a classifier of ``data``; the same seed gives the same network, in evaluation mode.

    The only augmentation is Gaussian noise of a standard deviation up to 0.05, 6 of 255 grey
    levels: without it, that much noise turned half of the 16x16 textures into grass. Affine
    augmentation blurs, and a network trained with it took sharp gravel for grass.

    With one class there is nothing to classify: the network keeps its random weights, which still
    give a usable, if blunter, distance.
    """
    channels, height, width = data[0][0].shape
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone, which is forked
        network = FeatureNetwork((height, width), channels, data.num_classes)
        if data.num_classes > 1:
            _fit(network, data, steps, progress)
    return network.eval().requires_grad_(False)


def _fit(network: FeatureNetwork, data: ImageData, steps: int, progress: bool) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in follow(range(steps), "feature network", steps, "steps", shown=progress):
        images, labels = data.batch(torch.randint(len(data), (BATCH_SIZE,)))
        noise = MAX_NOISE * torch.rand(BATCH_SIZE, 1, 1, 1) * torch.randn_like(images)
        _, logits = network(images + noise)
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        schedule.step()


@own_modes()
@torch.no_grad()
def extract(network: FeatureNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
    """Map images (B, C, H, W), clamped to [-1, 1], to features (B, 64) float64 and classes (B,)
    int64."""
    features, logits = network(images.clamp(-1, 1))
    return features.double(), logits.argmax(1)
