"""Prompts: two formats into one record, all problems of a file at once, one BOS, and an order without state."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from reval_mcore.config import PromptsConfig
from reval_mcore.prompts import (
    load_prompts,
    load_tokenizer,
    overlap,
    prompt_order,
    prompts_for_iteration,
    template_hash,
    tokenizer_hash,
)
from reval_mcore.records import Prompt

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE, extra: str = "<eos>") -> PreTrainedTokenizerFast:
    """One token a byte, and a <bos> that the tokenizer puts first by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.add_special_tokens(["<bos>", extra])
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<bos> $A", pair=None, special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token=extra)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def settings(**fields: Any) -> PromptsConfig:
    return PromptsConfig(train=Path("train.jsonl"), held_out=Path("held_out.jsonl"), **fields)


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problems_of(path: Path, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    with pytest.raises(ValueError, match="problem") as caught:
        load_prompts(path, config, tokenizer)
    first, *problems = str(caught.value).split("\n  ")
    assert str(path) in first
    return problems


# ---------------------------------------------------------------- files


def test_jsonl(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl",
        {"input": "1 + 1 = ", "label": "2", "metadata": {"data_source": "sums", "level": 3}, "id": 17},
        {"prompt": "caf\u00e9? ", "answer": 0.5, "data_source": "words", "solution": "left alone"},
        {"prompt": [{"role": "user", "content": "3"}], "label": 3},
    )
    path.write_text(path.read_text().replace("\n", "\n\n", 1))  # empty lines are no rows
    first, second, third = load_prompts(path, settings(), tokenizer)
    assert first.text == "1 + 1 = "
    assert (first.prompt_id, first.answer, first.source) == ("17", "2", "sums")
    assert tokenizer.decode(list(first.token_ids)) == "<bos>1 + 1 = "
    assert (second.answer, second.source) == ("0.5", "words")
    assert (third.text, third.answer, third.source) == ("3", "3", "")
    assert len({first.prompt_id, second.prompt_id, third.prompt_id}) == 3


def test_parquet_gives_the_prompts_that_jsonl_gives(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "What is 2 + 2?"}]
    table = pa.Table.from_pylist(
        [
            {
                "data_source": "sums",
                "prompt": messages,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "4"},
                "extra_info": {"split": "train", "index": 0},
            }
        ]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", {"prompt": messages, "answer": "4", "data_source": "sums"})
    config = settings(template="chat")
    (from_parquet,) = load_prompts(tmp_path / "a.parquet", config, tokenizer)
    assert [from_parquet] == load_prompts(tmp_path / "a.jsonl", config, tokenizer)
    assert from_parquet.answer == "4"


