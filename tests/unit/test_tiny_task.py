"""The demo's task: right answers, nothing of the held-out set in training, a tokenizer that others can load."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from reval_mcore.randomness import generator
from tools import tiny_task
from tools.make_tiny_model import Shape, Training, describe, is_made, save_task
from tools.tiny_task import NO_SLIPS, STOP_TOKEN, Question, Slips

# fmt: off
BELOW_TWENTY = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
VALUES: dict[str, int] = {}
VALUES.update((word, value) for value, word in enumerate(BELOW_TWENTY))
VALUES.update((word, 10 * tens) for tens, word in enumerate(TENS, start=2))


def read_number(text: str) -> int:
    """A number in digits or in words, by adding up words: independent of how tiny_task writes them."""
    if text.isdigit():
        return int(text)
    total = 0
    for word in text.replace("-", " ").split():
        total = total * 100 if word == "hundred" else total + VALUES[word]
    return total


def read_sum(text: str) -> tuple[int, int]:
    """The two numbers of a question, from its text alone."""
    match = re.fullmatch(r"(?:What is|Add|What is the sum of) ((?:(?!the sum).)+?) (?:plus|and) (.+)[?.]\n", text)
    assert match, text
    return read_number(match[1]), read_number(match[2])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that the tool writes before it trains."""
    path = tmp_path_factory.mktemp("tiny")
    save_task(path, seed=0, shape=Shape())
    return path


def read_rows(directory: Path, name: str) -> list[dict[str, str]]:
    lines = (directory / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_no_sum_is_asked_twice_in_either_order(directory: Path) -> None:
    sums = {
        name: [frozenset(read_sum(row["prompt"])) for row in read_rows(directory, name)]
        for name in ("train", "held_out")
    }
    assert not set(sums["train"]) & set(sums["held_out"])
    for name, found in sums.items():
        assert len(found) == len(set(found)) == tiny_task.SPLIT_SIZES[name]


def test_answers_are_right(directory: Path) -> None:
    for name in ("train", "held_out"):
        rows = read_rows(directory, name)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            left, right = read_sum(row["prompt"])
            assert 100 <= left <= 999
            assert 100 <= right <= 999
            assert row["answer"] == str(left + right)


def test_prompts_are_asked_in_words_and_in_digits(directory: Path) -> None:
    sources = [row["data_source"] for row in read_rows(directory, "held_out")]
    for source in ("words", "digits", "mixed"):
        assert 0.15 < sources.count(source) / len(sources) < 0.6


@pytest.mark.parametrize("number", [100, 101, 110, 111, 119, 120, 121, 200, 340, 407, 999])
def test_words_read_back(number: int) -> None:
    assert read_number(tiny_task.in_words(number)) == number


def test_a_worked_answer_without_slips_is_correct() -> None:
    question = Question(407, 158, "What is four hundred seven plus 158?\n", "mixed")
    rng = generator(0, "tiny_prompts", "test")
    assert tiny_task.work_out(question, rng, NO_SLIPS) == "7+8=15\n0+5+1=6\n4+1=5\n\\boxed{565}"
    for _ in range(300):
        question = tiny_task.ask(rng)
        assert tiny_task.is_correct(tiny_task.work_out(question, rng, NO_SLIPS), question)


def test_slips_leave_what_the_demo_needs_to_learn() -> None:
    """What a model that copies the student perfectly scores: far below the limit of 0.45, and far above nothing."""
    rng = generator(0, "tiny_prompts", "test")
    questions = [tiny_task.ask(rng) for _ in range(4000)]
    right = sum(tiny_task.is_correct(tiny_task.work_out(question, rng, Slips()), question) for question in questions)
    assert 0.33 < right / len(questions) < 0.41
    assert not tiny_task.is_correct("7+8=15", questions[0])
    assert not tiny_task.is_correct("\\boxed{}", questions[0])


def test_excluded_sums_are_never_asked() -> None:
    excluded = {(a, b) for a in range(100, 1000) for b in range(a, 1000) if (a, b) != (123, 456)}
    rng = generator(1, "tiny_prompts", "test")
    unordered = tiny_task.ask(rng, excluded)
    assert unordered.pair == (123, 456)


def test_text_survives_the_tokenizer_that_everyone_loads(directory: Path) -> None:
    tokenizer = tiny_task.load_tokenizer(directory)
    prompts = [row["prompt"] for row in read_rows(directory, "held_out")]
    texts = [*prompts, "7+8=15\n0+5+1=6\n4+1=5\n\\boxed{565}" + STOP_TOKEN, "caf\u00e9 \\frac{1}{2}  <b>\t\n\n x"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token == STOP_TOKEN
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert max(len(tokenizer.encode(text)) for text in prompts) <= 24  # configs/demo.toml: prompts.max_tokens
    # prompt and response are tokenized apart when training, and must give the tokens that the whole text has
    response = "7+8=15\n"
    assert tokenizer.encode(prompts[0]) + tokenizer.encode(response) == tokenizer.encode(prompts[0] + response)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_seed_decides_everything(directory: Path, tmp_path: Path) -> None:
    save_task(tmp_path / "same", seed=0, shape=Shape())
    files = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "same") for p in (tmp_path / "same").rglob("*") if p.is_file())
    for file in files:
        assert (directory / file).read_bytes() == (tmp_path / "same" / file).read_bytes(), file
    assert [q.text for q in tiny_task.make_questions(1)["train"]] != [
        row["prompt"] for row in read_rows(directory, "train")
    ]


def test_a_finished_directory_is_known_by_its_figures(tmp_path: Path) -> None:
    assert not is_made(tmp_path, describe(3, 2))
    (tmp_path / "tiny_model.json").write_text(json.dumps({**describe(3, 2), "steps": 600}))
    assert is_made(tmp_path, describe(3, 2))
    assert not is_made(tmp_path, describe(4, 2))


def test_the_learning_rate_rises_holds_and_falls_to_nearly_nothing() -> None:
    training = Training()
    rates = [training.rate(step, 400) for step in range(400 + training.decay_steps)]
    assert rates[0] == pytest.approx(training.lr / training.warmup_steps)
    assert rates[training.warmup_steps : 401] == [training.lr] * (401 - training.warmup_steps)
    assert rates[-1] == pytest.approx(training.lr / training.decay_steps)
    assert rates[400:] == sorted(rates[400:], reverse=True)
