"""MSF: a pyramid and one transformer a scale; losses to train it, files to keep it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.nn import functional as F

from msf_kernels import flow_interpolate

from .checks import check_kind
from .config import MSFConfig
from .files import atomic_write, check_utf8, make_folder
from .interpolation import logit_normal_times, uniform_times
from .modes import has_values, is_batched, no_memory, outside, own_modes
from .pretrained import CONFIG_FILE, WEIGHTS_FILE, folder_of, missing, read_config
from .pyramid import Pyramid
from .seeds import drawn_from
from .transformer import StageTransformer
from .weights import check_shapes, check_tensors, plain_state

FSDP_CASTS = (
    "; where FSDP casts it, wrap the model with MixedPrecision(cast_root_forward_inputs=False), in "
    "FSDP2 MixedPrecisionPolicy(cast_forward_inputs=False)"
)


class MSF(nn.Module):
    """An MSF is a multi-scale latent factorization (arXiv 2501.13349) of pixels or latents.

    ``pyramid`` factorises and merges, ``stages[i]`` is the velocity field of component i. Set the
    statistics with ``pyramid.measure`` before training: they are part of the checkpoint.
    """

    def __init__(self, config: MSFConfig) -> None:
        super().__init__()
        check_kind(config, MSFConfig, "MSF: config")
        self.config, self._warned = config, False
        self.pyramid = Pyramid(config.levels, config.channels, config.upsample)
        self.stages = nn.ModuleList(
            StageTransformer(config, index) for index in range(len(config.stages))
        )

    @property
    def untrained_stages(self) -> tuple[str, ...]:
        """Return the names of the stages whose output is still the zero it is initialised to."""
        stages = zip(self.config.stage_names, self._plain_stages)
        return tuple(name for name, stage in stages if not stage.is_trained)

    @property
    def _plain_stages(self) -> list[Any]:
        """Return the stages, which DistributedDataParallel, for one, hides the parts of."""
        return [getattr(stage, "module", stage) for stage in self.stages]

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        stage: str | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the flow-matching loss of every stage, or of ``stage`` alone, and their sum as
        "total".

        The loss is the mean squared error of the velocity of a rectified flow (arXiv 2209.03003) at
        logit-normal times (arXiv 2403.03206) or uniform ones.

        Args:
            x: (B, C, H, W) images or latents, float32.
            y: (B,) int64 labels in [0, num_classes), None without classes.
            generator: draws all random numbers, on x's device.

        Wrappers such as DistributedDataParallel and ``torch.compile`` see a training step because
        it is the call of the model.
        """
        names = self.config.stage_names
        chosen = names if stage is None else (stage,)
        data = self._stage_data(x, y, chosen)
        losses = {
            name: self._image_losses(names.index(name), *data[name], y, generator)[0].mean()
            for name in chosen
        }
        return {**losses, "total": torch.stack(list(losses.values())).sum()}

    def image_losses(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        stage: str,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each image (B,) for ``stage``, of which a call of the model returns
        the mean, and the time (B,) in [0, 1] it was taken at; arguments as in ``forward``."""
        if hasattr(self, "unshard") and "image_losses" not in vars(self):
            # FSDP2 gathers the weights of what it has sharded for the call of the model alone.
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self, "image_losses")
            return self.image_losses(x, y, stage=stage, generator=generator)
        data = self._stage_data(x, y, (stage,))[stage]
        return self._image_losses(self.config.stage_names.index(stage), *data, y, generator)

    def _stage_data(
        self, x: Tensor, y: Tensor | None, chosen: Sequence[str]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Return by name what the ``chosen`` stages learn from, see ``Pyramid.stage_data``. Raise
        ValueError or TypeError unless x and y can be a training batch."""
        names = self.config.stage_names
        if self.config.prediction == "noise":
            raise ValueError(
                "training_losses: only velocities are trained, this model predicts noise"
            )
        for stage in chosen:
            if stage not in names:
                raise ValueError(f"training_losses: stage must be one of {names}, got {stage!r}")
        kind = x.dtype if isinstance(x, Tensor) else f"a {type(x).__name__}"
        if kind != torch.float32:
            cast = "" if kind not in (torch.bfloat16, torch.float16) else FSDP_CASTS
            raise ValueError(f"training_losses: x must be float32 (B, C, H, W), got {kind}{cast}")
        if not x.numel():
            raise ValueError("training_losses: x must hold images, got an empty batch")
        self._warn_of_unmeasured_statistics()
        data = self.pyramid.stage_data(x)
        self.config.check_size(tuple(x.shape[2:]))
        self.check_labels(y, len(x))
        return {name: data[names.index(name)] for name in chosen}

    def training_losses(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the losses that a call of the model returns; see ``forward``."""
        losses: dict[str, Tensor] = self(*args, **kwargs)
        return losses

    def _warn_of_unmeasured_statistics(self) -> None:
        """Warn once, before the first loss; later the statistics' values would cost a wait."""
        mean = self.pyramid.mean
        if self._warned or mean.is_meta or active_fake_mode() is not None or is_batched(mean):
            return
        self._warned = True
        if self.config.standardize and not self.pyramid.is_measured:
            warnings.warn(
                "MSF: pyramid.mean and pyramid.std are still 0 and 1; set them with "
                "pyramid.measure(batches) before training",
                stacklevel=outside(),
            )

    # It is called when a graph is made, and no part of it. torch.compiler.assume_constant_result
    # sets the same, and imports the compiler.
    _warn_of_unmeasured_statistics._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _image_losses(
        self,
        index: int,
        data: Tensor,
        below: Tensor | None,
        y: Tensor | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        batch, device = len(data), data.device
        random: dict[str, Any] = {
            "device": device,
            "dtype": torch.float32,
            **drawn_from(generator),
        }
        noise = torch.randn(data.shape, **random)
        if self.config.times == "uniform":
            t = uniform_times(batch, generator=generator, device=device)
        else:
            t = logit_normal_times(batch, self.config.time_std, generator=generator, device=device)
        x_t, target = flow_interpolate(data, noise, t)
        if y is not None:
            drop = torch.rand(batch, **random) < self.config.label_dropout
            y = torch.where(drop, self.config.num_classes, y)
        prior = prior_noise = None
        if below is not None:
            uniform = torch.rand(batch, **random)
            prior_noise = uniform * self.config.max_prior_noise
            noise = torch.randn(below.shape, **random)
            prior = self.prior(below, prior_noise, noise)
        velocity = self.stages[index](x_t, t, y, prior, prior_noise)
        return F.mse_loss(velocity.float(), target, reduction="none").flatten(1).mean(1), t

    def prior(self, x: Tensor, prior_noise: Tensor, noise: Tensor) -> Tensor:
        """Return p_i (B, C, 2h, 2w): x_hat_{i-1} ``x`` (B, C, h, w), standardised, plus
        ``prior_noise`` (B,) times ``noise`` (B, C, h, w), upsampled.

        Our choice: the noise is added before upsampling, where the errors of a generated base are,
        and every scale's prior is standardised by the base's statistics.
        """
        x = self.pyramid.standardize_base(x) + prior_noise[:, None, None, None] * noise
        return self.pyramid.upsample(x)

    def check_labels(self, y: Tensor | None, batch: int, *, null: bool = False) -> None:
        """Raise a ValueError unless y is (batch,) int64 in range, or None without classes;
        TypeError for what is no tensor. In a graph and on a GPU the range is an assertion, and in
        vmap it is not looked at."""
        if y is not None and not isinstance(y, Tensor):
            raise TypeError(f"labels must be a tensor (B,) of int64, got a {type(y).__name__}")
        classes = self.config.num_classes
        if (y is None) != (classes == 0):
            expected = f"(B,) in [0, {classes})" if classes else "None, this model has no classes"
            raise ValueError(
                f"labels must be {expected}, got {'None' if y is None else 'a tensor'}"
            )
        if y is None:
            return
        if y.dtype != torch.int64 or y.shape != (batch,):
            raise ValueError(f"labels must be int64 ({batch},), got {y.dtype} {tuple(y.shape)}")
        if is_batched(y):
            return
        in_range = ((y >= 0) & (y <= (classes if null else classes - 1))).all()
        if y.device.type != "cpu" or not has_values(y):
            # On a GPU every training step would wait for the one before if it had to be known here.
            if not y.is_meta:
                torch._assert_async(in_range, f"labels must be in [0, {classes})")
        elif not in_range:
            raise ValueError(
                f"labels must be in [0, {classes}), got {int(y.min())} to {int(y.max())}"
                + (f" ({classes} means no class)" if null else "")
            )

    def trained_labels(self, labels: Tensor) -> Tensor | None:
        """Return as which classes those of labels (B,) were trained: None without classes, and no
        class (B,) where every label was dropped."""
        if not self.config.num_classes:
            return None
        if self.config.label_dropout == 1:
            return torch.full_like(labels, self.config.num_classes)
        return labels

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors``, each whole or not at all.

        Of a model that FSDP2 has sharded all processes call it. Raise ValueError where the weights
        are not whole, as inside FSDP1, or hold NaN or infinity, which could not be read again.
        """
        directory, state = Path(directory), plain_state(self)
        with no_memory():
            check_shapes(state, MSF(self.config).state_dict())
        check_tensors(state, directory / WEIGHTS_FILE)
        make_folder(directory)
        with atomic_write(directory / WEIGHTS_FILE) as path:
            save_file(state, path)
        with atomic_write(directory / CONFIG_FILE) as path:
            path.write_text(self.config.to_json())

    def reset_parameters(self) -> None:
        """Initialise all parameters, and the statistics as before ``pyramid.measure``."""
        self.pyramid.reset_parameters()
        for stage in self._plain_stages:
            stage.reset_parameters()

    @classmethod
    @own_modes()
    def from_pretrained(cls, directory: str | os.PathLike[str], revision: str | None = None) -> MSF:
        """Read what ``save_pretrained`` wrote, on the CPU, in its dtype, in evaluation mode.

        A string "owner/name" that is no folder is a model of the Hugging Face Hub, ``revision`` its
        branch, tag or commit.

        Raise ValueError (one line) when a file is missing, corrupt or of another configuration, or
        the weights cannot make images.
        """
        directory = folder_of(directory, revision)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / name).is_file():
                raise ValueError(
                    f"{directory}: {missing(directory, name)}; expected a directory made by "
                    "save_pretrained"
                )
        if active_fake_mode() is not None:
            raise ValueError("from_pretrained: cannot read weights under FakeTensorMode; leave it")
        file = directory / WEIGHTS_FILE
        check_utf8(file)
        config = read_config(directory)
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: not a readable safetensors file ({error})") from None
        check_tensors(weights, file)
        with no_memory():  # what does not fit may be of any size
            model = cls(config)
        # In their own dtypes, and as copies: those of the file change with it.
        copies = {name: x.clone() for name, x in weights.items()}
        try:
            model.load_state_dict(copies, assign=True)
        except RuntimeError as error:
            detail = str(error).splitlines()[1].strip()
            raise ValueError(f"{file}: does not fit {CONFIG_FILE}: {detail}") from None
        if not (model.pyramid.std > 0).all():
            raise ValueError(f"{file}: pyramid.std must be positive")
        return model.eval()
