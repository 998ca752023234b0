"""What `msf sample` makes of a model, and what is left where it is stopped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latent_folders import write_latents
from models import tiny_model
from msf import sampling
from msf.cli import main
from msf.parts import Parts
from msf.training.ranks import ONE_PROCESS, Ranks
from vaes import save_vae

from .helpers import answer

OUTPUTS = ["x.npz", "x.png", "x.safetensors", "images"]


def contents(path: Path) -> list[tuple[str, bytes]]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(file.name, file.read_bytes()) for file in files]


def stop_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Press Ctrl-C when so many batches are done; returns a list that grows with each."""
    original, calls = sampling.sample_components, list[Any]()

    def sample(*args: Any, **options: Any) -> Any:
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append(None)
        return original(*args, **options)

    monkeypatch.setattr(sampling, "sample_components", sample)
    return calls


def test_an_npz_file_is_that_of_adm(workspace: Path, tmp_path: Path) -> None:
    command = ["sample", str(workspace / "run"), "--num-images=11", "--batch-size=4"]
    for name in ("x.npz", "x.safetensors"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
    images = load_file(tmp_path / "x.safetensors")["images"]
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
        rounded = np.rint(images.clamp(-1, 1).numpy() * 127.5 + 127.5)
        grey = np.broadcast_to(rounded.transpose(0, 2, 3, 1), (11, 8, 8, 3))
        np.testing.assert_array_equal(file["arr_0"], grey)
        np.testing.assert_array_equal(file["arr_1"], [*range(10), 0])


def test_without_classes_there_are_no_labels(tmp_path: Path) -> None:
    tiny_model(channels=3, num_classes=0).save_pretrained(tmp_path / "run")
    assert main(["sample", str(tmp_path / "run"), "--out", str(tmp_path / "x.npz")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        assert file.files == ["arr_0"] and file["arr_0"].shape == (16, 8, 8, 3)


def test_a_folder_may_have_a_dot_in_its_name(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "there.v1").mkdir()
    for name in ("there.v1", "guidance-1.5"):
        out = tmp_path / name
        assert main(["sample", str(workspace / "run"), "--num-images=2", "--out", str(out)]) == 0
        assert sorted(file.name for file in out.iterdir()) == ["000000.png", "000001.png"]


@pytest.mark.parametrize("labels", [[], ["--labels=random"], ["--labels=7,3"]])
def test_an_image_is_a_function_of_its_number(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: list[str]
) -> None:
    def sample(name: str, *options: str) -> tuple[list[int], torch.Tensor]:
        out = tmp_path / f"{name}.safetensors"
        made = answer(capsys, "sample", workspace / "run", "--out", out, *labels, *options)
        return made["labels"], load_file(out)["images"]

    all_labels, all_images = sample("all", "--num-images=12")
    some_labels, some_images = sample("some", "--num-images=7", "--seed=5", "--batch-size=3")
    assert some_labels == all_labels[5:]
    # Another batch size changes the order of float32 sums, no more.
    torch.testing.assert_close(some_images, all_images[5:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_same_command_continues(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    command = ["sample", str(workspace / "run"), "--num-images=11", "--batch-size=4", "--out"]
    undisturbed, out = tmp_path / "undisturbed" / name, tmp_path / name
    assert main([*command, str(undisturbed)]) == 0
    kept = f"{out}.parts"
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert main([*command, str(out)]) == 130
    assert capsys.readouterr().err == (
        f"msf sample: interrupted; 2 of 3 batches are kept in {kept}, the same command continues\n"
    )
    assert not out.exists()
    assert main([*command, str(out), "--seed=1", "--guidance-scale=2"]) == 2
    assert capsys.readouterr().err == (
        f"msf sample: {kept}: was begun with another --seed, --guidance-scale; repeat that "
        "command, remove the folder, or choose another --out\n"
    )
    made = stop_after(3, monkeypatch)
    assert main([*command, str(out)]) == 0
    assert len(made) == 1
    assert capsys.readouterr().err == f"{kept}: continuing, 2 of 3 batches are there\n"
    assert contents(out) == contents(undisturbed)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "undisturbed"])


def test_another_job_for_the_same_output_is_refused(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.npz"
    command = ["sample", str(workspace / "run"), "--num-images=2", "--out", str(out)]
    with Parts(out, {}, 1).claimed(ONE_PROCESS):
        assert main(command) == 2
    assert capsys.readouterr().err == (
        f"msf sample: {out}.parts: another job is making these; wait for it, or choose another "
        "--out\n"
    )
    original = Parts.claimed

    def claimed_later(parts: Parts, ranks: Ranks) -> AbstractContextManager[None]:
        out.write_bytes(b"of the other job, which has just ended")
        return original(parts, ranks)

    monkeypatch.setattr(Parts, "claimed", claimed_later)
    assert main(command) == 2
    assert "x.npz: exists already; choose another --out" in capsys.readouterr().err
    assert out.read_bytes().startswith(b"of the other") and os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_ctrl_c_leaves_nothing_of_no_batch(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    stop_after(0, monkeypatch)
    assert main(["sample", str(workspace / "run"), "--out", str(tmp_path / name)]) == 130
    assert capsys.readouterr().err == "msf sample: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_what_is_overwritten_stays_until_the_new_is_whole(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "images"
    command = ["sample", str(workspace / "run"), "--out", str(out), "--batch-size=4", "--overwrite"]
    assert main([*command, "--num-images=2"]) == 0
    before = contents(out)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert main([*command, "--num-images=8", "--seed=2"]) == 130
    assert contents(out) == before
    assert main([*command, "--num-images=8", "--seed=2"]) == 0
    assert len(contents(out)) == 8 and os.listdir(tmp_path) == ["images"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_again_and_again_ends_in_one_line(
    workspace: Path, tmp_path: Path, number: int
) -> None:
    command = [sys.executable, "-m", "msf.cli", "sample", str(workspace / "run"), "--batch-size=4"]
    process = subprocess.Popen(
        [*command, "--num-images=200000", "--out", str(tmp_path / "images")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob("images.parts/0*")) and process.poll() is None:
        time.sleep(0.01)
    for _ in range(20):
        process.send_signal(number)
        time.sleep(0.01)
    _, messages = process.communicate(timeout=120)
    count = len(os.listdir(tmp_path / "images.parts"))
    assert process.returncode == 130
    assert messages == (
        f"msf sample: interrupted; {count:,} of 50,000 batches are kept in "
        f"{tmp_path / 'images.parts'}, the same command continues\n"
    )


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of latents in run/ and a VAE in vae/."""
    folder = tmp_path_factory.mktemp("latents")
    tiny_model(channels=4).save_pretrained(folder / "run")
    save_vae(folder / "vae")
    return folder


def decoded(folder: Path, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in 0..255 that diffusers makes."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        images = vae.decode(latents / 0.5 + 0.25).sample
    return images.clamp(-1, 1) * 127.5 + 127.5


def test_a_vae_decodes_latents(latents: Path, tmp_path: Path) -> None:
    command = ["sample", str(latents / "run"), "--num-images=5", "--batch-size=2", "--out"]
    assert main([*command, str(tmp_path / "x.safetensors")]) == 0
    expected = decoded(latents / "vae", load_file(tmp_path / "x.safetensors")["images"])
    for name in ("x.npz", "images", "x.png"):
        assert main([*command, str(tmp_path / name), "--vae", str(latents / "vae")]) == 0
    with np.load(tmp_path / "x.npz") as file:
        pixels = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
    assert pixels.float().std() > 10  # pictures, not all of one grey
    # Rounding to the nearest, of float32 sums of another batch.
    assert (pixels - expected).abs().max() <= 0.5 + 1e-3
    for index in range(5):
        picture = np.array(Image.open(tmp_path / "images" / f"{index:06d}.png"))
        np.testing.assert_array_equal(picture, pixels[index].permute(1, 2, 0))
    grid = np.array(Image.open(tmp_path / "x.png"))
    np.testing.assert_array_equal(grid[:16, :16], pixels[0].permute(1, 2, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--out x.png --vae none", "none: holds no VAE (config.json is missing)"),
        ("--out x.safetensors --vae vae", "x.safetensors: takes latents as they are; leave --vae"),
        ("--out x.npz", "latents of 4 channels, not pictures; decode them with --vae, or name a"),
        ("--out x.npz --vae three", "three: decodes latents of 3 channels, the model makes 4;"),
        ("--out x.npz --vae four", "the number of pixels a side is 32 (not 16); give their VAE"),
        ("--out x.npz --vae scaled", "on: scaling_factor is 0.1 (not 0.5); give their VAE"),
    ],
)
def test_a_vae_that_does_not_fit_is_one_line(
    latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    monkeypatch.chdir(latents)
    if not Path("four").exists():
        save_vae("three", latent_channels=3)
        wide = {"down_block_types": ("DownEncoderBlock2D",) * 3, "block_out_channels": (8, 8, 8)}
        save_vae("four", **wide, up_block_types=("UpDecoderBlock2D",) * 3)
        save_vae("scaled", scaling_factor=0.1)
        write_latents(Path("data"), image_size=16, classes=3)
        training = {"steps": [1, 1]}
        Path("run/training.json").write_text(json.dumps({"data": "data", "training": training}))
    before = sorted(latents.rglob("*"))
    assert main(["sample", "run", *options.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("msf sample: ") and message in line
    assert sorted(latents.rglob("*")) == before


def test_a_terminal_shows_progress(workspace: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)  # it has none at first, and tqdm fills the width
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    command = [sys.executable, "-m", "msf.cli", "sample", str(workspace / "run"), "--num-images=12"]
    process = subprocess.run(
        [*command, "--batch-size=4", "--out", str(tmp_path / "images")],
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert process.returncode == 0
    assert "0/12 " in shown and "12/12 " in shown and "100%" in shown
    assert len(list((tmp_path / "images").iterdir())) == 12
