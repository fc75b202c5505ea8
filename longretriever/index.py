"""Which items of a category lie nearest to a user vector: one FAISS list per category, scanned whole.

A category is a range of item numbers, so no clusters are trained: list c of an inverted file *is* category c,
and one call answers all contexts of a request. Vectors are kept as 16-bit floats: half the memory of 32-bit
ones, recall@500 above 0.999 of exact. The file is memory-mapped: it opens in milliseconds whatever its size,
and a search touches the pages of its own categories only. Where all items are asked and there are many, a
second file groups them by nearness instead (`clusters.py`). `ExactIndex` is the same by brute force over a
plain array, the reference. A part of the categories can be searched alone, on another machine: `combined`
makes of several parts' answers that of all items.

Axes: I items, C categories, D dimensions, N contexts (each with its own user vector), k results of each.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np

from longretriever import clusters as by_nearness
from longretriever.clusters import Clustering, Clusters, inverted_file, read_inverted_file
from longretriever.errors import InputError, UnknownCategory
from longretriever.saved import Manifest, opening, writing

SAMPLE = 1024
"""Items of each large category whose vectors are kept for `log_normaliser`."""

LARGE = 8
"""A category is large above this many times the sample (8,192 items): below, scanning it costs no more."""

CORPUS = -1
"""As a context: items of all categories."""

_WIDTHS = np.array([16, 32, 64, 128, 256])  # results: categories that hold up to each are searched together
_CHUNK = 1 << 16  # items: 16 MB of 64-dimensional float32
CLUSTERS = "clusters.faiss"
_LISTS = "lists.faiss"


def build(
    item_vectors_ID: np.ndarray | Iterable[np.ndarray],
    category_start: np.ndarray,
    out: str | os.PathLike[str],
    *,
    made_from: dict[str, str],
    without: np.ndarray | None = None,
    sample: int = SAMPLE,
    seed: int = 0,
    clustering: Clustering | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write an index folder for items in order of their numbers.

    `item_vectors_ID` is an array (a memory-mapped one is read once, in chunks) or an iterable of chunks
    [n, D] that together hold all items; each vector has length 1. `category_start` [C+1] is the first item
    number of each category; a category may be empty. `made_from` maps kinds to fingerprints ("store",
    "model"). `without` are item numbers that no search shall find. `sample` and `seed` choose the items
    behind `log_normaliser`. `clustering` groups items by nearness as well, for searches of all of them.
    `progress` is called with items done and items in all.

    Memory: 2 bytes a dimension and 8 more for each item, twice that with `clustering`, and one chunk. Time:
    under 1 s for a million items; with `clustering` 5 s, and that of scanning all items for each query.

    Raises `InputError` on vectors that are not of length 1 or not as many as `category_start` says.
    """
    category_start = _checked_starts(category_start)
    n_items, n_categories = int(category_start[-1]), len(category_start) - 1
    there = _there(n_items, without)
    sample_start, sample_item = _choose_sample(category_start, there, sample, np.random.default_rng(seed))
    with writing(out, "index") as folder:
        chunks = _checked_chunks(item_vectors_ID, n_items)
        lists, sample_vector = _encode(chunks, category_start, there, sample_item, clustering, progress)
        faiss.write_index(lists, str(folder.path / _LISTS))
        if clustering is not None and (facts := clustering.facts or _tuned(clustering, lists)):
            folder.facts["clusters"] = facts
            faiss.write_index(clustering.groups, str(folder.path / CLUSTERS))
        folder.save_array("category_start", category_start)
        folder.save_array("sample_start", sample_start)
        folder.save_array("sample_item", sample_item)
        folder.save_array("sample_vector", sample_vector)
        folder.made_from.update(made_from)
        folder.facts.update(
            items=n_items,
            without=n_items - lists.ntotal,
            categories=n_categories,
            dimension=lists.d,
            sample=sample,
            seed=seed,
        )


