"""Is this node fit? Runs on every node before anything starts; the supervisor reads what they say and judges.

Only what a node sees is told here, as numbers; `failures_of` compares them. The all-reduce comes last, with a deadline:
what is known by then is on the filesystem already.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from launchers.cluster import Cluster
from launchers.job import Job, open_job
from launchers.steps import is_free
from reval_mcore.durable import write_json

_SERVER_VERSION = "import importlib.metadata as m; print(m.version('sglang'))"
_ALL_REDUCE_BYTES = 64 << 20
_NUM_PORTS_TRIED = 32
_CANARY_PATIENCE_S = 60.0  # names on a network filesystem may come late


@dataclass(frozen=True)
class Report:
    """Of one node."""

    node: str
    is_canary_seen: bool = False  # the file that the first node wrote into the run directory
    clock_difference_s: float = 0.0  # to the filesystem's, which all nodes share
    free_disk_gib: float = 0.0
    num_free_ports: int = 0  # of some that were tried from node.first_port up
    gpu_memory_in_use_mib: tuple[int, ...] = ()  # one a GPU
    versions: Mapping[str, str] = field(default_factory=dict)
    all_reduce: str = "not done"  # "passed", or what went wrong; trainer nodes only
    all_reduce_s: float = 0.0


def look(job: Job, node: str, reports: Path, *, serves: bool) -> Report:
    """All but the network. `serves`: SGLang is to run here."""
    seen, clock = _see_canary(reports, node)
    return Report(
        node=node,
        is_canary_seen=seen,
        clock_difference_s=clock,
        free_disk_gib=shutil.disk_usage(job.run).free / 2**30,
        num_free_ports=_num_free_ports(job.cluster.node.first_port),
        gpu_memory_in_use_mib=_gpu_memory_in_use_mib(),
        versions=_versions(job, serves=serves),
    )


def _see_canary(reports: Path, node: str) -> tuple[bool, float]:
    """(whether the file of the first node is here, this clock less that of the filesystem)."""
    deadline = time.monotonic() + _CANARY_PATIENCE_S
    while not (reports / "canary").exists():
        if time.monotonic() > deadline:
            return False, 0.0
        time.sleep(0.2)
    mine = reports / f"canary_{node}"
    before = time.time()
    mine.write_text(node)
    after = time.time()
    return True, (before + after) / 2 - mine.stat().st_mtime


def _num_free_ports(first: int) -> int:
    return sum(is_free(port) for port in range(first, first + _NUM_PORTS_TRIED))


def _gpu_memory_in_use_mib() -> tuple[int, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return tuple(int(line) for line in done.stdout.split()) if done.returncode == 0 else ()


def _versions(job: Job, *, serves: bool) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "megatron-core", "transformers", "nvidia-nccl-cu12", "nvidia-nccl-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if serves:
        command = [job.cluster.server_python, "-c", _SERVER_VERSION]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            found["sglang"] = done.stdout.strip() or f"not there: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
        except OSError as error:
            found["sglang"] = f"not there: {error}"
    return found


def all_reduce(job: Job, rank: int, master: str) -> tuple[str, float]:
    """("passed", seconds), or what went wrong, in words. One process a trainer node, 64 MiB, over NCCL or gloo."""
    import torch
    import torch.distributed as dist

    number, timeout_s = job.config.launch.num_trainer_nodes, job.cluster.node.network_timeout_s
    has_gpu = torch.cuda.is_available()
    try:
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            init_method=f"tcp://{master}",
            rank=rank,
            world_size=number,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        values = torch.ones(_ALL_REDUCE_BYTES // 4, device="cuda:0" if has_gpu else "cpu")
        start = time.monotonic()
        dist.all_reduce(values)
        total = float(values[-1])
        seconds = time.monotonic() - start
        dist.destroy_process_group()
    except RuntimeError as error:
        return (str(error).splitlines() or ["?"])[0], 0.0
    return ("passed" if total == number else f"summed {number} ones to {total:g}"), seconds


# ---------------------------------------------------------------- judging


def read_reports(folder: Path) -> dict[str, Report]:
    """By node."""
    found = {}
    for path in sorted(folder.glob("report_*.json")):
        fields = json.loads(path.read_text())
        fields["gpu_memory_in_use_mib"] = tuple(fields["gpu_memory_in_use_mib"])
        found[fields["node"]] = Report(**fields)
    return found


def failures_of(reports: Mapping[str, Report], nodes: Sequence[str], cluster: Cluster) -> list[str]:
    """What speaks against starting; each begins with the node that is to blame."""
    failures = [
        f"{node}: said nothing; is it reachable, and is the run directory on a filesystem that it sees?"
        for node in nodes
        if node not in reports
    ]
    for report in reports.values():
        failures += [f"{report.node}: {text}" for text in _failures_of_one(report, cluster)]
    for package in sorted({name for report in reports.values() for name in report.versions}):
        failures += _odd_versions(package, reports)
    clocks = {node: report.clock_difference_s for node, report in reports.items()}
    first = clocks.get(nodes[0], 0.0)
    for node, difference in clocks.items():
        if abs(difference - first) > cluster.node.max_clock_difference_s:
            failures.append(f"{node}: its clock differs by {difference - first:.1f} s from that of {nodes[0]}")
    return failures


def _failures_of_one(report: Report, cluster: Cluster) -> list[str]:
    limits, failures = cluster.node, []
    if not report.is_canary_seen:
        failures.append("does not see what the first node wrote into the run directory; is it on a shared filesystem?")
    if report.free_disk_gib < limits.min_free_disk_gib:
        failures.append(
            f"{report.free_disk_gib:.1f} GiB are free for the run directory, node.min_free_disk_gib wants "
            f"{limits.min_free_disk_gib:g}"
        )
    if len(report.gpu_memory_in_use_mib) < limits.gpus:
        failures.append(f"has {len(report.gpu_memory_in_use_mib)} GPUs that answer, node.gpus = {limits.gpus}")
    if report.num_free_ports == 0:
        failures.append(f"no free port from node.first_port = {limits.first_port} up")
    busy = [index for index, mib in enumerate(report.gpu_memory_in_use_mib) if mib > limits.max_gpu_memory_in_use_mib]
    if busy and limits.gpus:
        used = ", ".join(f"GPU {index}: {report.gpu_memory_in_use_mib[index]} MiB" for index in busy)
        failures.append(f"memory in use before anything started ({used}); somebody else's process is left there")
    if report.versions.get("sglang", "").startswith("not there"):
        failures.append(f"SGLang in python.server: {report.versions['sglang']}")
    if report.all_reduce not in ("passed", "not done"):
        failures.append(f"all-reduce over the trainer nodes: {report.all_reduce}")
    return failures


def _odd_versions(package: str, reports: Mapping[str, Report]) -> list[str]:
    """Nodes with another version than most."""
    found = {node: report.versions[package] for node, report in reports.items() if package in report.versions}
    usual, _ = Counter(found.values()).most_common(1)[0]
    return [f"{node}: {package} {version}, others have {usual}" for node, version in found.items() if version != usual]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m launchers.preflight", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rank", type=int, required=True, help="of this node in the job")
    parser.add_argument("--node", required=True)
    parser.add_argument("--reports", type=Path, required=True)
    parser.add_argument("--master", required=True, metavar="ADDRESS:PORT")
    arguments = parser.parse_args()
    job = open_job(arguments.run)
    trains = arguments.rank < job.config.launch.num_trainer_nodes
    report = look(job, arguments.node, arguments.reports, serves=not trains)
    path = arguments.reports / f"report_{arguments.node}.json"
    waiting = "not answered in time" if trains else "not done"
    write_json(path, asdict(replace(report, all_reduce=waiting)))
    if trains:
        result, seconds = all_reduce(job, arguments.rank, arguments.master)
        write_json(path, asdict(replace(report, all_reduce=result, all_reduce_s=seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
