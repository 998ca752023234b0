"""Which states a run keeps, and what becomes of one that is damaged."""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file

from msf import MSF
from msf.training.train import train
from training_runs import MODEL, TRAINING, digest, run, saved_step

KEPT = dataclasses.replace(TRAINING, sample_every=2, keep_last=2)


def trained(out, training=KEPT, **options):
    return train(MODEL, training, "digits", out, stages=["base"], progress=False, **options)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    out = tmp_path_factory.mktemp("kept") / "run"
    trained(out)
    return out


def checkpoints(out):
    return sorted(file.name for file in (out / "checkpoints").iterdir())


def test_the_last_and_every_nth_checkpoint_are_kept(tmp_path, kept):
    assert checkpoints(kept) == ["base-000000006.safetensors"]
    assert saved_step(kept, "base") == 8
    trained(tmp_path, dataclasses.replace(KEPT, keep_last=3, keep_every=2))
    assert checkpoints(tmp_path) == [f"base-{step:09d}.safetensors" for step in (2, 4, 6)]
    run(tmp_path / "one", stages=["base"])  # keep_last=1
    assert checkpoints(tmp_path / "one") == []


def cut(data):
    return data[:-100]


def flip_a_bit(data):
    return data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]


@pytest.mark.parametrize("damage", [cut, flip_a_bit])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(kept, tmp_path, damage, capsys):
    out = shutil.copytree(kept, tmp_path / "run")
    state = out / "state-base.safetensors"
    state.write_bytes(damage(state.read_bytes()))
    trained(out, resume=True)
    said = capsys.readouterr().err
    assert said.startswith(f"{state}: ") and "\n" not in said.strip()
    assert f"continuing from {out / 'checkpoints' / 'base-000000006.safetensors'}" in said
    assert (out / "state-base.safetensors.damaged").exists()
    assert digest(out) == digest(kept)


def test_a_bit_flipped_in_the_only_checkpoint_is_one_line(tmp_path):
    run(tmp_path, stages=["base"])
    state = tmp_path / "state-base.safetensors"
    state.write_bytes(flip_a_bit(state.read_bytes()))
    with pytest.raises(
        ValueError, match=f"{state}: damaged, its contents do not have the checksum"
    ):
        run(tmp_path, resume=True)


def test_a_lost_newest_state_is_continued_from_the_one_before(kept, tmp_path, capsys):
    out = shutil.copytree(kept, tmp_path / "run")
    state = out / "state-base.safetensors"
    state.unlink()
    trained(out, resume=True)
    earlier = out / "checkpoints" / "base-000000006.safetensors"
    assert capsys.readouterr().err == f"{state}: is missing; continuing from {earlier}\n"
    assert digest(out) == digest(kept)


def test_several_averages_are_models_of_their_own(kept, tmp_path):
    training = dataclasses.replace(KEPT, extra_ema_decays=(0.0, 0.5))
    trained(tmp_path, training)
    state = load_file(tmp_path / "state-base.safetensors")
    for name, prefix in {"ema-0.0": "weights.", "ema-0.5": "ema-0.5.", ".": "ema."}.items():
        model = MSF.from_pretrained(tmp_path / name)
        for key, weight in model.stages[0].state_dict().items():
            assert torch.equal(weight, state[prefix + key]), (name, key)
    shutil.rmtree(tmp_path / "ema-0.5")
    stopped = dataclasses.replace(training, steps=(10, 6))
    trained(tmp_path, stopped, resume=True)
    assert MSF.from_pretrained(tmp_path / "ema-0.5")


def test_of_other_stages_a_new_average_has_the_one_that_is_kept(tmp_path):
    for stage, decays in (("base", (0.0,)), ("residual", (0.0, 0.5))):
        training = dataclasses.replace(TRAINING, extra_ema_decays=decays)
        options = {"stages": [stage], "resume": True, "progress": False}
        train(MODEL, training, "digits", tmp_path, **options)
    new, kept, other = (
        MSF.from_pretrained(tmp_path / name).stages[0].output.weight
        for name in ("ema-0.5", ".", "ema-0.0")
    )
    assert torch.equal(new, kept) and not torch.equal(new, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "tp"}, r"parallel must be one of \('ddp', 'fsdp'\), got 'tp'$"),
        ({"checkpointing": "half"}, "checkpointing must be one of"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0$"),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0$"),
        ({"keep_every": -1}, "keep_every must not be negative, got -1$"),
        ({"spike": -1.0}, "spike must not be negative, got -1.0$"),
        ({"precision": "pure-bf16"}, 'precision "pure-bf16" needs parallel "fsdp"'),
        ({"extra_ema_decays": (0.9999,)}, "extra_ema_decays must be different numbers"),
        ({"extra_ema_decays": (1.0,)}, "extra_ema_decays must be different numbers"),
    ],
)
def test_bad_settings_of_large_training(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **changes)


def test_a_batch_that_processes_cannot_share_is_one_line(tmp_path):
    training = dataclasses.replace(TRAINING, accumulation=3)
    with pytest.raises(ValueError, match="batch_size must be a multiple of 3, 1 processes times"):
        trained(tmp_path, training)
