"""Putting a run together: from a configuration to a Trainer with all its parts, and taking it apart again."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from reval_mcore.architecture import ModelSpec, read_spec
from reval_mcore.attempt_log import log_to
from reval_mcore.checkpoints import Checkpoints
from reval_mcore.collector import Answerer, Collector
from reval_mcore.collector_process import WEIGHTS_OF, CollectorProcess
from reval_mcore.config import Config, ModelConfig, read_json
from reval_mcore.control import StopSignals, TrainerHeart, WakeUps, open_wakeups, serve_wakeups
from reval_mcore.conversion.sources import CheckpointSource
from reval_mcore.conversion.to_hf import convert_to_hf
from reval_mcore.durable import crc32, write_json
from reval_mcore.engines import connect, embed_engine, make_engine
from reval_mcore.evaluation import Evaluation, EvaluationResult, evaluate
from reval_mcore.layout import check_layout
from reval_mcore.mcore.hf_directory import check_weights
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.model import resolve_implementation
from reval_mcore.mcore.topology import launched_world_size, open_topology
from reval_mcore.mcore.weight_checkpoint import WeightCheckpoint, check_checkpoint, check_files, find_weights
from reval_mcore.metrics import MetricsWriter
from reval_mcore.prompts import (
    load_prompts,
    load_tokenizer,
    overlap,
    prompts_for_iteration,
    template_hash,
    tokenizer_hash,
)
from reval_mcore.ranks import Ranks
from reval_mcore.records import Prompt
from reval_mcore.remote_collection import RemoteCollection
from reval_mcore.remote_evaluation import EvaluationDesk, RemoteEvaluation
from reval_mcore.replay.buffer import ReplayBuffer
from reval_mcore.replay.samplers import make_sampler
from reval_mcore.replay.shards import ShardWriter, next_incarnation
from reval_mcore.rollout.sglang import SGLangEngine
from reval_mcore.rollout.weight_sync import FollowedWeights
from reval_mcore.run_directory import WEIGHTS, Found, RunDirectory, read_trainer_state
from reval_mcore.shared_replay import SharedReplay
from reval_mcore.trainer import Trainer
from reval_mcore.verifiers import VerifierPool

logger = logging.getLogger(__name__)


def check_model(config: ModelConfig) -> ModelSpec:
    """Raises ValueError where the settings do not name a model that can be trained here; reads no weights."""
    spec = read_spec(config.hf_path)
    if config.has_checkpoint:
        check_checkpoint(WeightCheckpoint(find_weights(config.checkpoint)), spec)
    else:
        check_weights(config.hf_path, spec)
    resolve_implementation(config)
    return spec


def read_model(config: Config) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """(tokenizer, stop tokens). Raises ValueError where model, tokenizer and settings do not fit together."""
    hf_path = config.model.hf_path
    spec = check_model(config.model)  # before the tokenizer: transformers looks into config.json to choose its class
    tokenizer = load_tokenizer(hf_path)
    if len(tokenizer) > spec.vocab_size:
        raise ValueError(
            f"model.hf_path = {hf_path}: its tokenizer has {len(tokenizer)} tokens, its embedding {spec.vocab_size} "
            "rows; take tokenizer and weights from the same model"
        )
    stops = stop_token_ids(config, spec, tokenizer)
    longest = config.prompts.max_tokens + config.rollout.max_response_tokens
    if longest > spec.max_position_embeddings:
        raise ValueError(
            f"prompts.max_tokens + rollout.max_response_tokens = {longest}: more than the model's "
            f"{spec.max_position_embeddings} positions (max_position_embeddings in {hf_path}/config.json); lower one"
        )
    return tokenizer, stops


def stop_token_ids(config: Config, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """rollout.stop_token_ids, else those of generation_config.json or config.json, else the tokenizer's.

    Raises ValueError where there are none, or where one is no token.
    """
    place, ids = _stop_tokens(config, tokenizer)
    for token in ids:
        if type(token) is not int or not 0 <= token < spec.vocab_size:
            raise ValueError(
                f"{place} = {ids}: {token!r} is not the id of a token, these are 0 to {spec.vocab_size - 1}; mend it"
            )
    return tuple(ids)


def _stop_tokens(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Any]]:
    """(where they are from, their ids)."""
    if config.rollout.stop_token_ids:
        return "rollout.stop_token_ids", list(config.rollout.stop_token_ids)
    for name in ("generation_config.json", "config.json"):
        path = config.model.hf_path / name
        found = read_json(path).get("eos_token_id") if path.exists() else None
        if found is not None:
            return f"{path}: eos_token_id", found if isinstance(found, list) else [found]
    if isinstance(tokenizer.eos_token_id, int):
        return f"{config.model.hf_path}: the tokenizer's eos_token_id", [tokenizer.eos_token_id]
    raise ValueError(f"rollout.stop_token_ids: {config.model.hf_path} names no end-of-sequence token; give it here")


def check_processes(config: Config) -> None:
    """Raises ValueError where the processes that were started do not make the layout of [parallel]."""
    check_layout(config.parallel, read_spec(config.model.hf_path), launched_world_size())


def read_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts. Raises ValueError where a prompt is in both, or there are too few."""
    train = load_prompts(config.prompts.train, config.prompts, tokenizer)
    held_out = load_prompts(config.prompts.held_out, config.prompts, tokenizer)
    shared = overlap(train, held_out)
    if shared:
        text = shared[0][1].text
        raise ValueError(
            f"prompts.held_out = {config.prompts.held_out}: {len(shared)} of its {len(held_out)} prompts are training "
            f"prompts too, {text[:60]!r} among them; remove them from one of the files"
        )
    prompts_for_iteration(0, config.rollout.num_prompts, len(train), config.run.seed)  # refuses too few
    return train, held_out


