"""Randomness as a function of (seed, purpose, items): nothing to save, nothing that depends on rank or history.

Every random choice of a run names what it is for and what it is about, and gets a generator of its own. A resumed run,
or one with another parallel layout, draws the same numbers because it asks the same questions.
"""

from __future__ import annotations

import hashlib
import json
import operator
from typing import Literal

import numpy as np

Purpose = Literal[
    "prompt_order",
    "rollout",
    "evaluation",
    "replay_sample",
    "permute_rewards",
    "logit_check",
    "tiny_model",
    "tiny_prompts",
]


def stream_key(seed: int, purpose: Purpose, *items: int | str) -> int:
    """128-bit key of the stream (seed, purpose, items). `items` name the thing drawn for: an iteration, a prompt id."""
    parts = [seed, purpose, *(item if isinstance(item, str) else operator.index(item) for item in items)]
    text = json.dumps(parts)  # tells 3 from "3", and one item from two
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, purpose: Purpose, *items: int | str) -> np.random.Generator:
    """A numpy generator (Philox, counter based) that is a function of its arguments alone."""
    return np.random.Generator(np.random.Philox(key=stream_key(seed, purpose, *items)))
