"""A model and the VAE of its latents as one object, after the pipelines of diffusers."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_kind
from .images import to_pil
from .model import MSF
from .modes import default_device, own_modes
from .parsing import any_whole, items_of, parse
from .pretrained import folder_of
from .progress import say
from .sampling import check_model, sample
from .training.config import class_names_of, read_run
from .training.identity import listed

if TYPE_CHECKING:
    from PIL.Image import Image

    from .config import MSFConfig
    from .encoding.vae import Autoencoder


def decoder_of(
    config: MSFConfig,
    data: str | None,
    folder: Path,
    device: torch.device | str,
    *,
    quiet: bool = False,
) -> Autoencoder:
    """Return the VAE in ``folder``, to decode latents of a model of ``config`` with. Unless
    ``quiet``, say so where others made the latents in ``data``, on which the model is trained.
    Raise ValueError (one line) where it does not fit these, or the model."""
    from .data.latent_index import is_latents, read_index
    from .encoding.vae import Autoencoder

    vae = Autoencoder(folder, device)
    vae.image_size((config.channels, *config.image_size))
    if data is not None and is_latents(data):
        index = read_index(Path(data))
        vae.check_decodes(index)
        if vae.vae.sha256 != index.vae.sha256 and not quiet:
            say(
                f"{folder}: its weights are not those of the VAE that made the model's latents, "
                f"whose sha256 begins with {index.vae.sha256[:8]}"
            )
    return vae


class Pictures(NamedTuple):
    """Pictures are what a pipeline makes: ``images`` is a list of PIL's."""

    images: list[Image]


class Pipeline:
    """A Pipeline makes pictures: ``pipe(labels).images``.

    Args:
        model: on the device that is to compute.
        vae: decodes its latents; None for a model of pixels.
        class_names: names by which labels may be given, in the order of their numbers.

    Raise ValueError where a stage is not trained yet, or the model makes latents and ``vae`` is
    none, or one of other latents, or the names are not one a class, TypeError for a model that is
    no MSF or a vae that is no Autoencoder.
    """

    def __init__(
        self, model: MSF, vae: Autoencoder | None = None, class_names: Sequence[str] = ()
    ) -> None:
        check_model(model, "Pipeline")
        config = model.config
        if untrained := model.untrained_stages:
            raise ValueError(f"Pipeline: not trained yet: {', '.join(untrained)}")
        if vae is None and config.channels not in (1, 3):
            raise ValueError(
                f"Pipeline: the model makes latents of {config.channels} channels, not pictures; "
                "give the vae that they are decoded with"
            )
        if vae is not None:
            from .encoding.vae import Autoencoder

            check_kind(vae, Autoencoder, "Pipeline: vae")
            vae.image_size((config.channels, *config.image_size))
        class_names = parse(class_names, tuple[str, ...], "Pipeline: class_names")
        if class_names and not len(class_names) == len(set(class_names)) == config.num_classes:
            raise ValueError(
                f"Pipeline: class_names must be {config.num_classes} different ones, one a class, "
                f"got {listed(class_names, 5)}"
            )
        self.model, self.vae, self.class_names = model, vae, class_names

    @classmethod
    @own_modes()
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Pipeline:
        """Load a model as ``MSF.from_pretrained`` does, and ``vae``, the folder of an AutoencoderKL
        of diffusers. Names of classes are those of the run that made ``directory``."""
        folder = folder_of(directory, revision)
        model = MSF.from_pretrained(folder).to(device)
        run = read_run(folder)
        names = class_names_of(folder, run, model.config.num_classes)
        data = run.data if run else None
        decoder = None if vae is None else decoder_of(model.config, data, Path(vae), device)
        return cls(model, decoder, names)

    @default_device()
    def __call__(
        self,
        labels: int | str | Sequence[int | str] | Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
        **options: Any,
    ) -> Pictures:
        """Make a picture of each label, a class's number or name, or of each seed where the model
        has no classes; one label may stand alone. ``seeds`` are 0, 1, ... by default; ``options``
        are those of ``msf.sample``.

        Raise ValueError for an unknown name, TypeError for what is no label, and as ``msf.sample``
        does.
        """
        numbers = None if labels is None else self._numbers(labels)
        if seeds is None:
            seeds = range(1 if numbers is None else len(numbers))
        made = sample(self.model, numbers, seeds=seeds, **options)
        return Pictures(list(map(to_pil, self.vae.decode(made) if self.vae else made)))

    def _numbers(self, labels: Any) -> Tensor:
        labels = labels.tolist() if isinstance(labels, Tensor) else labels
        items = items_of(labels)
        each = [labels] if items is None else items
        return torch.tensor([*map(self._number, each)], dtype=torch.int64)

    def _number(self, label: Any) -> int:
        if not isinstance(label, str):
            try:
                return any_whole(label, "label")
            except ValueError:
                raise TypeError(
                    f"Pipeline: labels must be classes' numbers or names, got {reprlib.repr(label)}"
                ) from None
        if label not in self.class_names:
            known = f"are {listed(self.class_names, 5)}" if self.class_names else "unknown"
            raise ValueError(f"Pipeline: no class is called {label!r}; names of classes {known}")
        return self.class_names.index(label)
