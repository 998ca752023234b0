"""Models of the Hugging Face Hub, from a cache on this machine."""

import sys

import pytest
import torch
from huggingface_hub import constants

from models import tiny_model
from msf import MSF

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out: other weights at each revision of one model."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "hub" / "models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate(COMMITS.items()):
        tiny_model(seed=seed).save_pretrained(model / "snapshots" / commit)
        (model / "refs" / revision).write_text(commit)
    return tmp_path


def is_of_seed(model, seed):
    expected = tiny_model(seed=seed).state_dict()
    return all(torch.equal(x, expected[name]) for name, x in model.state_dict().items())


def test_a_model_of_the_hub_is_read_at_its_revision(cache):
    assert is_of_seed(MSF.from_pretrained("someone/tiny"), 0)
    assert is_of_seed(MSF.from_pretrained("someone/tiny", revision="v1"), 1)


def test_a_folder_of_that_name_wins(cache):
    tiny_model(seed=7).save_pretrained(cache / "someone" / "tiny")
    assert is_of_seed(MSF.from_pretrained("someone/tiny"), 7)
    with pytest.raises(ValueError, match="revision is for models of the Hub, this is a folder"):
        MSF.from_pretrained("someone/tiny", revision="v1")


def test_models_that_are_nowhere_are_refused_in_one_line(cache):
    for name, revision in (("someone/else", None), ("someone/tiny", "v2")):
        with pytest.raises(ValueError, match=f"{name}: no such folder, nor a model of") as told:
            MSF.from_pretrained(name, revision=revision)
        assert "\n" not in str(told.value)


def test_paths_are_never_looked_for_on_the_hub(cache):
    with pytest.raises(ValueError, match=r"no such folder; expected a directory made by"):
        MSF.from_pretrained(cache / "someone" / "tiny")


def test_without_huggingface_hub_it_says_what_is_missing(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="a model of the Hub needs huggingface_hub"):
        MSF.from_pretrained("someone/tiny")
