"""Which contexts a request asks about: "Random N in Top M" of the paper, by how much and how lately used.

A category's score is Equation 3, `Score_c = sum over behaviors b in c of 1 / t_b`, t_b the age of b in days.
Any callable of the signature of `Interests` serves as well, for instance a model of the next category.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longretriever.errors import InputError
from longretriever.store.behaviors import FLOOR, Life


@dataclass(frozen=True)
class Contexts:
    """The contexts of one request, most wanted first."""

    category: np.ndarray  # [N] distinct category numbers
    share: np.ndarray  # [N] P(c | u): this category's part of the user's total interest, in (0, 1]


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


def _top(life: Life, n: int, floor: float) -> Contexts:
    """Highest score first; of equal scores the lower category number."""
    category, score = life.engagement(floor)
    best = np.lexsort((category, -score))[:n]
    return Contexts(category[best], score[best] / score.sum())


def _check_positive(name: str, **arguments: float) -> None:
    for argument, value in arguments.items():
        if not value > 0:
            raise InputError(f"{name}({argument}={value}): expected more than 0.")
