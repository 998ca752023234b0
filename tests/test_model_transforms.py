"""A model under what PyTorch does to modules: compilation, torch.func, parametrizations, FSDP."""

import pytest
import torch
import torch.distributed.fsdp.wrap
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import prune

from models import generator, images, tiny_config, tiny_model
from msf import MSF, sample
from msf.embeddings import sincos_2d
from msf.transformer import Block
from msf.weights import plain_state, whole
from msf_kernels import rope_2d
from msf_kernels.library import is_plain
from processes import in_two_processes, needs_fsdp2, program


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_all_losses_compile_together(positions):
    model, x, y = tiny_model(positions=positions), images(2), torch.arange(2)
    torch.compiler.reset()
    losses = torch.compile(model.training_losses, backend="aot_eager")

    def total(call):
        torch.manual_seed(0)
        return call(x, y)["total"]

    torch.testing.assert_close(total(losses), total(model.training_losses))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_asserts_the_range_of_labels(backend):
    """Also where every label is dropped, which must not hide a wrong one."""
    torch.compiler.reset()
    compiled = torch.compile(tiny_model(label_dropout=1.0), fullgraph=True, backend=backend)
    assert compiled(images(2), torch.tensor([0, 2]))["total"].isfinite()
    for label in (3, 7, -1):
        with pytest.raises(RuntimeError, match=r"^labels must be in \[0, 3\)"):
            compiled(images(2), torch.tensor([0, label]))


def test_a_compiled_model_is_one_graph():
    torch.compiler.reset()
    model, x, y, graphs = tiny_model(), images(2), torch.tensor([0, 1]), []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.manual_seed(0)
    expected = model(x, y)["total"]
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x, y)["total"], expected)
    assert len(graphs) == 1


def test_a_compiled_model_takes_batches_of_any_size():
    torch.compiler.reset()
    model = tiny_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (2, 3, 5, 6):
        x, y = images(batch), torch.arange(batch) % 2
        torch.manual_seed(0)
        expected = model(x, y)["total"]
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(x, y)["total"], expected)


def test_a_compiled_model_says_it_once_too():
    torch.compiler.reset()
    model = MSF(tiny_config(num_classes=0))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"pyramid\.measure\(batches\) before") as warned:
        for batch in (2, 2, 3):
            compiled(images(batch))
    assert len(warned) == 1 and warned[0].filename == __file__


def test_functional_call_and_parametrizations():
    model, x = tiny_model(num_classes=0), images(2)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(weights):
        call = torch.func.functional_call
        return call(model, weights, (x,), {"generator": generator()})["total"]

    assert all(gradient.any() for gradient in torch.func.grad(loss)(weights).values())
    torch.nn.utils.parametrizations.weight_norm(model.stages[0].time_embedding[0])
    assert model(x)["total"].isfinite()


@pytest.mark.parametrize("stage", [None, "base"])
def test_gradients_of_each_image(stage):
    model, x, y = MSF(tiny_config()).eval(), images(3), torch.tensor([0, 1, 2])
    model.load_state_dict(tiny_model().state_dict())
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x, y):
        call = torch.func.functional_call
        return call(model, weights, (x[None], y[None]), {"stage": stage})["total"]

    gradient = torch.func.grad(loss)
    seeded = []
    for each in zip(x, y):
        torch.manual_seed(0)
        seeded.append(gradient(weights, *each))
    vectorised = {
        randomness: torch.func.vmap(gradient, in_dims=(None, 0, 0), randomness=randomness)
        for randomness in ("same", "different")
    }
    torch.manual_seed(0)
    same = vectorised["same"](weights, x, y)
    expected = {name: torch.stack([each[name] for each in seeded]) for name in weights}
    torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
    different = vectorised["different"](weights, x, y)
    assert all(gradient.isfinite().all() for gradient in different.values())


def test_losses_of_several_models_at_once():
    models, x, y = [tiny_model(seed=seed) for seed in (0, 1)], images(2), torch.tensor([0, 1])
    template, stacked = MSF(tiny_config()), torch.func.stack_module_state(models)

    def loss(weights, statistics):
        return torch.func.functional_call(template, (weights, statistics), (x, y))["total"]

    torch.manual_seed(0)
    got = torch.func.vmap(loss, randomness="same")(*stacked)
    expected = []
    for model in models:
        torch.manual_seed(0)
        expected.append(model(x, y)["total"])
    torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_fake_tensors_leave_no_table_behind(positions):
    model, x = tiny_model(num_classes=0, positions=positions), images(2, size=(24, 8))
    for _ in range(2):
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert isinstance(model(mode.from_tensor(x))["total"], FakeTensor)
        assert model(x)["total"].isfinite()


