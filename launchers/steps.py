"""How processes get to the nodes of a job: by Slurm, or on this machine.

A step is one command on one or more nodes. Its end says nothing by itself: srun returns 0 when its node has died, and
a process that saved a checkpoint may have been ended by another's status.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launchers.cluster import Cluster
from reval_mcore.control import die_with_parent

_SLURM_TIMEOUT_S = 60.0  # of squeue and its like, where the controller is busy
RANK = "{rank}"


@dataclass(frozen=True)
class Step:
    name: str
    nodes: tuple[str, ...]
    processes: tuple[subprocess.Popen[bytes], ...]  # srun, or the commands themselves

    def status(self) -> int | None:
        """None while it runs; else 0, or the first that is not."""
        statuses = [process.poll() for process in self.processes]
        failed = [status for status in statuses if status]
        if failed:
            return failed[0]  # of a step that has failed in part, nothing is worth waiting for
        return None if None in statuses else 0

    def has_ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes)


class Steps(Protocol):
    nodes: tuple[str, ...]  # of the job at its start, in order

    def address(self, node: str) -> str:
        """Under which others reach it."""
        ...

    def lost(self) -> set[str]:
        """Nodes that the job has no more."""
        ...

    def start(self, name: str, nodes: Sequence[str], command: Sequence[str], log: Path) -> Step:
        """`log`: a file that is appended to; with RANK in its name, one a node."""
        ...

    def signal(self, step: Step, number: int) -> None: ...

    def requeue(self, script: Path) -> str:
        """Have the job start again from the beginning. Returns the id of the one to come, "" where it is this one."""
        ...


def free_port(first: int) -> int:
    """On this machine, at random from there up: a port is bound only a while after it was found free."""
    while True:
        port = first + secrets.randbelow(8_000)
        if is_free(port):
            return port


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def end(steps: Steps, ending: Sequence[Step], patience_s: float) -> None:
    """Ask by SIGTERM, wait, then SIGKILL."""
    for number, seconds in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 30.0)):
        alive = [step for step in ending if not step.has_ended()]
        for step in alive:
            steps.signal(step, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not all(step.has_ended() for step in alive):
            time.sleep(0.1)


# ---------------------------------------------------------------- Slurm


def slurm(*command: str, timeout_s: float = _SLURM_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands. Raises ValueError where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise ValueError(f"{command[0]}: not found; is this a machine of the cluster, with Slurm on PATH?") from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: no answer for {timeout_s:g} s")


def expand(nodes: str) -> tuple[str, ...]:
    """Slurm's "n[1-3,7]", as names."""
    return tuple(slurm("scontrol", "show", "hostnames", nodes).stdout.split()) if nodes else ()


def file_pattern(path: Path) -> str:
    """A file name for Slurm, which replaces %j and its like."""
    return str(path).replace("%", "%%")


class SlurmSteps:
    def __init__(self, job_id: str, nodes: str, cluster: Cluster, environment: Mapping[str, str]) -> None:
        """`nodes`: as Slurm writes them."""
        self._job_id = job_id
        self.nodes = expand(nodes)
        self._cluster = cluster
        self._environment = environment

    def address(self, node: str) -> str:
        shown = slurm("scontrol", "-o", "show", "node", node).stdout
        found = re.search(r"\bNodeAddr=(\S+)", shown)
        return found[1] if found is not None else node

    def lost(self) -> set[str]:
        left = slurm("squeue", "-h", "-j", self._job_id, "-o", "%N")
        if left.returncode != 0 or not left.stdout.strip():  # a controller that does not answer has lost nothing
            return set()
        return set(self.nodes) - set(expand(left.stdout.strip()))

    def start(self, name: str, nodes: Sequence[str], command: Sequence[str], log: Path) -> Step:
        options = [
            f"--job-name={name}",
            f"--nodes={len(nodes)}",
            f"--ntasks={len(nodes)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(nodes)}",
            "--no-kill",
            "--kill-on-bad-exit=1",
            "--overlap",
            "--export=ALL",
            "--cpu-bind=none",
            "--open-mode=append",
            f"--output={file_pattern(log).replace(RANK, '%t')}",
        ]
        if self._cluster.slurm.gpu_option != "none":
            options.append(gpu_request(self._cluster))
        if self._cluster.container.kind == "pyxis":
            options += [f"--container-image={self._cluster.container.image}"]
            options += [f"--container-mounts={','.join(self._cluster.container.mounts)}"]
        process = subprocess.Popen(
            ["srun", *options, *in_container(self._cluster, command)],
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        return Step(name, tuple(nodes), (process,))

    def signal(self, step: Step, number: int) -> None:
        """By name: steps get their numbers in no fixed order."""
        listed = slurm("squeue", "-s", "-h", "-j", self._job_id, "-o", "%i %j").stdout.splitlines()
        for line in listed:
            step_id, _, name = line.partition(" ")
            if name == step.name:
                slurm("scancel", f"--signal={signal.Signals(number).name.removeprefix('SIG')}", step_id)

    def requeue(self, script: Path) -> str:
        refused = slurm("scontrol", "requeue", self._job_id)
        if refused.returncode == 0:
            return ""
        print(
            f"Slurm does not requeue this job ({refused.stderr.strip()}); another one is submitted after it", flush=True
        )
        submitted = slurm("sbatch", "--parsable", f"--dependency=afterany:{self._job_id}", str(script))
        if submitted.returncode != 0:
            raise RuntimeError(f"neither requeued nor submitted again: {submitted.stderr.strip()}")
        return submitted.stdout.strip().partition(";")[0]


def gpu_request(cluster: Cluster) -> str:
    return (
        f"--gres=gpu:{cluster.node.gpus}"
        if cluster.slurm.gpu_option == "--gres"
        else f"--gpus-per-node={cluster.node.gpus}"
    )


def in_container(cluster: Cluster, command: Sequence[str]) -> list[str]:
    if cluster.container.kind != "apptainer":
        return list(command)
    binds = [word for mount in cluster.container.mounts for word in ("--bind", mount)]
    return ["apptainer", "exec", *(["--nv"] if cluster.node.gpus else []), *binds, cluster.container.image, *command]


# ---------------------------------------------------------------- this machine


class LocalSteps:
    """As many "nodes" as are asked for, which share this machine: each has its own GPUs, in order."""

    def __init__(self, num_nodes: int, cluster: Cluster, environment: Mapping[str, str]) -> None:
        self.nodes = tuple(f"node{index}" for index in range(num_nodes))
        self._cluster = cluster
        self._environment = environment

    def address(self, node: str) -> str:
        return "127.0.0.1"

    def lost(self) -> set[str]:
        return set()

    def start(self, name: str, nodes: Sequence[str], command: Sequence[str], log: Path) -> Step:
        processes = []
        for rank, node in enumerate(nodes):
            environment = {**os.environ, **self._environment, "SLURM_PROCID": str(rank), "SLURMD_NODENAME": node}
            if gpus := self._cluster.node.gpus:
                first = self.nodes.index(node) * gpus
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first, first + gpus)))
            with Path(str(log).replace(RANK, str(rank))).open("ab") as output:
                processes.append(
                    subprocess.Popen(
                        in_container(self._cluster, command),
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=die_with_parent,
                    )
                )
        return Step(name, tuple(nodes), tuple(processes))

    def signal(self, step: Step, number: int) -> None:
        """To the command alone, which passes SIGTERM on; SIGKILL to all of its session."""
        for process in step.processes:
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                elif process.poll() is None:
                    process.send_signal(number)

    def requeue(self, script: Path) -> str:
        return ""
