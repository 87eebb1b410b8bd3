"""A real Slurm with virtual nodes on one machine, for tests and for trying at home.

    python3 slurm/mini/mini_slurm.py up DIR [--nodes 4]     munged, slurmctld and a slurmd a node; under a second
    . DIR/env.sh                                            now sbatch, squeue, srun, ... are of this cluster
    python3 slurm/mini/mini_slurm.py kill-node DIR n4       sudden death; Slurm notices within half a minute
    python3 slurm/mini/mini_slurm.py start-node DIR n4
    python3 slurm/mini/mini_slurm.py down DIR               nothing of it is left running

Needs root (slurmd starts jobs as whoever submitted them) and slurmctld, slurmd and munged; on Debian
`bash slurm/mini/install.sh`. Nothing outside DIR is read or written: a Slurm of the machine's own is not touched.
Made for Slurm 22.05, Debian 12's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd")
_NUM_GPUS = 8  # a node: device files that are like /dev/null
_MAX_SOCKET_PATH_BYTES = 107  # of a unix socket's name

# cred_expire decides how long a requeued job waits (default: two minutes). Nothing uses cgroups here, but 22.05 wants a
# name. Accounts are checked by _JOB_SUBMIT, which needs no database.
_SLURM_CONF = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={dir}/munge/sock,cred_expire=5
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd-%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={dir}/jobcomp.txt
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=8
InactiveLimit=0
KillWait=5
MinJobAge=3600
UnkillableStepTimeout=30
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
GresTypes=gpu
JobSubmitPlugins=lua
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port}-{last_port} CPUs=8 RealMemory=4096 \
Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=reserved Nodes=ALL MaxTime=INFINITE State=UP
"""
# Partition "reserved" is for account "research" alone.
_JOB_SUBMIT = """\
function slurm_job_submit(job, partitions, user)
  if job.partition == "reserved" and job.account ~= "research" then
    return slurm.ESLURM_INVALID_ACCOUNT
  end
  return slurm.SUCCESS
end

function slurm_job_modify(change, job, partitions, user)
  return slurm.SUCCESS
end
"""


def up(directory: Path, num_nodes: int) -> None:
    """Start everything and wait until all nodes are idle. Raises ValueError where something is missing."""
    _check(directory)
    for name in ("state", "spool", "log", "dev", "munge"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)
    _start_munged(directory)
    for index in range(_NUM_GPUS):
        device = directory / "dev" / f"gpu{index}"
        if not device.exists():
            os.mknod(device, 0o20666, os.makedev(1, 3))
    port = _free_ports(num_nodes + 1)
    conf = _SLURM_CONF.format(
        dir=directory,
        host=socket.gethostname(),
        port=port,
        first_port=port + 1,
        last_port=port + num_nodes,
        nodes=num_nodes,
        gpus=_NUM_GPUS,
    )
    (directory / "slurm.conf").write_text(conf)
    (directory / "job_submit.lua").write_text(_JOB_SUBMIT)
    (directory / "gres.conf").write_text(f"Name=gpu File={directory}/dev/gpu[0-{_NUM_GPUS - 1}]\n")
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (directory / "env.sh").write_text(f"export SLURM_CONF='{directory}/slurm.conf'\n")
    _run(directory, "slurmctld", "-i", "-c")  # -c: the state of an earlier cluster here is forgotten
    _wait("slurmctld answers", lambda: "is UP" in _output(directory, "scontrol", "ping"))
    for number in range(1, num_nodes + 1):
        start_node(directory, f"n{number}")
    _wait("all nodes are idle", lambda: _num_idle(directory) == num_nodes)


def _check(directory: Path) -> None:
    if os.geteuid() != 0:
        raise ValueError("needs root: slurmd starts jobs as whoever submitted them")
    missing = [name for name in _DAEMONS if shutil.which(name) is None]
    if missing:
        raise ValueError(f"not installed: {', '.join(missing)}; on Debian: bash slurm/mini/install.sh")
    if _daemons(directory):
        raise ValueError(f"{directory}: a cluster is up there; take it down first, or give another directory")
    if len(os.fsencode(directory / "munge" / "sock")) > _MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"{directory}: too long for the name of a socket; give a shorter path")
    if any(character in str(directory) for character in " '\"%#\\"):
        raise ValueError(f"{directory}: Slurm's configuration takes no such characters; give another path")


