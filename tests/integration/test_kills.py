"""A run that is killed, and started again by the same command, ends as if it had not been: bit for bit.

The same weights, reference, optimizer and schedule, replay index, trajectories, counters, metrics and summary; and
nothing lies about that would not have. What is random about a case is a function of SEED and its number: a case that
fails can be run again alone, by its number. `--num-kills N` says how many there are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.mcore.topology import Topology
from tests.forks import Forks
from tests.integration.attempts import Attempt, Moment, attempt, moments
from tests.integration.killed import START, Kill
from tests.integration.runs import differences, outcome, told

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`load_state_dict` is deprecated:FutureWarning"),  # megatron-core's
]

SEED = 0
AT_A_TIME = 2  # processes
SMALL = (
    "run.num_iterations=8",
    "rollout.num_prompts=4",
    "rollout.num_responses=3",
    "replay.capacity=28",  # two iterations and a third: shards are evicted in the middle, and removed
    "replay.unlink_delay_s=0",
    "replay.max_memory_gib=1e-9",  # one shard at a time
    "updates.batch_size=12",
    "updates.per_iteration=2",
    "optimizer.schedule=cosine",
    "optimizer.warmup_updates=3",
    "reference.reset_interval=3",
    "evaluation.interval=2",
    "evaluation.max_prompts=6",
    "evaluation.num_samples=1",
    "evaluation.pass_at_k=[1]",
    "checkpoint.interval=2",
    "logging.mismatch_trajectories=4",
)


@dataclass(frozen=True)
class Mode:
    """What is different from run to run."""

    refresh: str  # of reference scores
    in_background: bool  # checkpoints

    @property
    def overrides(self) -> tuple[str, ...]:
        sampler = {"eager": (), "lazy": ("replay.sampler=prioritized", "replay.importance_exponent=0.4")}
        background = str(self.in_background).lower()
        return (f"reference.refresh={self.refresh}", f"checkpoint.async_save={background}", *sampler[self.refresh])


MODES = (Mode("eager", False), Mode("lazy", True), Mode("lazy", False), Mode("eager", True))


@dataclass(frozen=True)
class Run:
    """A run directory, and the processes that worked in it."""

    mode: Mode
    path: Path
    attempts: tuple[Attempt, ...]

    @property
    def deaths(self) -> str:
        return "".join(f"  killed {each.death}\n" for each in self.attempts[:-1])

    def told(self) -> str:
        return f"{self.mode}, {self.path}\n{self.deaths}the last attempt: {self.attempts[-1].told()}"


@dataclass(frozen=True)
class Whole:
    """A run that nothing disturbed."""

    run: Run
    moments: tuple[Moment, ...]
    outcome: Mapping[str, Any]


Train = Callable[[str, Mode, Sequence[Kill]], Run]


@pytest.fixture(scope="module")
def train(forks: Forks, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The run of a name and a mode: one process for each kill, and one more that comes to the end."""
    root = tmp_path_factory.mktemp("kills")

    def train(name: str, mode: Mode, kills: Sequence[Kill]) -> Run:
        path = root / name / "run"
        path.parent.mkdir()
        prompts = tiny_model / "prompts"
        files = (f"model.hf_path={tiny_model}", f"prompts.train={prompts}/train.jsonl")
        more = (f"prompts.held_out={prompts}/held_out.jsonl", f"run.directory={path}")
        arguments = ("train", "configs/demo.toml", *files, *more, *SMALL, *mode.overrides)
        attempts = [attempt(forks, path, arguments, kill) for kill in (*kills, None)]
        return Run(mode, path, tuple(attempts))

    return train


def side_by_side(tasks: Sequence[Callable[[], Run]]) -> list[Run]:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


@pytest.fixture(scope="module")
def wholes(train: Train, topology: Topology) -> dict[Mode, Whole]:
    names = [f"whole-{number}" for number in range(len(MODES))]
    runs = side_by_side([lambda n=n, m=m: train(n, m, ()) for n, m in zip(names, MODES, strict=True)])
    for run in runs:
        assert run.attempts[0].status == 0, run.told()
    return {run.mode: Whole(run, tuple(moments(run.attempts[0].events)), outcome(run.path)) for run in runs}


def check(run: Run, whole: Whole) -> None:
    """All attempts but the last were killed, each one went on from its checkpoint, and the end is that of `whole`."""
    *killed, last = run.attempts
    print(f"{run.mode}\n{run.deaths}")  # shown by -rP
    assert all(each.was_killed for each in killed), run.told()
    assert last.status == 0, run.told()
    records = whole.outcome["metrics"]
    for each in run.attempts:
        for resumed in each.resumes:
            before = records[resumed["iteration"] - 1]
            assert resumed["adam_steps"] == [resumed["num_updates"]], run.told()  # no update is skipped here
            assert resumed["num_updates"] == before["progress/num_updates"], run.told()
            assert resumed["iteration"] - resumed["reference_version"] == before["progress/reference_age"], run.told()
    found = told(differences(outcome(run.path), whole.outcome))
    assert found == "", f"{found}\n{run.told()}"


