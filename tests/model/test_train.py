"""Training learns, repeats itself, survives being killed, and says what it cannot do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from longretriever.errors import InputError, Mismatch, NotSaved
from longretriever.index import ExactIndex
from longretriever.model import warm
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.model.train import train
from longretriever.retrieve.interests import Top
from longretriever.retrieve.retriever import Retriever
from longretriever.store.behaviors import Store
from tests.worlds import START, parity_log, random_log, stored, table

TINY = TrainConfig(
    dim=16,
    heads=2,
    context_length=8,
    recent_length=4,
    overlap=2,
    step_samples=100,
    epochs=3,
    distance=0.0,
    interests=None,
    whole=None,
)
INTERESTS = PginConfig(dim=8, recent_length=4, categories=3, step_samples=200, epochs=1)
WHOLE = EbrConfig(dim=8, length=8, step_samples=100, epochs=1)


@pytest.fixture(scope="module")
def parity(tmp_path_factory):
    return stored(parity_log(), tmp_path_factory.mktemp("parity") / "store")


def parity_right(path: Path, store: Store) -> float:
    """How often the first half of a context's items is of the parity that the user likes there."""
    model = Model.open(path)
    vectors = model.item_vectors(slice(None))
    retriever = Retriever(model, ExactIndex(vectors, model.category_start), store, interests=Top(3))
    right, asked = 0, 0
    for user in range(0, store.n_users, 3):
        answer = retriever.answer([store.life(user)], k=36)[0]
        for context in range(len(answer.contexts)):
            items = answer.item[answer.source == context][:6]
            category = answer.asked_categories[context]
            liked = store.event_item[store.in_context(user, int(category), limit=1)][0] % 2
            right += int((items % 2 == liked).sum())
            asked += len(items)
    return right / asked


@pytest.mark.parametrize("encoder", ["packed", "cls"])
def test_it_learns_what_only_the_context_tells(parity, tmp_path, encoder):
    ticks = []
    config = replace(TINY, encoder=encoder, epochs=12, row_lr=0.1)
    at = train(parity, tmp_path / "model", config, progress=ticks.append)
    assert parity_right(tmp_path / "model", parity) > 0.95  # chance is 0.5
    assert at.validation[at.best] > 0.4  # of log 2 = 0.69 nats that parity is worth
    assert 0 < at.waiting < at.seconds
    assert ticks[-1].share == 1 or "validation" in at.finished
    assert not list(tmp_path.glob(".*")), "the working folder must be gone"


@pytest.mark.parametrize(
    "switches",
    [
        {"returns": False, "ages": False, "recent_length": 0},
        {"mixed": True, "whole_category_up_to": 10, "sampled_negatives": 5},
        {"within": 5, "distance": 0.5},
        vars(TrainConfig.paper()),
    ],
    ids=["plain", "mixed", "within", "paper"],
)
def test_every_switch_trains_and_serves(parity, tmp_path, switches):
    sizes = ("dim", "heads", "context_length", "overlap", "step_samples")
    config = replace(TINY, **{**switches, **{name: getattr(TINY, name) for name in sizes}, "samples": 500})
    at = train(parity, tmp_path / "model", config)
    assert at.finished == "500 samples are learned"
    assert 500 <= at.samples < 700, "to the end of a step"
    assert np.isfinite(at.validation).all()
    retriever = Retriever.load(tmp_path / "model", exact=True, interests=Top(3))
    answer = retriever.retrieve(5, 1000)
    assert len(answer) == 12 * len(answer.contexts) >= 24
    probability = np.exp([c.log_prob for c in answer.candidates])
    np.testing.assert_allclose(np.bincount(answer.source, probability), 1, atol=1e-3)


def weights(path: Path) -> np.ndarray:
    return np.concatenate(
        [np.load(path / "item_token.npy").ravel(), np.load(path / "category_token.npy").ravel()]
    )


