"""Who of several routes found what, and who alone? Sets of items, route against route.

Arrays in, figures out: nothing here knows a model or a log. Every figure is the sum of a part by the sum of
its whole, over requests and seeds, so that all have their interval from one bootstrap over users.

Axes: R routes, N requests, k places of a list, P pairs (request, item), H those found, S seeds,
F figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from longretriever.evaluate import metrics
from longretriever.experiment.runs import Difference, correct, exchanges, tested

COMPARED = ("recall", "adds")
"""Figures by which the routes are held against the first one: both are means over requests."""

Ratio = tuple[np.ndarray, np.ndarray]
"""[N] a part and [N] its whole: the figure is the sum of the one by the sum of the other."""


@dataclass(frozen=True)
class Pairs:
    """What any route retrieved, each pair of request and item once.

    has   [R, P] whether the route retrieved it
    row   [P] the request
    met   [P] whether the user met the item within the horizon
    next  [P] whether it is the target of the request
    size  [N] how many items the user met within the horizon, one at least
    """

    has: np.ndarray
    row: np.ndarray
    met: np.ndarray
    next: np.ndarray
    size: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[np.ndarray], target: np.ndarray, met: Sequence[np.ndarray]) -> Pairs:
        """`lists` are R arrays [N, k] of item numbers, padded with -1; k may differ."""
        span = 1 + max(int(items.max(initial=0)) for items in (*lists, target, *met))
        row_N = np.arange(len(target), dtype=np.int64)
        keys = [(row_N[:, None] * span + item_Nk)[item_Nk >= 0] for item_Nk in lists]
        pair = np.unique(np.concatenate(keys))
        has = np.zeros((len(lists), len(pair)), dtype=bool)
        for mine, key in zip(has, keys, strict=True):
            mine[np.searchsorted(pair, key)] = True
        size = metrics.sizes(met)
        wanted = np.repeat(row_N, size) * span + np.concatenate([np.empty(0, np.int64), *met])
        return cls(has, pair // span, np.isin(pair, wanted), np.isin(pair, row_N * span + target), size)

    def count(self, which: np.ndarray) -> np.ndarray:
        """[N] how many of these pairs each request has."""
        return np.bincount(self.row[which], minlength=len(self.size)).astype(np.float64)

    @cached_property
    def alone(self) -> np.ndarray:
        """[R, P] whether the route, and no other one, retrieved it."""
        return self.has & (self.has.sum(axis=0) == 1)

    def of_route(self, r: int) -> dict[str, Ratio]:
        """The figures of one route; `docs/experiment.md` says what they mean."""
        mine, alone, one = self.has[r], self.alone[r], np.ones(len(self.size))
        retrieved, retrieved_alone = self.count(mine), self.count(alone)
        hit, hit_alone, hit_any = (self.count(which & self.met) for which in (mine, alone, self.met))
        next_, next_alone, next_any = (self.count(which & self.next) for which in (mine, alone, self.next))
        return {
            "items": (retrieved, one),
            "next": (next_, one),
            "recall": (hit / self.size, one),
            "aer": (hit, retrieved),
            "alone": (retrieved_alone, retrieved),
            "uer": (hit_alone, retrieved_alone),
            "unique": (hit_alone, hit_any),
            "unique_next": (next_alone, next_any),
            "adds": (hit_alone / self.size, one),
            "adds_next": (next_alone, one),
        }

    def of_all(self) -> dict[str, Ratio]:
        """The same of all routes as one, which has no others."""
        together = Pairs(np.ones((1, len(self.row)), dtype=bool), self.row, self.met, self.next, self.size)
        return {name: together.of_route(0)[name] for name in ("items", "next", "recall", "aer")}

    def weights(self) -> np.ndarray:
        """[2, P] what a pair adds to recall, and to that of the target."""
        n = max(1, len(self.size))
        return np.stack([self.met / self.size[self.row] / n, self.next / n])


@dataclass(frozen=True)
class Overlap:
    """R routes asked the same N requests, once with each seed; `part` names the requests."""

    names: list[str]
    part: str
    user: np.ndarray
    seeds: list[Pairs]

    @cached_property
    def ratios(self) -> list[list[dict[str, Ratio]]]:
        """By route, by seed."""
        return [[pairs.of_route(r) for pairs in self.seeds] for r in range(len(self.names))]

    def found(self, seed: int) -> dict[str, Any]:
        """All figures, with intervals over users drawn by `seed`."""
        return {
            "requests": len(self.user),
            "users": len(np.unique(self.user)),
            "met": int(self.seeds[0].size.sum()),
            "routes": {
                name: {**self._figures(ratios, seed), **_counts(ratios)}
                for name, ratios in zip(self.names, self.ratios, strict=True)
            },
            "together": self._figures([pairs.of_all() for pairs in self.seeds], seed),
            "shared": self._shared([np.ones(len(pairs.row), dtype=bool) for pairs in self.seeds]),
            "shared_found": self._shared([pairs.met for pairs in self.seeds]),
            "order": self.order(),
        }

    def _figures(self, of_seeds: Sequence[Mapping[str, Ratio]], seed: int) -> dict[str, Any]:
        """Each figure of all seeds taken together, its interval, and what it is with each."""
        names = list(of_seeds[0])
        part_SNF, whole_SNF = (
            np.stack([np.stack([of[name][i] for name in names], axis=1) for of in of_seeds]) for i in (0, 1)
        )
        part_NF, whole_NF = part_SNF.sum(axis=0), whole_SNF.sum(axis=0)
        ends = metrics.ratio_interval(part_NF, whole_NF, self.user, np.random.default_rng(seed))
        by_seed_SF = _divided(part_SNF.sum(axis=1), whole_SNF.sum(axis=1))
        return {
            **_numbers(names, _divided(part_NF.sum(axis=0), whole_NF.sum(axis=0))),
            "intervals": {
                name: [_number(low), _number(high)] for name, low, high in zip(names, *ends, strict=True)
            },
            "by_seed": {name: [_number(v) for v in of] for name, of in zip(names, by_seed_SF.T, strict=True)},
        }

    def _shared(self, which: Sequence[np.ndarray]) -> dict[str, dict[str, float | None]]:
        """route -> other -> the share of the route's pairs, of those in `which`, that the other has too."""
        both_RR = np.zeros((len(self.names), len(self.names)))
        for pairs, of in zip(self.seeds, which, strict=True):
            has_RP = pairs.has[:, of]
            both_RR += [[np.count_nonzero(a & b) for b in has_RP] for a in has_RP]
        share_RR = _divided(both_RR, np.diag(both_RR)[:, None])
        return {name: _numbers(self.names, row) for name, row in zip(self.names, share_RR, strict=True)}

    def order(self) -> list[dict[str, Any]]:
        """The best route by recall, then the one that adds most to those before it, and so on."""
        hits = [(pairs.has[:, pairs.met], pairs.weights()[:, pairs.met]) for pairs in self.seeds]
        has_RH, weight_2H = (np.concatenate(of, axis=1) for of in zip(*hits, strict=True))
        covered_H, left, found = np.zeros(has_RH.shape[1], dtype=bool), list(range(len(self.names))), []
        while left:
            gain = [weight_2H[0] @ (has_RH[r] & ~covered_H) for r in left]
            best = left.pop(int(np.argmax(gain)))
            covered_H |= has_RH[best]
            recall, next_ = weight_2H @ covered_H / len(self.seeds)
            found.append({"route": self.names[best], "recall": _number(recall), "next": _number(next_)})
        return found


