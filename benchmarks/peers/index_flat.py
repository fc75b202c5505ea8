"""FAISS over all items with an ID selector for the category, and NumPy over the category's slice."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from index_common import Answers, Peer, brute_force, main

LINKS, BUILT_WITH = 32, 80  # as in benchmarks/corpus.py


class Slices(Peer):
    """Float32 in memory, not mapped: what the other times are measured by."""

    def build(self) -> None:
        np.save(self.folder / "items.npy", self.data.items)

    def open(self) -> None:
        self.items = np.load(self.folder / "items.npy")

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        return brute_force(self.data, self.items, users_ND, contexts_N)


class Flat(Peer):
    """One flat index. Items are numbered by category, so the filter is a range: FAISS scans that alone."""

    def build(self) -> None:
        self._write(faiss.IndexFlatIP(self.data.items.shape[1]))

    def _write(self, index: Any) -> None:
        for _, chunk in self.data.chunks(type(index).__name__, size=20_000):
            index.add(chunk)
        faiss.write_index(index, str(self.folder / "index.faiss"))

    def open(self) -> None:
        self.index = faiss.read_index(str(self.folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        return [
            self.index.search(user[None], self.data.K, params=self._parameters(*self.data.range(c), width))[
                1
            ][0]
            for user, c in zip(users_ND, contexts_N, strict=True)
        ]

    def _parameters(self, first: int, last: int, width: int | None) -> Any:
        return faiss.SearchParameters(sel=faiss.IDSelectorRange(first, last))


class FlatBitmap(Flat):
    """The same with a bit for each item: the filter of items that are in any order."""

    def open(self) -> None:
        super().open()
        self.bitmaps: dict[int, np.ndarray] = {}

    def _parameters(self, first: int, last: int, width: int | None) -> Any:
        if first not in self.bitmaps:  # kept, so that only the first of the passes pays for it
            wanted = np.zeros(len(self.data.items), bool)
            wanted[first:last] = True
            self.bitmaps[first] = np.packbits(wanted, bitorder="little")
        return faiss.SearchParameters(sel=faiss.IDSelectorBitmap(self.bitmaps[first]))


class Graph(Flat):
    """One HNSW of all items: it walks over items of other categories, and keeps those of the one asked."""

    widths = tuple(500 * 2**n for n in range(9))

    def build(self) -> None:
        graph = faiss.IndexHNSWFlat(self.data.items.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = BUILT_WITH
        self._write(graph)

    def _parameters(self, first: int, last: int, width: int | None) -> Any:
        return faiss.SearchParametersHNSW(sel=faiss.IDSelectorRange(first, last), efSearch=width)


if __name__ == "__main__":
    main({"numpy": Slices, "faiss-flat": Flat, "faiss-bitmap": FlatBitmap, "faiss-hnsw": Graph})
