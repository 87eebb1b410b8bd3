"""Plans of shipped and of tiny configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reval_mcore.config import Config, load
from reval_mcore.plan import Plan, make_plan

CONFIGS = Path(__file__).parents[1] / "configs"
ARCHITECTURES = CONFIGS / "architectures"
SHIPPED = {
    "demo": 1,
    "paper_1_5b": 8,
    "paper_7b": 8,
    "paper_7b_slurm": 8,
    "qwen2_5_32b": 32,
}  # and the processes that each is made for


def planned(config: Config, **options: Any) -> Plan:
    """The plan of a configuration that no file holds."""
    return make_plan(config, CONFIGS / "none.toml", **options)


def shipped(name: str, *overrides: str, world_size: int | None = None, **options: Any) -> Plan:
    path = CONFIGS / f"{name}.toml"
    return make_plan(load(path, overrides), path, world_size=world_size or SHIPPED[name], **options)
