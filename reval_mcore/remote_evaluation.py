"""Evaluation by collectors: the trainer asks, they answer parts of the prompts, each in a file of its own.

    control/evaluation.json                     the request: whose weights, of which version, which prompts, how drawn
    evaluation/<label>/leases.json              who answers which part, as for collection
    evaluation/<label>/<part>-<collector>-<incarnation>.json    an answer, with the versions that made it

A part whose collector is lost goes to another; an answer by other weights than asked for is removed, and so made again.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reval_mcore.collector import Answerer
from reval_mcore.config import EvaluationConfig
from reval_mcore.control import Collection, Heartbeat, Lease, News, WakeUps, read_leases
from reval_mcore.durable import make_directory, write_json
from reval_mcore.evaluation import Answers, Evaluation, EvaluationResult
from reval_mcore.ranks import Ranks
from reval_mcore.records import Prompt
from reval_mcore.remote_collection import Patience

logger = logging.getLogger(__name__)

_REQUEST, _ANSWERS, _LEASES = "evaluation.json", "evaluation", "leases.json"  # in control/, in RUN, in that
_PROMPTS_PER_PART = 64


@dataclass(frozen=True)
class Request:
    """One evaluation, as control/evaluation.json has it."""

    attempt: str  # at the run
    version: int  # of its policy
    parts: tuple[tuple[int, int], ...]  # of the held-out prompts: from, to
    evaluation: dict[str, Any]  # the fields of EvaluationConfig
    max_response_tokens: int

    def directory(self, run: Path) -> Path:
        return run / _ANSWERS / f"v{self.version:06d}-{self.attempt}"


def _answer_path(directory: Path, lease: Lease) -> Path:
    return directory / f"{lease.block:05d}-{lease.collector}-{lease.incarnation}.json"


class RemoteEvaluation:
    """The trainer's side. The first rank asks and counts; every rank has one, and all call it together."""

    def __init__(
        self,
        run: Path,
        evaluation: Evaluation,
        ranks: Ranks,
        *,
        attempt: str,
        patience_s: float,
        heartbeats: Callable[[], list[Heartbeat]],
        is_asked_to_stop: Callable[[], bool],
        wakeups: WakeUps,
    ) -> None:
        """`heartbeats`: of the collectors that live."""
        self._run = run
        self._evaluation = evaluation
        self._ranks = ranks
        self._attempt = attempt
        self._patience_s = patience_s
        self._heartbeats = heartbeats
        self._is_asked_to_stop = is_asked_to_stop
        self._wakeups = wakeups

    def evaluate(self, version: int) -> EvaluationResult | None:
        """Of weights that the servers have. None where the run is asked to stop. Raises EngineError where nobody
        collects for `patience_s`."""
        evaluation = self._evaluation
        num_prompts, size = len(evaluation.prompts), _PROMPTS_PER_PART
        request = Request(
            attempt=self._attempt,
            version=version,
            parts=tuple((first, min(first + size, num_prompts)) for first in range(0, num_prompts, size)),
            evaluation=evaluation.config.model_dump(mode="json"),
            max_response_tokens=evaluation.max_response_tokens,
        )
        self._ranks.share(lambda: self._ask(request))
        patience, leases = Patience(self._patience_s), Collection(policy_version=version, quota=len(request.parts))
        answers: dict[int, Answers] = {}

        def look() -> tuple[EvaluationResult | None] | None:
            nonlocal leases
            if self._is_asked_to_stop():
                return (None,)
            answers.update(self._read(request, leases))
            if len(answers) == len(request.parts):
                return (evaluation.result([answers[part] for part in sorted(answers)]),)
            before, leases = leases, leases.complete(answers).assign(patience.check(self._heartbeats()))
            if leases != before:
                write_json(request.directory(self._run) / _LEASES, leases.to_json())
                self._wakeups.signal(News.EVALUATION)
            return None

        try:
            return self._ranks.wait(look, lambda: self._wakeups.wait([News.SHARDS, News.ANSWERS]))
        finally:
            if self._ranks.is_first:
                self._withdraw()

    def _ask(self, request: Request) -> None:
        self._withdraw()
        make_directory(request.directory(self._run))
        write_json(self._run / "control" / _REQUEST, asdict(request))
        self._wakeups.signal(News.EVALUATION)

    def _withdraw(self) -> None:
        (self._run / "control" / _REQUEST).unlink(missing_ok=True)
        shutil.rmtree(self._run / _ANSWERS, ignore_errors=True)

    def _read(self, request: Request, leases: Collection) -> dict[int, Answers]:
        """The answers that are there now and right, by part."""
        found: dict[int, Answers] = {}
        for lease in leases.leases:
            path = _answer_path(request.directory(self._run), lease)
            try:
                answers = Answers(**json.loads(path.read_text(encoding="utf-8")))
                _check(answers, request, lease.block)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError) as error:
                logger.warning("evaluation of version %d: part %d again: %s", request.version, lease.block, error)
                path.unlink(missing_ok=True)
            else:
                found[lease.block] = answers
        return found


def _check(answers: Answers, request: Request, part: int) -> None:
    """Raises ValueError where it is no answer to this."""
    if answers.versions != [request.version]:
        raise ValueError(f"answered by versions {answers.versions}")
    first, end = request.parts[part]
    config = EvaluationConfig.model_validate(request.evaluation)
    wanted = ((end - first) * config.num_samples,) * 2 + ((end - first) * config.greedy,)
    if (len(answers.rewards), len(answers.reasons), len(answers.greedy_rewards)) != wanted:
        raise ValueError("answered other prompts than those asked for")


class EvaluationDesk:
    """A collector's side."""

    def __init__(
        self, run: Path, held_out: Sequence[Prompt], answerer: Answerer, *, seed: int, stop_token_ids: tuple[int, ...]
    ) -> None:
        self._run = run
        self._held_out = held_out
        self._answerer = answerer
        self._seed = seed
        self._stop_token_ids = stop_token_ids

    def request(self, attempt: str) -> Request | None:
        """What the trainer of this attempt asks for now. Raises OSError, ValueError where that cannot be read."""
        path = self._run / "control" / _REQUEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            request = Request(**{**fields, "parts": tuple((first, end) for first, end in fields["parts"])})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: is no request for an evaluation: {error!r}") from None
        return request if request.attempt == attempt else None

    def next_part(self, request: Request, collector: str, incarnation: int) -> Lease | None:
        """One that this collector is to answer and has not. Raises OSError, ValueError likewise."""
        directory = request.directory(self._run)
        leases = read_leases(directory / _LEASES)
        for block in [] if leases is None else leases.blocks_of(collector, incarnation):
            lease = Lease(block, collector, incarnation)
            if not _answer_path(directory, lease).exists():
                return lease
        return None

    def answer(self, request: Request, lease: Lease) -> None:
        """By the weights that the engine has. Raises OSError where nobody waits for it any more, too."""
        start, (first, end) = time.monotonic(), request.parts[lease.block]
        evaluation = Evaluation(
            self._held_out,
            EvaluationConfig.model_validate(request.evaluation),
            seed=self._seed,
            max_response_tokens=request.max_response_tokens,
            stop_token_ids=self._stop_token_ids,
        )
        answers = evaluation.answer(self._answerer, evaluation.prompts[first:end])
        write_json(_answer_path(request.directory(self._run), lease), asdict(answers))
        print(
            f"evaluation of version {request.version}, part {lease.block}: {end - first} prompts, accuracy "
            f"{sum(answers.rewards) / len(answers.rewards):.4f}, {time.monotonic() - start:.1f} s",
            flush=True,
        )
