"""The kinds of bad input that `benchmarks.hostile` gives to the command."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from msf.data.splits import split_of

from . import hostile_changes as to
from .hostile_changes import Change
from .reliability import STAGE


@dataclass(frozen=True)
class Kind:
    """A Kind is one sort of bad input.

    Args:
        sort: of input that users hand over.
        command: the words of `msf`; {here} is a folder with a trained run, photos and a config.
        where: the file in it that ``change`` spoils.
        says: a part of the line that the command must print.
        status: how the command must end; 0 where it skips or mends what is bad.
    """

    sort: str
    command: str
    where: str
    name: str
    change: Change
    says: str
    status: int = 2


INSPECT, EVALUATE = "inspect {here}/run", "evaluate {here}/run"
SAMPLE, FACTORIZE = "sample {here}/run --out {here}/out.png", "factorize {here}/x --out {here}/out"
SAMPLE_FOLDER = "sample {here}/run --overwrite --out {here}/out"
FLOPS = "flops --config {here}/config.json"
TRAIN = "train --config {here}/config.json --precision fp32 --quiet --data "
DIGITS, RESUME = TRAIN + "digits --out {here}/out", TRAIN + "digits --resume --out {here}/run"
OTHER_FOLDER = TRAIN + "digits --resume --out {here}/photos"
PHOTOS = TRAIN + "{here}/photos --num-classes 0 --steps 2 --out {here}/out"

MODEL, STATE = "run/model.safetensors", "run/state-base.safetensors"
RUN, RUN_CONFIG, METRICS = "run/training.json", "run/config.json", "run/metrics.jsonl"
LOGS = "run/tensorboard/base"
# Of a split that training reads whole, to be met for certain.
PHOTO = next(f"photos/{i}.png" for i in range(99) if split_of(f"{i}.png") == "train")

UNREADABLE, NO_STATE = "not a readable safetensors file", "not a readable training state"
NO_MODEL, NO_JSON, NO_IMAGE = "no model.safetensors here", "not valid JSON", "not a readable image"
NO_DATA, NO_CLASS = "nor an existing folder", "has no subfolders; make one a class"
SKIPPED = "skipped 1 of 120 images, as they cannot be read: photos/"
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
NAN_LINE = (
    b'{"stage": "base", "step": 1, "loss": NaN, "learning_rate": 1, "images_per_second": 1}\n'
)
HUGE = {**STAGE, "width": 8192, "depth": 400}

# By sort, command and spoiled file.
Row = tuple[Change, str] | tuple[Change, str, int]  # a Kind's last fields
TABLE: dict[str, dict[tuple[str, str], dict[str, Row]]] = {
    "checkpoint": {
        (INSPECT, MODEL): {
            "0 bytes": (to.empty_file, UNREADABLE),
            "random bytes": (to.noise, UNREADABLE),
            "header longer than the file": (to.header(50_000), UNREADABLE),
            "header of 2^63 bytes": (to.header(2**63), UNREADABLE),
            "header that is a list": (to.header(2, b"[]"), UNREADABLE),
            "overlapping tensors": (to.overlapping, UNREADABLE),
            "wrong shape": (to.every(lambda x: x[1:], "output.bias"), "does not fit config.json"),
            "missing tensor": (to.without("pyramid.std"), 'Missing key(s) in state_dict: "pyramid'),
            "extra tensor": (
                to.tensors(lambda held: held.update(extra=torch.zeros(1))),
                'Unexpected key(s) in state_dict: "extra"',
            ),
            "whole numbers": (to.every(Tensor.int), "or float64, got torch.int32"),
            "deviation of 0": (to.every(torch.zeros_like, "std"), "pyramid.std must be positive"),
            "folder": (to.folder, NO_MODEL),
            "link to itself": (to.loop, "model.safetensors is missing"),
            "unreadable": (to.forbidden, "Permission denied"),
            "pickle": (to.pickled, UNREADABLE),
            "torch.save's zip": (to.torch_zip, UNREADABLE),
            "npy of objects": (to.npy, UNREADABLE),
        },
        (SAMPLE, MODEL): {
            "cut": (to.cut, UNREADABLE),
            "NaN weights": (to.every(to.nan, "output.weight"), "must be finite, but holds NaN"),
            "pipe": (to.pipe, NO_MODEL),
        },
        (INSPECT, RUN_CONFIG): {
            "another model's": (to.setting("num_classes", value=9), "does not fit config.json"),
            "far smaller than its model": (
                to.setting("stages", value=[HUGE, HUGE]),
                "does not fit config.json",
            ),
        },
        (RESUME, STATE): {
            "state: cut": (to.cut, NO_STATE, 0),
            "state: pickle": (to.pickled, NO_STATE, 0),
            "state: folder": (to.folder, "is no file", 0),
            "state: pipe": (to.pipe, "is no file", 0),
            "state: NaN weights": (to.every(to.nan, "weights."), "must be finite, but holds", 0),
            "state: NaN in the optimizer": (to.every(to.nan, "exp_avg."), "must be finite", 0),
            "state: whole numbers": (to.every(Tensor.int), "or float64, got torch.int32", 0),
            "state: no optimizer": (to.without("optimizer."), "must have shape []"),
            "state: step 999": (to.tensors(dict, "999"), "its step must be from 1 to 30, got 999"),
            "state: step of 5,000 digits": (to.tensors(dict, "9" * 5000), NO_STATE, 0),
        },
    },
    "configuration": {
        (FLOPS, "config.json"): {
            "no JSON": (to.content(b"{width: 3"), NO_JSON),
            "0 bytes": (to.empty_file, NO_JSON),
            "list": (to.content(b"[]"), "must be a JSON object, got list"),
            "10,000 brackets": (to.content(b"[" * 10_000 + b"]" * 10_000), NO_JSON),
            "a key twice": (
                to.replaced('"channels": 1', '"channels": 3, "channels": 1'),
                "key 'channels' is there more than once",
            ),
            "NaN": (to.setting("model", "time_std", value=math.nan), "must be finite, got nan"),
            "infinity": (to.setting("training", "clip", value=math.inf), "must be finite, got inf"),
            "number in quotes": (
                to.setting("model", "channels", value="1"),
                "whole number, got '1'",
            ),
            "null": (
                to.setting("model", "stages", value=None),
                "must be a list or tuple, got None",
            ),
            "negative size": (to.setting("model", "image_size", value=[-8, 8]), "both positive"),
            "width of 0": (to.setting("model", "stages", 0, "width", value=0), "must be positive"),
            "huge width": (
                to.setting("model", "stages", 0, "width", value=10**12),
                "width must be at most 65536",
            ),
            "5,000 digits": (to.replaced('channels": 1', 'channels": ' + "1" * 5000), NO_JSON),
            "unknown key": (to.setting("model", "size", value=8), "model: unknown keys size;"),
            "unknown field of a stage": (
                to.setting("model", "stages", 0, "dropout", value=1),
                "model.stages[0]: unknown keys dropout; known are width",
            ),
            "control characters in a key": (
                to.setting("model", "a\x1b[2J\nb", value=1),
                "unknown keys a\ufffd[2J\ufffdb; known are",
            ),
            "UTF-16 that is cut": (to.content('{"\xe9": 1}'.encode("utf-16")[:-1]), NO_JSON),
            "NUL bytes": (to.added(before=bytes(5)), NO_JSON),
            "no model": (to.content(b"{}"), 'must be {"model": {...}, "training": {...}}'),
            "folder": (to.folder, "Is a directory"),
            "link to itself": (to.loop, "Too many levels of symbolic links"),
            "pickle": (to.pickled, NO_JSON),
        },
        ("flops --config {here}/a\nb.json", "config.json"): {
            "line break in its name": (to.leave, "a\ufffdb.json: No such file"),
        },
        (DIGITS, "config.json"): {
            "steps without end": (
                to.setting("training", "steps", value=[10**18, 1]),
                "steps must be positive numbers of at most 1000000000",
            ),
        },
        ("flops {here}/run", RUN_CONFIG): {"the run's: pipe": (to.pipe, "is no file")},
    },
    "image": {
        (FACTORIZE, "x"): {
            "cut PNG": (to.cut_picture("PNG"), NO_IMAGE),
            "cut JPEG": (to.cut_picture("JPEG"), NO_IMAGE),
            "0 bytes": (to.empty_file, NO_IMAGE),
            "text": (to.content(b"a horse"), NO_IMAGE),
            "PostScript": (to.content(POSTSCRIPT), "(cannot identify image file)"),
            "60,000 x 60,000 pixels in 70 bytes": (to.png(60_000, 60_000), NO_IMAGE),
            "10,000 x 10,000 pixels in 70 bytes": (to.png(10_000, 10_000), NO_IMAGE),
            "1 pixel": (to.picture(1, 1), "is not divisible by 2"),
            "odd sides": (to.picture(9, 8), "crop it to 8x8"),
            "16 bits": (to.picture(8, 8, "I;16"), "only 8-bit images are, not mode I;16"),
            "pipe": (to.pipe, "is no file"),
            "link to itself": (to.loop, "no such file"),
            "folder": (to.folder, "is a folder; give an image file"),
            "pickle": (to.pickled, NO_IMAGE),
            "npz of objects": (to.npz, NO_IMAGE),
        },
        ("factorize {here}/a\nb.png", "x"): {
            "line break in its name": (to.leave, "b.png: no such file"),
        },
        (PHOTOS, PHOTO): {
            "one cut of many": (to.cut, SKIPPED, 0),
            "one of 10,000 x 10,000 pixels of many": (to.png(10_000, 10_000), SKIPPED, 0),
            "one of 0 bytes of many": (to.empty_file, SKIPPED, 0),
            "one pickle of many": (to.pickled, SKIPPED, 0),
        },
        (PHOTOS, "photos"): {
            "many: all random bytes": (to.all_in(to.noise), "cannot read"),
            "many: all of 16 bits": (to.all_in(to.picture(8, 8, "I;16")), "only 8-bit images are"),
            "empty folder": (to.folder, NO_CLASS),
            "pipe alone in a folder": (to.only("x.png", to.pipe), NO_CLASS),
            "link to itself alone": (to.only("x.png", to.loop), "1 link that leads nowhere"),
            "file in place of a folder": (to.empty_file, NO_DATA),
        },
        (PHOTOS, "photos/a.png"): {
            "many: a folder named a.png": (to.folder, "a.png holds no image"),
        },
    },
    "run": {
        (EVALUATE, RUN): {
            "training.json: list": (to.content(b"[]"), "must be a JSON object, got list"),
            "training.json: pickle": (to.pickled, NO_JSON),
            "training.json: pipe": (to.pipe, "is no file"),
            "training.json: folder": (to.folder, "is no file"),
            "training.json: NUL in a path": (to.setting("data", value="a\0b"), NO_DATA),
            "training.json: path out of it": (
                to.setting("data", value="../" * 20 + "etc/passwd"),
                NO_DATA,
            ),
            "training.json: names of numbers": (
                to.setting("class_names", value=[1] * 10),
                "run.class_names[0] must be a string, got 1",
            ),
        },
        (SAMPLE + " --labels b", RUN): {
            "training.json: 3 names of 10 classes": (
                to.setting("class_names", value=["a", "b", "c"]),
                "class_names must be 10, one a class, got 3",
            ),
        },
        (RESUME, METRICS): {
            "metrics.jsonl: garbage at its end": (
                to.added(after=b"\xff\0"),
                "dropped 1 of its",
                0,
            ),
            "metrics.jsonl: garbage at its start": (
                to.added(before=b"\xff\0\n"),
                "dropped 1 of its",
                0,
            ),
            "metrics.jsonl: NaN": (
                to.added(before=NAN_LINE),
                "dropped 1 of its",
                0,
            ),
            "metrics.jsonl: folder": (to.folder, "is no file"),
            "metrics.jsonl: pipe": (to.pipe, "is no file"),
        },
        (RESUME, MODEL): {"lost model": (to.removed, "rebuilt model.safetensors from", 0)},
        (SAMPLE + " --labels ../../etc", RUN): {
            "label that is a path": (to.leave, "--labels: no class is named or numbered"),
        },
        (SAMPLE + " --labels " + "1" * 5000, RUN): {
            "label of 5,000 digits": (to.leave, "--labels: no class is named or numbered"),
        },
    },
    "output": {
        (SAMPLE, "out.png"): {"folder for a file": (to.folder, "is a folder; --out must name")},
        (SAMPLE_FOLDER, "out"): {
            "file for a folder": (to.empty_file, "is a file; --out must name a folder"),
            "more than images": (to.only("a.txt", to.empty_file), "holds other files too (a.txt)"),
        },
        ("sample {here}/run --out {here}/config.json/x.png", "x"): {
            "below a file": (to.leave, "is a file; --out must be in a folder"),
        },
        ("sample {here}/run --out {here}/photos/x.png", "photos"): {
            "read-only folder": (to.forbidden, "may not be written to"),
        },
        ("sample {here}/run --out /proc/msf/x.png", "x"): {
            "where nobody can write": (to.leave, "/proc/msf: No such file or directory"),
        },
        (DIGITS, "out"): {
            "file for a run": (to.empty_file, "is a file; --out must be a folder"),
            "link to itself": (to.loop, "Too many levels of symbolic links"),
        },
        (OTHER_FOLDER, "photos"): {"run of another kind": (to.leave, "holds files but no run")},
        (RESUME, LOGS): {
            "run that another process trains": (to.locked, "another process is training base here"),
            "file for the logs": (to.empty_file, "tensorboard/base: File exists"),
        },
        (RESUME, "config.json"): {
            "run of another model": (
                to.setting("model", "time_std", value=2.0),
                "differs in model.time_std; resume with time_std 1.0 (not 2.0)",
            ),
        },
    },
}

KINDS = [
    Kind(sort, command, where, name, *row)
    for sort, groups in TABLE.items()
    for (command, where), rows in groups.items()
    for name, row in rows.items()
]