def test_ids_from_the_content_know_nothing_of_place_or_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    a, b = {"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}
    forwards = load_prompts(write_jsonl(tmp_path / "f.jsonl", a, b), settings(), tokenizer)
    backwards = load_prompts(write_jsonl(tmp_path / "b.jsonl", b, a), settings(template="chat"), tokenizer)
    assert [prompt.prompt_id for prompt in forwards] == [prompt.prompt_id for prompt in reversed(backwards)]


def test_all_problems_of_a_file_are_reported_with_line_value_and_remedy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    good = {"prompt": "1", "answer": "1", "id": "a"}
    path = write_jsonl(
        tmp_path / "train.jsonl",
        good,
        {"answer": "1"},
        {"prompt": "2", "input": "3", "answer": "1"},
        {"prompt": [{"role": "user"}], "answer": "1"},
        {"prompt": "4"},
        {"prompt": "5", "answer": True},
        {"prompt": "6", "answer": " "},
        {"prompt": "7", "answer": "1", "id": ["x"]},
        good,
        {"prompt": "x" * 50, "answer": "1", "id": "long one"},
        [1],
        {"prompt": [{"role": "user", "content": "8"}, {"role": "assistant", "content": "9"}], "answer": "1"},
    )
    with path.open("ab") as file:
        file.write(b"{not json\n\xff\xfe\xff\n")
    problems = problems_of(path, settings(max_tokens=40), tokenizer)
    expected = [
        ("line 2: prompt = null", "no prompt; give it under prompt or input"),
        ('line 3: input = "3"', "keep one"),
        ('line 4: prompt = [{"role": "user"}]', '"content"'),
        ("line 5: answer = null", "reward_model.ground_truth"),
        ("line 6: answer = true", "a string or a number"),
        ('line 7: answer = " "', "a string or a number"),
        ('line 8: id = ["x"]', "leave it out"),
        ('line 9: id = "a"', "also that of line 1"),
        ('line 10: prompt = "xxx', "51 tokens, more than prompts.max_tokens = 40"),
        ("line 11: line = [1]", "not an object"),
        ("line 12: prompt = ", 'prompts.template = "chat"'),
        ("line 13: '{not json': is not JSON (column 2: ", "one object a line"),
        ("line 14: '\ufffd\ufffd\ufffd': is not JSON (byte 0xff is not UTF-8)", "one object a line"),
    ]
    assert len(problems) == len(expected)
    for problem, (start, remedy) in zip(problems, expected, strict=True):
        assert problem.startswith(start)
        assert remedy in problem


def test_many_problems_are_counted_and_long_values_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", *({"prompt": "x", "answer": ["y" * 1000]} for _ in range(37)))
    problems = problems_of(path, settings(), tokenizer)
    assert problems[-1] == "... and 17 more"
    assert len(problems) == 21
    assert max(map(len, problems)) < 200


def test_files_that_are_none(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\n")
    (tmp_path / "bad.parquet").write_text("prompt,answer\n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, says in [
        ("absent.jsonl", "prompts.held_out = .*no such file"),
        ("a.csv", "'.csv' is not known"),
        ("bad.parquet", "is not Parquet"),
        ("empty.jsonl", "no row"),
    ]:
        with pytest.raises(ValueError, match=says) as caught:
            load_prompts(tmp_path / name, settings(), tokenizer)
        assert name in str(caught.value)


# ---------------------------------------------------------------- templates


def test_chat_template_is_rendered_once_with_one_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl",
        {"prompt": "hello", "answer": "1"},
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "answer": "1",
        },
    )
    text, messages = load_prompts(path, settings(template="chat", system_prompt="Be brief."), tokenizer)
    assert text.text == "<bos><system>Be brief.\n<user>hello\n<assistant>"
    assert messages.text == "<bos><system>Be brief.\n<user>a\n<assistant>b\n<user>c\n<assistant>"
    for prompt in (text, messages):
        assert prompt.token_ids.count(tokenizer.convert_tokens_to_ids("<bos>")) == 1
        assert tokenizer.decode(list(prompt.token_ids)) == prompt.text


