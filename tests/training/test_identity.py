"""A run knows its data."""

import json
import shutil

import pytest
from PIL import Image

from msf.training.config import read_run
from msf.training.identity import changed_classes, changed_files, fingerprint, read_files
from msf.training.train import train
from training_runs import MODEL, TRAINING, digest


@pytest.fixture
def trained(photos, tmp_path):
    """The base is trained."""
    train(MODEL, TRAINING, str(photos), tmp_path / "run", stages=["base"], progress=False)
    return tmp_path / "run"


def resume(photos, run, **options):
    return train(MODEL, TRAINING, str(photos), run, resume=True, progress=False, **options)


def rename(photos):
    (photos / "3").rename(photos / "x3")
    return (
        r"classes gone: 3, classes new: x3, 4 is now number 3 \(was 4\), 5 is now number 4 "
        r"\(was 5\), 6 is now number 5 \(was 6\) and 3 more; .* with --data-changed$"
    )


def reorder(photos):  # 3 and 4 change places: with other images each, but the same names
    (photos / "3").rename(photos / "x")
    (photos / "4").rename(photos / "3")
    (photos / "x").rename(photos / "4")
    return r"50 of 250 images are gone \(3/75.png first\); .* with --data-changed$"


def replace(photos):
    Image.effect_noise((8, 8), 50).save(photos / "7" / "175.png")
    return r"1 of 250 images have another size \(7/175.png first\); .* with --data-changed$"


def replace_by_equal_size(photos):
    file = photos / "7" / "175.png"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return r"1 of 250 images that were looked at hold something else \(7/175.png first\); "


@pytest.mark.parametrize("change", [rename, reorder, replace, replace_by_equal_size])
def test_resume_refuses_changed_data_unless_told(photos, trained, change):
    message, before = change(photos), digest(trained)
    with pytest.raises(ValueError, match="not the data this run was trained on: " + message):
        resume(photos, trained)
    assert digest(trained) == before
    resume(photos, trained, data_changed=True)
    assert (trained / "state-residual.safetensors").exists()
    resume(photos, trained)  # what was accepted is what the run knows


def test_a_list_of_contents_leads_to_no_other_file(photos, trained):
    """What is not among the images is not read: a pipe would not end."""
    (trained / "contents.json").write_text('{"/dev/zero": "x"}')
    with pytest.raises(ValueError, match=r"1 of 1 images that were looked at hold something else"):
        resume(photos, trained)
    (trained / "contents.json").write_text('{"a": 1}')
    with pytest.raises(
        ValueError,
        match=r"contents.json: the digest of 'a' must be a string, got.*"
        r"; remove it, and images are compared by their names and sizes$",
    ):
        resume(photos, trained)


def test_resume_takes_new_images_and_says_so(photos, trained, capsys):
    Image.new("L", (8, 8)).save(photos / "7" / "new.png")
    resume(photos, trained)
    assert capsys.readouterr().err == (
        f"{trained}: resuming with other files, 251 images (were 250)\n"
    )
    assert "7/new.png" in read_files(trained)


def test_the_run_keeps_classes_and_fingerprint(photos, trained):
    run, files = read_run(trained), read_files(trained)
    assert run.class_names == tuple("0123456789")
    assert len(files) == 250 and run.fingerprint == fingerprint(files) != ""
    assert files["3/80.png"] == (photos / "3" / "80.png").stat().st_size
    assert fingerprint(dict(reversed(files.items()))) == run.fingerprint
    assert fingerprint({**files, "3/80.png": 1}) != run.fingerprint
    assert fingerprint({"a\udcff": 1}) != fingerprint({"a\udcfe": 1})


def test_a_run_of_an_earlier_version_resumes(photos, trained):
    values = json.loads((trained / "training.json").read_text())
    del values["class_names"], values["fingerprint"]
    (trained / "training.json").write_text(json.dumps(values))
    (trained / "files.json").unlink()
    resume(photos, trained)
    assert read_run(trained).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "must be a JSON object, got list"), ('{"a": "b"}', "size of 'a' must be a whole")],
)
def test_a_corrupt_list_of_files_is_one_line(photos, trained, content, message):
    rename_one = photos / "0" / "0.png"
    shutil.move(rename_one, rename_one.with_name("x.png"))
    (trained / "files.json").write_text(content)
    remedy = "remove it, and take the data as it is with --data-changed"
    with pytest.raises(ValueError, match=f"files.json: .*{message}.*; {remedy}$"):
        resume(photos, trained)
    (trained / "files.json").unlink()
    with pytest.raises(ValueError, match="names or sizes of its files"):
        resume(photos, trained)


def test_changes_are_told():
    assert changed_classes("ab", "ab") is None
    moved = "a is now number 1 (was 0), b is now number 0 (was 1)"
    assert changed_classes("ab", "ba") == moved
    assert changed_classes("abc", "bac") == moved
    assert changed_classes("ab", "abc") == "classes new: c"
    assert changed_classes(["cat", "dog"], ["dog", "zcat"]) == (
        "classes gone: cat, classes new: zcat, dog is now number 0 (was 1)"
    )
    assert changed_classes([], [str(i) for i in range(12)]).endswith("8, 9 and 2 more")
    assert changed_files({"a": 1}, {"a": 1, "b": 2}) is None
    assert changed_files({"a\udcff": 1, "b": 2}, {"b": 3}) == (
        "1 of 2 images are gone (a� first), 1 of 2 images have another size (b first)"
    )
