"""What kind of log is this? How busy its people are, where they go, when, and how often they come back.

All from the arrays of a store, in a few sorts and no loop over users: 3 seconds for a million events.

What is *earlier* is earlier in time: of behaviors of one second none knows of another, here as elsewhere. A
*next* behavior is one whose user has an earlier one; shares of what comes next are of those. A figure for
which a log has nothing to count is None.

E events, by user and then by time; U users.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longretriever.evaluate.taste import taste
from longretriever.events import SECONDS_PER_DAY
from longretriever.store.behaviors import Store

Figures = dict[str, float | None]

SESSION = 1_800
"""Seconds: a longer gap ends a session."""
ENOUGH = 10
"""Gaps, or behaviors, that a user must have for a figure about his own rhythm."""
TOPS = (1, 5, 20)

_WINDOW = 10  # behaviors that "lately" means
_ASKED = (
    2_000  # next behaviors for which Equation 3 is worked out, which takes a look at the life before each
)
_SHOWN = 200  # points of a curve


class Lives(NamedTuple):
    """The events of a store, by user and then by time; all [E]. What is of one second is in order of rows."""

    user: np.ndarray
    item: np.ndarray
    category: np.ndarray
    time: np.ndarray  # unix seconds
    first: np.ndarray  # place of the user's first event
    earlier: np.ndarray  # place after the last event that is strictly earlier; `first` where there is none
    seen: np.ndarray  # events that the user had before in the category, by order of rows
    seen_earlier: np.ndarray  # the same, strictly earlier


def describe(store: Store, seed: int = 0) -> Figures:
    """All figures of a log, by name. What is drawn at random is drawn by `seed`."""
    lives = lives_of(store)
    return {
        **sizes(store),
        **activity(store),
        **categories(store),
        **repeats(lives),
        **next_category(store, lives, np.random.default_rng([seed, 1])),
        **rhythm(lives),
        **taste(lives.user, lives.item, store.item_category, np.random.default_rng([seed, 2])),
    }


def lives_of(store: Store) -> Lives:
    row = np.asarray(store.time_order)
    length = np.diff(store.group_start[store.user_group])
    user = np.repeat(np.arange(store.n_users), length)
    first = np.repeat(np.cumsum(length) - length, length)
    time = np.asarray(store.event_time)[row]
    place = np.arange(len(row))
    new_time = (place == first) | (np.diff(time, prepend=-1) != 0)
    group_start = np.repeat(store.group_start[:-1], np.diff(store.group_start))
    new_row = np.asarray(np.diff(store.event_time, prepend=-1) != 0)
    new_row[store.group_start[:-1]] = True
    in_row = np.arange(len(row))
    return Lives(
        user,
        np.asarray(store.event_item)[row],
        store.item_category[np.asarray(store.event_item)[row]],
        time,
        first,
        np.maximum.accumulate(np.where(new_time, place, 0)),
        (in_row - group_start)[row],
        (np.maximum.accumulate(np.where(new_row, in_row, 0)) - group_start)[row],
    )


# -- the figures


def sizes(store: Store) -> Figures:
    """How large the log is.

    events, users, items, categories   those that occur; exact duplicates count once
    days                               from the first event to the last
    events_per_item, items_per_category
    """
    item = np.bincount(store.event_item, minlength=store.n_items)
    items, events = int((item > 0).sum()), store.n_events
    categories = len(np.unique(store.group_category))
    return {
        "events": events,
        "users": store.n_users,
        "items": items,
        "categories": categories,
        "days": (store.last_time - store.first_time) / SECONDS_PER_DAY,
        "events_per_item": events / items,
        "items_per_category": items / categories,
    }


def activity(store: Store) -> Figures:
    """How many behaviors a user has.

    behaviors_mean, _median, _p90, _p99, _max   over users
    behaviors_gini                              0: all have as many; 1: one has all
    busiest_users                               share of the events that the busiest 1% of users have
    """
    count = behaviors(store)
    low, high, highest = np.quantile(count, (0.5, 0.9, 0.99))
    return {
        "behaviors_mean": float(count.mean()),
        "behaviors_median": float(low),
        "behaviors_p90": float(high),
        "behaviors_p99": float(highest),
        "behaviors_max": int(count.max()),
        "behaviors_gini": gini(count),
        "busiest_users": top_share(count),
    }


def categories(store: Store) -> Figures:
    """How events spread over categories and items.

    largest_category, top_10_categories   share of the events in the one category, the ten, with most of them
    effective_categories                  exp of the entropy of the categories' shares of the events: how many
                                          categories of equal size would be as varied
    user_categories                       distinct categories of a user, mean over users
    user_effective_categories             effective number of categories of a user, mean over users
    item_gini, top_items                  of the events of items that have any; share of the top 1% of them
    """
    share = category_shares(store)
    group = np.diff(store.group_start).astype(np.float64)  # events of a user in a category
    count = behaviors(store)
    starts = store.user_group[:-1]
    entropy = np.log(count) - np.add.reduceat(group * np.log(group), starts) / count
    item = np.bincount(store.event_item)
    item = item[item > 0]
    return {
        "largest_category": float(share[0]),
        "top_10_categories": float(share[:10].sum()),
        "effective_categories": float(np.exp(-(share * np.log(share)).sum())),
        "user_categories": float(np.diff(store.user_group).mean()),
        "user_effective_categories": float(np.exp(entropy).mean()),
        "item_gini": gini(item),
        "top_items": top_share(item),
    }


def repeats(lives: Lives) -> Figures:
    """How often people come back; shares of the next behaviors.

    item_again      whose item the user had met earlier
    item_lately     whose item is among that of his 10 last earlier behaviors
    category_again  whose category he had met earlier
    """
    key = lives.user * (int(lives.item.max()) + 1) + lives.item
    order = np.argsort(key, kind="stable")  # by user and item, and then by time
    place = np.arange(len(order))
    new_pair = np.diff(key[order], prepend=-1) != 0
    new_time = new_pair | (np.diff(lives.earlier[order], prepend=-1) != 0)
    pair_start = np.maximum.accumulate(np.where(new_pair, place, 0))
    time_start = np.maximum.accumulate(np.where(new_time, place, 0))
    again = np.zeros(len(order), bool)
    lag = np.zeros(len(order), np.int64)  # behaviors from the last earlier one of the item to the time now
    again[order] = time_start > pair_start
    lag[order] = lives.earlier[order] - order[time_start - 1]
    is_next = lives.earlier > lives.first
    return {
        "item_again": _mean(again[is_next]),
        "item_lately": _mean((again & (lag <= _WINDOW))[is_next]),
        "category_again": _mean((lives.seen_earlier > 0)[is_next]),
    }


def next_category(store: Store, lives: Lives, rng: np.random.Generator) -> Figures:
    """How well the category of a next behavior can be told.

    The *current* category is that of the last earlier behavior; of several of one second, any by lot.

    stay                       share of the next behaviors in the current category
    in_top_1, _5, _20          share in the categories that the user had most earlier behaviors in; where
                               several have as many, the chance that a lot among them decides for it
    by_recency_1, _5, _20      the same by Equation 3 at the time, floor of an hour; of 2,000 next behaviors
    entropy                    bits, of the category of a next behavior
    entropy_given_current      bits, of the same if the current category is known
    told_by_current            share of the entropy that this knowledge takes away

    The entropies are of counts, corrected after Miller and Madow by (cells met - 1) / (2 N ln 2) bits more.
    """
    after = np.flatnonzero(lives.earlier > lives.first)
    if not len(after):
        names = [f"{way}_{k}" for way in ("in_top", "by_recency") for k in TOPS]
        return dict.fromkeys(["stay", *names, "entropy", "entropy_given_current", "told_by_current"])
    stop = lives.earlier[after]
    start = lives.earlier[stop - 1]  # of what is of the second of the last earlier behavior
    current = lives.category[start + (rng.random(len(after)) * (stop - start)).astype(np.int64)]
    category = lives.category[after]
    ahead, level = count_ranks(lives)
    top = {f"in_top_{k}": _mean(_in_top(k, ahead[after], level[after])) for k in TOPS}
    asked = after[rng.permutation(len(after))[:_ASKED]]
    ahead, level = np.array([_recency_rank(store, lives, at) for at in asked]).T
    recent = {f"by_recency_{k}": _mean(_in_top(k, ahead, level)) for k in TOPS}
    marginal = entropy_bits(category)
    together = entropy_bits(current.astype(np.int64) * store.n_categories + category)
    given = max(0.0, together - entropy_bits(current))
    told = {"told_by_current": 1 - given / marginal if marginal > 0 else None}
    return {
        **{"stay": _mean(current == category), **top, **recent},
        **{"entropy": marginal, "entropy_given_current": given, **told},
    }


def rhythm(lives: Lives) -> Figures:
    """When people act. A gap lies between two successive times of a user, so it is never 0.

    same_second             share of the events that are of the same second as one of the user before them
    gap_median, _p90, _p99  seconds, over all gaps
    gap_in_session          share of gaps of at most half an hour
    session_events          events of a session, on average; a longer gap than that ends one
    burstiness              (sd - mean) / (sd + mean) of a user's gaps, mean over users with 10 gaps or more:
                            -1 for a clock, 0 for gaps by pure chance, towards 1 for bursts
    active_days             days (UTC) with a behavior, of a user, mean
    active_share            the same, of all days from a user's first to his last, mean over users with 10
                            behaviors or more
    life_share              time from a user's first behavior to his last, of the log's, mean over the same
    """
    gap, of = gaps(lives)
    place = np.arange(len(lives.time))
    day = lives.time // SECONDS_PER_DAY
    new_day = (place == lives.first) | (np.diff(day, prepend=-1) != 0)
    days = np.bincount(lives.user[new_day])
    count = np.bincount(lives.user)
    last = np.cumsum(count) - 1
    span = lives.time[last] - lives.time[lives.first[last]]
    spanned = day[last] - day[lives.first[last]] + 1
    lived, whole = count >= ENOUGH, int(lives.time.max() - lives.time.min())
    middle, high, highest = np.quantile(gap, (0.5, 0.9, 0.99)) if len(gap) else (None, None, None)
    return {
        "same_second": float((lives.earlier < place).mean()),
        **{"gap_median": _float(middle), "gap_p90": _float(high), "gap_p99": _float(highest)},
        "gap_in_session": _mean(gap <= SESSION),
        "session_events": len(place) / (len(count) + int((gap > SESSION).sum())),
        "burstiness": _mean(burstiness(gap, of)),
        "active_days": _mean(days),
        "active_share": _mean((days / spanned)[lived]),
        "life_share": _mean(span[lived] / whole) if whole else None,
    }


# -- curves


def curves(store: Store) -> dict[str, list[list[float]]]:
    """Points [x, y] of what is drawn, at most 200 of each.

    activity    share of the users who have at least x behaviors
    gaps        share of the gaps that are at least x seconds
    categories  share of the events that the x-th largest category has
    """
    share = category_shares(store)
    return {
        "activity": _at_least(behaviors(store)),
        "gaps": _at_least(gaps(lives_of(store))[0]),
        "categories": [[at + 1, float(share[at])] for at in _spread(np.arange(1, len(share) + 1))],
    }


def _at_least(values: np.ndarray) -> list[list[float]]:
    value, count = np.unique(values, return_counts=True)
    left = np.cumsum(count[::-1])[::-1] / max(len(values), 1)
    return [[float(value[at]), float(left[at])] for at in _spread(value)]


def _spread(ascending: np.ndarray) -> list[int]:
    """Places of some of these numbers above 0, as far apart as on a logarithmic axis."""
    if not len(ascending):
        return []
    wanted = np.geomspace(ascending[0], ascending[-1], _SHOWN)
    return np.unique(np.searchsorted(ascending, wanted).clip(max=len(ascending) - 1)).tolist()


# -- what the figures are made of


def behaviors(store: Store) -> np.ndarray:
    """[U] events of each user."""
    return np.diff(store.group_start[store.user_group])


def category_shares(store: Store) -> np.ndarray:
    """Of the events, largest first; of categories that have any."""
    events = np.bincount(store.group_category, np.diff(store.group_start))
    return np.sort(events[events > 0])[::-1] / store.n_events


def gaps(lives: Lives) -> tuple[np.ndarray, np.ndarray]:
    """Seconds from each time of a user to his next one, and whose they are."""
    place = np.arange(len(lives.time))
    after = np.flatnonzero((lives.earlier == place) & (place > lives.first))
    return lives.time[after] - lives.time[after - 1], lives.user[after]


def gini(counts: np.ndarray) -> float:
    ascending = np.sort(counts).astype(np.float64)
    n = len(ascending)
    return float(2 * (np.arange(1, n + 1) * ascending).sum() / (n * ascending.sum()) - (n + 1) / n)


def top_share(counts: np.ndarray) -> float:
    """Of the largest 1%, rounded up."""
    descending = np.sort(counts)[::-1]
    return float(descending[: -(-len(counts) // 100)].sum() / descending.sum())


def entropy_bits(labels: np.ndarray) -> float:
    """Of the labels' frequencies, with the correction of Miller and Madow for how few there are."""
    count = np.unique(labels, return_counts=True)[1]
    share = count / len(labels)
    return float(-(share * np.log2(share)).sum() + (len(count) - 1) / (2 * len(labels) * np.log(2)))


