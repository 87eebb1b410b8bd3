"""A job: one configuration on one cluster, in one run directory, and the command lines that follow from them.

RUN/launch/config.toml   resolved, as every process of the job reads it     RUN/launch/cluster.toml   likewise
RUN/launch/job.sbatch    what Slurm runs                                    RUN/launch/job.log        what it said
RUN/launch/state.json    how it stands, see State                           RUN/launch/server.key     of the servers
"""

from __future__ import annotations

import json
import os
import secrets
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from launchers.cluster import REPOSITORY, Cluster, dumps_cluster, load_cluster
from reval_mcore.architecture import read_spec
from reval_mcore.config import Config, check_readable, dumps, in_words, load, parse
from reval_mcore.durable import write_json, write_text
from reval_mcore.layout import check_layout
from reval_mcore.plan import find_architecture
from reval_mcore.run_directory import RunDirectory

Standing = Literal["submitted", "running", "requeued", "finished", "stopped", "cancelled", "failed"]
ENDED = ("finished", "stopped", "cancelled", "failed")


@dataclass(frozen=True)
class State:
    """How a chain of jobs stands: the one file that all who ask about it read."""

    standing: Standing
    detail: str = ""
    job_ids: tuple[str, ...] = ()  # of Slurm; the last one counts
    num_failures: int = 0  # of the trainer, after each of which it went on from a newer checkpoint
    attempt: str = ""  # its directory below logs/
    updated_at: float = field(default_factory=time.time)

    @property
    def exit_status(self) -> int:
        return int(self.standing == "failed")


@dataclass(frozen=True)
class Job:
    config: Config
    cluster: Cluster
    run: Path  # absolute

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.run)

    @property
    def folder(self) -> Path:
        return folder_of(self.run)

    @property
    def config_file(self) -> Path:
        return self.folder / "config.toml"

    @property
    def script(self) -> Path:
        return self.folder / "job.sbatch"

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    @property
    def num_nodes(self) -> int:
        return self.config.launch.num_trainer_nodes + self.config.launch.num_rollout_nodes

    @property
    def num_trainer_processes(self) -> int:
        return self.config.launch.num_trainer_nodes * self.cluster.processes_per_node

    def environment(self) -> dict[str, str]:
        """Of every process of it, on top of what a node gives. The packages of this clone come first."""
        return {**self.cluster.environment, "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}

    # ------------------------------------------------------------ command lines

    def trainer_command(self, master_address: str, master_port: int) -> list[str]:
        """For each trainer node, which has its number as SLURM_PROCID. SIGUSR1 is for the supervisor: torchrun, which
        would die of it, does not see it where Slurm gives it to everybody."""
        torchrun = 'trap "" USR1; exec "$0" -m torch.distributed.run --node-rank="$SLURM_PROCID" "$@"'
        return [
            *("bash", "-c", torchrun, self.cluster.trainer_python),
            f"--nnodes={self.config.launch.num_trainer_nodes}",
            f"--nproc-per-node={self.cluster.processes_per_node}",
            f"--master-addr={master_address}",
            f"--master-port={master_port}",
            *("-m", "reval_mcore.cli", "train", str(self.config_file)),
        ]

    def rollout_command(self, node: str, address: str) -> list[str]:
        python = self.cluster.trainer_python
        return [python, "-m", "launchers.rollout_node", str(self.run), "--node", node, "--address", address]

    def preflight_command(self, reports: Path, master_address: str, master_port: int) -> list[str]:
        """For every node, which has its number as SLURM_PROCID and its name as SLURMD_NODENAME."""
        look = 'trap "" USR1; exec "$0" -m launchers.preflight --rank="$SLURM_PROCID" --node="$SLURMD_NODENAME" "$@"'
        return [
            *("bash", "-c", look, self.cluster.trainer_python, str(self.run)),
            *("--reports", str(reports), "--master", f"{master_address}:{master_port}"),
        ]

    def server_command(self, index: int, port: int) -> list[str]:
        """The server number `index` of a node."""
        launch, gpus = self.config.launch, self.cluster.node.gpus
        plain = (self.cluster.server_python, "-m", "sglang.launch_server", "--model-path")
        command = [
            *(self.cluster.server.command or plain),
            str(self.config.model.hf_path),
            *("--host", "0.0.0.0", "--port", str(port), "--api-key", self.server_key()),
        ]
        if gpus:
            size = launch.server_tensor_parallel_size
            command += ["--tp-size", str(size), "--base-gpu-id", str(index * size)]
        return [*command, *self.cluster.server.arguments, *launch.server_arguments]

    def collector_command(self, node: str) -> list[str]:
        return [self.cluster.trainer_python, "-m", "reval_mcore.cli", "collect", str(self.config_file), "--name", node]

    def server_key(self) -> str:
        return Path(self.config.rollout.api_key_file).read_text().strip()

    # ------------------------------------------------------------ how it stands

    def state(self) -> State:
        return read_state(self.run)

    def tell(self, standing: Standing, detail: str = "", **changes: object) -> State:
        """Replace state.json."""
        fields = {"standing": standing, "detail": detail, "updated_at": time.time(), **changes}
        state = replace(self.state(), **fields)  # pyright: ignore[reportArgumentType]
        write_state(self.run, state)
        return state


def folder_of(run: Path) -> Path:
    return run / "launch"


def read_state(run: Path) -> State:
    """Raises ValueError where no launcher has made this run."""
    path = folder_of(run) / "state.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{run}: no launch/state.json in it; give the run directory of a launched run") from None
    return State(**{**fields, "job_ids": tuple(fields["job_ids"])})


