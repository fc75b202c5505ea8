"""How much should factors of who met what count beside a model's vectors? As much as held-out events say.

The factors are learned from the events that the vectors were learned from. Their weight is the one under
which the held-out events are likeliest: those whose item the user had not met, among all items that he had
not met, since only they are pooled (`retrieve/pooled.py`). Repeats would choose a weight that new items
suffer from: factorization is good at them, but the pointers of contexts are better. Where the log holds
nothing out, or no weight above 0 is better beyond doubt, there are no factors, and serving costs nothing.

R requests, I items, J of them that compete, d width of vectors, D of factors.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from longretriever.model.exported import Model, Request
from longretriever.model.factors import MOST, READ, REGULARIZATION, SURE, Factors, Met, gram, user_factor
from longretriever.model.warm import factorize, interactions, iterations_for
from longretriever.saved import Folder
from longretriever.store.behaviors import Life, Store

_REQUESTS = 500
_OF_A_USER = 5  # requests at most, of which each counts the less
_LOOKED_AT = 20_000  # users at most: all that some did may be repeats
_COMPETITORS = 1 << 16  # items: of more, so many are drawn
_HIGHEST = 64.0  # weight
_AT_ONCE = 64


class HeldOut(NamedTuple):
    """Requests just before events that were not learned from, of items that their users had not met.

    life, target  [R] the user before the event, and its item
    share         [R] how much a request counts: all of a user as much as all of another; sums to 1
    user          [R]
    """

    life: list[Life]
    target: np.ndarray
    share: np.ndarray
    user: np.ndarray


class Logits(NamedTuple):
    """Of vectors and of factors; `own + weight * factor` is what is pooled.

    target_own, target_factor  [R] of the target
    own, factor                [R, J] of what competes with it, -inf in `own` for what does not
    counts                     how many items each competitor stands for
    """

    target_own: np.ndarray
    target_factor: np.ndarray
    own: np.ndarray
    factor: np.ndarray
    counts: float


def pool(
    folder: Folder, store: Store, until: int, weight: float | None, seed: int, threads: int | None = None
) -> dict[str, Any]:
    """Put factors into the folder of a model that is otherwise written; returns facts for the manifest.

    `until` is the time up to which the model has learned. `weight` None fits it; above 0, it is taken as it
    is. The same store, model and seed give the same. Time: that of `item_factors` in `warm.py`, and 2 to 10 s
    to fit; memory: the same, and up to 400 MB to fit. Where nothing is held out, nothing is done. Raises
    `MissingExtra` without `implicit`.
    """
    began = time.perf_counter()
    facts: dict[str, Any] = {"weight": weight or 0.0, "requests": 0, "gain": 0.0, "gain_error": 0.0}
    asked = held_out(store, until, seed) if weight is None else None
    if asked is not None and not asked.life:
        return {**facts, "seconds": 0.0}
    model = Model(folder.so_far("model"))
    counts = interactions(store, until)
    counts.data *= SURE
    dim = max(1, model.dim - 1)  # with the padding twice the vectors' width: FAISS is slow at odd ones
    item = factorize(counts, dim, REGULARIZATION, seed, threads, iterations_for(counts.nnz))
    if asked is not None:
        fit, gain, error = fitted(logits(model, item, asked, seed), asked)
        facts = {"weight": fit, "requests": len(asked.life), "gain": gain, "gain_error": error}
    if facts["weight"] > 0:
        Factors.of(item, model.corpus_scale, facts["weight"]).save(folder)
    return {**facts, "seconds": round(time.perf_counter() - began, 3)}


def held_out(store: Store, until: int, seed: int) -> HeldOut:
    """At most `_REQUESTS`, users in random order, at most `_OF_A_USER` of each."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(np.flatnonzero(np.asarray(store.event_time) > until))
    users = np.searchsorted(store.group_start[store.user_group], rows, side="right") - 1
    by_user = np.argsort(users, kind="stable")
    who, first = np.unique(users[by_user], return_index=True)
    rows_of = np.split(rows[by_user], first[1:])
    life, target, of = [], [], []
    for at in rng.permutation(len(who))[:_LOOKED_AT]:
        for row in rows_of[at][:_OF_A_USER]:
            before = store.life(int(who[at]), float(store.event_time[row]))
            item = int(store.event_item[row])
            if len(before.recent(1).item) and item not in before.items():
                life.append(before)
                target.append(item)
                of.append(int(who[at]))
        if len(life) >= _REQUESTS:
            break
    user = np.array(of, np.int64)
    share = 1 / np.bincount(user)[user] if len(user) else np.empty(0)
    return HeldOut(life, np.array(target, np.int64), share / share.sum(), user)