class Nearest(NamedTuple):
    """What user vectors found, each in its own context.

    item        [N, k] see `Index.search`
    cosine      [N, k]
    normaliser  [N] see `Index.log_normaliser`
    unsearched  [N] share of the context's items that could not be asked: 0, but for an index on several
                machines of which one is down; at 1 nothing is known
    """

    item: np.ndarray
    cosine: np.ndarray
    normaliser: np.ndarray
    unsearched: np.ndarray


class Part(NamedTuple):
    """What some categories have to say to a search of all items: see `Index.search_part` and `combined`.

    item           [N, k] the nearest of these categories, as `Index.search` returns them
    cosine         [N, k]
    log_sum        [N] of all items of these categories; None where it is estimated from a sample
    sample_item    [S] those of the sample of all items that are of these categories
    sample_cosine  [N, S]
    size           how many items these categories hold
    all_seen       whether each was looked at, and not the nearest groups alone
    """

    item: np.ndarray
    cosine: np.ndarray
    log_sum: np.ndarray | None
    sample_item: np.ndarray
    sample_cosine: np.ndarray
    size: int
    all_seen: bool


class Searchable(ABC):
    """What finds items near to user vectors, wherever they are kept: here, in shards, in a database.

    category_start  [C+1] first item number of each category
    """

    category_start: np.ndarray
    n_items: int
    n_categories: int
    dimension: int

    @abstractmethod
    def search(
        self, user_vectors_ND: np.ndarray, contexts_N: np.ndarray, k: int, without: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""

    @abstractmethod
    def log_normaliser(
        self,
        user_vectors_ND: np.ndarray,
        contexts_N: np.ndarray,
        scale: float | np.ndarray,
        items_Nk: np.ndarray,
        cosine_Nk: np.ndarray,
    ) -> np.ndarray:
        """See `Index.log_normaliser`."""

    def nearest(
        self,
        user_vectors_ND: np.ndarray,
        contexts_N: np.ndarray,
        k: int,
        scale: float | np.ndarray,
        head: int,
        without: Sequence[int] = (),
    ) -> Nearest:
        """Both at once, the sum from the first `head` found: what is asked over a network goes once."""
        item_Nk, cosine_Nk = self.search(user_vectors_ND, contexts_N, k, without)
        heads = item_Nk[:, :head], cosine_Nk[:, :head]
        normaliser_N = self.log_normaliser(user_vectors_ND, contexts_N, scale, *heads)
        return Nearest(item_Nk, cosine_Nk, normaliser_N, np.zeros(len(item_Nk)))


class Index(Searchable):
    """A folder written by `build`, opened read-only; safe to search from several threads.

    category_start  [C+1] first item number of each category
    sample_item     [S] item numbers of the sample, sorted within each of the ranges in `sample_start` [C+2]:
                    one for each category, and one of the whole corpus
    sample_vector   [S, D] float32: converting from 16 bits would take most of `log_normaliser`'s time
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.path = manifest.path
        self.fingerprint = manifest.fingerprint
        self.category_start = manifest.load_array("category_start", mmap=False)
        self.sample_start = manifest.load_array("sample_start", mmap=False)
        self.sample_item = manifest.load_array("sample_item")
        self.sample_vector = manifest.load_array("sample_vector")
        self.n_items, self.n_categories = int(self.category_start[-1]), len(self.category_start) - 1
        # How many lists a search visits is a property of the opened file, so there is one for each number.
        self._faiss, self._all = _read_lists(manifest), _read_lists(manifest)
        self._all.nprobe = self.n_categories
        lists = faiss.downcast_InvertedLists(self._faiss.invlists)
        sizes = [*map(lists.list_size, range(self.n_categories)), self._faiss.ntotal]
        self._sizes = np.array(sizes)  # [C+1] of each category; the last, where CORPUS looks, of all items
        self._clusters = _read_clusters(manifest)
        self.dimension: int = self._faiss.d

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Index:
        """Open an index folder; `verify=True` also hashes every file. Raises a `SavedError`."""
        return cls(opening(path, "index", verify))

    def search(
        self, user_vectors_ND: np.ndarray, contexts_N: np.ndarray, k: int, without: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k items nearest to each user vector within its own context, nearest first.

        The context `CORPUS` asks for items of all categories but those in `without`. That costs a scan of
        all, or of the nearest groups where items are grouped, which misses some: see the manifest.

        Returns item numbers [N, k] (int64) and cosines [N, k] (float32), for user vectors of length 1. A
        category of fewer than k items is padded with item -1 and cosine -inf. Items of equal cosine come in
        order of their numbers; which of those that tie for the last place is kept is repeatable, but
        otherwise unspecified.

        Costs 10 to 30 ns for each item of the categories asked, and for k = 500 some 0.1 ms a context, on one
        thread; FAISS gives each context a thread of its own where `faiss.omp_set_num_threads` allows more.
        """
        user_ND, context_N = checked_queries(
            user_vectors_ND, contexts_N, k, self.dimension, self.n_categories
        )
        if len(user_ND) == 0:
            return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
        cosine_Nk = np.full((len(user_ND), k), -np.inf, np.float32)
        item_Nk = np.full((len(user_ND), k), -1, np.int64)
        for rows, width in self._alike(context_N, k):
            found = self._faiss.search_preassigned(user_ND[rows], width, context_N[rows, None], None)
            cosine_Nk[rows, :width], item_Nk[rows, :width] = _in_order(*found)
        whole_N = context_N == CORPUS
        if whole_N.any():
            item, cosine = self._search_all(user_ND[whole_N], k, without)
            cosine_Nk[whole_N], item_Nk[whole_N] = _in_order(cosine, item)
        return item_Nk, cosine_Nk

    def _alike(self, context_N: np.ndarray, k: int) -> Iterator[tuple[np.ndarray, int]]:
        """Rows that search one category, by how many results it can give: FAISS sorts room for k anyhow."""
        bucket_N = np.searchsorted(_WIDTHS, np.minimum(self._sizes[context_N], k))
        bucket_N[context_N == CORPUS] = -1
        for bucket in np.unique(bucket_N[bucket_N >= 0]):
            width = min([k, *_WIDTHS[bucket : bucket + 1].tolist()])
            yield np.flatnonzero(bucket_N == bucket), width

    def _search_all(
        self, user_ND: np.ndarray, k: int, without: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._clusters is not None:
            item_Nk, cosine_Nk = self._clusters.search(user_ND, k, self._ranges_of(without))
            if (item_Nk >= 0).all():
                return item_Nk, cosine_Nk  # else the groups held fewer than k
        of_all = np.arange(self.n_categories)
        of_all[list(without)] = -1  # no list is searched for it
        every = np.tile(of_all, (len(user_ND), 1))
        cosine_Nk, item_Nk = self._all.search_preassigned(user_ND, k, every, None)
        return item_Nk, cosine_Nk

    def log_normaliser(
        self,
        user_vectors_ND: np.ndarray,
        contexts_N: np.ndarray,
        scale: float | np.ndarray,
        items_Nk: np.ndarray,
        cosine_Nk: np.ndarray,
    ) -> np.ndarray:
        """[N] log of the sum of exp(scale * cosine) over ALL items of each context.

        It makes `scale * cosine` a log probability within the category. `items_Nk` and `cosine_Nk` are what
        `search` returned. Exact, by a second scan, unless the category is large (over 8,192 items); then the
        items fetched count exactly and the rest is estimated without bias from the category's sample.
        An empty category has -inf. docs/index.md has the measured error; costs 0.02 to 0.2 ms a context.
        """
        k = np.shape(items_Nk)[-1]
        user_ND, context_N = checked_queries(
            user_vectors_ND, contexts_N, k, self.dimension, self.n_categories
        )
        item_Nk, cosine_Nk = np.asarray(items_Nk), np.asarray(cosine_Nk)
        scale_N, there_N = np.broadcast_to(scale, len(user_ND)), (item_Nk >= 0).sum(axis=1)
        all_N = there_N == self._sizes[context_N]  # nothing of the category is missing
        log_sum_N = np.empty(len(user_ND))
        widest = int(there_N[all_N].max(initial=0))
        log_sum_N[all_N] = _log_sums(scale_N[all_N], cosine_Nk[all_N, :widest])
        for n in np.flatnonzero(~all_N):
            log_sum_N[n] = self._log_sum(user_ND[n], context_N[n], scale_N[n], item_Nk[n], cosine_Nk[n])
        return log_sum_N

    def _log_sum(
        self, user_D: np.ndarray, category: int, scale: float, item_k: np.ndarray, cosine_k: np.ndarray
    ) -> float:
        """Of one context of which there is more than was fetched."""
        fetched, cosine = item_k[item_k >= 0], cosine_k[item_k >= 0]
        size, at = int(self._sizes[category]), self.n_categories if category == CORPUS else category
        sample = slice(*self.sample_start[at : at + 2])  # empty unless there are many items
        if sample.start == sample.stop:
            cosine = self._all_cosines(user_D, category)
        if len(cosine) == 0:  # a corpus of which all categories are left out
            return -np.inf
        of_sample = self.sample_vector[sample] @ user_D
        return _estimated(scale, fetched, cosine, size, self.sample_item[sample], of_sample)

    def _all_cosines(self, user_D: np.ndarray, category: int) -> np.ndarray:
        """The cosine of every item of a category, in no order that matters."""
        if category == CORPUS:
            return self._cosines(self._all, user_D, np.arange(self.n_categories))
        return self._cosines(self._faiss, user_D, np.array([category]))

    def _cosines(self, lists: Any, user_D: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        every = -np.inf  # the radius
        _, cosine, _ = lists.range_search_preassigned(user_D[None], every, wanted[None], None)
        return cosine

    def search_part(
        self,
        user_vectors_ND: np.ndarray,
        k: int,
        scale: float | np.ndarray,
        categories: Sequence[range],
        without: Sequence[int] = (),
        look_at_all: bool = False,
    ) -> Part:
        """What the categories in these ranges have to say to a search of all items: see `combined`.

        Only their pages are touched. Where items are grouped, a part may find fewer than k that the others
        find; `look_at_all` passes the groups by. With k = 0 nothing is searched, for `summed`.
        """
        whole_N = np.full(len(user_vectors_ND), CORPUS)
        user_ND, _ = checked_queries(user_vectors_ND, whole_N, max(k, 1), self.dimension, self.n_categories)
        here = np.full(self.n_categories, -1)  # no list is searched for it
        for one in categories:
            here[one.start : one.stop] = one
        mine, found = here[here >= 0], here.copy()
        found[list(without)] = -1
        grouped = self._clusters is not None and not look_at_all and k > 0
        if k == 0:
            cosine_Nk, item_Nk = (
                np.empty((len(user_ND), 0), np.float32),
                np.empty((len(user_ND), 0), np.int64),
            )
        elif grouped:
            assert self._clusters is not None
            within = [
                slice(self.category_start[one.start], self.category_start[one.stop]) for one in categories
            ]
            cosine_Nk, item_Nk = self._clusters.search(user_ND, k, self._ranges_of(without), within)[::-1]
        else:
            every = np.tile(found, (len(user_ND), 1))
            cosine_Nk, item_Nk = self._all.search_preassigned(user_ND, k, every, None)
        cosine_Nk, item_Nk = _in_order(cosine_Nk, item_Nk)
        sample = self._sample_of(mine)
        sample_cosine = user_ND @ self.sample_vector[sample].T
        scale_N, log_sum_N = np.broadcast_to(scale, len(user_ND)), None
        if self.sample_start[-1] == self.sample_start[-2]:  # few enough for the sum to be exact
            log_sum_N = np.array(
                [
                    _log_sums(scale_N[n : n + 1], self._cosines(self._all, user_ND[n], here)[None])[0]
                    for n in range(len(user_ND))
                ]
            )
        size = int(self._sizes[mine].sum())
        return Part(item_Nk, cosine_Nk, log_sum_N, self.sample_item[sample], sample_cosine, size, not grouped)

    def _ranges_of(self, categories: Sequence[int]) -> list[slice]:
        """Of item numbers."""
        return [slice(self.category_start[c], self.category_start[c + 1]) for c in categories]

    def _sample_of(self, categories: np.ndarray) -> np.ndarray:
        """Where the sample of all items has those of these categories."""
        low, high = self.sample_start[-2:]
        of = np.searchsorted(self.category_start, self.sample_item[low:high], side="right") - 1
        return low + np.flatnonzero(np.isin(of, categories))


def combined(parts: Sequence[Part], k: int, scale: float | np.ndarray, head: int) -> Nearest:
    """The answer to a search of all items out of those of parts that share no category.

    Equal to `Index.nearest` of all of them, but for rounding: the k nearest of all; of exact sums the sum;
    and where there are too many items for that, the estimate from the whole sample, whose cosines parts send.
    """
    item_Nn, cosine_Nn = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
    order_Nk = np.lexsort((item_Nn, -cosine_Nn))[:, :k]
    item_Nk, cosine_Nk = (np.take_along_axis(x, order_Nk, axis=1) for x in (item_Nn, cosine_Nn))
    log_sum_N = summed(parts, scale, item_Nk[:, :head], cosine_Nk[:, :head])
    return Nearest(item_Nk, cosine_Nk, log_sum_N, np.zeros(len(item_Nk)))


def summed(
    parts: Sequence[Part], scale: float | np.ndarray, items_Nk: np.ndarray, cosine_Nk: np.ndarray
) -> np.ndarray:
    """[N] `Index.log_normaliser` of all items out of what parts that share no category say, but for rounding.

    Whatever items the parts found themselves: where the sum has to be estimated, these here count exactly.
    """
    exact = [part.log_sum for part in parts if part.log_sum is not None]
    if len(exact) == len(parts):
        return np.logaddexp.reduce(exact, axis=0)
    scale_N = np.broadcast_to(scale, len(items_Nk))
    sample_S = np.concatenate([part.sample_item for part in parts])
    order_S = np.argsort(sample_S)
    sample_NS = np.concatenate([part.sample_cosine for part in parts], axis=1)[:, order_S]
    size, log_sum_N = sum(part.size for part in parts), np.empty(len(items_Nk))
    for n, (item_k, cosine_k) in enumerate(zip(items_Nk, cosine_Nk, strict=True)):
        fetched = item_k >= 0
        log_sum_N[n] = _estimated(
            scale_N[n], item_k[fetched], cosine_k[fetched], size, sample_S[order_S], sample_NS[n]
        )
    return log_sum_N


class ExactIndex(Searchable):
    """`Index` by brute force over a plain array [I, D], memory-mapped or not: the reference.

    Scores are those of the array's own precision; all ties are broken by item number. `without` are item
    numbers that no search shall find.
    """

    def __init__(
        self, item_vectors_ID: np.ndarray, category_start: np.ndarray, without: np.ndarray | None = None
    ) -> None:
        self.category_start = _checked_starts(category_start)
        self.item_vectors_ID = item_vectors_ID
        self.n_items, self.n_categories = int(self.category_start[-1]), len(self.category_start) - 1
        if item_vectors_ID.ndim != 2 or len(item_vectors_ID) != self.n_items:
            raise InputError(
                f"Item vectors of shape {item_vectors_ID.shape}, expected [{self.n_items:,}, D] "
                "by the last entry of category_start."
            )
        self.dimension = item_vectors_ID.shape[1]
        self._there = _there(self.n_items, without)

    def search(
        self, user_vectors_ND: np.ndarray, contexts_N: np.ndarray, k: int, without: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`."""
        user_ND, context_N = checked_queries(
            user_vectors_ND, contexts_N, k, self.dimension, self.n_categories
        )
        item_Nk = np.full((len(user_ND), k), -1, np.int64)
        cosine_Nk = np.full((len(user_ND), k), -np.inf, np.float32)
        for row, (user_D, category) in enumerate(zip(user_ND, context_N, strict=True)):
            cosine = self._cosines(user_D, category)
            for c in without if category == CORPUS else ():
                cosine[slice(*self._range(c))] = -np.inf
            best = np.argsort(-cosine, kind="stable")[:k]
            best = best[cosine[best] > -np.inf]
            item_Nk[row, : len(best)] = self._range(category)[0] + best
            cosine_Nk[row, : len(best)] = cosine[best]
        return item_Nk, cosine_Nk

    def log_normaliser(
        self,
        user_vectors_ND: np.ndarray,
        contexts_N: np.ndarray,
        scale: float | np.ndarray,
        items_Nk: np.ndarray,
        cosine_Nk: np.ndarray,
    ) -> np.ndarray:
        """See `Index.log_normaliser`; here it is exact, and what was fetched is not looked at."""
        user_ND, context_N = checked_queries(
            user_vectors_ND, contexts_N, 1, self.dimension, self.n_categories
        )
        scale_N = np.broadcast_to(scale, len(user_ND))
        return np.array(
            [
                np.logaddexp.reduce(s * self._cosines(user_D, c).astype(np.float64), initial=-np.inf)
                for user_D, c, s in zip(user_ND, context_N, scale_N, strict=True)
            ]
        )

    def _cosines(self, user_D: np.ndarray, category: int) -> np.ndarray:
        """Of all its items; of those that no search shall find, -inf."""
        here = slice(*self._range(category))
        cosine = np.asarray(self.item_vectors_ID[here], dtype=np.float32) @ user_D
        return np.where(self._there[here], cosine, np.float32(-np.inf))

    def _range(self, category: int) -> tuple[int, int]:
        if category == CORPUS:
            return 0, self.n_items
        return int(self.category_start[category]), int(self.category_start[category + 1])


def _checked_starts(category_start: np.ndarray) -> np.ndarray:
    starts = np.asarray(category_start, dtype=np.int64)
    if starts.ndim != 1 or len(starts) < 2 or starts[0] != 0 or (np.diff(starts) < 0).any():
        raise InputError(
            f"category_start is {_abridged(starts)}, expected [C+1] ascending item numbers from 0: the first "
            "item of each category, then the number of items."
        )
    return starts


def _checked_chunks(item_vectors_ID: np.ndarray | Iterable[np.ndarray], n_items: int) -> Iterator[np.ndarray]:
    """Contiguous float32 chunks [n, D] of unit vectors, `n_items` rows in all."""
    done, dimension = 0, None
    for given in _chunks(item_vectors_ID):
        chunk = np.ascontiguousarray(given, dtype=np.float32)
        dimension = dimension or (chunk.shape[1] if chunk.ndim == 2 else None)
        if chunk.ndim != 2 or chunk.shape[1] != dimension:
            raise InputError(
                f"Item vectors of shape {chunk.shape} after {done:,} items, expected [n, {dimension or 'D'}]."
            )
        length = np.linalg.norm(chunk, axis=1)
        wrong = np.flatnonzero(~(np.abs(length - 1) < 0.01))  # so written, NaN is wrong too
        if len(wrong):
            raise InputError(
                f"The vector of item {done + wrong[0]:,} has length {length[wrong[0]]:.4g}, expected 1. "
                "Divide each vector by its length."
            )
        done += len(chunk)
        if done > n_items:
            break
        yield chunk
    if done != n_items:
        raise InputError(
            f"{'More than ' if done > n_items else ''}{min(done, n_items):,} item vectors, "
            f"expected {n_items:,} by the last entry of category_start. "
            "Pass vectors and category_start of one store."
        )


def _chunks(item_vectors_ID: np.ndarray | Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    if not isinstance(item_vectors_ID, np.ndarray):
        yield from item_vectors_ID
        return
    for start in range(0, max(1, len(item_vectors_ID)), _CHUNK):
        yield item_vectors_ID[start : start + _CHUNK]


def _there(n_items: int, without: np.ndarray | None) -> np.ndarray:
    """[I] whether a search may find each item."""
    there = np.ones(n_items, bool)
    if without is not None and len(without):
        if without.min() < 0 or without.max() >= n_items:
            raise InputError(f"without={_abridged(without)}: expected item numbers from 0 to {n_items - 1}.")
        there[without] = False
    return there


def _choose_sample(
    category_start: np.ndarray, there: np.ndarray, sample: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Ranges [C+2] and item numbers [S]: `sample` items of each large category, and of a large corpus."""
    if sample < 1:
        raise InputError(f"sample={sample}, expected at least 1.")
    number, before = np.flatnonzero(there), np.append(0, np.cumsum(there))[category_start]
    sizes, first = np.append(np.diff(before), len(number)), np.append(before[:-1], 0)
    counts = np.where(sizes > LARGE * sample, sample, 0)
    chosen = [
        number[first[c] + np.sort(rng.choice(sizes[c], sample, replace=False, shuffle=False))]
        for c in np.flatnonzero(counts)
    ]
    return np.concatenate([[0], np.cumsum(counts)]), np.concatenate([np.empty(0, np.int64), *chosen])


def _encode(
    chunks: Iterator[np.ndarray],
    category_start: np.ndarray,
    there: np.ndarray,
    sample_item: np.ndarray,
    clustering: Clustering | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[faiss.IndexIVFScalarQuantizer, np.ndarray]:
    """The filled lists and the vectors [S, D] of the sample, in one pass."""
    first = next(chunks, None)
    if first is None:
        raise InputError("No item vectors, so there is nothing to index. Pass at least one chunk [n, D].")
    # The quantizer stays empty: the list of an item is known, never searched for.
    lists = inverted_file(faiss.IndexFlatIP(first.shape[1]), len(category_start) - 1)
    sample_vector, done = np.empty((len(sample_item), first.shape[1]), np.float32), 0
    for chunk in itertools.chain([first], chunks):
        here = np.flatnonzero((sample_item >= done) & (sample_item < done + len(chunk)))
        sample_vector[here] = chunk[sample_item[here] - done]
        number = done + np.flatnonzero(there[done : done + len(chunk)])
        found = chunk if len(number) == len(chunk) else chunk[number - done]
        _add(lists, found, number, category_start)
        if clustering is not None:
            clustering.add(found, number)
        done += len(chunk)
        if progress is not None:
            progress(done, int(category_start[-1]))
    return lists, sample_vector


def _tuned(clustering: Clustering, lists: Any) -> dict[str, Any]:
    """How many groups are to be looked at; nothing where it is so many that all can be looked at as well."""
    groups, query_qD = clustering.groups, np.ascontiguousarray(clustering.queries, dtype=np.float32)
    every = np.tile(np.arange(lists.nlist), (len(query_qD), 1))
    lists.nprobe = lists.nlist
    _, item = lists.search_preassigned(query_qD, min(lists.ntotal, by_nearness.NEAREST), every, None)
    facts = by_nearness.tuned(groups, query_qD, item)
    return facts if facts["probes"] <= groups.nlist / 2 else {}


def _add(
    lists: faiss.IndexIVFScalarQuantizer, vector: np.ndarray, number: np.ndarray, category_start: np.ndarray
) -> None:
    category = np.searchsorted(category_start, number, side="right") - 1
    lists.add_core(len(vector), *(faiss.swig_ptr(array) for array in (vector, number, category)))


def _read_lists(manifest: Manifest) -> faiss.IndexIVFScalarQuantizer:
    facts = manifest.facts
    return read_inverted_file(manifest.path / _LISTS, facts["dimension"], _held(facts), facts["categories"])


def _read_clusters(manifest: Manifest) -> Clusters | None:
    facts = manifest.facts
    if "clusters" not in facts:
        return None
    sizes = facts["dimension"], _held(facts), facts["items"]
    return Clusters(manifest.path / CLUSTERS, *sizes, facts["clusters"])


def _held(facts: Mapping[str, Any]) -> int:
    """How many items a search may find."""
    return int(facts["items"]) - int(facts.get("without", 0))  # an older version left none out


def checked_queries(
    user_vectors_ND: np.ndarray, contexts_N: np.ndarray, k: int, dimension: int, n_categories: int
) -> tuple[np.ndarray, np.ndarray]:
    user_ND = np.ascontiguousarray(user_vectors_ND, dtype=np.float32)
    context_N = np.ascontiguousarray(contexts_N, dtype=np.int64)
    if user_ND.ndim != 2 or user_ND.shape[1] != dimension:
        raise InputError(
            f"User vectors of shape {user_ND.shape}, expected [N, {dimension}] as the index has them. "
            "Use the index made from this model."
        )
    if context_N.shape != user_ND.shape[:1]:
        raise InputError(
            f"{context_N.shape} contexts for {len(user_ND)} user vectors, expected one for each."
        )
    if not np.isfinite(user_ND).all():
        raise InputError("A user vector holds NaN or infinity, expected finite numbers.")
    strange = context_N[(context_N < CORPUS) | (context_N >= n_categories)]
    if len(strange):
        raise UnknownCategory(
            f"context {strange[0]} is not in the index, which has categories 0 to {n_categories - 1} "
            f"(and {CORPUS}: all). "
            "Use the index made from this store."
        )
    if k < 1:
        raise InputError(f"k={k}, expected at least 1.")
    return user_ND, context_N


def _estimated(
    scale: float,
    item_k: np.ndarray,
    cosine_k: np.ndarray,
    size: int,
    sample_S: np.ndarray,
    sample_cosine_S: np.ndarray,
) -> float:
    """Log of the sum over `size` items: the fetched count as they are, the sample stands for all others."""
    if len(cosine_k) == 0:
        return -np.inf
    best = float(cosine_k.max())
    total = _sum_exp(scale, cosine_k, best)
    if len(cosine_k) < size:
        rest = sample_cosine_S[_not_in(sample_S, item_k)]
        # With the whole sample among the fetched, next to nothing is left, and it is the least likely.
        total += (size - len(cosine_k)) * _sum_exp(scale, rest, best) / max(1, len(rest))
    return scale * best + float(np.log(total))


def _log_sums(scale_n: np.ndarray, cosine_nk: np.ndarray) -> np.ndarray:
    """[n] log of the sum of exp(scale * cosine) of each row; -inf pads it, and is the sum of none."""
    best_n1 = cosine_nk.max(axis=1, keepdims=True, initial=-1.0).astype(np.float64)
    with np.errstate(divide="ignore"):
        return scale_n * best_n1[:, 0] + np.log(np.exp(scale_n[:, None] * (cosine_nk - best_n1)).sum(axis=1))


def _sum_exp(scale: float, cosine: np.ndarray, best: float) -> float:
    return float(np.exp(scale * (cosine.astype(np.float64) - best)).sum())


def _in_order(cosine_nk: np.ndarray, item_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What FAISS found, with items of equal cosine sorted by number, and -inf where there is none."""
    cosine_nk[item_nk < 0] = -np.inf
    tied = np.zeros(
        (len(item_nk), item_nk.shape[1] + 1), np.int8
    )  # with the one before; none before the first
    tied[:, 1:-1] = (cosine_nk[:, 1:] == cosine_nk[:, :-1]) & (item_nk[:, 1:] >= 0)
    if tied.any():
        change = np.diff(tied, axis=1)
        starts, ends = np.nonzero(change == 1), np.nonzero(change == -1)
        for row, start, end in zip(*starts, ends[1], strict=True):  # runs are few and short
            item_nk[row, start : end + 1].sort()
    return cosine_nk, item_nk


def _not_in(sorted_items: np.ndarray, items: np.ndarray) -> np.ndarray:
    """[len(sorted_items)] whether each is absent from `items`."""
    absent = np.ones(len(sorted_items), dtype=bool)
    if len(sorted_items) == 0:
        return absent
    at = np.minimum(np.searchsorted(sorted_items, items), len(sorted_items) - 1)
    absent[at[sorted_items[at] == items]] = False
    return absent


def _abridged(array: np.ndarray) -> str:
    return np.array2string(array, threshold=6, edgeitems=2)
