"""Large outputs in parts."""

import numpy as np
import pytest

from msf.parts import Damaged, Parts, read_arrays, write_npz
from msf.training.ranks import ONE_PROCESS

SETTINGS = {"--seed": 3, "--steps": [4, 2]}


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (10, 2, 3, 3), dtype=np.uint8)


def test_an_npz_file_is_byte_for_byte_that_of_numpy(tmp_path, pixels):
    labels = np.arange(10)
    np.savez(tmp_path / "numpy.npz", pixels, labels)
    rows = iter([pixels[:4], pixels[4:9], pixels[9:]])
    write_npz(tmp_path / "ours.npz", {"arr_0": (10, rows), "arr_1": (10, [labels])})
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


def test_the_order_of_an_arrays_memory_is_not_seen(tmp_path, pixels):
    write_npz(tmp_path / "x.npz", {"x": (10, [np.asfortranarray(pixels)])})
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["x"], pixels)


def fill(parts, pixels, numbers):
    for number in numbers:
        parts.add(number, {"x": pixels[4 * number : 4 * number + 4]})


class Second:
    """The second process of a job, as far as its parts know it."""

    def each(self, function):
        return function()

    def first(self, function):
        return None


def test_the_last_process_to_end_assembles(tmp_path, pixels):
    def write(made):
        whole.append(np.concatenate([part["x"] for part in made]))

    whole = []
    a, b = (Parts(tmp_path / "x.npz", SETTINGS, 3) for _ in range(2))
    with a.claimed(ONE_PROCESS):
        with b.claimed(Second()):
            assert a.missing(range(0, 3, 2)) == [0, 2] and b.missing(range(1, 3, 2)) == [1]
            fill(a, pixels, [0, 2])
            assert not b.assemble(write) and a.there() == 2
            fill(b, pixels, [1])
        assert a.assemble(write) and not a.assemble(write)
    np.testing.assert_array_equal(whole, [pixels])
    assert not list(tmp_path.iterdir())


def test_what_is_whole_has_no_half_of_its_parts_left(tmp_path, pixels, monkeypatch):
    """Of which a Ctrl-C while they go would say that the same command continues them."""

    def interrupted(folder, **_):
        if folder.exists() and any(folder.iterdir()):
            raise KeyboardInterrupt

    parts = Parts(tmp_path / "x.npz", SETTINGS, 3)
    with parts.claimed(ONE_PROCESS):
        fill(parts, pixels, range(3))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("shutil.rmtree", interrupted)
            parts.assemble(list)
    assert parts.there() == 0 and not parts.folder.exists()


def test_another_job_is_refused_while_any_process_is_at_work(tmp_path, pixels):
    a, b, other = (Parts(tmp_path / "x.npz", SETTINGS, 3) for _ in range(3))

    def refused():
        message = r"x\.npz\.parts: another job is making these; wait for it, or choose another"
        with pytest.raises(ValueError, match=message), other.claimed(ONE_PROCESS):
            pass
        return other.folder.exists()

    with b.claimed(Second()):
        with a.claimed(Second()):
            assert refused()
        assert refused()
        fill(b, pixels, [1])
    with other.claimed(ONE_PROCESS):
        assert other.missing(range(3)) == [0, 2]


def test_no_byte_changes_unnoticed(tmp_path, pixels):
    parts = Parts(tmp_path / "x.npz", SETTINGS, 1)
    fill(parts, pixels, [0])
    file = tmp_path / "x.npz.parts" / "000000.npz"
    whole = file.read_bytes()
    noticed = 0
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            (made,) = map(parts._read, [0])
        except Damaged:
            noticed += 1
        else:  # a date, or another field that says nothing of the arrays
            np.testing.assert_array_equal(made["x"], pixels[:4])
    assert noticed > len(whole) / 2
    for cut in range(0, len(whole), 7):
        file.write_bytes(whole[:cut])
        with pytest.raises(Damaged, match=r"000000.npz: is damaged \("):
            parts._read(0)


def test_damaged_parts_are_named_and_made_anew(tmp_path, pixels, capsys):
    parts = Parts(tmp_path / "x.npz", SETTINGS, 3)
    fill(parts, pixels, [0, 1])
    file = tmp_path / "x.npz.parts" / "000001.npz"
    file.write_bytes(file.read_bytes()[:-200])
    assert parts.missing(range(3)) == [1, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{file}: is damaged (") and line.endswith("; making it anew")
    fill(parts, pixels, [2])
    with pytest.raises(ValueError, match=r"000001\.npz: is damaged"), parts.claimed(ONE_PROCESS):
        parts.assemble(list)
    assert parts.there() == 3  # nothing is lost


def test_parts_of_other_settings_are_refused(tmp_path, pixels):
    fill(Parts(tmp_path / "x.npz", SETTINGS, 3), pixels, [0])
    other = Parts(tmp_path / "x.npz", {"--seed": 4, "--steps": (4, 2), "model": "a"}, 3)
    message = r"x.npz.parts: was begun with another --seed, model; repeat that command, remove the"
    with pytest.raises(ValueError, match=message):
        other.missing(range(3))


def test_an_empty_folder_goes_and_another_stays(tmp_path, pixels):
    parts = Parts(tmp_path / "x", SETTINGS, 2)
    with parts.claimed(ONE_PROCESS):
        assert parts.folder.exists()
    assert not parts.folder.exists()
    with parts.claimed(ONE_PROCESS):
        fill(parts, pixels, [0])
    assert read_arrays((parts.folder / "000000.npz").read_bytes())["x"].shape == (4, 2, 3, 3)


def test_what_is_no_part_is_never_removed(tmp_path, pixels):
    parts = Parts(tmp_path / "x", SETTINGS, 2)
    fill(parts, pixels, [0, 1])
    (parts.folder / "000002.npz").write_bytes(b"of a larger output")
    with pytest.raises(ValueError, match=r"x.parts: holds 000002.npz, which is no part of this;"):
        parts.missing(range(2))
