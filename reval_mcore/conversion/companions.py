"""What a directory in Hugging Face format has beside its weights: configuration, tokenizer, template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from reval_mcore.architecture import in_both_forms
from reval_mcore.config import read_json
from reval_mcore.mcore.weight_checkpoint import MANIFEST

_PATTERNS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*")


def companions(directory: Path) -> Iterator[Path]:
    """Files to copy with the weights of `directory`."""
    for pattern in _PATTERNS:
        for path in sorted(directory.glob(pattern)):
            if not path.name.endswith(".safetensors.index.json") and path.name not in (MANIFEST, "config.json"):
                yield path


def copy_companions(source: Path, target: Path, *, dtype: str) -> None:
    """Copy them; config.json names the dtype of the weights, and is one that transformers 4 and 5 read alike."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)
    config = in_both_forms(read_json(source / "config.json")) | {"dtype": dtype, "torch_dtype": dtype}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
