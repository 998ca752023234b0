"""A VAE of diffusers, from a folder on this machine: images become latents, and latents images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.latent_index import LatentIndex, Vae
from ..files import checksum, printable, read_file
from ..modes import own_modes
from ..parsing import parse_object

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
KIND = "AutoencoderKL"
LARGEST = torch.finfo(torch.float16).max
DECODED = 16  # latents at once: 256 channels of 512 pixels squared take 0.27 GB an image


class Autoencoder:
    """An Autoencoder makes latents of images and images of latents by the ``AutoencoderKL`` that
    diffusers saved in ``folder``. Raise ValueError (one line) where there is none that can be
    loaded without running what it holds, ImportError where diffusers is missing."""

    @own_modes()
    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        _check(folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError(
                f"a VAE needs diffusers ({error}); run in the checkout: pip install '.[latents]'"
            ) from None
        try:
            model, found = AutoencoderKL.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,  # which would need accelerate
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds, with many lines
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"{printable(folder)}: not a readable VAE ({reason[0]})") from None
        if missing := found["missing_keys"]:  # diffusers would leave them random
            raise ValueError(f"{printable(folder)}: {sorted(missing)[0]} is missing in {WEIGHTS}")
        if (channels := (model.config.in_channels, model.config.out_channels)) != (3, 3):
            raise ValueError(
                f"{printable(folder)}: must take and make 3 channels (RGB), takes {channels[0]} "
                f"and makes {channels[1]}"
            )
        self.folder, self.device = folder, torch.device(device)
        self._model = model.float().eval().requires_grad_(False).to(self.device)
        self._factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.vae = Vae(
            sha256=checksum(folder / WEIGHTS),
            scaling_factor=model.config.scaling_factor,
            shift_factor=model.config.get("shift_factor") or 0.0,
        )

    def latent_shape(self, size: int) -> tuple[int, int, int]:
        """Return the shape of the latents of images of ``size`` squared. Raise ValueError where the
        VAE takes none of it."""
        if size < 1 or size % self._factor:
            raise ValueError(
                f"--size must be a multiple of {self._factor}, as the VAE makes one latent of so "
                f"many pixels, got {size}"
            )
        return (self._model.config.latent_channels, size // self._factor, size // self._factor)

    def image_size(self, latent_shape: tuple[int, int, int]) -> tuple[int, int]:
        """Return (H, W) of the images of latents (C, h, w). Raise ValueError where the VAE takes
        another number of channels."""
        channels, height, width = latent_shape
        if channels != (own := self._model.config.latent_channels):
            raise ValueError(
                f"{printable(self.folder)}: decodes latents of {own} channels, the model makes "
                f"{channels}; give the VAE of the latents that it was trained on"
            )
        return height * self._factor, width * self._factor

    def check_decodes(self, index: LatentIndex) -> None:
        """Raise ValueError (one line) unless this VAE makes images of the latents of ``index`` that
        are as large as those encoded, and scales latents alike. Its weights may be others: there
        are decoders that were trained for the encoder of another file."""
        pixels, _ = self.image_size(index.latent_shape)
        pairs = {
            "the number of pixels a side": (pixels, index.image_size),
            "scaling_factor": (self.vae.scaling_factor, index.vae.scaling_factor),
            "shift_factor": (self.vae.shift_factor, index.vae.shift_factor),
        }
        other = [f"{name} is {x} (not {y})" for name, (x, y) in pairs.items() if x != y]
        if other:
            raise ValueError(
                f"{printable(self.folder)}: does not fit the latents that the model was trained "
                f"on: {', '.join(other)}; give their VAE"
            )

    @own_modes()
    @torch.inference_mode()
    def moments(self, images: Tensor) -> Tensor:
        """Return mean and log-variance (B, 2, 2C, h, w) float32 of the posteriors of images
        (B, 3, H, W) in [-1, 1] and of their mirror images, NaN and infinity among them."""
        # On a CPU the bits of a convolution depend on how many images a batch has: with torch 2.6
        # and 2.13 nearly all batches of 2 to 62 differed from those of 64. Each image then goes
        # alone, with its mirror image, which took as long. On a GPU batches are several times as
        # fast, and the last bit may depend on their size.
        parts = images.split(1) if self.device.type == "cpu" else [images]
        return torch.cat([self._moments(part.to(self.device)).cpu() for part in parts])

    @own_modes()
    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (B, 3, H, W) float32 on the CPU, about in [-1, 1], of latents (B, C, h, w)
        in a model's scale: (latent - shift_factor) * scaling_factor."""
        latents = latents.float() / self.vae.scaling_factor + self.vae.shift_factor
        parts = latents.split(1 if self.device.type == "cpu" else DECODED)  # see ``moments``
        return torch.cat([self._model.decode(part.to(self.device)).sample.cpu() for part in parts])

    def _moments(self, images: Tensor) -> Tensor:
        both = torch.stack([images, images.flip(-1)], dim=1).flatten(0, 1)
        posterior = self._model.encode(both).latent_dist
        # The posterior has clamped the log-variance, which would hide that it is infinite.
        log_variance = posterior.parameters.chunk(2, dim=1)[1]
        log_variance = torch.where(log_variance.isfinite(), posterior.logvar, log_variance)
        return torch.cat([posterior.mean, log_variance], dim=1).unflatten(0, (-1, 2))


def problem(moments: Tensor) -> str:
    """Return why moments cannot be kept in float16, "" where they can."""
    if not moments.isfinite().all():
        return "the VAE makes NaN or infinity of it"
    if (largest := float(moments.abs().max())) > LARGEST:
        return f"the VAE makes {largest:.4g} of it, more than float16 can hold ({LARGEST:.0f})"
    return ""


def _check(folder: Path) -> None:
    """Raise ValueError (one line) unless ``folder`` holds a VAE, its weights in safetensors."""
    name = printable(folder)
    if not (folder / CONFIG).exists():
        raise ValueError(
            f"{name}: holds no VAE ({CONFIG} is missing); give the folder of an {KIND} of "
            "diffusers, in that of a pipeline its subfolder vae"
        )
    config: dict[str, Any] = parse_object(read_file(folder / CONFIG), folder / CONFIG)
    if config.get("_class_name") != KIND:
        raise ValueError(
            f"{name}: must hold an {KIND}, holds {json.dumps(config.get('_class_name'))}"
        )
    if any(config.get(name) is not None for name in ("latents_mean", "latents_std")):
        raise ValueError(
            f"{name}: standardises each channel of its latents (latents_mean, latents_std), which "
            "is not done here, as training standardises latents itself; set both to null in its "
            f"{CONFIG}"
        )
    if not (folder / WEIGHTS).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which may run code" if pickles else ""
        raise ValueError(
            f"{name}: {WEIGHTS} is missing{why}; save the VAE with save_pretrained, which writes it"
        )
