"""Is the answer in a response the true one? Exact comparison at once; math-verify, in killable processes, for the rest.

Reasons, and what they cost:

- "no_answer": the response has no finished `\\boxed{...}`, or an empty one.
- "correct" and "wrong" by exact comparison of strings, integers and fractions: microseconds, here. An answer longer
  than MAX_ANSWER_CHARS is wrong at once unless it is the truth's very string: nothing that long is an answer.
- "correct" and "wrong" by math-verify: milliseconds in a worker process. Sympy can take for ever over an answer of ten
  characters and nothing inside the process stops it (one big-integer power never returns to the interpreter, and
  SIGALRM handlers wait for the interpreter), so the parent keeps the time, and kills.
- "timeout": the worker missed the deadline, was killed and replaced.
- "error": the worker died by itself, or the truth cannot be parsed. Not the model's fault; counted apart from "wrong".
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:  # workers import this module: no pydantic or numpy for them
    from reval_mcore.config import VerifierConfig
    from reval_mcore.records import VerdictReason

VERIFIER_VERSION = f"boxed-1+math-verify-{importlib.metadata.version('math-verify')}"
"""Kept with each trajectory. The first number goes up whenever this module may judge an answer differently."""

REASONS: tuple[VerdictReason, ...] = ("correct", "wrong", "no_answer", "timeout", "error")

MAX_ANSWER_CHARS = 2000
"""Longer answers and truths are compared as strings only. It also keeps a request within a pipe's buffer, so that
handing one to a worker never blocks the parent."""

_KEPT_ANSWER_CHARS = 200
_MAX_DIGITS = 300
_WORKER_MEMORY_BYTES = 4 << 30
_START_LIMIT_S = 120.0  # a worker that has to import from a cold shared filesystem may take long
_MAX_FAILED_STARTS = 3
_ORPHAN_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says about one response."""

    reward: float  # 1.0 where correct, else 0.0
    reason: VerdictReason
    answer: str  # what was taken for the answer, at most 200 characters; "" where there was none


def count_reasons(reasons: Iterable[VerdictReason]) -> dict[VerdictReason, int]:
    """How many there are of each, zeros included."""
    counts = Counter(reasons)
    return {reason: counts[reason] for reason in REASONS}


# ---------------------------------------------------------------- pure functions of text

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # a backslash takes the next character with it: \{ opens no group


def last_boxed(text: str) -> str | None:
    """What is inside the last `\\boxed{...}` of `text`, or None. Linear in time, without recursion.

    Last is the one that opens last, also among nested ones. If it never closes there is no answer: a box before it
    is one that the response was about to take back, or the response was cut. `\\boxed 7` without braces is no box.
    """
    boxes = deque(_BOX.finditer(text), maxlen=1)
    if not boxes:
        return None
    start = boxes[0].end()
    depth = 1
    for token in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(token.group(), 0)
        if depth == 0:
            return text[start : token.start()]
    return None


_GROUPED = re.compile(r"[0-9]{1,3}(?:(?:,|\{,\}|\\,|,\\!)[0-9]{3})+")
_INTEGER = r"[+-]?\s*[0-9]+"
_NUMBER = re.compile(rf"({_INTEGER})(\.[0-9]*)?|([+-]?\s*)(\.[0-9]+)")
_FRACTION = re.compile(rf"([+-]?)\s*\\[dt]?frac\s*\{{\s*({_INTEGER})\s*\}}\s*\{{\s*({_INTEGER})\s*\}}")
_RATIO = re.compile(rf"({_INTEGER})\s*/\s*([0-9]+)")


def _bare(text: str) -> str:
    """Without outer white space, the dollars of inline or display mathematics, and a box (truths come boxed too)."""
    text = text.strip()
    for fence in ("$$", "$"):
        if len(text) > 2 * len(fence) and text.startswith(fence) and text.endswith(fence):
            text = text[len(fence) : -len(fence)].strip()
            break
    inner = last_boxed(text)
    return text if inner is None else inner.strip()


def _dense(number: str) -> str:
    """Without white space of any kind: `\\s` of the patterns is more than what int() and Fraction() let pass."""
    return re.sub(r"\s", "", number)


