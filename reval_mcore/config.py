"""The configuration of a run: a frozen tree, read from TOML with `extends` and dotted overrides.

Everything wrong is reported at once, each with its path, the value found and what to do. Imports no torch, so that
`reval --help` and a refused config answer at once. TOML has no null: absence is a word ("never", "none"), not a None.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, Strict, ValidationError


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
    """Directory in Hugging Face format: config.json, safetensors, tokenizer. Weights and reference start from it."""
    implementation: Literal["auto", "local", "te"] = "auto"
    """Layer spec: Transformer Engine's, megatron-core's local one, or TE where it is installed."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 master weights and reduces gradients in fp32. Logits onward are fp32 in both."""


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
    engine: Literal["embedded"] = "embedded"
    """"embedded": transformers' generate, inside the trainer process."""
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
    sampler: Literal["uniform"] = "uniform"
    first_update: Literal["fresh", "uniform"] = "fresh"
    """The first update of an iteration: on the trajectories admitted last (the paper's appendix A), or sampled."""
    min_size: int = Field(default=0, ge=0)
    """No sampled update before the buffer holds this many."""


class UpdatesConfig(Section):
    per_iteration: PositiveInt
    """K, optimizer updates an iteration."""
    batch_size: PositiveInt
    """Trajectories a sampled update (a fresh update takes all fresh ones)."""
    max_tokens_per_micro_batch: PositiveInt = 16384
    """Packed tokens of one forward pass."""


