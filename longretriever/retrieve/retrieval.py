"""What a request gets back: candidates, their contexts, and the behaviors that spoke for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from longretriever.model.exported import Model, Request, unit
from longretriever.retrieve.merge import Merged, Ranked
from longretriever.store.behaviors import Behaviors, Life, titles

REASONS = 3  # behaviors named for a candidate


@dataclass(frozen=True)
class Reason:
    """A behavior that spoke for a candidate: one of those in its context that are most like it."""

    item_id: int | str
    title: str | None
    timestamp: int  # seconds since the epoch
    behavior: str
    similarity: float  # cosine of the two item vectors


@dataclass(frozen=True)
class Candidate:
    rank: int  # from 1
    item_id: int | str
    title: str | None
    category_id: int | str
    score: float  # what the merge ordered by
    cosine: float  # of user vector and item vector; comparable within a category only
    log_prob: float  # log P(item | user, category), nats
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Context:
    """A category that was asked about, or all of them at once."""

    category_id: int | str | None  # None: items of any category
    share: float  # P(category | user)
    behaviors: int  # that the user vector was made from
    candidates: int  # of the merged list
    unsearched: float = 0.0  # share of its items that could not be asked, while a part of the index is away


class Asked(NamedTuple):
    """One context of a request on its way: what was asked, and the answer once it is there."""

    request: Request  # in the model's numbers
    spoke: (
        Behaviors  # in the store's numbers: the behaviors of the context, or the recent ones if it has none
    )
    share: float
    answer: Ranked
    unsearched: float = 0.0  # see `Context`


class Retrieval:
    """The answer to one request. Arrays at once; ids, titles and reasons when they are asked for.

    item    [n] item numbers of the model, best first
    source  [n] which of `contexts` each came from
    score   [n] what the merge ordered by
    """

    def __init__(self, model: Model, life: Life, asked: Sequence[Asked], merged: Merged) -> None:
        self._model, self._life, self._asked = model, life, asked
        self.item, self.source, self.score = merged

    def __len__(self) -> int:
        return len(self.item)

    @property
    def user_id(self) -> Any:
        return self._life.store.user_ids.take([self._life.user])[0]

    @property
    def now(self) -> float:
        """Only behaviors strictly before this second were looked at."""
        return self._life.now

    @property
    def item_ids(self) -> list[Any]:
        return self._model.item_ids.take(self.item)

    @property
    def category_ids(self) -> list[Any]:
        """Of each candidate."""
        return self._model.category_ids.take(self._model.category_of(self.item))

    @property
    def asked_categories(self) -> np.ndarray:
        """[contexts] category numbers of the model, in the order in which they were chosen; -1 for all."""
        return np.array([a.request.category for a in self._asked], np.int64)

    @property
    def partial(self) -> bool:
        """Whether some context could not be searched, or not all of it."""
        return any(a.unsearched > 0 for a in self._asked)

    @cached_property
    def contexts(self) -> list[Context]:
        """The categories asked about, in the order in which they were chosen."""
        asked = self.asked_categories
        ids = [self._model.category_ids.take([c])[0] if c >= 0 else None for c in asked]
        count = np.bincount(self.source, minlength=len(ids))
        return [
            Context(category_id, a.share, len(a.request.behaviors.item), int(n), a.unsearched)
            for category_id, a, n in zip(ids, self._asked, count, strict=True)
        ]

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Best first. Costs about 20 microseconds each, most of it for the reasons."""
        cosine, log_prob = np.empty(len(self)), np.empty(len(self))
        reasons: list[tuple[Reason, ...]] = [()] * len(self)
        for source, asked in enumerate(self._asked):
            mine = np.flatnonzero(self.source == source)
            order = np.argsort(asked.answer.item)
            at = order[np.searchsorted(asked.answer.item, self.item[mine], sorter=order)]
            cosine[mine], log_prob[mine] = asked.answer.cosine[at], asked.answer.log_prob[at]
            for i, spoke in zip(mine, self._reasons(asked, self.item[mine]), strict=True):
                reasons[i] = spoke
        columns = zip(
            self.item_ids,
            titles(self._model.items, self.item),
            self.category_ids,
            self.score,
            cosine,
            log_prob,
            reasons,
            strict=True,
        )
        return [
            Candidate(rank, item_id, title, category_id, float(score), float(c), float(p), spoke)
            for rank, (item_id, title, category_id, score, c, p, spoke) in enumerate(columns, start=1)
        ]

    def _reasons(self, asked: Asked, items: np.ndarray) -> list[tuple[Reason, ...]]:
        """For each item, the behaviors of its context whose items are most like it, the likest first.

        Of an item that was met several times, the last time speaks.
        """
        request, model, store = asked.request, self._model, self._life.store
        behaviors = request.behaviors if len(request.behaviors.item) else request.recent
        if len(behaviors.item) == 0 or len(items) == 0:
            return [()] * len(items)
        _, newest = np.unique(asked.spoke.item[::-1], return_index=True)
        last = np.sort(len(behaviors.item) - 1 - newest)
        similarity = model.item_vectors(items) @ unit(model.tokens(behaviors.pick(last))).T
        likest = np.argsort(-similarity, axis=1, kind="stable")[:, :REASONS]
        spoke = asked.spoke.pick(last)
        said = [
            Reason(item_id, title, time, store.behaviors[kind], 0.0)
            for item_id, title, time, kind in zip(
                store.item_ids.take(spoke.item),
                store.titles(spoke.item),
                spoke.time.tolist(),
                spoke.kind,
                strict=True,
            )
        ]
        return [
            tuple(replace(said[b], similarity=float(similarity[i, b])) for b in row)
            for i, row in enumerate(likest)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        return {
            "user_id": self.user_id,
            "now": self.now,
            "contexts": [asdict(c) for c in self.contexts],
            "candidates": [asdict(c) for c in self.candidates],
        }
