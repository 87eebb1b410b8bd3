"""The configuration: everything wrong is said at once, files build on files, what is written reads back."""

import copy
import errno
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from reval_mcore.config import (
    MISSING,
    Config,
    ConfigError,
    check_fields,
    dumps,
    in_words,
    is_due,
    load,
    parse,
    read_json,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = sorted((REPOSITORY / "configs").glob("**/*.toml"))

MINIMAL: dict[str, dict[str, Any]] = {
    "run": {"directory": "runs/test", "num_iterations": 10},
    "model": {"hf_path": "models/tiny"},
    "prompts": {"train": "train.jsonl", "held_out": "held_out.jsonl"},
    "rollout": {"num_prompts": 4, "num_responses": 8, "max_response_tokens": 64},
    "objective": {"beta": 0.02},
    "replay": {"capacity": 320},
    "updates": {"per_iteration": 4, "batch_size": 32},
    "optimizer": {"lr": 1e-6},
}


def changed(**fields: Any) -> dict[str, dict[str, Any]]:
    """MINIMAL with some `section__key` fields set."""
    raw = copy.deepcopy(MINIMAL)
    for name, value in fields.items():
        section, key = name.split("__")
        raw.setdefault(section, {})[key] = value
    return raw


def problems_of(raw: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(raw, "test")
    return {problem.path: str(problem) for problem in caught.value.problems}


def write(path: Path, raw: dict[str, Any], extends: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps({"extends": extends, **raw} if extends is not None else raw))
    return path


def test_minimal_config_has_the_documented_types() -> None:
    config = parse(MINIMAL, "test")
    assert config.run.directory == Path("runs/test")
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.reference.reset_interval == "never"


def test_all_problems_of_all_sections_are_reported_at_once() -> None:
    raw = changed(rollout__num_prompt=4, optimizer__lr="fast", run__seed=-1, reward__shaping="grouped")
    del raw["objective"]["beta"], raw["model"]
    raw["evalution"] = {"interval": 3}
    found = problems_of(raw)
    assert set(found) == {
        "rollout.num_prompt",
        "optimizer.lr",
        "run.seed",
        "reward.shaping",
        "objective.beta",
        "model.hf_path",
        "evalution",
    }
    assert "= 4" in found["rollout.num_prompt"]
    assert "did you mean rollout.num_prompts?" in found["rollout.num_prompt"]
    assert "did you mean [evaluation]?" in found["evalution"]
    assert 'optimizer.lr = "fast": not a number' in found["optimizer.lr"]
    assert ">= 0" in found["run.seed"]
    assert "'group_centered'" in found["reward.shaping"]
    assert "required" in found["objective.beta"]


@pytest.mark.parametrize(
    ("field", "value", "path", "says"),
    [
        ("rollout__num_prompts", "8", "rollout.num_prompts", "whole number"),
        ("rollout__num_prompts", True, "rollout.num_prompts", "whole number"),
        ("rollout__num_prompts", 8.0, "rollout.num_prompts", "whole number"),
        ("rollout__num_prompts", 0, "rollout.num_prompts", "> 0"),
        ("optimizer__lr", True, "optimizer.lr", "not a number"),
        ("optimizer__lr", "1e-6", "optimizer.lr", "not a number"),
        ("optimizer__lr", float("nan"), "optimizer.lr", "finite"),
        ("optimizer__lr", float("inf"), "optimizer.lr", "finite"),
        ("logging__tensorboard", 1, "logging.tensorboard", "true or false"),
        ("logging__tensorboard", "yes", "logging.tensorboard", "true or false"),
        ("run__directory", 3, "run.directory", "not a path"),
        ("prompts__system_prompt", 3, "prompts.system_prompt", "not a string"),
        ("evaluation__pass_at_k", 1, "evaluation.pass_at_k", "not a list"),
        ("evaluation__pass_at_k", ["1"], "evaluation.pass_at_k.0", "whole number"),
        ("rollout__stop_token_ids", [1, True], "rollout.stop_token_ids.1", "whole number"),
        ("checkpoint__interval", 0, "checkpoint.interval", '"never"'),
        ("checkpoint__interval", True, "checkpoint.interval", '"never"'),
        ("checkpoint__interval", "10", "checkpoint.interval", '"never"'),
    ],
)
def test_values_of_another_type_are_refused(field: str, value: object, path: str, says: str) -> None:
    found = problems_of(changed(**{field: value}))
    assert set(found) == {path}
    assert says in found[path]


def test_whole_numbers_are_good_floats_and_lists_good_tuples() -> None:
    config = parse(changed(objective__beta=1, optimizer__betas=[0, 0.5], rollout__stop_token_ids=[3]), "test")
    assert config.objective.beta == 1.0
    assert config.optimizer.betas == (0.0, 0.5)
    assert config.rollout.stop_token_ids == (3,)


def test_a_section_that_is_no_table() -> None:
    assert "[section]" in problems_of({**MINIMAL, "rollout": 5})["rollout"]


@pytest.mark.parametrize(
    ("fields", "path", "says"),
    [
        ({"rollout__num_responses": 1}, "reward.shaping", "batch_centered"),
        ({"replay__capacity": 31, "updates__batch_size": 16}, "replay.capacity", "32 trajectories"),
        ({"updates__batch_size": 321}, "updates.batch_size", "320"),
        ({"replay__min_size": 321}, "replay.min_size", "never reached"),
        ({"updates__max_tokens_per_micro_batch": 1087}, "updates.max_tokens_per_micro_batch", "1088"),
        ({"optimizer__warmup_updates": 41}, "optimizer.warmup_updates", "40 updates"),
        ({"optimizer__min_lr": 1e-3}, "optimizer.min_lr", "optimizer.lr"),
        ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas.1", "[0, 1)"),
        ({"evaluation__pass_at_k": [1, 4]}, "evaluation.pass_at_k", "pass@4"),
        ({"parallel__sequence_parallel": True}, "parallel.sequence_parallel", "tensor_model_parallel_size >= 2"),
        ({"parallel__overlap_param_gather": True}, "parallel.overlap_param_gather", "overlap_grad_reduce"),
        ({"prompts__held_out": "train.jsonl"}, "prompts.held_out", "same file"),
        ({"prompts__system_prompt": "Be brief."}, "prompts.system_prompt", "template"),
    ],
)
def test_fields_that_contradict_each_other(fields: dict[str, Any], path: str, says: str) -> None:
    found = problems_of(changed(**fields))
    assert set(found) == {path}
    assert says in found[path]


def test_cross_field_problems_come_with_those_of_other_sections() -> None:
    assert set(problems_of(changed(rollout__num_responses=1, optimizer__lr=-1))) == {"reward.shaping", "optimizer.lr"}


def test_extends_chain_and_overrides(tmp_path: Path) -> None:
    write(tmp_path / "base.toml", changed(run__seed=1, optimizer__clip_grad=0.5, logging__num_text_samples=7))
    write(tmp_path / "sub" / "middle.toml", {"run": {"seed": 2}, "logging": {"num_text_samples": 8}}, "../base.toml")
    top = write(tmp_path / "sub" / "top.toml", {"run": {"seed": 3}}, "middle.toml")
    config = load(top)
    assert (config.run.seed, config.logging.num_text_samples, config.optimizer.clip_grad) == (3, 8, 0.5)
    config = load(top, ["run.seed=4", "run.directory=runs/bare word", "rollout.stop_token_ids=[1, 2]", "run.seed = 5"])
    assert (config.run.seed, config.run.directory) == (5, Path("runs/bare word"))
    assert config.rollout.stop_token_ids == (1, 2)


def test_extends_circle_names_the_chain(tmp_path: Path) -> None:
    write(tmp_path / "a.toml", MINIMAL, "b.toml")
    write(tmp_path / "b.toml", {}, "a.toml")
    with pytest.raises(ConfigError, match=r"extends itself .*a\.toml -> .*b\.toml -> .*a\.toml"):
        load(tmp_path / "a.toml")


@pytest.mark.parametrize("override", ["run.seed", "seed=1", "run..seed=1", "run.seed.more=1", "=1"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load(write(tmp_path / "a.toml", MINIMAL), [override])


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean run\.seed"):
        load(write(tmp_path / "a.toml", MINIMAL), ["run.sed=1"])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.toml: there is no such file; check the path"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=r'a\.toml: 1 problem\n  extends = "absent\.toml": there is no such file'):
        load(write(tmp_path / "a.toml", MINIMAL, "absent.toml"))
    with pytest.raises(ValueError, match="Is a directory; give a file"):
        load(tmp_path)
    (tmp_path / "number.toml").write_text("extends = 3\n")
    with pytest.raises(ConfigError, match="extends = 3"):
        load(tmp_path / "number.toml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[run]\nseed = one\n", r"at line 2, column 8\); mend 'seed = one'"),
        (b"[run]\nseed =", r"at end of document\); mend the last line"),
        (b"[run]\n# \xff\n", r"is not UTF-8 \(byte 0xff in line 2\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_files_that_are_not_toml_are_refused_by_line(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load(tmp_path / "bad.toml")


def test_values_are_shown_in_one_line_and_cut() -> None:
    found = problems_of(changed(run__seed=[1, {"a": "b", "c": True}], run__more={"a": [1]}, run__directory=["x" * 999]))
    assert found["run.seed"].startswith('run.seed = [1, {a = "b", c = true}]: ')
    assert found["run.more"].startswith("run.more = {a = [1]}: ")
    assert len(found["run.directory"]) < 300


def test_errors_of_the_operating_system_in_words() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert in_words(full) == "runs/a: No space left on device; make room, then give the same command again"
    assert in_words(OSError(errno.EIO, "Input/output error", "runs/a")) == "runs/a: Input/output error"
    assert in_words(OSError("what a library says")) == "what a library says"


def test_fields_of_the_command_line_are_checked_by_name() -> None:
    config = parse(MINIMAL, "test")
    check_fields(["objective.beta", "run.seed"], config)
    with pytest.raises(ConfigError) as caught:
        check_fields(["objective.bta", "objective", "run.seed"], config)
    unknown, section = map(str, caught.value.problems)
    assert unknown == '--allow-changed = "objective.bta": is no field; did you mean objective.beta?'
    assert section == '--allow-changed = "objective": a section; name the fields, as in objective.name'


@pytest.mark.parametrize("content", ["[1]", "{", "\xff", ""])
def test_files_that_are_not_json_objects_are_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json: is .*; .*"):
        read_json(path)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    config = parse(
        changed(
            reference__reset_interval=7,
            evaluation__num_samples=4,
            evaluation__pass_at_k=[1, 4],
            prompts__template="chat",
            prompts__system_prompt='two\nlines and a "quote"',
            rollout__stop_token_ids=[5],
        ),
        "test",
    )
    path = tmp_path / "config.toml"
    path.write_text(dumps(config))
    assert load(path) == config


def test_the_tree_is_frozen() -> None:
    config = parse(MINIMAL, "test")
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 3


def test_intervals() -> None:
    assert [iteration for iteration in range(7) if is_due(3, iteration)] == [2, 5]
    assert not any(is_due("never", iteration) for iteration in range(7))


def test_importing_the_configuration_leaves_torch_out() -> None:
    code = "import sys, reval_mcore.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    assert isinstance(load(path), Config)


def test_a_key_too_many_does_not_hide_what_is_wrong_between_sections() -> None:
    overrides = ["rollout.num_respones=4", "optimizer.lr=fast", "replay.capacity=100"]
    with pytest.raises(ConfigError) as error:
        load(Path(__file__).parents[2] / "configs" / "demo.toml", overrides)
    paths = [problem.path for problem in error.value.problems]
    assert sorted(paths) == ["optimizer.lr", "replay.capacity", "rollout.num_respones", "updates.batch_size"]


def test_an_error_is_the_same_after_a_pickle() -> None:
    """It goes from the rank that finds it to the others."""
    with pytest.raises(ConfigError) as caught:
        parse(changed(rollout__num_respones=4, optimizer__lr="fast") | {"replay": {}}, source="a.toml")
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.problems) == (str(caught.value), caught.value.problems)
    assert any(problem.value is MISSING for problem in error.problems)
