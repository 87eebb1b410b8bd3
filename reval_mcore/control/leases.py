"""Who collects what: leases of prompt blocks under a cumulative quota, in small files that one process each writes.

    control/collection.json         written by the trainer's first rank: policy version, quota, leases, blocks done
    control/collectors/<name>.json  written by that collector: its heartbeat

The prompt order, a function of (seed, epoch), is cut into blocks that are numbered from 0. The quota is the number of
blocks that may have been begun since the start of the run; raising it is how the trainer lets collectors run ahead,
and not raising it how it holds them. A block is free, leased to one collector, or done. Done means admitted: the ids of
its trajectories begin with its number (`block_id`), so the trainer sees in what it admits when a block is whole.

A collector's turn:                              The trainer's turn:
    heart = Heart(control, name, incarnation)        keeper = LeaseKeeper(control, collection, timeout_s)
    loop:                                            loop:
        collection = read_collection(control)            admit the shards that heartbeats name
        work on collection.blocks_of(name, incarnation)  keeper.complete(blocks that are whole now)
        heart.beat(num_slots, shards)                    keeper.turn(policy_version, quota)
    heart.stop()

Nothing here is a lock, and no step has to happen at once. A collector whose heart stands still for `timeout_s` loses
its blocks to others. If it lives after all and finishes one, that block has been done twice, and admission skips the
second: by id while the first is live, by `Collection.was_admitted` afterwards. A collector that was started again has a
new incarnation and none of the old one's blocks. Clocks of different machines are never compared: a heart beats by
counting, and the trainer measures by its own clock how long ago a count changed.

The trainer's checkpoint holds the `Collection`. A resumed trainer goes on from that one, whatever the file says: blocks
admitted after the checkpoint are free again, and shards that are there already make them done again.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reval_mcore.durable import write_json

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_COLLECTION, _COLLECTORS = "collection.json", "collectors"
_GONE = (errno.ENOENT, errno.ESTALE)


def block_id(block: int) -> str:
    """What the group and trajectory ids of a block begin with, before "-<prompt_id>"."""
    return f"{block:06d}"


def block_of(trajectory_id: str) -> int | None:
    """The block of a trajectory; None for an id of another making."""
    number, dash, _ = trajectory_id.partition("-")
    return int(number) if dash and number.isdecimal() and number.isascii() else None


def quota_blocks(policy_version: int, *, blocks_per_iteration: int, max_versions_behind: int) -> int:
    """Blocks that may be begun while engines hold `policy_version`, the number of finished iterations.

    With `max_versions_behind` = 0 those of one iteration, as in synchronous mode; with m, those of m more.
    """
    return (policy_version + 1 + max_versions_behind) * blocks_per_iteration


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a collector says of itself."""

    collector: str  # its name, and that of its file
    incarnation: int  # a new one at every start, as its shard writer's
    beat: int  # counts up while it lives; which number it is says nothing
    num_slots: int  # blocks that it works on at a time
    shards: tuple[str, ...] = ()  # complete ones of blocks that are not done yet: listings may lag, names do not
    is_draining: bool = False  # finishes what it has, and takes nothing more


@dataclass(frozen=True, slots=True)
class Lease:
    block: int
    collector: str
    incarnation: int


