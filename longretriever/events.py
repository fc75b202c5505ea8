"""What an event is: the columns that every stage agrees on, their units, and what counts as absurd.

An event says that a user met an item at a time. Ids are integers or strings and are kept as they came.
Times are int64 seconds since 1970-01-01 UTC from ingest on, whatever unit the log used.
"""

from __future__ import annotations

USER, ITEM, CATEGORY, TIME, BEHAVIOR = "user_id", "item_id", "category_id", "timestamp", "behavior"
TITLE = "title"

REQUIRED_EVENT_COLUMNS = (USER, ITEM, TIME)
"""A log must have these (after `--column` mapping); `category_id` may come from the items instead."""

SECONDS_PER_DAY = 86_400

MOST_KINDS = 255
"""Kinds of behavior of one store: their codes are bytes."""

EARLIEST = 0
"""Times before 1970 are rejected as absurd."""

LATEST = 4_102_444_800
"""Times from 2100-01-01 on are rejected as absurd; above it, milliseconds are told from seconds."""

SECONDS, MILLISECONDS = "s", "ms"


def unit_of(smallest: float, largest: float) -> str | None:
    """The unit of times that lie in this range: "s", "ms", or None when both occur.

    Seconds until 2100 end at 4.1e9; milliseconds reach that number within the first 48 days of 1970,
    so the two ranges are disjoint for every real log.
    """
    if largest < LATEST:
        return SECONDS
    return MILLISECONDS if smallest >= LATEST else None
