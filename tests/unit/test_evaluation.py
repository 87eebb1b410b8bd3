"""pass@k against enumeration."""

from __future__ import annotations

import itertools

import pytest

from reval_mcore.evaluation import pass_at_k


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1), (8, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int) -> None:
    samples = [i < c for i in range(n)]
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
