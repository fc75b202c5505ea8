"""Which contexts a request asks about: the likeliest next ones, as a trained model foresees them.

That is `Pgin`, the default of a model that has one: it also reaches categories that the user never met. The
paper's choice is `RandomInTop`, "Random N in Top M" by Equation 3, how much and how lately a category was
used: `Score_c = sum over behaviors b in c of 1 / t_b`, t_b the age of b in days. Any callable of the
signature of `Interests` serves as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from longretriever.errors import InputError
from longretriever.events import CATEGORY
from longretriever.model.exported import session
from longretriever.model.history import histories
from longretriever.retrieve.numbers import ProfileCodes, inverse, matched
from longretriever.saved import Manifest, opening
from longretriever.store.behaviors import FLOOR, Life, Store, read_arrow, vocabularies


@dataclass(frozen=True)
class Contexts:
    """The contexts of one request, most wanted first."""

    category: np.ndarray  # [N] distinct category numbers
    share: np.ndarray  # [N] P(c | u): this category's part of the user's total interest, in (0, 1]

    def only(self, which: np.ndarray) -> Contexts:
        """Those where this mask is set."""
        return Contexts(self.category[which], self.share[which])

    @classmethod
    def none(cls) -> Contexts:
        return cls(np.empty(0, np.int64), np.empty(0))


INTERESTS = "interests"
"""The folder, within that of a model, of what was trained to choose its contexts."""


class Interests(Protocol):
    """Chooses the contexts of one request from what the user did before it; no context for an empty life."""

    def __call__(self, life: Life, rng: np.random.Generator) -> Contexts: ...


@dataclass(frozen=True)
class RandomInTop:
    """Of the `m` categories of highest score, `n` drawn at random, each as likely as the others.

    The paper's choice: it varies what one user is shown from request to request. A user who met fewer than
    `n` categories gets all of them. Behaviors count as at least `floor` seconds old. A share is the score
    over the sum of scores of ALL categories met, so the shares of those drawn sum to at most 1.
    """

    n: int = 5
    m: int = 20
    floor: float = FLOOR

    def __post_init__(self) -> None:
        _check_positive("RandomInTop", n=self.n, m=self.m, floor=self.floor)
        if self.n > self.m:
            raise InputError(f"RandomInTop(n={self.n}, m={self.m}): n of m are drawn, expected n <= m.")

    def __call__(self, life: Life, rng: np.random.Generator) -> Contexts:
        top = _top(life, self.m, self.floor)
        found = len(top.category)
        drawn = np.sort(rng.choice(found, min(self.n, found), replace=False))
        return Contexts(top.category[drawn], top.share[drawn])


@dataclass(frozen=True)
class Top:
    """The `n` categories of highest score, the same for equal lives. Scores, shares as in `RandomInTop`."""

    n: int = 20
    floor: float = FLOOR

    def __post_init__(self) -> None:
        _check_positive("Top", n=self.n, floor=self.floor)

    def __call__(self, life: Life, rng: np.random.Generator) -> Contexts:
        return _top(life, self.n, self.floor)


@dataclass(frozen=True)
class Pgin:
    """The likeliest next categories by a pointer-generator model, likeliest first (ULIM, 2507.10097).

    As many as make up `cover` of all probability, at most `k`: few for a user who is easy to foresee. A share
    is the probability that the next behavior is in the category. `Retriever.load` opens the one that
    was trained with its model, unless `path` names another folder of kind "interests".
    """

    k: int = 50
    path: str | os.PathLike[str] | None = None
    threads: int = 1
    cover: float = 0.98
    opened: Foreseeing | None = field(default=None, repr=False, compare=False)  # the folder, once it is read

    def __post_init__(self) -> None:
        _check_positive("Pgin", k=self.k, cover=self.cover, threads=self.threads)

    def beside(self, model: Path) -> Pgin:
        """This, with the weights that were trained with a model, unless it has some; opened."""
        here = self if self.path else replace(self, path=model / INTERESTS)
        return replace(here, opened=here._trained)

    def __call__(self, life: Life, rng: np.random.Generator) -> Contexts:
        return self.for_many([life])[0]

    def for_many(self, lives: Sequence[Life]) -> list[Contexts]:
        """The contexts of several users of one store, or of it joined with live events.

        No context for a user who has done nothing. Raises `InputError` without weights, a `SavedError` for a
        folder that cannot be opened.
        """
        lived = [life for life in lives if len(life.recent(1).item)]
        if not lived:
            return [Contexts.none()] * len(lives)
        at_store = self._trained.matching(lived[0].store).of_store
        chosen = {}
        for life, probability_C in self._foreseen(lived):
            best = np.argsort(-probability_C, kind="stable")[: self.k]
            before = np.cumsum(probability_C[best]) - probability_C[best]
            best = best[before < self.cover]
            contexts = Contexts(at_store[best], probability_C[best].astype(np.float64))
            chosen[id(life)] = contexts.only((contexts.category >= 0) & (contexts.share > 0))
        return [chosen.get(id(life), Contexts.none()) for life in lives]

    def _foreseen(self, lives: Sequence[Life]) -> Iterator[tuple[Life, np.ndarray]]:
        """Each life with the probability of every category; one call for all lives of a store."""
        of_store: dict[int, list[Life]] = {}
        for life in lives:
            of_store.setdefault(id(life.store), []).append(life)
        for mine in of_store.values():
            yield from zip(mine, self._trained.probabilities(mine), strict=True)

    def foreseen(self, life: Life) -> tuple[np.ndarray, np.ndarray]:
        """Category numbers of the store, and the probability of each to be the next."""
        ((_, probability_C),) = self._foreseen([life])
        at_store = self._trained.matching(life.store).of_store
        return at_store[at_store >= 0], probability_C[at_store >= 0]

    @cached_property
    def _trained(self) -> Foreseeing:
        if self.opened is not None:
            return self.opened
        if self.path is None:
            raise InputError("Pgin has no weights: pass its path, or give it to Retriever.load.")
        return Foreseeing(opening(self.path, "interests"), self.threads)


class Foreseeing:
    """A folder of kind "interests", opened read-only."""

    def __init__(self, manifest: Manifest, threads: int) -> None:
        facts = manifest.facts
        self._categories, self._recent = facts["categories"], facts["recent_length"]
        self._fields = vocabularies(facts["profile_fields"])
        self._ids = read_arrow(manifest.path / "categories.arrow")[CATEGORY]
        self._session = session(manifest.path / "pgin.onnx", threads)
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._known: dict[str, _Matching] = {}  # by fingerprint of a store

    def probabilities(self, lives: Sequence[Life]) -> np.ndarray:
        """[B, C] of the next category, in the model's own numbers."""
        store = lives[0].store
        matching = self.matching(store)
        past = histories(
            store,
            np.array([life.user for life in lives]),
            np.array([life.now for life in lives]),
            categories=self._categories,
            recent=self._recent,
            since=np.array([life.since for life in lives]),
        )
        feed = {
            "category": matching.of_model[past.category],  # -1, the padding, finds the last, which is -1
            "feature": past.feature,
            "recent": matching.of_model[past.recent],
            "age": past.age,
            "general": past.general,
            "profile": np.stack([matching.profile(life.profile()) for life in lives]),
        }
        return self._session.run(None, {k: v for k, v in feed.items() if k in self._inputs})[0]

    def matching(self, store: Store) -> _Matching:
        if store.fingerprint not in self._known:
            of_model = matched(store.category_ids.values, self._ids)
            self._known[store.fingerprint] = _Matching(
                np.append(of_model, -1), inverse(of_model, len(self._ids)), ProfileCodes(store, self._fields)
            )
        return self._known[store.fingerprint]


class _Matching(NamedTuple):
    """How a store's category numbers and those of the model go together."""

    of_model: np.ndarray  # [store's + 1] the model's number or -1; one more for -1 itself
    of_store: np.ndarray  # [model's] the store's number or -1
    profile: ProfileCodes


def _top(life: Life, n: int, floor: float) -> Contexts:
    """Highest score first; of equal scores the lower category number."""
    category, score = life.engagement(floor)
    best = np.lexsort((category, -score))[:n]
    return Contexts(category[best], score[best] / score.sum())


def _check_positive(name: str, **arguments: float) -> None:
    for argument, value in arguments.items():
        if not value > 0:
            raise InputError(f"{name}({argument}={value}): expected more than 0.")
