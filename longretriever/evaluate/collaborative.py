"""What do people with a history like this one meet? Two rivals that read it off the user-item matrix.

ALS factorizes the matrix, and solves for the user's factor anew at each request; BM25 sums the neighbours of
the items met. What they know of items is frozen at T; what they know of the user is every behavior strictly
before the request. `implicit` does the learning, in seconds (`longretriever[rivals]`).

U users, I items, J items that occur in train ("shown"), B requests at once, D dimension of a factor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longretriever.errors import InputError
from longretriever.evaluate.rivals import Lists
from longretriever.evaluate.split import nearest_quantile
from longretriever.model.factors import gram, user_factor
from longretriever.model.warm import factorize, interactions, need_implicit
from longretriever.store.behaviors import Store

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_SCORES = 1 << 23  # scores held at once


class Weighting(NamedTuple):
    """How sure a number of events makes ALS, and how strongly it pulls factors to zero."""

    scale: float
    damped: bool
    regularization: float

    def of(self, count: np.ndarray) -> np.ndarray:
        """The confidence in a pair with so many events: 1 + scale * log(1 + n) if damped, else scale * n."""
        return 1 + self.scale * np.log1p(count) if self.damped else self.scale * count

    def __str__(self) -> str:
        counts = "log counts" if self.damped else "counts"
        return f"{counts} x {self.scale:g}, regularization {self.regularization:g}"


GRID = tuple(
    Weighting(scale, damped, regularization)
    for scale, damped in ((10, True), (40, True), (40, False))
    for regularization in (0.01, 100)
)
"""What `ALS` chooses from."""


class ALS:
    """Alternating least squares: an item's score is its factor times the user's.

    The user's factor is the one of least squared error for the history of the request, given the items' (see
    `user_factor`). O(n D² + D³ + J D) a request.

    `weighting=None` takes the one of `GRID` with the best mean of recall@200 over ALL and NEW on a slice cut
    from the end of train, see `recall_by_weighting`. `facts` says which, and how each fared. The same `seed`
    gives the same factors; `threads` (None: all) changes only the time.
    """

    def __init__(
        self,
        full: Store,
        T: int,
        seed: int = 1,
        threads: int | None = None,
        weighting: Weighting | None = None,
        dim: int = 64,
    ) -> None:
        counts = _train(full, T)
        validation: dict[Weighting, dict[str, float]] = {}
        if weighting is None:
            validation = recall_by_weighting(full, T, seed, threads, dim)
            weighting = max(validation, key=lambda one: sum(validation[one].values()))
        self.full, self.weighting = full, weighting
        self.facts: Mapping[str, Any] = {
            "weighting": str(weighting),
            "validation_recall@200": {str(one): recall for one, recall in validation.items()},
        }
        self.shown = np.unique(counts.indices)
        self.place = _places(full, self.shown)
        counts.data = weighting.of(counts.data)
        factor = factorize(counts, dim, weighting.regularization, seed, threads)
        self.factor = factor[self.shown].astype(np.float64)
        self.gram = gram(self.factor, weighting.regularization)

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        """See `Recommender`. No list for a user who met none of the items that occur in train."""
        item = np.full((len(users), k), -1, dtype=np.int64)
        for rows, met, count in _histories(self.full, self.place, users, before):
            score_BJ = self._refold(met, count) @ self.factor.T
            for row, score, places in zip(item[rows], score_BJ, met, strict=True):
                if new:
                    score[places] = -np.inf
                if len(places):
                    best = best_of(score, k)
                    row[: len(best)] = self.shown[best]
        return Lists(item)

    def _refold(self, met: list[np.ndarray], count: list[np.ndarray]) -> np.ndarray:
        """[B, D] the users' factors, each from the places of items met and how often."""
        of = [
            user_factor(self.factor[places], self.weighting.of(n), self.gram)
            for places, n in zip(met, count, strict=True)
        ]
        return np.array(of).reshape(len(met), -1)