@pytest.mark.parametrize("transform", ["grad", "functionalize"])
@pytest.mark.parametrize("positions", ["rope", "both"])
def test_a_transform_leaves_no_table_behind(positions, transform):
    """What is made inside one is wrapped, and of no use after it."""
    model, x = tiny_model(num_classes=0, positions=positions), images(2, size=(12, 20))
    getattr(torch.func, transform)(lambda x: model(x)["total"])(x)
    size, device = (6, 10), x.device
    assert is_plain(rope_2d(*size, 16, device=device)) and is_plain(sincos_2d(*size, 32, device))
    model(x)["total"].backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_reset_parameters_after_to_empty():
    model, (empty,) = tiny_model(), [MSF(tiny_config()).to("meta").to_empty(device="cpu")]
    for each in (model, empty):
        torch.manual_seed(5)
        each.reset_parameters()
    assert all(map(torch.equal, empty.state_dict().values(), model.state_dict().values()))
    assert (empty.stages[0].blocks[0].attention.q_weight == 1).all()
    assert not empty.pyramid.is_measured


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_reset_parameters_sets_what_parametrizations_make():
    model, plain = tiny_model(), tiny_model()
    stage = model.stages[0]
    for module in (stage.output, stage.time_embedding[0], stage.label_embedding):
        torch.nn.utils.parametrizations.weight_norm(module)
    torch.nn.utils.parametrizations.weight_norm(stage.blocks[0].mlp[0], "bias")
    torch.nn.utils.parametrizations.weight_norm(stage.blocks[0].attention, "q_weight")
    for each in (model, plain):
        torch.manual_seed(5)
        each.reset_parameters()
    made, expected = plain_state(model), plain.state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(made[name], weight, rtol=1e-6, atol=0, msg=name)
    assert not made["stages.0.output.weight"].any()
    model.pyramid.std.fill_(2)
    model(images(2), torch.tensor([0, 1]))["total"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: torch.nn.utils.parametrize.register_parametrization(m, "weight", Doubled()),
            "^reset_parameters: weight of a ParametrizedLinear: .*Doubled does not implement right",
        ),
        (
            lambda m: prune.identity(m, "weight"),
            "^reset_parameters: a hook makes weight of a Linear; remove it first$",
        ),
    ],
)
def test_reset_parameters_refuses_what_it_cannot_set(change, message):
    model = tiny_model()
    change(model.stages[0].output)
    with pytest.raises(ValueError, match=message):
        model.reset_parameters()


@pytest.mark.parametrize("wrapper", ["fsdp1", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_blocks_sharded_in_bfloat16_train_and_are_saved(wrapper, tmp_path):
    """FSDP casts what a block is called with; its rotation stays in float32."""
    ran = program("shard_blocks.py", wrapper, str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    *losses, trained = map(float, lines[:4])
    if wrapper == "fsdp1":
        assert lines[4].startswith("save_pretrained: the shape of stages.0.patch_embedding.weight")
    whole = tiny_model()(images(8), torch.arange(8) % 3, generator=generator())["total"]
    assert losses[0] == pytest.approx(whole.item(), rel=0.02)  # bfloat16 has 8 bits
    assert len(set(losses)) == 3
    loaded = MSF.from_pretrained(tmp_path)(images(8), torch.arange(8) % 3, generator=generator())
    assert trained == pytest.approx(loaded["total"].item(), rel=0.02)


def sharded(model, wrapper):
    fsdp = torch.distributed.fsdp
    if wrapper == "fsdp1":
        beside = [layer for stage in model.stages for layer in stage.time_embedding]
        policy = fsdp.wrap.CustomPolicy(lambda part: isinstance(part, Block) or part in beside)
        device = torch.device("cpu")
        return fsdp.FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=device)
    for block in (block for stage in model.stages for block in stage.blocks):
        fsdp.fully_shard(block)
    return fsdp.fully_shard(model)


def sampled(model):
    return sample(model, torch.arange(2), seeds=[3, 4], guidance_scale=2.0)


def trained(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images(4), torch.arange(4) % 3, generator=generator())["total"].backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("wrapper", ["fsdp1", pytest.param("fsdp2", marks=needs_fsdp2)])
def test_a_model_sharded_as_a_whole_samples_before_and_after_training(wrapper):
    def in_one_of_two(_):
        torch.distributed.init_process_group("gloo")
        model = sharded(tiny_model(), wrapper)
        alike = torch.equal(sampled(model), sampled(tiny_model()))
        torch.testing.assert_close(sampled(trained(model)), sampled(trained(tiny_model())))
        torch.distributed.destroy_process_group()
        return int(not alike)

    assert in_two_processes(in_one_of_two) == [0, 0]


@needs_fsdp2
def test_image_losses_of_a_sharded_model_are_those_of_the_whole():
    def found(model):
        for _ in range(2):
            losses, times = model.image_losses(
                images(4), torch.arange(4) % 3, stage="residual", generator=generator()
            )
            losses.mean().backward()
        parameters = model.stages[1].named_parameters()
        gradients = {name: whole(parameter.grad) for name, parameter in parameters}
        return losses.detach(), times, gradients

    def in_one_of_two(_):
        torch.distributed.init_process_group("gloo")
        torch.testing.assert_close(found(sharded(tiny_model(), "fsdp2")), found(tiny_model()))
        torch.distributed.destroy_process_group()
        return 0

    assert in_two_processes(in_one_of_two) == [0, 0]


def test_a_weight_that_a_hook_makes_is_not_saved(tmp_path):
    model = tiny_model()
    prune.l1_unstructured(model.stages[0].output, "weight", amount=1)
    with pytest.raises(ValueError, match=r"^save_pretrained: a hook makes stages.0.output.weight"):
        model.save_pretrained(tmp_path)


def test_sampling_runs_inside_torch_compile():
    torch.compiler.reset()
    model, labels = tiny_model(), torch.tensor([0, 2])

    def sampled():
        return sample(model, labels, seeds=[3, 4], guidance_scale=2.0)

    torch.testing.assert_close(torch.compile(sampled, backend="eager")(), sampled())
