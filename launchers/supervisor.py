"""Runs on the first node of a job and sees it through: starts the trainer and the rollout nodes, and decides what the
end of each means.

The trainer is one step over its nodes and dies as a whole. Each rollout node is a step of its own: it is started again
when it fails, and dropped when its node is lost. What an end means is in files: the trainer's exit record, and whether
there is a newer checkpoint. The rules are in `judge`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launchers.job import ENDED, Job, Standing, open_job
from launchers.preflight import failures_of, read_reports
from launchers.steps import RANK, LocalSteps, SlurmSteps, Step, Steps, end, free_port
from reval_mcore.durable import write_text

_POLL_S = 0.5
_LOST_INTERVAL_S = 5.0  # between questions to Slurm
_HEALTHY_S = 600.0  # a rollout node that ran for so long begins anew to count its failures
_MAX_BACKOFF_S = 60.0
_PREFLIGHT_PATIENCE_S = 120.0  # beyond the deadline of its all-reduce: the imports
_LAST_LINES = 15

Reason = Literal["time_limit", "too_few_rollout_nodes", "SIGTERM"]


@dataclass(frozen=True)
class End:
    """Of one attempt at a run."""

    standing: Standing
    detail: str
    is_failure: bool = False


def judge(
    *, reason: str | None, asked_for: Reason | None, status: int | None, is_newer: bool, is_node_lost: bool, detail: str
) -> End:
    """What the end of a trainer means.

    `reason`: in its exit record, None where it left none. `asked_for`: why the supervisor asked it to stop, if it did.
    `is_newer`: there is a newer checkpoint than at its start. `is_node_lost`: the job has fewer nodes than it had.
    """
    if reason == "finished":
        return End("finished", "all iterations are done")
    has_stopped = reason not in (None, "error")
    if asked_for == "SIGTERM":
        saved = "stopped at a checkpoint" if has_stopped else "ended before it could save, the last checkpoint counts"
        return End("cancelled", f"SIGTERM: {saved}")
    if has_stopped and asked_for == "time_limit":
        return End("requeued", "time_limit: stopped at a checkpoint")
    if has_stopped and asked_for == "too_few_rollout_nodes":
        if is_newer or is_node_lost:
            return End("requeued", "too_few_rollout_nodes: stopped at a checkpoint", is_failure=True)
        return End(
            "failed", "too few rollout nodes are left, and no iteration was done: the next attempt would fail too"
        )
    if has_stopped:
        return End("stopped", f"asked to stop: {reason}")
    told = detail or f"the trainer ended with status {status}"
    if is_node_lost:
        return End("requeued", f"a node is lost: {told}", is_failure=True)
    if is_newer:
        return End("requeued", f"failed after a newer checkpoint: {told}", is_failure=True)
    return End("failed", f"failed before any new checkpoint, so the next attempt would too: {told}")


@dataclass
class Rollout:
    """A rollout node and how it fares."""

    node: str
    step: Step
    started: float
    num_failures: int = 0  # in a row
    restart_at: float | None = None  # while it is down


class Attempt:
    """One start of the trainer with its rollout nodes, to its end."""

    def __init__(self, job: Job, steps: Steps) -> None:
        self._job = job
        self._steps = steps
        self._launch = job.config.launch
        self._trainers = steps.nodes[: self._launch.num_trainer_nodes]
        self._directory = job.directory
        self._logs = self._directory.begin_attempt()
        self._signal: str | None = None
        self._asked_for: Reason | None = None
        self._rollouts: list[Rollout] = []
        self._beat: tuple[str, float] = ("", time.monotonic())  # the trainer's last, and when it came
        self._lost: set[str] = set()
        self._asked_slurm = time.monotonic()

    def run(self) -> End:
        job, directory = self._job, self._directory
        job.tell("running", "", attempt=self._logs.name)
        say(
            f"{self._logs.name}: trainers {' '.join(self._trainers)}; rollouts {' '.join(self._rollout_nodes()) or '-'}"
        )
        directory.control.mkdir(exist_ok=True)
        for stale in (directory.exit_record, directory.stop_request, directory.control / "trainer.json"):
            stale.unlink(missing_ok=True)
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)
        failures = self._preflight() if self._launch.preflight else []
        if self._signal is not None:
            is_cut = self._signal == "SIGUSR1"
            return End("requeued" if is_cut else "cancelled", f"{self._signal} before the trainer was started")
        if failures:
            return End("failed", "; ".join(failures))
        before = directory.latest_checkpoint()
        master = self._trainers[0]
        port = free_port(job.cluster.node.first_port)
        command = job.trainer_command(self._steps.address(master), port)
        trainer = self._steps.start("trainer", self._trainers, command, self._logs / f"trainer.{RANK}.log")
        self._rollouts = [self._start_rollout(node) for node in self._rollout_nodes()]
        detail = self._watch(trainer)
        self._ask_slurm(now=True)
        missed = self._steps.nodes if self._asked_for == "too_few_rollout_nodes" else self._trainers
        end(
            self._steps,
            [trainer, *(rollout.step for rollout in self._rollouts)],
            job.config.rollout.collector_timeout_s,
        )
        return judge(
            reason=self._reason(),
            asked_for=self._asked_for,
            status=trainer.status(),
            is_newer=directory.latest_checkpoint() != before,
            is_node_lost=not self._lost.isdisjoint(missed),
            detail=detail or self._last_words(),
        )

    def _rollout_nodes(self) -> tuple[str, ...]:
        return self._steps.nodes[self._launch.num_trainer_nodes :]

    def _note(self, number: int, frame: object) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C; what was started goes with this process
        self._signal = self._signal or signal.Signals(number).name

    def _ask_to_stop(self, reason: Reason) -> None:
        if self._asked_for is None:
            self._asked_for = reason
            say(f"{reason}: the trainer is asked to stop at the end of its iteration")
            write_text(self._directory.stop_request, reason)

    # ------------------------------------------------------------ while it runs

    def _watch(self, trainer: Step) -> str:
        """Until the trainer has ended, or must be ended; why, where that is known."""
        self._beat = ("", time.monotonic())
        while trainer.status() is None:
            time.sleep(_POLL_S)
            if self._signal is not None:
                self._ask_to_stop("time_limit" if self._signal == "SIGUSR1" else "SIGTERM")
            silent_s = self._silence()
            has_begun = self._beat[0] != ""
            if silent_s > (self._launch.trainer_timeout_s if has_begun else self._launch.trainer_start_timeout_s):
                return f"the trainer was silent for {silent_s:.0f} s, after {self._last_phase()}"
            self._ask_slurm()
            if not self._lost.isdisjoint(self._trainers):
                return f"lost: {', '.join(sorted(self._lost.intersection(self._trainers)))}"
            if self._asked_for is None:
                self._mend_rollouts()
        return ""

    def _silence(self) -> float:
        """Seconds since the trainer last said what it does."""
        try:
            told = (self._directory.control / "trainer.json").read_text()
        except OSError:
            told = ""
        if told and told != self._beat[0]:
            self._beat = (told, time.monotonic())
        return time.monotonic() - self._beat[1]

    def _last_phase(self) -> str:
        if not self._beat[0]:
            return "its start"
        said = json.loads(self._beat[0])
        return f"it had come to iteration {said['iteration'] + 1}, {said['phase']}"

    def _ask_slurm(self, *, now: bool = False) -> None:
        if now or time.monotonic() - self._asked_slurm > _LOST_INTERVAL_S:
            self._lost, self._asked_slurm = self._steps.lost(), time.monotonic()

    # ------------------------------------------------------------ rollout nodes

    def _start_rollout(self, node: str) -> Rollout:
        command = self._job.rollout_command(node, self._steps.address(node))
        step = self._steps.start(f"rollout_{node}", [node], command, self._logs / f"rollout_{node}.log")
        return Rollout(node, step, time.monotonic())

    def _mend_rollouts(self) -> None:
        """Start those again that have failed, give up those whose node is lost or that fail again and again."""
        now = time.monotonic()
        for rollout in list(self._rollouts):
            if rollout.restart_at is not None and now >= rollout.restart_at:
                say(f"rollout {rollout.node}: started again")
                restarted = self._start_rollout(rollout.node)
                rollout.step, rollout.started, rollout.restart_at = restarted.step, now, None
            elif rollout.restart_at is None and (status := rollout.step.status()) is not None:
                self._ask_slurm(now=True)
                self._judge_rollout(rollout, status, now)
            elif rollout.node in self._lost:
                self._drop(rollout, "its node is lost; it comes back with the next requeue, if it is mended")
        if self._launch.num_rollout_nodes and len(self._rollouts) < self._launch.min_rollout_nodes:
            self._ask_to_stop("too_few_rollout_nodes")

    def _judge_rollout(self, rollout: Rollout, status: int, now: float) -> None:
        """The status alone tells nothing: it is 0 too where the node has died."""
        if rollout.node in self._lost:
            self._drop(rollout, "its node is lost; it comes back with the next requeue, if it is mended")
            return
        rollout.num_failures = 1 if now - rollout.started > _HEALTHY_S else rollout.num_failures + 1
        if rollout.num_failures > self._launch.max_rollout_failures:
            advice = f"for the next job: exclude = {json.dumps(rollout.node)} in [slurm] of the cluster file"
            self._drop(rollout, f"failed {rollout.num_failures} times in a row; {advice}")
            return
        backoff_s = min(2.0 ** (rollout.num_failures - 1), _MAX_BACKOFF_S)
        say(f"rollout {rollout.node}: ended with status {status}; again in {backoff_s:g} s")
        rollout.restart_at = now + backoff_s

    def _drop(self, rollout: Rollout, why: str) -> None:
        self._rollouts.remove(rollout)
        say(f"rollout {rollout.node}: dropped, {why}; {len(self._rollouts)} left")

    # ------------------------------------------------------------ before and after

    def _preflight(self) -> list[str]:
        """What speaks against starting, node by node."""
        cluster = self._job.cluster
        reports = self._logs / "preflight"
        reports.mkdir()
        canary = reports / "canary"
        write_text(canary, f"{time.time()}")
        port = free_port(cluster.node.first_port)
        command = self._job.preflight_command(reports, self._steps.address(self._trainers[0]), port)
        step = self._steps.start("preflight", self._steps.nodes, command, self._logs / f"preflight.{RANK}.log")
        deadline = time.monotonic() + cluster.node.network_timeout_s + _PREFLIGHT_PATIENCE_S
        while step.status() is None and time.monotonic() < deadline and self._signal is None:
            time.sleep(0.1)
        end(self._steps, [step], 5.0)
        failures = failures_of(read_reports(reports), self._steps.nodes, cluster)
        nodes = [node for node in self._steps.nodes if any(text.startswith(f"{node}: ") for text in failures)]
        if nodes:
            failures.append(f"without them: exclude = {json.dumps(','.join(nodes))} in [slurm] of the cluster file")
        say("preflight: " + ("; ".join(failures) or f"{len(self._steps.nodes)} nodes are fit"))
        return failures

    def _reason(self) -> str | None:
        try:
            return json.loads(self._directory.exit_record.read_text())["reason"]
        except FileNotFoundError:
            return None

    def _last_words(self) -> str:
        """Of the trainer: what it said of a mistake of its user, or the last lines of the first log that has any."""
        logs = sorted(self._logs.glob("trainer.*.log"))
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        told = [index for index, line in enumerate(lines) if line.startswith("reval train: ")]
        if told:
            first, *others = lines[told[0] :][:_LAST_LINES]
            return "\n".join([first, *(line for line in others if line.startswith("  "))])
        raised = [line for line in lines if line and not line[0].isspace() and "Error: " in line]
        return f"{raised[-1] if raised else (lines or ['it said nothing'])[-1]} (logs: {self._logs})"


def say(text: str) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", flush=True)


def conclude(job: Job, ended: End) -> End:
    """With what earlier attempts had: a run that fails again and again has failed."""
    num_failures = job.state().num_failures + ended.is_failure
    if ended.standing == "requeued" and num_failures > job.config.launch.max_failures:
        ended = End("failed", f"failed {num_failures} times (launch.max_failures); the last time: {ended.detail}")
    job.tell(ended.standing, ended.detail, num_failures=num_failures)
    say(f"{ended.standing}: {ended.detail}")
    return ended


def supervise(job: Job, steps: Steps) -> End:
    """One attempt; where it is to go on, Slurm is told."""
    ended = conclude(job, Attempt(job, steps).run())
    if ended.standing == "requeued":
        next_id = steps.requeue(job.script)
        if next_id:
            job.tell("requeued", ended.detail, job_ids=(*job.state().job_ids, next_id))
    return ended


def supervise_here(job: Job) -> End:
    """On this machine, attempt after attempt."""
    while True:
        ended = supervise(job, LocalSteps(job.num_nodes, job.cluster, job.environment()))
        if ended.standing != "requeued":
            return ended


def main() -> int:
    """As the last line of a Slurm job's script."""
    parser = argparse.ArgumentParser(prog="python -m launchers.supervisor", description=__doc__)
    parser.add_argument("run", type=Path, help="of a job that launchers.slurm or launchers.nemo has prepared")
    job = open_job(parser.parse_args().run)
    if job.state().standing in ENDED and job.state().standing != "cancelled":  # which Slurm may start again itself
        say(f"nothing to do: {job.state().standing}, {job.state().detail}")
        return job.state().exit_status
    job_id = os.environ["SLURM_JOB_ID"]
    if job_id not in job.state().job_ids:
        job.tell(job.state().standing, job_ids=(*job.state().job_ids, job_id))
    steps = SlurmSteps(job_id, os.environ["SLURM_JOB_NODELIST"], job.cluster, job.environment())
    if len(steps.nodes) != job.num_nodes:
        ended = conclude(job, End("failed", f"{len(steps.nodes)} nodes, {job.num_nodes} were asked for"))
        return job.state().exit_status if ended else 1
    ended = supervise(job, steps)
    if ended.standing == "requeued":
        time.sleep(30.0)  # Slurm ends this process; it does not like to be overtaken
    return job.state().exit_status


if __name__ == "__main__":
    sys.exit(main())
