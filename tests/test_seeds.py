import torch

from msf.seeds import generator


def draw(*key):
    return torch.randn(4, generator=generator(*key))


def test_same_key_same_numbers():
    assert torch.equal(draw(3, 1), draw(3, 1))


def test_seeds_and_purposes_do_not_collide():
    # Each of these pairs is one sequence when seed and purpose are simply put in a row.
    for a, b in [((5 + 2**32, 1), (5, 1, 1)), ((0, 1), (0, 1, 0)), ((1,), (1, 0)), ((0,), (0, 0))]:
        assert not torch.equal(draw(*a), draw(*b)), (a, b)
