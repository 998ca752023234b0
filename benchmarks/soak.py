"""Kill training and sampling at random moments, and check that nothing is lost.

    python -m benchmarks.soak --kills 50

A tiny model trains on the digits, is killed (SIGTERM, SIGKILL, or SIGINT twice within 50 ms) and
resumed, again and again until it ends; then the next one starts. After each kill the folder must
hold a model that loads, or none yet, and every file of tensors in it must open; at the end these
must be bit for bit those of a training that nobody disturbed. Then sampling is killed and continued
in the same way: its file must be absent, or bit for bit that of one that nobody disturbed. The exit
status is 1 if something was lost.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from msf import MSF

from .parser import Parser
from .reliability import MSF_COMMAND, SETTINGS, report, train

SIGNALS: dict[str, tuple[signal.Signals, ...]] = {
    "SIGTERM": (signal.SIGTERM,),
    "SIGKILL": (signal.SIGKILL,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}
PAUSE = 0.05  # seconds between two signals


@dataclass
class Soak:
    """A Soak counts what happened so far.

    Args:
        chance: chooses the moments and the signals.
        kills: how many processes a signal ended, by command and signal.
        losses: one line for each thing that was lost.
    """

    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    trainings: int = 0

    def killed(self, what: str, command: Sequence[str], seconds: float) -> bool:
        """Run the command, kill it within so many seconds, and return False if it ended before."""
        process = subprocess.Popen(
            [*MSF_COMMAND, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        name = self.chance.choice(list(SIGNALS))
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.chance.uniform(0, seconds))
        ended = process.poll() is not None
        for number in () if ended else SIGNALS[name]:
            process.send_signal(number)
            time.sleep(PAUSE)
        _, errors = process.communicate()
        if "Traceback" in errors and name != "SIGKILL":
            self.lost(f"{what}, {name}: {errors}")
        if ended and process.returncode:
            self.lost(f"{what} ended by itself with status {process.returncode}: {errors}")
        if not ended:
            self.kills[f"{what}, {name}"] += 1
        return not ended

    def check(self, what: str, look: Callable[[], Any]) -> None:
        try:
            look()
        except Exception as error:
            self.lost(f"{what}: {type(error).__name__}: {error}")

    def lost(self, line: str) -> None:
        print(f"lost: {line}", flush=True)
        self.losses.append(line)


def look_at(folder: Path) -> None:
    """Load all that training has left. An error says what cannot be read."""
    if (folder / "model.safetensors").exists():
        MSF.from_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            opened.keys()


def same(a: Path, b: Path) -> None:
    """Raise AssertionError unless two trainings ended in the same bits."""
    for file in sorted(a.glob("*.safetensors")):
        mine, other = load_file(file), load_file(b / file.name)
        assert mine.keys() == other.keys(), f"{file.name} holds other tensors"
        for name, tensor in mine.items():
            assert torch.equal(tensor, other[name]), f"{file.name}: {name} differs"


def same_bytes(a: Path, b: Path) -> None:
    assert a.read_bytes() == b.read_bytes(), f"{b.name} differs"


def soak(kills: int, seed: int, folder: Path) -> Soak:
    found, config = Soak(random.Random(seed)), folder / "config.json"
    config.write_text(json.dumps(SETTINGS))
    start = time.monotonic()
    undisturbed = folder / "undisturbed"
    subprocess.run([*MSF_COMMAND, *train(undisturbed, config)], check=True)
    seconds = time.monotonic() - start
    while found.kills.total() < kills // 2:
        found.trainings += 1
        out = folder / f"run-{found.trainings}"
        while found.kills.total() < kills // 2 and found.killed(
            "train", train(out, config), seconds
        ):
            found.check("train", partial(look_at, out))
            print(f"{found.kills.total()} kills, {len(found.losses)} losses", flush=True)
        subprocess.run([*MSF_COMMAND, *train(out, config)], check=True)
        found.check("train", partial(same, undisturbed, out))
    whole, images = (folder / name for name in ("whole.npz", "images.npz"))
    sample = ["sample", str(undisturbed), "--num-images", "2000", "--out"]
    subprocess.run([*MSF_COMMAND, *sample, str(whole)], check=True)
    while found.kills.total() < kills:
        found.killed("sample", [*sample, str(images)], seconds)
        if images.exists():
            found.check("sample", partial(same_bytes, whole, images))
            images.unlink()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="half in training (50)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments (0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of what happened")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(args.kills, args.seed, Path(folder))
    report(
        {
            "seed": args.seed,
            "kills": dict(sorted(found.kills.items())),
            "trainings": found.trainings,
            "losses": found.losses,
        },
        args.out,
    )
    return bool(found.losses)


if __name__ == "__main__":
    sys.exit(main())
