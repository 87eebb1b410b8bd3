from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reval_mcore.replay.samplers import SAMPLERS, UniformSampler


@given(
    rows=st.sets(st.integers(0, 2**40), max_size=30),
    n=st.integers(0, 40),
    seed=st.integers(0, 2**40),
    update_index=st.integers(0, 10**6),
    num_admitted=st.integers(0, 10**6),
)
def test_without_replacement_and_a_function_of_its_arguments(
    rows: set[int], n: int, seed: int, update_index: int, num_admitted: int
) -> None:
    live = np.array(sorted(rows), dtype=np.int64)
    place = {"update_index": update_index, "num_admitted": num_admitted}
    sampler = UniformSampler(seed)
    drawn = sampler.sample(live, n, **place)
    assert drawn.dtype == np.int64
    assert len(drawn) == len(set(drawn.tolist())) == min(n, len(live))
    assert set(drawn.tolist()) <= rows
    sampler.sample(live, n, update_index=update_index + 1, num_admitted=num_admitted)  # no state is kept
    np.testing.assert_array_equal(sampler.sample(live, n, **place), drawn)
    np.testing.assert_array_equal(SAMPLERS["uniform"](seed).sample(live, n, **place), drawn)


def test_every_argument_matters() -> None:
    live = np.arange(1000, dtype=np.int64)
    draws = [
        UniformSampler(seed).sample(live, 20, update_index=update, num_admitted=position)
        for seed, update, position in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_uniform_by_chi_square() -> None:
    """2,000 draws of 16 of 64 rows: inclusion is uniform, and so is the first place. 63 degrees of freedom."""
    live = np.arange(100, 164, dtype=np.int64)
    sampler = UniformSampler(3)
    draws = np.stack([sampler.sample(live, 16, update_index=u, num_admitted=9) for u in range(2000)]) - 100
    for found, total, scale in ((draws, 32_000, 48 / 63), (draws[:, 0], 2000, 1.0)):
        counts = np.bincount(found.ravel(), minlength=64)
        expected = total / 64
        # without replacement the variance of a count is (1 - n/N) of the expectation, not (1 - 1/N)
        chi_square = ((counts - expected) ** 2).sum() / expected / scale
        assert 30 < chi_square < 110, chi_square  # outside with probability below 1e-3
