"""An index kept by shards answers as the whole one does, and says what it could not ask."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from longretriever.clusters import Clustering, centres, empty
from longretriever.errors import InputError, NotLoaded, RequestFailed
from longretriever.index import CORPUS, Index, build
from longretriever.shards import wire
from longretriever.shards.calls import FAILURES, Outcome
from longretriever.shards.fleet import Fleet, Sharded
from longretriever.shards.held import Share
from tests.shards.running import nth, shards, wait_for

D, MODEL, OLDER = 16, "new" * 21, "old" * 21
SIZES = np.array([0, 1, 3, 40, 0, 200, 1500, 30, 30, 600, 0])
START = np.concatenate([[0], np.cumsum(SIZES)])
EVERY = np.arange(len(SIZES))


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    vectors = rng.standard_normal((n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def saved(path: Path, seed: int = 0, model: str = MODEL, sample: int = 100, grouped: bool = False) -> Path:
    """What a shard needs of a model: its index. A sixth of the items is removed."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng, START[-1])
    clustering = None
    if grouped:
        groups = empty(centres(vectors.__getitem__, len(vectors)))
        facts = {"number": groups.nlist, "items": len(vectors), "probes": 6, "recall": 0.5, "k": 100}
        clustering = Clustering(groups, facts=facts)
    build(
        vectors,
        START,
        path / "index",
        made_from={"model": model},
        sample=sample,
        without=np.arange(0, START[-1], 6),
        clustering=clustering,
    )
    return path


def sharded(fleet: Fleet, model: str = MODEL) -> Sharded:
    return Sharded(fleet, model, START, D)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def three(folder):
    with shards(folder, nth(1, 3), nth(2, 3), nth(3, 3)) as running:
        yield [one.url for one in running]


def assert_alike(found, wanted) -> None:
    np.testing.assert_array_equal(found.item, wanted.item)
    np.testing.assert_array_equal(found.cosine, wanted.cosine)
    np.testing.assert_allclose(found.normaliser, wanted.normaliser, atol=1e-5)
    np.testing.assert_array_equal(found.unsearched, wanted.unsearched)


@pytest.mark.parametrize("without", [(), (5, 6)])
@pytest.mark.parametrize("kind", ["sampled", "exact", "grouped"])
def test_they_answer_as_the_whole_index(tmp_path, kind, without):
    """Categories with a sample and without, empty ones, all items at once; sums exact and estimated."""
    model = saved(tmp_path, sample=10_000 if kind == "exact" else 100, grouped=kind == "grouped")
    index = Index.open(model / "index")
    rng = np.random.default_rng(1)
    contexts = rng.permutation(np.concatenate([EVERY, np.full(4, CORPUS)]))
    users, scale = unit(rng, len(contexts)), rng.uniform(5, 30, len(contexts))
    with (
        shards(model, nth(1, 3), nth(2, 3), nth(3, 3)) as running,
        Fleet([one.url for one in running]) as fleet,
    ):
        for k, head in ((100, 60), (7, 7), (3000, 500)):
            asked = users, contexts, k, scale, head, without
            assert_alike(sharded(fleet).nearest(*asked), index.nearest(*asked))
        item, cosine = sharded(fleet).search(users, contexts, 9, without)
        np.testing.assert_array_equal(item, index.search(users, contexts, 9, without)[0])
        item, cosine = index.search(users, contexts, 9)
        log_z = sharded(fleet).log_normaliser(users, contexts, 10.0, item, cosine)
        np.testing.assert_allclose(
            log_z, index.log_normaliser(users, contexts, 10.0, item, cosine), atol=1e-5
        )
        whole = contexts == CORPUS  # the sum counts exactly what it is told to, whatever is nearest
        given = users[whole], contexts[whole], scale[whole], *index.search(-users[whole], contexts[whole], 90)
        log_z, wanted = (one.log_normaliser(*given) for one in (sharded(fleet), index))
        np.testing.assert_allclose(log_z, wanted, atol=1e-5)


def test_ranges_that_overlap_are_asked_once(folder):
    """Whatever the ranges: each category is counted once among all items."""
    index, rng = Index.open(folder / "index"), np.random.default_rng(2)
    contexts = np.append(EVERY, [CORPUS, CORPUS])
    asked = unit(rng, len(contexts)), contexts, 50, 10.0, 50
    odd = Share(categories=((0, 4), (6, 9))), Share(categories=((3, 7),)), Share(categories=((2, 11), (0, 3)))
    with shards(folder, *odd) as running, Fleet([one.url for one in running]) as fleet:
        for _ in range(6):  # the replicas take turns
            assert_alike(sharded(fleet).nearest(*asked), index.nearest(*asked))