def test_the_same_seed_gives_the_same_weights(parity, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(parity, tmp_path / name, replace(TINY, seed=seed, interests=INTERESTS))
    assert np.array_equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not np.array_equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    a, b = Model.open(tmp_path / "a", verify=True), Model.open(tmp_path / "b")
    assert a.fingerprint == b.fingerprint


def test_threads_do_not_change_the_weights(parity, tmp_path):
    for threads in (1, 2):
        train(parity, tmp_path / str(threads), replace(TINY, epochs=1), threads=threads)
    assert np.array_equal(weights(tmp_path / "1"), weights(tmp_path / "2"))


SCRIPT = """
import sys, time
from longretriever import Store, train
from tests.model.test_train import TINY

def say(tick):
    print(tick.position.steps, flush=True)
    if tick.position.steps == 12:  # in the middle of an epoch, and step 12 not yet in the checkpoint
        time.sleep(600)

train(Store.open(sys.argv[1]), sys.argv[2], TINY, checkpoint_seconds=0, progress=say)
"""


def test_killed_and_resumed_ends_in_the_same_weights(parity, tmp_path):
    train(parity, tmp_path / "whole", TINY)
    command = [sys.executable, "-c", SCRIPT, str(parity.path), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": _threads()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        for line in process.stdout:
            if int(line) == 12:
                process.send_signal(signal.SIGKILL)
                break
    assert not (tmp_path / "killed").exists()
    seen = []
    train(parity, tmp_path / "killed", TINY, progress=lambda tick: seen.append(tick.position.steps))
    assert seen[0] == 12, "it must go on from the checkpoint, not from the start"
    assert np.array_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_killed_before_the_first_checkpoint_was_whole(parity, tmp_path):
    (tmp_path / ".m.training" / ".latest.partial-1-00000000").mkdir(parents=True)
    assert train(parity, tmp_path / "m", replace(TINY, epochs=1)).epoch == 1
    assert not (tmp_path / ".m.training").exists()


def _threads() -> str:
    import torch

    return str(torch.get_num_threads())


def test_a_checkpoint_of_other_settings_is_refused_and_can_be_discarded(parity, tmp_path):
    def stop(tick):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parity, tmp_path / "m", TINY, progress=stop, checkpoint_seconds=0)
    with pytest.raises(KeyboardInterrupt):  # the first stop came before the first checkpoint
        train(parity, tmp_path / "m", TINY, progress=_stop_at(3), checkpoint_seconds=0)
    with pytest.raises(Mismatch, match=r"other settings \(dim, epochs\).*--fresh"):
        train(parity, tmp_path / "m", replace(TINY, dim=8, epochs=1))
    at = train(parity, tmp_path / "m", replace(TINY, dim=8, epochs=1), fresh=True)
    assert at.epoch == 1


def _stop_at(steps):
    def progress(tick):
        if tick.position.steps >= steps:
            raise KeyboardInterrupt

    return progress


def test_it_stops_when_validation_no_longer_falls(tmp_path):
    store = stored(random_log(1, events=600, users=20), tmp_path / "store")  # nothing to learn
    at = train(store, tmp_path / "model", replace(TINY, epochs=40, patience=2, validation=0.2, row_lr=0.5))
    assert at.epoch < 40
    assert at.finished == "no better validation for 2 epochs"
    assert at.best == int(np.argmax(at.validation))


def test_a_wrong_place_is_refused_before_training(parity):
    with pytest.raises(Mismatch, match="holds a saved store"):
        train(parity, parity.path, TINY, progress=lambda tick: pytest.fail("it has begun"))


def test_minutes_bound_it(parity, tmp_path):
    began = time.perf_counter()
    at = train(parity, tmp_path / "model", replace(TINY, epochs=10_000, minutes=0.03, patience=10_000))
    assert at.finished == "1.8 seconds are over"
    assert time.perf_counter() - began < 30
    assert Model.open(tmp_path / "model").n_items == parity.n_items


def test_minutes_bound_all_that_is_learned_together(parity, tmp_path):
    endless = {"epochs": 10_000, "patience": 10_000}
    config = replace(TINY, **endless, minutes=0.05, interests=replace(INTERESTS, **endless))
    at = train(parity, tmp_path / "model", replace(config, whole=replace(WHOLE, **endless)))
    ends = [at.finished, *(at.beside[name]["finished"] for name in ("whole", "interests"))]
    parts = [float(end.removesuffix(" seconds are over")) for end in ends]
    assert sum(parts) == pytest.approx(3, abs=0.5)
    assert min(parts) > 0.3


def test_time_that_is_not_needed_is_left_for_the_next(parity, tmp_path):
    endless = {"epochs": 10_000, "patience": 10_000}
    config = replace(TINY, epochs=1, minutes=0.05, interests=replace(INTERESTS, **endless))
    at = train(parity, tmp_path / "model", config)
    assert at.finished == "1 epochs are done"
    assert at.seconds + at.beside["interests"]["seconds"] == pytest.approx(3, abs=0.5)


def test_all_that_is_learned_together_starts_from_the_same_factors(parity, tmp_path, monkeypatch):
    """They are the dearest part of a short training on a large log."""
    made, item_factors = [], warm.item_factors

    def counted(*given):
        made.append(given)
        return item_factors(*given)

    monkeypatch.setattr(warm, "item_factors", counted)
    train(parity, tmp_path / "model", replace(TINY, whole=replace(WHOLE, dim=TINY.dim)))
    assert len(made) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"model"}
    assert not list(tmp_path.rglob("factors-*"))
    train(parity, tmp_path / "other", replace(TINY, whole=WHOLE))
    assert len(made) == 3, "of another width they are others"


