"""The settings of training, and what a run's folder says of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import hinted, read_file
from ..parsing import check_fields, parse_dataclass, parse_object

RUN_FILE, CHECKPOINTS = "training.json", "checkpoints"
# What mends damaged files beside the states of stages.
REBUILDS = "msf train --resume rebuilds it from the states"
REBUILDS_CONFIG = "msf train --resume rebuilds it with --config or --preset"
GOES_ON = "msf train --resume goes on with --config or --preset"
WARMUP = 100
MAX_STEPS = 10**9  # years of training, as in ``MSFConfig`` a slip
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("auto", "fp32", "tf32", "bf16", "pure-bf16")
PARALLEL = ("ddp", "fsdp")
CHECKPOINTING = ("none", "full", "selective")
NOT_NEGATIVE = ("seed", "warmup", "weight_decay", "clip", "spike", "checkpoint_every", "keep_every")
AT_LEAST_ONE = ("batch_size", "accumulation", "log_every", "sample_every", "keep_last")
BELOW_ONE = ("ema_decay", "holdout")
CHOICES = {
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "parallel": PARALLEL,
    "checkpointing": CHECKPOINTING,
}


@dataclass(frozen=True)
class TrainingConfig:
    """A TrainingConfig says how a model is trained: AdamW with warm-up, a cosine decay to zero or a
    constant rate, gradients clipped to the norm ``clip`` (0: not clipped) and EMA weights.

    ``steps`` is one number a stage, base first. ``precision`` "auto" is bfloat16 autocast where the
    device computes in it (a GPU; a CPU with AMX or AVX512-BF16), float32 elsewhere. "fp32" is
    without TF32, which "tf32" allows in matrix products. "pure-bf16" computes all in bfloat16 and
    keeps the weights in float32; it needs ``parallel`` "fsdp".

    ``batch_size`` is that of all processes together, ``accumulation`` in how many parts each takes
    its share. ``parallel`` is "ddp", where every process holds all weights, or "fsdp", a part.
    ``checkpointing`` is what the backward computes again of each block instead of keeping it:
    "none", "full" (all), or "selective" (all but matrix products and attention). ``compile``
    compiles every block.

    A step whose gradient norm is not finite, or more than ``spike`` times its average (0: any), is
    not taken. ``keep_last`` checkpoints are kept, the newest among them, and besides those of every
    ``keep_every`` steps (0: none). ``extra_ema_decays`` are of more averages of the weights.

    With ``flip`` half of the images are mirrored, another half at each step. ``holdout`` is how
    much of a folder is kept for evaluations.
    Losses are recorded every ``log_every`` steps, and with each sample grid and checkpoint:
    ``sample_every`` is how often (in steps) sample grids are written and the loss on held-out
    images is measured, and ``checkpoint_every`` how often checkpoints are, 0 being as often; all
    are at the end too. ``wandb`` is a project of Weights & Biases to log to, "" for none.
    ``warmup`` must not be longer than training, but for its default, which short runs may leave
    unfinished.
    """

    steps: tuple[int, ...]
    batch_size: int = 256
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = WARMUP
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema_decay: float = 0.9999
    precision: str = "auto"
    accumulation: int = 1
    parallel: str = "ddp"
    checkpointing: str = "none"
    compile: bool = False
    spike: float = 10.0
    flip: bool = False
    holdout: float = 0.2
    log_every: int = 50
    sample_every: int = 1000
    checkpoint_every: int = 0
    keep_last: int = 2
    keep_every: int = 0
    extra_ema_decays: tuple[float, ...] = ()
    wandb: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for problem in self._problems():
            raise ValueError(f"TrainingConfig: {problem}")

    def _problems(self) -> Iterator[str]:
        if not self.steps or not all(1 <= count <= MAX_STEPS for count in self.steps):
            yield f"steps must be positive numbers of at most {MAX_STEPS}, got {self.steps}"
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                yield f"{name} must be at least 1, got {getattr(self, name)}"
        if self.learning_rate <= 0:
            yield f"learning_rate must be positive, got {self.learning_rate}"
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                yield f"{name} must not be negative, got {getattr(self, name)}"
        for name in BELOW_ONE:
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} must be in [0, 1), got {getattr(self, name)}"
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                yield f"{name} must be one of {known}, got {getattr(self, name)!r}"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield f"betas must be in [0, 1), got {self.betas}"
        if self.warmup != WARMUP and self.warmup > max(self.steps):
            yield f"warmup must not be beyond the last step, {max(self.steps)}, got {self.warmup}"
        decays = (self.ema_decay, *self.extra_ema_decays)
        if len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            yield (
                "extra_ema_decays must be different numbers in [0, 1) other than ema_decay, "
                f"got {self.extra_ema_decays}"
            )
        if self.precision == "pure-bf16" and self.parallel != "fsdp":
            yield (
                'precision "pure-bf16" needs parallel "fsdp", which keeps the weights in float32, '
                f"got {self.parallel!r}"
            )

    @property
    def checkpoint_interval(self) -> int:
        """Return how many steps there are from one checkpoint to the next."""
        return self.checkpoint_every or self.sample_every


@dataclass(frozen=True)
class RunConfig:
    """A RunConfig is what ``training.json`` says of a run; ``data`` is as in ``load_data``.

    ``class_names`` are those of the data, in the order of their numbers, and ``fingerprint`` is a
    hash of its files' names and sizes. ``start`` is the folder of the model that it began with, ""
    for none, and ``trained`` are the stages that it has saved. Runs of earlier versions do not know
    these.
    """

    data: str
    training: TrainingConfig
    class_names: tuple[str, ...] = ()
    fingerprint: str = ""
    start: str = ""
    trained: tuple[str, ...] = ()


def read_run(directory: Path) -> RunConfig | None:
    """Return the run that made ``directory``, None if it holds no ``training.json``. Raise
    ValueError (one line) if that is corrupt."""
    file = directory / RUN_FILE
    if not file.exists():
        return None
    with hinted(has_states(directory), GOES_ON):
        return _run_of(file)


def has_states(directory: Path) -> bool:
    """Return whether a run in ``directory`` has saved a stage."""
    earlier = (directory / CHECKPOINTS).glob("*.safetensors")
    return any(directory.glob("state-*.safetensors")) or any(earlier)


def _run_of(file: Path) -> RunConfig:
    values = parse_object(read_file(file), file)
    try:
        run = parse_dataclass(RunConfig, values, "run")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if twice := [name for name, count in Counter(run.class_names).items() if count > 1]:
        raise ValueError(f"{file}: class_names must be different, got {twice[0]!r} twice")
    return run


def class_names_of(directory: Path, run: RunConfig | None, num_classes: int) -> tuple[str, ...]:
    """Return the classes' names, where there are classes and the run that made ``directory`` has
    their names. Raise ValueError (one line) if they are not one a class."""
    if run is None or not run.class_names or not num_classes:
        return ()
    if len(run.class_names) != num_classes:
        raise ValueError(
            f"{directory / RUN_FILE}: class_names must be {num_classes}, one a class, "
            f"got {len(run.class_names)}"
        )
    return run.class_names
