"""Train small models from scratch and measure their samples, for `benchmarks/results/cpu/`.

    python -m benchmarks.quality digits      minutes on two cores
    python -m benchmarks.quality textures    half an hour: MSF and the N = 0 baseline

A model's stages train at the same time, each in a process with one thread.

The textures' two models train for equal FLOPs (the presets' steps are chosen so) and are compared
at equal sampling FLOPs: n steps of the baseline cost as much as 2n base and n / 2 residual steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from msf import preset
from msf.data import load_data
from msf.evaluation import Evaluator
from msf.files import atomic_write
from msf.flops import stage_costs
from msf.precision import bf16_instructions

RESULTS = Path(__file__).parent / "results" / "cpu"


@dataclass(frozen=True)
class Model:
    preset: str
    data: str
    steps: tuple[tuple[int, ...], ...]
    solver: str = "euler"
    guidance_scale: tuple[float, ...] = (1.0,)
    seeds: int = 1  # evaluations, each with a feature network and images of its own


# With a guidance scale of 1, 1.1 and 1.25 for the digits' base, the distance over the floor was
# 1.22, 1.18 and 1.21. These means of six evaluations hardly differ.
STUDIES = {
    "digits": (Model("digits", "digits", ((16, 4), (16, 16)), "heun", (1.1, 1.0), seeds=6),),
    "textures": (
        Model("textures-16", "textures", ((16, 4), (32, 8), (64, 16))),
        Model("textures-16-sit", "textures", ((8,), (16,), (32,))),
    ),
}


def msf(*arguments: str) -> subprocess.Popen[bytes]:
    """Start `msf ARGUMENTS --json` on one thread, with its progress on our standard error."""
    command = [sys.executable, "-m", "msf.cli", *arguments, "--threads", "1", "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def answer(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Wait for the command and return its JSON. Raise CalledProcessError if it fails."""
    output, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return json.loads(output)


def training_gmacs(name: str) -> float:
    """Return the GMACs of training all stages. A backward costs as much as 2 forwards."""
    chosen = preset(name)
    forwards = zip(stage_costs(chosen.model), chosen.training.steps)
    return sum(3 * cost.macs * steps * chosen.training.batch_size for cost, steps in forwards) / 1e9


def measure(model: Model, runs: Path) -> dict[str, Any]:
    folder = str(runs / model.preset)
    start = time.perf_counter()
    train = ("train", "--preset", model.preset, "--data", model.data, "--out", folder, "--resume")
    stages = [msf(*train, "--stage", name) for name in preset(model.preset).model.stage_names]
    for stage in stages:
        answer(stage)
    seconds = time.perf_counter() - start
    settings = ["--solver", model.solver, "--guidance-scale", *map(str, model.guidance_scale)]
    for steps in model.steps:
        settings += ["--steps", *map(str, steps)]
    evaluations: list[dict[str, Any]] = []
    for seed in range(model.seeds):
        evaluations += answer(msf("evaluate", folder, *settings, "--seed", str(seed)))["results"]
    return {
        "preset": model.preset,
        "training_seconds": seconds,
        "training_gmacs": training_gmacs(model.preset),
        "solver": model.solver,
        "guidance_scale": model.guidance_scale,
        "mean_fd_ratios": [mean_fd_ratio(evaluations, steps) for steps in model.steps],
        "resampled_fd_ratio": resampled_fd_ratio(model) if model.seeds > 1 else None,
        "evaluations": evaluations,
    }


def mean_fd_ratio(evaluations: list[dict[str, Any]], steps: tuple[int, ...]) -> float:
    """Return the mean ratio of Frechet distances, generated to real, with these steps."""
    chosen = (found["report"] for found in evaluations if tuple(found["steps"]) == steps)
    return fmean(report["fd_ratio"]["value"] for report in chosen)


def resampled_fd_ratio(model: Model) -> float:
    """Return the mean ratio of training images drawn with replacement.

    It is what a generator that knows the training images by heart would reach.
    """
    torch.set_num_threads(1)  # as for the commands: more are slower where cores are shared
    config = preset(model.preset).model
    options: dict[str, Any] = {
        "image_size": config.image_size,
        "channels": config.channels,
        "num_classes": config.num_classes,
    }
    data = load_data(model.data, split="train", **options)

    def draw(labels: torch.Tensor, seeds: list[int], _: torch.Tensor | None) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seeds[0])
        weights = (data.labels == labels[:, None]).double()
        return data.images(weights.multinomial(1, generator=generator).flatten())

    evaluators = (Evaluator(model.data, seed=seed, **options) for seed in range(model.seeds))
    ratios = [each.evaluate(draw, true_bases=False).fd_ratio for each in evaluators]
    return fmean(ratio.value for ratio in ratios if ratio)  # all, as many are drawn as are tested


def machine() -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=RESULTS.parent, stdout=subprocess.PIPE)
    return {
        "cpu": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "bf16": bf16_instructions(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": git.stdout.decode().strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=STUDIES)
    args = parser.parse_args()
    runs = Path("runs") / f"quality-{args.study}"
    if runs.exists():
        parser.error(f"{runs} exists; remove it, training is part of what is measured")
    models = [measure(model, runs) for model in STUDIES[args.study]]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_write(RESULTS / f"{args.study}.json") as path:
        path.write_text(json.dumps({"machine": machine(), "models": models}, indent=2) + "\n")


if __name__ == "__main__":
    main()
