"""What did an arm bring, and is that more than chance? The online figures of the papers, exactly defined.

Every figure is a ratio of two sums over users, so it is kept as two numbers for each user, from which the
figure, its bootstrap interval and the paired test all come. A "user-day" is a user on a day on which he was
shown something. Axes: U users, R routes or resamples, F flips, M figures, X impressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from longretriever.evaluate import metrics
from longretriever.experiment.ab.day import Day

FIGURES = {
    "pv": "impressions per user",
    "uv_ctr": "share of user-days with a click",
    "uv_cvr": "share of user-days with an order",
    "orders": "orders per user",
    "clicks": "clicks per user",
    "ctr": "clicks per impression",
    "cvr": "orders per click",
    "exposed_categories": "distinct categories shown on a user-day",
    "clicked_categories": "distinct categories clicked on a user-day",
}
"""Of an arm: the paper's PV, UV CTR, UV CVR, orders, exposed and clicked categories, and their parts."""

OF_ROUTE = {
    "aer": "exposed, of what the route retrieved",
    "uer": "exposed, of what this route alone retrieved",
    "ctr": "clicks per impression of what it retrieved",
    "cvr": "orders per click of what it retrieved",
    "ctr_cvr": "orders per impression of what it retrieved: CTR*CVR",
    "unique_share": "retrieved by this route alone, of what it retrieved",
    "exposed_share": "of all impressions, those that it had retrieved",
}
"""Of a route within an arm. What several routes retrieved counts for each of them."""

Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""Figure -> numerator and denominator of each user, [U] float64 both."""


def of_arm(days: Sequence[Day], users: np.ndarray, category_of: np.ndarray) -> Sums:
    """The `FIGURES` of an arm; `users` are sorted, `category_of` [I] is of the market's items."""
    U, found = len(users), {name: (np.zeros(len(users)), np.zeros(len(users))) for name in FIGURES}
    for day in days:
        shown, user = day.shown, np.searchsorted(users, day.shown.user)
        impressions, clicks, orders = (
            np.bincount(user, weights=w, minlength=U) for w in (None, shown.click, shown.order)
        )
        came = impressions > 0
        category = category_of[shown.item]
        exposed = _distinct(user, category, U)
        clicked = _distinct(user[shown.click], category[shown.click], U)
        once = np.full(U, 1 / len(days))
        parts = {
            "pv": (impressions, once),
            "uv_ctr": (clicks > 0, came),
            "uv_cvr": (orders > 0, came),
            "orders": (orders, once),
            "clicks": (clicks, once),
            "ctr": (clicks, impressions),
            "cvr": (orders, clicks),
            "exposed_categories": (exposed, came),
            "clicked_categories": (clicked, came),
        }
        for name, (above, below) in parts.items():
            found[name][0][:] += above
            found[name][1][:] += below
    return found


def of_routes(days: Sequence[Day], users: np.ndarray, routes: Sequence[str]) -> dict[str, Sums]:
    """The figures `OF_ROUTE` of each route of an arm."""
    U, found = len(users), {}
    for r, name in enumerate(routes):
        sums = {figure: (np.zeros(U), np.zeros(U)) for figure in OF_ROUTE}
        for day in days:
            for figure, (above, below) in _of_route(day, users, r).items():
                sums[figure][0][:] += above
                sums[figure][1][:] += below
        found[name] = sums
    return found


def _of_route(day: Day, users: np.ndarray, route: int) -> Sums:
    shown, bit = day.shown, np.uint32(1 << route)
    user = np.searchsorted(users, shown.user)
    mine, alone = (shown.routes & bit) > 0, shown.routes == bit
    impressions, clicks, orders = (
        np.bincount(user, weights=w, minlength=len(users)).astype(np.float64)
        for w in (mine, mine & shown.click, mine & shown.order)
    )
    exposed_alone = np.bincount(user, weights=alone, minlength=len(users))
    retrieved, only = day.retrieved[:, route], day.alone[:, route]
    return {
        "aer": (impressions, retrieved),
        "uer": (exposed_alone, only),
        "ctr": (clicks, impressions),
        "cvr": (orders, clicks),
        "ctr_cvr": (orders, impressions),
        "unique_share": (only, retrieved),
        "exposed_share": (impressions, np.bincount(user, minlength=len(users))),
    }


