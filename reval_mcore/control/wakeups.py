"""Wake-ups between the trainer and its collectors: there is news, look at the files now and not at the next poll.

They say that a file of control/ has changed, and never what is in it. The files are the record; a wake-up that is lost
costs one polling interval and nothing else. They travel as counters of a torch TCPStore in the trainer's first rank,
which tells its place in control/wakeups.json for as long as it lives.

A TCPStore may hang for good (a host that vanished, a port that accepts and is mute), and a wait of it that runs out
complains on stderr every time. So a thread of its own alone touches it, and looks at the counters while somebody waits.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from reval_mcore.durable import write_json

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

logger = logging.getLogger(__name__)


class News(StrEnum):
    WEIGHTS = "weights"  # a new version is out
    COLLECTION = "collection"  # collection.json has changed
    EVALUATION = "evaluation"  # an evaluation is asked for, or its parts are leased anew
    SHARDS = "shards"  # a collector has come, or has announced a complete shard in its heartbeat
    ANSWERS = "answers"  # a part of an evaluation is answered


TO_COLLECTORS = (News.WEIGHTS, News.COLLECTION, News.EVALUATION)
_LISTENERS = "listeners"  # counts who ever came, the trainer too

_FILE = "wakeups.json"  # in control/
_POLL_S = 0.2  # between looks at the files, with no wake-ups
_LONG_POLL_S = 2.0  # ... with them
_TICK_S = 0.02  # between looks at the counters, while somebody waits
_CONNECT_TIMEOUT_S = 2.0
_GOODBYE_S = 0.2


class _Line:
    """A connection to one store, and the thread that alone uses it. None of its methods blocks or raises."""

    def __init__(self, connect: Callable[[], Store], place: str) -> None:
        self.changed = threading.Condition()  # guards all that follows
        self.is_open = False
        self.is_lost = False
        self.num_listeners = 0
        self.counts: dict[str, int] = {}
        self.seen: dict[str, int] = {}  # counts when the caller looked last
        self.watched: Collection[News] = ()  # what somebody waits for now
        self._to_send: list[News] = []
        self._connect = connect
        self._place = place
        self._thread = threading.Thread(target=self._run, name="wake-ups", daemon=True)
        self._thread.start()

    def send(self, name: News) -> None:
        with self.changed:
            if not self.is_lost and name not in self._to_send:
                self._to_send.append(name)
                self.changed.notify_all()

    def watch(self, names: Collection[News]) -> None:
        with self.changed:
            self.watched = names
            self.changed.notify_all()

    def close(self, timeout_s: float = 0.0) -> None:
        """What is to be sent is sent first, if that is done in `timeout_s`."""
        with self.changed:
            self.changed.wait_for(lambda: not self._to_send or self.is_lost, timeout_s)
            self.is_lost = True
            self.changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            store = self._connect()
            self._read(store, [*News])
            with self.changed:
                self.num_listeners = store.add(_LISTENERS, 1)
                self.is_open = True
            while self._turn(store):
                continue
        except (OSError, RuntimeError) as error:  # torch's DistError is a RuntimeError
            if not self.is_lost:
                reason = str(error).partition("\n")[0]
                logger.info("no wake-ups over %s, files are looked at every %g s: %s", self._place, _POLL_S, reason)
        finally:
            with self.changed:
                self.is_open, self.is_lost = False, True
                self.changed.notify_all()

    def _turn(self, store: Store) -> bool:
        """Send and read once; False at the end."""
        with self.changed:
            self.changed.wait_for(lambda: self._to_send or self.watched or self.is_lost)
            if self.is_lost:
                return False
            sending, watched = self._to_send[:], [str(name) for name in self.watched]
        for name in sending:
            store.add(name, 1)
        if watched and self.num_listeners < 2:
            watched.append(_LISTENERS)
        self._read(store, watched)
        with self.changed:
            del self._to_send[: len(sending)]
            self.changed.notify_all()
            if watched:
                self.changed.wait_for(lambda: self._to_send or self.is_lost, _TICK_S)
        return True

    def _read(self, store: Store, names: Collection[str]) -> None:
        counts = {name: store.add(name, 0) for name in names}
        with self.changed:
            self.num_listeners = counts.pop(_LISTENERS, self.num_listeners)
            if any(self.counts.get(name) != count for name, count in counts.items()):
                self.counts.update(counts)
                self.changed.notify_all()


class WakeUps:
    """One end: a collector's, or that of a trainer's rank. Neither method raises over what befalls the store."""

    def __init__(self, control: Path, is_asked_to_stop: Callable[[], bool], *, host: str | None = None) -> None:
        """The store is on `host`, or where the file says."""
        self._file = control / _FILE
        self._host = host
        self._is_asked_to_stop = is_asked_to_stop
        self._lock = threading.Lock()  # one thread at a time looks where the store is
        self._said: str | None = None  # by the file
        self._line: _Line | None = None

    def signal(self, name: News) -> None:
        """Wake whoever waits for `name`. Does not wait for anything itself."""
        line = self._current_line()
        if line is not None:
            line.send(name)

    def wait(self, names: Collection[News], *, poll_s: float = _POLL_S, long_poll_s: float = _LONG_POLL_S) -> None:
        """Until one of `names` was signalled since the last wait, the run is asked to stop, or the store is lost; else
        for `long_poll_s`, and for `poll_s` where there is no store, or nobody else ever came to it."""
        start, line = time.monotonic(), self._current_line()
        if line is None:
            time.sleep(poll_s)
            return

        def has_moved() -> bool:
            return any(line.counts.get(name, 0) != line.seen.get(name, 0) for name in names)

        was_open = line.is_open
        line.watch(names)
        with line.changed:
            while not self._is_asked_to_stop():
                can_wake = line.is_open and line.num_listeners > 1
                left_s = start + (long_poll_s if can_wake else poll_s) - time.monotonic()
                if has_moved() or left_s <= 0 or (was_open and line.is_lost):
                    break
                line.changed.wait(min(left_s, poll_s))
            line.seen.update({name: line.counts.get(name, 0) for name in names})
            line.watched = ()

    def _current_line(self) -> _Line | None:
        """To the store that the file tells of now. A new one takes a moment; a lost one stays till the file changes."""
        with self._lock:
            try:
                said = self._file.read_text(encoding="utf-8")
            except (OSError, ValueError):
                said = None
            if said != self._said:
                self.close()
                self._said = said
                if said is not None:
                    self._open(said)
            return self._line

    def _open(self, said: str) -> None:
        try:
            fields = json.loads(said)
            host, port, of = self._host or str(fields["host"]), int(fields["port"]), str(fields["of"])
        except (ValueError, KeyError, TypeError) as error:
            logger.info("no wake-ups, files are looked at every %g s: %s: %r", _POLL_S, self._file, error)
            return
        self._line = _Line(lambda: _connect(host, port, of), f"{host}:{port}")

    def close(self, timeout_s: float = 0.0) -> None:
        if self._line is not None:
            self._line.close(timeout_s)
        self._line, self._said = None, None


@contextlib.contextmanager
def open_wakeups(control: Path, is_asked_to_stop: Callable[[], bool]) -> Iterator[WakeUps]:
    """A collector's end."""
    wakeups = WakeUps(control, is_asked_to_stop)
    try:
        yield wakeups
    finally:
        wakeups.close(_GOODBYE_S)


