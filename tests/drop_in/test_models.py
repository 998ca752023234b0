"""Whatever is done with a model works with an accelerated one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import msf
from msf.drop_in.probe import Probe
from numerics import relative_error
from processes import needs_fsdp2, program

from .transformers import (
    MODELS,
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
