"""What do a vector of all items and factors find together? Items not met compete pooled, the others do not.

What the vector alone gives in all to items that the user has not met, `own + weight * x·y` divides among
them; an item met keeps what the vector alone gives it (docs/log.md). Factorization is good at repeats, which
would crowd out what is new; and whether people repeat at all, it does not know.

One search by the pooled logits, for as many more items as the user has met; two normalisers.

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

    Nothing is left unsearched (the last number, see `Retriever`): the index is one of this process.

    `unwanted` are items that must not come back. A list's cosines are those of the model's own vectors.
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
    found_nk, _ = index.search(both.vector, np.full(len(rows), CORPUS), fetch, tuple(ruled.excluded))
    for n in range(len(rows)):
        head = found_nk[n, : k + apart[n]]  # as many as this row alone would have fetched
        new = head[(head >= 0) & ~np.isin(head, met[n])]
        item = np.concatenate([new, met[n]])
        cosine = model.item_vectors(item) @ user_nd[n]
        own = model.corpus_scale * cosine.astype(np.float64)
        pool = own + factors.weight * (factors.item[item] @ factor_nD[n])
        sums = [_log_sum(index, q, n, item, x) for q, x in ((alone, own), (both, pool))]
        log_prob = _divided(own, pool, sums[0], sums[1], len(new))
        keep = ~np.isin(item, unwanted[n])
        if ruled.excluded:
            keep &= ~np.isin(model.category_of(item), list(ruled.excluded))
        best = np.flatnonzero(keep)[np.argsort(-log_prob[keep], kind="stable")[:k]]
        yield n, Ranked(CORPUS, shares[n], item[best], cosine[best], log_prob[best]), 0.0


def _log_sum(index: Searchable, queries: Queries, n: int, item: np.ndarray, logit: np.ndarray) -> float:
    """Log of the summed exp of all items that can be found, of which these count exactly."""
    query, scale, corpus = queries.vector[n], queries.scale[n], np.array([CORPUS])
    return float(index.log_normaliser(query[None], corpus, scale, item[None], logit[None] / scale)[0])


def _divided(own: np.ndarray, pool: np.ndarray, own_sum: float, pool_sum: float, new: int) -> np.ndarray:
    """[n] log probabilities: of the first `new` items, which the user has not met, and of those he has."""
    out = own - own_sum
    out[:new] = _left(own[new:], own_sum) + pool[:new] - (pool_sum + _left(pool[new:], pool_sum))
    return out


def _left(met: np.ndarray, log_sum: float) -> float:
    """Log of the share of the sum that is not of the items met."""
    of_met = np.exp(np.logaddexp.reduce(met, initial=-np.inf) - log_sum)
    return float(np.log(max(1 - of_met, _LEAST)))
