"""The ReVal loop: the only room where collection, replay, objectives and megatron-core meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from reval_mcore.checkpoints import Checkpoints
from reval_mcore.collector import Collected, Collector
from reval_mcore.config import Config, is_due
from reval_mcore.control import News, StopSignals, TrainerHeart, WakeUps
from reval_mcore.durable import write_json
from reval_mcore.evaluation import EvaluationResult
from reval_mcore.mcore.learner import Learner
from reval_mcore.metrics import MetricsWriter, PhaseClock
from reval_mcore.objectives import make_objective, make_targets, shape_rewards
from reval_mcore.ranks import Ranks
from reval_mcore.records import Batch, UpdateStats
from reval_mcore.remote_collection import RemoteCollection
from reval_mcore.rollout.engine import RolloutEngine
from reval_mcore.run_directory import Found, RunDirectory
from reval_mcore.shared_replay import SharedReplay

_CONSOLE = {
    "collect/accuracy": "accuracy",
    "update/loss": "loss",
    "update/residual_abs": "|residual|",
    "update/grad_norm": "grad",
    "update/log_ratio": "log-ratio",
}


@dataclass
class Progress:
    """Where a run is: counters and results that outlive a restart."""

    iteration: int = 0  # the next one
    num_updates: int = 0  # attempted
    num_skipped_updates: int = 0
    num_trajectories: int = 0
    num_reference_resets: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation_before: dict[str, float] = field(default_factory=dict)
    collection: dict[str, Any] = field(default_factory=dict)  # what collectors have done; asynchronous mode


class Trainer:
    def __init__(
        self,
        config: Config,
        *,
        learner: Learner,
        engine: RolloutEngine,
        collector: Collector | RemoteCollection,
        evaluate: Callable[[int], EvaluationResult | None],
        replay: SharedReplay,
        directory: RunDirectory,
        checkpoints: Checkpoints,
        metrics: MetricsWriter | None,
        stop: StopSignals,
        heart: TrainerHeart | None,
        wakeups: WakeUps | None,
        ranks: Ranks,
    ) -> None:
        """All ranks of a run have one, and go through it together. `evaluate(version)` is of the engine's weights, None
        where the run is asked to stop meanwhile; `metrics`, `heart` and `wakeups` are the first rank's."""
        self.config = config
        self.learner = learner
        self.engine = engine
        self.collector = collector
        self.replay = replay
        self.directory = directory
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.stop = stop
        self.ranks = ranks
        self.objective = make_objective(config.objective)
        self.wakeups = wakeups
        self.clock = PhaseClock(None if heart is None else lambda phase: heart.beat(self.progress.iteration, phase))
        self.progress = Progress()
        self._evaluate = evaluate
        self._evaluated: tuple[int, EvaluationResult] | None = None  # after which iteration, and what

    # ------------------------------------------------------------ the loop

    def train(self) -> None:
        """One iteration: engine at policy version v; collect, admit, update K times; version v + 1 to the engine."""
        config, progress = self.config, self.progress
        if self.metrics is not None:
            self.metrics.start_clock()
        for iteration in range(progress.iteration, config.run.num_iterations):
            if self.stop_reason() is not None:
                break
            collected = self.collect(iteration)
            if collected is None:  # asked to stop while waiting
                break
            fresh = self.admit(collected)
            mismatch = self.measure_mismatch(fresh)
            updates = [self.update(batch) for batch in self.batches(fresh)]
            self.publish_weights(iteration + 1)
            progress.iteration = iteration + 1
            if is_due(config.reference.reset_interval, iteration):
                self.reset_reference(iteration + 1)
            evaluation = self.evaluate() if is_due(config.evaluation.interval, iteration) else None
            self.log(iteration, collected, mismatch, updates, evaluation)
            if is_due(config.checkpoint.interval, iteration):
                self.save()
            self.checkpoints.publish_if_done()

    # ------------------------------------------------------------ its steps

    def collect(self, iteration: int) -> Collected | None:
        with self.clock.phase("collect"):
            return self.collector.collect(iteration)

    def stop_reason(self) -> str | None:
        """A signal that any of the ranks has had."""
        return next((reason for reason in self.ranks.gather(self.stop.reason) if reason is not None), None)

    def admit(self, collected: Collected) -> np.ndarray:
        """Journal the fresh trajectories, evict the oldest, and have the reference score what is new: int64 rows."""
        with self.clock.phase("admit"):
            fresh = self.replay.admit(collected.shards)
        self.progress.num_trajectories += len(fresh)
        if self.config.checkpoint.interval == "never":  # no checkpoint will need what was evicted
            self.replay.unlink_evicted()
        self.score(fresh)
        return fresh

    def score(self, rows: np.ndarray) -> None:
        """Store reference scores for those of `rows` that have none of the current reference."""
        version = self.learner.reference_version
        stale = self.replay.stale_rows(rows, version)
        size = self.config.updates.batch_size
        with self.clock.phase("score"):
            for start in range(0, len(stale), size):
                batch = self.replay.batch(stale[start : start + size])
                if len(batch):  # less than asked for where a shard proves to be damaged
                    self.replay.set_reference_scores(batch.rows, self.learner.score_reference(batch), version)

    def batches(self, fresh: np.ndarray) -> Iterator[Batch]:
        """The K batches of an iteration. Under lazy refresh, rows of an older reference are scored here."""
        config, first_update = self.config, self.progress.num_updates
        for index in range(config.updates.per_iteration):
            if index == 0 and config.replay.first_update == "fresh":
                batch = self.replay.batch(fresh)
            elif len(self.replay) >= max(1, config.replay.min_size):
                batch = self.replay.sample(config.updates.batch_size, first_update + index)
            else:
                return
            if len(self.replay.stale_rows(batch.rows, self.learner.reference_version)):
                self.score(batch.rows)
                scored = self.replay.batch(batch.rows)
                if len(scored) < len(batch):  # a shard was lost since
                    continue
                batch = replace(scored, relative_probability=batch.relative_probability)
            if len(batch):  # none where what is fresh was damaged on disk, and is in quarantine
                yield batch

    def update(self, batch: Batch) -> UpdateStats:
        targets = make_targets(batch, self.config.reward, importance_exponent=self.importance_exponent())
        with self.clock.phase("update"):
            stats = self.learner.update(batch, targets, self.objective)
        self.replay.record_update(batch.rows, stats.residual)
        self.progress.num_updates += 1
        self.progress.num_skipped_updates += stats.skipped
        age = float((self.progress.iteration - batch.policy_version).mean())  # in versions: one an iteration
        return replace(stats, metrics={**stats.metrics, "age_mean": age})

    def importance_exponent(self) -> float:
        """From its setting to 1 over all updates of the run; 0 stays 0."""
        start, config = self.config.replay.importance_exponent, self.config
        done = self.progress.num_updates / (config.run.num_iterations * config.updates.per_iteration)
        return start + (1.0 - start) * min(done, 1.0) if start else 0.0

    def publish_weights(self, version: int) -> None:
        with self.clock.phase("weights"):
            weights = partial(self.learner.export_weights, wanted=self.engine.wants_weights)
            self.engine.update_weights(weights, version)
        if self.wakeups is not None:
            self.wakeups.signal(News.WEIGHTS)

    def reset_reference(self, version: int) -> None:
        """reference <- policy. Eager refresh sweeps the buffer now, while both are the same weights.

        ReVal's residuals are -r / beta then, and their priorities follow; where shaping goes by a batch, it is by the
        whole buffer here.
        """
        with self.clock.phase("reset"):
            self.learner.reset_reference(version)
        self.progress.num_reference_resets += 1
        if self.config.objective.name == "reval":
            reward, beta = self.config.reward, self.config.objective.beta
            self.replay.reset_residuals(lambda rewards: -shape_rewards(rewards, reward) / beta)
        if self.config.reference.refresh == "eager":
            self.score(self.replay.live_rows())

    def measure_mismatch(self, fresh: np.ndarray) -> dict[str, float]:
        """Engine against learner: log-probabilities of the same tokens under the same weights. Never in the loss."""
        rows = fresh[: self.config.logging.mismatch_trajectories]
        batch = self.replay.batch(rows)
        if len(batch) == 0:
            return {}
        with self.clock.phase("mismatch"):
            logprobs = self.learner.score(batch).logprobs
        gap = np.abs(logprobs - batch.rollout_logprobs)[batch.loss_mask]
        return {"mismatch/logprob_abs_mean": float(gap.mean()), "mismatch/logprob_abs_max": float(gap.max())}

    def evaluate(self) -> EvaluationResult | None:
        """Of the engine's weights, None where the run is asked to stop; a second call after the same iteration costs
        nothing."""
        iteration = self.progress.iteration
        if self._evaluated is not None and self._evaluated[0] == iteration:
            return self._evaluated[1]
        with self.clock.phase("evaluate"):
            result = self._evaluate(iteration)
        if result is not None:
            self._evaluated = iteration, result
        return result

    # ------------------------------------------------------------ what a run leaves behind

    def log(
        self,
        iteration: int,
        collected: Collected,
        mismatch: dict[str, float],
        updates: Sequence[UpdateStats],
        evaluation: EvaluationResult | None,
    ) -> None:
        seconds, statistics = self.clock.take_step(), self.replay.statistics(iteration + 1)
        if self.metrics is None:
            return
        metrics = {f"collect/{name}": value for name, value in collected.metrics.items()}
        metrics |= mismatch | _update_metrics(updates)
        metrics |= {f"replay/{name}": value for name, value in statistics.items()}
        metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
        metrics |= {
            "progress/num_updates": float(self.progress.num_updates),
            "progress/num_skipped_updates": float(self.progress.num_skipped_updates),
            "progress/num_trajectories": float(self.progress.num_trajectories),
            "progress/reference_age": float(iteration + 1 - self.learner.reference_version),
        }
        if evaluation is not None:
            metrics |= {f"evaluation/{name}": value for name, value in evaluation.metrics().items()}
            for index, sample in enumerate(collected.samples):
                self.metrics.text(f"samples/{index}", sample, iteration)
        self.metrics.write(iteration, metrics)
        shown = _CONSOLE | {"evaluation/accuracy": "held-out", "evaluation/greedy_accuracy": "greedy"}
        self.metrics.line(iteration, metrics, shown)

    def save(self) -> None:
        """A checkpoint of this moment; in the background where checkpoint.async_save says so."""
        if self.metrics is not None:
            self.metrics.sync()  # the lines before a checkpoint must outlive a power cut too
        with self.clock.phase("checkpoint"):
            self.checkpoints.save(self.progress.iteration, self._state())

    def leave_checkpoint(self) -> None:
        """One of this moment, whole."""
        self.save()
        self.checkpoints.publish()

    def _state(self) -> dict[str, Any]:
        return asdict(self.progress) | {"seconds": self.seconds(), "collection": self.collector.state()}

    def run(self) -> str:
        """Evaluate, train, evaluate, and write summary.json; or, asked to stop, leave a checkpoint to go on from.

        Returns the reason for the end, "finished" or a signal's name, which control/exit.json holds too.
        """
        if not self.progress.evaluation_before:
            before = self.evaluate()
            self.progress.evaluation_before = {} if before is None else before.metrics()
        self.train()
        if self.config.checkpoint.interval != "never":
            self.leave_checkpoint()
        evaluation = self.evaluate() if self.progress.iteration == self.config.run.num_iterations else None
        if evaluation is None:
            self.leave_checkpoint()
        reason = self.stop_reason() if evaluation is None else None
        record = {"reason": reason or "finished", "iteration": self.progress.iteration}
        if self.ranks.is_first:
            if evaluation is not None:
                write_json(self.directory.summary, self.summary(evaluation))
            write_json(self.directory.exit_record, record)
            self.stop.obeyed()
        return record["reason"]

    def resume(self, found: Found) -> None:
        """Go on from a checkpoint. What was collected after it is used again; journal and states go back to it."""
        self.progress = Progress(**self.checkpoints.restore(found.checkpoint))
        self.collector.restore(self.progress.collection)
        used: list[str] = []
        pending = self.replay.pending_shards()
        if not found.had_other_settings:  # under other settings they would be another run's
            used = self.collector.take_over(self.replay.shards, pending)
        self.replay.discard_pending(keep=[name for names in self.ranks.gather(used) for name in names])

    def seconds(self) -> dict[str, float]:
        """By phase, over all attempts."""
        names = {**self.progress.seconds, **self.clock.total_s}
        return {n: self.progress.seconds.get(n, 0.0) + self.clock.total_s.get(n, 0.0) for n in names}

    def summary(self, after: EvaluationResult) -> dict[str, object]:
        progress = self.progress
        return {
            **{f"{name}_before": value for name, value in progress.evaluation_before.items()},
            **{f"{name}_after": value for name, value in after.metrics().items()},
            "evaluation": {
                "num_prompts": after.num_prompts,
                "num_samples": after.num_samples,
                "temperature": after.temperature,
                "top_p": after.top_p,
                "max_response_tokens": after.max_response_tokens,
            },
            "seed": self.config.run.seed,
            "num_parameters": self.learner.num_parameters,
            "iterations": progress.iteration,
            "trajectories_generated": progress.num_trajectories,
            "updates": progress.num_updates,
            "skipped_updates": progress.num_skipped_updates,
            "reference_resets": progress.num_reference_resets,
            "seconds": {name: round(value, 2) for name, value in self.seconds().items()},
        }


def _update_metrics(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """Means over the updates of an iteration, and quantiles of all their residuals."""
    if not updates:
        return {}
    names = updates[0].metrics
    metrics = {f"update/{name}": float(np.mean([stats.metrics[name] for stats in updates])) for name in names}
    residual = np.concatenate([stats.residual for stats in updates])
    for percent in (5, 50, 95):
        metrics[f"update/residual_p{percent:02d}"] = float(np.percentile(residual, percent))
    metrics["update/residual_abs"] = float(np.abs(residual).mean())
    metrics["update/num_skipped"] = float(sum(stats.skipped for stats in updates))
    return metrics
