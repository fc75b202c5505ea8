"""What a shard holds, and what it says to requests that make no sense."""

from __future__ import annotations

import httpx
import msgspec
import numpy as np
import psutil
import pytest

from longretriever.errors import InputError, NotSaved
from longretriever.index import CORPUS, Index, build
from longretriever.shards import wire
from longretriever.shards.held import Shard, Share, cuts
from tests.shards.running import nth, shards
from tests.shards.test_fleet import EVERY, MODEL, START, D, saved, unit

KEY = "k" * 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def search(**other) -> bytes:
    given = {"k": 5, "head": 5, "ranges": [(0, 5)], "without": [], "look_at_all": False}
    rows = {"user": np.ones((2, D)), "context": np.array([3, CORPUS]), "scale": np.ones(2)}
    model = other.pop("model", MODEL)
    rows |= {name: other.pop(name) for name in rows if name in other}
    asked = wire.search_of(model, rows["user"], rows["context"], rows["scale"], **{**given, **other})
    return wire.encoded(asked)


def test_shares_are_of_about_as_many_items_and_leave_nothing_out():
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.zipf(1.5, rng.integers(1, 40)) * rng.integers(0, 2)
        start = np.append(0, np.cumsum(sizes))
        n = int(rng.integers(1, 9))
        ranges = [one for i in range(1, n + 1) for one in nth(i, n).ranges(start)]
        assert [c for first, end in ranges for c in range(first, end)] == [*range(len(sizes))]
        items = np.diff(start[cuts(sizes, n)])
        assert items.max() <= start[-1] / n + sizes.max(initial=0)
    assert Share(categories=((7, 9), (0, 2), (1, 4))).ranges(START) == [(0, 4), (7, 9)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give one of the two"),
        ({"shard": (1, 2), "categories": ((0, 1),)}, "give one of the two"),
        ({"shard": (0, 3)}, "expected I/N"),
        ({"shard": (4, 3)}, "expected I/N"),
        ({"categories": ((2, 2),)}, "expected FIRST:END"),
        ({"categories": ((-1, 2),)}, "expected FIRST:END"),
    ],
)
def test_shares_that_are_none(given, said):
    with pytest.raises(InputError, match=said):
        Share(**given)


def test_what_cannot_be_held(tmp_path, folder):
    with pytest.raises(NotSaved, match="longretriever index"):
        Shard(tmp_path, nth(1, 2))
    with pytest.raises(InputError, match="the index has categories 0 to 10"):
        Shard(folder, Share(categories=((0, 99),)))


def test_a_shard_needs_the_index_alone_and_touches_its_own_pages(tmp_path):
    """Of 24 MB of vectors, a tenth of the categories: a tenth of the pages, and not the rest."""
    rng, per = np.random.default_rng(0), 1500
    start = np.arange(101) * per
    chunks = (np.repeat(unit(rng, per), 5, axis=1) / np.sqrt(5) for _ in range(100))
    build(chunks, start, tmp_path / "index", made_from={"model": MODEL})
    shard = Shard(tmp_path, Share(categories=((10, 20),)))
    user = np.repeat(unit(rng, 11), 5, axis=1) / np.sqrt(5)
    contexts = np.array([*range(10, 20), CORPUS])
    asked = wire.search_of(MODEL, user, contexts, np.ones(11), k=500, head=500, ranges=[(10, 20)])
    shard.search(asked)
    (lists,) = [
        one
        for one in psutil.Process().memory_maps(grouped=False)
        if one.path.endswith("lists.faiss") and str(tmp_path) in one.path
    ][:1]
    whole = (tmp_path / "index" / "lists.faiss").stat().st_size
    assert lists.rss < 0.25 * whole
    near, part = wire.answers_of(shard.search(asked), contexts, 500)
    wanted = Index.open(tmp_path / "index").nearest(user[:10], contexts[:10], 500, np.ones(10), 500)
    np.testing.assert_array_equal(near.item, wanted.item)
    assert part.size == 10 * per


def test_requests_that_make_no_sense_are_refused_and_harm_nobody(folder):
    with shards(folder, Share(categories=((0, 6),)), read_keys=(KEY,), body=100_000) as (running,):
        url, headers = f"{running.url}{wire.SEARCH}", {"Authorization": f"Bearer {KEY}"}

        def said(body: bytes, **options) -> tuple[int, str]:
            answer = httpx.post(url, content=body, **{"headers": headers, **options})
            return answer.status_code, answer.json()["detail"] if answer.status_code != 200 else ""

        assert said(search())[0] == 200
        assert said(search(), headers={})[0] == 401
        assert said(b"x" * 200_000)[0] == 413
        wrong = {
            "is no Search in msgpack": [b"", b"\xc1", b"{}", wire.encoded([1, 2]), search()[:-3]],
            "numbers of user vectors": [search(user=np.ones((2, D + 1))), search(scale=np.ones(3))],
            "NaN or infinity": [search(user=np.full((2, D), np.nan))],
            "A scale is NaN": [search(scale=np.array([1, np.inf]))],
            "expected at least 1": [search(k=0)],
            "expected 0 or more, 1 or more, and cat": [search(k=-1), search(head=0), search(without=[99])],
            "stands before a category": [search(context=np.array([CORPUS, 3]))],
        }
        for detail, bodies in wrong.items():
            for body in bodies:
                status, found = said(body)
                assert (status, detail in found) == (422, True), found
        mismatched = {
            "model older": search(model="older" * 12),
            "category 8 is not held here: 0:6": search(context=np.array([8, CORPUS])),
            "categories 0 to 7 are not all held": search(ranges=[(0, 8)]),
            "categories 4 to 2 are not all held": search(ranges=[(4, 3)]),
            "is not held here": search(context=np.array([99, CORPUS])),
        }
        for detail, body in mismatched.items():
            status, found = said(body)
            assert (status, detail in found) == (409, True), found
        assert said(search(k=10**9))[0] == 200  # no more than there are
        raw = msgspec.msgpack.decode(search())
        raw[3] = raw[3] + b"x"
        assert said(msgspec.msgpack.encode(raw))[1] == "user: 129 bytes, expected a multiple of 4."
        facts = wire.decoded(httpx.get(f"{running.url}{wire.FACTS}", headers=headers).content, wire.Facts)
        (holding,) = facts.holds
        assert (holding.model, holding.ranges, holding.categories) == (MODEL, [(0, 6)], len(EVERY))
        text = httpx.get(f"{running.url}/metrics", headers=headers).text
        assert "longretriever_shard_items 244.0" in text
        assert httpx.get(f"{running.url}/readyz").json()["model"] == f"shard-{MODEL[:12]}"


def test_an_index_that_is_damaged_is_refused_and_the_old_one_goes_on(tmp_path):
    saved(tmp_path)
    with shards(tmp_path, nth(1, 1)) as (running,):
        saved(tmp_path, seed=5, model="newer" * 12)
        (tmp_path / "index" / "lists.faiss").write_bytes(b"")
        answer = httpx.post(f"{running.url}/v1/admin/reload")
        assert answer.status_code == 409
        assert "lists.faiss: 0 bytes" in answer.json()["detail"]
        assert httpx.post(f"{running.url}{wire.SEARCH}", content=search()).status_code == 200
