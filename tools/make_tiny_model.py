"""Make the demo's prompts, tokenizer and model from nothing: `python -m tools.make_tiny_model --out DIR [--seed N]`.

The model, a Qwen2 of 0.1 M parameters, learns the task of tiny_task.py by supervised training on the worked examples of
a careless student, who misreads digits and forgets carries, the one into the hundreds more often than not. So it can
add, and mostly does not: what is left to learn is a matter of preference, which is what rewards can teach. The slips
bound its accuracy, whatever the seed: below 0.4 when sampled, about 0.5 when greedy.

    DIR/config.json, model.safetensors, generation_config.json, tokenizer.json, ...   in Hugging Face format
    DIR/prompts/train.jsonl, held_out.jsonl                                           no question is in both
    DIR/tiny_model.json                                                               figures; written last
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reval_mcore.randomness import generator
from tools import tiny_task
from tools.tiny_task import STOP_TOKEN, Pair, Question, Slips

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

# ---------------------------------------------------------------- model and warm start


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the model."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2


@dataclass(frozen=True, slots=True)
class Training:
    """The supervised training: a constant rate until the model can add, then a decay to nothing."""

    lr: float = 5e-3
    batch_size: int = 64
    warmup_steps: int = 50
    evaluation_interval: int = 50
    decay_from: float = 0.28  # sampled validation accuracy that shows the skill
    decay_steps: int = 250
    max_steps: int = 900  # decay included

    def rate(self, step: int, decay_start: int) -> float:
        """Learning rate of step `step`, from 0."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.lr * warm * min(1.0, (decay_start + self.decay_steps - step) / self.decay_steps)


SAMPLED_WINDOW, GREEDY_WINDOW = (0.25, 0.42), (0.40, 0.72)  # where the slips put it; a remark is printed outside
MAX_RESPONSE_TOKENS = 40


def save_config(directory: Path, shape: Shape) -> None:
    """config.json and tokenizer: everything but the weights."""
    from transformers import AutoTokenizer, Qwen2Config

    tiny_task.save_tokenizer(directory)
    config = Qwen2Config(max_position_embeddings=256, tie_word_embeddings=True, **asdict(shape))
    config.save_pretrained(directory)  # AutoTokenizer asks it for the kind of model
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, tokenizer.pad_token_id
    config.initializer_range = 0.5 / math.sqrt(shape.hidden_size)  # 0.02 is for models a hundred times as wide
    config.save_pretrained(directory)


def build_model(directory: Path, seed: int) -> Qwen2ForCausalLM:
    """A model with random weights, from the directory's config.json."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(int(generator(seed, "tiny_model", "weights").integers(2**31)))
    return Qwen2ForCausalLM(Qwen2Config.from_pretrained(directory)).float()


def respond(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, greedy: bool
) -> list[str]:
    """One response to each question, at temperature 1 or greedy."""
    import torch

    encoded = tokenizer([q.text for q in questions], return_tensors="pt", padding=True, padding_side="left")
    how: dict[str, Any] = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    # the mixin's protocol lists attributes that only some models have
    generate = model.generate  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        tokens = generate(**encoded, max_new_tokens=MAX_RESPONSE_TOKENS, **how)
    return tokenizer.batch_decode(tokens[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], *, greedy: bool
) -> float:
    responses = respond(model, tokenizer, questions, greedy=greedy)
    return sum(map(tiny_task.is_correct, responses, questions)) / len(questions)


def make_batch(
    tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, size: int, excluded: Collection[Pair]
) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [B, L] each: tokens, and the next token of each position (-100: in the prompt, or nothing)."""
    import torch

    questions = [tiny_task.ask(rng, excluded) for _ in range(size)]
    prompts = tokenizer([q.text for q in questions])["input_ids"]
    responses = tokenizer([tiny_task.work_out(q, rng, Slips()) + STOP_TOKEN for q in questions])["input_ids"]
    assert isinstance(prompts, list)
    assert isinstance(responses, list)
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = np.full((size, length), tokenizer.pad_token_id)
    targets = np.full((size, length), -100)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        tokens[row, :end] = prompt + response
        targets[row, len(prompt) - 1 : end - 1] = response
    return torch.from_numpy(tokens), torch.from_numpy(targets)


