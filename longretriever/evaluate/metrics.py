"""How good are these lists? Arrays in, numbers out; nothing here knows a model, a store or a protocol.

A list holds item numbers, best first, padded with -1. Every metric gives one value for each request, so that
means, intervals, groups of requests and paired comparisons all come from the same arrays; only coverage
belongs to all lists together. Axes: N requests, K places of a list, M metrics, I items.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
ENDS = ((1 - CONFIDENCE) / 2, 1 - (1 - CONFIDENCE) / 2)
_NORMAL_95 = 1.96  # standard deviations
_SIGNS_AT_ONCE = 1 << 22  # random signs held at once, 32 MB


# -- one target for each request


def ranks(item_NK: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """[N] the place of each target in its list, from 0; infinity where the list lacks it."""
    if item_NK.shape[1] == 0:
        return np.full(len(item_NK), np.inf)
    found_NK = item_NK == target_N[:, None]
    return np.where(found_NK.any(axis=1), found_NK.argmax(axis=1), np.inf)


def recall_at(rank_N: np.ndarray, k: int) -> np.ndarray:
    """[N] 1 where the target is among the first `k` places, else 0."""
    return (rank_N < k).astype(np.float64)


def reciprocal_rank(rank_N: np.ndarray) -> np.ndarray:
    """[N] 1 over the place counted from 1; 0 where the list lacks the target. Its mean is the MRR."""
    return 1.0 / (1.0 + rank_N)


# -- several targets for each request


def hits(item_NK: np.ndarray, targets: Sequence[np.ndarray]) -> np.ndarray:
    """[N, K] whether the item at each place is one of the request's targets; padding never is."""
    size_N = sizes(targets)
    target = np.concatenate(targets) if len(targets) else np.empty(0, np.int64)
    span = 1 + max(int(item_NK.max(initial=0)), int(target.max(initial=0)))
    row_N = np.arange(len(item_NK), dtype=np.int64)
    wanted = np.repeat(row_N, size_N) * span + target
    return np.isin(row_N[:, None] * span + item_NK, wanted) & (item_NK >= 0)


def sizes(targets: Sequence[np.ndarray]) -> np.ndarray:
    """[N] how many targets each request has."""
    return np.array([len(items) for items in targets], dtype=np.int64)


def recall(hit_NK: np.ndarray, size_N: np.ndarray, k: int) -> np.ndarray:
    """[N] share of the targets that are among the first `k` places."""
    return hit_NK[:, :k].sum(axis=1) / size_N


def ndcg(hit_NK: np.ndarray, size_N: np.ndarray, k: int = 50) -> np.ndarray:
    """[N] gains of 1, discounted by log2(place + 1), over those of min(targets, k) hits on top."""
    discount_k = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discount_k)
    gain_N = hit_NK[:, :k] @ discount_k[: hit_NK.shape[1]]
    return gain_N / ideal[np.minimum(size_N, k) - 1]


def hit_rate(hit_NK: np.ndarray, k: int = 50) -> np.ndarray:
    """[N] 1 where at least one target is among the first `k` places, else 0."""
    return np.any(hit_NK[:, :k], axis=1).astype(np.float64)


# -- what the lists are made of


def categories(item_NK: np.ndarray, item_category_I: np.ndarray, k: int = 50) -> np.ndarray:
    """[N] how many distinct categories the first `k` places hold."""
    item_Nk = item_NK[:, :k]
    category_Nk = np.sort(np.where(item_Nk >= 0, item_category_I[item_Nk], -1), axis=1)
    first_Nk = np.diff(category_Nk, axis=1, prepend=-1) != 0
    return first_Nk.sum(axis=1).astype(np.float64)


