"""A test is run to its end, in any number of processes and with any interruption, to the same result."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longretriever.errors import InputError, MissingExtra, NotSaved
from longretriever.evaluate import metrics
from longretriever.evaluate.run import learn
from longretriever.experiment.ab import day as day_module
from longretriever.experiment.ab import online
from longretriever.experiment.ab import run as running
from longretriever.experiment.ab.day import Day, Shown
from longretriever.experiment.ab.plan import Arm, Plan, PlatformConfig, Route, world
from longretriever.experiment.ab.routes import ItemToItem, Popular
from longretriever.experiment.ab.run import read_day, run, write_day
from longretriever.market import Market
from longretriever.market.feed import Feed, FeedConfig
from longretriever.model.config import TrainConfig
from longretriever.store.behaviors import Store
from longretriever.store.live import Journal

DAY = 86_400
POPULAR, NEAR = Route("popular", counted=Popular, k=30), Route("item-to-item", counted=ItemToItem, k=30)
CONTROL, MORE = Arm("control", (POPULAR,)), Arm("more", (POPULAR, NEAR), about="Neighbours too.")
PLAN = Plan(
    world(20_000, 100, days=30.0, most=1_000),
    (CONTROL, MORE),
    feed=FeedConfig(slots=4, pages=3, click=-1.0),
    platform=PlatformConfig(most_of_one=2),
    days=2,
    threads=1,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def result(work) -> dict[str, Any]:
    return go(PLAN, work)


def go(plan: Plan, work: Path, **options) -> dict[str, Any]:
    return run(plan, work, **{"workers": 1, "date": "today", "command": "make", **options})


def elsewhere(work: Path, tmp_path: Path) -> Path:
    """Another folder with the same world, where no test has been run."""
    for made in work.glob("world-*"):
        shutil.copytree(made, tmp_path / made.name)
    return tmp_path


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return json.dumps(one) == json.dumps(other)  # in which NaN is NaN


def the_test(plan: Plan, work: Path) -> running.Test:
    return running.Test(plan, work, pytest.fail, lambda line: None, None)


def behaviors_in(plan: Plan, work: Path, arm: Arm | None) -> set[tuple]:
    """(user, item, time, kind) of all in an arm's journal."""
    with closing(Journal(running._journal(the_test(plan, work).path, arm))) as journal:
        found = [(e.user_id, e.item_id, e.time, e.behavior) for e in journal.between(0, journal.last())]
    assert len(set(found)) == len(found)
    return set(found)


def clicks_of(one: Shown) -> set[tuple]:
    time = one.time + 3 * (one.slot + 1)
    columns = (column[one.click].tolist() for column in (one.user, one.item, time))
    return {(*row, "click") for row in zip(*columns, strict=True)}


def by_themselves(plan: Plan, begin: float, end: float) -> set[tuple]:
    """What users do by themselves in this time."""
    log = Market(plan.market).log(0, plan.market.users)
    then = (log.time >= begin) & (log.time < end)
    kinds = np.array(["click", "cart", "buy"])[log.kind[then]]
    columns = [log.user[then], log.item[then], log.time[then], kinds]
    return set(zip(*(column.tolist() for column in columns), strict=True))


def file(plan: Plan, work: Path, arm: Arm | None, day: int) -> Path:
    return the_test(plan, work)._file(arm, day)


def shown(plan: Plan, work: Path, arm: Arm | None, day: int) -> Shown:
    return read_day(file(plan, work, arm, day)).shown


# -- what comes out


def test_the_result_says_what_was_found_and_how(result, work):
    assert list(result["arms"]) == ["control", "more"]
    more = result["arms"]["more"]
    assert (more["about"], more["against"], more["luck"]) == ("Neighbours too.", "control", 0)
    assert result["arms"]["control"]["against"] is None
    assert list(more["routes"]) == ["popular", "item-to-item"]
    assert result["plan"]["users"] == 100
    assert result["plan"]["market"]["events"] == 20_000
    assert result["routes"]["popular"] == {
        "counted": "longretriever.experiment.ab.routes.Popular",
        "asked": {},
        "rules": {},
        "k": 30,
    }
    made = result["made"]
    assert (made["command"], made["date"]) == ("make", "today")
    assert made["store"] == Store.open(the_test(PLAN, work).world / "store").fingerprint
    days = [read_day(file(PLAN, work, MORE, day)) for day in (1, 2)]
    category_of = Market(PLAN.market).category_of(np.arange(PLAN.market.items))
    found = online.of_arm(days, np.arange(100), category_of)
    assert more["figures"] == online.summary(found, PLAN.draw)
    assert more["by_day"]["clicks"] == [one.shown.click.sum() / 100 for one in days]
    assert more["by_day"]["clicks"][0] > 0.5
    assert [row["figure"] for row in result["comparisons"]] == list(online.FIGURES)
    assert {(row["arm"], row["against"]) for row in result["comparisons"]} == {("more", "control")}