def test_a_text_that_was_rendered_elsewhere_keeps_its_one_bos(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", {"prompt": "<bos><user>x", "answer": "1"})
    (prompt,) = load_prompts(path, settings(), tokenizer)
    assert prompt.token_ids.count(tokenizer.convert_tokens_to_ids("<bos>")) == 1


def test_chat_problems_are_reported_with_the_others(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_jsonl(
        tmp_path / "train.jsonl",
        {"prompt": [{"role": "system", "content": "mine"}, {"role": "user", "content": "x"}], "answer": "1"},
        {"prompt": [{"role": "tool", "content": "x"}], "answer": "1"},
    )
    system, tool = problems_of(path, settings(template="chat", system_prompt="ours"), tokenizer)
    assert 'set prompts.system_prompt = ""' in system
    assert "refused by the chat template (no tools here)" in tool


def test_chat_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", {"prompt": "x", "answer": "1"})
    with pytest.raises(ValueError, match="no chat template"):
        load_prompts(path, settings(template="chat"), byte_tokenizer(chat_template=None))


# ---------------------------------------------------------------- tokenizers


def save_model_directory(path: Path, tokenizer: PreTrainedTokenizerFast, model_type: str) -> Path:
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def test_a_byte_level_tokenizer_round_trips(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = save_model_directory(tmp_path / "model", tokenizer, "qwen2")
    loaded = load_tokenizer(path)
    assert tokenizer_hash(loaded) == tokenizer_hash(load_tokenizer(path))
    config = settings(template="chat")
    assert template_hash(loaded, config) == template_hash(tokenizer, config)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    """A word-level character vocabulary beside a qwen2 config: AutoTokenizer reads it as something else."""
    symbols = sorted({*map(chr, range(32, 127)), "\n", "<unk>"})
    backend = Tokenizer(models.WordLevel({symbol: index for index, symbol in enumerate(symbols)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    path = save_model_directory(tmp_path / "model", tokenizer, "qwen2")
    with pytest.raises(ValueError, match=r"model\.hf_path = .*its tokenizer turns .*byte-level BPE"):
        load_tokenizer(path)


def test_directories_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.hf_path = .*no such directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match=r"model\.hf_path = .*tokenizer"):
        load_tokenizer(tmp_path)


def test_hashes_tell_what_they_are_about(tokenizer: PreTrainedTokenizerFast) -> None:
    none, chat = settings(), settings(template="chat")
    others = byte_tokenizer(chat_template="{{ messages }}")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(others)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(byte_tokenizer(extra="<end>"))
    assert template_hash(tokenizer, none) == template_hash(others, none)
    hashes = [
        template_hash(tokenizer, none),
        template_hash(tokenizer, chat),
        template_hash(others, chat),
        template_hash(tokenizer, settings(template="chat", system_prompt="Be brief.")),
    ]
    assert len(set(hashes)) == 4


def test_importing_prompts_leaves_torch_and_transformers_out() -> None:
    code = "import sys, reval_mcore.prompts; sys.exit(bool({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------- order and overlap


def test_prompt_order_is_a_permutation_and_a_function_of_seed_and_epoch() -> None:
    orders = [prompt_order(seed, epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(50))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(prompt_order(1, 1, 50), orders[3])


@given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))), st.integers(0, 5))
def test_iterations_take_distinct_prompts_and_every_epoch_visits_all(sizes: tuple[int, int], seed: int) -> None:
    num_per_iteration, num_prompts = sizes
    num_iterations = 3 * num_prompts
    blocks = [prompts_for_iteration(i, num_per_iteration, num_prompts, seed) for i in range(num_iterations)]
    for block in blocks:
        assert len(block) == num_per_iteration
        assert len(set(block.tolist())) == num_per_iteration
    for epoch in range(num_iterations * num_per_iteration // num_prompts):
        first = epoch * num_prompts // num_per_iteration
        last = -((epoch + 1) * num_prompts // -num_per_iteration)
        assert set(np.concatenate(blocks[first:last]).tolist()) == set(range(num_prompts))


def test_blocks_that_divide_the_epoch_are_its_order_cut() -> None:
    blocks = [prompts_for_iteration(i, 10, 30, 7) for i in range(6)]
    assert np.array_equal(np.concatenate(blocks), np.concatenate([prompt_order(7, epoch, 30) for epoch in (0, 1)]))


def test_uneven_blocks_visit_prompts_evenly() -> None:
    counts = Counter(np.concatenate([prompts_for_iteration(i, 7, 10, 0) for i in range(1000)]).tolist())
    assert max(counts.values()) - min(counts.values()) < 100  # of 700 visits each


def test_more_prompts_an_iteration_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.num_prompts = 11: there are only 10"):
        prompts_for_iteration(0, 11, 10, 0)


def test_overlap_compares_texts_not_ids() -> None:
    def prompt(prompt_id: str, text: str) -> Prompt:
        return Prompt(prompt_id=prompt_id, text=text, token_ids=(1,), answer="1")

    train = [prompt("a", "one"), prompt("b", "two"), prompt("c", "two ")]
    assert overlap(train, [prompt("a", "three"), prompt("x", " two\n")]) == [(train[1], prompt("x", " two\n"))]
    assert overlap(train, [prompt("a", "three")]) == []