def logits(model: Model, item_ID: np.ndarray, asked: HeldOut, seed: int) -> Logits:
    """Of all items that the user has not met, or of `_COMPETITORS` drawn evenly."""
    n_items, R = len(item_ID), len(asked.life)
    drawn = np.arange(n_items)
    if n_items > _COMPETITORS:
        drawn = np.sort(np.random.default_rng(seed).choice(n_items, _COMPETITORS, replace=False))
    user_Rd, factor_RD = _users(model, item_ID, asked)
    own_RJ = model.corpus_scale * (user_Rd @ model.item_vectors(drawn).T)
    for row, life in enumerate(asked.life):
        own_RJ[row, np.isin(drawn, life.items())] = -np.inf
    own_RJ[drawn == asked.target[:, None]] = -np.inf
    target_Rd, target_RD = model.item_vectors(asked.target), item_ID[asked.target]
    return Logits(
        model.corpus_scale * np.einsum("rd,rd->r", user_Rd, target_Rd),
        np.einsum("rd,rd->r", factor_RD, target_RD),
        own_RJ,
        factor_RD @ item_ID[drawn].T,
        (n_items - 1) / max(1, len(drawn) - 1) if R else 1.0,
    )


def _users(model: Model, item_ID: np.ndarray, asked: HeldOut) -> tuple[np.ndarray, np.ndarray]:
    """[R, d] the vectors and [R, D] the factors of the users, float32."""
    gram_DD = gram(item_ID, REGULARIZATION)
    user, factor = [np.empty((0, model.dim), np.float32)], np.empty((len(asked.life), item_ID.shape[1]))
    for at in range(0, len(asked.life), _AT_ONCE):
        lives = asked.life[at : at + _AT_ONCE]
        read = [life.recent(model.context_length) for life in lives]
        of = zip(read, lives, strict=True)
        requests = [Request(-1, recent, recent, life.profile(), life.now) for recent, life in of]
        user.append(model.user_vectors(requests).user[:, 0])
        for row, life in enumerate(lives, start=at):
            met = Met(*life.counts(READ, MOST))
            factor[row] = user_factor(item_ID[met.item], SURE * met.times, gram_DD)
    return np.concatenate(user), factor.astype(np.float32)


def fitted(of: Logits, asked: HeldOut) -> tuple[float, float, float]:
    """The weight, the nats a request that it gains over none, and the standard error of that, over users.

    The likelihood is concave in the weight, so its slope says where the best one lies. It is 0 where the gain
    is within its standard error: a few users must not turn on what serving pays for.
    """
    if len(np.unique(asked.user)) < 2 or _slope(0.0, of, asked.share) <= 0:
        return 0.0, 0.0, 0.0
    from scipy.optimize import brentq  # comes with implicit

    weight = _HIGHEST
    if _slope(_HIGHEST, of, asked.share) < 0:
        weight = round(float(brentq(_slope, 0.0, _HIGHEST, args=(of, asked.share), xtol=1e-3)), 3)
    gain_R = log_likelihood(weight, of) - log_likelihood(0.0, of)
    gain = float(asked.share @ gain_R)
    per_user = np.bincount(np.unique(asked.user, return_inverse=True)[1], asked.share * (gain_R - gain))
    error = float(np.sqrt(np.square(per_user).sum() * len(per_user) / (len(per_user) - 1)))
    return (weight if gain > error else 0.0), round(gain, 6), round(error, 6)


def log_likelihood(weight: float, of: Logits) -> np.ndarray:
    """[R] log probability of the target among the items that the user has not met."""
    target = of.target_own + weight * of.target_factor
    return target - np.logaddexp(target, _competition(weight, of)[0])


def _slope(weight: float, of: Logits, share: np.ndarray) -> float:
    """How the likelihood of the targets changes with the weight."""
    target = of.target_own + weight * of.target_factor
    others, mean_R = _competition(weight, of)
    lost_R = np.exp(others - np.logaddexp(target, others))  # probability of not being the target
    return float(share @ (lost_R * (of.target_factor - mean_R)))


def _competition(weight: float, of: Logits) -> tuple[np.ndarray, np.ndarray]:
    """[R] log of the summed exp of what competes, and the mean of its factors' logits under it."""
    log_sum, mean = np.empty(len(of.own)), np.empty(len(of.own))
    for at in range(0, len(of.own), _AT_ONCE):
        rows = slice(at, at + _AT_ONCE)
        x = of.own[rows] + np.float32(weight) * of.factor[rows]
        best = x.max(axis=1, keepdims=True, initial=-1e30)
        p = np.exp(x - best)
        total = p.sum(axis=1)
        with np.errstate(divide="ignore"):
            log_sum[rows] = best[:, 0] + np.log(total * of.counts)
        mean[rows] = np.einsum("rj,rj->r", p, of.factor[rows]) / np.maximum(total, 1e-30)
    return log_sum, mean