def test_all_is_shown_in_the_days_of_the_test_at_the_end_of_the_log(result, work):
    for arm, day in ((None, 0), (CONTROL, 1), (MORE, 1), (CONTROL, 2), (MORE, 2)):
        one = shown(PLAN, work, arm, day)
        midnight = PLAN.market.end - (3 - day) * DAY
        assert len(one.time) > 100
        assert ((one.time >= midnight) & (one.time < midnight + DAY + 300)).all()
    store = Store.open(the_test(PLAN, work).world / "store")
    assert store.last_time < PLAN.begin <= store.last_time + 2 * DAY


def test_what_users_do_by_themselves_is_in_the_journal_beside_the_feed(result, work):
    found, own = behaviors_in(PLAN, work, MORE), by_themselves(PLAN, PLAN.begin, PLAN.market.end)
    assert len(own) > 100
    in_feed = [shown(PLAN, work, *one) for one in ((None, 0), (MORE, 1), (MORE, 2))]
    clicks = set().union(*map(clicks_of, in_feed))
    assert own | clicks <= found
    assert len(found) == len(own) + len(clicks) + sum(int(one.order.sum()) for one in in_feed)


def test_nothing_is_shown_again_within_24_hours_though_each_day_is_lived_by_itself(result, work):
    for arm in PLAN.arms:
        one = Shown.together([shown(PLAN, work, *day) for day in ((None, 0), (arm, 1), (arm, 2))], 0)
        order = np.lexsort((one.time, one.item, one.user))
        pair, time = (one.user * 10_000 + one.item)[order], one.time[order]
        again = np.diff(pair) == 0
        assert again.any()
        assert np.diff(time)[again].min() >= DAY


def test_the_warm_up_is_in_random_order_and_what_follows_is_ranked(result, work):
    warm, ranked = shown(PLAN, work, None, 0), shown(PLAN, work, MORE, 2)

    def better_first(one: Shown) -> float:
        """How often an item is more popular than the next one on its page."""
        order = np.lexsort((one.slot, one.time, one.visit))
        popular, page = one.feature[order, 0], one.time[order] + one.visit[order] * 1e-9
        return float((np.diff(popular) < 0)[np.diff(page) == 0].mean())

    assert abs(better_first(warm) - 0.5) < 0.05
    assert (warm.routes == 1).all(), "the control's route alone"
    assert set(ranked.routes.tolist()) == {1, 2, 3}


def test_p_is_corrected_for_all_comparisons():
    rows = [
        {"p": p, "treatment": t, "control": 1.0}
        for p, t in ((0.004, 2.0), (0.02, 0.5), (float("nan"), 3.0), (0.001, 0.2), (0.5, 2.0))
    ]
    found = running.corrected(rows)
    holm = metrics.holm(np.array([0.004, 0.02, 0.001, 0.5])).tolist()
    assert [row["p_holm"] for row in found] == pytest.approx(
        [*holm[:2], float("nan"), *holm[2:]], nan_ok=True
    )
    assert [row["found"] for row in found] == ["more", "less", "undecided", "less", "undecided"]


def test_fewer_users_are_drawn_by_the_plan():
    def users(draw: int) -> list[int]:
        return the_test(replace(PLAN, users=30, draw=draw), Path()).users.tolist()

    assert users(1) == users(1) == sorted(set(users(1)))
    assert len(users(1)) == 30
    assert users(1) != users(2)
    assert the_test(PLAN, Path()).users.tolist() == list(range(100))


