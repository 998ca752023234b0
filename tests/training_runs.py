"""Tiny training runs and what they leave behind."""

import json
import os
import signal

from safetensors import safe_open
from safetensors.torch import load_file

from msf import MSFConfig, StageConfig, TrainingConfig
from msf.training.stage import StageTrainer
from msf.training.train import train

STAGE = StageConfig(width=16, depth=1, heads=2, patch=2)
MODEL = MSFConfig(
    image_size=(8, 8), channels=1, num_classes=10, stages=(STAGE, STAGE), steps=(2, 1)
)
TRAINING = TrainingConfig(
    steps=(8, 6),
    batch_size=16,
    learning_rate=1e-2,
    warmup=2,
    log_every=2,
    sample_every=3,
    precision="fp32",
    keep_last=1,
)


def run(out, **options):
    return train(MODEL, TRAINING, "digits", out, progress=False, **options)


def digest(folder):
    files = [f for f in folder.iterdir() if f.suffix == ".safetensors"]
    return {f.name: {k: v.numpy().tobytes() for k, v in load_file(f).items()} for f in files}


def steps(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"]) for row in rows]


def lines(folder):
    """Return what metrics.jsonl says but for rates, which no two runs have in common."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = ("images_per_second", "teraflops")
    return [{key: x for key, x in row.items() if key not in rates} for row in rows]


def interrupt_at(step, monkeypatch):
    """Send this process a Ctrl-C during the given step, counted over both stages."""
    original, calls = StageTrainer.step, []

    def counted(self, *args):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(StageTrainer, "step", counted)


def saved_step(folder, stage):
    with safe_open(folder / f"state-{stage}.safetensors", "pt") as file:
        return int(file.metadata()["step"])
