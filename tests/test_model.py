import json
import warnings
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import prune

from models import images, tiny_config, tiny_model
from msf import MSF, StageConfig
from msf.weights import plain_state
from processes import program


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_every_stage_has_a_loss_and_reaches_every_parameter(levels):
    model = tiny_model(levels).train()
    losses = model.training_losses(images(8), torch.arange(8) % 3, generator=generator())
    assert tuple(losses) == (*model.config.stage_names, "total")
    torch.testing.assert_close(
        losses["total"], sum(losses[name] for name in model.config.stage_names)
    )
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_one_stage_alone_leaves_the_other_untouched():
    model = tiny_model()
    losses = model.training_losses(images(4), torch.zeros(4, dtype=torch.int64), stage="residual")
    assert tuple(losses) == ("residual", "total")
    losses["total"].backward()
    assert all(p.grad is None for p in model.stages[0].parameters())
    with pytest.raises(ValueError, match=r"stage must be one of \('base', 'residual'\), got 'top'"):
        model.training_losses(images(4), torch.zeros(4, dtype=torch.int64), stage="top")


def test_untrained_loss_is_the_variance_of_the_velocity():
    # Zero output against data - noise, both of unit variance: 1 + 1.
    torch.manual_seed(0)
    model = MSF(tiny_config(channels=1))
    x = torch.randn(512, 1, 8, 8, generator=generator())
    model.pyramid.measure([x])
    losses = model.training_losses(x, torch.zeros(512, dtype=torch.int64), generator=generator(1))
    # The standard error of a mean of n products of Gaussians is below 4 / sqrt(n); n = 512 * 16 at
    # least.
    assert abs(losses["base"].item() - 2) < 5 * 4 / 8192**0.5
    assert abs(losses["residual"].item() - 2) < 5 * 4 / 8192**0.5