def test_what_is_known_at_midnight_is_counted_over_all_arms(result, work):
    knows, log = the_test(PLAN, work)._knowledge(2), Market(PLAN.market).log(0, 100)
    now, items = PLAN.begin + 2 * DAY, PLAN.market.items
    past = [shown(PLAN, work, *one) for one in ((None, 0), (CONTROL, 1), (MORE, 1))]
    events, seen, clicked = (np.zeros(items) for _ in range(3))
    for item, time in zip(log.item, log.time, strict=True):
        events[item] += now - 7 * DAY <= time < now
    for one, weight in zip(past, (1, 0.5, 0.5), strict=True):
        for item, click in zip(one.item, one.click, strict=True):
            seen[item] += 1
            clicked[item] += click
            events[item] += weight * click
    assert knows.statistics.events.tolist() == pytest.approx(events.tolist())
    assert knows.statistics.shown.tolist() == seen.tolist()
    assert knows.statistics.clicked.tolist() == clicked.tolist()
    assert knows.factors.shape[0] == items
    length = np.linalg.norm(knows.factors, axis=1)
    assert (np.isclose(length, 1, atol=1e-5) | (length == 0)).all()
    assert (length > 0).mean() > 0.5
    assert the_test(PLAN, work)._knowledge(0).trees is None


def test_clicks_of_the_feed_are_forgotten_after_a_week_too(work, monkeypatch):
    """The files of nine days, of which only the items matter; on each an item of its own is clicked."""
    plan = replace(PLAN, days=10)
    test = the_test(plan, work)
    test.prepare()
    monkeypatch.setattr(running.Test, "_trees", lambda self, past: None)
    for day in range(9):
        one = a_day(1)
        clicked = one.shown._replace(item=np.array([day]), click=np.array([True]))
        for arm in test._arms_of(day):
            write_day(test._file(arm, day), one._replace(shown=clicked))
    log = Market(plan.market).log(0, 100)
    now = plan.begin + 9 * DAY
    lately = np.bincount(
        log.item[(log.time < now) & (log.time >= now - 7 * DAY)], minlength=plan.market.items
    )
    found = test._knowledge(9).statistics
    assert (found.events - lately)[:10].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    assert found.clicked[:10].tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 2, 0]


# -- the same again


def test_two_processes_in_another_folder_find_the_same(result, work, tmp_path):
    """Also the world is made anew."""
    told: list[tuple[int, int]] = []
    found = go(PLAN, tmp_path, workers=2, lived=lambda *n: told.append(n))
    assert same(found, result)
    assert told[0] == (0, 5)
    assert told[-1] == (5, 5)
    assert told == sorted(told)


def test_another_world_or_draw_finds_another(result, work):
    for change in ({"market": replace(PLAN.market, seed=2)}, {"draw": 1}):
        found = go(replace(PLAN, **change), work)
        assert found["arms"]["more"]["figures"]["pv"] != result["arms"]["more"]["figures"]["pv"]


def test_a_test_that_is_finished_is_only_read(result, work, monkeypatch):
    monkeypatch.setattr(running, "_live", pytest.fail)
    told: list[tuple[int, int]] = []
    said: list[str] = []
    assert same(go(PLAN, work, lived=lambda *n: told.append(n), said=said.append), result)
    assert told[-1] == (5, 5)
    assert said == ["comparing"]


def test_a_day_that_is_gone_is_lived_again_and_no_other(result, work, monkeypatch):
    """Its feed knows of everything that was met before midnight, and of nothing later."""
    met, meets = [], Feed.meets
    monkeypatch.setattr(Feed, "meets", lambda feed, *pairs: (met.append(pairs), meets(feed, *pairs)))
    gone = file(PLAN, work, MORE, 2)
    gone.unlink()
    others = {path: path.stat().st_mtime_ns for path in gone.parent.glob("*.npz")}
    told: list[tuple[int, int]] = []
    assert same(go(PLAN, work, lived=lambda *n: told.append(n)), result)
    assert told[-2:] == [(4, 5), (5, 5)]
    ((user, item),) = met
    before = by_themselves(PLAN, PLAN.begin, PLAN.begin + 2 * DAY)
    assert set(zip(user.tolist(), item.tolist(), strict=True)) == {one[:2] for one in before}
    assert len(others) == 4
    assert others == {path: path.stat().st_mtime_ns for path in others}


