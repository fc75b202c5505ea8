"""A search of the nearest groups finds nearly what a search of all does, and says how nearly."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from longretriever import clusters
from longretriever.clusters import Clustering
from longretriever.errors import Damaged
from longretriever.index import CORPUS, ExactIndex, Index, build
from longretriever.model.config import EbrConfig
from longretriever.model.train import train
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.retriever import Retriever
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from tests.test_index import D, clustered, unit
from tests.worlds import parity_log, stored

N, K = 20_000, 500
START = np.array([0, 5_000, 5_000, 20_000])
WHOLE = np.array([CORPUS])


@pytest.fixture(scope="module")
def world() -> tuple[np.ndarray, np.ndarray]:
    """Items, and users to search for."""
    return clustered(N, np.random.default_rng(0))


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clustered") / "index"
    items, users = world
    grouped = Clustering(clusters.empty(clusters.centres(lambda some: items[some], N)), queries=users)
    build(items, START, path, made_from={}, sample=100, clustering=grouped)
    return path


def found(index: Index, users: np.ndarray, k: int = K, without: tuple[int, ...] = ()) -> np.ndarray:
    return np.concatenate([index.search(user[None], WHOLE, k, without)[0] for user in users])


def recall(nearest: np.ndarray, among: np.ndarray) -> float:
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(nearest, among, strict=True)]))


def test_what_is_promised_is_found_in_fewer_groups(world, folder):
    items, users = world
    facts = opening(folder, "index", verify=True).facts["clusters"]
    assert facts["number"] == clusters.how_many(N) == 256
    assert 1 < facts["probes"] < 128
    nearest = found(ExactIndex(items, START), users)
    assert recall(nearest, found(Index.open(folder), users)) == pytest.approx(facts["recall"], abs=0.002)
    assert facts["recall"] >= clusters.RECALL
    fewer = Index.open(folder)
    assert fewer._clusters is not None
    fewer._clusters.probes = facts["probes"] - 1
    assert recall(nearest, found(fewer, users)) < clusters.RECALL, "no fewer groups would do"


def test_cosines_are_true_and_in_order(world, folder):
    items, users = world
    item, cosine = Index.open(folder).search(users[:5], np.repeat(WHOLE, 5), K)
    for user, row, said in zip(users, item, cosine, strict=False):
        assert len(set(row.tolist())) == K
        np.testing.assert_allclose(items[row] @ user, said, atol=1e-3)
        assert (np.diff(said) <= 0).all()


def test_categories_left_out_are_not_found(world, folder):
    items, users = world
    wanted = found(ExactIndex(items, START), users, without=(0,))
    there = found(Index.open(folder), users, without=(0,))
    assert there.min() >= 5_000
    assert recall(wanted, there) > 0.95


def test_where_the_groups_hold_too_few_all_are_searched(world, folder):
    items, users = world
    every = N - 100
    there = found(Index.open(folder), users[:3], every)
    assert recall(found(ExactIndex(items, START), users[:3], every), there) > 0.999


def test_one_category_is_searched_whole(world, folder):
    items, users = world
    index, exact = Index.open(folder), ExactIndex(items, START)
    one = index.search(users[:4], np.array([2, CORPUS, 0, CORPUS]), 50)[0]
    assert recall(exact.search(users[:1], np.array([2]), 50)[0], one[:1]) > 0.99
    assert np.array_equal(one[1], index.search(users[1:2], WHOLE, 50)[0][0])


def test_probabilities_of_the_corpus_hardly_change(world, folder, tmp_path):
    items, users = world
    build(items, START, tmp_path / "scanned", made_from={}, sample=100)
    said = []
    for path in (folder, tmp_path / "scanned"):
        index = Index.open(path)
        item, cosine = index.search(users, np.repeat(WHOLE, len(users)), K)
        said.append(index.log_normaliser(users, np.repeat(WHOLE, len(users)), 20.0, item, cosine))
    np.testing.assert_allclose(*said, atol=0.05)


def test_the_same_again(world, folder, tmp_path):
    items, users = world
    grouped = Clustering(clusters.empty(clusters.centres(lambda some: items[some], N)), queries=users)
    build(items, START, tmp_path / "again", made_from={}, sample=100, clustering=grouped)
    again = opening(tmp_path / "again", "index")
    assert again.fingerprint == opening(folder, "index").fingerprint


def test_where_users_lie_anywhere_more_groups_are_looked_at(world, folder, tmp_path):
    items, _ = world
    anywhere = unit(np.random.default_rng(1).standard_normal((30, D)))
    grouped = Clustering(clusters.empty(clusters.centres(lambda some: items[some], N)), queries=anywhere)
    build(items, START, tmp_path / "index", made_from={}, clustering=grouped)
    facts = opening(tmp_path / "index", "index").facts["clusters"]
    assert facts["probes"] > 1.5 * opening(folder, "index").facts["clusters"]["probes"]
    assert facts["recall"] >= clusters.RECALL


def test_where_most_groups_would_be_looked_at_there_are_none(tmp_path):
    """Vectors without any structure."""
    items = unit(np.random.default_rng(2).standard_normal((3_000, D)))
    grouped = Clustering(
        clusters.empty(clusters.centres(lambda some: items[some], 3_000)), queries=items[:30]
    )
    build(items, np.array([0, 3_000]), tmp_path / "index", made_from={}, clustering=grouped)
    assert "clusters" not in opening(tmp_path / "index", "index").facts
    assert Index.open(tmp_path / "index").search(items[:2], np.repeat(WHOLE, 2), 3)[0][:, 0].tolist() == [
        0,
        1,
    ]


def test_groups_carried_over_are_those_made_anew(world, folder, tmp_path):
    """Items under other numbers, some gone and some new, as searches find them."""
    items, users = world
    rng = np.random.default_rng(5)
    order = np.concatenate([rng.permutation(5_000), 5_000 + rng.permutation(15_000)])
    number = np.argsort(order)  # item -> its new number
    gone, new = number[:40].copy(), number[40:90].copy()
    number[np.r_[0:90]] = -1
    groups = clusters.carried(folder / "clusters.faiss", number)
    holds = np.ones(N, bool)
    holds[gone] = holds[new] = False
    facts = opening(folder, "index").facts["clusters"]
    carried = Clustering(groups, holds, facts=facts)
    build(items[order], START, tmp_path / "carried", made_from={}, without=gone, clustering=carried)
    centres = faiss.downcast_index(groups.quantizer).reconstruct_n(0, 256)
    anew = Clustering(clusters.empty(centres), facts=facts)
    build(items[order], START, tmp_path / "anew", made_from={}, without=gone, clustering=anew)
    one, two = (found(Index.open(tmp_path / name), users) for name in ("carried", "anew"))
    assert np.array_equal(np.sort(one), np.sort(two))
    assert not np.isin(one, gone).any()
    assert np.isin(new, one).any()


def test_a_broken_file_is_named(folder, tmp_path):
    path = tmp_path / "index"
    shutil.copytree(folder, path)
    whole = (path / "clusters.faiss").read_bytes()
    for broken in (whole[: len(whole) // 2], (path / "lists.faiss").read_bytes(), b"", None):
        (path / "clusters.faiss").unlink()
        if broken is not None:
            (path / "clusters.faiss").write_bytes(broken)
        with pytest.raises(Damaged, match=r"clusters\.faiss"):
            Index.open(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("grouped")
    store = stored(parity_log(), path / "store")
    train(store, path / "model", EbrConfig(dim=16, length=8, step_samples=100, epochs=1))
    return path / "model"


def test_a_model_that_searches_all_of_many_items_gets_groups(model, tmp_path, monkeypatch):
    assert "clusters" not in opening(index_model(model, tmp_path / "few"), "index").facts
    for name, value in {"FROM": 36, "NEAREST": 5, "RECALL": 0.5}.items():
        monkeypatch.setattr(clusters, name, value)
    index_model(model)
    assert opening(model / "index", "index").facts["clusters"]["k"] == 5
    retriever, exact = Retriever.load(model), Retriever.load(model, exact=True)
    for user in range(0, 60, 7):
        assert set(retriever.retrieve(user, 36).item_ids) == set(exact.retrieve(user, 36).item_ids)
    assert "clusters" not in opening(index_model(model, tmp_path / "exact", exact=True), "index").facts


def test_without_the_store_all_items_are_looked_at(model, tmp_path, monkeypatch):
    monkeypatch.setattr(clusters, "FROM", 36)
    store = Store.open(model.parent / "store")
    store.path.rename(tmp_path / "elsewhere")
    try:
        assert "clusters" not in opening(index_model(model, tmp_path / "index"), "index").facts
    finally:
        (tmp_path / "elsewhere").rename(store.path)