def test_losses_repeat_with_the_generator():
    model, y = tiny_model(), torch.tensor([0, 1, 2, 0])
    first, again, other = (
        model.training_losses(images(4), y, generator=generator(seed))["total"]
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_all_losses_compile_together(positions):
    model, x, y = tiny_model(positions=positions), images(2), torch.arange(2)
    torch.compiler.reset()
    losses = torch.compile(model.training_losses, backend="aot_eager")

    def total(call):
        torch.manual_seed(0)
        return call(x, y)["total"]

    torch.testing.assert_close(total(losses), total(model.training_losses))


def test_dropped_labels_become_the_null_class():
    model = tiny_model(label_dropout=1.0)
    model.training_losses(images(4), torch.tensor([0, 1, 2, 0]))["total"].backward()
    used = model.stages[0].label_embedding.weight.grad.abs().sum(1) > 0
    assert used.tolist() == [False, False, False, True]


def test_labels_as_they_were_trained():
    labels = torch.tensor([0, 2])
    assert tiny_model().trained_labels(labels) is labels
    assert tiny_model(label_dropout=1.0).trained_labels(labels).tolist() == [3, 3]
    assert tiny_model(num_classes=0).trained_labels(labels) is None


def test_prior_is_the_standardised_noised_upsampled_image_below():
    model, x = tiny_model(), images(2, (4, 4))
    noise, prior_noise = torch.randn(x.shape, generator=generator()), torch.tensor([0.0, 0.3])
    prior = model.prior(x, prior_noise, noise)
    low = model.pyramid.standardize_base(x) + prior_noise.view(2, 1, 1, 1) * noise
    assert torch.equal(prior, low.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_trains_on_non_square_images_without_labels():
    model = tiny_model(image_size=(8, 16), num_classes=0)
    assert model.training_losses(images(2, (8, 16)))["total"].isfinite()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, r"labels must be \(B,\) in \[0, 3\), got None"),
        (torch.tensor([0, 3]), r"labels must be in \[0, 3\), got 0 to 3"),
        (torch.tensor([-1, 0]), r"got -1 to 0"),
        (torch.tensor([0]), r"labels must be int64 \(2,\), got torch.int64 \(1,\)"),
        (torch.tensor([0.0, 1.0]), "got torch.float32"),
    ],
)
def test_bad_labels_are_one_clear_line(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().training_losses(images(2), labels)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_asserts_the_range_of_labels(backend):
    """Also where every label is dropped, which must not hide a wrong one."""
    torch.compiler.reset()
    compiled = torch.compile(tiny_model(label_dropout=1.0), fullgraph=True, backend=backend)
    assert compiled(images(2), torch.tensor([0, 2]))["total"].isfinite()
    for label in (3, 7, -1):
        with pytest.raises(RuntimeError, match=r"^labels must be in \[0, 3\)"):
            compiled(images(2), torch.tensor([0, label]))


def test_what_cannot_be_looked_at_asserts_the_range_of_labels(monkeypatch):
    """As on a GPU, where looking would be waiting."""
    monkeypatch.setattr("msf.model.has_values", lambda x: False)
    with pytest.raises(RuntimeError, match=r"^labels must be in \[0, 3\)"):
        tiny_model()(images(2), torch.tensor([0, 3]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 2, 8, 8, dtype=torch.float64), "x must be float32 .*, got torch.float64"),
        (
            torch.zeros(2, 2, 8, 8, dtype=torch.bfloat16),
            r"got torch.bfloat16; where FSDP casts it, .*\(cast_root_forward_inputs=False\), in",
        ),
        ([[0.0]], r"x must be float32 \(B, C, H, W\), got a list"),
        (None, r"x must be float32 \(B, C, H, W\), got a NoneType"),
        (torch.zeros(2, 8, 8), r"x must be \(B, 2, H, W\) .* got \(2, 8, 8\)"),
        (torch.zeros(2, 2, 6, 8), r"image sides must be multiples of \d .* got \(6, 8\)"),
    ],
)
def test_bad_images_are_one_clear_line(x, message):
    model = tiny_model(0, stages=(StageConfig(width=32, depth=1, heads=2, patch=4),))
    with pytest.raises(ValueError, match=message):
        model.training_losses(x, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_loss_is_about_the_same_in_other_dtypes(dtype):
    x, y, model = images(4), torch.tensor([0, 1, 2, 0]), tiny_model()
    losses = [
        m.training_losses(x, y, generator=generator())["total"] for m in (model, model.to(dtype))
    ]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_what_is_no_configuration_builds_no_model():
    with pytest.raises(TypeError, match="MSF: config must be an MSFConfig, got a dict"):
        MSF({})


def test_untrained_stages_are_known():
    torch.manual_seed(0)
    model = MSF(tiny_config())
    assert model.untrained_stages == ("base", "residual")
    torch.nn.init.ones_(model.stages[0].output.weight)
    assert model.untrained_stages == ("residual",)
    for index in range(2):
        model.stages[index] = torch.nn.DataParallel(model.stages[index])
    assert model.untrained_stages == ("residual",)
    model.reset_parameters()
    assert model.untrained_stages == ("base", "residual")


def test_save_and_load_round_trip(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    loaded = MSF.from_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert loaded.config == model.config and not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


SPOILS = {
    "nan": lambda tensors: tensors["stages.0.output.bias"].fill_(float("nan")),
    "infinity": lambda tensors: tensors["pyramid.mean"].fill_(-float("inf")),
    "flat": lambda tensors: tensors["pyramid.std"].zero_(),
    "integers": lambda tensors: tensors.update(
        {"stages.0.output.bias": tensors["stages.0.output.bias"].int()}
    ),
    "complex": lambda tensors: tensors.update(
        {"stages.0.output.bias": tensors["stages.0.output.bias"].to(torch.complex64)}
    ),
}


COMPLEX = pytest.mark.skipif(
    torch.complex64 not in safetensors.torch._SIZE, reason="this safetensors has no complex numbers"
)


def broken(directory, what):
    tiny_model().save_pretrained(directory)
    weights, config = directory / "model.safetensors", directory / "config.json"
    if what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "not safetensors":
        weights.write_bytes(b"\x80\x04 a pickle, say")
    elif what == "another size":
        values = json.loads(config.read_text())
        values["stages"][0]["width"] = 64
        config.write_text(json.dumps(values))
    elif what in SPOILS:
        tensors = load_file(weights)
        SPOILS[what](tensors)
        save_file(tensors, weights)
    elif what == "bad config":
        config.write_text("{")


@pytest.mark.filterwarnings("error")  # which would be lines too
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", "no model.safetensors here"),
        ("no config", "no config.json here"),
        ("truncated", "not a readable safetensors file"),
        ("not safetensors", "not a readable safetensors file"),
        ("another size", "does not fit config.json: size mismatch"),
        ("nan", "model.safetensors: stages.0.output.bias must be finite, but holds NaN"),
        ("infinity", "model.safetensors: pyramid.mean must be finite, but holds NaN or infinity"),
        ("flat", "model.safetensors: pyramid.std must be positive"),
        ("integers", "stages.0.output.bias must be of floats, got torch.int32"),
        pytest.param("complex", r"bias must be of floats, got torch\.complex64", marks=COMPLEX),
        ("bad config", "not valid JSON"),
    ],
)
def test_bad_checkpoints_are_one_clear_line(tmp_path, what, message):
    broken(tmp_path, what)
    with pytest.raises(ValueError, match=message) as error:
        MSF.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_a_configuration_beyond_its_weights_takes_no_memory(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    stage = StageConfig(width=2**16, depth=1000, heads=2**12)  # of hundreds of terabytes
    config = replace(model.config, stages=(stage, stage))
    (tmp_path / "config.json").write_text(config.to_json())
    with pytest.raises(
        ValueError, match=r"model.safetensors: does not fit config\.json: Missing key"
    ):
        MSF.from_pretrained(tmp_path)


def test_a_call_of_the_model_is_its_loss():
    model, x, y, calls = tiny_model(), images(2), torch.tensor([0, 1]), []
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    losses = model.training_losses(x, y, generator=generator())
    assert len(calls) == 1  # so DistributedDataParallel and torch.compile see a training step
    called = model(x, y, generator=generator())
    assert called.keys() == {"base", "residual", "total"}
    assert all(torch.equal(called[name], losses[name]) for name in called)


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


def test_unmeasured_statistics_are_said_once():
    model = MSF(tiny_config(num_classes=0))
    for each in (model, MSF(tiny_config(num_classes=0)).training_losses):
        with pytest.warns(UserWarning, match=r"pyramid\.measure\(batches\) before") as warned:
            each(images(2))
        assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images(2))
        tiny_model(num_classes=0)(images(2))


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