def warm_start(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    validation: Sequence[Question],
    excluded: Collection[Pair],
    training: Training,
) -> int:
    """Train `model` in place on worked examples, none of them about an excluded sum. Returns the number of steps."""
    import torch
    from torch.nn.functional import cross_entropy

    rng = generator(seed, "tiny_model", "worked examples")
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, betas=(0.9, 0.98), weight_decay=0.0)
    start = time.monotonic()
    decay_start = training.max_steps - training.decay_steps
    step = 0
    while step < decay_start + training.decay_steps:
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step, decay_start)
        tokens, targets = make_batch(tokenizer, rng, training.batch_size, excluded)
        hidden = model.model(input_ids=tokens).last_hidden_state
        answered = targets >= 0  # logits for these only: most of the cost of a tiny model is its vocabulary
        loss = cross_entropy(model.lm_head(hidden[answered]), targets[answered])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % training.evaluation_interval == 0:
            sampled = accuracy(model, tokenizer, validation, greedy=False)
            greedy = accuracy(model, tokenizer, validation, greedy=True)
            if sampled >= training.decay_from and step < decay_start:
                decay_start = step
            print(
                f"warm start: step {step}, loss {loss.item():.3f}, validation accuracy sampled {sampled:.3f} "
                f"greedy {greedy:.3f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return step


# ---------------------------------------------------------------- the whole


def describe(seed: int, threads: int) -> dict[str, object]:
    """What decides the result: equal descriptions, equal files."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, tiny_task.__file__))
    return {
        "seed": seed,
        "threads": threads,
        "maker": hashlib.sha256(sources).hexdigest()[:16],
    }


def is_made(directory: Path, description: Mapping[str, object]) -> bool:
    path = directory / "tiny_model.json"
    if not path.exists():
        return False
    figures = json.loads(path.read_text(encoding="utf-8"))
    return all(figures.get(key) == value for key, value in description.items())


def save_task(directory: Path, seed: int, shape: Shape) -> dict[str, list[Question]]:
    """Everything but the weights: prompts, tokenizer, config.json. Needs seconds."""
    (directory / "prompts").mkdir(parents=True, exist_ok=True)
    (directory / "tiny_model.json").unlink(missing_ok=True)  # it says that all is there, which from here on is not so
    questions = tiny_task.make_questions(seed)
    for name in ("train", "held_out"):
        tiny_task.write_prompts(directory / "prompts" / f"{name}.jsonl", name, questions[name])
    save_config(directory, shape)
    return questions


def remark_on(figures: Mapping[str, object]) -> None:
    """Say so where training did not end where it was meant to: the model is usable, the demo's margins are others."""
    for key, (low, high) in (("sampled_accuracy", SAMPLED_WINDOW), ("greedy_accuracy", GREEDY_WINDOW)):
        value = figures[key]
        assert isinstance(value, float)
        if not low <= value <= high:
            print(f"warm start: {key} {value:.3f} is outside {low:.2f} to {high:.2f}; try another --seed")


def make(directory: Path, seed: int, threads: int) -> dict[str, object]:
    """Write everything below `directory` and return the figures of tiny_model.json."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start = time.monotonic()
    torch.set_num_threads(threads)
    questions = save_task(directory, seed, Shape())
    tokenizer = tiny_task.load_tokenizer(directory)
    model = build_model(directory, seed)
    excluded = {question.pair for name in ("held_out", "validation") for question in questions[name]}
    steps = warm_start(
        model, tokenizer, seed=seed, validation=questions["validation"], excluded=excluded, training=Training()
    )
    model.save_pretrained(directory)
    figures: dict[str, object] = {
        **describe(seed, threads),
        "sampled_accuracy": accuracy(model, tokenizer, questions["held_out"], greedy=False),
        "greedy_accuracy": accuracy(model, tokenizer, questions["held_out"], greedy=True),
        "held_out_prompts": len(questions["held_out"]),
        "train_prompts": len(questions["train"]),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "steps": steps,
        "seconds": round(time.monotonic() - start, 1),
    }
    remark_on(figures)
    (directory / "tiny_model.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.make_tiny_model", description="Make the demo's model.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write, in Hugging Face format")
    parser.add_argument("--seed", type=int, default=0, help="decides prompts, weights and training examples")
    parser.add_argument("--threads", type=int, default=1, help="of torch: a tiny model gains little from more")
    parser.add_argument("--force", action="store_true", help="make it again even if it is there")
    options = parser.parse_args(arguments)
    if options.seed < 0 or options.threads < 1:
        parser.error(f"--seed {options.seed} --threads {options.threads}: give a seed >= 0 and at least one thread")
    if is_made(options.out, describe(options.seed, options.threads)) and not options.force:
        print(f"{options.out}: already there, made with seed {options.seed}")
        return
    figures = make(options.out, options.seed, options.threads)
    print(f"{options.out}: model, tokenizer, prompts/train.jsonl and prompts/held_out.jsonl, tiny_model.json")
    print(
        f"held-out accuracy {figures['sampled_accuracy']:.3f} sampled, {figures['greedy_accuracy']:.3f} greedy; "
        f"{figures['parameters']:,} parameters, {figures['steps']} steps, {figures['seconds']} s"
    )


if __name__ == "__main__":
    main()
