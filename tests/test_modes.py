"""What a caller has set changes nothing: autocast, gradient modes, the default dtype and device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import msf
from models import images, tiny_model
from msf.cli import main
from msf.data import load_data
from msf.encoding.encode import encode
from msf.encoding.vae import Autoencoder
from msf.evaluation import Evaluator
from msf.evaluation.features import extract, train_feature_network
from msf.images import save_image
from msf.modes import own_modes
from msf.training.batches import batches
from msf.training.stage import StageTrainer
from training_runs import TRAINING, digest, run
from vaes import save_vae


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": partial(default_dtype, torch.float64),
    "meta": partial(torch.device, "meta"),
    "default device": partial(default_device, "meta"),
}
callers = pytest.mark.parametrize("caller", CALLERS)


@pytest.mark.parametrize("caller", ["autocast", "no_grad", "inference_mode", "meta"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step(caller: str, precision: str) -> None:
    def trained(scope: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
        config = dataclasses.replace(TRAINING, precision=precision, learning_rate=1e-2)
        trainer = StageTrainer(tiny_model(), 0, config)
        x, y = images(4), torch.arange(4) % 3
        with scope():
            losses = [trainer.step(x, y).clone() for _ in range(3)]
        return [*losses, *(parameter.detach() for parameter in trainer.parameters)]

    expected = trained(own_modes)
    assert len({float(loss) for loss in expected[:3]}) == 3
    assert all(map(torch.equal, trained(CALLERS[caller]), expected))


@callers
def test_a_loop_of_ones_own(caller: str, tmp_path: Path) -> None:
    def trained(scope: Callable[[], AbstractContextManager[Any]]) -> dict[str, Tensor]:
        model, path = tiny_model(channels=1, num_classes=10), tmp_path / "state.safetensors"
        with scope():
            data = load_data("digits", split="train", image_size=(8, 8), channels=1)
            trainer = StageTrainer(model, 0, TRAINING)
            for steps in (2, 3):
                for x, y in batches(data, 16, trainer.step_number, steps, seed=0):
                    trainer.step(x, y)
                    assert torch.empty(0).device.type == device
                trainer.check_finite()
                trainer.save(path)
                trainer = StageTrainer(model, 0, TRAINING)
                trainer.load(path)
            trainer.roll_back(path)
            for x, y in batches(data, 16, 3, 4, seed=0):
                trainer.step(x, y)
            return trainer.state()

    device = "cpu"
    expected = trained(own_modes)
    with CALLERS[caller]():
        device = torch.empty(0).device.type
    got = trained(CALLERS[caller])
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert got[name].dtype == x.dtype and torch.equal(got[name], x), name


@callers
def test_features(caller: str) -> None:
    data = load_data("textures", split="features", image_size=(16, 16), channels=1, num_classes=0)
    x = data.images(torch.arange(8))
    expected, _ = extract(train_feature_network(data, steps=3), x)
    with CALLERS[caller]():
        got, _ = extract(train_feature_network(data, steps=3), x)
    assert got.dtype == torch.float64 and torch.equal(got, expected)


@callers
def test_statistics(caller: str) -> None:
    def measured() -> list[Tensor]:
        pyramid.measure(x)
        return [pyramid.mean.clone(), pyramid.std.clone()]

    pyramid, x = msf.Pyramid(1, 2), images(4).split(2)
    expected = measured()
    pyramid.reset_parameters()
    with CALLERS[caller]():
        assert all(map(torch.equal, measured(), expected))


@callers
def test_images_of_a_seed(caller: str) -> None:
    def sampled() -> Tensor:
        return msf.sample(model, labels, seeds=[3, 4])

    model, labels = tiny_model(), torch.tensor([0, 2])
    expected = sampled()
    with CALLERS[caller]():
        got = sampled()
    assert got.dtype == torch.float32
    # Autocast is the caller's wish here: the same noise, computed in bfloat16.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.3 if caller == "autocast" else 0)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers", reason="needs diffusers (the latents extra)")
    return save_vae(tmp_path_factory.mktemp("vae"))


@callers
def test_latents_of_images_and_images_of_latents(caller: str, vae: Path) -> None:
    def coded() -> tuple[Tensor, Tensor]:
        coder = Autoencoder(vae)
        return coder.moments(pictures), coder.decode(latents)

    pictures, latents = images(2, channels=3, size=(32, 32)), images(2, channels=4, size=(16, 16))
    expected = coded()
    with CALLERS[caller]():
        got = coded()
    assert all(map(torch.equal, got, expected))


@callers
def test_an_encoded_folder(caller: str, vae: Path, tmp_path: Path) -> None:
    def encoded(name: str) -> list[bytes]:
        encode(photos, vae, 32, tmp_path / name, batch_size=2, progress=False)
        return [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]

    photos = tmp_path / "photos"
    photos.mkdir()
    for number, x in enumerate(images(3, channels=3, size=(32, 32))):
        save_image(photos / f"{number}.png", x)
    expected = encoded("expected")
    with CALLERS[caller]():
        assert encoded("got") == expected


@pytest.mark.parametrize("caller", sorted({*CALLERS} - {"autocast"}))  # which is the caller's wish
def test_pictures_of_a_pipeline(caller: str, vae: Path, tmp_path: Path) -> None:
    def made() -> list[bytes]:
        pipe = msf.Pipeline.from_pretrained(tmp_path, vae=vae)
        return [picture.tobytes() for picture in pipe([0, 2]).images]

    tiny_model(channels=4).save_pretrained(tmp_path)
    expected = made()
    with CALLERS[caller]():
        assert made() == expected


@callers
def test_images_of_the_command(caller: str, vae: Path, tmp_path: Path) -> None:
    def made(name: str) -> bytes:
        assert main(["sample", *map(str, (tmp_path, "--vae", vae, "--out", tmp_path / name))]) == 0
        return (tmp_path / name).read_bytes()

    tiny_model(channels=4).save_pretrained(tmp_path)
    expected = made("expected.png")
    with CALLERS[caller]():
        assert made("got.png") == expected


def test_images_after_a_step_inside_one_autocast() -> None:
    """Autocast keeps the casts of weights, which a step changes."""

    def sampled() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return msf.sample(model, labels, seeds=[3, 4])

    model, labels = tiny_model(), torch.tensor([0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        model(images(2), labels)["total"].backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        got = sampled()
    assert torch.equal(got, sampled())


@callers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_a_file(caller: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path)
    with CALLERS[caller]():
        loaded = msf.MSF.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == dtype and torch.equal(got, weight) and not got.is_inference(), name
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.fixture(scope="module")
def expected_run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "expected"
    run(out)
    return digest(out)


@callers
def test_training(caller: str, expected_run: Any, tmp_path: Path) -> None:
    random = torch.get_rng_state()
    with CALLERS[caller]():
        model = run(tmp_path / "run")
        assert torch.equal(torch.get_rng_state(), random)
        run(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == expected_run
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


def report() -> tuple[Any, set[str]]:
    """Of an evaluation of noise, and the default devices that the caller's own code has seen."""
    devices = set()

    def generate(labels: Tensor, seeds: list[int], true_images: Tensor | None) -> Tensor:
        devices.add(torch.empty(0).device.type)
        noise = torch.Generator().manual_seed(seeds[0])
        return torch.rand(len(labels), 1, 8, 8, generator=noise, device="cpu", dtype=torch.float32)

    size = {"image_size": (8, 8), "channels": 1, "num_classes": 10}
    judge = Evaluator("digits", **size, num_samples=20, replicates=2)
    return judge.evaluate(generate).to_dict(), devices


@pytest.fixture(scope="module")
def expected_report() -> Any:
    expected, devices = report()
    assert devices == {"cpu"}
    return expected


@pytest.mark.parametrize("caller", ["meta", "default device", "float64"])
def test_an_evaluation(caller: str, expected_report: Any) -> None:
    with CALLERS[caller]():
        assert report() == (expected_report, {torch.empty(0).device.type})


def test_losses_draw_float32_whatever_the_default_is() -> None:
    model, x, y = tiny_model(), images(2), torch.tensor([0, 1])
    expected = model(x, y, generator=torch.Generator().manual_seed(0))
    with default_dtype(torch.float64):
        got = model(x, y, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_callers_modes_are_back_afterwards() -> None:
    with default_dtype(torch.float64), torch.no_grad():
        with pytest.raises(KeyError), own_modes():
            assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
            raise KeyError
        assert not torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64
