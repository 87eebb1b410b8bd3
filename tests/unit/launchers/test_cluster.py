"""Cluster files: what a user may say, and what is said to a user who errs."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from launchers.cluster import Cluster, dumps_cluster, load_cluster, parse_cluster
from reval_mcore.config import ConfigError

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "slurm" / "clusters").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_example_is_one_and_survives_being_written(path: Path) -> None:
    cluster = load_cluster(path)
    assert parse_cluster(tomllib.loads(dumps_cluster(cluster)), "again") == cluster


def test_there_is_an_example_of_h100s_with_eight_gpus_a_node() -> None:
    assert load_cluster(ROOT / "slurm" / "clusters" / "h100.toml").processes_per_node == 8


def test_everything_wrong_is_told_at_once() -> None:
    raw = {
        "slrum": {},
        "slurm": {"partiton": "x", "account": "a\nb", "gpu_option": "--gpus"},
        "node": {"gpus": "8"},
        "python": {},
        "environment": {"A B": "1"},
        "modules": ["cuda; rm -rf /"],
    }
    with pytest.raises(ConfigError) as caught:
        parse_cluster(raw, "my.toml")
    assert {problem.path for problem in caught.value.problems} == {
        *("slrum", "slurm.partiton", "slurm.account", "slurm.gpu_option", "node.gpus", "python.server"),
        *("environment", "modules"),
    }
    assert "did you mean slurm.partition?" in str(caught.value)


@pytest.mark.parametrize(
    ("container", "told"),
    [
        ({"image": "x.sqsh"}, 'kind = "none"'),
        ({"kind": "pyxis"}, "no image"),
        ({"kind": "apptainer", "image": "x.sif"}, "python.supervisor"),
    ],
)
def test_containers_that_cannot_be_meant(container: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_cluster({"python": {"server": "python3"}, "container": container}, "my.toml")


def cluster(**fields: object) -> Cluster:
    return parse_cluster({"python": {"server": "python3"}, **fields}, "my.toml")


def test_interpreters_are_words_or_paths() -> None:
    made = cluster(python={"server": "python3", "trainer": "/opt/bin/python"})
    assert made.server_python == "python3"
    assert made.trainer_python == made.supervisor_python == "/opt/bin/python"
    assert cluster().trainer_python == str(ROOT / ".venv" / "bin" / "python")


def test_servers_of_a_node() -> None:
    assert cluster(node={"gpus": 8}).num_servers(2) == 4
    assert cluster(node={"gpus": 0}).num_servers(2) == 1
    with pytest.raises(ValueError, match="give a divisor"):
        cluster(node={"gpus": 8}).num_servers(3)
