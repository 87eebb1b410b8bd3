"""What users get wrong: a table of commands, each with what makes it wrong in a directory where all is right."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors.torch import load_file, save_file

from tests.builders import edit_config

QUESTIONS = {"train": ("What is 1 plus 1?\n", "What is 1 plus 2?\n"), "held_out": ("What is 2 plus 2?\n",)}
CONFIG: Mapping[str, Mapping[str, Any]] = {
    "run": {"directory": "run", "num_iterations": 1},
    "model": {"hf_path": "model", "precision": "fp32"},
    "prompts": {"train": "prompts/train.jsonl", "held_out": "prompts/held_out.jsonl", "max_tokens": 16},
    "rollout": {"num_prompts": 2, "num_responses": 2, "max_response_tokens": 8},
    "objective": {"beta": 0.5},
    "replay": {"capacity": 8},
    "updates": {"per_iteration": 1, "batch_size": 4, "max_tokens_per_micro_batch": 64},
    "optimizer": {"lr": 1e-3},
    "checkpoint": {"interval": 1},
}


class Bench:
    """A directory with config.toml, model/ and prompts/; the commands are given in it, with relative paths."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.model = path / "model"
        self.weights = self.model / "model.safetensors"
        self.prompts = path / "prompts"
        self.run = path / "run"  # made by the commands only
        self.held: list[object] = []  # what must not be closed before the command is done

    def fill(self) -> None:
        """Write the config and the prompts; the model is the caller's."""
        self.config.write_text(tomli_w.dumps(CONFIG), encoding="utf-8")
        self.prompts.mkdir()
        for name, questions in QUESTIONS.items():
            self.write_prompts(name, *({"prompt": text, "answer": "3"} for text in questions))

    def copy_to(self, path: Path) -> Bench:
        shutil.copytree(self.path, path, symlinks=True, dirs_exist_ok=True)
        return Bench(path)

    def write_prompts(self, name: str, *rows: object) -> None:
        """A text is a line as it is, anything else becomes one of JSON."""
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (self.prompts / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


Edit = Callable[[Bench], object]


@dataclass(frozen=True)
class Case:
    command: tuple[str, ...]
    edits: tuple[Edit, ...]
    trained: bool  # a run of one iteration is there before the edits

    def make(self, bench: Bench) -> list[str]:
        """Make it so, and return the command's arguments."""
        for edit in self.edits:
            edit(bench)
        return list(self.command)


def case(command: tuple[str, ...], *edits: Edit, trained: bool = False) -> Case:
    return Case(command, edits, trained)


def train(*more: str) -> tuple[str, ...]:
    return ("train", "config.toml", *more)


def evaluate(*more: str) -> tuple[str, ...]:
    return ("eval", "config.toml", *more)


def export(*more: str) -> tuple[str, ...]:
    return ("export", "run", "--out", "out", *more)


# ---------------------------------------------------------------- edits


def file(where: str, content: str | bytes) -> Edit:
    data = content.encode() if isinstance(content, str) else content

    def edit(bench: Bench) -> None:
        (bench.path / where).parent.mkdir(parents=True, exist_ok=True)
        (bench.path / where).write_bytes(data)

    return edit


def without(*patterns: str) -> Edit:
    return lambda bench: [path.unlink() for pattern in patterns for path in bench.path.glob(pattern)]


def cut(where: str, num_bytes: int) -> Edit:
    """The end of a file is lost."""

    def edit(bench: Bench) -> None:
        (path,) = bench.path.glob(where)
        path.write_bytes(path.read_bytes()[:-num_bytes])

    return edit


def locked(where: str, mode: int = 0o000) -> Edit:
    """Permissions of a file or directory, which is made if it is not there, that keep its owner out."""

    def edit(bench: Bench) -> None:
        path = bench.path / where
        if not path.exists():
            path.mkdir()
        path.chmod(mode)

    return edit


def config_json(**fields: Any) -> Edit:
    return lambda bench: edit_config(bench.model, **fields)


def tensors(change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor | None]]) -> Edit:
    """Tensors of the model replaced or added; None takes one out."""

    def edit(bench: Bench) -> None:
        old = load_file(bench.weights)
        new = {**old, **change(old)}
        kept = {name: tensor for name, tensor in new.items() if tensor is not None}
        save_file(kept, bench.weights, metadata={"format": "pt"})

    return edit


