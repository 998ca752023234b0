"""Names in little memory, and what a worker has of a large folder."""

import gc
import multiprocessing
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

from msf.data.folder import ImageFolder
from msf.data.names import Names

IMAGES = 200_000
NAME = 17  # bytes of each name


def test_names_are_a_sequence():
    given = ["a/1.png", "", "b/ä.png", "b/\udcff.png"]
    names = Names(given)
    assert list(names) == given and len(names) == 4
    assert names[-1] == given[-1] and names[1:3] == given[1:3] and "b/ä.png" in names
    assert list(Names([])) == []
    for index in (4, -5):
        with pytest.raises(IndexError):
            names[index]


@pytest.fixture
def large(monkeypatch):
    """A folder of many images, none of which is there."""
    files = {f"a/{index:010}.jpeg": 1 for index in range(IMAGES)}
    assert {len(name) for name in files} == {NAME}
    monkeypatch.setattr("msf.data.folder.list_images", lambda _: (["a"], files, 0))
    return ImageFolder(Path("/none"), "train", (8, 8), 3)


def test_little_is_sent_to_a_worker(large):
    assert len(large.files) == large.total == IMAGES and len(large) > 0.78 * IMAGES
    sent = pickle.dumps(large)
    # The name, its end and the label, of 8 bytes each.
    assert len(sent) < (NAME + 16) * len(large) + 10_000
    received = pickle.loads(sent)
    assert not received.files and received.names[7] == large.names[7]
    assert torch.equal(received.labels, large.labels)


def private_memory():
    """The bytes that this process has for itself alone."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Private_Dirty: +(\d+) kB", text)[1]) * 1024


def touch_all(data, sent):
    gc.collect()  # which writes to the pages of all objects
    memory = []
    for indices in (range(100), range(len(data))):  # the first are what any worker's start costs
        for index in indices:
            data.names[index], data.labels[index]
        memory.append(private_memory())
    sent.send(memory[1] - memory[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux tells it")
def test_a_worker_has_the_names_no_second_time(large):
    receives, sends = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=touch_all, args=(large, sends))
    process.start()
    grown = receives.recv()
    process.join()
    # A list of as many strings takes 13 MB, one of paths more.
    assert process.exitcode == 0 and grown < 2 * 2**20
