"""Trainer and collector over files: what is damaged is made again, what is done is not, and neither falls over it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from reval_mcore.collector import Answerer, Collected, Collector
from reval_mcore.collector_process import WEIGHTS_OF, CollectorProcess
from reval_mcore.control import Collection, StopSignals, WakeUps, block_of
from reval_mcore.durable import write_json, write_text
from reval_mcore.ranks import Ranks
from reval_mcore.records import Prompt, Trajectory
from reval_mcore.remote_collection import RemoteCollection
from reval_mcore.remote_evaluation import EvaluationDesk
from reval_mcore.replay.shards import SHARDS, ShardWriter, next_incarnation, read_trajectories
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_sync import FollowedWeights
from reval_mcore.verifiers import VerifierPool
from tests.unit.test_collector import PROMPTS, STOP, ByteTokenizer, ScriptedEngine, config, verifier

__all__ = ["verifier"]  # a fixture

CONFIG = config(
    rollout={
        "num_prompts": 3,
        "num_responses": 4,
        "max_response_tokens": 32,
        "collector_timeout_s": 2.0,
        "engine": "sglang",
        "servers": ["http://127.0.0.1:9"],
        "mode": "asynchronous",
        "max_versions_behind": 0,
    }
)
HELD_OUT = [Prompt(f"h{i}", f"2+2={'?' * i}", (50, 43, 50, *[63] * i), "4") for i in range(130)]


class Writer(ShardWriter):
    """Something happens after its first shard."""

    after_first: Callable[[Path], object] | None = None

    def write(self, trajectories: Sequence[Trajectory]) -> str:
        name = super().write(trajectories)
        if self.after_first is not None:
            self.after_first(self._shards / name)
        self.after_first = None
        return name


class FollowingEngine(SGLangEngine):
    """Notes what it was told to follow."""

    oldest: int = 0

    def follow(self, attempt: str, oldest: int = 0) -> None:
        super().follow(attempt, oldest)
        self.oldest = oldest


@dataclass
class Site:
    """A run directory with a collector at work; the trainer's side is this process."""

    run: Path
    answerer: Answerer
    stop: StopSignals
    after_first_shard: Callable[[Path], object] | None = None
    ended: str = ""
    engine: FollowingEngine | None = None

    def open_writer(self) -> ShardWriter:
        replay = self.run / "replay"
        incarnation = next_incarnation(replay)
        writer = Writer(replay, writer="one", incarnation=incarnation, tokenizer_hash="t", template_hash="m")
        writer.after_first = self.after_first_shard
        return writer

    def remote(self, timeout_s: float = 60.0) -> RemoteCollection:
        deadline = time.monotonic() + timeout_s
        return RemoteCollection(
            *(CONFIG, self.run / "control", self.run / "replay", PROMPTS, self.answerer, Ranks()),
            is_asked_to_stop=lambda: time.monotonic() > deadline,
            wakeups=self.wakeups(),
        )

    def wakeups(self) -> WakeUps:
        """Of a site with no store."""
        return WakeUps(self.run / "control", lambda: self.stop.reason is not None)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """The server that the engine knows is never there: what it is asked for is scripted."""
        engine = self.engine = FollowingEngine(CONFIG.rollout.servers, FollowedWeights(), vocab_size=256)
        process = CollectorProcess(
            CONFIG,
            self.run,
            name="one",
            engine=engine,
            open_writer=self.open_writer,
            make_collector=lambda writer: Collector(CONFIG, PROMPTS, self.answerer, writer, (STOP,), Ranks()),
            desk=EvaluationDesk(self.run, HELD_OUT, self.answerer, seed=CONFIG.run.seed, stop_token_ids=(STOP,)),
            stop=self.stop,
            wakeups=self.wakeups(),
        )

        def work() -> None:
            self.ended = process.run()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
            thread.join(30.0)
        finally:
            write_text(self.run / "control" / "stop", "the end of the test")
            thread.join(30.0)
            engine.close()

    def blocks(self, collected: Collected | None) -> list[int | None]:
        assert collected is not None, "nothing came"
        shards = [read_trajectories(self.run / "replay" / SHARDS / name) for name in collected.shards]
        return [block_of(trajectories[0].trajectory_id) for trajectories in shards]


