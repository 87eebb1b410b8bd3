"""`reval train` in several processes: the same run under every layout, killed, stopped, gone on with under another."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reval_mcore.mcore.topology import Topology
from reval_mcore.replay.shards import read_trajectories
from tests.distributed.launch import run_distributed
from tests.distributed.layout_cases import tensors_of
from tests.forks import Forks
from tests.integration.attempts import Attempt, attempt
from tests.integration.killed import Kill
from tests.integration.runs import checkpoint, differences, outcome, told
from tests.integration.test_train import SMALL, metrics, paths_of

pytestmark = [
    pytest.mark.timeout(1500),  # several runs a test; each has its own deadline
    pytest.mark.filterwarnings("ignore:`load_state_dict` is deprecated:FutureWarning"),  # megatron-core's
]

TP2 = ("parallel.tensor_model_parallel_size=2",)
DP2 = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
PP2 = ("parallel.pipeline_model_parallel_size=2",)
LAYOUTS: Mapping[str, tuple[int, tuple[str, ...]]] = {
    "tp2": (2, TP2),
    "dp2": (2, DP2),
    "pp2_dp2": (4, (*PP2, *DP2)),
    "tp2_pp2": (4, (*TP2, *PP2)),
}
DEADLINE_S = 300.0  # four processes on two cores that others use too
SAVING = ("checkpoint.keep=9", "checkpoint.async_save=true", "updates.passes=2")


def arguments_of(tiny_model: Path, run: Path, *overrides: str) -> tuple[str, ...]:
    return (*paths_of(tiny_model, run), *SMALL, *SAVING, *overrides)


def train(
    forks: Forks, tiny_model: Path, run: Path, num_processes: int, *overrides: str, kill: Kill | None = None
) -> Attempt:
    run.parent.mkdir(parents=True, exist_ok=True)
    arguments = ("train", "configs/demo.toml", *arguments_of(tiny_model, run, *overrides))
    return attempt(forks, run, arguments, kill, num_processes=num_processes, deadline_s=DEADLINE_S)


def finish(forks: Forks, tiny_model: Path, run: Path, num_processes: int, *overrides: str) -> str:
    """What it printed; it must end well."""
    done = train(forks, tiny_model, run, num_processes, *overrides)
    assert done.status == 0, done.told()
    return done.output


def trajectories(run: Path) -> list[tuple[str, list[int], float]]:
    """In the order of admission: the shards of an iteration by rank."""
    paths = sorted((run / "replay" / "shards").iterdir(), key=lambda path: path.stem.split("-")[::-1])
    return [
        (each.trajectory_id, each.response_tokens.tolist(), each.reward)
        for path in paths
        for each in read_trajectories(path)
    ]


def assert_same_run(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for record, other in zip(found, expected, strict=True):
        assert set(record) == set(other)
        for name, value in other.items():
            is_count = name.startswith(("collect/", "replay/", "evaluation/", "progress/")) or name == "iteration"
            if is_count:
                assert record[name] == pytest.approx(value, rel=1e-12), name
            elif not name.startswith("mismatch/"):  # rounding, and no more than that: it is compared with 0 below
                assert record[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
        assert record["mismatch/logprob_abs_max"] < 1e-4


@pytest.fixture(scope="module")
def alone(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one pass over each batch; every shard is kept."""
    run = tmp_path_factory.mktemp("alone") / "run"
    finish(forks, tiny_model, run, 1, "updates.passes=1")
    return run


@pytest.fixture(scope="module")
def under(
    forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, str]]:
    """(the run under a layout that nothing disturbed, what it printed); not to be written to."""

    @functools.cache
    def under(layout: str) -> tuple[Path, str]:
        num_processes, parallel = LAYOUTS[layout]
        run = tmp_path_factory.mktemp(layout) / "run"
        return run, finish(forks, tiny_model, run, num_processes, *parallel)

    return under


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_under_a_layout_is_the_run_of_one_process(
    alone: Path, under: Callable[[str], tuple[Path, str]], layout: str
) -> None:
    """The same prompts, responses, rewards and samples of the buffer; losses up to rounding."""
    run, said = under(layout)
    assert said.count("[4/4]") == said.count("finished;") == 1
    assert_same_run(metrics(run), metrics(alone))
    assert trajectories(run) == trajectories(alone)
    ranks = range(LAYOUTS[layout][0])
    shards = {path.name.partition("-")[0] for path in (run / "replay" / "shards").iterdir()}
    assert shards == {f"inline{rank:03d}" for rank in ranks}
    logs = {path.name for path in (run / "logs" / "attempt_000").iterdir()}
    assert logs == {f"rank_{rank:03d}.log" for rank in ranks}


# ---------------------------------------------------------------- ends, and going on


