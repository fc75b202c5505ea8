"""What a peer is given and what it hands back; runs in the peer's environment, so NumPy and PyArrow only.

A folder holds `train.parquet` (user, item, time; by user, then time, then place in the log), `asked.parquet`
(user: for whom lists are wanted) and `settings.json`. A peer leaves `lists.parquet` there (user, all, new:
item numbers, best first; `new` without what the user has met) and prints its facts as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

K = 500  # items of a list


class Task:
    """The events to learn from, the users to answer, and how long learning may take."""

    def __init__(self) -> None:
        self.folder = Path(sys.argv[1])
        asks = json.loads((self.folder / "settings.json").read_text())
        self.system, self.minutes, self.seed = asks["system"], float(asks["minutes"]), int(asks["seed"])
        self.settings: dict[str, Any] = asks["settings"]  # in place of the peer's own
        train = pq.read_table(self.folder / "train.parquet")
        self.user, self.item, self.time = (train[name].to_numpy() for name in ("user", "item", "time"))
        self.asked = pq.read_table(self.folder / "asked.parquet")["user"].to_numpy()
        self.n_users, self.n_items = int(self.user.max()) + 1, int(self.item.max()) + 1
        self.start = np.searchsorted(self.user, np.arange(self.n_users + 1))

    def met(self, user: int) -> np.ndarray:
        """The user's items, oldest first, repeats and all."""
        return self.item[self.start[user] : self.start[user + 1]]

    def finish(self, lists: Callable[[bool], Iterator[np.ndarray]], **facts: Any) -> None:
        """Write what `lists(new)` yields, a row for each user asked, and say how learning went."""
        began = time.perf_counter()
        columns = {name: pa.array(list(lists(name == "new"))) for name in ("all", "new")}
        facts["answer_seconds"] = time.perf_counter() - began
        pq.write_table(pa.table({"user": self.asked, **columns}), self.folder / "lists.parquet")
        print(json.dumps(facts))


class Clock:
    """Seconds in which weights were learned: setting up, validation and answering do not count."""

    def __init__(self, most: float) -> None:
        self.most, self.before, self.began = most, 0.0, None

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        self.before, self.began = self.seconds, None

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.began is None else time.perf_counter() - self.began)

    @property
    def over(self) -> bool:
        return self.seconds >= self.most


def best(score: np.ndarray, k: int = K) -> np.ndarray:
    """The places of the `k` highest scores, best first; none of score -inf."""
    found = np.argpartition(-score, k)[:k] if k < len(score) else np.arange(len(score))
    found = found[np.argsort(-score[found], kind="stable")]
    return found[score[found] > -np.inf]
