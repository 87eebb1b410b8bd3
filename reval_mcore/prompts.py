"""Prompts: read from JSONL or Parquet, rendered, tokenized; and the order in which a run takes them.

One row, in either format, with the keys of slime's JSONL and of verl's Parquet:

    prompt   "input" or "prompt": a text, or a list of {"role": ..., "content": ...} messages
    truth    "label" or "answer", or "ground_truth" in "reward_model": a string or a number
    id       "id", optional: a string or an integer; without it a hash of the prompt
    source   "data_source", optional, also in "metadata"

Other keys are left alone. Text goes to the tokenizer once, here; from then on prompts are token ids. No torch and no
transformers before a tokenizer is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reval_mcore.config import PromptsConfig, check_readable, read_json
from reval_mcore.randomness import generator
from reval_mcore.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_PROBLEMS_SHOWN = 20
_MAX_VALUE_CHARS = 80

Message = Mapping[str, str]


class _RowError(ValueError):
    """What is wrong with one row, in words."""


def _wrong(field: str, value: object, remedy: str) -> _RowError:
    return _RowError(f"{field} = {_cut(json.dumps(value, ensure_ascii=False, default=repr))}: {remedy}")


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_VALUE_CHARS else text[:_MAX_VALUE_CHARS] + "..."


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of either format, not yet rendered."""

    prompt: str | Sequence[Message]
    answer: str
    prompt_id: str  # as given, else a hash of the prompt
    source: str


# ---------------------------------------------------------------- files


def _rows_of(path: Path, config: PromptsConfig) -> Iterator[tuple[str, object]]:
    """The rows of one of the two files; what is wrong with the file as a whole is told by the setting."""
    try:
        yield from _rows(path)
    except ValueError as error:
        raise ValueError(f"prompts.{'train' if path == config.train else 'held_out'} = {error}") from None


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row) of each row: "line 3" of a JSONL file, "row 3" of a Parquet file, both counted from 1."""
    check_readable(path)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with path.open("rb") as file:
            try:
                table = pyarrow.parquet.read_table(file)
            except (pyarrow.ArrowException, OSError):  # in words about magic bytes and Thrift
                raise ValueError(
                    f"{path}: is not Parquet, or was cut short; write it again, or name a JSONL file .jsonl"
                ) from None
        for number, row in enumerate(table.to_pylist(), start=1):
            yield f"row {number}", row
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:  # decoded line by line, so that a bad byte is reported with its line
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"line {number}", line
    else:
        raise ValueError(f"{path}: the ending {path.suffix!r} is not known; give a .jsonl or a .parquet file")


def _decode(row: object) -> Mapping[str, Any]:
    if isinstance(row, bytes):
        try:
            row = json.loads(row.strip())
        except json.JSONDecodeError as error:
            raise _not_json(row, f"column {error.colno}: {error.msg}") from None
        except UnicodeDecodeError as error:
            raise _not_json(row, f"byte 0x{row.strip()[error.start]:02x} is not UTF-8") from None
    if not isinstance(row, dict):
        raise _wrong("line", row, 'is not an object; write {"prompt": ..., "answer": ...}')
    return row


def _not_json(line: bytes, why: str) -> _RowError:
    text = _cut(line.decode(errors="replace").strip())
    return _RowError(f"{text!r}: is not JSON ({why}); write one object a line")


def _one_of(row: Mapping[str, Any], keys: Sequence[str], meaning: str) -> tuple[str, Any]:
    """The one key of `keys` that is in the row, with its value. Absent and null are the same, as in Parquet."""
    found = [key for key in keys if row.get(key) is not None]
    if not found:
        raise _wrong(keys[0], None, f"no {meaning}; give it under {' or '.join(keys)}")
    if len(found) > 1:
        raise _wrong(found[1], row[found[1]], f"a second {meaning}, beside {found[0]}; keep one of them")
    return found[0], row[found[0]]


def _section(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def _parse_row(row: Mapping[str, Any]) -> _Row:
    key, prompt = _one_of(row, ("prompt", "input"), "prompt")
    if isinstance(prompt, str):
        is_good = bool(prompt)
    else:
        is_good = isinstance(prompt, list) and len(prompt) > 0 and all(_is_message(item) for item in prompt)
    if not is_good:
        raise _wrong(key, prompt, 'give a text that is not empty, or a list of {"role": ..., "content": ...}')

    truths = {**row, "reward_model.ground_truth": _section(row, "reward_model").get("ground_truth")}
    key, answer = _one_of(truths, ("answer", "label", "reward_model.ground_truth"), "true answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise _wrong(key, answer, "give the true answer as a string or a number")

    prompt_id = row.get("id")
    if prompt_id is None:
        prompt_id = _hash(prompt)
    elif isinstance(prompt_id, bool) or not isinstance(prompt_id, str | int) or prompt_id == "":
        raise _wrong("id", prompt_id, "give a string or an integer, or leave it out")
    source = row.get("data_source") or _section(row, "metadata").get("data_source") or ""
    return _Row(prompt, str(answer).strip(), str(prompt_id), str(source))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _hash(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


# ---------------------------------------------------------------- rendering


def _render(row: _Row, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    if config.template == "chat":
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else list(row.prompt)
        if config.system_prompt:
            if messages[0]["role"] == "system":
                raise _wrong("prompt", messages[0], 'has a system message; set prompts.system_prompt = ""')
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        return _apply_chat_template(messages, tokenizer)
    if isinstance(row.prompt, str):
        return row.prompt
    if len(row.prompt) == 1 and row.prompt[0]["role"] == "user":
        return row.prompt[0]["content"]
    raise _wrong("prompt", row.prompt, 'more than one user message; set prompts.template = "chat"')


def _apply_chat_template(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    import jinja2

    try:
        rendered = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except jinja2.TemplateError as error:  # templates refuse roles, or their order, in words of their own
        raise _wrong("prompt", messages, f"refused by the chat template ({error}); change the messages") from None
    assert isinstance(rendered, str)
    return rendered


def _tokenize(text: str, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a rendered prompt, with exactly one beginning-of-sequence token where the tokenizer has one.

    A chat template writes it itself, and so may a text that was rendered elsewhere; to others the tokenizer adds it.
    """
    bos = tokenizer.bos_token
    has_bos = config.template == "chat" or (isinstance(bos, str) and text.startswith(bos))
    return tuple(tokenizer.encode(text, add_special_tokens=not has_bos))


