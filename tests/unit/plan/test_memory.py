"""Parameters and memory of a plan against what the code really builds, allocates and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from reval_mcore.architecture import FAMILIES, Family, ModelSpec, read_config_json, read_spec
from reval_mcore.config import ParallelConfig
from reval_mcore.mcore.hf_mapping import global_names, hf_names, hf_shapes, to_shard
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.model import build_model, forward_logits, wrap_precision
from reval_mcore.mcore.optimizer import _parts
from reval_mcore.mcore.packing import build_micro_batch
from reval_mcore.mcore.topology import Topology
from reval_mcore.plan.memory import GRANULARITIES, Granularity, head_bytes_per_token, layer_bytes_per_token
from reval_mcore.plan.parameters import num_layer_parameters, num_model_parameters, num_stage_parameters
from reval_mcore.records import Batch
from tests.builders import make_batch, make_config, save_qwen2, scored, update
from tests.plans import ARCHITECTURES, planned, shipped
from tools import make_tiny_model

FP32: dict[str, Any] = {"implementation": "local", "precision": "fp32"}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2(tmp_path_factory.mktemp("model"), tie_word_embeddings=request.param)


def parallel(tp: int = 1, pp: int = 1) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


def equal_lengths(num_trajectories: int, length: int) -> Batch:
    """A batch whose trajectories are all of one length, the first two tokens of each its prompt."""
    num_tokens = num_trajectories * length
    mask = np.tile(np.arange(length) >= 2, num_trajectories)
    return dataclasses.replace(
        make_batch(num_trajectories, holes=False),
        tokens=np.random.default_rng(0).integers(0, 100, num_tokens).astype(np.int32),
        cu_seqlens=np.arange(num_trajectories + 1) * length,
        prompt_lengths=np.full(num_trajectories, 2),
        loss_mask=mask,
        rollout_logprobs=np.zeros(num_tokens, np.float32),
    )


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that torch has on the CPU at a time within `run`, beyond what it had."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    ordered: list[Any] = sorted(events, key=lambda event: event.start_ns())  # their stubs lack the bytes
    changes = [event.nbytes() for event in ordered]
    return int(np.cumsum(changes).max())


# ---------------------------------------------------------------- parameters


def test_parameters_of_a_process_are_those_that_it_builds(model: Path, topology: Topology) -> None:
    config = make_config(model)
    spec = read_spec(model)
    real = sum(parameter.numel() for parameter in build_model(config.model, spec, topology).parameters())
    assert num_stage_parameters(spec, parallel(), stage=0) == real
    assert planned(config).gpu.num_parameters == real
    assert num_model_parameters(spec) == sum(np.prod(shape) for shape in hf_shapes(spec).values())


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2])
def test_parameters_of_a_rank_are_the_shards_that_it_loads(model: Path, topology: Topology, tp: int, pp: int) -> None:
    spec = read_spec(model)
    shapes = {name: torch.empty(shape, device="meta") for name, shape in hf_shapes(spec).items()}
    found = [0] * pp
    whole = build_model(make_config(model).model, spec, topology)
    for name, _ in [*global_names(whole), *tied_copy(spec, pp)]:
        layout, sources = hf_names(name, spec)
        shard = to_shard(layout, [shapes[source] for source in sources], spec, tp_size=tp, tp_rank=0)
        found[stage_of(name, spec, pp)] += shard.numel()
    assert [num_stage_parameters(spec, parallel(tp, pp), stage) for stage in range(pp)] == found


def tied_copy(spec: ModelSpec, pp: int) -> list[tuple[str, None]]:
    """A tied output layer on another stage than the embedding has weights of its own."""
    return [("output_layer.weight", None)] if spec.tied_embeddings and pp > 1 else []


def stage_of(name: str, spec: ModelSpec, pp: int) -> int:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) // (spec.num_layers // pp)
    return 0 if name.startswith("embedding.") else pp - 1


def test_ranks_add_up_to_the_model() -> None:
    spec = read_config_json(ARCHITECTURES / "Qwen2.5-32B.json")
    for tp, pp in ((1, 1), (8, 1), (8, 4), (2, 64)):
        ranks = tp * sum(num_stage_parameters(spec, parallel(tp, pp), stage) for stage in range(pp))
        repeated = (tp - 1) * (2 * spec.num_layers + 1) * spec.hidden_size  # norms
        padding = 2 * (spec.padded_vocab_size(tp) - spec.vocab_size) * spec.hidden_size
        assert ranks == num_model_parameters(spec) + repeated + padding


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("Qwen2.5-Math-7B", 7_615_616_512),
        ("DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
        ("Qwen2.5-32B", 32_763_876_352),
    ],
)
def test_published_numbers_of_parameters(name: str, number: int) -> None:
    assert num_model_parameters(read_config_json(ARCHITECTURES / f"{name}.json")) == number


def test_a_family_with_other_norms_and_no_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "other", Family(qk_layernorm=True))
    spec = read_config_json(ARCHITECTURES / "Qwen2.5-Math-7B.json")
    spec = dataclasses.replace(spec, model_type="other")
    assert num_model_parameters(spec) == sum(np.prod(shape) for shape in hf_shapes(spec).values())
    norms = 2 * spec.hidden_size + 2 * spec.kv_channels
    assert num_layer_parameters(spec, 4) - norms == (num_layer_parameters(spec, 1) - norms) / 4


def test_the_demos_architecture_is_the_one_that_its_tool_makes(tmp_path: Path) -> None:
    make_tiny_model.save_config(tmp_path, make_tiny_model.Shape())
    assert read_spec(tmp_path) == read_config_json(ARCHITECTURES / "demo_model.json")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resident_memory_is_that_of_a_real_learner(model: Path, topology: Topology, precision: str) -> None:
    config = make_config(model, model=FP32 | {"precision": precision})
    learner, gpu = Learner(config, topology), planned(config).gpu
    gradients = [buffer.grad_data for buffer in buffers(learner)]
    assert gpu.weights_bytes == sum(p.numel() * p.element_size() for p in learner.model.parameters())
    assert gpu.gradients_bytes == pytest.approx(sum(each.nbytes for each in gradients), rel=0.03)  # they are padded
    assert gpu.optimizer_bytes == sum(tensor.nbytes for tensor in optimizer_tensors(learner))


def buffers(learner: Learner) -> list[Any]:
    ddp: Any = learner._ddp  # a module's attributes may be anything to a type checker
    return ddp.buffers


def optimizer_tensors(learner: Learner) -> Iterator[torch.Tensor]:
    """What the optimizer holds beside the weights themselves."""
    weights = {buffer.param_data.untyped_storage().data_ptr() for buffer in buffers(learner)}
    for part in _parts(learner._optimizer._optimizer):
        assert isinstance(part, DistributedOptimizer)
        for group in part.optimizer.param_groups:
            for each in group["params"]:
                if each.untyped_storage().data_ptr() not in weights:
                    yield each
                yield from (part.optimizer.state[each][name] for name in ("exp_avg", "exp_avg_sq"))


def test_optimizer_state_is_cut_over_data_and_context_parallel_ranks() -> None:
    sizes = [
        shipped("paper_7b", f"parallel.context_parallel_size={cp}", world_size=world).gpu.optimizer_bytes
        for cp, world in ((1, 4), (1, 16), (4, 16), (2, 16))
    ]
    assert [sizes[0] // size for size in sizes] == [1, 4, 4, 4]


def kept_bytes_per_token(hf_path: Path, topology: Topology, precision: str, granularity: Granularity) -> float:
    """What autograd keeps of a forward pass, weights left out: each storage once."""
    config = make_config(
        hf_path, model=FP32 | {"precision": precision}, parallel={"recompute_granularity": granularity}
    )
    spec = read_spec(hf_path)
    layout = dataclasses.replace(topology, parallel=config.parallel)
    built = build_model(config.model, spec, layout)
    weights = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.Tensor] = {}  # keeps them alive, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    batch = equal_lengths(4, 64)  # a power of two: the local attention pads nothing
    micro_batch = build_micro_batch(batch, np.arange(4), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_logits(wrap_precision(built).train(), micro_batch)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in weights) / (4 * 64)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_keeps_what_the_plan_says(
    tmp_path: Path, topology: Topology, precision: str, granularity: Granularity
) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    one, three = (save_qwen2(tmp_path / str(n), num_hidden_layers=n, **sizes) for n in (1, 3))
    kept = [kept_bytes_per_token(path, topology, precision, granularity) for path in (one, three)]
    e = 4 if precision == "fp32" else 2
    said = layer_bytes_per_token(read_spec(one), parallel(), e, granularity)
    # A CPU has no fused norm: it keeps fp32 copies of its input (of a bf16 one) and of its normalized input.
    on_cpu = 2 * 64 * (4 if precision == "fp32" else 4 + 4 - 2)
    on_local = 2 * 64 * e  # the local attention: two copies of its output
    extra = {"none": on_cpu + on_local, "selective": on_cpu, "full": 0}[granularity]
    index_bytes = (kept[1] - kept[0]) / 2 - extra - said
    assert 0 <= index_bytes <= 32


@pytest.mark.parametrize("vocab_size", [6400, 6401])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_heads_largest_moment_is_what_the_plan_says(
    tmp_path: Path, topology: Topology, precision: str, vocab_size: int
) -> None:
    """The vocabulary is so large that the head outweighs all else; padding costs a copy."""
    save_qwen2(tmp_path, vocab_size=vocab_size, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
    config = make_config(tmp_path, model=FP32 | {"precision": precision}, updates={"max_tokens_per_micro_batch": 512})
    learner = Learner(config, topology)
    batch = scored(learner, equal_lengths(4, 128))
    update(learner, batch, config)  # what is allocated once
    measured = peak_bytes(lambda: update(learner, batch, config))
    assert measured == pytest.approx(512 * head_bytes_per_token(learner.spec, parallel()), rel=0.05)


@pytest.mark.parametrize("granularity", ["none", "full"])
def test_a_pass_takes_at_most_what_the_plan_says(tmp_path: Path, topology: Topology, granularity: Granularity) -> None:
    """A wide MLP, as real models have it, so that what only a CPU keeps of norms and attention hardly counts."""
    save_qwen2(tmp_path, hidden_size=32, intermediate_size=1024, num_hidden_layers=2)
    config = make_config(
        tmp_path,
        model=FP32,
        parallel={"recompute_granularity": granularity},
        updates={"max_tokens_per_micro_batch": 1024},
    )
    learner = Learner(config, dataclasses.replace(topology, parallel=config.parallel))
    batch = scored(learner, equal_lengths(8, 128))
    update(learner, batch, config)
    measured = peak_bytes(lambda: update(learner, batch, config))
    assert planned(config).gpu.pass_bytes == pytest.approx(measured, rel=0.08)


def test_stages_keep_micro_batches_in_flight_and_only_the_last_has_a_head() -> None:
    one, four = (shipped("qwen2_5_32b", f"parallel.pipeline_model_parallel_size={pp}").gpu for pp in (1, 4))
    assert (one.stage, one.num_micro_batches_in_flight) == (0, 1)
    assert (four.stage, four.num_micro_batches_in_flight) == (0, 4)
    assert four.activations_bytes == pytest.approx(
        one.activations_bytes, rel=0.01
    )  # a fourth of the layers, four times
    assert one.head_bytes > 0 == four.head_bytes


def test_cutting_tokens_and_heads_cuts_activations() -> None:
    spec = read_config_json(ARCHITECTURES / "Qwen2.5-Math-7B.json")
    whole = layer_bytes_per_token(spec, parallel(), 2, "none")
    cut = layer_bytes_per_token(spec, ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True), 2, "none")
    assert cut - 8 * spec.kv_channels == pytest.approx((whole - 8 * spec.kv_channels) / 4)  # rope is of every head
    tokens = [shipped("paper_7b", f"parallel.context_parallel_size={cp}").gpu.activations_bytes for cp in (1, 2)]
    assert tokens[0] == pytest.approx(2 * tokens[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_has_the_size_that_the_plan_says(tmp_path: Path, topology: Topology, precision: str) -> None:
    save_qwen2(tmp_path / "model", hidden_size=128, intermediate_size=512, vocab_size=1000)
    config = make_config(tmp_path / "model", model=FP32 | {"precision": precision}, checkpoint={"interval": 5})
    learner, plan = Learner(config, topology), planned(config)
    (tmp_path / "weights").mkdir()
    measured = peak_bytes(lambda: learner.save(tmp_path / "weights").finish())
    size = sum(path.stat().st_size for path in (tmp_path / "weights").iterdir())
    assert plan.checkpoint.bytes_each == pytest.approx(size, rel=0.05)
    assert plan.host.save_bytes == pytest.approx(measured, rel=0.25)  # exact, but for what is collected late
