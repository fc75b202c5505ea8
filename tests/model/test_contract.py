"""What every method promises, whatever it learns: it repeats, resumes, and answers from the past alone."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from longretriever.errors import UnknownUser
from longretriever.model.baselines.mind import MindConfig
from longretriever.model.baselines.ulim import UlimConfig
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
from longretriever.model.train import train
from longretriever.retrieve.added import add_items
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.retriever import Retriever
from tests.worlds import DAY, START, parity_log, stored, table

SHORT = {"dim": 8, "step_samples": 100, "epochs": 2, "dropout": 0.1, "warm_start": False}
METHODS = {
    "longretriever": TrainConfig(
        **SHORT,
        context_length=8,
        recent_length=4,
        overlap=2,
        interests=PginConfig(dim=8, epochs=1, recent_length=4, categories=4),
        whole=EbrConfig(**SHORT, length=12),
    ),
    "longretriever, the paper's": TrainConfig.paper(**SHORT, context_length=8),
    "ebr": EbrConfig(**SHORT, length=12),
    "ebr with factors": EbrConfig(**SHORT, length=12, factors=20.0),
    "ebr, the paper's": EbrConfig.paper(**SHORT, length=6),
    "ulim": UlimConfig(**SHORT, context_length=8, recent_length=6, interests=None),
    "mind": MindConfig(**SHORT, length=16, capsules=3),
}
NOW = START + 20 * DAY  # in the middle of all lives


@pytest.fixture(scope="module")
def log():
    return parity_log(users=30)


@pytest.fixture(scope="module")
def store(log, tmp_path_factory):
    return stored(log, tmp_path_factory.mktemp("contract") / "store")


@pytest.fixture(scope="module", params=METHODS.values(), ids=METHODS.keys())
def config(request):
    return request.param


@pytest.fixture(scope="module")
def model(store, config, tmp_path_factory):
    """The folder of a trained and indexed model."""
    return learned(store, tmp_path_factory.mktemp("model") / "m", config)


def learned(store, path, config, **options):
    train(store, path, config, **options)
    return index_model(path).parent


def lists(retriever, now=NOW, k=20):
    """Items and scores of all users."""
    answers = [retriever.retrieve(user, k, now=now) for user in range(retriever.store.n_users)]
    return [(a.item_ids, a.score) for a in answers]


def assert_same(a, b):
    for (item_a, score_a), (item_b, score_b) in zip(a, b, strict=True):
        assert item_a == item_b
        np.testing.assert_allclose(score_a, score_b, rtol=1e-5, atol=1e-5)


def weights(path):
    return np.concatenate([np.load(path / f"{x}_token.npy").ravel() for x in ("item", "category")])


def test_a_second_fit_to_the_same_place_learns_anew(store, config, model, tmp_path):
    before = lists(Retriever.load(model))
    again = learned(store, tmp_path / "m", config)
    assert_same(before, lists(Retriever.load(again)))
    same = weights(again)
    learned(store, tmp_path / "m", replace(config, seed=1))
    other = weights(again)
    assert not np.array_equal(same, other)
    learned(store, tmp_path / "m", config)
    assert np.array_equal(weights(again), same), "what was there must not be where training begins"


def test_each_loading_gives_the_same_lists(model):
    one, two = Retriever.load(model, verify=True), Retriever.load(model)
    assert_same(lists(one), lists(two))
    assert all(len(items) == 20 for items, _ in lists(one))


def test_the_index_answers_as_a_scan_of_all_items(model):
    indexed, scanned = lists(Retriever.load(model)), lists(Retriever.load(model, exact=True))
    # 16-bit vectors: neighbours within rounding may trade places
    common = [len({*a} & {*b}) / len(a) for (a, _), (b, _) in zip(indexed, scanned, strict=True)]
    assert np.mean(common) > 0.97


def test_together_as_alone(model):
    retriever = Retriever.load(model)
    lives = [retriever.store.life(user, NOW + 3 * DAY * user) for user in range(5)]
    together = retriever.answer(lives, 15)
    alone = [retriever.answer([life], 15)[0] for life in lives]
    assert_same(*([(a.item_ids, a.score) for a in answers] for answers in (together, alone)))


def test_nothing_after_now_is_known(log, store, model, tmp_path):
    rng = np.random.default_rng(3)
    n = 400
    later = table(
        rng.integers(0, 35, n),  # five of them unknown before
        rng.integers(0, 40, n) % 36,
        np.zeros(n, int),
        NOW + rng.integers(0, 10 * DAY, n),
    )
    items = later["item_id"].to_numpy()
    later = later.set_column(2, "category_id", [items // 12])
    until = pa.compute.less(log["timestamp"], NOW)
    changed = stored(pa.concat_tables([log.filter(until), later]), tmp_path / "changed")
    assert changed.fingerprint != store.fingerprint
    past, other = Retriever.load(model), Retriever.load(model, store=changed.path)
    for user in range(30):
        a, b = past.retrieve(user, 20, now=NOW), other.retrieve(user, 20, now=NOW)
        assert_same([(a.item_ids, a.score)], [(b.item_ids, b.score)])


def test_items_that_nobody_has_met_can_be_added(model, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(model, path)
    before = lists(Retriever.load(path), k=100)
    assert (
        add_items(path, table([0, 0], [100, 101], [1, 2], [START, START]).drop_columns(["user_id"])).added
        == 2
    )
    retriever = Retriever.load(path, verify=True)
    for (old, _), (found, score) in zip(before, lists(retriever, k=100), strict=True):
        assert set(old) < set(found) <= {*old, 100, 101}
        assert np.isfinite(score).all()
    assert retriever.model.category_of(np.array([12, 24, 25, 37])).tolist() == [1, 1, 2, 2]


def test_users_without_a_past(model):
    retriever = Retriever.load(model)
    assert len(retriever.retrieve(0, 20, now=START)) == 0
    assert len(retriever.retrieve(0, 10, now=START + 1)) == 10, "one behavior is a past"
    with pytest.raises(UnknownUser, match="user 'nobody' is not among the 30 users"):
        retriever.retrieve("nobody")


class Killed(BaseException):
    """Stands for a signal: nothing in the package catches it."""


def test_killed_and_resumed_ends_in_the_same_weights(store, config, model, tmp_path):
    def kill(tick):
        if tick.position.epoch == 1 and tick.position.step == 2:  # that step is not in the checkpoint
            raise Killed

    with pytest.raises(Killed):
        train(store, tmp_path / "m", config, progress=kill, checkpoint_seconds=0)
    seen = []
    learned(store, tmp_path / "m", config, progress=lambda tick: seen.append(tick.position.epoch))
    assert seen[0] == 1, "it must go on from the checkpoint, not from the start"
    assert np.array_equal(weights(tmp_path / "m"), weights(model))
    assert_same(lists(Retriever.load(tmp_path / "m")), lists(Retriever.load(model)))
