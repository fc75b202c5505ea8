"""What brings candidates? The product's own retriever, and two routes that every platform has."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from longretriever.errors import InputError
from longretriever.evaluate.collaborative import BM25, best_of
from longretriever.events import SECONDS_PER_DAY
from longretriever.experiment.ab.plan import Arm, Finder, Route
from longretriever.experiment.ablations import OURS
from longretriever.experiment.ablations import arms as ablations
from longretriever.retrieve.retriever import BATCH, Retriever
from longretriever.retrieve.rules import Rules
from longretriever.store.behaviors import Life, Store

NEW_ITEMS = f"{OURS}, new items"


class Learned:
    """The product's own path: interests, user vectors, search, merge, in batches, over live behaviors."""

    def __init__(self, retriever: Retriever, rules: Rules = Rules()) -> None:
        self.retriever, self.rules = retriever, rules

    def find(self, lives: Sequence[Life], k: int, seed: int) -> list[np.ndarray]:
        """See `Finder`."""
        found = []
        for at in range(0, len(lives), BATCH):
            for answer in self.retriever.answer(lives[at : at + BATCH], k, rng=seed, rules=self.rules):
                items = self.retriever.store_items(answer.item)
                found.append(items[items >= 0])
        return found


class Popular:
    """The items with the most behaviors in the last `days` of the store, the same for everyone."""

    def __init__(self, store: Store, days: float = 7.0) -> None:
        recent = store.event_time > store.last_time - days * SECONDS_PER_DAY
        lately = np.bincount(store.event_item[recent], minlength=store.n_items)
        ever = np.bincount(store.event_item, minlength=store.n_items)
        self.ranking = np.lexsort((np.arange(store.n_items), -ever, -lately))

    def find(self, lives: Sequence[Life], k: int, seed: int) -> list[np.ndarray]:
        """See `Finder`."""
        return [self.ranking[:k]] * len(lives)


class ItemToItem:
    """Neighbours (BM25) of the user's last `last` distinct items, the newer the heavier.

    They are looked for among the last 4 * `last` behaviors.
    """

    def __init__(self, store: Store, last: int = 50) -> None:
        self.last, self.learned = last, BM25(store, store.last_time)

    def find(self, lives: Sequence[Life], k: int, seed: int) -> list[np.ndarray]:
        """See `Finder`."""
        found = []
        for at in range(0, len(lives), 256):
            found += self._of(lives[at : at + 256], k)
        return found

    def _of(self, lives: Sequence[Life], k: int) -> list[np.ndarray]:
        met = [self._places(life) for life in lives]
        weight = [1 / np.sqrt(1 + np.arange(len(places))) for places in met]
        scored = self.learned.scores(met, weight)
        return [self.learned.shown[found[best_of(score, k)]] for found, score in scored]

    def _places(self, life: Life) -> np.ndarray:
        """The user's last distinct items that the neighbours know, newest first."""
        items = life.recent(4 * self.last).item[::-1]
        _, first = np.unique(items, return_index=True)
        items = items[np.sort(first)]
        place = self.learned.place
        places = place[items[items < len(place)]]
        return places[places >= 0][: self.last]


def known(k: int = 100) -> dict[str, Route]:
    """All routes that have a name: the two above, every learned system of `experiment.ablations`, and ours
    without the items that the user has met.

    A key is the name in lower case, with "-" for what is not a letter or digit.
    """
    counted: dict[str, Callable[[Store], Finder]] = {"popular": Popular, "item-to-item": ItemToItem}
    found = {name: Route(name, counted=made, k=k) for name, made in counted.items()}
    for arm in ablations():
        if arm.learn is not None:
            found[_key(arm.name)] = Route(
                arm.name, learn=arm.learn, interests=arm.interests, merge=arm.merge, asking=arm.asking, k=k
            )
    new = replace(found[_key(OURS)], name=NEW_ITEMS, rules=Rules(exclude_seen=True))
    return {**found, _key(NEW_ITEMS): new}


def parse_arm(text: str, routes: dict[str, Route]) -> Arm:
    """An arm out of "NAME=ROUTE,ROUTE". Raises `InputError`."""
    name, sign, listed = text.partition("=")
    keys = [key.strip() for key in listed.split(",") if key.strip()]
    strange = [key for key in keys if key not in routes]
    if not sign or not name.strip() or not keys or strange:
        what = f"there is no route {strange[0]!r}" if strange else "expected NAME=ROUTE,ROUTE"
        raise InputError(f"arm {text!r}: {what}. Routes are {', '.join(routes)}.")
    return Arm(name.strip(), tuple(routes[key] for key in keys))


def _key(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower())
