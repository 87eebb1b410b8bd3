"""What the end of a trainer means, and what preflight makes of what nodes say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launchers.cluster import Cluster, parse_cluster
from launchers.preflight import Report, failures_of
from launchers.supervisor import End, judge

CLUSTER: Cluster = parse_cluster({"python": {"server": "python3"}, "node": {"gpus": 2}}, "test")
FIT = Report(
    node="n1",
    is_canary_seen=True,
    free_disk_gib=100.0,
    num_free_ports=32,
    gpu_memory_in_use_mib=(3, 4),
    versions={"torch": "2.13.0", "sglang": "0.5.23"},
    all_reduce="passed",
)


def end(**changes: object) -> End:
    facts: dict[str, object] = {
        **{"reason": None, "asked_for": None, "status": 1, "is_newer": False, "is_node_lost": False, "detail": ""},
        **changes,
    }
    return judge(**facts)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("facts", "standing"),
    [
        ({"reason": "finished"}, "finished"),
        ({"reason": "finished", "asked_for": "time_limit"}, "finished"),  # it came to its end first
        ({"reason": "time_limit", "asked_for": "time_limit"}, "requeued"),
        ({"reason": "SIGUSR1", "asked_for": "time_limit"}, "requeued"),  # where Slurm gave it to the ranks too
        ({"reason": "stop", "asked_for": "too_few_rollout_nodes", "is_newer": True}, "requeued"),
        ({"reason": "stop", "asked_for": "too_few_rollout_nodes", "is_node_lost": True}, "requeued"),
        ({"reason": "stop", "asked_for": "too_few_rollout_nodes"}, "failed"),  # its servers never start
        ({"reason": "stopped by its user"}, "stopped"),
        ({"reason": "SIGTERM", "asked_for": "SIGTERM"}, "cancelled"),
        ({"asked_for": "SIGTERM"}, "cancelled"),  # killed before it could save
        ({}, "failed"),
        ({"status": 0}, "failed"),  # 0 and no record: srun says so where its node has died
        ({"reason": "error"}, "failed"),
        ({"reason": "error", "is_newer": True}, "requeued"),
        ({"is_newer": True}, "requeued"),
        ({"is_node_lost": True}, "requeued"),
        ({"asked_for": "time_limit"}, "failed"),  # it died while it was to stop, and saved nothing
        ({"asked_for": "time_limit", "is_newer": True}, "requeued"),
    ],
)
def test_what_an_end_means(facts: dict[str, object], standing: str) -> None:
    assert end(**facts).standing == standing


def test_only_failures_count_as_failures() -> None:
    assert not end(reason="time_limit", asked_for="time_limit").is_failure
    assert end(is_newer=True).is_failure
    assert end(is_node_lost=True).is_failure


def failures(*reports: Report, nodes: tuple[str, ...] = ("n1", "n2", "n3")) -> list[str]:
    return failures_of({report.node: report for report in reports}, nodes, CLUSTER)


def fit(node: str) -> Report:
    return replace(FIT, node=node)


def test_fit_nodes_pass() -> None:
    assert failures(fit("n1"), fit("n2"), replace(fit("n3"), all_reduce="not done")) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_canary_seen": False}, "shared filesystem"),
        ({"free_disk_gib": 1.0}, "node.min_free_disk_gib"),
        ({"num_free_ports": 0}, "no free port"),
        ({"gpu_memory_in_use_mib": (3,)}, "has 1 GPUs"),
        ({"gpu_memory_in_use_mib": (3, 40_000)}, "GPU 1: 40000 MiB"),
        ({"versions": {"torch": "2.12.0", "sglang": "0.5.23"}}, "torch 2.12.0, others have 2.13.0"),
        ({"versions": {"torch": "2.13.0", "sglang": "not there: no such file"}}, "SGLang in python.server"),
        ({"all_reduce": "not answered in time"}, "all-reduce"),
        ({"clock_difference_s": -60.0}, "its clock differs by -60.0 s"),
    ],
)
def test_an_unfit_node_is_named(changes: dict[str, object], told: str) -> None:
    found = failures(fit("n1"), replace(fit("n2"), **changes), fit("n3"))  # pyright: ignore[reportArgumentType]
    assert found
    assert all(text.startswith("n2: ") for text in found)
    assert any(told in text for text in found)


def test_a_silent_node_is_named() -> None:
    (told,) = failures(fit("n1"), fit("n3"))
    assert told.startswith("n2: said nothing")
