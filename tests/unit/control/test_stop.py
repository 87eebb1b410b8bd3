"""A run is asked to stop by a signal or by a file, and is asked once."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from reval_mcore.control import StopSignals, TrainerHeart, trainer_heart


def test_a_file_asks_to_stop_until_it_is_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    with StopSignals(file) as stop:
        assert stop.reason is None
        file.write_text("time_limit\n")
        assert stop.reason == "time_limit"
        stop.obeyed()
        assert stop.reason is None
        assert not file.exists()
        stop.obeyed()  # twice does no harm


def test_an_empty_file_asks_too(tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert StopSignals(tmp_path / "stop").reason == "stop"


def test_the_first_signal_is_the_reason_and_a_file_changes_nothing(tmp_path: Path) -> None:
    with StopSignals(tmp_path / "stop") as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        (tmp_path / "stop").write_text("later")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_heart_beats_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(trainer_heart.time, "monotonic", lambda: now)
    heart, file = TrainerHeart(tmp_path), tmp_path / "trainer.json"
    heart.beat(3, "collect")
    first = json.loads(file.read_text())
    assert (first["beat"], first["iteration"], first["phase"]) == (1, 3, "collect")
    heart.beat(3, "update")
    assert json.loads(file.read_text()) == first
    now = 101.0
    heart.beat(3, "update")
    assert json.loads(file.read_text())["phase"] == "update"
    assert [path.name for path in tmp_path.iterdir()] == ["trainer.json"]


def test_a_heart_that_cannot_write_goes_on_and_leaves_nothing(tmp_path: Path) -> None:
    TrainerHeart(tmp_path / "not there").beat(0, "collect")
    (tmp_path / "trainer.json").mkdir()
    TrainerHeart(tmp_path).beat(0, "collect")
    assert [path.name for path in tmp_path.iterdir()] == ["trainer.json"]