def _has_id(row: object) -> bool:
    return _decode(row).get("id") is not None


def _prompt(row: object, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    parsed = _parse_row(_decode(row))
    text = _render(parsed, config, tokenizer)
    token_ids = _tokenize(text, config, tokenizer)
    if not token_ids:
        raise _wrong("prompt", parsed.prompt, "the tokenizer makes no token of it; remove the row")
    if len(token_ids) > config.max_tokens:
        raise _wrong(
            "prompt",
            parsed.prompt,
            f"has {len(token_ids)} tokens, more than prompts.max_tokens = {config.max_tokens}; shorten or remove it, "
            "or raise prompts.max_tokens",
        )
    return Prompt(parsed.prompt_id, text, token_ids, parsed.answer, parsed.source)


def load_prompts(path: Path, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of a file, in its order.

    Raises ValueError with all problems of the file (the first 20 in words), each with its line, value and remedy:
    rows that are not understood, prompts that are too long, and ids (or, without ids, prompts) that occur twice.
    """
    if config.template == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            'prompts.template = "chat": the tokenizer has no chat template; set "none", or add chat_template.jinja to '
            "the directory of the model"
        )
    prompts: list[Prompt] = []
    problems: list[str] = []
    first_seen: dict[str, str] = {}
    for where, row in _rows_of(path, config):
        try:
            prompt = _prompt(row, config, tokenizer)
            first = first_seen.setdefault(prompt.prompt_id, where)
            if first != where:
                what = ("id", prompt.prompt_id) if _has_id(row) else ("prompt", prompt.text)
                raise _wrong(*what, f"also that of {first}; remove one, or give it an id of its own")
        except _RowError as problem:
            problems.append(f"{where}: {problem}")
        else:
            prompts.append(prompt)
    if problems:
        raise ValueError("\n  ".join(_summary(path, problems)))
    if not prompts:
        raise ValueError(f"{path}: there is no row in it; write at least one")
    return prompts


def _summary(path: Path, problems: Sequence[str]) -> Iterator[str]:
    yield f"{path}: 1 problem" if len(problems) == 1 else f"{path}: {len(problems)} problems"
    yield from problems[:_MAX_PROBLEMS_SHOWN]
    if len(problems) > _MAX_PROBLEMS_SHOWN:
        yield f"... and {len(problems) - _MAX_PROBLEMS_SHOWN} more"


def overlap(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> list[tuple[Prompt, Prompt]]:
    """(training, held-out) pairs with the same text but for outer white space, in the order of `held_out`.

    Ids are not compared: files number their rows alike. One pair for each held-out prompt that is in both.
    """
    by_text = {prompt.text.strip(): prompt for prompt in reversed(train)}
    return [(by_text[prompt.text.strip()], prompt) for prompt in held_out if prompt.text.strip() in by_text]


# ---------------------------------------------------------------- tokenizers

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")  # what a tokenizer can be made from
_ROUND_TRIPS = ("What is 12 + 345?  Two spaces.", r"\frac{1}{2} and \boxed{67890}", "{x | x > 0}\n[y], $z^2_1$")


def load_tokenizer(hf_path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, checked: what it encodes it must decode to the same text.

    The check is against a silent trap. For a config.json with model_type "qwen2", AutoTokenizer (transformers 5) builds
    a byte-level BPE tokenizer whatever the directory's tokenizer_class says; another kind of vocabulary then loses its
    spaces or digits without a message. Raises ValueError.
    """
    from transformers import AutoTokenizer

    if not hf_path.is_dir():  # else it would be looked for on the Hugging Face hub
        raise ValueError(f"model.hf_path = {hf_path}: there is no such directory; check the path")
    if not any((hf_path / name).exists() for name in _VOCABULARIES):  # transformers 5 would make up an empty one
        raise ValueError(
            f"model.hf_path = {hf_path}: no tokenizer in it; put tokenizer.json and tokenizer_config.json of the model "
            "there"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (hf_path / name).exists():
            read_json(hf_path / name)  # refuses what is not JSON in words that name the file
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_path, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError(
            f"model.hf_path = {hf_path}: its tokenizer does not load (reval --debug ... shows what transformers says); "
            "put tokenizer.json and tokenizer_config.json of the model there again"
        ) from error
    for text in _ROUND_TRIPS:
        back = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), clean_up_tokenization_spaces=False)
        if back != text:
            raise ValueError(
                f"model.hf_path = {hf_path}: loaded as {type(tokenizer).__name__}, its tokenizer turns {text!r} "
                f"into {back!r}; give files that AutoTokenizer reads back whole (for model_type qwen2: byte-level BPE)"
            )
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits of what token ids mean: the vocabulary, added and special tokens included. For shard metadata."""
    return _hash([tokenizer.get_vocab(), sorted(tokenizer.all_special_ids)])


def template_hash(tokenizer: PreTrainedTokenizerBase, config: PromptsConfig) -> str:
    """16 hex digits of how a prompt becomes text: the kind of template, its source, the system prompt."""
    source = tokenizer.chat_template if config.template == "chat" else ""
    return _hash([config.template, source, config.system_prompt])


# ---------------------------------------------------------------- order


def prompt_order(seed: int, epoch: int, num_prompts: int) -> np.ndarray:
    """int64 [num_prompts]: the order of an epoch, a permutation that is a function of (seed, epoch)."""
    return generator(seed, "prompt_order", int(epoch)).permutation(num_prompts)


def prompts_for_iteration(iteration: int, num_per_iteration: int, num_prompts: int, seed: int) -> np.ndarray:
    """int64 [num_per_iteration]: indices of the prompts of one iteration, all distinct. A function of its arguments.

    Epochs lie end to end and are cut into blocks. A block that straddles two epochs takes the end of the old order and
    then the new order from its start, without prompts that it already has: groups are named by their prompt, so none
    may be in a block twice. A prompt left out so has just had its turn, and the one that steps in gets one more;
    each epoch's span of blocks still visits every prompt. Raises ValueError where there are too few prompts.
    """
    if num_per_iteration > num_prompts:
        raise ValueError(
            f"rollout.num_prompts = {num_per_iteration}: there are only {num_prompts} training prompts, and an "
            "iteration takes distinct ones; lower it (and raise rollout.num_responses), or add prompts"
        )
    epoch, offset = divmod(iteration * num_per_iteration, num_prompts)
    block = prompt_order(seed, epoch, num_prompts)[offset : offset + num_per_iteration]
    following = prompt_order(seed, epoch + 1, num_prompts)
    fresh = following[np.isin(following, block, invert=True)]
    return np.concatenate([block, fresh[: num_per_iteration - len(block)]])
