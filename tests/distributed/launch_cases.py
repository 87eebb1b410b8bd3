"""What the ranks do in test_launch.py. torch is imported where it is used: the others have short deadlines."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _write_down(directory: str, pid: int) -> None:
    (Path(directory) / str(pid)).touch()


def sum_of_ranks(word: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor(dist.get_rank())
    dist.all_reduce(total)
    print(f"{word} {dist.get_rank()} of {dist.get_world_size()}: {int(total)}")
    dist.destroy_process_group()


def second_rank_raises(directory: str) -> None:
    import torch.distributed as dist

    _write_down(directory, os.getpid())
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        while len(list(Path(directory).iterdir())) < 2:
            time.sleep(0.01)
        print(1 // 0)
    dist.barrier()


def second_rank_exits(directory: str) -> None:
    import torch.distributed as dist

    _write_down(directory, os.getpid())
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def hang(directory: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    _write_down(directory, os.getpid())
    _write_down(directory, child.pid)
    time.sleep(600)


def deaf(directory: str) -> None:
    _write_down(directory, os.getpid())
    faulthandler.cancel_dump_traceback_later()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
