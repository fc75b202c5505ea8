"""Have a user's several vectors become one? Their cosines say, of a trained model asked as in serving.

Interests that all point the same way are searched for K times and find one list: a known way for methods of
several interests to fail in silence. Nothing here needs PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from longretriever.model.exported import Model, Request

SAME = 0.9
"""A user whose interests are all at least this similar, by cosine, has one interest."""

_AT_ONCE = 256  # requests of one call


class InterestSimilarity(NamedTuple):
    """How alike the interests of users are. NaN where no user has two."""

    mean: float  # cosine of two interests of a user, over all pairs, then over users
    collapsed: float  # share of users of whom every pair is `SAME` or above
    users: int  # that have two interests or more, and count
    interests: float  # of a user on average, over all requests


def interest_similarity(model: Model, requests: list[Request]) -> InterestSimilarity:
    """How alike the user vectors of each of these requests are; of contexts each request is one of them."""
    means, least, counts = [], [], []
    for at in range(0, len(requests), _AT_ONCE):
        found = model.user_vectors(requests[at : at + _AT_ONCE])
        for user_Vd, n in zip(found.user, found.interests, strict=True):
            counts.append(int(n))
            if n > 1:
                cosine = (user_Vd[:n] @ user_Vd[:n].T)[np.triu_indices(n, 1)]
                means.append(cosine.mean())
                least.append(cosine.min())
    if not means:
        return InterestSimilarity(np.nan, np.nan, 0, float(np.mean(counts)) if counts else np.nan)
    collapsed = float((np.array(least) >= SAME).mean())
    return InterestSimilarity(float(np.mean(means)), collapsed, len(means), float(np.mean(counts)))
