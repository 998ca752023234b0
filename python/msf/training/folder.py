"""The folder of a training run.

config.json, model.safetensors   the model with averaged weights: what ``MSF.from_pretrained`` reads
training.json                    data source, its classes and fingerprint, and ``TrainingConfig``
files.json, contents.json        names and sizes of the data's files, where it has any, and
                                 digests of some
state-<stage>.safetensors        all that training changes, to continue from
checkpoints/<stage>-<step>.safetensors   earlier states
ema-<decay>/                     models with the weights of other averages
metrics.jsonl, tensorboard/      losses and rates
samples-<stage>-<step>.png, loss.png
README.md                        the model card

Several processes may train different stages into one folder at once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import MSFConfig
from ..files import (
    abandoned,
    atomic_write,
    check_folder,
    check_is_file,
    hinted,
    make_folder,
    printable,
    remove,
)
from ..model import MSF
from ..pretrained import CONFIG_FILE, read_config
from ..progress import say
from . import metrics
from .card import model_card
from .config import CHECKPOINTS, REBUILDS_CONFIG, RUN_FILE, RunConfig, read_run
from .identity import (
    CONTENTS_FILE,
    FILES_FILE,
    compare_data,
    compare_settings,
    fingerprint,
    read_files,
    sample_contents,
    settings_of,
    write_contents,
    write_files,
)
from .locks import claim, locked
from .saved_models import SavedModels
from .stage import StageTrainer
from .state import write_state

CARD, PLOT = "README.md", "loss.png"


class RunFolder:
    """A RunFolder opens ``path`` for the training ``run`` of ``config``.

    Raise ValueError when the folder holds something already and ``resume`` is not set, or when what
    it holds is no run, one of another model, seed or holdout, or one of other data than ``files``,
    of which ``digest`` hashes the one that it is given the name of, and ``run.class_names``, unless
    ``data_changed``. New images are no other data, and the rest of ``run`` may change while no
    other process trains here. A run that ended before its first checkpoint is no obstacle.
    """

    def __init__(
        self,
        path: Path,
        config: MSFConfig,
        run: RunConfig,
        *,
        resume: bool,
        files: Mapping[str, int] | None = None,
        digest: Callable[[str], str] = str,
        data_changed: bool = False,
    ) -> None:
        self.path, self.config, self.run, self.resume = path, config, run, resume
        self.models = SavedModels(path, config, run.training)
        self.files, self.data_changed = files or {}, data_changed
        self._digest = cache(digest)
        self._contents = sample_contents(self.files, self._digest)
        self.changes: list[str] = []  # what this training does otherwise than the run did
        self._other_data = False
        check_folder(path)
        if path.exists():
            with locked(self.path):
                self._check()

    @contextmanager
    def claimed(self, stages: Sequence[str]) -> Iterator[None]:
        """Make the folder, and let no other process train ``stages`` into it."""
        make_folder(self.path)
        with ExitStack() as claims:
            with locked(self.path):
                self._check()  # another process may have come meanwhile
                if self._is_abandoned():
                    (self.path / "metrics.jsonl").unlink(missing_ok=True)
                    shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
                for stage in stages:
                    # The logs are all that a stage has from the start and never replaces.
                    logs = self.path / "tensorboard" / stage
                    logs.mkdir(parents=True, exist_ok=True)
                    if not claims.enter_context(claim(logs)):
                        raise ValueError(
                            f"{self.path}: another process is training {stage} here; "
                            "wait for its end or choose another --out"
                        )
                self._check_states(stages, self.models.repair())
            yield

    def begin(self, trainers: Sequence[StageTrainer]) -> None:
        """Say in the folder what is trained, when nothing can refuse the run any more."""
        with locked(self.path):
            for trainer in trainers:
                metrics.forget(
                    self.path / "metrics.jsonl",
                    self.config.stage_names,
                    trainer.name,
                    after=trainer.step_number,
                )
            self._remove_abandoned()
            saved = tuple(self.models.stages_saved())
            found = read_run(self.path)
            before = found or replace(self.run, trained=saved)
            if self._has_states():
                self.run = replace(self.run, start=before.start, trained=before.trained)
            ended = all(trainer.step_number == trainer.total_steps for trainer in trainers)
            if found and ended:
                self._keep_settings(found)
            if not (found and ended and self._other_data):
                write_files(self.path, self.files)
                write_contents(self.path, self._contents)
            self._write_run(self.run)

    def _keep_settings(self, found: RunConfig) -> None:
        """Change nothing of the run ``found`` but the number of its steps and the place of its
        data, as no step is left to take otherwise; what else was to change is said."""
        training = replace(found.training, steps=self.run.training.steps)
        self.run = replace(found if self._other_data else self.run, training=training)
        before, now = (settings_of(self.config, run) for run in (found, self.run))
        kept = compare_settings(self.path, before, now)
        if left := [change for change in self.changes if change not in kept]:
            say(f"{printable(self.path)}: no step is left to take with {', '.join(left)}")
        self.changes = kept

    def _has_states(self) -> bool:
        return any(self.path.glob("[!.]*.safetensors"))

    def _write_run(self, run: RunConfig) -> None:
        with atomic_write(self.path / RUN_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(run), indent=2) + "\n")

    def _check(self) -> None:
        # What another process is just writing has a hidden name.
        if all(file.name.startswith(".") for file in self.path.iterdir()):
            return
        if not self._is_abandoned():
            if not self.resume:
                raise ValueError(
                    f"{self.path}: exists and is not empty; continue its run with --resume "
                    "or choose another --out"
                )
            self._check_same()
        self._check_kinds()

    def _check_kinds(self) -> None:
        """Raise ValueError where something else has the name of a file or folder that is written,
        which may be after hours."""
        with hinted(True, "msf train --resume writes it anew"):
            for name in (FILES_FILE, CONTENTS_FILE, CARD, PLOT):
                check_is_file(self.path / name)
            for folder in (self.path / CHECKPOINTS, self.path / "tensorboard"):
                if folder.exists() and not folder.is_dir():
                    raise ValueError(f"{folder}: is no folder")

    def _is_abandoned(self) -> bool:
        """Return whether the run here has saved nothing, and no process is about to."""
        if read_run(self.path) is None or self._has_states():
            return False
        return not self._is_busy()

    def _is_busy(self) -> bool:
        """Return whether some process is training a stage here."""
        with ExitStack() as claims:
            logs = [path for path in self.path.glob("tensorboard/*") if path.is_dir()]
            return not all([claims.enter_context(claim(folder)) for folder in logs])

    def _check_same(self) -> None:
        found = read_run(self.path)
        if found is None and not self.models.stages_saved():
            raise ValueError(
                f"{self.path}: holds files but no run ({RUN_FILE}); choose another --out"
            )
        run = found or self._run_of_files()
        if self.run.start not in ("", run.start):
            raise ValueError(
                f"{self.path}: the run in this folder began with {run.start or 'new weights'}, not "
                f"with {self.run.start}; leave out --from, or choose another --out"
            )
        saved = (self.path / CONFIG_FILE).exists()
        with hinted(self.models.can_be_rebuilt(), REBUILDS_CONFIG):
            config = read_config(self.path) if saved else self.config
        theirs = settings_of(config, run)
        self.changes = compare_settings(self.path, theirs, settings_of(self.config, self.run))
        for states, total in zip(self.models.states.values(), self.run.training.steps):
            states.check_total(total)
        if found is None:
            self.changes.append(f"settings given anew, seed and holdout too ({RUN_FILE} is lost)")
        change = compare_data(
            self.path,
            run,
            self.run,
            self.files,
            self._digest,
            accepted=self.data_changed,
            otherwise="continue with",
        )
        if self.changes and self._is_busy():
            raise ValueError(
                f"{self.path}: another process is training here; wait for its end to resume with "
                + ", ".join(self.changes)
            )
        if change:
            self.changes.append(change)
        self._other_data = change is not None

    def _run_of_files(self) -> RunConfig:
        """Return this run with the data that the folder's other files tell, for want of its own. As
        many classes as the model has, with all files that there were, are the classes."""
        before = fingerprint(read_files(self.path))
        return replace(self.run, fingerprint=before or self.run.fingerprint)

    def _check_states(self, stages: Sequence[str], model: MSF | None) -> None:
        """Raise ValueError where the state of a trained stage of the saved ``model`` is missing:
        its training would begin anew, and replace what is there."""
        run = read_run(self.path)
        for stage in stages:
            states = self.models.states[stage]
            file = states.newest
            # A process that was killed after it renamed the model and before the first state, see
            # ``save``, left that under its hidden name: then this training is a repeat.
            kept = states.files() or any(self.path.glob(f".{file.stem}.*"))
            # A run that began with a model has weights of stages that it never trained.
            began = run is not None and run.start != ""
            trained = run is not None and stage in run.trained
            if model and not began:
                trained = stage not in model.untrained_stages
            if trained and not kept:
                raise ValueError(
                    f"{self.path}: {file.name} is missing, without which {stage} would be trained "
                    "anew, over what is there; restore it or choose another --out, with --from "
                    f"{self.path} to begin with its weights"
                )

    def _remove_abandoned(self) -> None:
        """Remove what processes were killed over, but for states of a stage that has no other: they
        are what ``_check_states`` asks for."""
        for name, left in abandoned(self.path):
            if (self.path / name).exists() or not name.startswith("state-"):
                remove(left)

    def save(self, trainer: StageTrainer, state: dict[str, Tensor], initial: MSF) -> None:
        """Keep ``trainer``'s ``state``, and its averages in the models, whose other stages stay as
        they were last saved, perhaps by another process; they are ``initial``'s the first time."""
        with locked(self.path):
            model, states = self.models.read() or initial, self.models.states[trainer.name]
            # The state gets its name last: where writing either fails, a resumed run repeats these
            # steps and with them the model.
            with atomic_write(states.newest) as temporary:
                write_state(temporary, state, trainer.step_number)
                self.models.save(model, trainer.index, state, temporary)
                states.retire()
            states.prune(trainer.config.keep_last, trainer.config.keep_every)
            run = read_run(self.path) or self.run  # another process may have saved another stage
            if trainer.name not in run.trained:
                self._write_run(replace(run, trained=(*run.trained, trainer.name)))

    def metrics(self) -> list[dict[str, Any]]:
        """Return every whole line of metrics.jsonl."""
        return metrics.read(self.path / "metrics.jsonl", self.config.stage_names)[0]

    def describe(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Write the model card, of this run and all of its stages."""
        with atomic_write(self.path / CARD) as temporary:
            temporary.write_text(model_card(self.config, self.run, metrics))

    def log(self, **row: Any) -> None:
        with locked(self.path), open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
