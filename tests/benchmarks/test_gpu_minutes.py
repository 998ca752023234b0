"""The steps of `make gpu`: their deadline, their ends and their logs, with tiny ones."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, interrupt, steps
from benchmarks.steps import Outcome, Step, run, run_all, summary
from processes import PROGRAMS


def python(name: str, code: str, **options: object) -> Step:
    return Step(name, (sys.executable, "-c", code), **options)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def test_output_goes_to_the_terminal_and_to_a_log_of_the_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    both = "import os; os.write(1, b'out\\n'); os.write(2, b'err\\n')"
    calls: list[int] = []
    outcomes = run_all(
        [python("first step", both), python("second", "print('more')")],
        60,
        tmp_path,
        lambda: calls.append(1),
    )
    assert statuses(outcomes) == ["ok", "ok"] and len(calls) == 2
    assert (tmp_path / "01-first-step.log").read_text() == "out\nerr\n"
    assert (tmp_path / "02-second.log").read_text() == "more\n"
    shown = capfd.readouterr().out
    assert "\nout\nerr\n" in shown and "== second, at most 60 s" in shown


def test_a_failed_step_does_not_stop_the_others(tmp_path: Path) -> None:
    outcomes = run_all(
        [python("bad", "raise SystemExit(3)"), Step("none", ("/no/command",)), python("good", "")],
        60,
        tmp_path,
    )
    failed, missing, good = statuses(outcomes)
    assert (failed, good) == ("failed: exit status 3", "ok")
    assert missing.startswith("failed: ") and "/no/command" in missing
    assert [outcome.failed for outcome in outcomes] == [True, True, False]


def test_after_a_failed_build_nothing_runs(tmp_path: Path) -> None:
    outcomes = run_all(
        [python("build", "raise SystemExit(1)", vital=True), python("tests", "")], 60, tmp_path
    )
    assert statuses(outcomes) == ["failed: exit status 1", "not run: build failed"]
    assert outcomes[1].failed and [file.name for file in tmp_path.iterdir()] == ["01-build.log"]


def test_a_step_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    slow = Step("slow", (sys.executable, str(PROGRAMS / "start_a_child.py")))
    outcome = run(slow, 2, tmp_path / "log")
    assert outcome.status == "failed: stopped after 2 s"
    assert time.monotonic() - start < 15
    status = Path(f"/proc/{int((tmp_path / 'log').read_text())}/stat")
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() - start < 30
        time.sleep(0.05)


def test_a_step_that_ignores_sigterm_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.2)
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('here'); time.sleep(60)"
    outcome = run(python("deaf", code), 2, tmp_path / "log")
    assert outcome.status == "failed: stopped after 2 s" and outcome.seconds < 10
    assert (tmp_path / "log").read_text() == "here\n"


def test_steps_share_the_time_that_is_left(tmp_path: Path) -> None:
    say = "import sys; print(sys.argv[1])"
    first, second, late = (
        Step(name, (sys.executable, "-c", say, "{minutes}"), limit, share)
        for name, limit, share in (("a", 60, 1), ("b", 1000, 0.5), ("c", 60, 1))
    )
    run_all([first, second], 600, tmp_path)
    assert (tmp_path / "01-a.log").read_text() == "0.850\n"  # of one minute
    assert 4.0 < float((tmp_path / "02-b.log").read_text()) <= 4.25  # of half of ten
    (outcome,) = run_all([late], 0, tmp_path)
    assert outcome.status == "not run: no time was left" and outcome.failed


def test_a_step_without_its_packages_is_skipped_and_not_passed(tmp_path: Path) -> None:
    (outcome,) = run_all([python("train", "", needs=("json", "no_such_package"))], 60, tmp_path)
    assert outcome.status == "skipped: no no_such_package" and not outcome.failed
    assert "| train | skipped: no no_such_package | 0 |" in summary("dry run", [outcome])


def test_an_interrupted_step_ends_the_run_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "GRACE", 0.2)
    mark = tmp_path / "alive"
    code = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    interrupted = subprocess.Popen.wait

    def wait(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout == 60:  # as Ctrl-C does while the step runs
            while not (mark.exists() and mark.read_text()):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return interrupted(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    slow = python("slow", code, limit=60)
    outcomes = run_all([slow, python("later", "")], 600, tmp_path)
    assert statuses(outcomes) == ["interrupted", "not run: interrupted"]
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_ctrl_c_as_soon_as_a_file_appears(tmp_path: Path) -> None:
    def ended(status: int) -> int:
        file = tmp_path / str(status)
        program = str(PROGRAMS / "end_on_ctrl_c.py")
        return interrupt.main([str(file), sys.executable, program, str(file), str(status)])

    assert ended(130) == 0
    assert ended(0) == 1  # it ended as if nothing had been asked of it
    assert interrupt.main([str(tmp_path / "never"), sys.executable, "-c", ""]) == 1


def test_results_are_copied_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, out, now = tmp_path / "results", tmp_path / "out", time.time()
    monkeypatch.setattr(gpu, "RESULTS", results)
    for name, age in (("old", 100), ("new", 0)):
        file = results / "h100" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
        os.utime(file, (now - age, now - age))
    gpu.copy_results(out, now - 10)
    assert [file.name for file in (out / "results" / "h100").iterdir()] == ["new.json"]


@pytest.mark.parametrize("dry", [False, True])
def test_every_command_names_what_there_is(dry: bool, tmp_path: Path) -> None:
    found = [
        *gpu.installation(None if dry else "90"),
        gpu.tests(dry),
        *gpu.first_training(dry, tmp_path, tmp_path),
        *gpu.benchmarks(dry, tmp_path),
    ]
    modules = [step.command[step.command.index("-m") + 1] for step in found]
    assert [module for module in modules if module.startswith("benchmarks.")] == [
        f"benchmarks.{name}" for name in ("interrupt", "run", "changes", "run", "changes")
    ]
    assert all(map(importlib.util.find_spec, modules))
    assert [step.name for step in found if step.vital] == ["build"]
    assert ("MSF_CUDA_ARCHS=90" in found[0].command) != dry
    assert ("--dry-run" in found[0].command) == dry


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        gpu.main([])
    assert caught.value.code == 2
    line = "benchmarks.gpu: needs an NVIDIA GPU and a torch with CUDA, and finds none\n"
    assert capsys.readouterr().err == line