class BM25:
    """Nearest neighbours: an item's score is the sum, over the items met, of events times similarity.

    Each item keeps its K most similar ones, itself among them: the inner product of their users, weighted as
    BM25 weights the words of a text. Items without a similar one among those met are not listed. `threads`
    (None: all) changes only the time.
    """

    def __init__(self, full: Store, T: int, threads: int | None = None, K: int = 100) -> None:
        counts = _train(full, T)
        need_implicit()
        from implicit.nearest_neighbours import ItemItemRecommender, bm25_weight

        self.full = full
        self.shown = np.unique(counts.indices)
        self.place = _places(full, self.shown)
        # implicit's BM25Recommender, but for the layout of the matrix, of which it warns itself
        weight = bm25_weight(counts[:, self.shown].T, K1=1.2, B=0.75).T.tocsr()
        nearest = ItemItemRecommender(K=K, num_threads=threads or 0)
        nearest.fit(weight, show_progress=False)
        self.similarity: csr_matrix = nearest.similarity

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        """See `Recommender`."""
        item = np.full((len(users), k), -1, dtype=np.int64)
        for rows, met, count in _histories(self.full, self.place, users, before):
            for row, places, (found, score) in zip(item[rows], met, self.scores(met, count), strict=True):
                if new:
                    score = np.where(np.isin(found, places), -np.inf, score)
                best = best_of(score, k)
                row[: len(best)] = self.shown[found[best]]
        return Lists(item)

    def scores(
        self, met: Sequence[np.ndarray], weight: Sequence[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each history, places of items met and weights: places in `shown`, ascending, and scores."""
        begin = np.r_[0, np.cumsum([len(places) for places in met])]
        history_BJ = type(self.similarity)(
            (np.concatenate(weight), np.concatenate(met), begin), shape=(len(met), len(self.shown))
        )
        found_BJ = (history_BJ @ self.similarity).sorted_indices()
        for at in range(len(met)):
            yield _row(found_BJ, at)


def recall_by_weighting(
    full: Store,
    T: int,
    seed: int = 1,
    threads: int | None = None,
    dim: int = 64,
    k: int = 200,
    most: int = 1000,
) -> dict[Weighting, dict[str, float]]:
    """Recall@k over ALL and NEW on the last tenth of train, for each of `GRID` learned from what precedes.

    The batch protocol inside train: cut at the 0.9 quantile of train's timestamps, asking at most `most`
    users with events on both sides, drawn by `seed`. Costs one training for each of `GRID`.
    """
    cut = nearest_quantile(full.event_time[full.event_time <= T], 0.9)
    before, later = interactions(full, cut), interactions(full, T, after=cut)
    both = np.flatnonzero((np.diff(before.indptr) > 0) & (np.diff(later.indptr) > 0))
    user = np.random.default_rng(seed).permutation(both)[:most]
    target = [_row(later, u)[0] for u in user]
    occurs = np.bincount(before.indices, minlength=full.n_items) > 0
    new_target = [
        items[occurs[items] & ~np.isin(items, _row(before, u)[0])]
        for items, u in zip(target, user, strict=True)
    ]
    recall = {}
    for weighting in GRID:
        model = ALS(full, cut, seed, threads, weighting, dim)
        recall[weighting] = {
            "all": _recall(model, user, cut, target, k, new=False),
            "new": _recall(model, user, cut, new_target, k, new=True),
        }
    return recall


def _recall(model: ALS, user: np.ndarray, cut: int, target: list[np.ndarray], k: int, new: bool) -> float:
    """Mean recall@k of those who have a target."""
    has = np.array([len(items) > 0 for items in target], dtype=bool)
    if not has.any():
        return 0.0
    lists = model.recommend(user[has], np.full(has.sum(), cut + 1), k, new).item
    wanted = [items for items in target if len(items)]
    return round(float(np.mean([np.isin(w, row).mean() for w, row in zip(wanted, lists, strict=True)])), 6)


def _train(full: Store, T: int) -> csr_matrix:
    counts = interactions(full, T)
    if counts.nnz == 0:
        raise InputError(f"the store has no event at or before T = {T}; pass the store of the full log.")
    return counts


def _row(matrix: csr_matrix, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of a row."""
    inside = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[inside], matrix.data[inside]


def _places(full: Store, shown: np.ndarray) -> np.ndarray:
    """[I] where in `shown` an item stands; -1 for one that is not shown."""
    place = np.full(full.n_items, -1, dtype=np.int64)
    place[shown] = np.arange(len(shown))
    return place


def _histories(
    full: Store, place: np.ndarray, users: np.ndarray, before: np.ndarray
) -> Iterator[tuple[slice, list[np.ndarray], list[np.ndarray]]]:
    """For a slice of requests at a time, the places of the distinct items met, and the events of each."""
    step = max(1, min(256, _SCORES // (int(place.max()) + 1)))
    for at in range(0, len(users), step):
        rows = slice(at, at + step)
        met, count = [], []
        for user, now in zip(users[rows], before[rows], strict=True):
            mine = full.rows_of(int(user))
            places = place[full.event_item[mine][full.event_time[mine] < now]]
            distinct, n = np.unique(places[places >= 0], return_counts=True)
            met.append(distinct)
            count.append(n.astype(np.float64))
        yield rows, met, count


def best_of(score: np.ndarray, k: int) -> np.ndarray:
    """[<= k] positions by descending score, the smaller one first among equals; none of score -inf."""
    found = np.arange(len(score))
    if k < len(score):
        found = np.flatnonzero(score >= np.partition(score, -k)[-k])
    found = found[np.argsort(-score[found], kind="stable")][:k]
    return found[score[found] > -np.inf]
