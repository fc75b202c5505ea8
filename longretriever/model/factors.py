"""What do people with a life like this one meet? Factors beside the vector that searches all items.

The vector of the user as a whole reads his last behaviors. A factorization of who met what (alternating least
squares; Hu, Koren, Volinsky 2008) knows no order and no features, but it reads far more of a life: the user's
factor is solved anew at each request from thousands of items, and how often each was met. The two are pooled
in the logits, `scale * cosine + weight * x·y`. `pooling.py` learns the factors and says which weight; this is
what serving needs, without PyTorch.

One search finds the highest sums: `[scale * e, weight * y]` of an item, brought to one length by a last
number, is what the index holds, and `[u, x, 0]` of a user, of length 1, is what is searched for. Inner
products become cosines (the padding trick of maximum inner product search): nothing of the index changes.

I items, n of them, d width of vectors, D of factors, W = d + D + 1 of what is searched: 2 d, as D is d - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longretriever.saved import Folder, Manifest

SURE = 40.0
"""What each event adds to the confidence in a pair of user and item."""

REGULARIZATION = 100.0

READ, MOST = 8_192, 2_000
"""Last behaviors of a life that are read, and distinct items of them, those met last, that count: a request
costs the same however long the life. docs/log.md has what that costs and saves."""

ITEM_FACTOR = "item_factor"
_GRAM, _WEIGHT = "factor_gram", "factor_weight"


class Met(NamedTuple):
    """Distinct items of a life, in a model's numbers, and how often each was met."""

    item: np.ndarray  # [n]
    times: np.ndarray  # [n]


NOTHING = Met(np.empty(0, np.int64), np.empty(0, np.int64))


class Queries(NamedTuple):
    """What is searched for among the vectors of an index."""

    vector: np.ndarray  # [n, W] of length 1
    scale: np.ndarray  # [n] that makes logits of cosines


@dataclass(frozen=True)
class Factors:
    """The factors that a model was saved with.

    item     [I, D] float32; 0 of an item that did not occur in training
    gram     [D, D] float64: the sum of y yᵀ over all items, and the regularization on its diagonal
    weight   of x·y in the pooled logits, above 0
    longest  the greatest length of `[scale * e, weight * y]` of all items
    """

    item: np.ndarray
    gram: np.ndarray
    weight: float
    longest: float

    @classmethod
    def of(cls, item_ID: np.ndarray, scale: float, weight: float) -> Factors:
        """Of item factors, for a model of this scale."""
        squares = np.einsum("id,id->i", item_ID, item_ID, dtype=np.float64)
        longest = float(np.sqrt(scale**2 + weight**2 * squares.max(initial=0.0)))
        return cls(item_ID, gram(item_ID, REGULARIZATION), weight, longest)

    @classmethod
    def opened(cls, manifest: Manifest) -> Factors | None:
        """Those of a model folder; None where it has none."""
        if f"{ITEM_FACTOR}.npy" not in manifest.files:
            return None
        weight, longest = manifest.load_array(_WEIGHT, mmap=False).tolist()
        return cls(manifest.load_array(ITEM_FACTOR), manifest.load_array(_GRAM, mmap=False), weight, longest)

    def save(self, folder: Folder) -> None:
        """All as arrays, the weight too: a folder's fingerprint is of its files."""
        folder.save_array(ITEM_FACTOR, self.item)
        folder.save_array(_GRAM, self.gram)
        folder.save_array(_WEIGHT, np.array([self.weight, self.longest]))

    def width(self, dim: int) -> int:
        """W, of vectors of so many numbers."""
        return dim + self.item.shape[1] + 1

    def of_user(self, met: Met) -> np.ndarray:
        """[D] the factor of who met these; 0 of who met nothing that has one.

        O(n D² + D³): .08 ms for 200 items, .75 for 2,000, on one thread.
        """
        return user_factor(self.item[met.item], SURE * met.times, self.gram)

    def items(self, vector_nd: np.ndarray, scale: float, items: slice | np.ndarray) -> np.ndarray:
        """[n, W] what the index holds of these items, of length 1; `vector_nd` are their own vectors."""
        both = np.concatenate([scale * vector_nd, self.weight * self.item[items]], axis=1, dtype=np.float32)
        rest = self.longest**2 - np.einsum("nw,nw->n", both, both, dtype=np.float64)
        pad = np.sqrt(np.maximum(rest, 0.0))[:, None]
        return np.concatenate([both, pad], axis=1, dtype=np.float32) / np.float32(self.longest)

    def of_users(self, met: Sequence[Met]) -> np.ndarray:
        """[n, D] the same of each of n users."""
        return np.array([self.of_user(one) for one in met]).reshape(len(met), self.item.shape[1])

    def queries(self, vector_nd: np.ndarray, factor_nD: np.ndarray | None = None) -> Queries:
        """Users of these vectors and factors: their cosines and scales make pooled logits.

        Without factors they make the logits of the vectors alone.
        """
        if factor_nD is None:
            factor_nD = np.zeros((len(vector_nd), self.item.shape[1]))
        both = np.concatenate([vector_nd, factor_nD, np.zeros((len(vector_nd), 1))], axis=1)
        length = np.linalg.norm(both, axis=1)
        return Queries((both / length[:, None]).astype(np.float32), self.longest * length)


def gram(factor_ID: np.ndarray, regularization: float) -> np.ndarray:
    """[D, D] what all items, met or not, and the regularization have to say about a user's factor."""
    factor = factor_ID.astype(np.float64)
    return factor.T @ factor + regularization * np.eye(factor.shape[1])


def user_factor(factor_nD: np.ndarray, confidence_n: np.ndarray, gram_DD: np.ndarray) -> np.ndarray:
    """[D] the factor of least squared error for a user, given those of the n items met.

    x = (YᵀY + Σ (c - 1) y yᵀ + λ)⁻¹ Σ c y, c the confidence in each of them (Hu, Koren, Volinsky 2008).
    """
    factor = factor_nD.astype(np.float64)
    left = gram_DD + factor.T @ (factor * (confidence_n - 1)[:, None])
    return np.linalg.solve(left, confidence_n @ factor)
