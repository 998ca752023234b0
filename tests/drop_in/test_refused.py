"""A model that is no known diffusion transformer is refused in a line that says what differs, and
stays as it is."""

import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import msf

from .transformers import (
    GELUMLP,
    HEAD_DIM,
    WIDTH,
    Attention,
    Block,
    OfDiffusers,
    PlainNorm,
    Rotation,
    Transformer,
    angles,
    inputs,
    lightning,
    make,
    modulation,
)


def model(**parts):
    return Transformer(partial(Block, **parts))


def changed(change, built=Transformer):
    result = built()
    change(result)
    return result


def set_second(path, value):
    """A model in whose second block the module of this path is another one."""
    return changed(lambda m: m.blocks[1].set_submodule(path, value))


def in_diffusers(path, value):
    def change(built):
        owner, _, name = path.rpartition(".")
        setattr(built.dit.transformer_blocks[1].get_submodule(owner), name, value)

    return changed(change, OfDiffusers)


class WithAttribute(Attention):
    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)


STRUCTURES = {
    "has no block of a known diffusion transformer": lambda: nn.Linear(2, 2),
    "blocks.1.cross_attn is a Linear, which is not known": lambda: changed(
        lambda m: m.blocks[1].add_module("cross_attn", nn.Linear(2, 2))
    ),
    "blocks.1.attn.gate is a Linear, which is not known": lambda: changed(
        lambda m: m.blocks[1].attn.add_module("gate", nn.Linear(2, 2))
    ),
    "blocks.1.norm2 is a BatchNorm1d, neither LayerNorm nor RMSNorm": lambda: set_second(
        "norm2", nn.BatchNorm1d(WIDTH)
    ),
    "is a RMSNorm, neither LayerNorm nor RMSNorm with weight and eps": lambda: set_second(
        "norm2", nn.RMSNorm(WIDTH, elementwise_affine=False, eps=1e-6)
    ),
    "blocks.1.norm2 is of 8 channels, not of 32": lambda: set_second("norm2", PlainNorm(8)),
    "blocks.1.attn.qkv is a Sequential, not an nn.Linear": lambda: set_second(
        "attn.qkv", nn.Sequential()
    ),
    "blocks.1.attn.qkv goes from 32 to 64 features, not from 32 to 96": lambda: set_second(
        "attn.qkv", nn.Linear(WIDTH, 2 * WIDTH)
    ),
    "blocks.0.attn.attn_drop is a Dropout(p=0.1, inplace=False), and": lambda: model(
        attn=partial(Attention, drop=0.1)
    ),
    "blocks.0.attn has num_heads None, not a whole number": lambda: model(
        attn=partial(WithAttribute, num_heads=None)
    ),
    "blocks.0.attn has 32 channels, which 3 heads do not divide": lambda: model(
        attn=partial(WithAttribute, num_heads=3)
    ),
    "blocks.1.mlp.fc1 goes from 8 to 8 features, not from 32 to 8": lambda: set_second(
        "mlp.fc1", nn.Linear(8, 8)
    ),
    "blocks.1.adaLN_modulation gives 96 modulations, not 6 x 32 or 4 x 32": lambda: set_second(
        "adaLN_modulation", modulation(3)
    ),
    "final_layer.norm_final is a GroupNorm": lambda: changed(
        lambda m: m.final_layer.set_submodule("norm_final", nn.GroupNorm(2, WIDTH))
    ),
    "final_layer.linear is a Identity, not an nn.Linear": lambda: changed(
        lambda m: m.final_layer.set_submodule("linear", nn.Identity())
    ),
    "Block.attn.qkv is a Identity, not an nn.Linear": lambda: changed(
        lambda block: block.attn.set_submodule("qkv", nn.Identity()), Block
    ),
    "blocks.1 has a forward that replaces its class's": lambda: changed(
        lambda m: setattr(m.blocks[1], "forward", lambda x, c: x)
    ),
    "dit.transformer_blocks.1 has norm_type 'ada_norm'": lambda: in_diffusers(
        "norm_type", "ada_norm"
    ),
    "dit.transformer_blocks.1.attn1 has a function, not diffusers' own": lambda: in_diffusers(
        "attn1.processor", lambda *_: None
    ),
    "dit.transformer_blocks.1.attn1.norm_q is a LayerNorm, which is not": lambda: in_diffusers(
        "attn1.norm_q", nn.LayerNorm(HEAD_DIM)
    ),
    "dit.transformer_blocks.1.norm1 has no embedding": lambda: in_diffusers("norm1.emb", None),
}


class Causal(Attention):
    def forward(self, x):
        return super().forward(x, is_causal=True)


class Unscaled(Attention):
    def forward(self, x):
        return super().forward(x, scale=0.3)


class WithoutItsNorm(Attention):
    def __init__(self):
        super().__init__(qk_norm=partial(nn.RMSNorm, eps=1e-6))

    def forward(self, x):
        self.__dict__["q_norm"] = nn.Identity()
        out = super().forward(x)
        del self.__dict__["q_norm"]
        return out


class TwiceTheMLP(GELUMLP):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherGELU(GELUMLP):
    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))  # while its `act` says "tanh"


class OtherOrder(Block):
    """Scale before shift."""

    def forward(self, x, c):
        c = list(self.adaLN_modulation(c).chunk(6, 1))
        c[0], c[1] = c[1], c[0]
        return super().forward(x, c)


class PostNorm(Block):
    def forward(self, x, c):
        *_, gate = self.adaLN_modulation(c).chunk(6, 1)
        x = self.norm1(x + gate[:, None] * self.attn(x))
        return self.norm2(x + gate[:, None] * self.mlp(x))