def test_what_a_dead_shard_had_is_missing_and_the_rest_is_as_it_was(folder):
    index, rng = Index.open(folder / "index"), np.random.default_rng(3)
    contexts = np.append(EVERY, CORPUS)
    asked = unit(rng, len(contexts)), contexts, 50, 10.0, 50
    whole, told = index.nearest(*asked), []
    with shards(folder, nth(1, 2), nth(2, 2)) as (first, second):
        urls = [first.url, second.url]
        with Fleet(urls, look=60, told=lambda *what: told.append(what)) as fleet:
            second.stop()
            found = sharded(fleet).nearest(*asked)
            (cut,) = {end for _, end in Share(shard=(1, 2)).ranges(START)}
            here = np.flatnonzero((contexts >= 0) & (contexts < cut))
            np.testing.assert_array_equal(found.item[here], whole.item[here])
            gone = contexts >= cut
            assert (found.unsearched[gone] == 1).all()
            assert (found.item[gone] == -1).all()
            assert found.unsearched[-1] == pytest.approx(1 - START[cut] / START[-1])
            left = whole.item[-1][whole.item[-1] < START[cut]]
            assert (found.item[-1][: len(left)] == left).all()
            assert (second.url, "failed") in {what[:2] for what in told}
            with pytest.raises(RequestFailed, match="no shard answers for context"):
                sharded(fleet).search(*asked[:3])
            item, cosine = found.item[-1:], found.cosine[-1:]
            log_z = sharded(fleet).log_normaliser(asked[0][-1:], [CORPUS], 10.0, item, cosine)
            np.testing.assert_allclose(log_z, found.normaliser[-1:], atol=1e-5)
            with pytest.raises(RequestFailed, match="no shard answers for context"):
                sharded(fleet).log_normaliser(*asked[:2], 10.0, found.item, found.cosine)
            assert not fleet.servers[1].up
            second.start()
            wait_for(lambda: (fleet.look_around(), fleet.servers[1].up)[1])
            assert_alike(sharded(fleet).nearest(*asked), whole)


def test_a_shard_that_hangs_costs_its_time_only_until_it_is_left_alone(folder):
    users = unit(np.random.default_rng(4), len(EVERY))
    asked, told = (users, EVERY, 5, 10.0, 5), []
    with socket.socket() as hole, shards(folder, nth(1, 2), nth(2, 2)) as (first, second):
        port = second.settings.port
        limits = {"seconds": 0.3, "hedge": None, "look": 60, "told": lambda *what: told.append(what[:2])}
        with Fleet([first.url, second.url], **limits) as fleet:
            second.stop()
            hole.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            hole.bind(("127.0.0.1", port))
            hole.listen(100)  # takes connections, and says nothing
            told.clear()
            for _ in range(30):
                near = sharded(fleet).nearest(*asked)
                assert near.unsearched.max() == 1
            waited = [what for what in told if what == (second.url, "timeout")]
            assert 1 <= len(waited) <= FAILURES
            assert not fleet.servers[1].up


def test_a_replica_takes_over_and_is_asked_as_well_where_one_is_slow(folder):
    index = Index.open(folder / "index")
    asked = unit(np.random.default_rng(5), len(EVERY)), EVERY, 20, 10.0, 20
    whole, told = index.nearest(*asked), []
    with shards(folder, *[nth(1, 2), nth(2, 2)] * 2) as running:
        urls = [one.url for one in running]
        limits = {"seconds": 2.0, "hedge": 0.02, "look": 60}
        with Fleet(urls, told=lambda *what: told.append(what[:2]), **limits) as fleet:
            running[1].stop()
            for _ in range(4):
                assert_alike(sharded(fleet).nearest(*asked), whole)
            assert (running[1].url, "failed") in told
            with Slow(running[0]):
                start = time.perf_counter()
                for _ in range(4):
                    assert_alike(sharded(fleet).nearest(*asked), whole)
                assert time.perf_counter() - start < 1
            assert (running[0].url, "late") in told
            assert fleet.servers[0].up  # to be slow once is no failure


class Slow:
    """A shard that waits before each search, in its own thread."""

    def __init__(self, running) -> None:
        self.app = running.app
        self.release = threading.Event()

    def __enter__(self) -> None:
        shard = self.app.state.current.serving
        self.search, shard.search = shard.search, lambda asked: (self.release.wait(3), self.search(asked))[1]

    def __exit__(self, *error) -> None:
        self.release.set()
        self.app.state.current.serving.search = self.search


