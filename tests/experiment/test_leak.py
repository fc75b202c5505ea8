from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from longretriever.errors import InputError
from longretriever.evaluate.split import LiveRequests
from longretriever.experiment.leak import leak_log, measure, table
from longretriever.store.behaviors import Store
from tests.worlds import START, parity_log, stored

CATEGORIES, ITEMS = 3, 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    log = parity_log(categories=CATEGORIES, items=ITEMS)
    return stored(log, tmp_path_factory.mktemp("leak") / "store")


class Seer:
    """A retriever whose user vector is made from the target: `see` turns item numbers into vectors."""

    def __init__(self, store: Store, requests: LiveRequests, see) -> None:
        self.store, self.requests, self.see = store, requests, see
        self.model = SimpleNamespace(scale=50.0)

    def store_vectors(self) -> np.ndarray:
        n = self.store.n_items
        vectors = np.zeros((n, n + CATEGORIES), np.float32)
        vectors[np.arange(n), np.arange(n)] = 1
        vectors[np.arange(n), n + self.store.item_category] = 1
        return vectors / np.sqrt(2)

    def context_vectors(self, lives, category) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.stack([self.see(self.store_vectors()[item]) for item in self.requests.target])
        return vectors, np.arange(len(lives)) != 0  # the first has no past in its category


@pytest.fixture(scope="module")
def requests(store: Store) -> LiveRequests:
    item = np.tile(np.arange(store.n_items), 8)
    n = len(item)
    return LiveRequests(
        np.arange(n) % store.n_users, np.full(n, START + 10**8), item, np.zeros(n, bool), np.ones(n)
    )


def only_category(vector: np.ndarray) -> np.ndarray:
    return np.r_[np.zeros(len(vector) - CATEGORIES), vector[-CATEGORIES:]] * np.sqrt(2)


def only_item(vector: np.ndarray) -> np.ndarray:
    return np.r_[vector[:-CATEGORIES], np.zeros(CATEGORIES)] * np.sqrt(2)


def test_a_model_that_knows_the_category_alone_is_explained_by_it(store, requests):
    found = measure(Seer(store, requests, only_category), store, START + 10**8, requests)
    assert found["requests"] == len(requests.user) - 1
    assert found["category_alone"] == pytest.approx(1 / ITEMS)
    assert found["category_alone_nats"] == pytest.approx(np.log(CATEGORIES))
    assert found["explained"] > 0.9  # what is missing is log-q: items are not evenly popular
    assert found["in_batch"] < 0.25


def test_a_model_that_knows_the_item_is_not(store, requests):
    found = measure(Seer(store, requests, only_item), store, START + 10**8, requests)
    assert found["in_batch"] == found["same_category"] == 1.0
    assert found["in_batch_nats"] == pytest.approx(np.log(CATEGORIES * ITEMS), abs=0.01)
    assert found["explained"] == pytest.approx(np.log(CATEGORIES) / np.log(CATEGORIES * ITEMS), abs=0.01)
    assert found["in_category@50"] == found["in_corpus@50"] == 1.0


def test_requests_without_a_past_are_none_to_learn_from(store, requests):
    alone = LiveRequests(*(x[:1] for x in (requests.user, requests.before, requests.target)), None, None)
    with pytest.raises(InputError, match="0 live requests have a past in their target's category"):
        measure(Seer(store, alone, only_item), store, START + 10**8, alone)


def test_both_models_are_trained_and_asked_the_same(tmp_path: Path):
    said: list[str] = []
    result = leak_log(parity_log(users=40, visits=40), samples=600, work=tmp_path, said=said.append)
    mixed, plain = result["models"].values()
    assert mixed["requests"] == plain["requests"] > 50
    assert mixed["category_alone"] == plain["category_alone"]
    assert mixed["training"]["samples"] >= 600
    assert said == ["reading the log", "mixed batches: learning", "one category a batch: learning"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(result))
    shown = console.export_text()
    assert f"{mixed['in_batch']:.3f}" in shown
    assert "mixed batches" in shown
