"""Which rows are drawn, against the formulas and by statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reval_mcore.randomness import generator
from reval_mcore.replay.samplers import PrioritizedSampler, Sampler, UniformSampler

PRIORITIZED = PrioritizedSampler(beta=0.5, exponent=0.6, epsilon=0.01, tau_versions=3.0)
SAMPLERS = pytest.mark.parametrize("sampler", [UniformSampler(), PRIORITIZED], ids=["uniform", "prioritized"])


def stream(*items: int) -> np.random.Generator:
    return generator(3, "replay_sample", *items)


@SAMPLERS
@given(
    weights=st.lists(st.one_of(st.just(0.0), st.floats(1e-150, 1e3)), max_size=30),
    n=st.integers(0, 40),
    update_index=st.integers(0, 10**6),
)
def test_without_replacement_and_a_function_of_its_arguments(
    sampler: Sampler, weights: list[float], n: int, update_index: int
) -> None:
    array = np.array(weights)
    drawn = sampler.draw(array, n, stream(update_index))
    assert drawn.dtype == np.int64
    assert len(drawn) == len(set(drawn.tolist())) == min(n, np.count_nonzero(array))
    assert (array[drawn] > 0.0).all()
    np.testing.assert_array_equal(sampler.draw(array, n, stream(update_index)), drawn)
    np.testing.assert_array_equal(array, weights)


@SAMPLERS
def test_other_streams_draw_other_rows(sampler: Sampler) -> None:
    draws = [sampler.draw(np.ones(1000), 20, stream(*items)) for items in [(0, 0), (1, 0), (0, 1)]]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


@SAMPLERS
def test_equal_weights_by_chi_square(sampler: Sampler) -> None:
    """2,000 draws of 16 of 64 rows: inclusion is uniform, and so is the first place. 63 degrees of freedom."""
    draws = np.stack([sampler.draw(np.ones(64), 16, stream(update)) for update in range(2000)])
    for found, total, scale in ((draws, 32_000, 48 / 63), (draws[:, 0], 2000, 1.0)):
        counts = np.bincount(found.ravel(), minlength=64)
        expected = total / 64
        # without replacement the variance of a count is (1 - n/N) of the expectation, not (1 - 1/N)
        chi_square = ((counts - expected) ** 2).sum() / expected / scale
        assert 30 < chi_square < 110, chi_square  # outside with probability below 1e-3


@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.0, 3.0, 0.5), (1e-3, 1.0, 1e3, 1.0, 1e-3)], ids=["mild", "steep"])
def test_prioritized_by_chi_square(weights: tuple[float, ...]) -> None:
    """Every ordered triple against its probability, row after row in proportion to the weights that are left."""
    array, total = np.array(weights), 8000
    expected: dict[tuple[int, ...], float] = {}
    for triple in itertools.permutations(np.flatnonzero(array).tolist(), 3):
        left, probability = array.copy(), float(total)
        for place in triple:
            probability *= left[place] / left.sum()
            left[place] = 0.0
        expected[triple] = probability
    counts = dict.fromkeys(expected, 0)
    for update in range(total):
        counts[tuple(PRIORITIZED.draw(array, 3, stream(update)).tolist())] += 1
    likely = [triple for triple in expected if expected[triple] >= 5.0]
    assert sum(counts[triple] for triple in expected if triple not in likely) <= 30
    degrees = len(likely) - 1
    chi_square = sum((counts[triple] - expected[triple]) ** 2 / expected[triple] for triple in likely)
    assert chi_square < degrees + 4.0 * np.sqrt(2.0 * degrees) + 5.0, (chi_square, degrees)


def test_inclusion_at_a_realistic_size() -> None:
    """4,000 draws of 8 of 5,000 rows under priorities of four orders of magnitude: the first place in ten bands."""
    rng = np.random.default_rng(0)
    weights = np.exp(rng.normal(0.0, 2.0, 5000))
    first = np.array([PRIORITIZED.draw(weights, 8, stream(update))[0] for update in range(4000)])
    bands = np.argsort(np.argsort(weights)) // 500
    expected = np.bincount(bands, weights) / weights.sum() * len(first)
    counts = np.bincount(bands[first], minlength=10)
    seen = expected >= 5.0
    chi_square = ((counts - expected) ** 2 / expected)[seen].sum()
    assert chi_square < 30.0, chi_square  # at most 9 degrees of freedom: outside with probability below 1e-3


def test_priorities_and_ages_by_the_formula() -> None:
    residuals = np.array([0.0, -3.0, 10.0])
    expected = [0.01**0.6, 1.51**0.6, 5.01**0.6]
    np.testing.assert_allclose(PRIORITIZED.priority(residuals), expected, rtol=1e-14)
    np.testing.assert_allclose(PRIORITIZED.age_factor(np.array([0, 3, 6])), np.exp([0.0, -1.0, -2.0]), rtol=1e-14)
    assert PRIORITIZED.age_factor(np.array([10**6]))[0] == 1e-150  # old, and still a row
    assert UniformSampler().priority(residuals).tolist() == [1.0] * 3
    assert UniformSampler().age_factor(np.array([0, 1000])).tolist() == [1.0] * 2