def prompts(*rows: object, name: str = "train") -> Edit:
    return lambda bench: bench.write_prompts(name, *rows)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Edit:
    def edit(bench: Bench) -> None:
        path = bench.model / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return edit


def another_token(content: dict[str, Any]) -> None:
    number = max(content["model"]["vocab"].values()) + 1
    content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": "<|extra|>"})


def sharded(bench: Bench) -> None:
    """The weights under an index, and in no file."""
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(bench.weights), "model-00001-of-00001.safetensors")}
    (bench.model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    bench.weights.unlink()


def another_trainer(bench: Bench) -> None:
    lock = (bench.run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    bench.held.append(lock)


def run_that_kept_nothing(bench: Bench) -> None:
    config = {**CONFIG, "checkpoint": {"interval": "never"}}
    for name, text in (("config.toml", tomli_w.dumps(config)), ("metrics.jsonl", '{"iteration": 0}\n'), (".lock", "")):
        file(f"run/{name}", text)(bench)


# ---------------------------------------------------------------- the table

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
OF_A_RUN = '{"iteration": 0, "progress/reference_age": 1.0}\n'

SETTINGS: Mapping[str, Case] = {
    "unknown_key": case(train("rollout.num_respones=4")),
    "unknown_key_like_none": case(train("run.colour=green")),
    "unknown_section": case(train("evalution.interval=4")),
    "sections_missing": case(train(), file("config.toml", "[run]\nnum_iterations = 10\n")),
    "wrong_type": case(train("optimizer.lr=fast", "evaluation.pass_at_k=2", "run.num_iterations=[1, 2]")),
    "out_of_range": case(train("run.seed=-1", "rollout.top_p=1.5", "checkpoint.interval=0")),
    "no_choice": case(train("reward.shaping=grouped")),
    "capacity_below_the_batch": case(train("replay.capacity=3")),
    "group_of_one": case(train("rollout.num_responses=1")),
    "contradictions": case(
        train(
            "rollout.max_response_tokens=80",
            "replay.min_size=9",
            "optimizer.warmup_updates=2",
            "optimizer.min_lr=1",
            "optimizer.betas=[0.9, 1]",
            "evaluation.pass_at_k=[1, 4]",
            "prompts.held_out=prompts/train.jsonl",
            "prompts.system_prompt=Be brief.",
        )
    ),
    "config_missing": case(("train", "confg.toml")),
    "config_is_a_directory": case(("train", "model")),
    "config_below_a_file": case(("train", "config.toml/config.toml")),
    "config_unreadable": case(train(), locked("config.toml")),
    "config_is_no_toml": case(train(), file("config.toml", "[run]\ndirectory = runs/mine\n")),
    "config_is_no_utf8": case(train(), file("config.toml", b'[run]\ndirectory = "\xff"\n')),
    "extends_itself": case(
        train(), file("config.toml", 'extends = "base.toml"\n'), file("base.toml", 'extends = "config.toml"\n')
    ),
    "extends_missing": case(train(), file("config.toml", 'extends = "configs/base.toml"\n')),
    "extends_a_number": case(train(), file("config.toml", "extends = 3\n")),
    "override_without_a_value": case(train("run.seed")),
    "override_of_a_section": case(train("run=3")),
    "override_after_an_option": case(train("run.seed=1", "--dry-run", "run.seed=one", "--world-size=2", "run.sed=1")),
}

MODEL: Mapping[str, Case] = {
    "model_missing": case(train("model.hf_path=modle")),
    "model_is_a_file": case(train("model.hf_path=model/model.safetensors")),
    "model_unreadable": case(train(), locked("model")),
    "model_config_missing": case(train(), without("model/config.json")),
    "model_config_is_no_json": case(train(), file("model/config.json", '{"model_type": "qwen2"\n"hidden_size": 64}')),
    "model_config_is_no_object": case(train(), file("model/config.json", "[]")),
    "model_config_unreadable": case(train(), locked("model/config.json")),
    "model_architecture_unknown": case(train(), config_json(model_type="mamba2")),
    "model_rope_scaling_unknown": case(
        train(), config_json(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    ),
    "model_config_lacks_a_field": case(train(), config_json(num_key_value_heads=None)),
    "model_config_of_a_wrong_type": case(train(), config_json(hidden_size="64")),
    "model_config_contradicts_itself": case(train(), config_json(num_key_value_heads=3)),
    "model_quantized": case(train(), config_json(quantization_config={"quant_method": "awq"})),
    "model_generation_config_is_no_json": case(train(), file("model/generation_config.json", "")),
    "model_generation_config_of_a_wrong_type": case(
        train(), file("model/generation_config.json", '{"eos_token_id": "<|im_end|>"}')
    ),
    "model_field_unknown": case(train(), config_json(rope_interleave=True)),
    "model_checkpoint_missing": case(train("model.checkpoint=convertd")),
    "model_checkpoint_is_none": case(train("model.checkpoint=prompts")),
    "weights_missing": case(train(), without("model/model.safetensors")),
    "weights_unreadable": case(train(), locked("model/model.safetensors")),
    "weights_of_another_shape": case(
        train(), tensors(lambda old: {NORM: old[NORM][:32], EMBEDDING: old[EMBEDDING][:300]})
    ),
    "weights_of_another_config": case(train(), config_json(num_hidden_layers=3, num_key_value_heads=4)),
    "weights_lack_a_tensor": case(train(), tensors(lambda old: {NORM: None})),
    "weights_have_a_tensor_too_many": case(train(), tensors(lambda old: {"model.norm.bias": torch.zeros(64)})),
    "weights_of_a_wrong_type": case(train(), tensors(lambda old: {NORM: old[NORM].to(torch.int8)})),
    "weights_truncated": case(train(), cut("model/model.safetensors", 1000)),
    "weights_are_a_pointer": case(
        train(), file("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    ),
    "weights_index_names_an_absent_file": case(train(), sharded),
    "weights_index_is_empty": case(train(), sharded, file("model/model.safetensors.index.json", "{}")),
    "tokenizer_missing": case(train(), without("model/tokenizer*")),
    "tokenizer_is_no_json": case(train(), cut("model/tokenizer.json", 100)),
    "tokenizer_of_nothing": case(train(), file("model/tokenizer.json", "{}")),
    "tokenizer_larger_than_the_vocabulary": case(train(), tokenizer(another_token)),
    "tokenizer_loses_text": case(train(), tokenizer(lambda content: content["model"]["vocab"].pop("z"))),
}

PROMPTS: Mapping[str, Case] = {
    "prompts_missing": case(train(), without("prompts/train.jsonl")),
    "prompts_are_a_directory": case(train("prompts.train=prompts")),
    "prompts_unreadable": case(train(), locked("prompts/held_out.jsonl")),
    "prompts_of_another_ending": case(train("prompts.train=config.toml")),
    "prompts_are_no_parquet": case(
        train("prompts.train=prompts/train.parquet"), file("prompts/train.parquet", "prompt,answer\n")
    ),
    "prompts_empty": case(train(), prompts()),
    "prompts_with_all_kinds_of_wrong_lines": case(
        train(),
        prompts(
            {"prompt": "1", "answer": "1", "id": "a"},
            '{"prompt": "2"; "answer": "2"}',
            {"prompt": "", "answer": "3"},
            {"prompt": "4"},
            {"prompt": "5", "answer": "5", "id": "a"},
            {"prompt": "six " * 30, "answer": "6", "id": "six"},
            ["7", "7"],
            {"prompt": [{"role": "user", "content": "8"}, {"role": "assistant", "content": "9"}], "answer": "9"},
        ),
    ),
    "prompts_with_a_broken_line": case(train(), prompts({"prompt": "1", "answer": "1"}, '{"prompt": "2", "answer"')),
    "prompt_empty": case(train(), prompts({"prompt": "", "answer": "1"})),
    "prompt_without_an_answer": case(train(), prompts({"prompt": "What is 1 plus 1?"})),
    "prompt_too_long": case(train(), prompts({"prompt": "1 plus 1 " * 20, "answer": "2"})),
    "prompt_ids_twice": case(
        train(), prompts({"prompt": "1", "answer": "1", "id": 7}, {"prompt": "2", "answer": "2", "id": 7})
    ),
    "prompts_twice": case(train(), prompts({"prompt": "1", "answer": "1"}, {"prompt": "1", "answer": "1"})),
    "prompts_held_out_in_training_too": case(
        train(), prompts(*({"prompt": text, "answer": "3"} for text in QUESTIONS["train"]), name="held_out")
    ),
    "prompts_too_few": case(train("rollout.num_prompts=4", "replay.capacity=16")),
    "prompts_without_a_chat_template": case(train("prompts.template=chat"), without("model/chat_template.jinja")),
    "stop_token_out_of_the_vocabulary": case(train("rollout.stop_token_ids=[2, 369]")),
    "sequence_longer_than_the_positions": case(train(), config_json(max_position_embeddings=20)),
    "layout_that_cuts_heads": case(
        train("parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=3")
    ),
    "layout_without_its_processes": case(train("parallel.tensor_model_parallel_size=2")),
    "transformer_engine_without_a_gpu": case(train("model.implementation=te")),
}

RUN: Mapping[str, Case] = {
    "run_of_another_config": case(train("objective.beta=0.25", "run.seed=5"), trained=True),
    "run_of_other_prompts": case(
        train(), prompts({"prompt": "1", "answer": "1"}, {"prompt": "2", "answer": "2"}), trained=True
    ),
    "run_of_other_fields_than_allowed": case(
        train("--allow-changed", "objective.bta", "--allow-changed", "model", "--allow-changed", "x"), trained=True
    ),
    "run_is_a_file": case(train(), file("run", "")),
    "run_below_a_file": case(train("run.directory=config.toml/run")),
    "run_is_something_else": case(train(), file("run/checkpoints/step_1000/model.pt", "of another program")),
    "run_may_not_be_made": case(train("run.directory=readonly/run"), locked("readonly", 0o555)),
    "run_may_not_be_written": case(train(), locked("run", 0o555), trained=True),
    "run_without_a_checkpoint": case(train(), run_that_kept_nothing),
    "run_is_trained_by_another": case(train(), another_trainer, trained=True),
    "checkpoint_truncated": case(train(), cut("run/checkpoints/step_*/replay.npz", 1), trained=True),
    "checkpoint_weights_truncated": case(train(), cut("run/checkpoints/step_*/weights/__0_0.distcp", 1), trained=True),
}

COMMANDS: Mapping[str, Case] = {
    "eval_of_no_checkpoint": case(evaluate("--checkpoint", "model")),
    "eval_of_a_missing_directory": case(evaluate("--hf", "modle")),
    "eval_of_weights_that_do_not_fit": case(evaluate(), config_json(vocab_size=368)),
    "eval_of_two_things": case(evaluate("--hf", "model", "--checkpoint", "run/checkpoints/latest")),
    "export_of_no_run": case(export()),
    "export_of_no_checkpoint": case(export("--checkpoint", "run"), trained=True),
    "export_to_a_full_directory": case(export(), file("out/config.json", "{}"), trained=True),
    "export_to_a_file": case(export(), file("out", ""), trained=True),
    "export_may_not_write": case(("export", "run", "--out", "readonly/out"), locked("readonly", 0o555), trained=True),
    "report_of_no_run": case(("report", "run")),
    "report_too_early": case(("report", "run"), file("run/metrics.jsonl", "")),
    "report_of_a_damaged_line": case(("report", "run"), file("run/metrics.jsonl", f"{OF_A_RUN}iteration 1\n")),
    "report_of_something_else": case(("report", "run"), file("run/metrics.jsonl", '{"step": 0, "loss": 0.5}\n')),
    "report_may_not_write": case(("report", "run"), file("run/metrics.jsonl", OF_A_RUN), locked("run", 0o555)),
    "plan_without_its_option": case(train("--world-size", "2")),
    "plan_of_no_processes": case(train("--dry-run", "--world-size", "0")),
    "plan_of_no_memory": case(train("--dry-run", "--gpu-memory-gib", "0")),
    "plan_of_a_layout_that_cannot_work": case(
        train("--dry-run", "--world-size", "6", "parallel.tensor_model_parallel_size=4")
    ),
    "plan_of_an_absent_model": case(train("--dry-run", "model.hf_path=modle")),
    "unknown_option": case(train("--dryrun", "run.seed=1")),
    "unknown_command": case(("trian", "config.toml")),
    "no_command": case(()),
    "no_config": case(("train",)),
}

CASES = {**SETTINGS, **MODEL, **PROMPTS, **RUN, **COMMANDS}