@contextlib.contextmanager
def serve_wakeups(control: Path, is_asked_to_stop: Callable[[], bool]) -> Iterator[WakeUps]:
    """The end of the trainer's first rank, which has the store. Where none can be opened it does without.

    At the end everybody is woken before the store goes, and looks at the files.
    """
    from torch.distributed import TCPStore

    file = control / _FILE
    file.unlink(missing_ok=True)  # of a trainer that was killed
    store: TCPStore | None = None
    try:
        timeout = timedelta(seconds=_CONNECT_TIMEOUT_S)
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        write_json(file, {"host": _name_of_this_host(), "port": store.port, "of": uuid.uuid4().hex})
    except (OSError, RuntimeError) as error:
        logger.info("no wake-ups, files are looked at every %g s: %s", _POLL_S, error)
    wakeups = WakeUps(control, is_asked_to_stop, host="127.0.0.1")
    try:
        yield wakeups
    finally:
        for name in TO_COLLECTORS:
            wakeups.signal(name)
        file.unlink(missing_ok=True)
        wakeups.close(_GOODBYE_S)
        if store is not None:
            time.sleep(_GOODBYE_S)  # else those who wait hear that it is lost, with a stack trace of torch's on stderr


def _connect(host: str, port: int, of: str) -> Store:
    """Keys are those of the start of a trainer `of`: the port may be another store's by now. Raises OSError,
    RuntimeError."""
    from torch.distributed import PrefixStore, TCPStore

    socket.create_connection((host, port), _CONNECT_TIMEOUT_S).close()  # refused at once, which a TCPStore tries again
    timeout = timedelta(seconds=_CONNECT_TIMEOUT_S)
    return PrefixStore(of, TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout))


def _name_of_this_host() -> str:
    """Under which other nodes reach it: what torchrun was given for that, unless it is a loopback address."""
    told = os.environ.get("MASTER_ADDR", "")
    with contextlib.suppress(OSError, ValueError):
        if told and not ipaddress.ip_address(socket.gethostbyname(told)).is_loopback:
            return told
    return socket.getfqdn()
