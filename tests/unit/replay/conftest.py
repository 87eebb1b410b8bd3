"""Trajectories small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from reval_mcore.records import Trajectory, VersionSpan

MakeGroup = Callable[..., list[Trajectory]]


@pytest.fixture(scope="session")
def make_group() -> MakeGroup:
    """make_group(name, size=1, version=0): trajectories name/0, name/1, ...; contents are a function of the name."""

    def make(name: str, *, size: int = 1, version: int = 0) -> list[Trajectory]:
        rng = np.random.default_rng(list(name.encode()))
        lengths = rng.integers(1, 6, size=size)
        return [
            Trajectory(
                trajectory_id=f"{name}/{index}",
                prompt_id=name,
                group_id=name,
                sample_index=index,
                prompt_tokens=rng.integers(0, 50_000, size=3, dtype=np.int32),
                response_tokens=rng.integers(0, 50_000, size=length, dtype=np.int32),
                loss_mask=rng.random(length) < 0.8,
                rollout_logprobs=-rng.random(length, dtype=np.float32),
                version_spans=(VersionSpan(version, 0, int(length)),),
                reward=float(index % 2),
                group_reward_mean=0.5,
                group_reward_std=0.5,
                group_size=size,
                finish_reason="stop",
                verdict="correct" if index % 2 else "wrong",
                verifier_version="1",
                answer="42",
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                collected_at=1.5,
            )
            for index, length in enumerate(lengths)
        ]

    return make
