"""A training in its own process: what it tells, what it costs, and what happens when things go wrong."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from longretriever.errors import LongRetrieverError
from longretriever.experiment.apart import Broken, _ended, learn_apart, peak_memory
from longretriever.model.config import TrainConfig
from tests.worlds import parity_log, stored

TINY = TrainConfig(
    dim=8, context_length=8, recent_length=4, overlap=2, step_samples=20, epochs=6, layers=1, whole=None
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return stored(parity_log(users=40), tmp_path_factory.mktemp("apart") / "store").path


def test_a_training_that_is_killed_or_stopped_goes_on_at_the_next_call(store, tmp_path):
    def kill_after_an_epoch(tick):
        if tick.position.epoch >= 1:
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(Broken, match=r"killed by signal 9 .*too little memory"):
        learn_apart(store, tmp_path / "model", TINY, 1, kill_after_an_epoch)
    assert not (tmp_path / "model").exists()

    first = []

    def stop(tick):
        first.append(tick.position.epoch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_apart(store, tmp_path / "model", TINY, 1, stop)
    assert first[0] >= 1, "the first epoch is not trained again"
    assert not multiprocessing.active_children()


def test_what_is_wrong_is_said_by_the_caller(store, tmp_path):
    with pytest.raises(Broken, match=r"nowhere: no such folder.* `longretriever ingest`"):
        learn_apart(tmp_path / "nowhere", tmp_path / "model", TINY, 1, None)
    with pytest.raises(Broken, match=r"^AttributeError: .*\nTraceback"):
        learn_apart(store, tmp_path / "model", "no configuration", 1, None)
    assert issubclass(Broken, LongRetrieverError)


def test_an_end_without_an_answer_is_explained():
    assert _ended(-11) == "the process that trained was killed by signal 11 (Segmentation fault)."
    assert _ended(3) == "the process that trained ended with exit code 3 and left no answer."


def _peak(sender) -> None:
    before = peak_memory()
    np.ones(20_000_000)  # 160 MB, then gone
    sender.send((before, peak_memory()))


def test_peak_memory_is_of_the_process_alone_and_of_its_highest_moment():
    held = np.ones(60_000_000)  # 480 MB here
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(sender,))
    process.start()
    before, after = receiver.recv()
    process.join()
    assert before < held.nbytes
    assert 1.4e8 < after - before < 2.5e8
    assert peak_memory() > held.nbytes