def compare(parts: Sequence[Overlap], seed: int) -> list[dict[str, Any]]:
    """Each route's recall, and what it adds to all others, less the first route's; as `runs.compare`."""
    found = [
        Difference(
            name, one.names[0], ("live", one.part), list(COMPARED), _less(ratios, one.ratios[0]), one.user
        )
        for one in parts
        if len(one.user)
        for name, ratios in zip(one.names[1:], one.ratios[1:], strict=True)
    ]
    flips = exchanges(len(found) * len(COMPARED))
    rows = [row for difference in found for row in tested(difference, seed, flips)]
    correct(rows)
    return rows


def _less(ours: Sequence[Mapping[str, Ratio]], theirs: Sequence[Mapping[str, Ratio]]) -> np.ndarray:
    """[S, N, F] the difference of two routes in the figures that are means over requests."""
    pairs = zip(ours, theirs, strict=True)
    return np.stack([np.stack([a[name][0] - b[name][0] for name in COMPARED], axis=1) for a, b in pairs])


def _counts(of_seeds: Sequence[Mapping[str, Ratio]]) -> dict[str, float]:
    """How many items, and how many targets, only this route found: means over seeds."""
    return {
        "unique_items": round(float(np.mean([of["unique"][0].sum() for of in of_seeds])), 1),
        "unique_targets": round(float(np.mean([of["unique_next"][0].sum() for of in of_seeds])), 1),
    }


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _numbers(names: Sequence[str], values: np.ndarray) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(names, values, strict=True)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
