"""Images become latents."""

import json
import multiprocessing
import resource
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msf.cli import main
from msf.data import load_data
from msf.data.decode import centre_crop
from msf.data.latent_index import read_index
from msf.data.splits import hash_of
from msf.encoding.encode import encode
from msf.encoding.vae import WEIGHTS, Autoencoder
from msf.files import checksum
from vaes import save_vae


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def whole(photos, vae, tmp_path):
    encode(photos, vae, 32, tmp_path / "whole", batch_size=8)
    return tmp_path / "whole"


def names(photos):
    return [f"{path.parent.name}/{path.name}" for path in sorted(photos.glob("*/*"))]


def test_stored_are_the_posteriors_of_image_and_mirror_image(photos, vae, whole):
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae, low_cpu_mem_usage=False).eval()
    shards = [load_file(path) for path in sorted(whole.glob("*.safetensors"))]
    assert [len(shard["labels"]) for shard in shards] == [32, 32, 32, 14]
    stored = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    assert stored["moments"].dtype == torch.float16
    assert stored["labels"].tolist() == [0] * 55 + [1] * 55
    assert stored["hashes"].tolist() == list(map(hash_of, names(photos)))
    for index in (0, 31, 32, 109):
        with Image.open(photos / names(photos)[index]) as image:
            cropped = np.array(centre_crop(image, 32))
        for version, pixels in enumerate((cropped, cropped[:, ::-1].copy())):
            x = torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1
            with torch.no_grad():
                posterior = model.encode(x).latent_dist
            expected = torch.cat([posterior.mean, posterior.logvar], 1)[0]
            # Half of float16's precision of values up to 4, and float32 sums of another batch.
            torch.testing.assert_close(
                stored["moments"][index, version].float(), expected, rtol=2**-11, atol=1e-5
            )


def test_the_index_says_what_is_in_the_folder(photos, vae, whole):
    index = read_index(whole)
    assert index.vae.sha256 == checksum(vae / WEIGHTS) and index.vae.scaling_factor == 0.5
    assert index.vae.shift_factor == 0.25 and index.source == "photos"
    assert index.image_size == 32 and index.latent_shape == (4, 16, 16)
    assert index.class_names == ("a", "b") and index.images == index.found == 110
    assert index.is_complete and index.skipped == ()
    for shard in index.shards:
        assert shard.bytes == (whole / shard.name).stat().st_size
        assert shard.sha256 == checksum(whole / shard.name)


def test_training_reads_what_was_encoded(photos, whole):
    options = {"image_size": (16, 16), "channels": 4, "num_classes": 2}
    pixels = {"image_size": (8, 8), "channels": 3}
    for split in ("train", "features", "test"):
        data = load_data(str(whole), split=split, **options)
        of_images = load_data(str(photos), split=split, **pixels)
        assert torch.equal(data.labels, of_images.labels)
    x = data.images(torch.arange(len(data)))
    stored = torch.cat([load_file(p)["moments"] for p in sorted(whole.glob("*.safetensors"))])
    at = names(photos).index(of_images.names[0])
    assert torch.equal(x[0], (stored[at, 0, :4].float() - 0.25) * 0.5)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_the_bytes_depend_neither_on_the_batch_nor_on_workers(
    photos, vae, whole, tmp_path, batch_size
):
    encode(photos, vae, 32, tmp_path / "x", batch_size=batch_size, workers=batch_size % 2)
    assert contents(tmp_path / "x") == contents(whole)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_whichever_process_is_last_ends_in_the_same_bytes(photos, vae, whole, tmp_path, order):
    for rank in order:
        index = encode(photos, vae, 32, tmp_path / "x", rank=rank, processes=3)
        assert index.is_complete == (rank == order[-1])
    assert contents(tmp_path / "x") == contents(whole)


