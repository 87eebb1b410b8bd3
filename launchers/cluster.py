"""What a cluster is like: a TOML file that its user writes once. See slurm/clusters/h100.toml."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, PositiveInt, Strict, ValidationError, field_validator, model_validator

from reval_mcore.config import ConfigError, problem_of, read_toml
from reval_mcore.config.tree import Section

REPOSITORY = Path(__file__).resolve().parents[1]

_FROM_TOML = Strict(False)
Words = Annotated[tuple[str, ...], _FROM_TOML]


class SlurmConfig(Section):
    """What the cluster's Slurm wants to be told; "" says nothing."""

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    reservation: str = ""
    exclude: str = ""
    """Nodes not to use, as Slurm writes lists of them: "gpu[07,12-14]"."""
    gpu_option: Literal["--gpus-per-node", "--gres", "none"] = "--gpus-per-node"
    """How GPUs are asked for: --gpus-per-node=8, --gres=gpu:8, or not at all where nodes are given whole."""
    requeue_delay_s: PositiveInt = 120
    """How long Slurm waits before a requeued job starts again; only told to the user."""

    @field_validator("*")
    @classmethod
    def _one_line(cls, value: object) -> object:
        if isinstance(value, str) and re.search(r"[\x00-\x1f\x7f]", value):
            raise ValueError("has a line break or another control character; remove it")
        return value


class PythonConfig(Section):
    """Interpreters, as the nodes see them (in the container, where there is one). Relative paths are in this clone."""

    trainer: str = ".venv/bin/python"
    """With reval_mcore's packages; trainers and collectors run in it."""
    server: str
    """With SGLang; may be the same."""
    supervisor: str = "as trainer"
    """With reval_mcore's packages, on the nodes themselves; to be given where there is a container."""


class ServerConfig(Section):
    command: Words = ()
    """What starts an SGLang server, up to the model directory; empty: PYTHON -m sglang.launch_server --model-path."""
    arguments: Words = ()
    """Flags that every server on this cluster gets."""
    start_timeout_s: float = Field(default=1200.0, gt=0.0)
    """How long a server may take until it answers."""


class ContainerConfig(Section):
    kind: Literal["none", "pyxis", "apptainer"] = "none"
    """"pyxis": enroot images through Slurm's plugin. "apptainer": images that it executes."""
    image: str = ""
    mounts: Words = ()
    """"/host/path:/path/inside"; the clone, models, data and run directories belong among them."""


class NodeConfig(Section):
    gpus: int = Field(default=8, ge=0)
    """GPUs of a node; 0: a trainer process and a server a node, on CPU."""
    min_free_disk_gib: float = Field(default=50.0, ge=0.0)
    """In the run directory; less is a failure of preflight."""
    max_gpu_memory_in_use_mib: int = Field(default=2048, ge=0)
    """On a GPU before anything starts; more is somebody else's process."""
    max_clock_difference_s: float = Field(default=5.0, gt=0.0)
    """Between a node and the first one."""
    network_timeout_s: float = Field(default=180.0, gt=0.0)
    """Deadline of the all-reduce over the trainer nodes that preflight does."""
    first_port: int = Field(default=20_000, ge=1024, le=60_000)
    """Ports are taken from here up, below those that systems give to whoever asks for any."""


class Cluster(Section):
    """One file in slurm/clusters."""

    slurm: SlurmConfig = SlurmConfig()
    node: NodeConfig = NodeConfig()
    python: PythonConfig
    server: ServerConfig = ServerConfig()
    container: ContainerConfig = ContainerConfig()
    modules: Words = ()
    """For `module load`, in the job script."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Of every process of a run: NCCL and network settings."""
    server_environment: dict[str, str] = Field(default_factory=dict)
    """More for the servers."""

    @field_validator("environment", "server_environment")
    @classmethod
    def _names(cls, variables: dict[str, str]) -> dict[str, str]:
        wrong = next((name for name in variables if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is not the name of an environment variable; mend it")
        if any("\0" in value for value in variables.values()):
            raise ValueError("a value holds a NUL character; remove it")
        return variables

    @field_validator("modules")
    @classmethod
    def _module_names(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        wrong = next((name for name in modules if not re.fullmatch(r"[\w.+/-]+", name)), None)
        if wrong is not None:
            raise ValueError(f"{wrong!r} is not the name of a module; mend it")
        return modules

    @model_validator(mode="after")
    def _container(self) -> Cluster:
        if self.container.kind == "none" and (self.container.image or self.container.mounts):
            raise ValueError('container: an image or mounts and kind = "none"; give "pyxis" or "apptainer"')
        if self.container.kind != "none" and not self.container.image:
            raise ValueError(f'container: kind = "{self.container.kind}" and no image; give one')
        if self.container.kind != "none" and self.python.supervisor == "as trainer":
            raise ValueError(
                "python.supervisor: the job's script runs outside the container; give a Python for it there"
            )
        return self

    # ------------------------------------------------------------ what follows from it

    @property
    def trainer_python(self) -> str:
        return in_clone(self.python.trainer)

    @property
    def server_python(self) -> str:
        return in_clone(self.python.server)

    @property
    def supervisor_python(self) -> str:
        return self.trainer_python if self.python.supervisor == "as trainer" else in_clone(self.python.supervisor)

    @property
    def processes_per_node(self) -> int:
        return max(1, self.node.gpus)

    def num_servers(self, tensor_parallel_size: int) -> int:
        """Of a rollout node. Raises ValueError where they do not come out even."""
        if self.node.gpus == 0:
            return 1
        if self.node.gpus % tensor_parallel_size:
            raise ValueError(
                f"launch.server_tensor_parallel_size = {tensor_parallel_size}: a node has {self.node.gpus} GPUs "
                "(node.gpus); give a divisor of that"
            )
        return self.node.gpus // tensor_parallel_size


def in_clone(path: str) -> str:
    """A bare word is looked up on PATH by whoever runs it; anything else is a path, relative to this clone."""
    return path if "/" not in path else str(REPOSITORY / path)  # an absolute path stays what it is


def parse_cluster(raw: dict[str, Any], source: str) -> Cluster:
    """Raises ConfigError with every problem."""
    try:
        return Cluster.model_validate(raw)
    except ValidationError as error:
        problems = [problem_of(item, Cluster) for item in error.errors(include_url=False)]
        raise ConfigError(source, list({problem.path: problem for problem in problems}.values())) from None


def load_cluster(path: Path) -> Cluster:
    """Raises ConfigError with every problem, ValueError where there is no such file, or no TOML in it."""
    return parse_cluster(read_toml(path), str(path))


def dumps_cluster(cluster: Cluster) -> str:
    """As TOML; `parse_cluster` of it gives an equal Cluster."""
    return tomli_w.dumps(cluster.model_dump(mode="json"))
