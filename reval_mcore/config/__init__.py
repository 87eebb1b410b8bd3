"""The configuration of a run: a frozen tree, read from TOML with `extends` and dotted overrides.

Everything wrong is reported at once, each with its path, the value found and what to do. Imports no torch, so that
`reval --help` and a refused config answer at once. TOML has no null: absence is a word ("never", "none"), not a None.
"""

from .loading import dumps, load, parse
from .problems import MISSING, ConfigError, Problem
from .tree import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    Interval,
    LoggingConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
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
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "EvaluationConfig",
    "Interval",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Problem",
    "PromptsConfig",
    "ReferenceConfig",
    "ReplayConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "UpdatesConfig",
    "VerifierConfig",
    "dumps",
    "is_due",
    "load",
    "parse",
]
