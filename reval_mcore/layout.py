"""Which parallel layouts a model can have: asked before any process group is made."""

from __future__ import annotations

from collections.abc import Iterator

from reval_mcore.architecture import ModelSpec
from reval_mcore.config import ConfigError, ParallelConfig, Problem


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    return world_size // parallel.model_parallel_size


def check_layout(parallel: ParallelConfig, spec: ModelSpec, world_size: int) -> None:
    """Raises ConfigError with all that keeps this model from this layout, each with the values that would work."""
    problems = list(_problems(parallel, spec, world_size))
    if problems:
        raise ConfigError("[parallel]", problems)


def _problems(parallel: ParallelConfig, spec: ModelSpec, world_size: int) -> Iterator[Problem]:
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cut_by_tp = {
        "key-value heads": spec.num_query_groups,
        "attention heads": spec.num_attention_heads,
        "columns of the MLP": spec.ffn_hidden_size,
    }
    not_divided = [f"{number} {what}" for what, number in cut_by_tp.items() if number % tp]
    if not_divided:
        works = [size for size in _divisors(spec.num_query_groups) if not any(n % size for n in cut_by_tp.values())]
        yield Problem(
            "parallel.tensor_model_parallel_size",
            tp,
            f"does not divide the model's {', '.join(not_divided)}; give one of {_list(works)}",
        )
    if spec.num_layers % pp:
        yield Problem(
            "parallel.pipeline_model_parallel_size",
            pp,
            f"does not divide the model's {spec.num_layers} layers; give one of {_list(_divisors(spec.num_layers))}",
        )
    size = parallel.model_parallel_size
    if world_size % size:
        factors = f"{tp} x {pp} x {parallel.context_parallel_size}"
        yield Problem(
            "parallel.*_size",
            size,
            f"one copy of the model takes {factors} = {size} processes (tensor x pipeline x context), and {world_size} "
            f"{'is' if world_size == 1 else 'are'} started; start a multiple of {size} (torchrun --nproc_per_node), or "
            f"choose sizes whose product is one of {_list(_divisors(world_size))}",
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values))
