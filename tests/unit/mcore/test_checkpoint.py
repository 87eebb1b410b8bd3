"""Checkpoints written in the background: of the moment when they were asked for, or an error that says why not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
import zlib
from pathlib import Path

import pytest

from reval_mcore.mcore.checkpoint import PendingSave
from reval_mcore.mcore.learner import Learner
from reval_mcore.mcore.topology import Topology
from tests.builders import learner_weights, make_batch, make_config, same_tensors, scored, train, update


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_background_save_is_of_the_moment_when_it_began(
    untied: Path, topology: Topology, tmp_path: Path, precision: str
) -> None:
    """Training goes on at once; weights, Adam, reference and counters on disk are those of before."""
    config = make_config(untied, model={"precision": precision})
    learner = Learner(config, topology)
    train(learner, config, 2)
    learner.reset_reference(2)
    weights, reference = learner_weights(learner), learner.score_reference(make_batch(6)).trajectory_score
    pending = learner.save(tmp_path, in_background=True)
    next_metrics = update(learner, scored(learner, make_batch(8, seed=3)), config).metrics
    train(learner, config, 2)
    learner.reset_reference(5)
    crc32s = pending.finish()
    assert crc32s == {path.name: zlib.crc32(path.read_bytes()) for path in tmp_path.glob("*.distcp")}
    assert not multiprocessing.active_children()

    resumed = Learner(config, topology)
    resumed.load(tmp_path)
    assert same_tensors(learner_weights(resumed), weights)
    assert resumed.reference_version == resumed.num_updates == 2
    assert (resumed.score_reference(make_batch(6)).trajectory_score == reference).all()
    assert update(resumed, scored(resumed, make_batch(8, seed=3)), config).metrics == next_metrics


def test_both_ways_of_saving_write_the_same(untied: Path, topology: Topology, tmp_path: Path) -> None:
    learner = Learner(make_config(untied), topology)
    written = []
    for name in ("at_once", "in_background"):
        directory = tmp_path / name
        directory.mkdir()
        written.append(learner.save(directory, in_background=name == "in_background").finish())
    assert written[0] == written[1]
    assert len(written[0]) == 1


def wait_until_done(pending: PendingSave, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not pending.is_done():
        assert time.monotonic() < deadline, "the writer is silent"
        time.sleep(0.01)


def test_a_writer_that_was_killed_is_an_error_and_no_endless_wait(
    untied: Path, topology: Topology, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "__0_0.distcp")  # in the place of the file: the writer waits for a reader
    pending = Learner(make_config(untied), topology).save(tmp_path, in_background=True)
    assert not pending.is_done()
    (writer,) = multiprocessing.active_children()
    os.kill(writer.pid or 0, signal.SIGKILL)
    wait_until_done(pending)
    with pytest.raises(RuntimeError, match=r"the process that wrote it died \(exit status -9\)"):
        pending.finish()
    assert not multiprocessing.active_children()


def test_signals_for_the_trainer_do_not_end_the_writer(untied: Path, topology: Topology, tmp_path: Path) -> None:
    """Batch systems send them to every process of a job."""
    pending = Learner(make_config(untied), topology).save(tmp_path, in_background=True)
    (writer,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(writer.pid or 0, number)
    pending.finish()
    assert (tmp_path / "metadata.json").is_file()


def test_an_abandoned_save_leaves_no_process(untied: Path, topology: Topology, tmp_path: Path) -> None:
    pending = Learner(make_config(untied), topology).save(tmp_path, in_background=True)
    pending.abandon()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_write_is_the_error_of_the_disk(
    untied: Path, topology: Topology, tmp_path: Path, in_background: bool
) -> None:
    (tmp_path / "__0_0.distcp").mkdir()  # in the place of the file
    pending = Learner(make_config(untied), topology).save(tmp_path, in_background=in_background)
    with pytest.raises(OSError, match=r"__0_0\.distcp") as failed:
        pending.finish()
    assert failed.value.errno == errno.EISDIR