def quiet_libraries() -> None:
    """Silence what libraries say about their own internals: nobody who trains can act on it."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", message=r".*is deprecated\. Please use `torch\.distributed\.", category=FutureWarning
    )
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\.", category=FutureWarning)
    warnings.filterwarnings("ignore", message="full scope is deprecated", category=UserWarning)


@contextlib.contextmanager
def open_trainer(config: Config, *, allow_changed: Collection[str] = ()) -> Iterator[Trainer]:
    """Everything of a run, ready to train, resumed where the run directory holds a checkpoint."""
    tokenizer, stops = read_model(config)
    check_processes(config)
    train_prompts, held_out = read_prompts(config, tokenizer)
    directory = RunDirectory(config.run.directory)
    with contextlib.ExitStack() as stack:
        topology = stack.enter_context(open_topology(config.parallel))
        ranks = Ranks(topology.rank, topology.world_size)
        inputs = _input_hashes(config, tokenizer)
        found = ranks.share(lambda: directory.open(config, inputs=inputs, allow_changed=allow_changed))
        stack.enter_context(log_to(ranks.share(directory.join_attempt), found, ranks))
        if config.model.has_checkpoint and found is None:
            ranks.share(lambda: check_files(find_weights(config.model.checkpoint)))
        learner = Learner(config, topology)
        logger.info("%s processes on %s, with %s", topology.world_size, topology.device, learner.kernels)
        engine = make_engine(config, topology, ranks, directory)
        stack.callback(engine.close)
        verifier = stack.enter_context(VerifierPool(config.verifier))
        buffer = _open_buffer(config, directory) if ranks.is_first else None
        answerer = Answerer(engine, tokenizer, verifier)
        stop = stack.enter_context(StopSignals(directory.stop_request if ranks.is_first else None))
        evaluation = _evaluation(config, held_out, stops)
        collector: Collector | RemoteCollection
        remote: RemoteEvaluation | None = None
        wakeups: WakeUps | None = None
        if config.rollout.mode == "asynchronous" and isinstance(engine, SGLangEngine):
            collector, remote, wakeups = _expect_collectors(
                *(stack, config, directory, train_prompts, evaluation, answerer, ranks, stop), engine.attempt
            )
        else:
            writer = _open_writer(config, directory, tokenizer, f"inline{ranks.rank:03d}", ranks)
            collector = Collector(config, train_prompts, answerer, writer, stops, ranks)
        metrics = _open_metrics(config, directory, found) if ranks.is_first else None
        if metrics is not None:
            stack.callback(metrics.close)
        checkpoints = Checkpoints(config.checkpoint, directory, learner=learner, replay=buffer, ranks=ranks)
        stack.callback(checkpoints.abandon)
        trainer = Trainer(
            config,
            learner=learner,
            engine=engine,
            collector=collector,
            evaluate=lambda version: remote.evaluate(version) if remote else evaluate(evaluation, answerer, ranks),
            replay=SharedReplay(buffer, directory.replay, ranks),
            directory=directory,
            checkpoints=checkpoints,
            metrics=metrics,
            stop=stop,
            heart=TrainerHeart(directory.control) if ranks.is_first else None,
            wakeups=wakeups if ranks.is_first else None,
            ranks=ranks,
        )
        if found is not None:
            trainer.resume(found)
        trainer.publish_weights(trainer.progress.iteration)  # servers may hold anything
        with _on_record(directory.exit_record):
            yield trainer


@contextlib.contextmanager
def _on_record(path: Path) -> Iterator[None]:
    """Whatever ends the run within it, a second Ctrl-C too, is in the exit record before it goes on."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk may be the reason
            write_json(path, {"reason": "error", "error": f"{type(error).__name__}: {error}"})
        raise


