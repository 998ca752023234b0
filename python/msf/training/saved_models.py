"""The models in a run's folder, and their rebuilding from the states of its stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..config import MSFConfig
from ..files import hinted
from ..model import MSF
from ..pretrained import CONFIG_FILE, WEIGHTS_FILE
from ..progress import say
from .checkpoints import Checkpoints
from .config import REBUILDS, TrainingConfig, read_run
from .state import check_statistics, load_average, load_part


class SavedModels:
    """A SavedModels reads and writes the models in the run's folder ``path``: the one with averaged
    weights, and those with the averages that ``training`` has beside it. What is missing of one
    beside ``states``, which are saved after it, is rebuilt from them."""

    def __init__(self, path: Path, config: MSFConfig, training: TrainingConfig) -> None:
        self.path, self.config, self.seed = path, config, training.seed
        self.states = {name: Checkpoints(path, name) for name in config.stage_names}
        self._others = {part: path / part for part in _averages(training)}

    def stages_saved(self) -> list[str]:
        return [name for name, states in self.states.items() if states.files()]

    def can_be_rebuilt(self) -> bool:
        return bool(self.stages_saved()) and not self._needed()

    def read(self) -> MSF | None:
        """Return the model as last saved, None where nothing is yet."""
        if self.stages_saved() and (lost := _lost(self.path)):
            if needed := self._needed():
                raise ValueError(
                    f"{self.path}: {lost} is missing, and {', '.join(needed)}, without which it "
                    "cannot be rebuilt; restore one of them or choose another --out"
                )
            return self._of_states(self._initial(), "ema").eval()
        with hinted(self.can_be_rebuilt(), REBUILDS):
            has_config = (self.path / CONFIG_FILE).exists()
            return MSF.from_pretrained(self.path) if has_config else None

    def repair(self) -> MSF | None:
        """Write what is missing, and return the model as last saved, None where nothing is yet.
        Raise ValueError where a model is damaged."""
        model = self.read()
        if model and self.stages_saved():
            self._complete(self.path, model)
            run = read_run(self.path)
            for part, folder in self._others.items():
                if run and part not in _averages(run.training) and not folder.exists():
                    continue  # it begins with the first checkpoint
                self._complete(folder, self._other(part))
                self.check_statistics(folder / WEIGHTS_FILE, model)
        return model

    def check_statistics(self, file: Path, model: MSF) -> None:
        """Raise ValueError where those in ``file`` are not those of ``model``, as last saved."""
        check_statistics(file, model.pyramid, self.path / WEIGHTS_FILE)

    def _complete(self, folder: Path, model: MSF) -> None:
        if lost := _lost(folder):
            model.save_pretrained(folder)
            say(f"{folder}: rebuilt {lost} from the states")

    def save(self, model: MSF, index: int, state: Mapping[str, Tensor], file: Path) -> None:
        """Write ``model`` with the averages of stage ``index`` in the ``state`` to be ``file``, and
        the other models, whose other stages stay as they were last saved."""
        load_part(model.stages[index], "ema.", state, file)
        model.save_pretrained(self.path)
        for part, folder in self._others.items():
            model = self._other(part)
            load_part(model.stages[index], f"{part}.", state, file)
            model.save_pretrained(folder)

    def _other(self, part: str) -> MSF:
        """Return the model with the average ``part``. What has no state yet began, as in
        ``StageTrainer``, with the average that is kept."""
        if not _lost(self._others[part]):
            with hinted(bool(self.stages_saved()), REBUILDS):
                return MSF.from_pretrained(self._others[part])
        return self._of_states(MSF.from_pretrained(self.path), part)

    def _of_states(self, model: MSF, part: str) -> MSF:
        loaded: list[Path] = []
        for index, states in enumerate(self.states.values()):
            if file := states.newest_whole():
                load_average(file, model, index, part)
                for other in loaded:
                    check_statistics(other, model.pyramid, file)
                loaded.append(file)
        return model

    def _initial(self) -> MSF:
        """Return the model that training began with, whatever else is drawn."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            return MSF(self.config)

    def _needed(self) -> list[str]:
        """Return the states that are missing to rebuild the model: those of all stages, but for
        what a run that began with new weights is known not to have trained."""
        run, saved = read_run(self.path), self.stages_saved()
        knows = run is not None and not run.start and set(saved) <= set(run.trained)
        trained = run.trained if run and knows else self.config.stage_names
        return [self.states[name].newest.name for name in trained if name not in saved]


def _averages(training: TrainingConfig) -> list[str]:
    return [f"ema-{decay}" for decay in training.extra_ema_decays]


def _lost(folder: Path) -> str:
    """Return what is missing of the model in ``folder``."""
    return " and ".join(x for x in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / x).exists())