def _start_munged(directory: Path) -> None:
    """With a key and a socket of its own, so that a munged of the machine is neither needed nor touched."""
    munge = directory / "munge"
    munge.chmod(0o711)
    key = munge / "key"
    key.unlink(missing_ok=True)
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    files = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={munge / name}" for option, name in files.items()]
    subprocess.run(["munged", "--force", "--num-threads=2", *options], check=True)
    _wait("munged answers", lambda: (munge / "sock").exists())


def _free_ports(number: int) -> int:
    """The first of so many in a row, below those that the system gives to whoever asks for any."""
    while True:
        first = 15_000 + secrets.randbelow(12_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + number):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


def start_node(directory: Path, name: str) -> None:
    pid = directory / f"slurmd-{name}.pid"
    pid.unlink(missing_ok=True)
    (directory / "spool" / name).mkdir(exist_ok=True)
    _run(directory, "slurmd", "-N", name)
    _wait(f"slurmd of {name} runs", lambda: pid.exists() and pid.read_text().strip() != "")


def kill_node(directory: Path, name: str) -> None:
    """SIGKILL of its slurmd, then of its step daemons and of all that they run, as when a power supply fails."""
    daemon = int((directory / f"slurmd-{name}.pid").read_text())
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon, signal.SIGKILL)
    wanted = {f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={directory}/slurm.conf".encode()}
    for _ in range(2):  # what was started meanwhile too
        for process in _processes():
            environment = set(_read(process / "environ").split(b"\0"))
            if not wanted <= environment:
                continue
            parent = _parent(process)
            for pid in (parent, int(process.name)):
                if pid == int(process.name) or _read(Path(f"/proc/{pid}/cmdline")).startswith(b"slurmstepd"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def down(directory: Path) -> None:
    """Cancel every job, end the daemons by process id, never by name."""
    if _daemons(directory):
        with contextlib.suppress(subprocess.TimeoutExpired):
            _output(directory, "scancel", "--user=root", timeout_s=10)
            with contextlib.suppress(TimeoutError):
                _wait("no job is left", lambda: _output(directory, "squeue", "-h").strip() == "", timeout_s=20)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _daemons(directory):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            _wait("the daemons have ended", lambda: not _daemons(directory), timeout_s=8)
            break


# ---------------------------------------------------------------- small things


def _daemons(directory: Path) -> list[int]:
    """Those of this cluster that live: a number in a pid file may have been given to another process since."""
    found = []
    for path in (directory / "munge" / "pid", directory / "slurmctld.pid", *directory.glob("slurmd-*.pid")):
        text = _read(path).decode().strip()
        name = os.path.basename(_read(Path(f"/proc/{text}/cmdline")).split(b"\0")[0]) if text.isdigit() else b""
        if name.decode() in _DAEMONS:
            found.append(int(text))
    return found


def _processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit() and int(path.name) != os.getpid()]


def _read(path: Path) -> bytes:
    """What there is to read: a process may have ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _parent(process: Path) -> int:
    fields = _read(process / "stat").rpartition(b") ")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _num_idle(directory: Path) -> int:
    return _output(directory, "sinfo", "-h", "-N", "-p", "all", "-o", "%t").split().count("idle")


def _environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "SLURM_CONF": str(directory / "slurm.conf")}


def _run(directory: Path, *command: str) -> None:
    subprocess.run(command, env=_environment(directory), check=True, timeout=30)


def _output(directory: Path, *command: str, timeout_s: float = 5.0) -> str:
    done = subprocess.run(
        command, env=_environment(directory), capture_output=True, text=True, timeout=timeout_s, check=False
    )
    return done.stdout


def _wait(what: str, is_so: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real Slurm with virtual nodes on one machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "down", "kill-node", "start-node"):
        command = commands.add_parser(name)
        command.add_argument("directory", type=Path, metavar="DIR")
        if name == "up":
            command.add_argument("--nodes", type=int, default=4, metavar="N")
        elif name != "down":
            command.add_argument("node", metavar="NODE")
    arguments = parser.parse_args()
    directory: Path = arguments.directory.resolve()
    try:
        if arguments.command == "up":
            up(directory, arguments.nodes)
            print(f"up: {arguments.nodes} nodes are idle; now: . {directory}/env.sh")
        elif arguments.command == "down":
            down(directory)
        elif arguments.command == "kill-node":
            kill_node(directory, arguments.node)
        else:
            start_node(directory, arguments.node)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        logs = f"; its logs: {directory}/log" if (directory / "log").is_dir() else ""
        print(f"mini_slurm.py: {error}{logs}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
