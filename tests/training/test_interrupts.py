import multiprocessing
import os
import signal
import subprocess

from PIL import Image

from msf.data import load_data
from msf.training.batches import batches


def test_sigterm_ends_the_workers_when_it_is_the_parents(tmp_path):
    (tmp_path / "class").mkdir()
    for index in range(40):
        Image.new("L", (8, 8)).save(tmp_path / "class" / f"{index}.png")
    data = load_data(str(tmp_path), split="train", image_size=(8, 8), channels=1)
    steps = iter(batches(data, 2, 0, 60, seed=0))
    for _ in range(8):
        next(steps)  # every worker is at work
    workers = multiprocessing.active_children()
    assert workers
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    for _ in range(40):
        next(steps)
    for worker in workers:
        worker.terminate()
        worker.join(10)
    assert not multiprocessing.active_children()


def test_ctrl_c_does_not_end_the_workers(photos):
    data = load_data(str(photos), split="train", image_size=(8, 8), channels=1)
    steps = iter(batches(data, 2, 0, 90, seed=0))
    for _ in range(8):
        next(steps)
    workers = multiprocessing.active_children()
    for worker in workers:
        for _ in range(2):
            os.kill(worker.pid, signal.SIGINT)
    assert workers and len(list(steps)) == 82
