"""Several processes of one job train what one process does."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from models import images, tiny_model
from msf.cli import main
from msf.data import load_data
from msf.seeds import generator
from msf.training.ranks import started
from msf.training.stage import StageTrainer
from msf.training.validation import Validation
from processes import in_two_processes, needs_fsdp2
from training_runs import TRAINING as SETTINGS
from training_runs import saved_step

STAGE = {"width": 16, "depth": 1, "heads": 2, "patch": 2}
MODEL = {
    "image_size": [8, 8],
    "channels": 1,
    "num_classes": 10,
    "stages": [STAGE, STAGE],
    "steps": [2, 1],
}
TRAINING = {
    "steps": [8, 4],
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup": 2,
    "log_every": 2,
    "sample_every": 3,
    "precision": "fp32",
}

pytestmark = pytest.mark.xdist_group("distributed")


def command(folder, out, *, resume=False, data="digits", model=MODEL, **training):
    config = folder / f"{out}.json"
    config.write_text(json.dumps({"model": model, "training": {**TRAINING, **training}}))
    return [
        *("train", "--config", str(config), "--data", str(data), "--out", str(folder / out)),
        *("--device", "cpu", "--quiet", *(["--resume"] if resume else [])),
    ]


def in_one(folder, out, **options):
    assert main(command(folder, out, accumulation=2, **options)) == 0


def in_two(folder, out, **options):
    words = command(folder, out, **options)
    assert in_two_processes(lambda rank: main(words)) == [0, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one process that takes batches in two parts, and of two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    in_one(folder, "one")
    in_two(folder, "ddp")
    return folder


def states(folder, out):
    return {
        f"{stage}.{name}": x
        for stage in ("base", "residual")
        for name, x in load_file(folder / out / f"state-{stage}.safetensors").items()
    }


def test_two_processes_take_the_steps_of_one_with_twice_the_parts(folder):
    one, ddp = states(folder, "one"), states(folder, "ddp")
    assert one.keys() == ddp.keys()
    # The mean of two numbers is the same in any order.
    assert all(torch.equal(ddp[name], x) for name, x in one.items())


def test_two_processes_tell_the_losses_of_one(folder):
    assert_losses_of_two_processes(folder, "one")


def assert_losses_of_two_processes(folder, out):
    one, ddp = (
        [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
        for out in (out, "ddp")
    )
    assert [row["step"] for row in one] == [row["step"] for row in ddp]
    for ours, theirs in zip(one, ddp):
        # Sums of up to 32 losses in float32 in another order.
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=32 * 2**-24)
        for x, y in zip(theirs["loss_by_time"], ours["loss_by_time"], strict=True):
            assert x == y or x == pytest.approx(y, rel=32 * 2**-24)
        assert theirs.get("validation_loss") == pytest.approx(ours.get("validation_loss"))


@needs_fsdp2
def test_sharded_weights_take_the_same_steps(folder):
    in_two(folder, "fsdp", parallel="fsdp", extra_ema_decays=[0.5])
    ddp, fsdp = states(folder, "ddp"), states(folder, "fsdp")
    assert fsdp.keys() - ddp.keys() == {
        k.replace(".ema.", ".ema-0.5.") for k in ddp if ".ema." in k
    }
    for name, x in ddp.items():
        if "exp_avg" in name or ".ema." in name or "weights" in name:
            # The norm over all weights is summed in another order, and scales every gradient:
            # 12 steps of a relative 2**-23 each, through AdamW's division by the second moment.
            torch.testing.assert_close(fsdp[name], x, rtol=1e-4, atol=2e-5)


@needs_fsdp2
def test_sharded_averages_go_on_after_their_loss_was_measured(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    held_out = load_data("digits", split="features", image_size=(8, 8), channels=1)
    averages = []
    for parallel in ("ddp", "fsdp"):
        settings = dataclasses.replace(SETTINGS, parallel=parallel)
        with started(torch.device("cpu")) as (ranks, _):
            trainer = StageTrainer(tiny_model(channels=1, num_classes=10), 0, settings, ranks)
            for _ in range(2):
                trainer.step(images(4, channels=1), torch.arange(4))
                Validation(held_out, 0).loss(trainer)
            averages.append(trainer.state())
    for name, x in averages[0].items():
        if name.startswith("ema."):
            torch.testing.assert_close(averages[1][name], x)


@needs_fsdp2
def test_sharded_weights_continue_from_whole_ones(folder):
    shutil.copytree(folder / "one", folder / "resharded")
    (folder / "resharded" / "state-base.safetensors").unlink()  # that of step 6 is left
    in_two(folder, "resharded", parallel="fsdp", resume=True)
    assert saved_step(folder / "resharded", "base") == 8
    resumed = states(folder, "resharded")
    for name, x in states(folder, "one").items():
        if "weights" in name:
            torch.testing.assert_close(resumed[name], x, rtol=1e-4, atol=2e-5)


def test_a_stopped_job_is_continued_bit_for_bit_by_one_process(folder):
    """SIGKILL and two processes again are for the commands of docs/imagenet.md."""
    out = "stopped"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
    job = subprocess.Popen(
        [*torchrun, "msf.cli", *command(folder, out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    state = folder / out / "state-base.safetensors"
    deadline = time.monotonic() + 100
    while not state.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    job.terminate()
    job.wait(timeout=60)
    assert state.exists() and not (folder / out / "state-residual.safetensors").exists()
    in_one(folder, out, resume=True)
    expected = states(folder, "ddp")
    assert all(torch.equal(expected[name], x) for name, x in states(folder, out).items())
    assert_losses_of_two_processes(folder, out)


def test_what_one_process_refuses_all_do_in_one_line(folder, capfd):
    words = command(folder, "ddp")
    assert sorted(in_two_processes(lambda rank: main(words))) == [1, 2]
    assert capfd.readouterr().err == (
        f"msf train: {folder / 'ddp'}: exists and is not empty; continue its run with --resume or "
        "choose another --out\n"
    )


def test_what_all_processes_refuse_is_told_once(folder, capfd):
    words = command(folder, "x", batch_size=15)
    assert sorted(in_two_processes(lambda rank: main(words))) == [1, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("msf train: batch_size must be a multiple of 2, 2 processes times accu")
    assert not (folder / "x").exists()


def test_an_error_over_the_data_of_one_process_leaves_the_steps_of_all(photos, tmp_path, capfd):
    data = load_data(str(photos), split="train", image_size=(8, 8), channels=1)
    seen = torch.randperm(len(data), generator=generator(0, 0))
    for index in seen[56:59].tolist():  # in the fourth batch, of 48 to 64, in its second half
        data.paths[index].write_bytes(b"no image")
    model = {**MODEL, "standardize": False}  # for which all images would be read
    words = command(tmp_path, "run", data=photos, model=model, sample_every=8)
    assert in_two_processes(lambda rank: main(words)) == [1, 2]
    told = capfd.readouterr().err
    assert "msf train: data: cannot read 3 of 250 images, more than one in a hundred" in told
    assert f"base: an error, but step 3 is saved in {tmp_path / 'run'}; cont" in told
    assert saved_step(tmp_path / "run", "base") == 3


def test_the_first_process_alone_speaks(folder, capfd):
    words = command(folder, "ddp", resume=True)
    assert in_two_processes(lambda rank: main(words)) == [0, 0]
    assert capfd.readouterr().out.count("residual") == 1


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python 3.12 renews the lock in the child")
def test_a_fork_in_a_job_waits_until_no_thread_runs():
    ended, begun, data = False, threading.Event(), bytes(60_000_000)

    def work():  # 0.03 s and more without Python's lock
        nonlocal ended
        begun.set()
        hashlib.sha256(data)
        ended = True

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        time.sleep(0.005)
        assert not ended
        child = os.fork()
        if child == 0:
            os._exit(ended)
        _, status = os.waitpid(child, 0)
        thread.join()
    finally:
        dist.destroy_process_group()
    assert os.waitstatus_to_exitcode(status) == 1
