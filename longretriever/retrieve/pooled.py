"""What do a vector of all items and factors find together? Items not met compete pooled, the others do not.

What the vector alone gives in all to items that the user has not met, `own + weight * x·y` divides among
them; an item met keeps what the vector alone gives it (docs/log.md). Factorization is good at repeats, which
would crowd out what is new; and whether people repeat at all, it does not know.

One search by the pooled logits, for as many more items as the user has met, and the sum of both logits over
all items.

n items, d width of vectors, W of what is searched (see `model/factors.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from longretriever.index import CORPUS, Searchable
from longretriever.model.exported import Request
from longretriever.model.factors import Queries
from longretriever.retrieve.merge import Ranked
from longretriever.retrieve.rules import Ruled

if TYPE_CHECKING:
    from longretriever.retrieve.retriever import Searched

_LEAST = 1e-12  # probability left to the items not met: those met may hold all but what rounding leaves


def pooled(
    searched: Searched,
    rows: list[Request],
    shares: Sequence[float],
    unwanted: Sequence[np.ndarray],
    k: int,
    ruled: Ruled,
    lap: Callable[[str], None],
) -> Iterator[tuple[int, Ranked, float]]:
    """The answers of a model with factors, each with the row that it is of: up to k items, best first.

    Behind each the share of all items that could not be searched, see `index.Nearest`. `unwanted` are items
    that must not come back. A list's cosines are those of the model's own vectors.
    """
    model, index, factors = searched.model, searched.index, searched.model.factors
    assert factors is not None
    lap("search")
    user_nd = model.user_vectors(rows).user[:, 0]
    factor_nD = factors.of_users([row.met for row in rows])
    alone, both = factors.queries(user_nd), factors.queries(user_nd, factor_nD)
    lap("vectors")
    met = [row.met.item[~model.is_removed(row.met.item)] for row in rows]
    apart = [len(np.union1d(*two)) for two in zip(met, unwanted, strict=True)]
    fetch = max(1, min(k + max(apart), model.n_items))
    corpus_n = np.full(len(rows), CORPUS)
    # The sum by the first k alone: what others of the call have fetched must not change a user's answer.
    near = index.nearest(both.vector, corpus_n, fetch, both.scale, k, tuple(ruled.excluded))
    items = []
    for n, fetched in enumerate(near.item):
        head = fetched[: k + apart[n]]  # as many as this row alone would have fetched
        if near.unsearched[n]:  # whether the others are of what was searched cannot be known
            met[n] = met[n][np.isin(met[n], head)]
        items.append(np.concatenate([head[(head >= 0) & ~np.isin(head, met[n])], met[n]]))
    cosines = [model.item_vectors(item) @ user_D for item, user_D in zip(items, user_nd, strict=True)]
    owns = [model.corpus_scale * cosine.astype(np.float64) for cosine in cosines]
    sum_n = _sums(index, alone, items, owns)
    for n, (item, cosine, own) in enumerate(zip(items, cosines, owns, strict=True)):
        if near.unsearched[n] == 1 or sum_n[n] == -np.inf:
            yield n, Ranked.nothing(CORPUS, shares[n]), 1.0
            continue
        pool = own + factors.weight * (factors.item[item] @ factor_nD[n])
        log_prob = _divided(own, pool, sum_n[n], near.normaliser[n], len(item) - len(met[n]))
        keep = ~np.isin(item, unwanted[n])
        if ruled.excluded:
            keep &= ~np.isin(model.category_of(item), list(ruled.excluded))
        best = np.flatnonzero(keep)[np.argsort(-log_prob[keep], kind="stable")[:k]]
        yield (
            n,
            Ranked(CORPUS, shares[n], item[best], cosine[best], log_prob[best]),
            float(near.unsearched[n]),
        )


def _sums(
    index: Searchable, queries: Queries, items: list[np.ndarray], logits: list[np.ndarray]
) -> np.ndarray:
    """[n] log of the summed exp of all items that can be found; of them, a row's own count exactly."""
    n, widest = len(items), max(map(len, items), default=0)
    item_nk = np.full((n, max(1, widest)), -1, np.int64)
    cosine_nk = np.full(item_nk.shape, -np.inf)
    for row, (item, logit) in enumerate(zip(items, logits, strict=True)):
        item_nk[row, : len(item)], cosine_nk[row, : len(item)] = item, logit / queries.scale[row]
    return index.log_normaliser(queries.vector, np.full(n, CORPUS), queries.scale, item_nk, cosine_nk)


def _divided(own: np.ndarray, pool: np.ndarray, own_sum: float, pool_sum: float, new: int) -> np.ndarray:
    """[n] log probabilities: of the first `new` items, which the user has not met, and of those he has."""
    out = own - own_sum
    out[:new] = _left(own[new:], own_sum) + pool[:new] - (pool_sum + _left(pool[new:], pool_sum))
    return out


def _left(met: np.ndarray, log_sum: float) -> float:
    """Log of the share of the sum that is not of the items met."""
    of_met = np.exp(np.logaddexp.reduce(met, initial=-np.inf) - log_sum)
    return float(np.log(max(1 - of_met, _LEAST)))
