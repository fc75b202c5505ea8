from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longretriever.model.age import age_class
from longretriever.model.history import FEATURES, LAST, Histories, histories
from longretriever.store.behaviors import Store
from tests.worlds import random_log, stored


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return stored(random_log(3, events=600), tmp_path_factory.mktemp("history") / "store")


def moments(store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Every user at every time that an event has, and after all."""
    times = np.append(np.unique(store.event_time), store.last_time + 5_000)
    user, now = np.meshgrid(np.arange(store.n_users), times)
    return user.ravel(), now.ravel()


def scanned(store: Store, user: int, now: float, since: float) -> list[tuple[int, int, int]]:
    """(time, category, place in the life) of what the user did in that span, oldest first: the slow truth."""
    rows = store.time_order[store.rows_of(user)]
    times = store.event_time[rows]
    return [
        (int(t), int(store.item_category[store.event_item[row]]), place)
        for place, (row, t) in enumerate(zip(rows, times, strict=True))
        if since <= t < now
    ]


@pytest.mark.parametrize("since", [None, 20_000])
def test_every_number_is_that_of_a_scan_of_the_life(store: Store, since: int | None) -> None:
    user, now = moments(store)
    low = np.full(len(user), -np.inf) if since is None else now - since
    past = histories(store, user, now, categories=3, recent=5, since=None if since is None else low)
    for i, (u, t) in enumerate(zip(user, now, strict=True)):
        life = scanned(store, u, t, low[i])
        check_categories(past, i, life, float(t), end=len(scanned(store, u, t, -np.inf)))
        newest = life[::-1][:5]
        assert past.recent[i].tolist() == [c for _, c, _ in newest] + [-1] * (5 - len(newest))
        assert past.age[i].tolist() == [int(age_class(np.array([t - at]))[0]) for at, _, _ in newest] + [
            0
        ] * (5 - len(newest))
        last = (t - life[-1][0]) / 60 if life else 0
        assert past.general[i] == pytest.approx([np.log2(1 + len(life)) / 17, np.log2(1 + last) / 24])


def check_categories(past: Histories, i: int, life: list, now: float, end: int) -> None:
    met: dict[int, list[tuple[int, int]]] = {}
    for time, category, place in life:
        met.setdefault(category, []).append((time, place))
    latest = {c: seen[-1][0] for c, seen in met.items()}
    found = [c for c in past.category[i] if c >= 0]
    assert len(found) == min(3, len(met))
    assert [latest[c] for c in found] == sorted(latest.values(), reverse=True)[:3]
    for column, category in enumerate(found):
        wanted = np.zeros(FEATURES)
        wanted[0] = np.log2(1 + len(met[category])) / 17
        for k, nth in enumerate(LAST):
            if len(met[category]) >= nth:
                time, place = met[category][-nth]
                wanted[1 + k] = 1
                wanted[1 + len(LAST) + k] = np.log2(1 + (now - time) / 60) / 24
                wanted[1 + 2 * len(LAST) + k] = np.log2(1 + end - place) / 17
        assert past.feature[i, column] == pytest.approx(wanted, abs=1e-6)


def test_a_user_without_behaviors_has_an_empty_history(store: Store) -> None:
    past = histories(store, np.array([0]), np.array([0]), categories=4, recent=3)
    assert past.category.tolist() == [[-1]]
    assert past.recent.tolist() == [[-1, -1, -1]]
    assert not past.feature.any()
    assert not past.general.any()


def test_what_comes_later_changes_nothing(tmp_path: Path) -> None:
    log = random_log(5)
    cut = int(np.median(log["timestamp"].to_numpy()))
    early = stored(log.filter(log["timestamp"].to_numpy() < cut), tmp_path / "early")
    late = stored(log, tmp_path / "late")
    user = np.arange(early.n_users)
    same = np.array([late.user_number(early.user_ids.take([u])[0]) for u in user])
    a = histories(early, user, np.full(len(user), cut), categories=8, recent=6)
    b = histories(late, same, np.full(len(user), cut), categories=8, recent=6)
    assert np.array_equal(a.recent, b.recent)
    assert np.allclose(a.feature, b.feature[:, : a.feature.shape[1]])