def burstiness(gap: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Of each user with 10 gaps or more; `of` says whose a gap is, ascending."""
    whose, n = np.unique(of, return_inverse=True, return_counts=True)[1:]
    if not len(n):
        return np.empty(0)
    mean = np.bincount(whose, gap) / n
    sd = np.sqrt(np.bincount(whose, (gap - mean[whose]) ** 2) / n)
    return ((sd - mean) / (sd + mean))[n >= ENOUGH]


def count_ranks(lives: Lives) -> tuple[np.ndarray, np.ndarray]:
    """[E] how many categories the user had more earlier behaviors in than in this event's, and in how many as
    many, this one too; 0 as many where he had none in it.

    A category has more than k behaviors at a time if its behavior number k, counted from 0, is earlier: so
    with the places of all behaviors sorted by (user, number), one binary search counts the categories.
    """
    E = len(lives.user)
    cell = lives.first + lives.seen  # of a user and a number: no other user reaches into his places
    keys = np.sort(cell * E + np.arange(E))
    start = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=E))])
    asked = lives.first + lives.seen_earlier
    ahead = np.searchsorted(keys, asked * E + lives.earlier) - start[asked]
    met = lives.seen_earlier > 0
    asked = asked - met
    level = np.searchsorted(keys, asked * E + lives.earlier) - start[asked] - ahead
    return ahead, np.where(met, level, 0)


def _recency_rank(store: Store, lives: Lives, at: int) -> tuple[int, int]:
    category, score = store.engagement(int(lives.user[at]), float(lives.time[at]))
    own = score[category == lives.category[at]]
    return (int((score > own[0]).sum()), int((score == own[0]).sum())) if len(own) else (len(score), 0)


def _in_top(k: int, ahead: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The chance to be among the first k, with so many ahead, and so many on one level of which one is it."""
    return np.where(level > 0, np.clip((k - ahead) / np.maximum(level, 1), 0.0, 1.0), 0.0)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)