class Halves(Rotation):
    """Rotates the pairs (i, i + d / 2)."""

    def forward(self, x):
        first, second = x.chunk(2, -1)
        cos, sin = self.freqs_cos[:, ::2], self.freqs_sin[:, ::2]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def with_halves():
    result = lightning(PlainNorm, None, GELUMLP, 6)
    result.feat_rope = Halves(angles())
    return result


FORWARDS = {
    "a causal mask": lambda: model(attn=Causal),
    "another scale of the scores": lambda: model(attn=Unscaled),
    "a norm of keys alone": lambda: model(attn=WithoutItsNorm),
    "twice the MLP": lambda: model(mlp=TwiceTheMLP),
    "another GELU": lambda: model(mlp=OtherGELU),
    "scale before shift": lambda: Transformer(OtherOrder),
    "norms after the sum": lambda: Transformer(PostNorm),
    "rotation of halves": with_halves,
}


def assert_refused(model, message):
    try:
        msf.accelerate(model)
    except ValueError as error:
        assert re.search(message, str(error)), error
        assert str(error).startswith("msf.accelerate: ") and "\n" not in str(error)
    else:
        pytest.fail("not refused")
    ours = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), partial)]
    assert not ours


@pytest.mark.parametrize("message", STRUCTURES)
def test_another_structure(message):
    assert_refused(STRUCTURES[message](), re.escape(message))


@pytest.mark.parametrize("name", FORWARDS)
def test_another_forward(name):
    assert_refused(FORWARDS[name](), r"^msf.accelerate: blocks.0 computes something else than its")


class SometimesCausal(Attention):
    """Has the mask where an attribute says so."""

    causal = False

    def forward(self, x):
        return super().forward(x, is_causal=self.causal)


class Dropping(Attention):
    """Drops in training what no Dropout module says."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_differs_in_training_alone(training):
    assert_refused(model(attn=Dropping).train(training), "blocks.0 draws random numbers, as drop")


class Settings:
    def __init__(self, causal):
        self.causal = causal


class WithSettings(Attention):
    """Has the mask where a list or an object of its own says so."""

    def __init__(self):
        super().__init__()
        self.parts, self.settings = [False], Settings(False)

    def forward(self, x):
        return super().forward(x, is_causal=self.parts[0] or self.settings.causal)


class Scaled(Attention):
    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        return self.factor * super().forward(x)


class Twice(Attention):
    def forward(self, x):
        return 2 * super().forward(x)


SECOND_DIFFERS = {
    "a mask": (SometimesCausal, lambda attn: setattr(attn, "causal", True)),
    "a class": (Attention, lambda attn: setattr(attn, "__class__", Twice)),
    "a list": (WithSettings, lambda attn: setattr(attn, "parts", [True])),
    "an object": (WithSettings, lambda attn: setattr(attn, "settings", Settings(True))),
    "a buffer": (Scaled, lambda attn: attn.factor.fill_(2)),
}


@pytest.mark.parametrize("what", SECOND_DIFFERS)
def test_a_second_block_that_differs_by_what_is_no_weight(what):
    attn, change = SECOND_DIFFERS[what]
    result = changed(lambda m: change(m.blocks[1].attn), partial(model, attn=attn))
    assert_refused(result, r"^msf.accelerate: blocks.1 computes something else than its kind")


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_hooks_that_would_not_run(register):
    result = changed(lambda m: getattr(m.blocks[1].mlp.fc1, register)(lambda *_: None))
    assert_refused(result, r"blocks\.1\.mlp\.fc1 has hooks, which would not run")


@pytest.mark.parametrize("path", ["attn", "attn.qkv", "norm2", "mlp.act"])
def test_a_forward_in_the_place_of_its_class_s_that_would_not_run(path):
    def record(m):
        module = m.blocks[1].get_submodule(path)
        forward = module.forward
        module.forward = lambda *args: forward(*args)  # gives the same

    message = rf"^msf.accelerate: blocks\.1\.{path} has a forward of its own, which would not run$"
    assert_refused(changed(record), message)


def test_a_forward_that_takes_something_else():
    class Masked(Block):
        def forward(self, x, c, mask):
            return super().forward(x, c)

    message = r"blocks.0 does not run beside what would replace it: .*'mask'"
    assert_refused(Transformer(Masked), message)


class TakesMask(Block):
    def forward(self, x, c, mask=None):
        return super().forward(x, c) if mask is None else mask * super().forward(x, c)


def test_what_a_block_takes_besides_is_refused_at_its_call():
    model, (x, c) = msf.accelerate(Transformer(TakesMask)), inputs()
    model(x, c)
    mask, block = torch.ones(()), model.blocks[0]
    for call in (lambda: block(x, c, mask), lambda: block(x, c, mask=mask)):
        line = (
            "^an accelerated block takes, .* a module with freqs_cos and freqs_sin, got a Tensor$"
        )
        with pytest.raises(ValueError, match=line):
            call()


@pytest.mark.parametrize("call", [msf.accelerate, msf.restore])
def test_what_is_no_module(call):
    line = rf"^msf.{call.__name__}: model must be an nn.Module, got a list$"
    with pytest.raises(TypeError, match=line):
        call([make("DiT and SiT")])


def test_no_such_rounding():
    with pytest.raises(ValueError, match=r"^rounding must be one of fp32, eager, got 'bf16'$"):
        msf.accelerate(make("DiT and SiT"), "bf16")


def test_masks_are_refused_by_blocks_of_diffusers():
    block = msf.accelerate(make("diffusers")).dit.transformer_blocks[0]
    with pytest.raises(ValueError, match=r"takes neither masks nor attention arguments$"):
        block(torch.zeros(1, 4, WIDTH), torch.zeros(1, 4))