def test_nothing_to_learn_from(tmp_path):
    log = table([1, 1, 2], ["a", "a", "b"], ["x", "x", "y"], [START, START + 1, START + 2])
    store = stored(log, tmp_path / "store")
    with pytest.raises(InputError, match="3 events in 2 categories, but no category has two items"):
        train(store, tmp_path / "model", TINY)


@pytest.mark.parametrize(
    "log",
    [
        table([1] * 6, [1, 2, 3, 1, 2, 3], [0] * 6, [START + i for i in range(6)]),  # one user, one category
        table([1, 2], [1, 2], [0, 0], [START, START]),  # one event each, at the same time
    ],
    ids=["one user", "one event each"],
)
def test_the_smallest_logs_train(tmp_path, log):
    at = train(stored(log, tmp_path / "store"), tmp_path / "model", replace(TINY, epochs=1))
    assert at.samples >= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"encoder": "gru"}, "packed"),
        ({"dim": 15}, "multiple"),
        ({"validation": 0.9}, "0.5"),
        ({"epochs": 0}, "epochs"),
        ({"minutes": 0}, "minutes"),
        ({"samples": 0}, "samples=0: expected 1 or more, or None for no bound"),
        ({"patience": 0}, "patience=0: expected at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a share in \[0, 1\)"),
        ({"id_dropout": -0.1}, r"id_dropout=-0.1: expected a share"),
        ({"distance": 1.0}, r"distance=1.0: expected a share"),
        ({"recent_length": -1}, "recent_length=-1, within=None: expected at least 0"),
        ({"within": 0}, "within=0: expected at least 0, at least 1"),
        (
            {"life_sample": 3, "recent_length": 0},
            "life_sample=3: expected 0, or more with recent_length above 0",
        ),
        ({"life_sample": 3, "within": 50}, r"life_sample=3: .*whole life looked at \(within=None\)"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(InputError, match=message):
        replace(TINY, **wrong)


def test_a_damaged_or_foreign_model(parity, tmp_path):
    train(parity, tmp_path / "model", replace(TINY, epochs=1))
    with pytest.raises(NotSaved, match="longretriever train"):
        Model.open(tmp_path / "nowhere")
    with pytest.raises(Mismatch, match="holds a saved store, expected: model"):
        Model.open(parity.path)
    onnx = tmp_path / "model" / "user_tower.onnx"
    onnx.write_bytes(onnx.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"user_tower\.onnx: .* bytes, expected .*longretriever train"):
        Model.open(tmp_path / "model")