def test_a_signal_to_any_rank_stops_all_and_another_layout_goes_on(
    forks: Forks, alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    at_its_shard = Kill(r"rename .* -> replay/shards/inline001-0000-000002\.parquet", number=signal.SIGUSR1)
    stopped = train(forks, tiny_model, run, 2, *TP2, kill=at_its_shard)
    assert stopped.status == 0, stopped.told()
    record = json.loads((run / "control" / "exit.json").read_text())
    assert record == {"reason": "SIGUSR1", "iteration": 3}, stopped.told()
    finish(forks, tiny_model, run, 2, *DP2)
    assert_same_run(metrics(run), metrics(alone))


# each rank has a file to write, and only the first one publishes; a rank that is killed takes the others with it
IN_THE_BACKGROUND = (
    Kill(r"write checkpoints/\.writing_000004/weights/__1_0\.distcp"),
    Kill(r"fsync checkpoints/\.writing_000004/weights/__0_0\.distcp"),
    Kill(r"rename checkpoints/\.writing_000004 -> .*"),
)


def test_kills_while_several_processes_save_in_the_background(
    forks: Forks,
    alone: Path,
    under: Callable[[str], tuple[Path, str]],
    tiny_model: Path,
    tmp_path: Path,
    topology: Topology,
) -> None:
    """The checkpoint before counts: the same layout ends bit for bit as if nothing had been, another up to rounding."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere" / "run"
    for kill in IN_THE_BACKGROUND:
        killed = train(forks, tiny_model, run, 2, *TP2, kill=kill)
        assert killed.status != 0, killed.told()
        assert re.search(": before .*writing_000004", killed.death), killed.told()
        assert (run / "checkpoints" / "latest").readlink() == Path("step_000002")
    shutil.copytree(run, elsewhere, symlinks=True)
    finish(forks, tiny_model, elsewhere, 2, *DP2)
    assert_same_run(metrics(elsewhere), metrics(alone))
    finish(forks, tiny_model, run, 2, *TP2)
    assert told(differences(outcome(run), outcome(under("tp2")[0]))) == ""


def test_a_run_is_saved_the_same_by_every_layout_that_loads_it(
    forks: Forks, under: Callable[[str], tuple[Path, str]], tiny_model: Path, tmp_path: Path, topology: Topology
) -> None:
    """TP2 x PP2, DP2, one process, TP2 x PP2: every tensor, the replay index and the counters, to the last bit."""
    run = tmp_path / "run"
    shutil.copytree(under("tp2_pp2")[0], run, symlinks=True)
    for iteration, (num_processes, parallel) in enumerate([(2, DP2), (1, ()), LAYOUTS["tp2_pp2"]], start=5):
        arguments = [*arguments_of(tiny_model, run, *parallel)]
        case = {"arguments": arguments, "iteration": iteration}
        run_distributed(forks, "tests.integration.saved_again:save_again", num_processes, DEADLINE_S, case)
    num_rows = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    first, *others = (run / "checkpoints" / f"step_{iteration:06d}" for iteration in (4, 5, 6, 7))
    expected, tensors = checkpoint(first), tensors_of(first / "weights", num_rows)
    assert {"replay.npz", "trainer.json"} < set(expected)
    for other in others:
        found = checkpoint(other)
        assert told(differences(found["replay.npz"], expected["replay.npz"])) == ""
        assert found["trainer.json"] | {"iteration": 4} == expected["trainer.json"]
        again = tensors_of(other / "weights", num_rows)
        assert set(again) == set(tensors)
        assert [name for name in tensors if not torch.equal(again[name], tensors[name])] == []


# ---------------------------------------------------------------- what is wrong


def test_a_layout_without_its_processes_is_refused_before_any_group_is_made(
    forks: Forks, tiny_model: Path, tmp_path: Path
) -> None:
    refused = train(forks, tiny_model, tmp_path / "run", 2, "parallel.context_parallel_size=4")
    assert "one copy of the model takes 1 x 1 x 4 = 4 processes" in refused.output
    assert "choose sizes whose product is one of 1, 2" in refused.output
    assert not (tmp_path / "run").exists()


def test_what_the_first_rank_refuses_is_refused_by_all(
    forks: Forks, under: Callable[[str], tuple[Path, str]], tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(under("tp2")[0], run, symlinks=True)
    refused = train(forks, tiny_model, run, 2, *TP2, "objective.beta=0.7")
    assert refused.output.count("objective.beta = 0.7: the run was made with 0.5") == 2, refused.told()
    assert "[rank" not in refused.output, refused.told()  # how torch begins the lines of a traceback


# ---------------------------------------------------------------- learning

HALFWAY = 5
LEARNING = ("evaluation.interval=5", "evaluation.max_prompts=256")


def learn(forks: Forks, tiny_model: Path, run: Path, num_iterations: int, num_processes: int, *parallel: str) -> None:
    arguments = (*paths_of(tiny_model, run), f"run.num_iterations={num_iterations}", *LEARNING, *parallel)
    done = attempt(
        forks, run, ("train", "configs/demo.toml", *arguments), num_processes=num_processes, deadline_s=DEADLINE_S
    )
    assert done.status == 0, done.told()


@pytest.fixture(scope="module")
def halfway(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo after some iterations in one process, at about 0.5."""
    run = tmp_path_factory.mktemp("halfway") / "run"
    learn(forks, tiny_model, run, HALFWAY, 1)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [TP2, DP2], ids=["tp2", "dp2"])
def test_the_demo_learns_in_two_processes(
    forks: Forks, halfway: Path, tiny_model: Path, tmp_path: Path, parallel: tuple[str, ...]
) -> None:
    """From a checkpoint of one process; at least 0.10 in 15 iterations."""
    run = tmp_path / "run"
    shutil.copytree(halfway, run, symlinks=True)
    learn(forks, tiny_model, run, HALFWAY + 15, 2, *parallel)
    accuracy = [record["evaluation/accuracy"] for record in metrics(run) if "evaluation/accuracy" in record]
    print(parallel, accuracy)  # shown by -rP
    at_checkpoint = accuracy[HALFWAY // 5 - 1]
    assert 0.4 < at_checkpoint < 0.7
    assert accuracy[-1] - at_checkpoint > 0.10, accuracy
    residuals = [record["update/residual_abs"] for record in metrics(run)]
    assert np.isfinite(residuals).all()
