"""A run loaded under a layout and saved again at once, with no step in between: for `run_distributed`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reval_mcore.assembly import open_trainer
from reval_mcore.config import load


def save_again(arguments: Sequence[str], iteration: int) -> None:
    """The state of the latest checkpoint, saved as if it were that of another iteration."""
    with open_trainer(load(Path("configs/demo.toml"), list(arguments))) as trainer:
        trainer.progress.iteration = iteration
        trainer.save()
        trainer.checkpoints.publish()
