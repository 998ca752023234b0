"""Every command as a process, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msf import MSF, PRESETS, MSFConfig
from msf.cli import main
from msf.cli.commands import inspect

from .helpers import document, msf, write_config


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from msf.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 3 * ('torch' in sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0
    assert "doctor" in process.stdout


@pytest.mark.parametrize("chosen", [None, "active"])
def test_threads_give_up_their_core_while_they_wait(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    main(["flops"])
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "passive")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("msf ")


def test_flops_process(workspace: Path) -> None:
    costs = document(msf("flops", workspace / "run", "--steps", 10, 3, "--json"))
    assert [stage["steps"] for stage in costs["stages"]] == [10, 3]
    per_image = sum(stage["gmacs_per_forward"] * stage["steps"] for stage in costs["stages"])
    assert costs["gmacs_per_image"] == pytest.approx(per_image, rel=1e-12)
    assert costs["dit_xl_2"] is None


def test_flops_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert [line for line in lines if "arXiv 2501.13349v2 claims (4x)" in line]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "msf.cli", "flops"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


def test_doctor_process() -> None:
    import msf_kernels

    found = document(msf("doctor", "--json"))
    assert torch.__version__.startswith(found["versions"]["torch"])  # some leave out "+cu124"
    assert list(found["operators"]) == list(msf_kernels.OPERATORS)
    for op, operator in found["operators"].items():
        assert operator["backend"] in msf_kernels.backends_of(op)
        assert operator["backend"] not in operator["reasons"]
        assert all(operator["reasons"].values())


def test_doctor_finds_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSF_BACKEND", "metal")
    assert main(["doctor"]) == 1
    assert "MSF_BACKEND: unknown backend 'metal': choose auto" in capsys.readouterr().out


def test_doctor_says_what_calls_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import msf_kernels

    request = "reference,attention=flash"
    monkeypatch.setenv("MSF_BACKEND", request)
    assert main(["doctor", "--json"]) == 0
    operators = json.loads(capsys.readouterr().out)["operators"]
    with msf_kernels.backend(request):
        expected = {op: msf_kernels.chosen_backend(op) for op in msf_kernels.OPERATORS}
    assert {op: found["backend"] for op, found in operators.items()} == expected
    assert expected["attention"] == "flash" and expected["merge_tokens"] == "reference"
    assert set(operators["attention"]["reasons"]) >= {"cudnn", "efficient", "flash-attn"}
    assert operators["attention"]["reasons"]["reference"] == "flash was asked for"
    monkeypatch.setenv("MSF_BACKEND", "auto,attention=flash")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["operators"]["merge_tokens"]["reasons"]
    assert not [reason for reason in found.values() if reason.endswith("asked for")]


@pytest.mark.parametrize(
    ("gpu", "order"),
    [
        ("NVIDIA H200", "measured on h200"),
        ("NVIDIA A100", "measured on h200, the nearest to sm_80"),
    ],
)
def test_doctor_says_which_gpu_was_measured(
    gpu: str, order: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from msf.cli.commands import doctor
    from msf_kernels import measurements

    capability = (9, 0) if gpu == "NVIDIA H200" else (8, 0)
    monkeypatch.setattr(doctor.models, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(doctor, "_gpu", lambda: {"name": gpu})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    measurements.table_for.cache_clear()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    measurements.table_for.cache_clear()
    assert re.search(rf"^order +{order}$", out, re.MULTILINE)
    assert "\nmeasured on h200\nadaln_modulate 64x256x1152 bfloat16 " in out


def test_factorize_process(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    found = document(
        msf("factorize", workspace / "image.png", "--levels", 2, "--out", out, "--json")
    )
    names = [part["name"] for part in found["components"]]
    assert names == ["base", "residual_1", "residual_2"]
    assert sum(part["variance_share"] for part in found["components"]) == pytest.approx(1)
    assert found["max_error"] <= 4 * torch.finfo(torch.float32).eps
    assert sorted(file.stem for file in out.iterdir()) == sorted([*names, "merged"])
    merged, image = (np.array(Image.open(f)) for f in (out / "merged.png", workspace / "image.png"))
    assert (merged == image).all()
    assert Image.open(out / "base.png").size == (5, 3)


def test_factorize_shows_white_behind_what_is_transparent(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert main(["factorize", str(tmp_path / "x.png"), "--out", str(tmp_path / "parts")]) == 0
    assert (np.array(Image.open(tmp_path / "parts" / "merged.png")) == 255).all()


def test_inspect_a_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workspace / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = MSF.from_pretrained(workspace / "run")
    assert MSFConfig.from_dict(found["config"]) == model.config
    assert [stage["trained"] for stage in found["stages"]] == [True, True]
    assert [stage["std"] for stage in found["stages"]] == model.pyramid.std.tolist()
    assert found["training"]["data"] == "digits"
    assert main(["inspect", str(workspace / "run")]) == 0
    out = capsys.readouterr().out
    assert "residual  8x8" in out
    assert re.search(r"^class names +0 0, 1 1, .*, 9 9$", out, re.MULTILINE)
    found["config"]["num_classes"] = 0
    assert "class names" not in inspect.text(found)


def test_a_missing_model_beside_states_is_told_how_to_mend(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    (run / "model.safetensors").unlink()
    assert main(["sample", str(run), "--out", str(tmp_path / "x.png")]) == 2
    assert "model.safetensors is missing; msf train --resume rebuilds it" in capsys.readouterr().err


def test_sample_process_writes_a_grid(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    found = document(msf("sample", workspace / "run", "--out", out, "--count", 12, "--json"))
    assert found["labels"] == [*range(10), 0, 1]
    assert [file.name for file in out.parent.iterdir()] == ["grid.png"]
    width, height = Image.open(out).size
    assert width > 2.5 * height  # base, residual and merged image


def test_samples_depend_on_seed_and_label_alone(workspace: Path, tmp_path: Path) -> None:
    def sample(name: str, *options: str) -> Path:
        assert (
            main(["sample", str(workspace / "run"), "--out", str(tmp_path / name), *options]) == 0
        )
        return tmp_path / name

    tensors = sample("all.safetensors", "--labels", "3,4,10,3", "--seed", "7")
    images = load_file(tensors)["images"]
    assert images.shape == (4, 1, 8, 8)
    folder = sample("folder", "--labels=3,4,10,3", "--seed=7", "--batch-size=3")
    assert sorted(file.name for file in folder.iterdir()) == [f"00000{i}.png" for i in range(4)]
    for index in range(4):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"00000{index}.png")))
        wanted = images[index, 0].clamp(-1, 1) * 127.5 + 127.5
        assert (pixels - wanted).abs().max() <= 0.5 + 1e-3
    sample("folder", "--labels=5", "--overwrite")
    assert [file.name for file in folder.iterdir()] == ["000000.png"]
    one = load_file(sample("one.safetensors", "--label=4", "--seed=8", "--steps", "4", "2"))[
        "images"
    ]
    # Another batch size changes the order of float32 sums, no more.
    torch.testing.assert_close(one[0], images[1], rtol=1e-4, atol=1e-4)


def test_precision_is_fp32_on_a_cpu_unless_asked_for(workspace: Path, tmp_path: Path) -> None:
    def sample(precision: str) -> torch.Tensor:
        out = tmp_path / f"{precision}.safetensors"
        command = ["sample", str(workspace / "run"), "--device", "cpu", "--precision", precision]
        assert main([*command, "--out", str(out)]) == 0
        return load_file(out)["images"]

    fp32, bf16 = sample("fp32"), sample("bf16")
    assert sample("auto").equal(fp32) and not bf16.equal(fp32)
    # Data minus noise is below 5; its relative error of 2^-8 a rounding, six deep, is followed from
    # t = 0 to 1 by both stages.
    assert (bf16 - fp32).abs().max() < 2 * 6 * 5 * 2**-8


def test_evaluate_process_compares_settings(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    settings = ("--steps", 2, 1, "--steps", 1, "--samples", 32, "--guidance-scale", 1.5)
    found = document(msf("evaluate", workspace / "run", *settings, "--out", out, "--json"))
    assert json.loads(out.read_text()) == found
    assert found["data"] == "digits"
    assert [result["steps"] for result in found["results"]] == [[2, 1], [1, 1]]
    first, second = (result["report"] for result in found["results"])
    assert first["settings"] == second["settings"]
    assert first["real"] == second["real"]
    assert first["generated"]["fd"] != second["generated"]["fd"]
    # With the base given, two and one base steps are the same.
    assert first["bases"]["true"] == second["bases"]["true"]


def test_evaluate_knows_the_data_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(300):
        path = tmp_path / "photos" / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 20 + 20 * (index % 3)).save(path)
    config = write_config(tmp_path / "c.json", model={"num_classes": 3})
    photos, run = tmp_path / "photos", str(tmp_path / "run")
    assert main(["train", "--config", str(config), "--data", str(photos), "--out", run]) == 0
    evaluate = ["evaluate", run, "--steps", "1", "--samples", "8"]
    photos.rename(tmp_path / "moved")
    moved = [*evaluate, "--data", str(tmp_path / "moved")]
    assert main(moved) == 0
    (tmp_path / "moved" / "a").rename(tmp_path / "moved" / "z")
    capsys.readouterr()
    assert main(moved) == 2
    change = "classes gone: a, classes new: z"
    assert capsys.readouterr().err == (
        f"msf evaluate: {run}: not the data this run was trained on: {change}; "
        "restore it, or evaluate on what is there now with --data-changed\n"
    )
    assert main([*moved, "--data-changed"]) == 0
    assert f"{run}: evaluating with {change}\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "moved" / "z")
    shutil.copytree(tmp_path / "moved" / "b", tmp_path / "moved" / "a")
    assert main(moved) == 2  # the same classes with other images
    assert "100 of 300 images are gone (a/0.png first)" in capsys.readouterr().err


def test_train_takes_its_options(tmp_path: Path) -> None:
    train = ["train", "--config", str(write_config(tmp_path / "c.json")), "--data", "digits"]
    options = ["--batch-size=4", "--learning-rate=0.5", "--sample-every=3", "--checkpoint-every=2"]
    assert main([*train, "--out", str(tmp_path / "run"), *options, "--flip", "--steps", "4"]) == 0
    training = json.loads((tmp_path / "run" / "training.json").read_text())["training"]
    assert training["batch_size"] == 4 and training["learning_rate"] == 0.5
    assert training["sample_every"] == 3 and training["checkpoint_every"] == 2
    assert training["flip"] is True and training["holdout"] == 0.2


def test_ctrl_c_pressed_on_and_on_ends_without_a_traceback(tmp_path: Path) -> None:
    config, out = write_config(tmp_path / "c.json"), tmp_path / "run"
    command = [sys.executable, "-m", "msf.cli", "train", "--config", str(config), "--steps=5000"]
    process = subprocess.Popen(
        [*command, "--data", "digits", "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    for _ in range(60):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert "Traceback" not in messages and "msf train: " in messages
    assert (out / "state-base.safetensors").exists()


def test_ctrl_c_saves_and_resume_finishes_bit_for_bit(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.json", training={"steps": [120, 4], "log_every": 4, "sample_every": 50}
    )
    train = ["train", "--config", str(config), "--data", "digits", "--out"]
    command = [sys.executable, "-m", "msf.cli", *train, str(tmp_path / "stopped")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stopped" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert messages.splitlines()[-1].startswith("msf train: stopped at step ")
    assert "continue with --resume" in messages
    assert main([*train, str(tmp_path / "stopped"), "--resume"]) == 0
    assert main([*train, str(tmp_path / "whole")]) == 0
    for file in ("model.safetensors", "state-base.safetensors", "state-residual.safetensors"):
        stopped, whole = (load_file(tmp_path / name / file) for name in ("stopped", "whole"))
        assert stopped.keys() == whole.keys()
        for key, value in stopped.items():
            assert value.equal(whole[key]), f"{file}: {key}"