def test_a_test_that_is_stopped_in_the_middle_of_its_days_finds_the_same(result, work, tmp_path, monkeypatch):
    """A part of the day's behaviors is in the journal by then."""
    folder, seen = elsewhere(work, tmp_path), day_module.Platform._seen
    for arm, day in ((None, 0), (CONTROL, 1), (MORE, 2)):
        pages = iter(range(6))

        def stopping(platform, visits, *given, arm=arm, day=day, pages=pages):
            mine = platform.warming_up == (arm is None) and len(platform.finders) == len(
                (arm or CONTROL).routes
            )
            if mine and visits.time[0] >= PLAN.begin + day * DAY and next(pages, None) is None:
                raise KeyboardInterrupt
            return seen(platform, visits, *given)

        with monkeypatch.context() as patch:
            patch.setattr(day_module, "TOGETHER", 20)
            patch.setattr(day_module.Platform, "_seen", stopping)
            with pytest.raises(KeyboardInterrupt):
                go(PLAN, folder)
        assert not file(PLAN, folder, arm, day).exists()
        clicks, written = clicks_of(shown(PLAN, work, arm, day)), behaviors_in(PLAN, folder, arm)
        assert 0 < len(clicks & written) < len(clicks)
    assert same(go(PLAN, folder), result)


# -- luck


def test_equal_arms_of_equal_luck_differ_in_nothing_and_of_another_luck_in_chance(work):
    arms = (CONTROL, replace(CONTROL, name="twin"), replace(CONTROL, name="other", luck=1))
    found = go(replace(PLAN, arms=arms), work)
    by_arm: dict[str, list[dict[str, Any]]] = {"twin": [], "other": []}
    for row in found["comparisons"]:
        by_arm[row["arm"]].append(row)
    for row in by_arm["twin"]:
        assert (row["lift"], row["interval"], row["p"], row["found"]) == (0, [0, 0], 1, "undecided")
    assert found["arms"]["twin"]["by_day"] == found["arms"]["control"]["by_day"]
    assert sum(row["lift"] != 0 for row in by_arm["other"]) > 5


# -- routes


def test_routes_of_one_name_are_not_taken_for_each_other(work):
    """Two tests in one process."""
    found = []
    for days in (7.0, 0.2):
        route = Route("popular", counted=partial(Popular, days=days), k=5)
        plan = replace(PLAN, arms=(Arm("control", (route,)),), days=1)
        go(plan, work)
        found.append(set(shown(plan, work, plan.arms[0], 1).item.tolist()))
    assert found[0] != found[1]


TINY = TrainConfig(
    dim=8, layers=1, context_length=6, overlap=2, step_samples=200, epochs=1, interests=None, whole=None
)
LEARNED = Route("learned", learn=TINY, k=20)


