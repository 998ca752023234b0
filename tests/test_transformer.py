import operator
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models import images, tiny_config, tiny_model
from msf import StageConfig
from msf.embeddings import sinusoid
from msf.transformer import MLP, Attention, StageTransformer, patchify, unpatchify


def test_unpatchify_inverts_patchify():
    x = images(2, (4, 6), 3)
    tokens = patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[0, 4].view(2, 2, 3), x[0, :, 2:4, 2:4].permute(1, 2, 0))
    assert torch.equal(unpatchify(tokens, 2, (4, 6)), x)


def test_sinusoid_tells_positions_apart():
    table = sinusoid(torch.tensor([0.0, 1.0, 1000.0]), 8)
    assert table.shape == (3, 8)
    assert torch.equal(table[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(table[1, 0], torch.tensor(1.0).cos())
    torch.testing.assert_close(table[2, 7], torch.tensor(1000.0 / 10_000**0.75).sin())


def test_starts_at_zero_velocity():
    stage = StageTransformer(tiny_config(), 0)
    assert not stage(images(2), torch.rand(2), torch.tensor([0, 3])).any()


def test_starts_with_the_weights_of_dit():
    wide = tiny_config(num_classes=999, stages=(StageConfig(256, 1, 4),) * 2)
    stage = StageTransformer(wide, 1)
    for embedding in (stage.time_embedding, stage.prior_noise_embedding):
        for layer in (embedding[0], embedding[2]):
            # 65,536 weights: 5 standard errors of a deviation.
            assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / (2 * 65_536) ** 0.5)
            assert not layer.bias.any()
    std = stage.label_embedding.weight.std().item()
    assert std == pytest.approx(0.02, rel=5 / (2 * 256_000) ** 0.5)
    bound = (6 / (256 + 768)) ** 0.5  # Xavier's
    assert 0.99 * bound < stage.blocks[0].attention.qkv.weight.abs().max() <= bound
    assert not stage.blocks[0].modulation.weight.any() and not stage.modulation.weight.any()


def plain_forward(stage, x, t, y, prior, prior_noise):
    """The same network written out in eager PyTorch, block by block, without the operators."""

    def norm(x, shift, scale):
        normalise = F.layer_norm if stage.norm == "layer" else F.rms_norm
        x = normalise(x, x.shape[-1:], eps=1e-6)
        return x * (1 + scale[:, None]) + shift[:, None]

    c = stage.time_embedding(t) + stage.label_embedding(y)
    c = F.silu(c if prior_noise is None else c + stage.prior_noise_embedding(prior_noise))
    x = stage.patch_embedding(
        patchify(x if prior is None else torch.cat([x, prior], 1), stage.stage.patch)
    )
    side = int(x.shape[1] ** 0.5)
    shift, scale = stage.modulation(c).chunk(2, 1)
    for block in stage.blocks:
        g1, s2, c2, g2, *following = block.modulation(c).chunk(6, 1)
        x = x + g1[:, None] * plain_attention(block.attention, norm(x, shift, scale), side)
        first, activation, second = block.mlp
        hidden = linear(first, norm(x, s2, c2))
        if isinstance(activation, nn.GELU):
            hidden = F.gelu(hidden, approximate="tanh")
        else:
            a, b = hidden.chunk(2, -1)
            hidden = a * a.sigmoid() * b
        x = x + g2[:, None] * linear(second, hidden)
        shift, scale = following
    return unpatchify(stage.output(norm(x, shift, scale)), stage.stage.patch, (8, 8))


def plain_attention(attention, x, side):
    b, n, d = x.shape
    q, k, v = linear(attention.qkv, x).view(b, n, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
    q = plain_norm(q, attention.q_weight, attention.q_norm_bias)
    k = plain_norm(k, attention.k_weight, attention.k_norm_bias)
    q, k = rotate(q, side), rotate(k, side)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
    return linear(attention.proj, out)


def plain_norm(x, weight, bias):
    if bias is None:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def linear(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def rotate(z, side):
    """2-D RoPE by complex numbers: pair (i, i + d/2), first half of the pairs by row, second by
    column."""
    d = z.shape[-1]
    frequency = 100.0 ** -(torch.arange(d // 4) / (d // 4))
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], 1)
    turned = torch.complex(*z.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize(
    "kinds",
    [{}, {"norm": "rms", "mlp": "swiglu"}, {"qk_norm": "layer"}],
    ids=["", "rms,swiglu", "layer"],
)
@pytest.mark.parametrize("index", [0, 1])
def test_forward_and_gradients_equal_the_plain_network(index, kinds):
    stage = tiny_model(image_size=(16, 16) if index == 0 else (8, 8), **kinds).stages[index]
    x, t, y = images(3), torch.rand(3), torch.tensor([0, 2, 3])
    prior, prior_noise = (images(3, seed=1), torch.rand(3)) if index else (None, None)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours, plain = (
        stage(x, t, y, prior, prior_noise),
        plain_forward(stage, x, t, y, prior, prior_noise),
    )
    torch.testing.assert_close(ours, plain)
    parameters = dict(stage.named_parameters())
    gradients = torch.autograd.grad((ours * cotangent).sum(), parameters.values())
    expected = torch.autograd.grad((plain * cotangent).sum(), parameters.values())
    for name, gradient, reference in zip(parameters, gradients, expected):
        assert reference.abs().max() > 0, name
        # float32 sums over 3 x 64 tokens in another order: sqrt(192) eps = 1.7e-6 of the largest,
        # times the depth.
        bound = 8 * 192**0.5 * torch.finfo(torch.float32).eps * reference.abs().max()
        assert (gradient - reference).abs().max() <= bound, name


@pytest.mark.parametrize("positions", ["rope", "sincos"])
def test_position_matters_and_any_size_works(positions):
    stage = tiny_model(positions=positions).stages[0]
    x = images(1, (4, 10))
    t, y = torch.rand(1), torch.tensor([1])
    out = stage(x, t, y)
    assert out.shape == x.shape
    shuffled = stage(x.flip(3), t, y).flip(3)
    assert (out - shuffled).abs().max() > 1e-3


def test_without_labels_there_is_no_embedding_to_train():
    stage = tiny_model(num_classes=0).stages[0]
    assert stage.label_embedding is None
    assert stage(images(2), torch.rand(2)).shape == (2, 2, 8, 8)


@pytest.mark.parametrize("positions", ["rope", "sincos"])
@pytest.mark.filterwarnings("error:.*lru_cache")
def test_compiles_as_one_graph_with_its_position_table(positions):
    stage = tiny_model(positions=positions).stages[1]
    args = (images(2), torch.rand(2), torch.tensor([0, 1]), images(2, seed=1), torch.rand(2))
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), stage(*args))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_can_be_checkpointed(reentrant):
    stage = tiny_model().stages[0]
    block = stage.blocks[0]
    x, h, c = torch.randn(2, 16, 32), torch.randn(2, 16, 32), torch.randn(2, 32)

    def gradients(call):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, h, c)]
        sum(out.square().sum() for out in call(*inputs, (4, 4))).backward()
        found = [tensor.grad for tensor in (*inputs, *block.parameters())]
        block.zero_grad()
        return found

    again = gradients(partial(checkpoint, block, use_reentrant=reentrant))
    assert all(map(torch.equal, again, gradients(block)))