def _expect_collectors(
    stack: contextlib.ExitStack,
    config: Config,
    directory: RunDirectory,
    prompts: list[Prompt],
    evaluation: Evaluation,
    answerer: Answerer,
    ranks: Ranks,
    stop: StopSignals,
    attempt: str,
) -> tuple[RemoteCollection, RemoteEvaluation, WakeUps]:
    """From now on `reval collect` processes work for this attempt at the run. They evaluate too, so that this process
    needs servers for nothing but their weights."""

    def is_asked_to_stop() -> bool:
        return stop.reason is not None

    open_end = serve_wakeups if ranks.is_first else open_wakeups
    wakeups = stack.enter_context(open_end(directory.control, is_asked_to_stop))
    collection = RemoteCollection(
        *(config, directory.control, directory.replay, prompts, answerer, ranks),
        is_asked_to_stop=is_asked_to_stop,
        wakeups=wakeups,
    )
    if ranks.is_first:
        write_json(directory.control / WEIGHTS_OF, {"attempt": attempt})
    remote = RemoteEvaluation(
        *(directory.path, evaluation, ranks),
        attempt=attempt,
        patience_s=config.rollout.server_patience_s,
        heartbeats=collection.heartbeats,
        is_asked_to_stop=is_asked_to_stop,
        wakeups=wakeups,
    )
    return collection, remote, wakeups


def _evaluation(config: Config, held_out: list[Prompt], stops: tuple[int, ...]) -> Evaluation:
    return Evaluation(
        held_out,
        config.evaluation,
        seed=config.run.seed,
        max_response_tokens=config.rollout.max_response_tokens,
        stop_token_ids=stops,
    )


