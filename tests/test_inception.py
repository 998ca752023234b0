"""FID's network: its structure, its input, and the files of its weights."""

import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from msf.evaluation.inception import Block, Inception, average_pool, extract, load_inception, resize


@pytest.fixture(scope="module")
def network(inception_weights):
    return load_inception(inception_weights)


def test_parameters_are_those_of_inception_v3(network):
    # torchvision's has 23,834,568 without its auxiliary classifier, for 1,000 classes, not 1,008.
    assert sum(x.numel() for x in network.parameters()) == 23_834_568 + 8 * 2049
    names = network.state_dict()
    assert names["Mixed_5b.branch5x5_2.conv.weight"].shape == (64, 48, 5, 5)
    assert names["Mixed_6a.branch3x3.conv.weight"].shape == (384, 288, 3, 3)
    assert names["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert names["Mixed_6e.branch7x7dbl_5.bn.running_var"].shape == (192,)
    assert names["Mixed_7a.branch7x7x3_4.conv.weight"].shape == (192, 192, 3, 3)
    assert names["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert names["fc.weight"].shape == (1008, 2048)
    assert network.Mixed_7b.branch1x1.bn.eps == 1e-3
    assert not network.training and not any(x.requires_grad for x in network.parameters())


def test_features(network):
    inside = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: inside.update({name: out}))
        for name, module in network.named_modules()
    ]
    images = torch.randint(0, 256, (2, 3, 40, 30), dtype=torch.uint8)
    pool, spatial = extract(network, images)
    for hook in hooks:
        hook.remove()
    assert pool.shape == (2, 2048) and spatial.shape == (2, 17 * 17 * 7)
    assert torch.equal(pool, inside["Mixed_7c"].mean((2, 3)))
    assert inside["Mixed_5d"].shape[1:] == (288, 35, 35)
    assert inside["Mixed_6e"].shape[1:] == (768, 17, 17)
    assert inside["Mixed_7c"].shape[1:] == (2048, 8, 8)
    # TensorFlow's images have their channels last.
    one = spatial.view(2, 17, 17, 7)[1, 4, 9]
    assert torch.equal(one, inside["Mixed_6d.branch1x1"][1, :7, 4, 9])
    assert one.std() > 0.01 and pool.std() > 0.01


def test_input_is_centred_at_128(network):
    seen = []
    hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    extract(network, torch.tensor([128, 0, 255], dtype=torch.uint8).view(1, 3, 1, 1))
    hook.remove()
    (x,) = seen
    assert x.shape == (1, 3, 299, 299)
    assert [channel.unique().tolist() for channel in x[0]] == [[0.0], [-1.0], [127 / 128]]


def test_pools(network):
    ones, impulse = torch.ones(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    impulse[..., 2, 2] = 1
    average = [network.Mixed_5b, network.Mixed_6e, network.Mixed_7b]
    for block in average:
        assert torch.allclose(block.pool(ones), ones)  # padding does not count
        assert torch.allclose(block.pool(impulse).max(), torch.tensor(1 / 9))
    assert network.Mixed_7c.pool(impulse).sum() == 9  # the maximum, in 3x3 places
    for block in (network.Mixed_6a, network.Mixed_7a):
        assert block.pool(ones).shape == (1, 1, 2, 2)


def test_branches_are_concatenated_in_order():
    branches = {"one": "2 1x1", "two": "3 1x1, 2 1x3 + 4 3x1", "branch_pool": ""}
    block = Block(5, branches, average_pool).double().eval()
    for name, x in block.state_dict().items():
        if not name.endswith("tracked"):
            x.uniform_(0.5, 1.5)
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)

    def convolution(name, x, padding=0):
        conv, bn = getattr(block, name).conv.weight, getattr(block, name).bn
        y = F.conv2d(x, conv, padding=padding)
        scale = bn.weight / (bn.running_var + 1e-3).sqrt()
        scale, shift = (v.view(-1, 1, 1) for v in (scale, bn.bias - bn.running_mean * scale))
        return (y * scale + shift).relu()

    inside = convolution("two_1", x)
    expected = [
        convolution("one", x),
        convolution("two_2a", inside, (0, 1)),
        convolution("two_2b", inside, (1, 0)),
        F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    ]
    torch.testing.assert_close(block(x), torch.cat(expected, 1))
    assert block.out_channels == 2 + 2 + 4 + 5


@pytest.mark.parametrize("n", [1, 8, 64, 299, 400])
def test_resize_takes_pixel_i_at_i_times_n_over_299(n):
    x = torch.rand(1, 1, n, 3) * 255
    y = resize(x.expand(1, 2, n, 3))
    for i in (0, 1, 100, 297, 298):
        at = torch.tensor(i) * torch.tensor(n / 299)  # in float32, as TensorFlow does
        low = int(at)
        high, weight = min(low + 1, n - 1), float(at) - low
        expected = x[0, 0, low, 0] * (1 - weight) + x[0, 0, high, 0] * weight
        assert float(y[0, 1, i, 0]) == pytest.approx(float(expected), abs=1e-4)


def test_resize_does_not_filter():
    x = torch.rand(1, 3, 598, 897)
    assert torch.equal(resize(x), x[:, :, ::2, ::3])


def test_weights_in_either_format(inception_weights, network, tmp_path):
    weights = torch.load(inception_weights)
    save_file(weights, tmp_path / "weights.safetensors")
    other = load_inception(tmp_path / "weights.safetensors")
    assert torch.equal(other.fc.weight, network.fc.weight)
    before = torch.get_rng_state()
    assert torch.equal(load_inception(inception_weights).fc.bias, weights["fc.bias"])
    assert torch.equal(torch.get_rng_state(), before)


def test_other_weights_are_refused_in_one_line(inception_weights, tmp_path, recwarn):
    file = tmp_path / "weights.pth"

    def refused(line):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: {line}')}") as error:
            load_inception(file)
        assert "\n" not in str(error.value)

    refused("no such file; get pt_inception-2015-12-05-6726825d.pth of pytorch-fid's releases")
    os.mkfifo(file)
    refused("is no file")
    file.unlink()
    for junk in (b"", b"weights", b"PK\3\4" + bytes(100)):
        file.write_bytes(junk)
        refused("not a readable file of weights; get pt_")
    torch.save([1, 2], file)
    refused("holds a list, not weights; get pt_")
    torch.save(Inception, file)  # would run code
    refused("not a readable file of weights; get pt_")
    file.write_bytes(pickle.dumps([1, 2], protocol=4))
    refused("not a readable file of weights; get pt_")
    assert not recwarn.list
    weights = torch.load(inception_weights)
    torch.save({**weights, "fc.weight": torch.zeros(1000, 2048)}, file)
    refused("fc.weight must be [1008, 2048], got [1000, 2048], in FID's network; get pt_")
    del weights["Mixed_7c.branch_pool.bn.bias"]
    torch.save(weights, file)
    refused("Mixed_7c.branch_pool.bn.bias must be [192], got none, in FID's network; get pt_")
    weights = torch.load(inception_weights)
    weights["fc.bias"][3] = torch.nan
    torch.save(weights, file)
    refused("fc.bias must be finite, but holds NaN or infinity")