def test_a_block_has_nothing_but_our_operators_between_its_products():
    block = StageTransformer(tiny_config(), 0).blocks[0]
    x, h, c = torch.randn(2, 16, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    graph = torch.export.export(block, (x, h, c, None)).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    names = [str(call) for call in calls if call is not operator.getitem]
    assert names == [
        "aten.linear.default",  # the modulations
        "aten.chunk.default",
        "aten.linear.default",
        "msf.attention.default",
        "aten.linear.default",
        "msf.gate_residual_adaln.default",
        "aten.linear.default",
        "msf.bias_gelu.default",
        "aten.linear.default",
        "msf.gate_residual_adaln.default",
    ]


LAYERS_OF_A_BLOCK = pytest.mark.parametrize(
    "layer", ["attention.qkv", "attention.proj", "mlp.0", "mlp.2"]
)


class LoRA(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)  # plus what is learned, at first nothing


@LAYERS_OF_A_BLOCK
def test_a_linear_layer_put_in_place_adds_its_bias_once(layer):
    block = StageTransformer(tiny_config(), 0).blocks[0]
    parent, _, name = layer.rpartition(".")
    replaced = block.get_submodule(layer)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, h, c = torch.randn(2, 16, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    expected = block(x, h, c, None)
    lora = LoRA(replaced.in_features, replaced.out_features)
    lora.load_state_dict(replaced.state_dict())
    setattr(block.get_submodule(parent), name, lora)
    torch.testing.assert_close(block(x, h, c, None), expected)
    unbiased = nn.Linear(replaced.in_features, replaced.out_features, bias=False)
    setattr(block.get_submodule(parent), name, unbiased)
    assert all(out.isfinite().all() for out in block(x, h, c, None))


class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, *args):
        return self.base_layer(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layer_can_be_wrapped(dtype):
    """By a module that has neither its weight nor its bias."""
    stage = tiny_model().stages[1].to(dtype)
    args = (images(2), torch.rand(2), torch.tensor([0, 1]), images(2, seed=1), torch.rand(2))
    expected = stage(*args)
    for name, layer in reversed(list(stage.named_modules())):  # what is inside first
        if isinstance(layer, (nn.Linear, Attention, MLP)):
            parent, _, own = name.rpartition(".")
            setattr(stage.get_submodule(parent), own, Wrapper(layer))
            assert torch.equal(stage(*args), expected), name
    assert stage.is_trained
    compiled = torch.compile(stage, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*args), expected)


class Packed(nn.Module):
    """As torch's quantised layers: no parameters, and a method gives the weight."""

    def __init__(self, layer):
        super().__init__()
        self.packed = layer.weight.detach(), layer.bias.detach()

    def weight(self):
        return self.packed[0]

    def forward(self, x):
        return F.linear(x, *self.packed)


def test_layers_can_be_quantised():
    stage = tiny_model().stages[1]
    args = (images(2), torch.rand(2), torch.tensor([0, 1]), images(2, seed=1), torch.rand(2))
    expected = stage(*args)
    for name, layer in list(stage.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(stage.get_submodule(parent), own, Packed(layer))
    torch.testing.assert_close(stage(*args), expected)
    assert stage.is_trained


@LAYERS_OF_A_BLOCK
def test_a_bias_that_fsdp_has_freed_is_one_line(layer):
    """As where it wraps a layer, or the MLP, of a block alone, and not the block."""
    block = StageTransformer(tiny_config(), 0).blocks[0]
    block.get_submodule(layer).bias.untyped_storage().resize_(0)
    x, h, c = torch.randn(2, 16, 32), torch.randn(2, 16, 32), torch.randn(2, 32)
    with pytest.raises(ValueError, match="FSDP has freed a bias that its block still reads"):
        block(x, h, c, None)