@pytest.fixture
def site(tmp_path: Path, verifier: VerifierPool) -> Site:
    tokenizer: Any = ByteTokenizer()
    (tmp_path / "control").mkdir()
    write_json(tmp_path / "control" / WEIGHTS_OF, {"attempt": "first"})
    return Site(tmp_path, Answerer(ScriptedEngine(), tokenizer, verifier), StopSignals(tmp_path / "control" / "stop"))


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-1])


def finish(site: Site) -> None:
    write_json(site.run / "control" / "exit.json", {"reason": "finished"})


def test_a_shard_that_was_damaged_is_made_again(site: Site) -> None:
    site.after_first_shard = cut
    remote = site.remote()
    with site.collecting():
        assert site.blocks(remote.collect(0)) == [0]
        finish(site)
    assert site.ended == "finished"


def test_control_files_that_cannot_be_read_say_nothing_new(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    control = site.run / "control"
    (control / "exit.json").write_text('{"reas')
    (control / "collection.json").write_text("")
    remote = site.remote()
    with site.collecting():
        assert site.blocks(remote.collect(0)) == [0]
        (control / WEIGHTS_OF).write_text("")
        assert site.blocks(remote.collect(1)) == [1]
        finish(site)
    assert site.ended == "finished"
    told = [record.getMessage() for record in caplog.records if "exit.json" in record.getMessage()]
    assert len(told) == 1  # and not at every look


def test_a_heart_that_cannot_be_written_ends_nothing(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Neither beside the work nor where a shard is announced."""
    remote, hearts = site.remote(), site.run / "control" / "collectors"
    hearts_away = hearts.with_name("away")
    site.after_first_shard = lambda shard: hearts.rename(hearts_away)

    def mend() -> None:
        while sum("no heartbeat" in record.getMessage() for record in caplog.records) < 2:
            time.sleep(0.05)
        hearts_away.rename(hearts)

    with site.collecting():
        mending = threading.Thread(target=mend, daemon=True)
        mending.start()
        assert site.blocks(remote.collect(0)) == [0]
        finish(site)
    assert site.ended == "finished"


def test_of_what_is_there_already_blocks_that_are_done_are_left(site: Site) -> None:
    """As after a restart: one block that is done, one twice, one damaged."""
    writer = site.open_writer()
    collector = Collector(CONFIG, PROMPTS, site.answerer, writer, (STOP,), Ranks())
    names = {block: collector.collect(block).shards[0] for block in (0, 1, 2)}
    again = collector.collect(1).shards[0]
    cut(site.run / "replay" / SHARDS / names[2])
    remote = site.remote()
    remote.restore(replace(Collection(), done_below=1).to_json())
    kept = remote.take_over(site.run / "replay" / SHARDS, [*names.values(), again])
    assert kept == [names[1]]
    assert site.blocks(remote.collect(1)) == [1]


def test_an_iteration_takes_one_block_and_leaves_the_collectors_their_lead(site: Site) -> None:
    collector = Collector(CONFIG, PROMPTS, site.answerer, site.open_writer(), (STOP,), Ranks())
    names = [collector.collect(block).shards[0] for block in (2, 0, 1)]
    remote = site.remote()
    assert sorted(remote.take_over(site.run / "replay" / SHARDS, names)) == sorted(names)
    assert [site.blocks(remote.collect(iteration)) for iteration in range(3)] == [[0], [1], [2]]


def test_a_collector_asks_no_server_for_weights_that_are_too_old(site: Site) -> None:
    """Also while it fills a block, for as long as that may take."""
    remote = site.remote()
    with site.collecting():
        assert site.blocks(remote.collect(0)) == [0]
        assert site.engine is not None
        assert site.engine.oldest == 0
        remote.collect(5)
        while site.engine.oldest != 5:  # max_versions_behind is 0
            time.sleep(0.05)
        finish(site)