class OptimizerConfig(Section):
    lr: float = Field(gt=0.0)
    min_lr: float = Field(default=0.0, ge=0.0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From lr to min_lr over all updates of the run, after the warm-up."""
    warmup_updates: int = Field(default=0, ge=0)
    betas: Annotated[tuple[float, float], _FROM_TOML] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0.0)
    weight_decay: float = Field(default=0.0, ge=0.0)
    """Not 0 is drift: the loss is 0 at the reference when rewards are 0, decay is not."""
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


class LoggingConfig(Section):
    tensorboard: bool = True
    num_text_samples: int = Field(default=2, ge=0)
    """Trajectories written out as text each evaluation interval."""
    mismatch_trajectories: int = Field(default=32, ge=0)
    """Fresh trajectories an iteration whose engine log-probabilities are compared with the learner's."""


class Config(Section):
    run: RunConfig
    model: ModelConfig
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


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration."""

    path: str  # dotted path of the field
    value: object  # as found; MISSING where there is none
    remedy: str  # what is wrong and what to do

    def __str__(self) -> str:
        shown = "" if self.value is MISSING else f" = {_toml(self.value)}"
        return f"{self.path}{shown}: {self.remedy}"


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


MISSING = _Missing()


class ConfigError(ValueError):
    """All problems of one configuration."""

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n  ".join([f"{source}: {count}", *map(str, problems)]))


def _toml(value: object) -> str:
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, tuple):
        value = list(value)
    try:
        return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
    except TypeError:
        return repr(value)


_REMEDIES: Mapping[str, str] = {
    "missing": "required, and has no default; set it",
    "int_type": "not a whole number; give one",
    "int_parsing": "not a whole number; give one",
    "int_from_float": "not a whole number; give one",
    "float_type": "not a number; give one",
    "float_parsing": "not a number; give one",
    "bool_type": "not true or false; give one of them",
    "bool_parsing": "not true or false; give one of them",
    "string_type": 'not a string; put it in quotes ("...")',
    "path_type": 'not a path; give a string in quotes ("...")',
    "tuple_type": "not a list; write [a, b, ...]",
    "model_type": "not a table; write it as [section] with key = value lines",
    "finite_number": "not a finite number; give one",
}


def _remedy(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _REMEDIES:
        return _REMEDIES[kind]
    if kind == "literal_error":
        return f"not a choice; give one of {context['expected']}"
    bounds = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    if kind in bounds:
        limit = next(iter(context.values()))
        return f"out of range; give a value {bounds[kind]} {limit:g}"
    return str(error["msg"]).removeprefix("Value error, ")


def _known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _known_keys(kind, f"{prefix}{name}.")


def _problem(error: Mapping[str, Any], prefix: str) -> Problem:
    path = ".".join([prefix, *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path, list(_known_keys(Config)), n=1)
        remedy = "unknown key; " + (f"did you mean {near[0]}?" if near else "remove it")
        return Problem(path, error["input"], remedy)
    value = MISSING if error["type"] == "missing" else error["input"]
    return Problem(path, value, _remedy(error))


# ---------------------------------------------------------------- cross-field checks


def _check_group_shaping(reward: RewardConfig, rollout: RolloutConfig) -> Iterator[Problem]:
    if rollout.num_responses == 1 and reward.shaping.startswith("group_"):
        batch = reward.shaping.replace("group_", "batch_")
        yield Problem(
            "reward.shaping",
            reward.shaping,
            f"a group of one response (rollout.num_responses = 1) has no statistics, all rewards would be 0; "
            f'use "{batch}", or at least 2 responses',
        )


def _check_capacity(replay: ReplayConfig, rollout: RolloutConfig, updates: UpdatesConfig) -> Iterator[Problem]:
    fresh = rollout.num_prompts * rollout.num_responses
    if replay.capacity < fresh:
        yield Problem(
            "replay.capacity",
            replay.capacity,
            f"smaller than one iteration's {fresh} trajectories (rollout.num_prompts x num_responses); raise it",
        )
    if updates.batch_size > replay.capacity:
        yield Problem(
            "updates.batch_size",
            updates.batch_size,
            f"sampled without replacement from a buffer of replay.capacity = {replay.capacity}; lower it",
        )
    if replay.min_size > replay.capacity:
        yield Problem(
            "replay.min_size",
            replay.min_size,
            f"never reached with replay.capacity = {replay.capacity}; lower it",
        )


def _check_micro_batch(prompts: PromptsConfig, rollout: RolloutConfig, updates: UpdatesConfig) -> Iterator[Problem]:
    longest = prompts.max_tokens + rollout.max_response_tokens
    if updates.max_tokens_per_micro_batch < longest:
        yield Problem(
            "updates.max_tokens_per_micro_batch",
            updates.max_tokens_per_micro_batch,
            f"a trajectory may have {longest} tokens (prompts.max_tokens + rollout.max_response_tokens) and is "
            f"never cut; give at least {longest}",
        )


def _check_schedule(optimizer: OptimizerConfig, run: RunConfig, updates: UpdatesConfig) -> Iterator[Problem]:
    total = run.num_iterations * updates.per_iteration
    if optimizer.warmup_updates > total:
        yield Problem(
            "optimizer.warmup_updates",
            optimizer.warmup_updates,
            f"longer than the whole run of {total} updates (run.num_iterations x updates.per_iteration); lower it",
        )
    if optimizer.min_lr > optimizer.lr:
        yield Problem("optimizer.min_lr", optimizer.min_lr, f"larger than optimizer.lr = {optimizer.lr:g}; lower it")
    for index, value in enumerate(optimizer.betas):
        if not 0.0 <= value < 1.0:
            yield Problem(f"optimizer.betas.{index}", value, "out of range; give a value in [0, 1)")


def _check_pass_at_k(evaluation: EvaluationConfig) -> Iterator[Problem]:
    for k in evaluation.pass_at_k:
        if k > evaluation.num_samples:
            yield Problem(
                "evaluation.pass_at_k",
                list(evaluation.pass_at_k),
                f"pass@{k} needs at least {k} samples a prompt; raise evaluation.num_samples "
                f"(now {evaluation.num_samples}) or drop {k}",
            )


def _check_held_out(prompts: PromptsConfig) -> Iterator[Problem]:
    if prompts.train == prompts.held_out:
        yield Problem(
            "prompts.held_out", prompts.held_out, "the same file as prompts.train; give prompts never trained on"
        )


def _check_system_prompt(prompts: PromptsConfig) -> Iterator[Problem]:
    if prompts.system_prompt and prompts.template == "none":
        yield Problem(
            "prompts.system_prompt",
            prompts.system_prompt,
            'nothing renders it with prompts.template = "none"; use "chat", or leave it out',
        )


_CHECKS: Sequence[tuple[Callable[..., Iterator[Problem]], tuple[str, ...]]] = (
    (_check_group_shaping, ("reward", "rollout")),
    (_check_capacity, ("replay", "rollout", "updates")),
    (_check_micro_batch, ("prompts", "rollout", "updates")),
    (_check_schedule, ("optimizer", "run", "updates")),
    (_check_pass_at_k, ("evaluation",)),
    (_check_held_out, ("prompts",)),
    (_check_system_prompt, ("prompts",)),
)


# ---------------------------------------------------------------- reading and writing


def parse(raw: Mapping[str, Any], source: str) -> Config:
    """Check a whole tree of plain values. Raises ConfigError with every problem of every section."""
    problems: list[Problem] = []
    sections: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in Config.model_fields:
            near = difflib.get_close_matches(name, list(Config.model_fields), n=1)
            hint = f"did you mean [{near[0]}]?" if near else f"the sections are {', '.join(Config.model_fields)}"
            problems.append(
                Problem(name, value if not isinstance(value, dict) else MISSING, f"unknown section; {hint}")
            )
    for name, field in Config.model_fields.items():
        kind = field.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, Section)
        try:
            sections[name] = kind.model_validate(raw.get(name, {}))
        except ValidationError as error:
            found = [_problem(item, name) for item in error.errors(include_url=False)]
            problems.extend({problem.path: problem for problem in found}.values())
    for check, needs in _CHECKS:
        if all(name in sections for name in needs):
            problems.extend(check(*(sections[name] for name in needs)))
    if problems:
        raise ConfigError(source, problems)
    return Config(**sections)


def _read_toml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        chain = " -> ".join(str(item) for item in (*seen, resolved))
        raise ConfigError(str(path), [Problem("extends", str(path), f"extends itself ({chain}); break the circle")])
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), [Problem("file", str(path), "there is no such file; check the path")]) from None
    except IsADirectoryError:
        raise ConfigError(str(path), [Problem("file", str(path), "not a file; give a TOML file")]) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [Problem("file", str(path), f"is not TOML: {error}")]) from None
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(str(path), [Problem("extends", base, "not a path; give a string, relative to this file")])
    return _merge(_read_toml(path.parent / base, (*seen, resolved)), raw)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or len(keys) != 2 or not all(keys):
        raise ConfigError(
            "command line", [Problem("override", text, "not of the form section.key=value, for example run.seed=1")]
        )
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string: run.directory=runs/mine needs no quotes
    return {keys[0]: {keys[1]: parsed}}


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, the files that it extends, then `section.key=value` overrides; later ones win.

    Raises ConfigError (a ValueError) with all problems.
    """
    raw = _read_toml(path)
    for override in overrides:
        raw = _merge(raw, _parse_override(override))
    return parse(raw, str(path))


def dumps(config: Config) -> str:
    """The resolved tree as TOML; `parse` of it gives an equal Config."""
    return tomli_w.dumps(config.model_dump(mode="json"))