# ---------------------------------------------------------------- what nothing disturbed


def test_the_runs_have_all_that_a_kill_can_hit(wholes: dict[Mode, Whole]) -> None:
    for mode, whole in wholes.items():
        records = whole.outcome["metrics"]
        rates = [record["update/learning_rate"] for record in records]
        assert rates[0] < rates[1] > rates[2] > rates[-1]  # a warm-up, and a fall
        assert all(record["update/grad_norm"] > 0.0 for record in records)
        assert whole.outcome["summary"]["reference_resets"] == 2
        assert list(whole.outcome["checkpoints"]) == ["step_000006", "step_000008"]
        assert whole.outcome["replay"]["first_live_row"] % 12 != 0  # in the middle of a shard
        happened = {moment.event for moment in whole.moments}
        assert {f"enter {name}" for name in (START, *PHASES)} <= happened
        assert {
            "remove replay/shards/inline000-0000-000000.parquet",
            "rename checkpoints/.latest -> checkpoints/latest",
        } <= happened
        checkpoint = whole.outcome["checkpoints"]["step_000008"]
        groups = checkpoint["weights"]["optimizer"]["optimizer"]["optimizer"]["param_groups"]
        assert [group["step"] for group in groups] == [16.0] * len(groups), mode


@pytest.mark.parametrize("refresh", ["eager", "lazy"])
def test_saving_in_the_background_changes_nothing(wholes: dict[Mode, Whole], refresh: str) -> None:
    at_once, in_background = (dict(wholes[Mode(refresh, choice)].outcome) for choice in (False, True))
    found = [line for line in differences(in_background, at_once) if not line.startswith("/checkpoints/")]
    assert found == []
    pairs = zip(at_once["checkpoints"].values(), in_background["checkpoints"].values(), strict=True)
    for one, other in pairs:
        assert list(differences(one, other)) == ["/config.toml/checkpoint/async_save: False, not True"]


# ---------------------------------------------------------------- one kill at a random moment

PHASES = ("collect", "admit", "score", "mismatch", "update", "weights", "reset", "evaluate", "checkpoint")


@dataclass(frozen=True)
class Case:
    number: int
    mode: Mode
    place: str
    kill: Kill


def _at(*starts: str) -> Callable[[Sequence[Moment]], list[Moment]]:
    return lambda happened: [moment for moment in happened if moment.event.startswith(starts)]


def _at_file(folder: str) -> Callable[[Sequence[Moment]], list[Moment]]:
    return _at(*(f"{verb} {folder}" for verb in ("write", "fsync", "rename", "remove", "mkdir", "link")))


def _at_reset(happened: Sequence[Moment]) -> list[Moment]:
    """The reset itself, its end, and the sweep over the buffer where one follows."""
    places = [place for place, moment in enumerate(happened) if moment.event == "enter reset"]
    near = [happened[place + offset] for place in places for offset in (0, 1, 2)]
    return _at("enter reset", "leave reset", "enter score")(near)


# in this order the first eight are what a run does; a checkpoint is both a phase and its files
PLACES: dict[str, Callable[[Sequence[Moment]], list[Moment]]] = {
    "generation": _at("enter collect"),
    "scoring": _at("enter score"),
    "shards and journal": _at_file("replay/"),
    "update": _at("enter update"),
    "checkpoint": _at("enter checkpoint", "leave checkpoint"),
    "reset": _at_reset,
    "evaluation": _at("enter evaluate"),
    "weights to the engine": _at("tensor "),
    "files of a checkpoint": _at_file("checkpoints/"),
    "anything": _at(""),
}


