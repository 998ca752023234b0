"""Give the command corrupt and hostile input, and check that it says what is wrong in one line.

    python -m benchmarks.hostile

Each kind of input (`hostile_kinds.py`) spoils one thing in a copy of a tiny trained run or of a
folder of photos, and one `msf` reads it in a process of its own. That must end in time, with the
exit status of bad input and one line on stderr that says what it is, or, where the library
documents that it skips or mends it, with 0 and the line that says so. No pickle of the user may be
loaded, which `watch/sitecustomize.py` looks for. The exit status is 1 if a kind failed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .hostile_changes import forbidden
from .hostile_kinds import KINDS, Kind
from .parser import Parser
from .reliability import MSF_COMMAND, SETTINGS, report, train

TRAINING = {**SETTINGS["training"], "steps": [30, 20], "warmup": 1}
PHOTOS = 120
SECONDS = 60.0  # that a kind may take; one alone takes 3 to 8
AT_ONCE = 2
WATCH = Path(__file__).parent / "watch"


@dataclass(frozen=True)
class Outcome:
    """An Outcome is how a process ended: its status, None if it had to be killed, its standard
    error, and what its watch noted."""

    status: int | None
    errors: str
    notes: tuple[str, ...]

    def problem(self, kind: Kind) -> str | None:
        """Return what is wrong with it; None where it is what ``kind`` wants."""
        lines = self.errors.splitlines()
        if "unpickled" in self.notes:
            return "unpickled a file"
        if "watched" not in self.notes:
            return "was not watched"
        if self.status is None:
            return f"hung, was killed after {SECONDS:g} s"
        if "Traceback" in self.errors:
            return f"a traceback that ends in {lines[-1]}"
        if self.status != kind.status:
            return f"ended with status {self.status}, not {kind.status}: {self.errors.strip()}"
        if len(lines) != 1 or not lines[0].isprintable():
            return f"wants one printable line, got {self.errors!r}"
        if kind.status and not lines[0].startswith(f"msf {kind.command.split()[0]}: "):
            return f"wants the command before the message, got {lines[0]}"
        return None if kind.says in lines[0] else f"wants {kind.says!r} in {lines[0]}"


def make_inputs(whole: Path) -> None:
    """Make the folder that each kind gets a copy of, with a config and photos."""
    (whole / "photos").mkdir(parents=True)
    for index in range(PHOTOS):
        Image.new("L", (8, 8), index).save(whole / "photos" / f"{index}.png")
    (whole / "config.json").write_text(json.dumps({**SETTINGS, "training": TRAINING}))


def make_run(whole: Path) -> None:
    """Add a trained run."""
    command = [*MSF_COMMAND, *train(whole / "run", whole / "config.json"), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run(command: Sequence[str], log: Path, seconds: float = SECONDS) -> Outcome:
    """Run the command under watch, and end it and its workers when its time is over."""
    paths = [str(WATCH), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HOSTILE_LOG": str(log),
        "CUDA_VISIBLE_DEVICES": "",  # CUDA asks for more addresses than the watch allows
    }
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        errors="backslashreplace",
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=seconds)
        status: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        status = None
    notes = log.read_text().splitlines() if log.exists() else []
    return Outcome(status, errors, tuple(notes))


def attempt(whole: Path, kind: Kind, here: Path) -> Outcome:
    """Spoil a copy of ``whole`` at ``here`` and let the command read it."""
    shutil.copytree(whole, here)
    kind.change(here / kind.where)
    words = [word.format(here=here) for word in kind.command.split(" ")]
    outcome = run([*MSF_COMMAND, *words], here / "log")
    if list(here.rglob("exploded")):
        outcome = replace(outcome, notes=("unpickled", *outcome.notes))
    return replace(outcome, errors=outcome.errors.replace(f"{here}/", ""))


def check(kinds: Sequence[Kind], folder: Path) -> dict[str, Any]:
    """Try all kinds on copies of ``folder / "whole"`` and return the document of what happened."""
    problems, lines, unpickled = [], {}, 0
    with ThreadPoolExecutor(AT_ONCE) as pool:
        places = (folder / str(number) for number in range(len(kinds)))
        outcomes = pool.map(partial(attempt, folder / "whole"), kinds, places)
        for kind, outcome in zip(kinds, outcomes, strict=True):
            name = f"{kind.sort}, {kind.name}"
            lines[name] = outcome.errors.strip()
            unpickled += "unpickled" in outcome.notes
            if problem := outcome.problem(kind):
                problems.append(f"{name}: {problem}")
                print(f"failed: {problems[-1]}", flush=True)
    return {
        "kinds": dict(Counter(kind.sort for kind in kinds)),
        "failures": problems,
        "unpickled": unpickled,
        "lines": lines,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.hostile", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds whose name holds it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of what happened")
    args = parser.parse_args(argv)
    chosen = [kind for kind in KINDS if args.only in f"{kind.sort}, {kind.name}"]
    is_root = os.geteuid() == 0  # to whom nothing is forbidden
    kinds = [kind for kind in chosen if not (is_root and kind.change is forbidden)]
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        make_inputs(whole)
        make_run(whole)
        found = check(kinds, Path(folder))
    skipped = [f"{kind.sort}, {kind.name}" for kind in chosen if kind not in kinds]
    report({**found, "skipped": skipped}, args.out)
    return bool(found["failures"])


if __name__ == "__main__":
    sys.exit(main())
