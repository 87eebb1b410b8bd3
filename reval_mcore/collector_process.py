"""`reval collect`: a process that fills the blocks it is given, on servers that it is given, until the run has ended.

It needs nothing of the trainer but files: control/collection.json says what to do, control/weights.json whose weights
the servers get. It may be started before the trainer, end, be killed and come back; many work side by side.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from reval_mcore.collector import Collector
from reval_mcore.config import Config
from reval_mcore.control import TO_COLLECTORS, Collection, Heart, News, StopSignals, WakeUps, read_collection
from reval_mcore.remote_evaluation import EvaluationDesk
from reval_mcore.replay.shards import SHARDS, ShardWriter
from reval_mcore.rollout.sglang import SGLangEngine

logger = logging.getLogger(__name__)

WEIGHTS_OF = "weights.json"  # in control/: the attempt at the run whose weights the servers get
_NUM_SLOTS = 2  # one to work on, one to go on with


class CollectorProcess:
    def __init__(
        self,
        config: Config,
        run: Path,
        *,
        name: str,
        engine: SGLangEngine,
        open_writer: Callable[[], ShardWriter],
        make_collector: Callable[[ShardWriter], Collector],
        desk: EvaluationDesk,
        stop: StopSignals,
        wakeups: WakeUps,
    ) -> None:
        self._config = config
        self._control = run / "control"
        self._shards = run / "replay" / SHARDS
        self._name = name
        self._engine = engine
        self._open_writer = open_writer
        self._make_collector = make_collector
        self._desk = desk
        self._evaluated_version: int | None = None  # while a part of an evaluation is answered
        self._stop = stop
        self._wakeups = wakeups
        self._known_attempt: str | None = None
        self._complaints: set[str] = set()  # about the control files
        self._made: dict[int, str] = {}  # shards by block, until they are admitted
        self._lock = threading.Lock()  # one writer of the heartbeat at a time

    def run(self) -> str:
        """Work until the run has ended or a signal came; returns which. What is begun is finished and announced."""
        while True:
            attempt = self._attempt()
            if self._stop.reason is not None:
                return self._stop.reason
            if self._has_finished():
                return "finished"
            if attempt is None:
                self._wakeups.wait(TO_COLLECTORS)
            else:
                self._work_for(attempt)

    def _attempt(self) -> str | None:
        """At the run: which start of its trainer. None before the first."""
        said = self._read(WEIGHTS_OF)
        if said is not None:
            self._known_attempt = str(said["attempt"])
        return self._known_attempt

    def _read(self, name: str) -> dict[str, Any] | None:
        """A file of the trainer's; None where it says nothing: what was known before holds."""
        try:
            return json.loads((self._control / name).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._complain(f"{self._control / name}: cannot be read: {error}")
            return None

    def _complain(self, complaint: str) -> None:
        """Once, and not at every look."""
        if complaint not in self._complaints:
            logger.warning("%s", complaint)
        self._complaints.add(complaint)

    def _work_for(self, attempt: str) -> None:
        """Until the trainer is started anew, or there is no more to do. What was made for an earlier start, and is
        there, the trainer has found by itself; it may also have begun from an empty buffer, without our folders."""
        writer = self._open_writer()
        self._heart = Heart(self._control, self._name, writer.incarnation)
        self._collector = self._make_collector(writer)
        self._made.clear()
        self._served_attempt = attempt
        self._engine.follow(attempt)
        with self._beating():
            while self._stop.reason is None and not self._has_finished() and self._attempt() == attempt:
                block = self._next(self._look())
                if self._evaluate():  # the trainer waits for it
                    continue
                if block is None:
                    self._wakeups.wait(TO_COLLECTORS)
                else:
                    self._fill(block)
            if self._stop.reason is not None:
                self._drain()
        self._heart.stop()

    def _look(self) -> Collection | None:
        """What is to be done now; None where nothing is known of it."""
        collection = self._read_collection()
        if collection is not None:
            self._keep_up(collection)
            self._made = {
                block: name
                for block, name in self._made.items()
                # the trainer removes one that it finds damaged, so that it is made again
                if not collection.is_done(block) and (self._shards / name).exists()
            }
        return collection

    def _read_collection(self) -> Collection | None:
        try:
            return read_collection(self._control)
        except (OSError, ValueError) as error:
            self._complain(str(error))
            return None

    def _keep_up(self, collection: Collection) -> None:
        """A server that is stuck at an old version is not asked, however long its block takes."""
        oldest = self._evaluated_version
        if oldest is None:
            oldest = collection.policy_version - self._config.rollout.max_versions_behind
        self._engine.follow(self._served_attempt, max(oldest, 0))

    def _has_finished(self) -> bool:
        said = self._read("exit.json")
        return said is not None and said["reason"] == "finished"

    def _next(self, collection: Collection | None) -> int | None:
        if collection is None:
            return None
        given = collection.blocks_of(self._heart.collector, self._heart.incarnation)
        return next((block for block in given if block not in self._made), None)

    def _fill(self, block: int) -> None:
        start = time.monotonic()
        try:
            collected = self._collector.collect(block)
        except OSError as error:  # no room; or a new trainer has swept the folder, and its start is told presently
            logger.warning("block %d is not written: %s", block, error)
            time.sleep(1.0)
            return
        (name,) = collected.shards
        self._made[block] = name
        self._beat()
        self._wakeups.signal(News.SHARDS)
        print(
            f"block {block}: {collected.metrics['num_trajectories']:.0f} trajectories, accuracy "
            f"{collected.metrics['accuracy']:.4f}, {time.monotonic() - start:.1f} s",
            flush=True,
        )

    def _evaluate(self) -> bool:
        """Whether there was a part of an evaluation to answer."""
        try:
            request = self._desk.request(self._served_attempt)
            if request is None:
                return False
            lease = self._desk.next_part(request, self._heart.collector, self._heart.incarnation)
            if lease is None:
                return False
            self._evaluated_version = request.version
            self._engine.follow(self._served_attempt, request.version)
            self._desk.answer(request, lease)
            self._wakeups.signal(News.ANSWERS)
        except (OSError, ValueError) as error:
            self._complain(f"evaluation: {error}")
            return False
        finally:
            self._evaluated_version = None
        return True

    def _drain(self) -> None:
        """Wait until what was made is admitted, as long as a silent collector would be waited for."""
        deadline = time.monotonic() + self._config.rollout.collector_timeout_s
        while self._made and time.monotonic() < deadline and not self._has_finished():
            self._beat(is_draining=True)
            self._wakeups.wait(TO_COLLECTORS)
            self._look()

    # ------------------------------------------------------------ heartbeat

    def _beat(self, *, is_draining: bool = False) -> None:
        with self._lock:
            shards: Sequence[str] = list(self._made.values())
            try:
                self._heart.beat(num_slots=_NUM_SLOTS, shards=shards, is_draining=is_draining)
            except OSError as error:  # a full disk: the next beat may find room
                logger.warning("no heartbeat: %s", error)

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """The heart beats while the work goes on, however long a block takes."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._config.rollout.collector_timeout_s / 6):
                self._beat()
                collection = self._read_collection()
                if collection is not None:
                    self._keep_up(collection)

        self._beat()
        self._wakeups.signal(News.SHARDS)  # it is there, and has nothing to do
        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
