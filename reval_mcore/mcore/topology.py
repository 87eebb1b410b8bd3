"""The process groups of a run, made once and passed to whoever needs them."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from reval_mcore.config import ParallelConfig
from reval_mcore.control import die_with_parent
from reval_mcore.mcore import cpu_shim


@dataclass(frozen=True)
class Topology:
    """This process's place: its device and its groups (tp, pp, cp, dp, dp_cp, ...), in megatron-core's own record."""

    parallel: ParallelConfig
    groups: ProcessGroupCollection
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def is_first_stage(self) -> bool:
        return self.groups.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.groups.pp.rank() == self.groups.pp.size() - 1


def launched_world_size() -> int:
    """Number of processes that torchrun started with this one; 1 without it. Known before any group is made."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def open_topology(parallel: ParallelConfig | None = None, *, timeout_s: float = 600.0) -> Iterator[Topology]:
    """Join the processes of this run: those of torchrun where it started us, else this process alone.

    NCCL where CUDA is available, gloo elsewhere. Everything is torn down on leaving.
    """
    parallel = parallel or ParallelConfig()
    on_cuda = torch.cuda.is_available()
    timeout = datetime.timedelta(seconds=timeout_s)
    if on_cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if on_cuda else "gloo"
    if dist.is_torchelastic_launched():
        die_with_parent()  # a rank whose torchrun was killed would wait for the others for ever
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=True,  # the distributed optimizer gathers its state over gloo for checkpoints
        )
        cpu_shim.rescan()
        # nothing is drawn from these generators (no dropout, weights are loaded), but building layers asks for them
        model_parallel_cuda_manual_seed(0)
        yield Topology(parallel=parallel, groups=ProcessGroupCollection.use_mpu_process_groups(), device=device)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
