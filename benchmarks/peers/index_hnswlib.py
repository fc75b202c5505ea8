"""hnswlib: one HNSW of all items, with a Python function that says whether an item is of the category."""

from __future__ import annotations

import hnswlib
import numpy as np
from index_common import Answers, Peer, main

LINKS, BUILT_WITH = 16, 100


class Filtered(Peer):
    """The walk ends only when as many items of the category as `width` were found, or nothing is left."""

    widths = (500, 1_000, 2_000, 4_000)

    def build(self) -> None:
        graph = hnswlib.Index("ip", self.data.items.shape[1])
        graph.init_index(len(self.data.items), ef_construction=BUILT_WITH, M=LINKS)
        for first, chunk in self.data.chunks("hnswlib", size=20_000):
            graph.add_items(chunk, np.arange(first, first + len(chunk)))
        graph.save_index(str(self.folder / "graph.bin"))

    def open(self) -> None:
        self.graph = hnswlib.Index("ip", self.data.items.shape[1])
        self.graph.load_index(str(self.folder / "graph.bin"))

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        self.graph.set_ef(width)
        return [self._one(user, *self.data.range(c)) for user, c in zip(users_ND, contexts_N, strict=True)]

    def _one(self, user: np.ndarray, first: int, last: int) -> np.ndarray:
        k = min(self.data.K, last - first)
        try:
            labels, _ = self.graph.knn_query(user, k, num_threads=1, filter=lambda item: first <= item < last)
        except RuntimeError:  # it found fewer than k, and then gives none
            return np.empty(0, np.int64)
        return labels[0].astype(np.int64)


if __name__ == "__main__":
    main({"hnswlib": Filtered})