def _rational(text: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, decimal or simple fraction, and whether it is written as a decimal; None: neither."""
    if len(text) > _MAX_DIGITS:
        return None
    sign = text[: len(text) - len(text.lstrip("+- "))]
    if _GROUPED.fullmatch(text, len(sign)):
        text = sign + re.sub(r"[^0-9]", "", text[len(sign) :])
    if _NUMBER.fullmatch(text):
        return Fraction(_dense(text)), "." in text
    if match := _FRACTION.fullmatch(text):
        minus, above, below = match.groups()
    elif match := _RATIO.fullmatch(text):
        minus, above, below = "", *match.groups()
    else:
        return None
    denominator = int(_dense(below))
    if denominator == 0:
        return None
    value = Fraction(int(_dense(above)), denominator)
    return (-value if minus == "-" else value), False


def compare_exactly(answer: str, truth: str) -> bool | None:
    """Whether two answers are the same, by exact arithmetic; None where that cannot settle it.

    Equal strings and equal numbers are the same. Unequal integers and fractions are not. An unequal decimal settles
    nothing: 0.333333 for 1/3 is a question of tolerance, and math-verify has one.
    """
    answer, truth = _bare(answer), _bare(truth)
    if answer == truth:
        return True
    left, right = _rational(answer), _rational(truth)
    if left is None or right is None:
        return None
    if left[0] == right[0]:
        return True
    return None if left[1] or right[1] else False


def _settle_here(answer: str, truth: str) -> VerdictReason | None:
    """The reason, where no worker is needed for it."""
    if not answer:
        return "no_answer"
    same = compare_exactly(answer, truth)
    if same is None and max(len(answer), len(truth)) > MAX_ANSWER_CHARS:
        same = False
    if same is None:
        return None
    return "correct" if same else "wrong"


# ---------------------------------------------------------------- the pool, in the parent


_PACKAGE_ROOT = str(Path(__file__).resolve().parents[1])
_WORKER_PROGRAM = (  # the package is found last, and the working directory never: neither can shadow a module
    "import sys; sys.path.append(sys.argv[1]); "
    "from reval_mcore.verifiers import serve; serve(int(sys.argv[2]), float(sys.argv[3]))"
)


class _Worker:
    """One process and the parent's end of its socket. `deadline` is when it will be killed: infinite while idle."""

    def __init__(self, timeout_s: float) -> None:
        self.connection, theirs = Pipe()
        # A plain interpreter, neither forked (gloo and CUDA threads of the parent hold locks) nor spawned by
        # multiprocessing (which imports the parent's main module again, and torch with it).
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _WORKER_PROGRAM, _PACKAGE_ROOT, str(theirs.fileno()), str(timeout_s)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self.timeout_s = timeout_s
        self.is_starting = True
        self.task: tuple[str, str] | None = None
        self.deadline = time.monotonic() + _START_LIMIT_S

    @property
    def is_idle(self) -> bool:
        return not self.is_starting and self.task is None

    def begin(self, task: tuple[str, str]) -> None:
        assert self.is_idle
        self.task = task
        self.deadline = time.monotonic() + self.timeout_s
        with contextlib.suppress(BrokenPipeError):  # if it has just died, `receive` will say so
            self.connection.send_bytes(json.dumps(task).encode())

    def receive(self) -> str:
        """The word that it has sent, "" if it died instead."""
        try:
            return self.connection.recv_bytes().decode()
        except (EOFError, OSError):  # OSError: it died in the middle of a word
            return ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


class VerifierPool:
    """Judges responses; a context manager, for one caller at a time.

    Workers start on first use and stay. On `close` they are killed. If the parent dies instead, an idle worker reads
    the end of its socket, and a busy one is ended by the kernel a second after its deadline (an interval timer
    without a handler needs no interpreter; a parent-death signal would come when the starting *thread* ends).
    """

    def __init__(self, config: VerifierConfig) -> None:
        self._timeout_s = config.timeout_s
        self._num_workers = config.num_workers
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. A later `verify` starts new ones."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def verify(self, items: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (response text, truth) pairs, in their order. Equal answers to one truth are judged once.

        Each distinct answer that exact comparison cannot settle takes one worker for at most the deadline, and half a
        second for a new worker after a missed one. Raises RuntimeError if workers cannot be started at all.
        """
        tasks = [((last_boxed(text) or "").strip(), truth) for text, truth in items]
        reasons: dict[tuple[str, str], VerdictReason | None] = {task: _settle_here(*task) for task in tasks}
        try:
            reasons.update(self._judge([task for task, reason in reasons.items() if reason is None]))
        except BaseException:  # an interrupt, say: the next caller must not get replies to these tasks
            self.close()
            raise
        verdicts = []
        for task in tasks:
            reason = reasons[task]
            assert reason is not None
            verdicts.append(Verdict(float(reason == "correct"), reason, task[0][:_KEPT_ANSWER_CHARS]))
        return verdicts

    def _judge(self, tasks: Sequence[tuple[str, str]]) -> dict[tuple[str, str], VerdictReason]:
        """Reasons for distinct (answer, truth) tasks, by the workers."""
        waiting = deque(tasks)
        reasons: dict[tuple[str, str], VerdictReason] = {}
        for worker in list(self._workers):
            if worker.process.poll() is not None:  # died while idle, of nothing that we asked
                self._replace(worker)
        while len(reasons) < len(tasks):
            while len(self._workers) < min(self._num_workers, len(tasks)):
                self._workers.append(_Worker(self._timeout_s))
            for worker in self._workers:
                if waiting and worker.is_idle:
                    worker.begin(waiting.popleft())
            for worker, word in self._next_words():
                if worker.task is not None:
                    reasons[worker.task] = _as_reason(word)
                self._after(worker, word)
        return reasons

    def _next_words(self) -> list[tuple[_Worker, str]]:
        """Wait for the next words of workers: what they sent, "" for a death, "timeout" for a missed deadline."""
        pause = min(worker.deadline for worker in self._workers) - time.monotonic()
        heard = wait([worker.connection for worker in self._workers], max(0.0, pause) if pause < math.inf else None)
        now = time.monotonic()
        words = []
        for worker in self._workers:
            if worker.connection in heard:
                words.append((worker, worker.receive()))
            elif worker.deadline <= now:
                words.append((worker, "timeout"))
        return words

    def _after(self, worker: _Worker, word: str) -> None:
        """Make the worker idle, or replace it at once, so that the new one starts while the others work."""
        if word in ("", "timeout"):
            if worker.is_starting:
                self._failed_starts += 1
                if self._failed_starts >= _MAX_FAILED_STARTS:
                    raise RuntimeError(
                        f"verifier workers do not start: {self._failed_starts} in a row ended, or were silent for "
                        f"{_START_LIMIT_S:g} s. Their messages are on stderr; check that "
                        f"`{sys.executable} -c 'import math_verify'` succeeds"
                    )
            self._replace(worker)
            return
        if worker.is_starting:
            self._failed_starts = 0
        worker.is_starting = False
        worker.task = None
        worker.deadline = math.inf

    def _replace(self, worker: _Worker) -> None:
        worker.kill()
        self._workers[self._workers.index(worker)] = _Worker(self._timeout_s)


def _as_reason(word: str) -> VerdictReason:
    for reason in REASONS:
        if reason == word:
            return reason
    assert word == "", word
    return "error"


# ---------------------------------------------------------------- a worker


def _judge_with_math_verify(answer: str, truth: str) -> VerdictReason:
    from math_verify import parse, verify

    # Boxed, both are taken as a whole. Bare, math-verify searches for formulas in them: it finds 4 in 4\sqrt(2).
    gold = parse(rf"\boxed{{{_bare(truth)}}}", parsing_timeout=0)
    target = parse(rf"\boxed{{{_bare(answer)}}}", parsing_timeout=0)
    if not gold:
        return "error"
    if not verify(gold=gold, target=target, timeout_seconds=0):
        return "wrong"
    # math-verify compares numbers after rounding, and takes 1/2^99 for 1/2^98 (its issue 14). Where both are rational
    # they are compared again, exactly; decimals and per cent keep its tolerance.
    if not re.search(r"[.%]", answer + truth):
        values = [_sympy_rational(parsed[0]) for parsed in (gold, target)]
        if None not in values and values[0] != values[1]:
            return "wrong"
    return "correct"


def _sympy_rational(expression: object) -> object | None:
    import sympy

    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    value = expression.doit()
    return value if isinstance(value, sympy.Rational) else None


def _limit_resources() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    memory = _WORKER_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_WORKER_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(socket: int, timeout_s: float) -> None:
    """The life of a worker: say "ready", then send a reason for each (answer, truth), until the parent closes."""
    # Batch systems signal all processes of a job at once. That is for the parent, which may still need verdicts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(socket)
    _limit_resources()
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limit is off
    _judge_with_math_verify("x+1", "1+x")  # imports and builds the parsers: not on the first answer's time
    try:
        connection.send_bytes(b"ready")
        while True:
            answer, truth = json.loads(connection.recv_bytes())
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _ORPHAN_GRACE_S)
            try:
                word = _judge_with_math_verify(answer, truth)
            except Exception:  # sympy and the parser raise nearly anything on malformed input: the verdict on all of it
                word = "error"
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            connection.send_bytes(word.encode())
    except (EOFError, ConnectionResetError, BrokenPipeError):
        return
