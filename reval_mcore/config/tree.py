"""Every setting of a run: its type, range, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, Strict, field_validator


class Section(BaseModel):
    model_config = ConfigDict(  # strict: "8" is no number and true is not 1
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


# TOML has strings and lists for paths and tuples; the items of a list stay strict.
_FROM_TOML = Strict(False)
TomlPath = Annotated[Path, _FROM_TOML]


def _interval(value: object) -> object:
    if value == "never" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('give a number of iterations >= 1, or "never"')


Interval = Annotated[int | Literal["never"], BeforeValidator(_interval)]


def is_due(interval: int | Literal["never"], iteration: int) -> bool:
    """Whether something done every `interval` iterations is due after iteration number `iteration` (from 0)."""
    return interval != "never" and (iteration + 1) % interval == 0


class RunConfig(Section):
    directory: TomlPath
    """Run directory; made when absent. Everything that the run writes lies below it."""
    num_iterations: PositiveInt
    """One iteration: collect, admit, `updates.per_iteration` updates, new weights to the engine."""
    seed: int = Field(default=0, ge=0)


class ModelConfig(Section):
    hf_path: TomlPath
    """Directory in Hugging Face format: config.json, safetensors, tokenizer. Weights and reference start from it.

    Needs no safetensors where `checkpoint` is given: a converted directory serves as both."""
    checkpoint: TomlPath = Path("none")
    """Weights to start from instead: what tools.convert_hf_to_mcore made, a run, or one of its checkpoints; "none"."""
    implementation: Literal["auto", "local", "te"] = "auto"
    """Layer spec: Transformer Engine's, megatron-core's local one, or TE where it is installed."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32. Everything after the logits is fp32 in both."""

    @property
    def has_checkpoint(self) -> bool:
        return self.checkpoint != Path("none")


class ParallelConfig(Section):
    """megatron-core's own names. Data parallelism takes the processes that are left."""

    tensor_model_parallel_size: PositiveInt = 1
    """Cuts every layer and the vocabulary. Divides the query groups; within a node."""
    sequence_parallel: bool = False
    """Norms and residual stream cut along the tokens too, over the tensor-parallel ranks: less activation memory."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Cuts the layers into stages. Divides their number."""
    context_parallel_size: PositiveInt = 1
    """Cuts each trajectory along its tokens, for long ones."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass goes on; needs overlap_grad_reduce."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Forget activations of the attention core, or of whole layers, and compute them again in the backward pass."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class PromptsConfig(Section):
    train: TomlPath
    """JSONL or verl-style Parquet."""
    held_out: TomlPath
    """Evaluation prompts; no prompt may be in both."""
    template: Literal["none", "chat"] = "none"
    """"chat" renders messages with the tokenizer's chat template; "none" takes the text as it is."""
    system_prompt: str = ""
    """Put before the messages where template = "chat"."""
    max_tokens: PositiveInt = 1024
    """Longer prompts are refused by name when the file is read."""


