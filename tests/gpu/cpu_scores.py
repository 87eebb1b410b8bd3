"""The learner's scores on the CPU, for comparison: runs in a process that sees no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.topology import open_topology
from tests.builders import make_batch, make_config


def score(hf_path: str, out: str) -> None:
    with open_topology() as topology:
        assert topology.device.type == "cpu"
        scores = Learner(make_config(Path(hf_path)), topology).score(make_batch(20))
    np.savez(
        out,
        trajectory_score=scores.trajectory_score,
        initial_value=scores.initial_value,
        final_value=scores.final_value,
        logprobs=scores.logprobs,
    )
