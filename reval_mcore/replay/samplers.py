"""Which live rows go into an update. A sampler keeps nothing between draws: a resumed run draws the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np

from reval_mcore.randomness import generator

SamplerName = Literal["uniform"]


class Sampler(Protocol):
    def sample(self, rows: np.ndarray, n: int, *, update_index: int, num_admitted: int) -> np.ndarray:
        """min(n, len(rows)) different rows of `rows` (int64), in random order; a function of its arguments."""
        ...


class UniformSampler:
    """Every set of n rows is equally likely."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def sample(self, rows: np.ndarray, n: int, *, update_index: int, num_admitted: int) -> np.ndarray:
        assert n >= 0, f"cannot draw {n} rows"
        stream = generator(self._seed, "replay_sample", update_index, num_admitted)
        return stream.choice(rows, size=min(n, len(rows)), replace=False)


SAMPLERS: Mapping[SamplerName, Callable[[int], Sampler]] = {"uniform": UniformSampler}
"""By the name in replay.sampler; each takes the run's seed."""