def case_of(number: int, wholes: Mapping[Mode, Whole]) -> Case:
    """Places take turns, and so do the modes at a place; the rest is random."""
    generator = random.Random(f"{SEED}, {number}")
    place = list(PLACES)[number % len(PLACES)]
    mode = MODES[(number + number // len(PLACES)) % len(MODES)]
    # sorted: what is written in the background has no fixed place among the rest
    candidates = sorted(PLACES[place](wholes[mode].moments), key=lambda moment: (moment.event, moment.occurrence))
    moment = generator.choice(candidates)
    return Case(number, mode, place, moment.kill(generator.random()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Kills go in pairs: two processes side by side."""
    if "numbers" in metafunc.fixturenames:
        count: int = metafunc.config.option.num_kills
        pairs = [range(first, min(first + AT_A_TIME, count)) for first in range(0, count, AT_A_TIME)]
        metafunc.parametrize("numbers", pairs, ids=[f"{pair[0]}-{pair[-1]}" for pair in pairs])


@pytest.mark.timeout(600)
def test_a_killed_run_ends_as_if_it_had_not_been(
    wholes: dict[Mode, Whole], train: Train, numbers: Sequence[int]
) -> None:
    cases = [case_of(number, wholes) for number in numbers]
    runs = side_by_side([lambda c=c: train(f"case-{c.number:03d}", c.mode, [c.kill]) for c in cases])
    for case, run in zip(cases, runs, strict=True):
        print(case)
        check(run, wholes[case.mode])


# ---------------------------------------------------------------- many kills in one run


def both(name: str, kills: Callable[[Mode], Sequence[Kill]], train: Train, wholes: Mapping[Mode, Whole]) -> list[Run]:
    """The same chain of kills, saving at once and in the background."""
    runs = side_by_side([lambda m=m: train(f"{name}-{m.refresh}", m, kills(m)) for m in MODES[:2]])
    for run in runs:
        check(run, wholes[run.mode])
    return runs


@pytest.mark.timeout(900)
def test_ten_kills_in_one_run(wholes: dict[Mode, Whole], train: Train) -> None:
    """In turns soon after a start, and so late that some of them are after another checkpoint; none is at the end."""

    def kills(mode: Mode) -> list[Kill]:
        generator = random.Random(f"{SEED}, {mode}")
        occurrences = [generator.randrange(*limits) for limits in 5 * ((1, 60), (60, 160))]
        delays = [generator.choice([0.0, generator.uniform(0.0, 0.05)]) for _ in occurrences]
        return [Kill("(?!tensor ).*", number, delay_s) for number, delay_s in zip(occurrences, delays, strict=True)]

    for run in both("ten", kills, train, wholes):
        assert all("at the end" not in each.death for each in run.attempts), run.told()


# In each attempt, what is named first where no number is given. A journal is written to once at the start of a process:
# its header, or the cut back to the checkpoint.
CHAINS: dict[str, tuple[Kill, ...]] = {
    "first-checkpoint": (
        Kill(r"rename replay/tmp/.*"),
        Kill(r"write replay/journal\.jsonl", 2),
        Kill(r"write replay/journal\.jsonl", 3),
        Kill(r"fsync metrics\.jsonl"),
        Kill(r"fsync checkpoints/\.writing_000002/weights/__0_0\.distcp"),
        Kill(r"rename checkpoints/\.writing_000002 -> .*"),
        Kill(r"link checkpoints/\.latest"),
        Kill(r"rename checkpoints/\.latest -> checkpoints/latest"),
    ),
    "later-checkpoints": (
        Kill(r"fsync checkpoints/\.writing_000004/weights/__0_0\.distcp"),
        Kill(r"write replay/journal\.jsonl", 2),
        Kill(r"rename checkpoints/\.writing_000004/\.manifest\.json\.tmp -> .*"),
        Kill(r"rename checkpoints/\.writing_000004 -> .*"),
        Kill(r"link checkpoints/\.latest"),
        Kill(r"rename checkpoints/\.latest -> checkpoints/latest"),
        Kill(r"rename checkpoints/step_000002 -> .*"),
        Kill(r"remove checkpoints/\.writing_old_.*", 3),
    ),
    "last-checkpoint": (
        Kill(r"rename checkpoints/step_000004 -> .*"),
        Kill(r"rename \.summary\.json\.tmp -> .*"),
        Kill(r"rename control/\.exit\.json\.tmp -> .*"),
        Kill(r"leave process"),
    ),
    "last-shards": (Kill(r"remove replay/shards/inline000-0000-000002\.parquet"),),
    "first-start": (
        Kill(r"mkdir checkpoints"),
        Kill(r"rename \.config\.toml\.tmp -> .*"),
        Kill(r"write logs/.*"),
        Kill(r"mkdir replay/tmp"),
        Kill(r"write replay/journal\.jsonl"),
        Kill(r"fsync replay/journal\.jsonl"),
        Kill(r"write metrics\.jsonl"),
        Kill(r"enter evaluate"),
    ),
    "start-from-a-checkpoint": (
        Kill(r"write replay/journal\.jsonl", 4),  # in the third iteration, the first after a checkpoint
        Kill(r"rename \.config\.toml\.tmp -> .*"),
        Kill(r"mkdir logs/.*"),
        Kill(r"rename \.metrics\.jsonl\.tmp -> .*"),
        Kill(r"write metrics\.jsonl"),
        Kill(r"write replay/journal\.jsonl"),
        Kill(r"fsync replay/journal\.jsonl"),
        Kill(r"tensor .*", 5),
    ),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHAINS)
def test_kills_between_two_operations_on_files(wholes: dict[Mode, Whole], train: Train, name: str) -> None:
    runs = both(name, lambda _: CHAINS[name], train, wholes)
    for run in runs:
        assert all(": before " in each.death for each in run.attempts[:-1]), run.told()