def test_processes_at_the_same_time(photos, vae, whole, tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(
            target=encode,
            args=(photos, vae, 32, tmp_path / "x"),
            kwargs={"rank": rank, "processes": 3},
        )
        for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert contents(tmp_path / "x") == contents(whole)


def test_the_place_under_torchrun_is_in_the_environment(photos, vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    out = tmp_path / "x"
    command = ["encode", str(photos), "--vae", str(vae), "--size=32", "--out", str(out)]
    command += ["--device=cpu", "--json", "--quiet"]
    assert main(command) == 0
    assert capsys.readouterr() == ("", "")  # while the other has still to end
    assert sorted(contents(out)) == [f"latents-0000{i}.safetensors" for i in (1, 3)] + [
        "latents.json"
    ]
    monkeypatch.setenv("RANK", "0")
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 4


def test_stopped_and_continued_ends_in_the_same_bytes(
    photos, vae, whole, tmp_path, monkeypatch, capsys
):
    original, calls = Autoencoder.moments, []

    def stopped(self, images):
        calls.append(len(images))
        if len(calls) == 6:  # in the second shard
            raise KeyboardInterrupt
        return original(self, images)

    out = tmp_path / "x"
    command = ["encode", str(photos), "--vae", str(vae), "--size=32", "--out", str(out)]
    command += ["--batch-size=8", "--device=cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "moments", stopped)
        assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"msf encode: interrupted; 1 of 4 shards are whole in {out}, the same command continues"
    )
    assert sorted(contents(out)) == ["latents-00000.safetensors", "latents.json"]
    with pytest.raises(ValueError, match="has 1 of 4 shards; finish it with the same msf encode"):
        load_data(str(out), split="train", image_size=(16, 16), channels=4)
    made = []
    monkeypatch.setattr(
        Autoencoder, "moments", lambda self, x: (made.append(len(x)), original(self, x))[1]
    )
    assert main(command) == 0
    assert sum(made) == 110 - 32 and contents(out) == contents(whole)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "is damaged"),
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b""), "has 0 bytes, not "),
    ],
)
def test_a_damaged_shard_is_named_and_made_again(photos, vae, whole, capsys, damage, message):
    before = contents(whole)
    damage(whole / "latents-00002.safetensors")
    assert encode(photos, vae, 32, whole).is_complete
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.endswith("making it anew"))
    assert line.startswith(f"{whole / 'latents-00002.safetensors'} {message}")
    assert contents(whole) == before


def test_other_arguments_and_data_are_refused(photos, vae, whole, tmp_path):
    before = contents(whole)
    other = save_vae(tmp_path / "other", scaling_factor=0.3)
    with pytest.raises(ValueError, match="whole: holds latents of another VAE; encode what they"):
        encode(photos, other, 32, whole)
    with pytest.raises(ValueError, match="of another size, another shape; encode what they are"):
        encode(photos, vae, 64, whole)
    Image.new("RGB", (32, 32)).save(photos / "a" / "109.png")
    with pytest.raises(ValueError, match="holds latents of images of other names or sizes, anoth"):
        encode(photos, vae, 32, whole)
    assert contents(whole) == before
    with pytest.raises(ValueError, match=r"photos: holds files but no latents \(latents.json\);"):
        encode(photos, vae, 32, photos)
    with pytest.raises(ValueError, match=r"000.png: is a file; --out must be in a folder$"):
        encode(photos, vae, 32, photos / "a" / "000.png" / "x")


