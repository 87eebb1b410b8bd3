"""How often trajectories are used again, in numbers: what makes the method off-policy, and whether it happens."""

from __future__ import annotations

import numpy as np

from reval_mcore.replay.rows import RowTable

# shares of live rows that were in so many updates; the last counts all above
_TIMES_SAMPLED = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16))


def reuse_statistics(table: RowTable, policy_version: int, *, num_uses: int, num_admitted: int) -> dict[str, float]:
    """Ages are in policy versions before `policy_version`. Means over nothing are 0.

    `num_uses` counts a trajectory once for each update that it was in: over those admitted it is the replay ratio.
    """
    live = table["is_live"]
    ages, times = policy_version - table["policy_version"][live], table["times_sampled"][live]
    size = max(len(ages), 1)
    percentiles = np.percentile(ages, (50, 95)) if len(ages) else np.zeros(2)
    return {
        "size": float(len(ages)),
        "replay_ratio": num_uses / max(num_admitted, 1),
        "age_mean": float(ages.sum() / size),
        "age_p50": float(percentiles[0]),
        "age_p95": float(percentiles[1]),
        "age_max": float(ages.max(initial=0)),
        "times_sampled_mean": float(times.sum() / size),
        **{f"times_sampled_share/{name}": share / size for name, share in times_sampled_histogram(times).items()},
    }


def times_sampled_histogram(times: np.ndarray) -> dict[str, int]:
    """Number of rows by how often they were sampled: "0", "1", "2", "3-4", ..., "17+"."""
    ends = np.array([last for _, last in _TIMES_SAMPLED])
    counts = np.bincount(np.searchsorted(ends, times), minlength=len(ends) + 1)
    names = [str(first) if first == last else f"{first}-{last}" for first, last in _TIMES_SAMPLED]
    return dict(zip([*names, f"{ends[-1] + 1}+"], counts.tolist(), strict=True))
