"""Leases: within the quota, one collector a block, nothing lost when collectors come and go, clocks not trusted."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reval_mcore.control import (
    Collection,
    Heart,
    Heartbeat,
    Lease,
    LeaseKeeper,
    block_id,
    block_of,
    quota_blocks,
    read_collection,
)

TIMEOUT_S = 10.0


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Site:
    """A control directory, the trainer that keeps its leases, and collectors that beat when they are told to."""

    control: Path
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.keeper = self.restarted(Collection())

    def restarted(self, collection: Collection) -> LeaseKeeper:
        self.keeper = LeaseKeeper(self.control, collection, timeout_s=TIMEOUT_S, clock=self.clock)
        return self.keeper

    def turn(self, quota: int, *, version: int = 0) -> dict[int, str]:
        """Who has which block, as collectors read it."""
        self.keeper.turn(version, quota)
        found = read_collection(self.control)
        assert found is not None
        assert found == self.keeper.collection
        return {lease.block: f"{lease.collector}.{lease.incarnation}" for lease in found.leases}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "control")


def test_blocks_go_to_free_slots_within_the_quota(site: Site) -> None:
    assert read_collection(site.control) is None
    assert site.turn(0) == {}
    a, b = Heart(site.control, "a", 0), Heart(site.control, "b", 3)
    a.beat(num_slots=2)
    b.beat(num_slots=1)
    assert site.turn(2) == {0: "a.0", 1: "b.3"}
    assert site.turn(2) == {0: "a.0", 1: "b.3"}
    assert site.turn(9) == {0: "a.0", 1: "b.3", 2: "a.0"}
    site.keeper.complete([1, 2])
    site.keeper.complete([2])
    assert site.turn(9, version=1) == {0: "a.0", 3: "b.3", 4: "a.0"}
    found = read_collection(site.control)
    assert found is not None
    assert (found.policy_version, found.quota, found.done_below, found.done) == (1, 9, 0, (1, 2))
    assert found.blocks_of("a", 0) == [0, 4]
    assert found.blocks_of("a", 1) == []
    site.keeper.complete([0])
    assert site.turn(5) == {3: "b.3", 4: "a.0", 5: "a.0"}  # a quota that was given is not taken back
    assert (site.keeper.collection.done_below, site.keeper.collection.quota) == (3, 9)


def test_a_still_heart_loses_its_blocks_and_a_late_finish_is_no_loss(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = Heart(site.control, "a", 0), Heart(site.control, "b", 0)
    a.beat(num_slots=2)
    assert site.turn(2) == {0: "a.0", 1: "a.0"}
    b.beat(num_slots=1)
    for leases in ({0: "a.0", 1: "a.0"}, {0: "a.0", 1: "a.0"}, {0: "b.0"}):
        site.clock.now += TIMEOUT_S / 2
        b.beat(num_slots=1)
        with caplog.at_level(logging.WARNING):
            assert site.turn(2) == leases
    assert "block 1: collector a is lost" in caplog.text
    site.keeper.complete([0])  # by a, which was only slow
    a.beat(num_slots=1)
    assert site.turn(2) == {1: "a.0"}


def test_a_new_incarnation_has_nothing_of_the_old_one(site: Site) -> None:
    Heart(site.control, "a", 0).beat(num_slots=1)
    assert site.turn(1) == {0: "a.0"}
    again = Heart(site.control, "a", 1)
    assert site.turn(1) == {0: "a.0"}
    again.beat(num_slots=1)
    assert site.turn(1) == {0: "a.1"}


def test_draining_and_leaving(site: Site) -> None:
    a, b = Heart(site.control, "a", 0), Heart(site.control, "b", 0)
    a.beat(num_slots=1)
    assert site.turn(3) == {0: "a.0"}
    a.beat(num_slots=2, is_draining=True, shards=["a-0000-000000.parquet"])
    assert site.turn(3) == {0: "a.0"}
    assert [heart.shards for heart in site.keeper.heartbeats()] == [("a-0000-000000.parquet",)]
    a.stop()
    a.stop()
    b.beat(num_slots=1)
    assert site.turn(3) == {0: "b.0"}


def test_no_clock_but_the_trainers_counts(site: Site) -> None:
    """Beats may be of any age by their file's time; the trainer's own clock may stand, and a step back kills nobody."""
    heart = Heart(site.control, "a", 0)
    heart.beat(num_slots=1)
    site.clock.now = 100.0
    assert site.turn(1) == {0: "a.0"}
    site.clock.now = 50.0
    assert site.turn(1) == {0: "a.0"}
    heart.beat(num_slots=1)
    assert site.turn(1) == {0: "a.0"}
    site.clock.now = 50.0 + TIMEOUT_S + 0.1
    assert site.turn(1) == {}


def test_a_restarted_trainer_goes_on_from_its_checkpoint(site: Site) -> None:
    heart = Heart(site.control, "a", 0)
    heart.beat(num_slots=2)
    site.turn(2, version=7)
    checkpoint = json.loads(json.dumps(site.keeper.collection.to_json()))
    site.keeper.complete([0])
    site.turn(4, version=8)
    site.clock.now += 3 * TIMEOUT_S
    site.restarted(Collection.from_json(checkpoint))
    assert site.turn(2, version=7) == {0: "a.0", 1: "a.0"}  # its heart may have stood still; it has time to beat
    site.clock.now += TIMEOUT_S + 0.1
    assert site.turn(2, version=7) == {}


def test_damage_is_told_or_counts_as_dead(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    Heart(site.control, "a", 0).beat(num_slots=1)
    (site.control / "collectors" / "b.json").write_text("{")
    (site.control / "collectors" / "c.json").write_text('{"beat": 1}')
    with caplog.at_level(logging.WARNING):
        assert site.turn(2) == {0: "a.0"}
    assert "b.json: is not JSON" in caplog.text
    assert "c.json: not a heartbeat" in caplog.text
    path = site.control / "collection.json"
    for text, message in (("{", "collection.json: is not JSON"), ('{"format_version": 9}', "format version 9, this")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_collection(site.control)


def test_ids_and_quotas() -> None:
    assert block_of(f"{block_id(12)}-some-prompt-3") == 12
    assert block_of(f"{block_id(1234567)}-p-0") == 1234567
    assert [block_of(each) for each in ("g0/1", "12", "-12-a", "a-1", "")] == [None] * 5
    assert quota_blocks(0, blocks_per_iteration=4, max_versions_behind=0) == 4
    assert quota_blocks(2, blocks_per_iteration=4, max_versions_behind=1) == 16


@settings(max_examples=30)
@given(st.data())
def test_whatever_happens_every_block_is_had_by_one_and_gets_done(data: st.DataObject) -> None:
    """Collectors come, go, die and finish in any order; the invariants hold, and with one left all gets done."""
    collection, done, quota = Collection(), set(), 0
    incarnations = dict.fromkeys("abc", 0)
    for _ in range(data.draw(st.integers(0, 12))):
        quota += data.draw(st.integers(0, 3))
        alive = []
        for name in sorted(data.draw(st.sets(st.sampled_from("abc")))):
            incarnations[name] += data.draw(st.integers(0, 1))
            slots, is_draining = data.draw(st.integers(0, 3)), data.draw(st.booleans())
            alive.append(Heartbeat(name, incarnations[name], 0, slots, (), is_draining))
        before = collection
        collection = collection.allow(0, quota).assign(alive)
        blocks = [lease.block for lease in collection.leases]
        assert blocks == sorted(set(blocks))
        assert all(block < quota and block not in done for block in blocks)
        present = {(heart.collector, heart.incarnation) for heart in alive}
        assert all((lease.collector, lease.incarnation) in present for lease in collection.leases)
        for heart in alive:
            had = before.blocks_of(heart.collector, heart.incarnation)
            has = collection.blocks_of(heart.collector, heart.incarnation)
            assert set(had) <= set(has)  # nobody alive loses what it works on
            assert len(has) <= max(len(had), heart.num_slots)
        finished = data.draw(st.sets(st.integers(0, quota - 1), max_size=4)) if quota else set()  # by anyone at all
        done |= finished
        collection = collection.complete(finished)
        assert {block for block in range(quota + 2) if collection.is_done(block)} == done
        assert Collection.from_json(json.loads(json.dumps(collection.to_json()))) == collection
    last = Heartbeat("z", 0, 0, 2)
    for _ in range(quota):
        collection = collection.assign([last])
        collection = collection.complete([lease.block for lease in collection.leases])
    assert collection == Collection(quota=quota, done_below=quota)


def test_leases_are_of_blocks_that_are_not_done() -> None:
    assert [Collection(done_below=2).was_admitted(each) for each in ("000001-p-0", "000002-p-0", "x")] == [
        True,
        False,
        False,
    ]
    collection = Collection(quota=3, leases=(Lease(0, "a", 0), Lease(2, "b", 0)))
    assert collection.free_blocks() == [1]
    assert collection.complete([0, 2, 2]).leases == ()
