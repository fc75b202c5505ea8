"""Searches all items without looking at all of them: only at the groups whose centres are nearest.

Items are grouped around centres that k-means finds, and each search looks at the items of the `probes`
nearest centres: FAISS's inverted file, vectors kept as 16-bit floats. How many that must be depends on where
users' vectors lie among the items', so it is measured: as few as find `RECALL` of the nearest `NEAREST`
items, on average over vectors of real users. docs/index.md has what that costs and saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist

from longretriever.errors import Damaged

FROM = 100_000
"""Items: of fewer, a search of all takes less than a millisecond."""

RECALL = 0.98
NEAREST = 500

_PER_CENTRE = 64  # items that k-means looks at for each centre
_ROUNDS = 8

Found = tuple[np.ndarray, np.ndarray]  # item numbers and cosines [N, k]


@dataclass
class Clustering:
    """Groups to put items into, and how many of them a search is to look at, or how to find that out.

    groups   from `empty` or `carried`
    holds    [I] whether the groups hold an item already; None: they are empty
    queries  [q, D] user vectors of length 1, to choose by how many groups are looked at
    facts    instead of `queries`: what `tuned` said before
    """

    groups: faiss.IndexIVFScalarQuantizer
    holds: np.ndarray | None = None
    queries: np.ndarray | None = None
    facts: dict[str, Any] | None = None

    def add(self, vector_nD: np.ndarray, number_n: np.ndarray) -> None:
        """Those of the items that are not there yet."""
        if self.holds is not None:
            new = ~self.holds[number_n]
            vector_nD, number_n = vector_nD[new], number_n[new]
        if len(number_n):
            self.groups.add_with_ids(vector_nD, number_n)


def how_many(n_items: int) -> int:
    """Centres for so many items: the power of two near twice the square root."""
    return 1 << round(np.log2(2 * np.sqrt(n_items)))


def centres(vectors: Callable[[np.ndarray], np.ndarray], n_items: int, seed: int = 0) -> np.ndarray:
    """[n, D] by k-means on some of the items, whose vectors [m, D] `vectors` gives by their numbers.

    64 items for each centre: 12 s for 4M items on one core.
    """
    n = how_many(n_items)
    rng = np.random.default_rng(seed)
    some = vectors(np.sort(rng.choice(n_items, min(n_items, n * _PER_CENTRE), replace=False)))
    options = {"niter": _ROUNDS, "spherical": True, "seed": seed, "max_points_per_centroid": _PER_CENTRE}
    k_means = faiss.Kmeans(some.shape[1], n, min_points_per_centroid=1, **options)
    k_means.train(np.ascontiguousarray(some, dtype=np.float32))
    return np.asarray(k_means.centroids)


def inverted_file(quantizer: faiss.IndexFlat, lists: int) -> faiss.IndexIVFScalarQuantizer:
    """Lists without items, of inner product and 16-bit floats; its codes are the vectors themselves."""
    kind, metric, by_residual = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    made = faiss.IndexIVFScalarQuantizer(quantizer, quantizer.d, lists, kind, metric, by_residual)
    made.is_trained = True
    return made


def read_inverted_file(file: Path, dimension: int, items: int, lists: int) -> faiss.IndexIVFScalarQuantizer:
    """Open one, memory-mapped. Raises `Damaged` for what is none, or of other sizes."""
    advice = f"Make {file.parent} again with `longretriever index`."
    try:
        opened = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise Damaged(f"{file}: not a FAISS file ({error}). {advice}") from error
    wanted = {"dimension": dimension, "items": items, "lists": lists}
    found = {"dimension": opened.d, "items": opened.ntotal, "lists": getattr(opened, "nlist", 0)}
    if not isinstance(opened, faiss.IndexIVFScalarQuantizer) or found != wanted:
        raise Damaged(
            f"{file}: a {type(opened).__name__} of {found}, expected an IndexIVFScalarQuantizer of {wanted}. "
            f"{advice}"
        )
    # Else FAISS starts threads at each search, to touch pages ahead.
    faiss.downcast_InvertedLists(opened.invlists).prefetch_nthread = 0
    return opened


def empty(centres_nD: np.ndarray) -> faiss.IndexIVFScalarQuantizer:
    """Groups without items."""
    quantizer = faiss.IndexFlatIP(centres_nD.shape[1])
    quantizer.add(np.ascontiguousarray(centres_nD, dtype=np.float32))
    return inverted_file(quantizer, len(centres_nD))


def carried(file: Path, number_I: np.ndarray) -> faiss.IndexIVFScalarQuantizer:
    """The groups of an older file with its items under their new numbers, -1: left out. As fast as a copy."""
    old = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    made = empty(faiss.downcast_index(old.quantizer).reconstruct_n(0, old.nlist))
    for group in range(old.nlist):
        item, code = get_invlist(old.invlists, group)
        number = number_I[item]
        kept = number >= 0
        number, code = number[kept], np.ascontiguousarray(code[kept])
        if len(number):
            pointers = faiss.swig_ptr(number), faiss.swig_ptr(code)
            made.invlists.add_entries(group, len(number), *pointers)
            made.ntotal += len(number)
    return made


def tuned(
    groups: faiss.IndexIVFScalarQuantizer, queries_qD: np.ndarray, nearest_qk: np.ndarray
) -> dict[str, Any]:
    """How many groups are to be looked at, as facts of the index: number, probes, recall, k, items then.

    `nearest_qk` are the items really nearest to the queries, -1 pads. All groups, where no fewer find enough.
    """
    there, k = (nearest_qk >= 0).sum(axis=1), nearest_qk.shape[1]
    probes, low, high = groups.nlist, 1, groups.nlist
    recall = 1.0
    while low <= high:  # recall rises with the probes
        middle = (low + high) // 2
        found, _ = _search(groups, queries_qD, k, middle, None)
        hits = [np.isin(a[:n], b).sum() for a, b, n in zip(nearest_qk, found, there, strict=True)]
        reached = float(np.mean(np.array(hits) / np.maximum(there, 1)))
        if reached >= RECALL:
            probes, recall, high = middle, reached, middle - 1
        else:
            low = middle + 1
    sizes = {"number": groups.nlist, "items": groups.ntotal}
    return {**sizes, "probes": probes, "recall": round(recall, 4), "k": k}


class Clusters:
    """A file written from `empty`, opened read-only; safe to search from several threads."""

    def __init__(self, file: Path, dimension: int, held: int, numbers: int, facts: Mapping[str, Any]) -> None:
        """Of `held` items, with numbers below `numbers`; `facts` are those of `tuned`. Raises `Damaged`."""
        self._groups, self._numbers = read_inverted_file(file, dimension, held, facts["number"]), numbers
        self.number, self.probes = int(facts["number"]), int(facts["probes"])

    def search(
        self, user_ND: np.ndarray, k: int, without: Sequence[slice] = (), within: Sequence[slice] = ()
    ) -> Found:
        """Items near to each user vector, nearest first, that are in none of these ranges of numbers.

        Only in those of `within`, where there are some. Padded with -1 where the groups looked at hold fewer.
        """
        selector = self._but(without) if len(without) else None
        if len(within):
            selector = _and(_within(within), selector)
        return _search(self._groups, user_ND, k, self.probes, selector)

    def _but(self, ranges: Sequence[slice]) -> Any:
        wanted = np.ones(self._numbers, bool)
        for one in ranges:
            wanted[one] = False
        return faiss.IDSelectorBitmap(np.packbits(wanted, bitorder="little"))


def _within(ranges: Sequence[slice]) -> Any:
    """Looks at no list of numbers, so it costs the same however many items there are."""
    first, *others = (faiss.IDSelectorRange(int(one.start), int(one.stop)) for one in ranges)
    for other in others:
        first = faiss.IDSelectorOr(first, other)
    return first


def _and(one: Any, other: Any) -> Any:
    return one if other is None else faiss.IDSelectorAnd(one, other)


def _search(groups: Any, user_ND: np.ndarray, k: int, probes: int, selector: Any) -> Found:
    options = {} if selector is None else {"sel": selector}
    cosine_Nk, item_Nk = groups.search(user_ND, k, params=faiss.SearchParametersIVF(nprobe=probes, **options))
    return item_Nk, cosine_Nk
