"""Which route found what is known by hand in a world of three people, and by sets in any other.

Training and the retriever have stand-ins, as in test_runs.py: a "model" lists what its configuration says.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from longretriever.errors import InputError, LongRetrieverError
from longretriever.evaluate import metrics
from longretriever.evaluate.rivals import Lists
from longretriever.evaluate.split import LiveRequests, Split, split
from longretriever.experiment import ablations, replayed, runs
from longretriever.experiment.overlap import Overlap, Pairs
from longretriever.experiment.plan import Arm
from longretriever.experiment.replay import ROUTES, met_next, replay, routes
from longretriever.store.behaviors import Store
from tests.experiment.test_page import Page, check_it_loads_nothing
from tests.worlds import DAY, START, parity_log, stored, table

# -- figures of lists that are given


def overlap(lists: list[list[list[int]]], target: list[int], met: list[list[int]], user=None) -> Overlap:
    pairs = Pairs.of(
        [np.array(route or np.empty((0, 2)), dtype=int) for route in lists],
        np.array(target, int),
        [np.array(items, int) for items in met],
    )
    names = ["first", "second", "third"][: len(lists)]
    return Overlap(names, "all", np.array(user or range(len(target))), [pairs])


HAND = (
    [[[1, 2], [4, 5]], [[2, 3], [4, -1]], [[9, 8], [9, 6]]],  # three routes, two requests
    [1, 6],
    [[1, 2, 7], [4, 6]],
)


def test_every_figure_of_a_world_made_by_hand():
    found = overlap(*HAND).found(seed=1)
    first, second, third = found["routes"].values()
    assert (found["requests"], found["users"], found["met"]) == (2, 2, 5)
    assert (first["items"], second["items"], third["items"]) == (2, 1.5, 2)
    assert (first["next"], second["next"], third["next"]) == (0.5, 0, 0.5)
    assert first["recall"] == pytest.approx((2 / 3 + 1 / 2) / 2, abs=1e-6)
    assert second["recall"] == pytest.approx((1 / 3 + 1 / 2) / 2, abs=1e-6)
    assert third["recall"] == 0.25
    assert (first["aer"], third["aer"]) == (0.75, 0.25)
    assert second["aer"] == pytest.approx(2 / 3, abs=1e-6)
    assert (first["alone"], third["alone"]) == (0.5, 1)  # 1 and 5 of four; all four
    assert second["alone"] == pytest.approx(1 / 3, abs=1e-6)  # 3 of three
    assert (first["uer"], second["uer"], third["uer"]) == (0.5, 0, 0.25)
    assert [r["unique_items"] for r in (first, second, third)] == [1, 0, 1]  # 1; nothing; 6
    assert [r["unique"] for r in (first, second, third)] == [0.25, 0, 0.25]  # of 1, 2, 4, 6
    assert [r["unique_targets"] for r in (first, second, third)] == [1, 0, 1]
    assert [r["unique_next"] for r in (first, second, third)] == [0.5, 0, 0.5]
    assert [r["adds"] for r in (first, second, third)] == pytest.approx([1 / 6, 0, 1 / 4], abs=1e-6)
    assert [r["adds_next"] for r in (first, second, third)] == [0.5, 0, 0.5]
    together = found["together"]
    assert (together["items"], together["next"]) == (4.5, 1)
    assert together["recall"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    assert together["aer"] == pytest.approx(4 / 9, abs=1e-6)
    assert found["shared"]["first"] == {"first": 1, "second": 0.5, "third": 0}
    assert found["shared"]["second"]["first"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["shared_found"]["second"] == {"first": 1, "second": 1, "third": 0}
    assert [step["route"] for step in found["order"]] == ["first", "third", "second"]
    assert [step["next"] for step in found["order"]] == [0.5, 1, 1]
    assert found["order"][1]["recall"] == found["order"][2]["recall"] == together["recall"]


def test_a_figure_of_several_seeds_is_of_all_of_them_together():
    lists, target, met = HAND
    one, other = overlap(lists, target, met), overlap([lists[2], lists[1], lists[0]], target, met)
    both = Overlap(one.names, "all", one.user, [one.seeds[0], other.seeds[0]])
    first = both.found(seed=1)["routes"]["first"]
    assert first["by_seed"]["aer"] == [0.75, 0.25]
    assert first["aer"] == 0.5
    assert first["unique_items"] == 1
    assert first["by_seed"]["uer"] == [0.5, 0.25]
    assert first["uer"] == pytest.approx(2 / 6, abs=1e-6)  # not the mean of the two
    assert both.order()[-1]["recall"] == one.order()[-1]["recall"]


def test_intervals_are_of_the_figures_and_over_users():
    found = overlap(*HAND, user=[0, 0]).found(seed=1)  # of one user alone nothing else can be drawn
    for figures in found["routes"].values():
        for name, (low, high) in figures["intervals"].items():
            assert low == high == figures[name]


def test_nothing_asked_and_nothing_retrieved_are_no_figures():
    found = overlap([[], []], [], []).found(seed=1)
    assert found["requests"] == 0
    assert found["routes"]["first"]["recall"] is None
    assert found["routes"]["first"]["intervals"]["next"] == [None, None]
    assert [step["recall"] for step in found["order"]] == [0, 0]
    empty = overlap([[[-1]], [[3]]], [3], [[3]]).found(seed=1)["routes"]["first"]
    assert (empty["recall"], empty["aer"], empty["uer"]) == (0, None, None)
    assert empty["intervals"]["aer"] == [None, None]


few = st.lists(st.integers(0, 12), max_size=5, unique=True)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 3), st.integers(1, 5))
def test_who_found_what_alone_is_what_sets_say(data, n_routes, n):
    lists = data.draw(st.lists(st.lists(few, min_size=n, max_size=n), min_size=n_routes, max_size=n_routes))
    target = data.draw(st.lists(st.integers(0, 12), min_size=n, max_size=n))
    met = [sorted({t, *data.draw(few)}) for t in target]
    padded = [[items + [-1] * (5 - len(items)) for items in route] for route in lists]
    found = overlap(padded, target, met).found(seed=1)

    def recall(chosen: list[list[list[int]]]) -> float:
        unions = [set().union(*(route[r] for route in chosen)) for r in range(n)]
        return sum(len(u & set(m)) / len(m) for u, m in zip(unions, met, strict=True)) / n

    for r, figures in enumerate(found["routes"].values()):
        others = [route for route in lists if route is not lists[r]]
        theirs = [set().union(*(route[i] for route in others)) for i in range(n)]
        alone = [set(lists[r][i]) - theirs[i] for i in range(n)]
        hits = sum(len(a & set(m)) for a, m in zip(alone, met, strict=True))
        assert figures["unique_items"] == hits
        assert figures["unique_targets"] == sum(t in a for t, a in zip(target, alone, strict=True))
        retrieved = sum(map(len, alone))
        assert figures["uer"] == (pytest.approx(hits / retrieved, abs=1e-6) if retrieved else None)
        assert figures["recall"] == pytest.approx(recall([lists[r]]), abs=1e-6)
        assert figures["adds"] == pytest.approx(recall(lists) - recall(others), abs=1e-6)
    assert found["together"]["recall"] == pytest.approx(recall(lists), abs=1e-6)
    chosen: list[list[list[int]]] = []
    for step in found["order"]:
        chosen.append(lists[list(found["routes"]).index(step["route"])])
        assert step["recall"] == pytest.approx(recall(chosen), abs=1e-6)
        assert step["recall"] >= max(recall([*chosen[:-1], route]) for route in lists) - 1e-6


# -- what the user met next


def timeline(train: list[int], later: list[tuple[int, float]]) -> Split:
    """One user who meets items a day apart, and then others at so many days; a second user fills up."""
    item = [*train, *(i for i, _ in later), *train]
    time = [
        *range(-len(train), 0),
        *(days for _, days in later),
        *range(-len(train), 0),
    ]
    seconds = [START + int(days * DAY) for days in time]
    user = [0] * (len(train) + len(later)) + [1] * len(train)
    cut = split(table(user, item, [0] * len(item), seconds), 0.6, min_events=1)
    assert START - DAY <= cut.T < START
    return cut


def test_next_is_what_the_user_met_from_the_request_to_the_horizon_both_ends_included():
    cut = timeline([1, 2, 3, 4, 5, 6], [(1, 0), (2, 0), (9, 0.2), (2, 0.5), (3, 1), (4, 1.01)])

    def met(days: float, horizon: float, new: bool = False) -> list[int]:
        one = np.array([0])
        requests = LiveRequests(one, np.array([START + int(days * DAY)]), one, one, one)
        (items,) = met_next(cut, requests, horizon, new)
        return cut.item_ids.take(pa.array(items)).to_pylist()

    assert met(0, 1) == [1, 2, 3]  # 9 was not there to be learned from, 2 counts once
    assert met(0, 0) == [1, 2]
    assert met(0.5, 1) == [2, 3, 4]
    assert met(0, 30) == [1, 2, 3, 4]
    assert met(0, 1, new=True) == []  # the history has all of them


def test_of_what_follows_only_new_items_count_where_the_target_is_new():
    log = parity_log(users=16)
    cut = split(log)
    requests = cut.live()
    for part, new in ((requests, False), (requests.only_new(), True)):
        for at, items in enumerate(met_next(cut, part, 3.0, new)):
            mine = slice(cut.user_start[part.user[at]], cut.user_start[part.user[at] + 1])
            item, age = cut.item[mine], cut.time[mine] - part.before[at]
            expected = set(item[(age >= 0) & (age <= 3 * DAY)]) - (set(item[age < 0]) if new else set())
            assert set(items) == {i for i in expected if cut.in_train[i]}
            assert part.target[at] in items


# -- the whole way, with routes that list what they are told


@dataclass(frozen=True)
class Lister:
    """Lists items from a number on."""

    first: int
    seed: int = 0
    minutes: float | None = None
    samples: int | None = None


class Listing:
    def __init__(self, full: Store, first: int, facts: dict) -> None:
        self.full, self.first, self.facts = full, first, facts

    def recommend(self, users, before, k, new) -> Lists:
        rows = [np.roll(np.arange(self.full.n_items), -self.first)] * len(users)
        if new:
            rows = [r[~np.isin(r, self.met(u, t))] for r, u, t in zip(rows, users, before, strict=True)]
        return Lists(np.array([np.r_[row, np.full(k, -1)][:k] for row in rows]).reshape(len(users), k))

    def met(self, user: int, now: float) -> np.ndarray:
        return self.full.life(int(user), float(now)).items()


class Counted(Listing):
    """A rival: the items of the lowest numbers."""

    def __init__(self, full: Store, T: int) -> None:
        super().__init__(full, 0, {})


class Failing(Counted):
    def recommend(self, users, before, k, new) -> Lists:
        raise ValueError("no luck")


class Model:
    """In the place of `Retriever`."""

    @classmethod
    def load(cls, path: Path, *, store: Path) -> dict:
        return {"full": Store.open(store), **json.loads((path / "model.json").read_text())}


class Learning:
    """In the place of `learn_apart`."""

    def __init__(self) -> None:
        self.calls: list[Lister] = []

    def __call__(self, store, out, config, threads, trained) -> dict:
        self.calls.append(config)
        out.mkdir(parents=True)
        (out / "model.json").write_text(json.dumps(asdict(config)))
        return {"train_seconds": 1.0, "samples_per_second": 10.0, "training": {"samples": 10}}


LOG = parity_log(users=16)
ARMS = (
    Arm("ours", "It lists from 12 on.", learn=Lister(12)),
    Arm("theirs", "It lists from 20 on.", learn=Lister(20)),
    Arm("counted", "It lists from 0 on.", rival=Counted),
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> tuple[Split, dict[int, Store]]:
    cut, folder = split(LOG), tmp_path_factory.mktemp("stores")
    parts = (cut.full, cut.train)
    return cut, {part.num_rows: stored(part, folder / str(part.num_rows)) for part in parts}


@pytest.fixture
def stand_ins(monkeypatch, stores) -> None:
    cut, made = stores
    monkeypatch.setattr(runs, "read_split", lambda *log: (cut, {}))
    monkeypatch.setattr(runs, "store_of", lambda part, path, tables, reading: made[part.num_rows])
    monkeypatch.setattr(runs, "Retriever", Model)
    monkeypatch.setattr(runs, "Retrieved", lambda m, facts, seed: Listing(m["full"], m["first"], facts))
    monkeypatch.setattr(metrics, "interval", partial(metrics.interval, resamples=50))
    monkeypatch.setattr(metrics, "ratio_interval", partial(metrics.ratio_interval, resamples=50))


@pytest.fixture
def learning(stand_ins) -> Learning:
    return Learning()


def go(work: Path, learning: Learning, arms=ARMS, **options) -> dict:
    given = {"seeds": (1, 2), "k": (4, 8), "date": "today", **options}
    return replay(LOG, arms, work=work, learn=learning, **given)


def test_routes_are_held_against_what_the_log_says(tmp_path, learning, stores):
    cut, _ = stores
    result = go(tmp_path, learning, horizon=2)
    assert [config.seed for config in learning.calls] == [1, 1, 2, 2]
    requests = cut.live()
    lists = {"ours": range(12, 16), "theirs": range(20, 24), "counted": range(4)}
    found = result["found"]["4"]["all"]
    for name, items in lists.items():
        figures, met = found["routes"][name], met_next(cut, requests, 2.0)
        assert figures["next"] == pytest.approx(np.isin(requests.target, items).mean(), abs=1e-6)
        assert figures["recall"] == pytest.approx(np.mean([np.isin(m, items).mean() for m in met]), abs=1e-6)
        assert figures["alone"] == 1
        assert figures["aer"] == figures["uer"]
        assert figures["by_seed"]["recall"] == [figures["recall"]] * 2
    assert found["requests"] == len(requests.user)
    assert result["found"]["8"]["new"]["requests"] == len(requests.only_new().user)
    assert result["plan"]["k"] == [4, 8]
    assert {row["against"] for row in result["comparisons"]} == {"ours"}
    assert len(result["comparisons"]) == 2 * 2 * 2
    assert {row["found"] for row in result["comparisons"]} <= {"more", "less", "undecided"}


def test_a_second_call_asks_nothing_again(tmp_path, learning):
    first, said = go(tmp_path, learning), []
    learning.calls.clear()
    assert go(tmp_path, learning, said=said.append) == first
    assert not learning.calls
    assert not [line for line in said if "answering" in line]
    wider = go(tmp_path, learning, k=(8,), horizon=5, said=said.append)
    assert not learning.calls
    assert not [line for line in said if "answering" in line], "lists know no horizon and no shorter k"
    assert wider["found"]["8"]["all"]["met"] > first["found"]["8"]["all"]["met"]
    go(tmp_path, learning, arms=ARMS[1:], k=(8,), said=said.append)
    assert not [line for line in said if "answering" in line]


def test_a_list_that_is_damaged_is_asked_for_again(tmp_path, learning):
    first, said = go(tmp_path, learning), []
    learning.calls.clear()
    file = next((tmp_path / "lists").glob("Counted*.npz"))
    file.write_bytes(file.read_bytes()[:-9])
    again = go(tmp_path, learning, said=said.append)
    assert again["found"] == first["found"]
    assert not learning.calls
    assert [line for line in said if "damaged" in line and "counted is run again" in line]
    assert [line for line in said if "answering" in line] == ["counted: answering"]


def test_models_are_shared_with_an_experiment_in_the_same_folder(tmp_path, learning):
    runs.run(LOG, ARMS, work=tmp_path, seeds=(1, 2), k=(4, 8), learn=learning)
    learning.calls.clear()
    go(tmp_path, learning)
    assert not learning.calls


def test_a_route_that_fails_is_left_out_and_named(tmp_path, learning):
    result = go(tmp_path, learning, (*ARMS, Arm("broken", rival=Failing)))
    assert list(result["arms"]) == ["ours", "theirs", "counted"]
    assert result["failed"][0]["arm"] == "broken"
    assert "Without broken, which failed" in str(replayed.sections(result)[0])
    assert result["found"] == go(tmp_path, learning)["found"]
    with pytest.raises(
        LongRetrieverError, match=r"1 of 2 routes answered .* two or more .* ValueError: no luck"
    ):
        go(tmp_path, learning, (ARMS[0], Arm("broken", rival=Failing)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ARMS[:1]}, "a replay of 'ours' alone, expected two or more routes"),
        ({"horizon": -1}, "the horizon is -1 days, expected 0 or more, such as 1"),
        ({"horizon": float("nan")}, "the horizon is nan days"),
        ({"k": (0, 5)}, r"k is \[0, 5\], expected at least one list length of 1 or more"),
        ({"k": ()}, r"k is \[\], expected at least one"),
        ({"seeds": (1, 1)}, r"seeds \[1, 1\]: expected at least one, none of them twice"),
        ({"arms": (ARMS[0], ARMS[0])}, "each with a name of its own"),
    ],
    ids=str,
)
def test_what_cannot_be_replayed_is_refused_before_anything_is_read(tmp_path, learning, options, message):
    with pytest.raises(InputError, match=message):
        go(tmp_path / "work", learning, **options)
    assert not (tmp_path / "work").exists()


def test_the_usual_routes_are_those_of_the_ablations():
    known = {arm.name: arm for arm in ablations.arms(("systems",))}
    assert [arm.name for arm in routes()] == list(ROUTES)
    assert all(arm == known[arm.name] for arm in routes())
    assert [arm.name for arm in routes(["popular", "ALS"])] == ["ALS", "popular"]
    with pytest.raises(InputError, match=r"route 'Popular': expected one of LongRetriever; .*; popular;"):
        routes(["Popular"])


# -- the report


def test_the_report_says_what_the_result_says(tmp_path, learning):
    result = go(tmp_path / "work", learning, k=(4,))
    files = replayed.write(result, tmp_path)
    assert json.loads(files[0].read_text()) == json.loads(json.dumps(result))
    html = files[2].read_text()
    check_it_loads_nothing(html)
    page = Page(html)
    found = result["found"]["4"]["all"]
    for name, figures in found["routes"].items():
        row = page.row("all-who-found-what", name)
        assert row[2] == replayed.digits(figures["recall"])
        assert row[3] == f"{100 * figures['aer']:.2f}%"
        assert row[6] == f"{figures['unique_items']:,.0f}"
    assert page.row("which-routes-to-have", found["order"][0]["route"])
    assert "Learned from" in files[1].read_text()


def test_the_table_for_people_has_every_route_and_the_order(tmp_path, learning):
    result = go(tmp_path, learning)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(replayed.tables(result))
    shown = console.export_text()
    for title in ("ALL, 4 items a route: ", "NEW, 8 items a route: "):
        assert title in shown
    for name in (*result["arms"], replayed.TOGETHER):
        assert shown.count(f"\n{name} ") == 4
    assert shown.count("Recall, best first: ") == 4
    assert max(map(len, shown.splitlines())) <= 80