@dataclass(frozen=True)
class Collection:
    """What may be collected, who does it, and what is done. Immutable: every step makes a new one."""

    policy_version: int = 0  # that engines should hold
    quota: int = 0  # blocks 0 to quota - 1 may be begun; never falls
    leases: tuple[Lease, ...] = ()  # by block, ascending
    done_below: int = 0  # all blocks below it are done
    done: tuple[int, ...] = ()  # those above it that are, ascending

    def is_done(self, block: int) -> bool:
        return block < self.done_below or block in self.done

    def was_admitted(self, trajectory_id: str) -> bool:
        """Of a block that is done: what `ReplayBuffer.admit` is to skip, as its `is_done`, though it may be evicted."""
        block = block_of(trajectory_id)
        return block is not None and self.is_done(block)

    def blocks_of(self, collector: str, incarnation: int) -> list[int]:
        """Ascending."""
        return [each.block for each in self.leases if (each.collector, each.incarnation) == (collector, incarnation)]

    def free_blocks(self) -> list[int]:
        """Within the quota, neither leased nor done; ascending."""
        taken = {each.block for each in self.leases}
        return [b for b in range(self.done_below, self.quota) if b not in taken and not self.is_done(b)]

    def complete(self, blocks: Iterable[int]) -> Collection:
        """These are done, by whomever; saying so again changes nothing."""
        above = {block for block in (*self.done, *blocks) if block >= self.done_below}
        below = self.done_below
        while below in above:
            above.remove(below)
            below += 1
        done = tuple(sorted(above))
        leases = tuple(each for each in self.leases if each.block >= below and each.block not in above)
        return replace(self, leases=leases, done_below=below, done=done)

    def allow(self, policy_version: int, quota: int) -> Collection:
        """Engines should hold `policy_version`, and `quota` blocks may have been begun."""
        return replace(self, policy_version=policy_version, quota=max(quota, self.quota))

    def assign(self, alive: Sequence[Heartbeat]) -> Collection:
        """Take blocks from collectors that are not `alive` (or started anew); give free ones to those with a slot.

        The lowest block to the least busy, then by name: a function of the arguments.
        """
        present = {(heart.collector, heart.incarnation) for heart in alive}
        kept = [each for each in self.leases if (each.collector, each.incarnation) in present]
        busy = Counter(each.collector for each in kept)
        for block in replace(self, leases=tuple(kept)).free_blocks():
            ready = [heart for heart in alive if not heart.is_draining and busy[heart.collector] < heart.num_slots]
            if not ready:
                break
            chosen = min(ready, key=lambda heart: (busy[heart.collector], heart.collector))
            kept.append(Lease(block, chosen.collector, chosen.incarnation))
            busy[chosen.collector] += 1
        return replace(self, leases=tuple(sorted(kept, key=lambda each: each.block)))

    def to_json(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Collection:
        """Raises ValueError where another version of the program wrote it."""
        found = fields.get("format_version", "(none)")
        if found != FORMAT_VERSION:
            raise ValueError(
                f"format version {found}, this program reads {FORMAT_VERSION}; "
                f"have trainer and collectors run the same version of reval_mcore"
            )
        leases = tuple(Lease(**each) for each in fields["leases"])
        names = ("policy_version", "quota", "done_below")
        return cls(**{name: fields[name] for name in names}, leases=leases, done=tuple(fields["done"]))


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no file (any more). Files are replaced whole, so none is ever torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON ({error}); remove it, its owner writes it again") from None


def read_collection(control: Path) -> Collection | None:
    """What control/collection.json says; None before the trainer wrote it. Raises ValueError where it is damaged."""
    return read_leases(control / _COLLECTION)


def read_leases(path: Path) -> Collection | None:
    """Likewise, of a file anywhere."""
    fields = _read(path)
    try:
        return None if fields is None else Collection.from_json(fields)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


class Heart:
    """A collector's side: says that it lives, and what it has finished. The only writer of its file."""

    def __init__(self, control: Path, collector: str, incarnation: int) -> None:
        """`collector` is one word of letters, digits, '.', '_' and '-'; it names the file."""
        assert re.fullmatch(r"\w[\w.-]*", collector, re.ASCII), f"not usable in a file name: {collector!r}"
        self.collector, self.incarnation = collector, incarnation
        self._path = control / _COLLECTORS / f"{collector}.json"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._beat = 0

    def beat(self, *, num_slots: int, shards: Sequence[str] = (), is_draining: bool = False) -> None:
        """At least every third of the trainer's timeout. Raises OSError where it cannot be written."""
        self._beat += 1
        heart = Heartbeat(self.collector, self.incarnation, self._beat, num_slots, tuple(shards), is_draining)
        write_json(self._path, asdict(heart))

    def stop(self) -> None:
        """Its blocks are free at once. Only once everything that it announced is admitted."""
        self._path.unlink(missing_ok=True)


class LeaseKeeper:
    """The trainer's side: one process watches hearts and writes collection.json."""

    def __init__(
        self,
        control: Path,
        collection: Collection,
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with `collection`: a new one, or the checkpoint's."""
        self._control = control
        self.collection = collection
        self._timeout_s = timeout_s
        self._clock = clock
        self._seen: dict[str, tuple[Heartbeat, float]] = {}  # and when its count changed last, by this clock
        self._written: Collection | None = None
        control.mkdir(parents=True, exist_ok=True)

    def heartbeats(self) -> list[Heartbeat]:
        """Of the collectors that live, by name."""
        now, hearts = self._clock(), self._read_hearts()
        for heart in hearts:
            before = self._seen.get(heart.collector)
            is_new = before is None or (before[0].incarnation, before[0].beat) != (heart.incarnation, heart.beat)
            self._seen[heart.collector] = (heart, now) if before is None or is_new else (heart, before[1])
        present = {heart.collector for heart in hearts}
        self._seen = {name: value for name, value in self._seen.items() if name in present}
        return [heart for heart in hearts if now - self._seen[heart.collector][1] <= self._timeout_s]

    def complete(self, blocks: Iterable[int]) -> None:
        """Every trajectory of these was admitted. On disk with the next turn."""
        self.collection = self.collection.complete(blocks)

    def turn(self, policy_version: int, quota: int) -> Collection:
        """Watch, lease, and replace collection.json where something changed. Raises OSError, and tries again next time.

        After a restart of the trainer every collector whose file is there counts as living for `timeout_s`: a restart
        does not have blocks done twice.
        """
        alive, before = self.heartbeats(), self.collection
        self.collection = before.allow(policy_version, quota).assign(alive)
        self._log_lost(before)
        if self.collection != self._written:
            write_json(self._control / _COLLECTION, self.collection.to_json())
            self._written = self.collection
        return self.collection

    def _read_hearts(self) -> list[Heartbeat]:
        found = []
        for path in sorted((self._control / _COLLECTORS).glob("*.json")):
            try:
                fields = _read(path)
                if fields is not None:
                    found.append(Heartbeat(**{**fields, "shards": tuple(fields["shards"])}))
            except (ValueError, KeyError, TypeError) as error:
                logger.warning("%s: not a heartbeat, its collector counts as dead: %s", path, error)
        return found

    def _log_lost(self, before: Collection) -> None:
        now = {each.block: each for each in self.collection.leases}
        for each in before.leases:
            if now.get(each.block) != each:
                logger.warning("block %d: collector %s is lost, the block goes to another", each.block, each.collector)
