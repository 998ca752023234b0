"""What changes inside an accelerated block is noticed, or runs."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import msf
from numerics import relative_error

from .transformers import GELUMLP, WIDTH, Attention, inputs, make


def hook(module, changed):
    """Let a function of a module's output give another, by a hook."""
    module.register_forward_hook(lambda *args: changed(args[-1]))


def wrap(module, changed):
    """The same by a forward in the place of its class's."""
    forward = module.forward
    module.forward = lambda *args, **options: changed(forward(*args, **options))


class LowRank(nn.Module):
    """What LoRA puts in the place of a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return 2 * self.base(x)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DiT and SiT", "blocks.1.attn.qkv"),
        ("DiT and SiT", "blocks.1.attn.proj"),
        ("diffusers", "dit.transformer_blocks.1.attn1.to_k"),
        ("diffusers", "dit.transformer_blocks.1.attn1.to_out.0"),
    ],
)
def test_a_layer_that_became_more_than_its_weights_is_refused(name, path):
    model, (x, c) = msf.accelerate(make(name)), inputs()
    layer = model.get_submodule(path)
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="one is now a Linear with hooks; call msf"):
        model(x, c)
    hook.remove()
    model(x, c)
    model.set_submodule(path, LowRank(layer))
    with pytest.raises(ValueError, match="one is now a LowRank; call msf"):
        model(x, c)
    msf.restore(model)(x, c)


DROPOUTS = [
    ("DiT and SiT", "blocks.1.attn.attn_drop"),
    ("DiT and SiT", "blocks.1.attn.proj_drop"),
    ("diffusers", "dit.transformer_blocks.1.attn1.to_out.1"),
]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DiT and SiT", "blocks.1.attn"),
        ("DiT and SiT", "blocks.1.norm2"),
        ("DiT and SiT", "final_layer.norm_final"),
        ("diffusers", "dit.transformer_blocks.1.attn1"),
        ("LightningDiT", "feat_rope"),
        *DROPOUTS,
    ],
)
@pytest.mark.parametrize("hooked", [hook, wrap])
def test_what_is_not_called_has_no_hooks(name, path, hooked):
    model, (x, c) = msf.accelerate(make(name)), inputs()
    hooked(model.get_submodule(path), lambda out: out)
    what = {hook: "hooks", wrap: "a forward of its own"}[hooked]
    with pytest.raises(ValueError, match=rf"one is now a \w+ with {what}; call msf"):
        model(x, c)
    msf.restore(model)(x, c)


@pytest.mark.parametrize(("name", "path"), DROPOUTS)
def test_a_dropout_that_came_to_drop_is_refused(name, path):
    model, (x, c) = msf.accelerate(make(name)), inputs()
    model.get_submodule(path).p = 0.5
    with pytest.raises(ValueError, match=r"one is now a Dropout\(p=0.5, inplace=False\); call msf"):
        model(x, c)


class Causal(Attention):
    def forward(self, x):
        return super().forward(x, is_causal=True)


class TwiceTheMLP(GELUMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Processor:
    """What diffusers' set_processor puts in."""


dropping = partial(nn.Dropout, 0.1)
layer = partial(OtherLinear, WIDTH, WIDTH)
CHANGED = [
    ("DiT and SiT", "norm1", nn.Identity),
    ("DiT and SiT", "attn", Causal),
    ("DiT and SiT", "attn", Attention),
    ("DiT and SiT", "attn.qkv", partial(OtherLinear, WIDTH, 3 * WIDTH)),
    ("DiT and SiT", "attn.proj_drop", dropping),
    ("DiT and SiT", "mlp", TwiceTheMLP),
    ("LightningDiT", "attn.q_norm", partial(nn.RMSNorm, WIDTH // 2)),
    ("MPDiT", "attn", Causal),
    ("diffusers", "norm1.norm", nn.Identity),
    ("diffusers", "attn1.processor", Processor),
    ("diffusers", "attn1.to_out.0", layer),
    ("diffusers", "attn1.to_out.1", dropping),
    ("diffusers", "ff", nn.Identity),
]
OF_EAGER = [case for case in CHANGED if "norm1" in case[1]]


def change_last_block(model, path, made):
    blocks = [m for m in model.modules() if hasattr(m, "norm1")]
    owner, _, name = path.rpartition(".")
    setattr(blocks[-1].get_submodule(owner), name, made())


@pytest.mark.parametrize(
    ("name", "path", "made", "rounding"),
    [*((*case, "fp32") for case in CHANGED), *((*case, "eager") for case in OF_EAGER)],
)
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy], ids=["", "copy"])
def test_a_part_that_became_another_is_refused(name, path, made, rounding, copied):
    model, (x, c) = copied(msf.accelerate(make(name), rounding)), inputs()
    model(x, c)
    change_last_block(model, path, made)
    kind = type(made()).__name__
    with pytest.raises(ValueError, match=f"one is now (a|another) {kind}; call msf"):
        model(x, c)