def test_another_model_is_refused_and_taken_over_shard_by_shard(tmp_path):
    """A router of the old model and one of the new are both answered while shards go over."""
    model = saved(tmp_path, seed=1, model=OLDER)
    old = Index.open(model / "index")
    asked = unit(np.random.default_rng(6), len(EVERY)), EVERY, 20, 10.0, 20
    with (
        shards(model, nth(1, 2), nth(2, 2)) as running,
        Fleet([one.url for one in running], look=0.05) as fleet,
    ):
        saved(tmp_path, seed=2)  # in its place
        new = Index.open(model / "index")
        fleet.check(OLDER)
        assert (sharded(fleet).nearest(*asked).unsearched == 1).all()
        with pytest.raises(
            NotLoaded, match=r"shards have 0% of the categories of model new.*, and 100% of old"
        ):
            fleet.check(MODEL, OLDER)
        running[0].reload()
        wait_for(lambda: fleet.searchable(MODEL).any())
        with pytest.raises(NotLoaded, match="it will be tried again"):
            fleet.check(MODEL, OLDER)
        assert set(sharded(fleet).nearest(*asked).unsearched) == {0, 1}
        assert_alike(sharded(fleet, OLDER).nearest(*asked), old.nearest(*asked))
        running[1].reload()
        wait_for(lambda: fleet.searchable(MODEL).all())
        fleet.check(MODEL, OLDER)
        assert_alike(sharded(fleet).nearest(*asked), new.nearest(*asked))
        assert_alike(sharded(fleet, OLDER).nearest(*asked), old.nearest(*asked))
        running[0].stop()
        running[0].start()  # has forgotten the old one
        wait_for(lambda: fleet.servers[0].up and not fleet.searchable(OLDER).all())
        assert set(sharded(fleet, OLDER).nearest(*asked).unsearched) == {0, 1}


def test_who_has_gone_over_since_it_was_looked_at_is_found_out(folder):
    """It refuses, which is no failure of it, and nothing of its own model comes back."""
    told = []
    with (
        shards(folder, nth(1, 1)) as (running,),
        Fleet([running.url], look=60, told=lambda *what: told.append(what[:2])) as fleet,
    ):
        fleet._facts[running.url].holds[0].model = OLDER  # what it said before
        near = sharded(fleet, OLDER).nearest(unit(np.random.default_rng(9), 1), np.array([5]), 5, 10.0, 5)
        assert near.unsearched.tolist() == [1]
        assert (near.item == -1).all()
        assert told == [(running.url, "mismatch")]
        assert fleet.servers[0].up
        wait_for(lambda: fleet.searchable(MODEL).all())  # it looked again at once


def test_many_threads_share_a_fleet(three, folder):
    index = Index.open(folder / "index")
    rng, wrong = np.random.default_rng(7), []
    asked = [(unit(rng, len(EVERY)), rng.permutation(EVERY), 30, 10.0, 30) for _ in range(8)]
    wanted = [index.nearest(*one) for one in asked]
    with Fleet(three, seconds=10) as fleet:

        def work(n: int) -> None:
            found = [sharded(fleet).nearest(*asked[n]).item for _ in range(10)]
            wrong.extend(n for item in found if (item != wanted[n].item).any())

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_addresses_that_are_none():
    for urls in ([], ["http://a:1", "http://a:1"]):
        with pytest.raises(InputError, match="expected addresses, each once"):
            Fleet(urls)
    for url in ("10.0.0.1:8100", "ftp://a", "http://a/path"):
        with pytest.raises(InputError, match="no address of a shard"):
            Fleet([url])


def test_an_answer_that_makes_no_sense_is_no_answer(monkeypatch, three):
    asked = unit(np.random.default_rng(8), 3), np.array([3, 5, CORPUS]), 20, 10.0, 20
    with Fleet(three) as fleet:
        for broken in (b"", b"\xc1", wire.encoded(wire.Facts([])), wire.encoded([b"123"] * 6 + [0, True])):
            monkeypatch.setattr(Sharded, "_called", lambda self, calls, b=broken: [Outcome(b) for _ in calls])
            assert (sharded(fleet).nearest(*asked).unsearched == 1).all()
        monkeypatch.undo()
        assert (sharded(fleet).nearest(*asked).unsearched == 0).all()