class RolloutConfig(Section):
    engine: Literal["embedded", "sglang"] = "embedded"
    """"embedded": transformers' generate, inside the trainer process. "sglang": SGLang servers, see `servers`."""
    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    """"synchronous": the trainer collects between updates. "asynchronous": `reval collect` processes do, meanwhile."""
    max_versions_behind: int = Field(default=1, ge=0)
    """Asynchronous: how many iterations collectors may run ahead."""
    collector_timeout_s: float = Field(default=60.0, gt=0.0)
    """Asynchronous: a collector that is silent for so long loses its prompts to others."""
    num_prompts: PositiveInt
    """P, prompts an iteration."""
    num_responses: PositiveInt
    """N, responses to each prompt (one group)."""
    max_response_tokens: PositiveInt
    temperature: float = Field(default=1.0, gt=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    """Sample among the k likeliest tokens; 0: among all."""
    stop_token_ids: Annotated[tuple[int, ...], _FROM_TOML] = ()
    """Empty: those of the model's generation_config.json, else config.json."""
    max_batch_size: PositiveInt = 256
    """Sequences that the embedded engine generates at a time."""
    weight_bucket_bytes: PositiveInt = 1 << 29
    """Of the weights gathered at a time on their way to the engines."""
    servers: Annotated[tuple[str, ...], _FROM_TOML] = ()
    """URLs of the SGLang servers, for example "http://node7:30000". Empty: those that announce themselves in
    control/servers/ of the run directory, which may join, leave and move while the run goes on."""
    api_key_file: str = ""
    """File with the key that the servers were started with (--api-key); empty: they have none."""
    max_concurrent_requests: PositiveInt = 64
    """Responses that one server works on at a time, for one trainer process."""
    request_timeout_s: float = Field(default=600.0, gt=0.0)
    """Deadline of a response on one server; then another is asked."""
    control_timeout_s: float = Field(default=30.0, gt=0.0)
    """A server that says nothing about itself for so long is asked no more, until it answers again."""
    server_patience_s: float = Field(default=300.0, ge=0.0)
    """How long a run waits for a server where there is none; then it ends, and goes on with the same command."""
    weight_sync: Literal["disk", "distributed"] = "disk"
    """How new weights get to the servers: files in the run directory, or a process group with them (NCCL, gloo)."""
    weight_sync_timeout_s: float = Field(default=300.0, gt=0.0)
    """Deadline for one server to take new weights."""


class VerifierConfig(Section):
    timeout_s: float = Field(default=5.0, gt=0.0)
    """Deadline for one answer; a worker that misses it is killed and replaced, and the answer counts as "timeout"."""
    num_workers: PositiveInt = 1
    """Processes for answers that exact comparison cannot settle; started on first use."""
    permute_rewards: bool = False
    """Control experiment: deal the rewards of an iteration out to its trajectories at random."""


class RewardConfig(Section):
    shaping: Literal[
        "raw", "plus_minus_one", "group_centered", "group_normalized", "batch_centered", "batch_normalized"
    ] = "group_centered"
    truncation: Literal["zero_reward", "mask", "bootstrap"] = "zero_reward"
    """A response cut at max_response_tokens gets reward 0, leaves the loss, or keeps -(V - V_ref) at the cut."""


class ObjectiveConfig(Section):
    name: Literal["reval", "tbrm"] = "reval"
    beta: float = Field(gt=0.0)
    """Strength of the pull to the reference. Falls with response length: paper 0.002 (5K tokens), 0.02 (600)."""
    loss_scale: Literal["residual", "beta_residual"] = "residual"
    """residual^2, or (beta residual)^2: the same minimiser, gradients beta^2 times as large.

    One joint hyper-parameter with optimizer.clip_grad: residuals start at |r| / beta, so with "residual" (the paper)
    nearly every gradient is clipped and the step is a normalised one; "beta_residual" keeps gradients of order |r|.
    """


class ReplayConfig(Section):
    capacity: PositiveInt
    """M, trajectories kept; the oldest leave first."""
    sampler: Literal["uniform", "prioritized"] = "uniform"
    """"prioritized": in proportion to (|beta residual| + priority_epsilon)^priority_exponent exp(-age / priority_tau);
    a trajectory that was in no update yet has the largest priority of those before it."""
    priority_exponent: float = Field(default=0.6, ge=0.0)
    priority_epsilon: float = Field(default=0.01, gt=0.0)
    """In units of reward: what a trajectory without a residual still has."""
    priority_tau: float = Field(default=250.0, gt=0.0)
    """Policy versions in which a priority falls to 1/e. Without decay, prioritized replay did worse than none."""
    importance_exponent: float = Field(default=0.0, ge=0.0, le=1.0)
    """0: off. Else losses are weighted by (N p)^-exponent over its batch mean, and the exponent grows from this to 1
    over all updates of the run."""
    first_update: Literal["fresh", "uniform"] = "fresh"
    """The first update of an iteration: on the trajectories admitted last (the paper's appendix A), or sampled."""
    min_size: int = Field(default=0, ge=0)
    """No sampled update before the buffer holds this many."""
    max_memory_gib: float = Field(default=16.0, gt=0.0)
    """Trajectories in the first process's memory, 9 bytes a token; others are read from disk when sampled."""
    max_disk_gib: float | Literal["unlimited"] = "unlimited"
    """Largest size of the replay directory, checked before each write; evicted shards count while they are kept."""
    full_disk_patience_s: float = Field(default=30.0, ge=0.0)
    """How long a writer waits for room on a full disk, or under max_disk_gib, before the run ends."""
    unlink_delay_s: float = Field(default=60.0, ge=0.0)
    """Evicted shards stay on disk for so long, for readers on other nodes; longer where a checkpoint needs them."""

    @field_validator("max_disk_gib")
    @classmethod
    def _is_size(cls, value: float | str) -> float | str:
        if isinstance(value, float | int) and value <= 0.0:
            raise ValueError('give a number > 0, or "unlimited"')
        return value


class UpdatesConfig(Section):
    per_iteration: PositiveInt
    """K, optimizer updates an iteration."""
    batch_size: PositiveInt
    """Trajectories a sampled update (a fresh update takes all fresh ones)."""
    max_tokens_per_micro_batch: PositiveInt = 16384
    """Packed tokens of one forward pass, over all context-parallel ranks."""
    passes: Literal[1, 2] = 1
    """2: score forward only, then differentiate the linear loss with the residuals as fixed coefficients; a third more
    work. The same gradients."""


class OptimizerConfig(Section):
    lr: float = Field(gt=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From lr to min_lr over all updates of the run, after the warm-up."""
    warmup_updates: int = Field(default=0, ge=0)
    betas: Annotated[tuple[float, float], _FROM_TOML] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Not 0 is drift: the loss is 0 at the reference when rewards are 0, decay is not. Never on norms and biases."""
    clip_grad: float = Field(default=1.0, ge=0.0)
    """Largest global gradient norm; 0: never clip. See objective.loss_scale."""


class ReferenceConfig(Section):
    reset_interval: Interval = "never"
    """Iterations between resets of the reference to the policy."""
    refresh: Literal["eager", "lazy"] = "eager"
    """Stored reference scores after a reset: one sweep over the buffer at once, or row by row when sampled."""


class EvaluationConfig(Section):
    interval: Interval = "never"
    """Iterations between evaluations; before the first and after the last iteration there always is one."""
    num_samples: PositiveInt = 1
    """n, sampled responses a prompt, for avg@n and pass@k."""
    pass_at_k: Annotated[tuple[PositiveInt, ...], _FROM_TOML] = (1,)
    max_prompts: PositiveInt = 512
    """The first so many held-out prompts."""
    temperature: float = Field(default=1.0, gt=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    greedy: bool = True
    """Also one greedy response a prompt."""


class CheckpointConfig(Section):
    interval: Interval = "never"
    """Iterations between checkpoints; there is one after the last iteration unless this is "never"."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; replay shards that one of them needs are kept with it."""
    async_save: bool = False
    """Write in a background process while training goes on. Takes as much host memory again as the weights on a GPU."""


class LoggingConfig(Section):
    tensorboard: bool = True
    num_text_samples: int = Field(default=2, ge=0)
    """Trajectories written out as text each evaluation interval."""
    mismatch_trajectories: int = Field(default=32, ge=0)
    """Fresh trajectories an iteration whose engine log-probabilities are compared with the learner's."""


class LaunchConfig(Section):
    """For launchers; `reval train` itself takes the processes that it finds."""

    num_trainer_nodes: PositiveInt = 1
    """The first nodes of the allocation; each runs a trainer process a GPU, or one where there is none."""
    num_rollout_nodes: int = Field(default=0, ge=0)
    """The last ones; each runs SGLang servers, and a collector in asynchronous mode."""
    min_rollout_nodes: PositiveInt = 1
    """With fewer left the run stops at a checkpoint and is requeued, to get them back."""
    server_tensor_parallel_size: PositiveInt = 1
    """GPUs of one server; a rollout node runs as many servers as its GPUs make."""
    server_arguments: Annotated[tuple[str, ...], _FROM_TOML] = ()
    """More flags for every SGLang server of this run, for example "--mem-fraction-static" and "0.85"."""
    time_limit_minutes: PositiveInt = 240
    """Of one job. The run is longer: it is cut at a checkpoint and goes on in the next job."""
    stop_before_s: PositiveInt = 600
    """So long before the time limit a run is asked to stop: the longest iteration, an evaluation and a checkpoint."""
    max_failures: int = Field(default=10, ge=0)
    """How often a run may fail and be requeued, each time after a newer checkpoint."""
    max_rollout_failures: int = Field(default=5, ge=0)
    """How often in a row the servers or the collector of a node are started again; then it is given up."""
    trainer_timeout_s: float = Field(default=1800.0, gt=0.0)
    """A trainer that has come to no new phase for so long is ended and started again from its checkpoint."""
    trainer_start_timeout_s: float = Field(default=3600.0, gt=0.0)
    """The same before its first phase: reading weights, the first contact of all processes."""
    preflight: bool = True
    """Look at every node before anything starts: filesystem, GPUs, clocks, disk, versions, network."""


class Config(Section):
    run: RunConfig
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    prompts: PromptsConfig
    rollout: RolloutConfig
    verifier: VerifierConfig = VerifierConfig()
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig
    replay: ReplayConfig
    updates: UpdatesConfig
    optimizer: OptimizerConfig
    reference: ReferenceConfig = ReferenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()
