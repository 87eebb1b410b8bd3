"""Random streams are functions of their names."""

import numpy as np
import pytest

from reval_mcore.randomness import generator, stream_key


def test_a_stream_is_a_function_of_its_arguments() -> None:
    first = generator(1, "rollout", 3, "prompt").random(8)
    generator(1, "rollout", 4, "prompt").random(100)  # what others draw changes nothing
    assert np.array_equal(first, generator(1, "rollout", 3, "prompt").random(8))


def test_streams_differ_in_each_argument() -> None:
    names = [
        (1, "rollout", 3, "a"),
        (2, "rollout", 3, "a"),
        (1, "evaluation", 3, "a"),
        (1, "rollout", 4, "a"),
        (1, "rollout", 3, "b"),
        (1, "rollout", 3),
        (1, "rollout", "3", "a"),
        (1, "rollout", 3, "a", 0),
        (1, "rollout", "a", 3),
    ]
    keys = [stream_key(seed, purpose, *items) for seed, purpose, *items in names]  # pyright: ignore[reportArgumentType]
    assert len(set(keys)) == len(names)
    assert len({generator(0, "replay_sample", index).random() for index in range(1000)}) == 1000


def test_items_do_not_run_into_each_other() -> None:
    assert stream_key(0, "rollout", 1, 23) != stream_key(0, "rollout", 12, 3)
    assert stream_key(1, "rollout", 1) != stream_key(11, "rollout")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (stream_key(0, "prompt_order", 0), 0x6986397F070BDBB556C2F85EEBCEC276),
        (stream_key(7, "rollout", 3, "prompt-1"), 0x404C6F2DA127716AA5131BB991672C2E),
    ],
)
def test_keys_stay_what_they_were(key: int, value: int) -> None:
    """A change of them changes every resumed run."""
    assert key == value
