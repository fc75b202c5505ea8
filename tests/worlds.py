"""Tiny worlds with a known answer, and stores made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest

DAY = 86_400
START = 1_600_000_000


def table(user, item, category, time, behavior=None) -> pa.Table:
    columns = {"user_id": user, "item_id": item, "category_id": category, "timestamp": time}
    if behavior is not None:
        columns["behavior"] = behavior
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def stored(log: pa.Table, path: Path, **options) -> Store:
    ingest(log, path, **options)
    return Store.open(path)


def parity_log(seed=0, users=60, categories=3, items=12, visits=25) -> pa.Table:
    """Each user likes the even or the odd items of a category, decided by a coin for each category.

    So the last item of the same category tells all about the next one (accuracy 1.00 of its parity), while
    the last item of any category tells little; and no parity is more popular than the other.
    """
    rng = np.random.default_rng(seed)
    likes_odd = rng.integers(0, 2, (users, categories))
    user = np.repeat(np.arange(users), visits)
    category = rng.integers(0, categories, len(user))
    item = category * items + 2 * rng.integers(0, items // 2, len(user)) + likes_odd[user, category]
    time = START + np.tile(np.arange(visits), users) * DAY + user  # ascending within a user
    return table(user, item, category, time)


def once_log(seed: int, events=240, users=5, categories=4, times: int | None = 90) -> pa.Table:
    """Each item occurs once, so it says which event it is; `times=None`: no two events at one time."""
    rng = np.random.default_rng(seed)
    item = rng.permutation(events)
    time = rng.permutation(events) if times is None else rng.integers(0, times, events)
    return table(rng.integers(0, users, events), item, item % categories, START + time * 1000)


def random_log(seed: int, events=300, users=8, items=20, categories=4, times=60) -> pa.Table:
    """No pattern, many equal times, several events of one item."""
    rng = np.random.default_rng(seed)
    item = rng.integers(0, items, events)
    kinds = np.array(["click", "buy"])[rng.integers(0, 2, events)]
    time = START + rng.integers(0, times, events) * 1000
    return table(rng.integers(0, users, events), item, item % categories, time, kinds)


def parity_items(items: np.ndarray, per_category: int = 12) -> pa.Table:
    """An items file for `parity_log`: titles, a feature that tells the parity, and one that does not."""
    return pa.table(
        {
            "item_id": items,
            "category_id": items // per_category,
            "title": [f"thing {item}" for item in items],
            "kind": [("even", "odd")[item % 2] for item in items],
            "year": items % 5 + 1990,
        }
    )