def test_corrupt_images_are_skipped_counted_and_named(photos, vae, whole, tmp_path, capsys):
    (photos / "a" / "004.png").write_bytes(b"")  # the third of its class
    out = tmp_path / "x"
    command = ["encode", str(photos), "--vae", str(vae), "--size=32", "--out", str(out)]
    capsys.readouterr()
    assert main([*command, "--device=cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == (
        "skipped 1 of 110 images, as they cannot be read: a/004.png"
    )
    index = read_index(out)
    assert index.skipped == ("a/004.png",) and index.images == 109 and index.found == 110
    assert [shard.images for shard in index.shards] == [31, 32, 32, 14]
    before, now = (load_file(f / "latents-00000.safetensors")["moments"] for f in (whole, out))
    assert torch.equal(now, torch.cat([before[:2], before[3:]]))
    data = load_data(str(out), split="train", image_size=(16, 16), channels=4, holdout=0.0)
    assert len(data) == 109 and data.images(torch.arange(109)).isfinite().all()


def test_a_shard_may_hold_nothing(photos, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("msf.encoding.encode.SHARD_IMAGES", 109)
    (photos / "b" / "109.png").write_bytes(b"no image")
    index = encode(photos, vae, 32, tmp_path / "x", batch_size=109)
    assert index.is_complete and [shard.images for shard in index.shards] == [109, 0]
    options = {"image_size": (16, 16), "channels": 4, "holdout": 0.0}
    data = load_data(str(tmp_path / "x"), split="train", **options)
    assert data.images(torch.tensor([108])).isfinite().all() and len(data) == 109


def test_more_than_one_in_a_hundred_are_an_error(photos, vae, tmp_path):
    for name in ("a/000.png", "b/109.png"):
        (photos / name).write_bytes(b"no image")
    for _ in range(3):  # however often it is tried
        with pytest.raises(ValueError, match=r"cannot read 2 of 110 images, more than one in a hu"):
            encode(photos, vae, 32, tmp_path / "x")
    # Each of two processes meets one of them.
    with pytest.raises(ValueError, match=r"cannot read 2 of 110 .*: a/000.png, b/109.png;"):
        for rank in range(2):
            encode(photos, vae, 32, tmp_path / "y", rank=rank, processes=2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the VAE makes NaN or infinity of it; leave the image out or take another"),
        (float("inf"), "the VAE makes NaN or infinity of it"),
        (7e4, r"the VAE makes 7e\+04 of it, more than float16 can hold \(65504\)"),
    ],
)
def test_latents_that_float16_cannot_hold_name_their_image(
    photos, vae, tmp_path, monkeypatch, value, message
):
    original = Autoencoder.moments

    def spoilt(self, images):
        moments = original(self, images).clone()
        moments[2, 1, 0, 3, 3] = value
        return moments

    monkeypatch.setattr(Autoencoder, "moments", spoilt)
    with pytest.raises(ValueError, match=f"a/004.png: {message}"):
        encode(photos, vae, 32, tmp_path / "x")
    assert not list((tmp_path / "x").glob("*.safetensors"))


Usage = namedtuple("Usage", "total used free")


def test_the_disk_is_looked_at_before_anything_is_made(photos, vae, tmp_path, monkeypatch, capsys):
    # Two versions of two moments of 4x16x16 values of two bytes, label and hash.
    needed = 110 * (2 * 2 * 4 * 16 * 16 * 2 + 16)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, needed - 1))
    with pytest.raises(ValueError, match=r"x: the latents take 0.000903 GB, 0.000903 GB are free;"):
        encode(photos, vae, 32, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, needed))
    encode(photos, vae, 32, tmp_path / "x")
    assert capsys.readouterr().err.startswith(
        "110 images to latents of 4x16x16, 4 shards; what is to be made takes 0.000903 GB, "
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(0, 0, 0))
    encode(photos, vae, 32, tmp_path / "x")  # nothing is to be made


# The first, of ulimit -f 1, is less than the indices of a shard take.
@pytest.mark.parametrize("limit", [1 << 10, 20 << 10])
def test_workers_without_room_in_shared_memory_do_not_hang(vae, tmp_path, limit):
    (tmp_path / "photos").mkdir()
    for index in range(200):
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / f"{index}.png")
    command = [sys.executable, "-m", "msf.cli", "encode", tmp_path / "photos", "--vae", vae]
    process = subprocess.run(
        [*command, "--size=32", "--device=cpu", "--out", tmp_path / "x"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 2 and "Traceback" not in process.stderr
    # Not always the last line: a worker that is ended as it starts may say so behind it.
    assert "\nmsf encode: data: no shared memory for a batch (" in process.stderr


def test_what_of_the_folder_is_left_out_is_told(photos, vae, tmp_path, capsys):
    (photos / "a" / "list.txt").touch()
    (photos / "beside.png").touch()
    encode(photos, vae, 32, tmp_path / "x")
    assert "free; ignored: 1 beside the class folders, 1 with other suffixes (.txt)\n" in (
        capsys.readouterr().err
    )


def test_a_folder_without_classes(photos, vae, tmp_path):
    index = encode(photos / "a", vae, 32, tmp_path / "x")
    assert index.class_names == () and index.images == 55
    assert not load_file(tmp_path / "x" / "latents-00000.safetensors")["labels"].any()
