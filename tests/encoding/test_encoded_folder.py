"""Who may fill a folder of latents."""

import pytest

from msf.cli import main
from msf.data.latent_index import read_index
from msf.encoding.encode import encode
from msf.encoding.vae import Autoencoder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_the_unreadable_images_the_same_command_begins_anew(photos, vae, tmp_path, capsys):
    for name in ("a/000.png", "a/002.png"):
        (photos / name).write_bytes(b"no image")
    command = ["encode", str(photos), "--vae", str(vae), "--size=32", "--device=cpu", "--out"]
    out = tmp_path / "x"
    assert main([*command, str(out)]) == 2
    assert [*contents(out)] == ["latents.json"]
    for name in ("a/000.png", "a/002.png"):
        (photos / name).unlink()
    capsys.readouterr()
    assert main([*command, str(out)]) == 0
    # As much as 108 images take, no more for those of before.
    assert "takes 0.000886 GB, " in capsys.readouterr().err
    assert main([*command, str(tmp_path / "y")]) == 0
    assert contents(out) == contents(tmp_path / "y") and read_index(out).found == 108


def test_of_two_that_begin_at_once_with_other_images_one_is_refused(
    photos, vae, tmp_path, monkeypatch
):
    """Nothing that the first has made is overwritten."""
    original, out = Autoencoder.moments, tmp_path / "x"

    def overtaken(self, images):
        with monkeypatch.context() as patch:
            patch.setattr(Autoencoder, "moments", original)
            (photos / "a" / "000.png").rename(tmp_path / "000.png")
            encode(photos, vae, 32, out)
            (tmp_path / "000.png").rename(photos / "a" / "000.png")
        monkeypatch.setattr(Autoencoder, "moments", original)
        made.update(contents(out))
        return original(self, images)

    made = {}
    monkeypatch.setattr(Autoencoder, "moments", overtaken)
    with pytest.raises(ValueError, match="x: holds latents of images of other names or sizes, an"):
        encode(photos, vae, 32, out)
    assert read_index(out).is_complete and contents(out) == made