def _distinct(user: np.ndarray, category: np.ndarray, users: int) -> np.ndarray:
    span = 1 + int(category.max(initial=0))
    return np.bincount(np.unique(user * span + category) // span, minlength=users)


# -- how sure


def value(sums: tuple[np.ndarray, np.ndarray]) -> float:
    """The figure itself; NaN where there is nothing to divide by."""
    below = sums[1].sum()
    return float(sums[0].sum() / below) if below > 0 else float("nan")


def summary(sums: Sums, seed: int, resamples: int = metrics.RESAMPLES) -> dict[str, Any]:
    """Figure -> its value and the 95% interval by bootstrap over users."""
    above_UM, below_UM = _stacked(sums)
    times_RU = _resampled(len(above_UM), seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        low_M, high_M = _ends((times_RU @ above_UM) / (times_RU @ below_UM))
    return {
        name: {"value": value(pair), "interval": [float(low), float(high)]}
        for (name, pair), low, high in zip(sums.items(), low_M, high_M, strict=True)
    }


def compare(treatment: Sums, control: Sums, seed: int, flips: int = 5_000) -> list[dict[str, Any]]:
    """Every figure of the treatment against the control's, users paired.

    `lift` is the relative difference, its interval the bootstrap's over users, each with both of his lives.
    `p` is the share of exchanges, of the two lives of each user by a coin, whose difference of the figures is
    at least as far from 0 as the one found. Exact if the two arms treat people alike. O(flips x users).
    """
    names = [name for name in treatment if name in control]
    t_UM, tb_UM = _stacked({name: treatment[name] for name in names})
    c_UM, cb_UM = _stacked({name: control[name] for name in names})
    times_RU = _resampled(len(t_UM), seed, metrics.RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_RM = ((times_RU @ t_UM) / (times_RU @ tb_UM)) / ((times_RU @ c_UM) / (times_RU @ cb_UM)) - 1
        low_M, high_M = _ends(lift_RM)
    p_M = _exchange(t_UM, tb_UM, c_UM, cb_UM, np.random.default_rng([seed, 1]), flips)
    rows = []
    for m, name in enumerate(names):
        ours, theirs = value(treatment[name]), value(control[name])
        rows.append(
            {
                "figure": name,
                "treatment": ours,
                "control": theirs,
                "lift": ours / theirs - 1 if theirs else float("nan"),
                "interval": [float(low_M[m]), float(high_M[m])],
                "p": float(p_M[m]),
            }
        )
    return rows


_AT_ONCE = 1 << 23  # signs held at once


def _stacked(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    above, below = (np.stack([pair[i] for pair in sums.values()], axis=1) for i in (0, 1))
    return above.astype(np.float64), below.astype(np.float64)


def _resampled(users: int, seed: int, resamples: int) -> np.ndarray:
    """[R, U] how often each user is in each resample; the same for the same seed."""
    rng = np.random.default_rng([seed, 0])
    return rng.multinomial(users, np.full(users, 1 / users), size=resamples).astype(np.float64)


def _ends(resampled_RM: np.ndarray) -> np.ndarray:
    """[2, M] of the 95% intervals; resamples with nothing to divide by are left out, NaN where all are."""
    ends_2M = np.full((2, resampled_RM.shape[1]), np.nan)
    some_M = ~np.isnan(resampled_RM).all(axis=0)
    ends_2M[:, some_M] = np.nanquantile(resampled_RM[:, some_M], metrics.ENDS, axis=0)
    return ends_2M


def _exchange(
    t_UM: np.ndarray,
    tb_UM: np.ndarray,
    c_UM: np.ndarray,
    cb_UM: np.ndarray,
    rng: np.random.Generator,
    flips: int,
) -> np.ndarray:
    """[M] p-values; see `compare`."""
    sums = [(t_UM + c_UM).sum(axis=0), (tb_UM + cb_UM).sum(axis=0)]
    apart_UM = np.hstack([t_UM - c_UM, tb_UM - cb_UM])
    M, as_far = t_UM.shape[1], np.ones(t_UM.shape[1])
    found_M = _difference(apart_UM.sum(axis=0)[None], sums)[0]
    step = max(1, _AT_ONCE // max(1, len(t_UM)))
    for at in range(0, flips, step):
        sign_FU = rng.integers(0, 2, size=(min(step, flips - at), len(t_UM)), dtype=np.int8) * 2.0 - 1
        moved_FM = _difference(sign_FU @ apart_UM, sums)
        as_far += (np.abs(moved_FM) >= np.abs(found_M) * (1 - 1e-9)).sum(axis=0)
    return np.where(np.isnan(found_M), np.nan, as_far / (flips + 1))[:M]


def _difference(apart_F2M: np.ndarray, sums: Sequence[np.ndarray]) -> np.ndarray:
    """[F, M] of the ratios, from how far apart the two arms' numerators and denominators are."""
    M = apart_F2M.shape[1] // 2
    above, below = apart_F2M[:, :M], apart_F2M[:, M:]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (sums[0] + above) / (sums[1] + below) - (sums[0] - above) / (sums[1] - below)