class Learning:
    """Trains in this very process, and remembers from what."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, Path, TrainConfig]] = []

    def __call__(self, store, out, config, threads, trained) -> dict[str, Any]:
        self.calls.append((store, out, config))
        return learn(Store.open(store), out, config, None, threads)


def behaviors_of(store: Store) -> set[tuple]:
    """(user, item, time, kind) of all in a store."""
    start = store.group_start[np.asarray(store.user_group)]
    users = store.user_ids.take(np.repeat(np.arange(store.n_users), np.diff(start)))
    items = store.items["item_id"].take(store.event_item[:]).to_pylist()
    kinds = [store.behaviors[kind] for kind in store.event_behavior]
    return set(zip(users, items, store.event_time.tolist(), kinds, strict=True))


def test_what_is_trained_again_knows_what_happened_to_its_arm(work, monkeypatch):
    monkeypatch.setattr(running, "_opened", {})
    arms = (CONTROL, Arm("learned", (POPULAR, LEARNED)))
    plan, learning = replace(PLAN, arms=arms, retrain=1, samples=2_000, seed=4), Learning()
    found = go(plan, work, learn=learning)
    test = the_test(plan, work)
    first, second = learning.calls
    folded = test._store(arms[1], 2)
    assert (first[0], second[0]) == (test.world / "store", folded)
    assert first[1] != second[1]
    assert first[2] == second[2] == replace(TINY, seed=4, samples=2_000)
    opened = {(store, model) for _, store, model in running._opened}
    assert {(first[0], None), first[:2], (folded, None), second[:2]} <= opened
    learned, control = (behaviors_of(Store.open(test._store(arm, 2))) for arm in (arms[1], CONTROL))
    assert learned >= behaviors_of(Store.open(test.world / "store"))
    assert learned >= by_themselves(plan, plan.begin, plan.begin + 2 * DAY)
    assert learned >= clicks_of(shown(plan, work, arms[1], 1)) > set()
    assert not learned >= clicks_of(shown(plan, work, CONTROL, 1)) <= control
    assert not learned & by_themselves(plan, plan.begin + 2 * DAY, plan.market.end)
    assert set(shown(plan, work, arms[1], 2).routes.tolist()) == {1, 2, 3}
    assert found["routes"]["learned"]["learns"]["dim"] == 8
    calls = len(learning.calls)
    assert same(go(plan, work, learn=learning), found)
    assert len(learning.calls) == calls


def test_a_day_before_a_retraining_is_lived_again_to_the_same(work):
    """Whatever later stores have taken out of the journal."""
    plan = replace(PLAN, arms=(MORE,), days=3, retrain=1)
    found = go(plan, work)
    for day in (1, 2):
        gone = file(plan, work, MORE, day)
        before = gone.read_bytes()
        gone.unlink()
        assert same(go(plan, work), found)
        assert gone.read_bytes() == before


@pytest.mark.parametrize(
    ("retrain", "wanted"), [(0, [None] * 7), (1, [None, None, 2, 3, 4, 5, 6]), (3, [None] * 4 + [4] * 3)]
)
def test_models_are_trained_every_so_many_days_of_the_test(retrain, wanted):
    test = the_test(replace(PLAN, days=6, retrain=retrain), Path())
    assert [test._last_training(day) for day in range(7)] == wanted


# -- what goes wrong


def test_a_folder_where_another_is_at_work_is_left_alone(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=r"another experiment is at work here .*Wait for it"):
            go(PLAN, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_without_scikit_learn_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtra, match=r"needs scikit-learn"):
        go(PLAN, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_a_world_of_which_only_the_log_was_written_is_finished(tmp_path):
    plan = replace(PLAN, market=world(3_000, 30, days=30.0))
    test = the_test(plan, tmp_path)
    test.market.write(test.world / "log")
    test.prepare()
    assert Store.open(test.world / "store").n_events > 2_000


def a_day(n: int, users: int = 3, routes: int = 2) -> Day:
    rng = np.random.default_rng(n)
    number = [rng.integers(0, 99, n) for _ in range(5)]
    flags = [rng.random(n) < 0.5 for _ in range(2)]
    few = rng.random((n, 4)).astype(np.float32)
    pair = rng.integers(0, 9, (2, users, routes))
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint32)
    return Day(Shown(*number, *flags, bits, few), rng.integers(0, 9, users), *pair)


@pytest.mark.parametrize("n", [0, 1, 500])
def test_a_day_is_read_as_it_was_written(tmp_path, n):
    one = a_day(n)
    write_day(tmp_path / "day.npz", one)
    found = read_day(tmp_path / "day.npz")
    for wrote, read in zip((*one.shown, *one[1:]), (*found.shown, *found[1:]), strict=True):
        assert wrote.dtype == read.dtype
        assert wrote.tolist() == read.tolist()


def flipped(data: bytes) -> bytes:
    return (
        data[: len(data) // 3]
        + bytes(b ^ 255 for b in data[len(data) // 3 : len(data) // 2])
        + data[len(data) // 2 :]
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"not a file of arrays"),
        lambda file: file.write_bytes(file.read_bytes()[:-200]),
        lambda file: file.write_bytes(flipped(file.read_bytes())),
        lambda file: np.savez(file, visits=np.zeros(3)),
        lambda file: file.unlink(),
    ],
)
def test_a_day_that_cannot_be_read_is_named_and_what_to_do(tmp_path, damage: Callable[[Path], Any]):
    path = tmp_path / "day.npz"
    write_day(path, a_day(500))
    damage(path)
    with pytest.raises(NotSaved, match=r"day\.npz: .*Remove this file, and the day is lived again\.$"):
        read_day(path)
