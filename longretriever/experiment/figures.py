"""Which figures of a log are compared, how are they written, and what in a market moves them?

Their exact meanings stand where they are counted: `evaluate.describe` and `evaluate.taste`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from longretriever.events import SECONDS_PER_DAY


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.1f}"


def _share(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def _duration(seconds: float) -> str:
    for unit, size in (("d", SECONDS_PER_DAY), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} s"


@dataclass(frozen=True)
class Figure:
    name: str  # as `describe` has it
    label: str
    written: Callable[[float], str]

    def text(self, value: float | None) -> str:
        return "–" if value is None else self.written(value)


SIZES = (
    Figure("events", "events", _count),
    Figure("users", "users", _count),
    Figure("items", "items", _count),
    Figure("categories", "categories", _count),
    Figure("days", "days", _count),
    Figure("events_per_item", "events per item", _count),
    Figure("items_per_category", "items per category", _count),
)
JUDGED: Mapping[str, Sequence[Figure]] = {
    "Behaviors of a user": (
        Figure("behaviors_mean", "mean", _count),
        Figure("behaviors_median", "median", _count),
        Figure("behaviors_p90", "p90", _count),
        Figure("behaviors_p99", "p99", _count),
        Figure("behaviors_max", "most", _count),
        Figure("behaviors_gini", "Gini", _number),
        Figure("busiest_users", "events of the busiest 1%", _share),
    ),
    "Categories and items": (
        Figure("largest_category", "events in the largest category", _share),
        Figure("top_10_categories", "events in the ten largest", _share),
        Figure("effective_categories", "effective number of categories", _count),
        Figure("user_categories", "categories of a user", _count),
        Figure("user_effective_categories", "effective number for a user", _count),
        Figure("item_gini", "Gini of the items", _number),
        Figure("top_items", "events of the top 1% of items", _share),
    ),
    "Coming back": (
        Figure("item_again", "to an item met earlier", _share),
        Figure("item_lately", "to one of the last 10 behaviors", _share),
        Figure("category_again", "to a category met earlier", _share),
    ),
    "The next category": (
        Figure("stay", "is the current one", _share),
        Figure("in_top_1", "in the user's top 1 by count", _share),
        Figure("in_top_5", "in the top 5", _share),
        Figure("in_top_20", "in the top 20", _share),
        Figure("by_recency_1", "in the user's top 1 by Equation 3", _share),
        Figure("by_recency_5", "in the top 5 by Equation 3", _share),
        Figure("by_recency_20", "in the top 20 by Equation 3", _share),
        Figure("entropy", "entropy, bits", _number),
        Figure("entropy_given_current", "entropy given the current one, bits", _number),
        Figure("told_by_current", "told by the current one", _share),
    ),
    "Rhythm": (
        Figure("same_second", "of the second of another behavior", _share),
        Figure("gap_median", "gap, median", _duration),
        Figure("gap_p90", "gap, p90", _duration),
        Figure("gap_p99", "gap, p99", _duration),
        Figure("gap_in_session", "gaps within half an hour", _share),
        Figure("session_events", "events of a session", _count),
        Figure("burstiness", "burstiness", _number),
        Figure("active_days", "active days of a user", _count),
        Figure("active_share", "active days, of a life's days", _share),
        Figure("life_share", "a life, of the log's days", _share),
    ),
    "Taste": (
        Figure("taste_in_category", "alike in the category, of chance", _number),
        Figure("taste_across", "alike in other categories, of chance", _number),
    ),
}

MOVES: Mapping[str, Mapping[str, int]] = {
    "behaviors_mean": {"users": -1},
    "behaviors_median": {"least": 1, "most": -1},
    "behaviors_p90": {"users": -1, "most": -1},
    "behaviors_p99": {"most": 1},
    "behaviors_max": {"most": 1},
    "behaviors_gini": {"most": 1, "least": -1},
    "busiest_users": {"most": 1},
    "largest_category": {"category_tail": 1, "categories": -1},
    "top_10_categories": {"category_spread": 1, "categories": -1},
    "effective_categories": {"categories": 1, "category_spread": -1},
    "user_categories": {"curiosity": 1, "stay": -1},
    "user_effective_categories": {"curiosity": 1, "fewest_interests": 1, "stay": -1},
    "item_gini": {"popularity_tail": 1, "style_spread": 1},
    "top_items": {"popularity_tail": 1, "style_spread": 1},
    "item_again": {"repeat": 1, "items": -1},
    "item_lately": {"repeat": 1, "items": -1},
    "category_again": {"curiosity": -1},
    "stay": {"stay": 1, "session_events": 1},
    "in_top_1": {"curiosity": -1, "persona_interest": 1},
    "in_top_5": {"curiosity": -1},
    "in_top_20": {"curiosity": -1},
    "by_recency_1": {"stay": 1, "curiosity": -1},
    "by_recency_5": {"curiosity": -1},
    "by_recency_20": {"curiosity": -1},
    "entropy": {"categories": 1, "category_spread": -1},
    "entropy_given_current": {"stay": -1, "curiosity": 1},
    "told_by_current": {"stay": 1},
    "gap_median": {"gap_seconds": 1},
    "gap_p90": {"session_events": -1, "days": 1},
    "gap_p99": {"days": 1},
    "gap_in_session": {"session_events": 1},
    "session_events": {"session_events": 1},
    "burstiness": {"gap_tail": -1, "session_events": 1},
    "active_days": {"session_events": -1, "users": -1},
    "active_share": {"session_events": 1, "days": -1},
    "life_share": {"session_events": -1},
    "taste_in_category": {"sharpness": 1},
    "taste_across": {"common": 1},
}
"""Figure -> parameters of the market that move it, and whether more of one is more (1) or less (-1) of it.

Those with the clearest effect, around the defaults; a test holds each to its direction. Of figures that are
not here, no parameter moves any.
"""