def selected(contexts: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> np.ndarray:
    """[N] share of the targets' categories (`wanted`, one for each target) that were among the chosen."""
    return np.array([np.isin(w, c).mean() for c, w in zip(contexts, wanted, strict=True)], dtype=np.float64)


def coverage(item_NK: np.ndarray, shown_I: np.ndarray, k: int = 50) -> tuple[float, float, float]:
    """Share of the catalogue that the first `k` places of all lists show, and its 95% interval.

    `shown_I` [I] says which items the catalogue has; others in a list count for nothing.

    The interval is the jackknife's: the figure shrinks with the number of distinct users, and a bootstrap
    resample has about a third fewer, so that a percentile interval would lie wholly below the figure.
    """
    item_Nk = item_NK[:, :k]
    valid_Nk = (item_Nk >= 0) & shown_I[item_Nk]
    row, _ = np.nonzero(valid_Nk)
    item = item_Nk[valid_Nk]
    lists_of = np.bincount(item, minlength=len(shown_I))
    size, n = max(1, int(shown_I.sum())), len(item_NK)
    figure = np.count_nonzero(lists_of) / size
    only_here_N = np.bincount(row[lists_of[item] == 1], minlength=n) / size
    error = np.sqrt((n - 1) * only_here_N.var()) if n else 0.0
    return (
        float(figure),
        max(0.0, float(figure - _NORMAL_95 * error)),
        min(1.0, float(figure + _NORMAL_95 * error)),
    )


# -- how sure


def interval(
    value_NM: np.ndarray, user_N: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES
) -> np.ndarray:
    """[2, M] the lower and upper end of the 95% percentile bootstrap interval of each mean over requests.

    Users are resampled, each with all requests of theirs, since requests of one user are alike. The means of
    `a - b`, values of two models for the same requests, give the interval of their difference. With the same
    generator state the resamples are the same. O(resamples x users); nothing to resample gives NaN.
    """
    if len(value_NM) == 0:
        return np.full((2, value_NM.shape[1]), np.nan)
    return np.quantile(
        _resampled(value_NM, np.ones((len(value_NM), 1)), user_N, rng, resamples), ENDS, axis=0
    )


def ratio_interval(
    part_NM: np.ndarray,
    whole_NM: np.ndarray,
    user_N: np.ndarray,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """[2, M] as `interval`, of ratios: the sum of `part_NM` over all requests by that of `whole_NM`.

    Resamples with nothing to divide by are left out; where the whole is nothing, NaN.
    """
    ends_2M = np.full((2, part_NM.shape[1]), np.nan)
    some_M = whole_NM.sum(axis=0) > 0
    if some_M.any():
        ratio_RM = _resampled(part_NM[:, some_M], whole_NM[:, some_M], user_N, rng, resamples)
        ends_2M[:, some_M] = np.nanquantile(ratio_RM, ENDS, axis=0)
    return ends_2M


def _resampled(
    part_NM: np.ndarray, whole_NM: np.ndarray, user_N: np.ndarray, rng: np.random.Generator, resamples: int
) -> np.ndarray:
    """[resamples, M] sum by sum, of users drawn with all their requests; `whole_NM` may be one column."""
    _, user_N = np.unique(user_N, return_inverse=True)
    part_UM, whole_UM = (
        np.stack([np.bincount(user_N, weights=value_N) for value_N in of_NM.T], axis=1)
        for of_NM in (part_NM, whole_NM)
    )
    n_users = len(part_UM)
    ratio_RM = np.empty((resamples, part_NM.shape[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        for ratio_M in ratio_RM:
            times_U = np.bincount(rng.integers(n_users, size=n_users), minlength=n_users)
            ratio_M[:] = (times_U @ part_UM) / (times_U @ whole_UM)
    return ratio_RM


def sign_flip(
    difference_NM: np.ndarray, user_N: np.ndarray, rng: np.random.Generator, flips: int = 10_000
) -> np.ndarray:
    """[M] p-values of "these two models are alike", from the differences of their values per request.

    Were they alike, each user's difference could as well have been found the other way round; p is the share
    of `flips` random choices of signs, one for each user, whose mean difference is at least as far from 0 as
    the one found, itself counted, so no p is under 1 / (flips + 1) and equal models have p = 1. Exact when
    differences are symmetric about 0, near so for many users otherwise. O(flips x users); NaN for no request.
    """
    if len(difference_NM) == 0:
        return np.full(difference_NM.shape[1], np.nan)
    _, user_N = np.unique(user_N, return_inverse=True)
    total_UM = np.stack([np.bincount(user_N, weights=column_N) for column_N in difference_NM.T], axis=1)
    total_UM = total_UM[np.any(total_UM != 0, axis=1)]
    sum_M, n_users = total_UM.sum(axis=0), len(total_UM)
    least_M = np.abs(sum_M) - 1e-9 * np.abs(total_UM).sum(axis=0)  # a tie is as far
    as_far_M = np.ones(len(sum_M))
    at_once = max(1, _SIGNS_AT_ONCE // max(1, n_users))
    for at in range(0, flips, at_once):
        size = (min(at_once, flips - at), -(-n_users // 8))
        byte = rng.integers(256, size=size, dtype=np.uint8)  # a bit is a sign: 5 times faster than a number
        keeps_FU = np.unpackbits(byte, axis=1, count=n_users).astype(np.float64)
        flipped_FM = 2 * (keeps_FU @ total_UM) - sum_M
        as_far_M += (np.abs(flipped_FM) >= least_M).sum(axis=0)
    return as_far_M / (flips + 1)


def holm(p_T: np.ndarray) -> np.ndarray:
    """[T] p-values corrected for the number of tests, by Holm.

    Calling only those under 5% a difference, the chance of even one false call among all T is at most 5%,
    however the tests depend on each other.
    """
    order = np.argsort(p_T, kind="stable")
    corrected_T = np.empty(len(p_T))
    corrected_T[order] = np.maximum.accumulate(p_T[order] * np.arange(len(p_T), 0, -1))
    return np.minimum(corrected_T, 1.0)
