"""Build, test and benchmark this checkout on a machine with a GPU, in eight minutes.

The extension is built for the GPU that is there, the test suite runs, a small model is trained and
sampled, and the time that is left goes to benchmarks. Every step writes a log to --out, and the
results of the benchmarks are copied there. If a step fails, the later ones still run, unless it is
the build. No network is needed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .parser import Parser, minutes
from .steps import INTERRUPTED, ROOT, Step, run_all, summary

RESULTS = ROOT / "benchmarks" / "results"
PYTHON = sys.executable
MSF = (PYTHON, "-m", "msf.cli")
BUILD = (
    *(PYTHON, "-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"),
    *("--force-reinstall", "-e", "."),
)
ARMS = ("eager", "compile-flash", "compile-cudnn", "ours")  # more would take too long to compile
TRAINING = ("sklearn", "tensorboard", "tqdm", "matplotlib", "PIL")  # packages of the train extra


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--minutes", type=minutes, default=8.0, metavar="M", help="for all (8)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: build/gpu")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="the same steps without a GPU: nothing is built, and all is tiny",
    )
    args = parser.parse_args(argv)
    dry: bool = args.dry_run
    capability = None if dry else compute_capability()
    if not (dry or capability):
        parser.error("needs an NVIDIA GPU and a torch with CUDA, and finds none")
    name = "gpu-dry-run" if dry else "gpu"
    out = (args.out or ROOT / "build" / name).resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in [*out.glob("*.log"), *out.glob("summary.md"), *out.glob("results/**/*.json")]:
            file.unlink()  # from an older run
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with a summary
    start = time.time()
    with tempfile.TemporaryDirectory(dir=out, prefix="digits-") as folder:
        steps = [
            *installation(capability),
            tests(dry),
            *first_training(dry, Path(folder) / "run", out),
            *benchmarks(dry, out),
        ]
        outcomes = run_all(steps, 60 * args.minutes, out, lambda: copy_results(out, start))
    table = summary(f"make {name}" + dry * ": a dry run, no GPU", outcomes)
    print(f"\n{table}")
    write(out / "summary.md", f"{table}\n".encode())
    if any(outcome.status == INTERRUPTED for outcome in outcomes):
        return 128 + signal.SIGINT
    return int(any(outcome.failed for outcome in outcomes))


def compute_capability() -> str | None:
    """Return the compute capability of the GPU, such as "90"; None without a GPU.

    Another process asks for it, so that this one takes no memory of the GPU.
    """
    code = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    asked = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def installation(capability: str | None) -> list[Step]:
    """Return the steps that build for this one GPU, describe the build and audit its kernels."""
    settings = ("env", "MSF_CUDA=ON", "MSF_WERROR=ON", f"MSF_CUDA_ARCHS={capability}")
    build = (*settings, *BUILD) if capability else (*BUILD, "--dry-run")
    one = () if capability else ("--architecture", "80")  # as a build for one GPU has, soonest read
    audit = (PYTHON, "-m", "msf_kernels.audit", "--backend", "cuda", *one)
    return [
        Step("build", build, limit=90, vital=True),
        Step("doctor", (*MSF, "doctor"), limit=20),
        Step("audit", audit, limit=80),
    ]


def tests(dry: bool) -> Step:
    """Return the step of the test suite, on all cores but two where pytest-xdist is installed."""
    workers = max(1, len(os.sched_getaffinity(0)) - 2)
    has_xdist = importlib.util.find_spec("xdist") is not None
    parallel = ("-n", str(workers), "--dist", "loadgroup") if has_xdist else ()
    some = ("tests/test_gpu.py", "tests/test_numerics.py") if dry else ()
    command = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *some)
    return Step("tests", command, limit=150)


def first_training(dry: bool, run: Path, out: Path) -> list[Step]:
    """Return a user's first steps: train the digits, interrupt, resume, sample and evaluate."""
    steps, count = (("100", "10"), "20") if dry else (("600", "150"), "100")
    source = ("--preset", "digits", "--data", "digits")
    train = (*MSF, "train", *source, "--out", str(run), "--steps", *steps)
    interrupt = (PYTHON, "-m", "benchmarks.interrupt", str(run / "metrics.jsonl"))
    sample = (*MSF, "sample", str(run), "--num-images", "20", "--overwrite", "--out")
    evaluate = (*MSF, "evaluate", str(run), "--samples", count, "--overwrite", "--out")
    return [
        Step("train interrupted", (*interrupt, *train), limit=30, needs=TRAINING),
        Step("train resumed", (*train, "--resume"), limit=30, needs=TRAINING),
        Step("sample", (*sample, str(out / "digits.png")), limit=30, needs=TRAINING),
        Step("evaluate", (*evaluate, str(out / "digits.json")), limit=40, needs=TRAINING),
    ]


def benchmarks(dry: bool, out: Path) -> list[Step]:
    """Return the steps that benchmark operators and models in the time left, and show changes."""
    run, changes = ((PYTHON, "-m", f"benchmarks.{module}") for module in ("run", "changes"))
    if dry:  # with one thread, as two are many times slower on two cores that others use too
        results = str(out / "results")
        one, little = ("env", "OMP_NUM_THREADS=1"), ("--minutes", "1", "--out", results)
        few = ("merge_tokens", "--arms", "eager", "reference")
        return [
            Step("operators", (*one, *run, *few, *little), limit=60),
            Step("changes of operators", (*changes, results), limit=30),
            Step("models", (*one, *run, "models", *little), limit=60),
            Step("changes of models", (*changes, results), limit=30),
        ]
    minutes = ("--minutes", "{minutes}")
    return [
        Step("operators", (*run, "operators", *minutes), share=0.5),
        Step("changes of operators", changes, limit=30),
        Step("models", (*run, "models", *minutes, "--arms", *ARMS), share=0.9),
        Step("changes of models", changes, limit=30),
    ]


def copy_results(out: Path, since: float) -> None:
    """Copy the results that were written since this time."""
    for file in RESULTS.rglob("*.json"):
        if file.stat().st_mtime >= since:
            write(out / "results" / file.relative_to(RESULTS), file.read_bytes())


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. `msf.files` does the same but may not be installed yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
