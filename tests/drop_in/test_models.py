"""Whatever is done with a model works with an accelerated one."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import msf
from msf.drop_in.probe import Probe
from numerics import relative_error
from processes import needs_fsdp2, program

from .transformers import (
    GELUMLP,
    MODELS,
    WIDTH,
    Attention,
    Block,
    RMSNorm,
    Transformer,
    inputs,
    lightning,
    make,
)

models = pytest.mark.parametrize("name", MODELS)


def gradients(model, x, c):
    model.zero_grad()
    out = model(x, c)
    out.float().square().mean().backward()
    return [out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def eager(model):
    return msf.accelerate(model, "eager")


def differs(model, x, c):
    """Tell by the rounding in bfloat16 whether a model is accelerated."""
    return not torch.equal(model(x, c), msf.restore(copy.deepcopy(model))(x, c))


@models
def test_weights_and_names_stay_and_restore_gives_the_model_back(name):
    model, (x, c) = make(name, torch.bfloat16), inputs(torch.bfloat16)
    before, parameters = model(x, c), dict(model.named_parameters())
    modules, keys = dict(model.named_modules()), list(model.state_dict())
    assert msf.accelerate(model) is model
    assert list(model.state_dict()) == keys and dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not torch.equal(model(x, c), before)
    assert msf.restore(model) is model
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(x, c), before)


@pytest.mark.parametrize("name", ["LightningDiT", "diffusers"])
def test_blocks_that_are_alike_run_beside_their_replacement_once(name, monkeypatch):
    ran, difference = [], Probe._difference

    def counted(probe, module, family):
        ran.append(module)
        return difference(probe, module, family)

    monkeypatch.setattr(Probe, "_difference", counted)
    model = msf.accelerate(make(name))
    first, kinds = len(ran), {type(module) for module in ran}
    assert first == len(kinds)
    msf.accelerate(model)
    assert len(ran) == 2 * first


def test_twice_is_once_with_the_last_rounding():
    model, (x, c) = make("DiT and SiT", torch.bfloat16), inputs(torch.bfloat16)
    first = msf.accelerate(model)(x, c)
    assert torch.equal(msf.accelerate(model)(x, c), first)
    assert not torch.equal(msf.accelerate(model, "eager")(x, c), first)
    assert torch.equal(msf.accelerate(model)(x, c), first)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved]
)
def test_a_copy_is_accelerated_with_weights_of_its_own(copied):
    model, (x, c) = msf.accelerate(make("LightningDiT", torch.bfloat16)), inputs(torch.bfloat16)
    out, other = model(x, c), copied(model)
    assert torch.equal(other(x, c), out) and differs(other, x, c)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(x, c), out)
    assert not any("forward" in module.__dict__ for module in msf.restore(other).modules())
    assert "forward" in model.blocks[0].__dict__


@models
def test_autocast(name):
    """In bfloat16 matrix products, what is accumulated and modulated stays in float32. Errors are
    of several models together, as in test_equal.py."""
    ways = {"native": msf.restore, "fp32": msf.accelerate, "eager": eager}
    errors = {way: [] for way in ways}
    for seed in range(6):
        model, (x, c) = make(name, seed=seed), inputs()
        exact = gradients(make(name, torch.float64, seed), x.double(), c.double())
        dtypes = []
        for way, prepare in ways.items():
            with torch.autocast("cpu", torch.bfloat16):
                found = gradients(prepare(model), x, c)
            dtypes.append([t.dtype for t in found])
            errors[way] += [relative_error(a, b) for a, b in zip(found, exact) if b.norm() > 1e-9]
        assert dtypes[0] == dtypes[1] == dtypes[2]
    native, *ours = (torch.tensor(errors[way]).norm() for way in ways)
    assert max(ours) <= 1.25 * native


def test_activation_checkpointing():
    model, (x, c) = msf.accelerate(make("LightningDiT", torch.float64)), inputs(torch.float64)
    expected = gradients(model, x, c)
    run = [block.forward for block in model.blocks]
    calls = []

    class Checkpointed(nn.Module):
        def forward(self, x, c):
            for block in model.blocks:
                x = checkpoint(block, x, c, model.feat_rope, use_reentrant=False)
            return model.final_layer(x, c)

    wrapper = Checkpointed()
    wrapper.model = model
    for block, forward in zip(model.blocks, run):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        assert block.forward is forward
    assert all(map(torch.equal, gradients(wrapper, x, c), expected))
    assert len(calls) == 4  # each block twice


def test_compiled():
    model, (x, c) = msf.accelerate(make("LightningDiT")), inputs()
    expected = gradients(model, x, c)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, value in zip(gradients(compiled, x, c), expected):
        assert relative_error(got, value.double()) < 1e-5


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


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DiT and SiT", "blocks.1.attn"),
        ("DiT and SiT", "blocks.1.norm2"),
        ("DiT and SiT", "blocks.1.attn.attn_drop"),
        ("DiT and SiT", "blocks.1.attn.proj_drop"),
        ("DiT and SiT", "final_layer.norm_final"),
        ("diffusers", "dit.transformer_blocks.1.attn1"),
        ("diffusers", "dit.transformer_blocks.1.attn1.to_out.1"),
        ("LightningDiT", "feat_rope"),
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


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("DiT and SiT", "blocks.1.attn.attn_drop"),
        ("DiT and SiT", "blocks.1.attn.proj_drop"),
        ("diffusers", "dit.transformer_blocks.1.attn1.to_out.1"),
    ],
)
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


class OtherNames(Block):
    def forward(self, x, cond, positions=None):
        return super().forward(x, cond, positions)


@pytest.mark.parametrize("rounding", ["fp32", "eager"])
def test_parameters_may_have_other_names(rounding):
    model, (x, c) = lightning(RMSNorm, RMSNorm).double(), inputs(torch.float64)
    model.blocks[1].__class__ = OtherNames
    block, rope = model.blocks[1], model.feat_rope
    expected = block(cond=c, x=x, positions=rope)
    msf.accelerate(model, rounding)
    assert relative_error(block(cond=c, x=x, positions=rope), expected) < 1e-12
    assert relative_error(block(x, c, rope), expected) < 1e-12
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        block(x, c, mask=None)


def test_meta():
    with torch.device("meta"):
        model = Transformer()
    msf.accelerate(model)
    source, (x, c) = make("DiT and SiT"), inputs()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(model(x, c), msf.accelerate(source)(x, c))


def test_random_numbers_and_modes_stay():
    model = make("diffusers").train()
    state = torch.get_rng_state()
    msf.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_labels_are_dropped_as_by_the_model():
    model, (x, c) = make("diffusers", torch.float64).train(), inputs(torch.float64, batch=16)
    outputs = []
    for prepare in (lambda m: m, msf.accelerate):
        torch.manual_seed(3)
        outputs.append(prepare(model)(x, c))
    assert relative_error(outputs[1], outputs[0]) < 1e-12
    torch.manual_seed(4)
    assert relative_error(model(x, c), outputs[0]) > 1e-3


@pytest.mark.parametrize(
    "wrappers", [["ddp"], pytest.param(["fsdp2", "fsdp2 first"], marks=needs_fsdp2)], ids=",".join
)
def test_distributed(wrappers, tmp_path):
    """Two processes, DDP and FSDP2 with blocks accelerated before and after, take the steps of one
    process."""
    ran = program("accelerate_distributed.py", str(tmp_path), "none", *wrappers)
    assert ran.returncode == 0, ran.stderr[-2000:]
    losses = {line.split(":")[0]: line.split(":")[1].split() for line in ran.stdout.splitlines()}
    assert list(losses) == ["none", *wrappers]
    alone = [float(x) for x in losses["none"]]
    assert len(set(alone)) == 3
    for name in wrappers:
        assert [float(x) for x in losses[name]] == pytest.approx(alone, rel=1e-9)
