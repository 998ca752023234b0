from itertools import combinations, product

from pairwise import pairwise_rows


def test_any_two_values_are_together_in_few_rows() -> None:
    factors = ("abc", "de", range(4), (None, True))
    rows = pairwise_rows(*factors)
    for (i, first), (j, second) in combinations(enumerate(factors), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(first, second))
    assert len(rows) < 3 * 2 * 4 * 2 / 2
