"""Which images are held out."""

import hashlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from msf import TrainingConfig
from msf.data import HOLDOUT, SPLITS, load_data
from msf.data.splits import hash_of, in_split, shares, split_of

NAMES = [f"class/{index}.png" for index in range(20_000)]
HASHES = torch.tensor(list(map(hash_of, NAMES)))


def test_the_default_splits_are_those_of_earlier_versions():
    for index, name in enumerate(NAMES[:3000]):
        tenth = hashlib.sha256(name.encode()).digest()[0] * 10 // 256
        split = {8: "features", 9: "test"}.get(tenth, "train")
        assert in_split(HASHES[index : index + 1], split, 0.2).item()
    assert TrainingConfig(steps=(1,)).holdout == HOLDOUT == 0.2


@pytest.mark.parametrize("holdout", [0.0, 0.001, 0.05, 0.2, 0.5, 0.9])
def test_every_image_is_in_one_split_of_its_share(holdout):
    splits = [in_split(HASHES, split, holdout) for split in SPLITS]
    assert (sum(split.int() for split in splits) == 1).all()
    for split, share in zip(splits, (1 - holdout, holdout / 2, holdout / 2), strict=True):
        # Five standard deviations; tenths of 25 or 26 bytes are up to 2.4 % off theirs.
        error = 5 * (share * (1 - share) / len(NAMES)) ** 0.5
        assert abs(float(split.double().mean()) - share) <= error + 0.024 * min(share, 1 - share)


def test_a_larger_part_holds_out_what_a_smaller_one_does():
    parts = [~in_split(HASHES, "train", holdout) for holdout in (0.001, 0.01, 0.2, 0.35)]
    for smaller, larger in pairwise(parts):
        assert not (smaller & ~larger).any()


def test_splits_at_their_borders():
    # First bytes 204 and 205 part the tenths 7 and 8, 230 and 231 the tenths 8 and 9.
    hashes = torch.tensor([204 << 24 | 0xFFFFFF, 205 << 24, 230 << 24 | 0xFFFFFF, 231 << 24])
    found = [in_split(hashes, split, 0.2).tolist() for split in SPLITS]
    assert found == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    # Held out is the last half of tenth 9, its last quarter for the test.
    tenth = [250 << 24 | int(part * 2**24) for part in (0.49, 0.51, 0.74, 0.76)]
    found = [in_split(torch.tensor(tenth), split, 0.05).tolist() for split in SPLITS]
    assert found == [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]


def load(photos, split="train", holdout=0.2):
    options = {"image_size": (8, 8), "channels": 1, "holdout": holdout}
    return load_data(str(photos), split=split, **options)


def test_without_a_holdout_all_images_train(photos):
    assert len(load(photos, holdout=0)) == 250
    assert all(split_of(name, 0) == "train" for name in NAMES[:100])
    held = [name for split in SPLITS[1:] for name in load(photos, split, 0.5).names]
    assert all(split_of(name, 0.5) != "train" for name in held) and 90 < len(held) < 160
    for split in SPLITS[1:]:
        with pytest.raises(ValueError, match=rf"nothing of .* held out \(holdout 0\), .*{split}"):
            load(photos, split, 0)


def test_bad_holdouts_are_one_line(photos):
    for holdout in (-0.1, 1, 1.5):
        with pytest.raises(ValueError, match=rf"holdout must be in \[0, 1\), got {holdout}"):
            load(photos, holdout=holdout)
        with pytest.raises(ValueError, match=rf"holdout must be in \[0, 1\), got {holdout}"):
            replace(TrainingConfig(steps=(1,)), holdout=holdout)
    with pytest.raises(
        ValueError, match=r"^data: digits has splits of its own; leave out the hold"
    ):
        load("digits", holdout=0.1)
    with pytest.raises(
        ValueError, match=r"none falls into the test split; the split is 99.9/0.05/"
    ):
        load(photos, "test", 0.001)
    assert shares(0.2) == "80/10/10" and shares(0) == "100/0/0"