@pytest.mark.parametrize("name", ["DiT and SiT", "MPDiT"])
def test_a_part_that_became_one_of_another_class_is_refused(name):
    model, (x, c) = msf.accelerate(make(name)), inputs()
    [m for m in model.modules() if isinstance(m, Attention)][-1].__class__ = Causal
    with pytest.raises(ValueError, match=r"one is now a Causal; call msf"):
        model(x, c)
    msf.restore(model)(x, c)


@pytest.mark.parametrize(("path", "made"), [("attn", Causal), ("mlp", TwiceTheMLP)])
def test_with_eager_another_attention_or_mlp_is_called(path, made):
    model, plain = make("DiT and SiT", torch.float64), make("DiT and SiT", torch.float64)
    msf.accelerate(model, "eager")
    x, c = inputs(torch.float64)
    before, other = model(x, c), made().double()
    for changed in (model, plain):
        change_last_block(changed, path, lambda: other)
    assert relative_error(model(x, c), plain(x, c)) < 1e-12
    assert relative_error(model(x, c), before) > 1e-3


@pytest.mark.parametrize("path", ["mlp", "mlp.act", "attn.q_norm"])
@pytest.mark.parametrize("hooked", [hook, wrap])
def test_hooks_of_what_is_called_run(path, hooked):
    model, plain = make("DiT and SiT", torch.float64), make("DiT and SiT", torch.float64)
    msf.accelerate(model)
    x, c = inputs(torch.float64)
    before = model(x, c)
    for changed in (model, plain):
        hooked(changed.blocks[1].get_submodule(path), lambda out: 2 * out)
    assert relative_error(model(x, c), plain(x, c)) < 1e-12
    assert relative_error(model(x, c), before) > 1e-3


def test_an_mlp_that_became_another_is_called():
    model, plain = make("DiT and SiT", torch.float64), make("DiT and SiT", torch.float64)
    msf.accelerate(model)
    for changed in (model, plain):
        changed.blocks[1].mlp.fc1 = LowRank(changed.blocks[1].mlp.fc1)
    x, c = inputs(torch.float64)
    assert relative_error(model(x, c), plain(x, c)) < 1e-12
    plain.blocks[1].mlp.fc1 = plain.blocks[1].mlp.fc1.base
    assert relative_error(model(x, c), plain(x, c)) > 1e-3


class TwiceTheGELU(nn.GELU):
    def forward(self, x):
        return 2 * super().forward(x)


class TwiceTheGELUOfDiffusers(nn.Module):
    approximate = "tanh"

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x):
        return 2 * nn.functional.gelu(self.proj(x), approximate="tanh")


class Twice(nn.Identity):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("name", "path", "made"),
    [
        ("DiT and SiT", "mlp.norm", Twice),
        ("DiT and SiT", "mlp.act", partial(TwiceTheGELU, "tanh")),
        ("diffusers", "ff.net.0", TwiceTheGELUOfDiffusers),
        ("diffusers", "ff.net.1", Twice),
    ],
)
def test_a_layer_of_an_mlp_that_is_derived_from_a_known_one_is_called(name, path, made):
    model, plain = msf.accelerate(make(name, torch.float64)), make(name, torch.float64)
    x, c = inputs(torch.float64)
    before, other = model(x, c), made().double()
    for changed in (model, plain):
        change_last_block(changed, path, lambda: other)
    assert relative_error(model(x, c), plain(x, c)) < 1e-12
    assert relative_error(model(x, c), before) > 1e-3