def write_state(run: Path, state: State) -> None:
    write_json(folder_of(run) / "state.json", asdict(state))


def plan_job(config_file: Path, overrides: Sequence[str], cluster_file: Path) -> Job:
    """Everything checked that can be checked before anything is made. Raises ValueError."""
    cluster = load_cluster(cluster_file)
    config = load(config_file, overrides)
    run = Path(os.path.abspath(config.run.directory))
    if any(character in str(run) for character in '\n\r\t\\"'):
        raise ValueError(
            f"run.directory = {str(run)!r}: Slurm's file names take no line breaks, tabs, backslashes and double "
            "quotes; give another"
        )
    job = Job(config, cluster, run)
    spec, _ = find_architecture(config, config_file)
    check_layout(config.parallel, spec, job.num_trainer_processes)
    if config.launch.num_rollout_nodes:
        cluster.num_servers(config.launch.server_tensor_parallel_size)
        if not config.rollout.api_key_file:
            raw = tomllib.loads(dumps(config))
            raw["rollout"]["api_key_file"] = str(folder_of(run) / "server.key")
            job = replace(job, config=parse(raw, str(config_file)))
    return job


def check_inputs(job: Job) -> None:
    """Raises ValueError where what the configuration names is not there; in a container it may have other names."""
    if job.cluster.container.kind == "none":
        read_spec(job.config.model.hf_path)
        for path in (job.config.prompts.train, job.config.prompts.held_out):
            check_readable(path)


def prepare_job(job: Job, is_alive: Callable[[State], bool]) -> None:
    """Make the run directory and what a job finds in it. Raises ValueError where that cannot be, or one is at work.

    `is_alive`: whether one that did not tell its end is there still; a machine may have died with it.
    """
    if (job.folder / "state.json").exists():
        state = read_state(job.run)
        if state.standing not in ENDED and is_alive(state):
            raise ValueError(
                f"run.directory = {job.run}: its last job is {state.standing}; stop it first "
                f"(python -m launchers.slurm stop {job.run}), or give another directory"
            )
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        key = job.folder / "server.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_text(f"{secrets.token_urlsafe(32)}\n")
        write_text(job.config_file, dumps(job.config))
        write_text(job.folder / "cluster.toml", dumps_cluster(job.cluster))
        write_state(job.run, State("submitted"))
    except OSError as error:
        raise ValueError(f"run.directory = {in_words(error)}") from None


def open_job(run: Path) -> Job:
    """One that was prepared."""
    return Job(load(folder_of(run) / "config.toml"), load_cluster(folder_of(run) / "cluster.toml"), run)
