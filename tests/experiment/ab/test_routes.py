"""Each route brings what a slow, obvious program would bring, also of what has just happened."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from longretriever.errors import InputError
from longretriever.evaluate.collaborative import BM25
from longretriever.experiment.ab.plan import Route
from longretriever.experiment.ab.routes import ItemToItem, Learned, Popular, known, parse_arm
from longretriever.model.config import EbrConfig, TrainConfig
from longretriever.model.train import train
from longretriever.retrieve.interests import RandomInTop
from longretriever.retrieve.retriever import Retriever
from longretriever.store.behaviors import Life, Store
from longretriever.store.live import Event, Journal, Reader
from tests.worlds import DAY, START, parity_log, random_log, stored, table


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    log = random_log(3, events=900, users=30, items=60, categories=5, times=700)
    return stored(log, tmp_path_factory.mktemp("routes") / "store")


def lives(store: Store, ago: int = 0) -> list[Life]:
    return [store.life(user, store.last_time + 1 - ago) for user in range(store.n_users)]


def behaviors(life: Life) -> list[tuple[int, int]]:
    """(time, item) of a life, oldest first, equal times in order of rows, read without any cleverness."""
    rows = life.store.rows_of(life.user)
    every = zip(life.store.event_time[rows], life.store.event_item[rows], strict=True)
    return sorted(((int(t), int(i)) for t, i in every if t < life.now), key=lambda pair: pair[0])


# -- popular


@pytest.mark.parametrize("days", [0.5, 2.0, 7.0, 100.0])
def test_popular_is_a_count_over_the_store(store, days):
    since = store.last_time - days * DAY
    lately, ever = [0] * store.n_items, [0] * store.n_items
    for item, time in zip(store.event_item, store.event_time, strict=True):
        ever[item] += 1
        lately[item] += time > since
    wanted = sorted(range(store.n_items), key=lambda i: (-lately[i], -ever[i], i))
    everyone = lives(store)
    for k in (1, 10, 1000):
        found = Popular(store, days).find(everyone, k, 0)
        assert len(found) == len(everyone)
        assert all(items.tolist() == wanted[:k] for items in found)


def test_popular_is_lately_first_and_of_all_time_among_equals(tmp_path):
    item, day = [0, 0, 0, 1, 2, 2, 3], [0, 0, 0, 9, 9, 0, 9]
    log = table(range(7), item, [0] * 7, [START + d * DAY + n for n, d in enumerate(day)])
    assert Popular(stored(log, tmp_path / "s")).ranking.tolist() == [2, 1, 3, 0]


# -- item to item


def by_hand(store: Store, life: Life, last: int, k: int) -> list[tuple[float, int]]:
    """(score, item), best first."""
    learned = BM25(store, store.last_time)
    similarity = learned.similarity.toarray()
    place = {int(item): n for n, item in enumerate(learned.shown)}
    newest: list[int] = []
    for _, item in reversed(behaviors(life)):
        if item in place and item not in newest:
            newest.append(item)
    score = np.zeros(len(place))
    for nth, item in enumerate(newest[:last]):
        score += similarity[place[item]] / np.sqrt(1 + nth)
    return sorted(((s, int(learned.shown[n])) for n, s in enumerate(score) if s > 0), reverse=True)[:k]


@pytest.mark.parametrize("last", [1, 4, 50])
def test_item_to_item_is_neighbours_of_the_last_items_weighted(store, last):
    everyone = [*lives(store), *lives(store, ago=200_000)]
    found = ItemToItem(store, last).find(everyone, 12, 0)
    compared = 0
    for life, items in zip(everyone, found, strict=True):
        times = [time for time, _ in behaviors(life)]
        if len(set(times)) < len(times):
            continue  # which of two is the newer, nobody can say
        wanted = by_hand(store, life, last, store.n_items)
        score = {item: s for s, item in wanted}
        assert len(items) == min(12, len(wanted))
        assert [score[i] for i in items.tolist()] == pytest.approx([s for s, _ in wanted[:12]])
        compared += len(items) > 0
    assert compared > 10


def test_more_lives_than_are_answered_at_once_get_what_each_gets_alone(store):
    route = ItemToItem(store, 5)
    everyone = [*lives(store), *lives(store, ago=300_000)] * 5
    assert len(everyone) > 256
    found = route.find(everyone, 8, 0)
    for life, items in zip(everyone[-60:], found[-60:], strict=True):
        assert items.tolist() == route.find([life], 8, 1)[0].tolist()


def test_lists_are_distinct_and_no_longer_than_asked(store):
    for made in (Popular(store), ItemToItem(store)):
        for k in (1, 7, 200):
            for items in made.find(lives(store), k, 0):
                assert len(items) <= k
                assert len(np.unique(items)) == len(items)
                assert ((items >= 0) & (items < store.n_items)).all()


def test_nobody_met_nothing_to_go_by(store):
    (items,) = ItemToItem(store).find([store.life(0, 0.0)], 5, 0)
    assert len(items) == 0


def test_what_has_just_happened_changes_what_item_to_item_brings(store, tmp_path):
    route, now = ItemToItem(store, 3), store.last_time + 100
    user_id = store.user_ids.values[4].as_py()
    with closing(Journal(tmp_path / "live.sqlite")) as journal:

        def asked(at: float) -> list[int]:
            return route.find(Reader(store, journal).lives([user_id, 12_345], at), 15, 0)[0].tolist()

        before = asked(now)
        events = [
            Event(user_id, store.items["item_id"][n].as_py(), None, now - 9 + n, "click") for n in (7, 8)
        ]
        events.append(Event(user_id, 999_999, store.category_ids.values[0].as_py(), now - 1, "click"))
        journal.append(events).result()
        assert asked(now - 5) == before, "of the future nothing is known"
        after = asked(now)
        assert after != before
        (life,) = Reader(store, journal).lives([user_id], now)
        newest = [item for _, item in reversed(behaviors(life))]
        assert newest[:3] == [store.n_items, 8, 7], "a new item is in the life, and has no neighbours"
        wanted = by_hand(store, life, 3, 15)
        score = {item: s for s, item in by_hand(store, life, 3, store.n_items)}
        assert [score[item] for item in after] == pytest.approx([s for s, _ in wanted])


# -- learned

TINY = TrainConfig(
    dim=8,
    layers=1,
    context_length=6,
    overlap=2,
    step_samples=100,
    epochs=1,
    interests=None,
    whole=EbrConfig(dim=8, layers=1, length=8, step_samples=100, epochs=1),
)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory) -> Retriever:
    """Its model was learned on another store than it is asked on, so item numbers differ."""
    folder, log = tmp_path_factory.mktemp("learned"), parity_log(users=40)
    early = stored(log.filter(np.asarray(log["item_id"]) % 12 != 3), folder / "early")
    train(early, folder / "model", TINY)
    full = stored(log, folder / "store")
    return Retriever.load(folder / "model", store=full.path, interests=RandomInTop(1, 3), exact=True)


def test_learned_is_what_the_retriever_answers_in_numbers_of_the_store(retriever):
    store, route = retriever.store, Learned(retriever)
    assert store.n_items > retriever.model.n_items
    everyone = lives(store, ago=3 * DAY)
    by_seed = []
    for seed in (1, 2):
        found = route.find(everyone, 10, seed)
        by_seed.append([items.tolist() for items in found])
        for user, items in enumerate(found):
            user_id = store.user_ids.values[user].as_py()
            answer = retriever.retrieve(user_id, 10, now=everyone[user].now, rng=seed)
            assert [store.items["item_id"][i].as_py() for i in items.tolist()] == answer.item_ids
            assert 0 < len(np.unique(items)) == len(items) <= 10
    assert by_seed[0] != by_seed[1], "the seed draws the contexts"


def test_learned_lives_beyond_a_batch_are_answered_alike(retriever, monkeypatch):
    everyone, route = lives(retriever.store), Learned(retriever)
    together = route.find(everyone, 7, 5)
    monkeypatch.setattr("longretriever.experiment.ab.routes.BATCH", 9)
    for one, other in zip(together, route.find(everyone, 7, 5), strict=True):
        assert one.tolist() == other.tolist()


# -- names


def test_every_route_has_a_key_and_is_one_that_can_be_run():
    routes = known(k=17)
    assert {"popular", "item-to-item", "longretriever", "longretriever-paper", "ebr", "mind", "ulim"} <= set(
        routes
    )
    assert {route.k for route in routes.values()} == {17}
    assert routes["popular"] == Route("popular", counted=Popular, k=17)
    assert len({route.name for route in routes.values()}) == len(routes)
    assert not {"als", "bm25", "recent"} & set(routes), "rivals are no routes"
    assert all(key == key.lower() and " " not in key for key in routes)
    assert routes["top-5"].interests is not None


@pytest.mark.parametrize(
    ("text", "name", "keys"),
    [
        ("a=popular", "a", ["popular"]),
        (" my arm = item-to-item , popular ", "my arm", ["item-to-item", "popular"]),
        ("x=popular,,", "x", ["popular"]),
    ],
)
def test_an_arm_is_read_out_of_text(text, name, keys):
    routes = known()
    arm = parse_arm(text, routes)
    assert (arm.name, arm.routes) == (name, tuple(routes[key] for key in keys))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("popular", r"^arm 'popular': expected NAME=ROUTE,ROUTE\. Routes are popular, item-to-item, "),
        ("=popular", r"^arm '=popular': expected NAME=ROUTE,ROUTE\. "),
        (" =popular", r"^arm ' =popular': expected NAME=ROUTE,ROUTE\. "),
        ("a=", r"^arm 'a=': expected NAME=ROUTE,ROUTE\. "),
        ("a= , ", r"expected NAME=ROUTE,ROUTE\. "),
        (
            "a=popular,populer",
            r"^arm 'a=popular,populer': there is no route 'populer'\. Routes are popular, ",
        ),
        ("a=Popular", r"there is no route 'Popular'"),
        ("a=popular,popular", r"^arm 'a' has the routes \['popular', 'popular'\], .* each once\.$"),
    ],
)
def test_an_arm_that_cannot_be_read_is_told(text, said):
    with pytest.raises(InputError, match=said):
        parse_arm(text, known())
