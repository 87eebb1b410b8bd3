"""The demo's task: three-digit addition asked in words and digits, its worked answers, and a tokenizer for both.

    What is four hundred seven plus 158?
    7+8=15
    0+5+1=6
    4+1=5
    \\boxed{565}

Everything is a function of the seed. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reval_mcore.randomness import generator
from reval_mcore.verifiers import compare_exactly, last_boxed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ---------------------------------------------------------------- questions and worked answers

SMALLEST, LARGEST = 100, 999
TEMPLATES = ("What is {} plus {}?\n", "Add {} and {}.\n", "What is the sum of {} and {}?\n")
SPLIT_SIZES: Mapping[str, int] = {"held_out": 512, "validation": 128, "train": 4096}

# fmt: off
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """One sum, as it is asked."""

    left: int
    right: int
    text: str  # ends in a newline: the response starts a line of its own
    source: str  # "digits", "words" or "mixed": how the two numbers are written

    @property
    def pair(self) -> Pair:
        """The sum without its order: 1+2 and 2+1 are the same question."""
        return min(self.left, self.right), max(self.left, self.right)

    @property
    def answer(self) -> str:
        return str(self.left + self.right)


@dataclass(frozen=True, slots=True)
class Slips:
    """Probabilities of the student's mistakes.

    No choice is near one half: there, a random step would change the greedy answer to half of all questions.
    """

    misread: float = 0.07  # a digit is read as any of the ten
    forget_carry: tuple[float, float, float] = (0.0, 0.3, 0.7)  # of the carry into units, tens, hundreds


NO_SLIPS = Slips(0.0, (0.0, 0.0, 0.0))


def in_words(number: int) -> str:
    """0 <= number <= 999 in English."""
    if number >= 100:
        return f"{_UNITS[number // 100]} hundred" + (f" {in_words(number % 100)}" if number % 100 else "")
    if number < 20:
        return _UNITS[number]
    return _TENS[number // 10] + (f"-{_UNITS[number % 10]}" if number % 10 else "")


def ask(rng: np.random.Generator, excluded: Collection[Pair] = ()) -> Question:
    """A random question, its sum not among the excluded ones."""
    while True:
        left, right = (int(number) for number in rng.integers(SMALLEST, LARGEST + 1, 2))
        if (min(left, right), max(left, right)) not in excluded:
            break
    template = TEMPLATES[rng.integers(len(TEMPLATES))]
    as_words = rng.random(2) < 0.5
    numbers = [in_words(n) if words else str(n) for n, words in zip((left, right), as_words, strict=True)]
    source = ("digits", "mixed", "words")[int(as_words.sum())]
    return Question(left, right, template.format(*numbers), source)


def make_questions(seed: int) -> dict[str, list[Question]]:
    """The questions of each split. No sum is asked twice, in one split or in two."""
    asked: set[Pair] = set()
    splits: dict[str, list[Question]] = {}
    for name, size in SPLIT_SIZES.items():
        rng = generator(seed, "tiny_prompts", name)
        splits[name] = []
        for _ in range(size):
            question = ask(rng, asked)
            asked.add(question.pair)
            splits[name].append(question)
    return splits


def work_out(question: Question, rng: np.random.Generator, slips: Slips) -> str:
    """A worked answer, least significant column first, with the mistakes that chance brings."""
    lines: list[str] = []
    digits: list[int] = []
    carry = 0
    for column, forget in enumerate(slips.forget_carry):
        read = [number // 10**column % 10 for number in (question.left, question.right)]
        read = [int(rng.integers(10)) if rng.random() < slips.misread else digit for digit in read]
        if carry and rng.random() < forget:
            carry = 0
        total = sum(read) + carry
        lines.append(f"{read[0]}+{read[1]}{'+1' if carry else ''}={total}")
        digits.append(total % 10)
        carry = total // 10
    answer = ("1" if carry else "") + "".join(map(str, reversed(digits)))
    return "\n".join([*lines, f"\\boxed{{{answer}}}"])


def is_correct(response: str, question: Question) -> bool:
    answer = last_boxed(response)
    return answer is not None and compare_exactly(answer, question.answer) is True


def write_prompts(path: Path, name: str, questions: Sequence[Question]) -> None:
    rows = [
        {"id": f"{name}-{index:04d}", "prompt": q.text, "answer": q.answer, "data_source": q.source}
        for index, q in enumerate(questions)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---------------------------------------------------------------- tokenizer

PAD_TOKEN, START_TOKEN, STOP_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# transformers reads every Qwen2 directory's tokenizer as Qwen2's own, which splits text like this whatever the saved
# file says; merges learned under another split would be saved, and not used.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(directory: Path) -> None:
    """A byte-level BPE: any text round-trips, each word of the task is one token, each digit one too."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    numbers = [in_words(number) for number in range(SMALLEST, LARGEST + 1)]
    corpus = [template.format(words, words) + "\\boxed{}" for template in TEMPLATES for words in numbers]
    trainer = trainers.BpeTrainer(
        vocab_size=1000,  # more than there are merges to learn
        special_tokens=[PAD_TOKEN, START_TOKEN, STOP_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=STOP_TOKEN, pad_token=PAD_TOKEN, model_max_length=256
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as everyone else will load it. Raises ValueError where text does not survive it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    rng = generator(0, "tiny_prompts", "round trip")
    for _ in range(100):
        question = ask(rng)
        text = question.text + work_out(question, rng, Slips()) + STOP_TOKEN
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            raise ValueError(
                f"{directory}: the tokenizer turns {text!r} into {back!r}; use the transformers of constraints.txt"
            )
    return tokenizer
