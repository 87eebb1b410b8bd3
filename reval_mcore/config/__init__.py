"""The configuration of a run: a frozen tree, read from TOML with `extends` and dotted overrides.

Everything wrong is reported at once, each with its path, the value found and what to do. Imports no torch, so that
`reval --help` and a refused config answer at once. TOML has no null: absence is a word ("never", "none"), not a None.
"""

from reval_mcore.config.changes import Changes, changed_fields, check_fields, compare_configs, compare_inputs
from reval_mcore.config.files import check_readable, in_words, read_json
from reval_mcore.config.loading import dumps, load, parse, read_toml
from reval_mcore.config.problems import MISSING, ConfigError, Problem, problem_of
from reval_mcore.config.tree import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    Interval,
    LaunchConfig,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptsConfig,
    ReferenceConfig,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    UpdatesConfig,
    VerifierConfig,
    is_due,
)

__all__ = [
    "MISSING",
    "Changes",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "EvaluationConfig",
    "Interval",
    "LaunchConfig",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Problem",
    "PromptsConfig",
    "ReferenceConfig",
    "ReplayConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "UpdatesConfig",
    "VerifierConfig",
    "changed_fields",
    "check_fields",
    "check_readable",
    "compare_configs",
    "compare_inputs",
    "dumps",
    "in_words",
    "is_due",
    "load",
    "parse",
    "problem_of",
    "read_json",
    "read_toml",
]