def test_compiled_and_wrapped_stages_save_plain_names(tmp_path):
    model, plain = tiny_model(), tiny_model()
    model.stages[0] = torch.compile(model.stages[0], backend="eager")
    model.stages[1] = torch.nn.DataParallel(model.stages[1])
    model.save_pretrained(tmp_path)
    loaded = MSF.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.state_dict().values(), plain.state_dict().values()))


def test_parametrized_layers_save_the_weights_they_make(tmp_path):
    model, x, y = tiny_model().train(), images(2), torch.tensor([0, 1])
    parametrizations = torch.nn.utils.parametrizations
    parametrizations.weight_norm(model.stages[0].time_embedding[0])
    parametrizations.spectral_norm(model.stages[0].label_embedding)
    parametrizations.spectral_norm(model.stages[1].blocks[0].mlp[0])
    model.stages[1] = torch.compile(model.stages[1], backend="eager")
    model.stages[0].time_embedding[0].parametrizations.weight.original0.data.mul_(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = MSF.from_pretrained(tmp_path)
    losses = [m.eval()(x, y, generator=generator())["total"] for m in (model, loaded)]
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], tiny_model()(x, y, generator=generator())["total"])


FSDP2 = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"), reason="this torch has no FSDP2 on a CPU"
)


@pytest.mark.parametrize("wrapper", ["fsdp1", pytest.param("fsdp2", marks=FSDP2)])
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