def _input_hashes(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What is behind the settings that name files, as CRC32s. Weights are left out: a run soon has its own."""
    prompts, hf_path = config.prompts, config.model.hf_path
    model = [tokenizer_hash(tokenizer), template_hash(tokenizer, prompts), (hf_path / "config.json").read_text()]
    return {
        "prompts.train": f"{crc32(prompts.train):08x}",
        "prompts.held_out": f"{crc32(prompts.held_out):08x}",
        "model.hf_path": f"{zlib.crc32(''.join(model).encode()):08x}",
    }


def _open_writer(
    config: Config, directory: RunDirectory, tokenizer: PreTrainedTokenizerBase, name: str, ranks: Ranks
) -> ShardWriter:
    max_disk_gib = config.replay.max_disk_gib
    return ShardWriter(
        directory.replay,
        writer=name,
        incarnation=ranks.share(lambda: next_incarnation(directory.replay)),
        tokenizer_hash=tokenizer_hash(tokenizer),
        template_hash=template_hash(tokenizer, config.prompts),
        max_disk_bytes=None if max_disk_gib == "unlimited" else int(max_disk_gib * 2**30),
        full_disk_patience_s=config.replay.full_disk_patience_s,
    )


@contextlib.contextmanager
def open_collector(config: Config, name: str) -> Iterator[CollectorProcess]:
    """A process that collects for the run of this configuration. Raises ValueError where it has none to collect for."""
    if config.rollout.mode != "asynchronous":
        raise ValueError(f'rollout.mode = "{config.rollout.mode}": the trainer collects by itself; use "asynchronous"')
    tokenizer, stops = read_model(config)
    train_prompts, held_out = read_prompts(config, tokenizer)
    directory, ranks = RunDirectory(config.run.directory), Ranks()
    with contextlib.ExitStack() as stack:
        engine = connect(config, ranks, FollowedWeights(), directory.control, collector=name)
        stack.callback(engine.close)
        engine.check()
        verifier = stack.enter_context(VerifierPool(config.verifier))
        answerer = Answerer(engine, tokenizer, verifier)
        stop = stack.enter_context(StopSignals())
        yield CollectorProcess(
            config,
            directory.path,
            name=name,
            engine=engine,
            open_writer=lambda: _open_writer(config, directory, tokenizer, name, ranks),
            make_collector=lambda writer: Collector(config, train_prompts, answerer, writer, stops, ranks),
            desk=EvaluationDesk(directory.path, held_out, answerer, seed=config.run.seed, stop_token_ids=stops),
            stop=stop,
            wakeups=stack.enter_context(open_wakeups(directory.control, lambda: stop.reason is not None)),
        )


def _open_buffer(config: Config, directory: RunDirectory) -> ReplayBuffer:
    replay = config.replay
    return ReplayBuffer(
        directory.replay,
        capacity=replay.capacity,
        seed=config.run.seed,
        sampler=make_sampler(replay, config.objective),
        max_memory_bytes=int(replay.max_memory_gib * 2**30),
        unlink_delay_s=replay.unlink_delay_s,
    )


def _open_metrics(config: Config, directory: RunDirectory, found: Found | None) -> MetricsWriter:
    """Where a run resumes, the lines and events of the abandoned future are cut first."""
    first_iteration = 0 if found is None else read_trainer_state(found.checkpoint)["iteration"]
    directory.cut_metrics(first_iteration)
    return MetricsWriter(
        directory.path,
        first_iteration=first_iteration,
        num_iterations=config.run.num_iterations,
        tensorboard=config.logging.tensorboard,
        console=sys.stdout,
    )


def evaluate_weights(config: Config, checkpoint: Path | None) -> EvaluationResult:
    """Evaluate model.hf_path, or a checkpoint of a run of this config, on the held-out prompts."""
    version = 0 if checkpoint is None else read_trainer_state(checkpoint)["iteration"]
    tokenizer, stops = read_model(config)
    prompts = load_prompts(config.prompts.held_out, config.prompts, tokenizer)
    with contextlib.ExitStack() as stack:
        topology = stack.enter_context(open_topology())
        engine = embed_engine(config, topology)  # servers may be at work for a run
        stack.callback(engine.close)
        if checkpoint is not None or config.model.has_checkpoint:
            learner = Learner(config, topology)
            if checkpoint is not None:
                learner.load(checkpoint / WEIGHTS)
            engine.update_weights(learner.export_weights, version)
        verifier = stack.enter_context(VerifierPool(config.verifier))
        return evaluate(_evaluation(config, prompts, stops), Answerer(engine, tokenizer, verifier), Ranks())


def export_checkpoint(config: Config, checkpoint: Path, out: Path) -> None:
    """Write the policy of a checkpoint as a directory in Hugging Face format."""
    read_trainer_state(checkpoint)
    convert_to_hf(CheckpointSource(checkpoint / WEIGHTS, config.model.hf_path), out)
