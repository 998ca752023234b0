"""Several processes of one job sample what one process does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from msf.cli import main
from msf.training.ranks import FailedElsewhere, started
from processes import in_two_processes

pytestmark = pytest.mark.xdist_group("distributed")

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "msf.cli")


def process_of_rank(rank: int, job: int) -> int:
    """The process that torchrun, which is process ``job``, has started as ``rank``."""
    children = Path(f"/proc/{job}/task/{job}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    (found,) = (
        int(child)
        for child in children
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )
    return found


def test_killed_and_continued_is_what_one_process_makes(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, undisturbed, parts = (tmp_path / name for name in ("x.npz", "y.npz", "x.npz.parts"))
    command = ["sample", str(workspace / "run"), "--num-images=241", "--batch-size=2"]
    command += ["--device=cpu", "--out"]
    job = subprocess.Popen(
        [*TORCHRUN, *command, str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not all((parts / f"00000{rank}.npz").exists() for rank in range(2)):
        assert job.poll() is None
        time.sleep(0.01)
    os.kill(process_of_rank(1, job.pid), signal.SIGKILL)
    _, messages = job.communicate(timeout=60)
    kept = sorted(parts.glob("0*.npz"))
    assert job.returncode == 1 and 2 <= len(kept) < 121 and not out.exists()
    assert f"interrupted; {len(kept)} of 121 batches are kept in {parts}" in messages
    kept[0].write_bytes(kept[0].read_bytes()[:-1])

    capfd.readouterr()
    assert in_two_processes(lambda rank: main([*command, str(out)])) == [0, 0]
    printed = capfd.readouterr()
    assert f"{parts}: continuing, {len(kept) - 1} of 121 batches are there\n" in printed.err
    assert printed.err.count(f"{kept[0]}: is damaged") == 1
    assert printed.out.count("241 images of 8x8, seeds 0 to 240") == 1
    assert main([*command, str(undisturbed)]) == 0
    assert out.read_bytes() == undisturbed.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["x.npz", "y.npz"]
    assert len(np.load(out)["arr_1"]) == 241

    capfd.readouterr()
    assert sorted(in_two_processes(lambda rank: main([*command, str(out)]))) == [1, 2]
    assert capfd.readouterr().err == (
        f"msf sample: {out}: exists already; choose another --out or add --overwrite\n"
    )


def test_where_one_fails_the_others_do_not_wait() -> None:
    def work(rank: int) -> int:
        with started(torch.device("cpu")) as (ranks, _):
            assert ranks.each(lambda: rank) == rank
            try:
                ranks.each(lambda: 1 // (1 - rank))
            except ZeroDivisionError:
                return 10
            except FailedElsewhere:
                return 20
        return 0

    assert in_two_processes(work) == [20, 10]
