from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longretriever.errors import InputError
from longretriever.retrieve.interests import Contexts, Interests, Pgin, RandomInTop, Top


@dataclass
class Met:
    """A life that is only its Equation 3 scores."""

    category: list[int]
    score: list[float]
    floor: float | None = None

    def engagement(self, floor: float) -> tuple[np.ndarray, np.ndarray]:
        self.floor = floor
        return np.array(self.category, dtype=np.int32), np.array(self.score, dtype=np.float64)


def ask(interests: Interests, life: Any, seed: int = 0) -> Contexts:
    return interests(life, np.random.default_rng(seed))


def best_first(life: Met) -> list[int]:
    """The slow truth: categories by falling score, then by number."""
    return [c for _, c in sorted(zip((-s for s in life.score), life.category, strict=True))]


scores = st.dictionaries(
    st.integers(0, 10_000), st.sampled_from([0.001, 0.5, 1.0, 24.0]) | st.floats(1e-6, 1e6), max_size=40
)
lives = scores.map(lambda met: Met(sorted(met), [met[c] for c in sorted(met)]))


@given(lives, st.integers(1, 30))
def test_top_takes_the_highest_scores_and_of_equal_ones_the_lower_number(life: Met, n: int) -> None:
    chosen = ask(Top(n), life)
    assert chosen.category.tolist() == best_first(life)[:n]


@given(lives, st.integers(1, 10), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_random_in_top_draws_distinct_categories_of_the_top(life: Met, n: int, more: int, seed: int) -> None:
    interests = RandomInTop(n, n + more)
    chosen = ask(interests, life, seed)
    rank = [best_first(life)[: n + more].index(c) for c in chosen.category]
    assert len(rank) == min(n, len(life.category))
    assert rank == sorted(set(rank))  # most wanted first
    again = ask(interests, life, seed)
    assert again.category.tolist() == chosen.category.tolist()


@given(lives, st.sampled_from([RandomInTop(), Top(), Top(3), RandomInTop(2, 3)]))
def test_shares_are_of_all_categories_met(life: Met, interests: Interests) -> None:
    chosen = ask(interests, life)
    of = dict(zip(life.category, life.score, strict=True))
    expected = [of[c] / sum(life.score) for c in chosen.category]
    np.testing.assert_allclose(chosen.share, expected, rtol=1e-9)
    assert (chosen.share > 0).all()
    assert (chosen.share <= 1).all()
    assert chosen.share.sum() <= 1 + 1e-9
    if len(chosen.category) == len(life.category) > 0:
        assert chosen.share.sum() == pytest.approx(1)


def test_each_of_the_top_is_as_likely() -> None:
    life, rng = Met(list(range(8)), [8.0, 7, 6, 5, 4, 3, 2, 1]), np.random.default_rng(0)
    draws, interests = 4000, RandomInTop(2, 4)
    drawn = np.concatenate([interests(life, rng).category for _ in range(draws)])  # type: ignore[arg-type]
    counts = np.bincount(drawn, minlength=8)
    assert (counts[4:] == 0).all()
    assert (abs(counts[:4] - draws / 2) < 5 * np.sqrt(draws / 4)).all()


@pytest.mark.parametrize("interests", [RandomInTop(), Top()])
def test_an_empty_life_has_no_contexts(interests: Interests) -> None:
    chosen = ask(interests, Met([], []))
    assert len(chosen.category) == len(chosen.share) == 0


@pytest.mark.parametrize("interests", [RandomInTop(floor=60), Top(floor=60)])
def test_the_floor_reaches_equation_3(interests: Interests) -> None:
    life = Met([1], [1.0])
    ask(interests, life)
    assert life.floor == 60


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: RandomInTop(n=0), r"RandomInTop\(n=0\): expected more than 0"),
        (lambda: RandomInTop(floor=0), r"RandomInTop\(floor=0\): expected more than 0"),
        (lambda: RandomInTop(n=6, m=5), r"RandomInTop\(n=6, m=5\): n of m are drawn, expected n <= m"),
        (lambda: Pgin(cover=0), r"Pgin\(cover=0\): expected more than 0"),
        (lambda: Top(n=-1), r"Top\(n=-1\): expected more than 0"),
        (lambda: Top(floor=float("nan")), r"Top\(floor=nan\): expected more than 0"),
    ],
)
def test_arguments_that_make_no_sense(wrong, message: str) -> None:
    with pytest.raises(InputError, match=message):
        wrong()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 9), st.floats(0.01, 1))
def test_pgin_takes_the_likeliest_until_they_cover_enough(weight, k, cover) -> None:
    probability = np.array(weight) / max(sum(weight), 1e-9)

    class Trained:
        def matching(self, store):
            return SimpleNamespace(of_store=np.arange(len(weight)))

        def probabilities(self, lives):
            return probability[None]

    pgin = Pgin(k, cover=cover)
    pgin.__dict__["_trained"] = Trained()
    life = SimpleNamespace(store=None, recent=lambda n: SimpleNamespace(item=[1]))
    expected, total = [], 0.0
    for c in sorted(range(len(weight)), key=lambda c: -probability[c])[:k]:
        if total < cover and probability[c] > 0:
            expected.append(c)
        total += probability[c]
    assert pgin.for_many([life])[0].category.tolist() == expected  # type: ignore[list-item]


def test_any_callable_serves() -> None:
    latest: Interests = lambda life, rng: Contexts(life.category[-1:], np.ones(1))  # type: ignore[attr-defined]  # noqa: E731
    assert ask(latest, Met([3, 9], [1.0, 1.0])).category == [9]
