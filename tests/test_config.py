import dataclasses
import json
import math
import re
from typing import get_type_hints

import numpy as np
import pytest

from msf import PRESETS, MSFConfig, SamplingConfig, StageConfig, TrainingConfig, preset

TINY = StageConfig(width=32, depth=2, heads=2, patch=1)


def config(**changes):
    values = {
        "image_size": (8, 12),
        "channels": 3,
        "num_classes": 5,
        "stages": (TINY, TINY),
        "steps": (4, 2),
    }
    return MSFConfig(**{**values, **changes})


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    model = preset(name).model
    assert MSFConfig.from_json(model.to_json()) == model


@pytest.mark.parametrize("qk_norm", [True, False, "layer"])
def test_json_says_which_qk_norm(qk_norm):
    built = config(qk_norm=qk_norm)
    assert MSFConfig.from_json(built.to_json()).qk_norm == built.qk_norm == qk_norm


def test_a_key_without_a_name_is_unknown():
    with pytest.raises(ValueError, match="MSFConfig: unknown keys ; known are image_size"):
        MSFConfig.from_dict({**config().to_dict(), "": 1})


def test_stage_names_and_sizes():
    three = config(stages=(TINY,) * 3, steps=(1, 1, 1))
    assert config().stage_names == ("base", "residual")
    assert three.stage_names == ("base", "residual_1", "residual_2")
    assert [three.stage_size(i) for i in range(3)] == [(2, 3), (4, 6), (8, 12)]
    assert config(stages=(TINY,), steps=(1,)).stage_names == ("base",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": (), "steps": ()}, "stages is empty"),
        ({"steps": (4,)}, "steps must be 2 positive numbers"),
        ({"steps": (4, 0)}, "steps must be 2 positive numbers"),
        ({"image_size": (8, 9)}, r"base: image sides must be multiples of 2 .*\(8, 9\)"),
        ({"image_size": (0, 8)}, "image_size must be"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"upsample": "bicubic"}, "upsample must be one of"),
        ({"positions": "learned"}, "positions must be one of"),
        ({"time_std": 0.0}, "time_std must be positive"),
        ({"time_range": (1, 1)}, "time_range must be from one time to another, got "),
        ({"time_range": (-3e38, 3e38)}, r"time_range must be no wider than 3.4e\+38, got "),
        ({"norm": "batch"}, r"norm must be one of \('layer', 'rms'\), got 'batch'"),
        ({"mlp": "relu"}, r"mlp must be one of \('gelu', 'swiglu'\), got 'relu'"),
        ({"label_dropout": 1.5}, r"label_dropout must be in \[0, 1\]"),
        ({"label_dropout": 1e-300}, r"label_dropout must be 0, 1, or from 2\*\*-24 .* got 1e-300"),
        ({"label_dropout": 1 - 1e-9}, r"label_dropout must be 0, 1, or from 2\*\*-24"),
        ({"stages": (TINY, dataclasses.replace(TINY, heads=3))}, "residual: width / heads"),
        ({"stages": (TINY, dataclasses.replace(TINY, patch=3))}, "residual: image sides must be"),
        ({"steps": (4, 10**18)}, "steps must be .* of at most 100000, got"),
        ({"channels": 10**9}, "channels must be at least 1 and at most 65536"),
        ({"num_classes": 10**9}, "num_classes must be at least 0 and at most 1048576"),
        ({"image_size": (2**20, 8)}, "image_size must be .* at most 65536"),
        (
            {"image_size": (2**13, 2**13 + 8)},
            r"MSFConfig: an image must have at most 67108864 pixels, got \(8192, 8200\)",
        ),
        ({"stages": (TINY,) * 18, "steps": (1,) * 18}, "stages must be at most 17, got 18"),
        ({"stages": (dataclasses.replace(TINY, depth=10**7),) * 2}, "depth must be at most 1000"),
        ({"stages": (dataclasses.replace(TINY, width=2**20),) * 2}, "width must be at most 65536"),
        (
            {"stages": (TINY, dataclasses.replace(TINY, mlp_ratio=1e-9))},
            "residual: width [*] mlp_ratio must be from 1 to 262144, got 32 [*] 1e-09",
        ),
        (
            {"stages": (TINY, dataclasses.replace(TINY, mlp_ratio=1e30))},
            "residual: width [*] mlp_ratio must be from 1 to",
        ),
        (
            {"stages": (TINY, dataclasses.replace(TINY, depth=0))},
            "residual: depth must be positive, got 0$",
        ),
    ],
)
def test_bad_configuration_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": (3.0, 3)}, r"MSFConfig.steps\[0\] must be a whole number, got 3.0"),
        ({"channels": -(10**5000)}, r"channels must be below 2\*\*64 in size, .* of 16610 bits$"),
        ({"channels": True}, "MSFConfig.channels must be a whole number, got True"),
        ({"channels": "1"}, "MSFConfig.channels must be a whole number, got '1'"),
        ({"image_size": (16.0, 24.0)}, r"image_size\[0\] must be a whole number, got 16.0"),
        ({"image_size": 16}, "MSFConfig.image_size must be a list or tuple, got 16"),
        ({"qk_norm": 1}, "MSFConfig.qk_norm must be true or false, got 1"),
        ({"steps": 3}, "MSFConfig.steps must be a list or tuple, got 3"),
        ({"stages": None}, "MSFConfig.stages must be a list or tuple, got None"),
        ({"max_prior_noise": math.nan}, "MSFConfig.max_prior_noise must be finite, got nan"),
        ({"time_std": math.inf}, "MSFConfig.time_std must be finite, got inf"),
        (
            {"time_std": 1e300},
            r"time_std must be at most 3.4e\+38 in size, .*, got 1e\+300",
        ),
        ({"time_range": (0, -1e39)}, r"time_range\[1\] must be at most 3.4e\+38 .*, got -1e\+39"),
        ({"time_std": np.ones(2)}, "MSFConfig.time_std must be a number, got array"),
    ],
)
def test_what_json_could_not_say_is_not_built(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32.0}, "StageConfig.width must be a whole number, got 32.0"),
        ({"heads": 10**400}, r"StageConfig.heads must be below 2\*\*64 in size, got .* 1329 bits"),
        ({"mlp_ratio": math.nan}, "StageConfig.mlp_ratio must be finite, got nan"),
    ],
)
def test_a_stage_checks_its_kinds_too(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
WRONG = {
    bool: (1, 0, 1.0, "yes", None),
    int: (True, 1.0, "1", None),
    float: (True, "1", None, 1e39, -1e300),
    str: (1, True, None),
}
CONFIGURATIONS = (config(), TINY, TrainingConfig((1,)), SamplingConfig())
FIELDS = [
    pytest.param(settings, name, hint, id=f"{type(settings).__name__}.{name}")
    for settings in CONFIGURATIONS
    for name, hint in get_type_hints(type(settings)).items()
    if hint in KINDS
]


@pytest.mark.parametrize(("settings", "name", "kind"), FIELDS)
def test_every_field_is_of_its_kind(settings, name, kind):
    for wrong in WRONG[kind]:
        right = KINDS[kind]
        if kind is float and isinstance(wrong, float):
            right = "at most 3.4e+38 in size, as in float32"
        with pytest.raises(ValueError) as error:
            dataclasses.replace(settings, **{name: wrong})
        assert str(error.value).endswith(f"{name} must be {right}, got {wrong!r}")


def test_floats_may_be_whole():
    whole = dataclasses.replace(TrainingConfig((1,)), clip=2)
    assert (type(whole.clip), whole.clip) == (float, 2.0)


def test_lists_and_numpy_numbers_become_what_json_gives():
    built = config(image_size=[8, 12], steps=np.array([4, 2]), stages=[TINY, TINY], time_std=1)
    assert built == config() and hash(built) == hash(config())
    assert MSFConfig.from_json(built.to_json()) == built


@pytest.mark.parametrize("text", ["{", b"\xff", "[" * 100_000])
def test_what_is_no_json_is_one_clear_line(text):
    with pytest.raises(ValueError, match="MSFConfig: not valid JSON"):
        MSFConfig.from_json(text)
    with pytest.raises(ValueError, match="MSFConfig: must be a JSON object, got list"):
        MSFConfig.from_json("[1]")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": 1}, "MSFConfig: unknown keys levels; known are image_size, "),
        ({"stages": [{"widht": 3}]}, r"MSFConfig.stages\[0\]: unknown keys widht"),
        ({"stages": [{"width": 16}]}, r"stages\[0\]: keys depth, heads are missing"),
        ({"stages": [{"width": 16.0, "depth": 1, "heads": 1}]}, r"\[0\].width must be a whole num"),
        ({"stages": [None]}, r"stages\[0\] must be an object, got None"),
        ({"channels": 1.0}, "channels must be a whole number, got 1.0"),
        ({"image_size": [8.9, 8]}, r"image_size\[0\] must be a whole number, got 8.9"),
        ({"image_size": [8]}, r"image_size must be a list or tuple of 2, got \[8\]"),
        ({"qk_norm": "no"}, "qk_norm must be true, false or 'layer', got 'no'"),
        ({"upsample": 1}, "upsample must be a string, got 1"),
        ({"label_dropout": "0.1"}, "label_dropout must be a number, got '0.1'"),
        ({"steps": "24"}, "steps must be a list or tuple, got '24'"),
        ({"time_std": math.nan}, "MSFConfig.time_std must be finite, got nan"),
        ({"time_std": 10**400}, r"MSFConfig.time_std must be finite, got 10+\.\.\.0+$"),
        ({"steps": {"4": 2}}, "steps must be a list or tuple, got {'4': 2}"),
    ],
)
def test_bad_values_in_json_are_one_clear_line(changes, message):
    values = {**config().to_dict(), **changes}
    with pytest.raises(ValueError, match=message) as error:
        MSFConfig.from_json(json.dumps(values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [256, 512])
def test_sit_is_offered_as_published_and_as_msf_is_trained(size):
    """arXiv 2401.08740: DiT-XL/2, uniform times, AdamW at 1e-4, batch 256, averages of 0.9999."""
    published, ours = preset(f"sit-xl-{size}"), preset(f"sit-xl-{size}-msf")
    changes = {"times": "logit-normal", "standardize": True, "time_range": (0.0, 1000.0)}
    assert dataclasses.replace(published.model, **changes) == ours.model
    (stage,) = published.model.stages
    assert (stage.width, stage.depth, stage.heads, stage.patch) == (1152, 28, 16, 2)
    assert (published.model.positions, published.model.qk_norm) == ("sincos", False)
    training = published.training
    assert (training.learning_rate, training.batch_size, training.ema_decay) == (1e-4, 256, 0.9999)
    assert (training.warmup, training.clip, training.weight_decay) == (0, 0, 0) and training.flip
    assert ours.training == TrainingConfig((400_000,), flip=True, checkpoint_every=5000)


@pytest.mark.parametrize("name", [["digits"], {}, None])
def test_what_is_no_name_is_no_preset(name):
    with pytest.raises(
        ValueError, match=f"^preset must be one of digits, .*, got {re.escape(repr(name))}$"
    ):
        preset(name)


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match=r"digits.*got 'nope'"):
        preset("nope")
