"""LongRetriever's index, and what it might be instead: 8-bit lists, HNSW for big categories.

Runs in the environment of this project.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import faiss
import numpy as np
from index_common import Answers, Peer, best_of, brute_force, main, recall, say, timed

from longretriever.index import Index, build

LINKS, BUILT_WITH = 32, 80  # of HNSW, as in benchmarks/corpus.py
WIDTHS = (500, 700, 1_000, 1_400, 2_000, 2_800, 4_000, 5_600, 8_000)
ROUNDS = 3  # of which the best time counts


class Ours(Peer):
    def build(self) -> None:
        build(self.data.items, self.data.start, self.folder / "index", made_from={})

    def open(self) -> None:
        self.index = Index.open(self.folder / "index")

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        return self.index.search(users_ND, contexts_N, self.data.K)[0]


class EightBits(Peer):
    """Lists of 8 bits a dimension, whose ranges are those of a sample of the items."""

    def build(self) -> None:
        items, start = self.data.items, self.data.start
        kind, metric = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        quantizer = faiss.IndexFlatIP(items.shape[1])
        lists = faiss.IndexIVFScalarQuantizer(quantizer, quantizer.d, len(start) - 1, kind, metric, False)
        some = np.sort(np.random.default_rng(0).choice(len(items), min(len(items), 100_000), replace=False))
        sample = np.ascontiguousarray(items[some])
        lists.sq.train(sample)
        lists.is_trained = True
        for first, chunk in self.data.chunks("8 bits"):
            number = np.arange(first, first + len(chunk))
            category = np.searchsorted(start, number, side="right") - 1
            lists.add_core(len(chunk), *(faiss.swig_ptr(array) for array in (chunk, number, category)))
        faiss.write_index(lists, str(self.folder / "lists.faiss"))

    def open(self) -> None:
        self.lists = faiss.read_index(str(self.folder / "lists.faiss"), faiss.IO_FLAG_MMAP)
        faiss.downcast_InvertedLists(self.lists.invlists).prefetch_nthread = 0

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        return self.lists.search_preassigned(users_ND, width or self.data.K, contexts_N[:, None], None)[1]


class EightBitsReranked(EightBits):
    """The best `width` by 8 bits are put in order by 16-bit vectors, in a mapped file beside them."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.widths = (self.data.K * 3 // 2, self.data.K * 2)
        self.every_width = True

    def build(self) -> None:
        super().build()
        half = np.lib.format.open_memmap(
            self.folder / "vectors.npy", mode="w+", dtype=np.float16, shape=self.data.items.shape
        )
        for first, chunk in self.data.chunks("16 bits"):
            half[first : first + len(chunk)] = chunk
        half.flush()

    def open(self) -> None:
        super().open()
        self.half = np.load(self.folder / "vectors.npy", mmap_mode="r")

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        answers = []
        for user, found in zip(users_ND, super().search(users_ND, contexts_N, width), strict=True):
            item = found[found >= 0]
            cosine = self.half[item].astype(np.float32) @ user
            answers.append(item[best_of(cosine, self.data.K)])
        return answers


class OursBesideGraphs(Ours):
    """An HNSW of 16-bit vectors for each big category, ours for the others."""

    widths = (500, 1_000, 2_000, 4_000, 8_000)
    every_width = True

    def build(self) -> None:
        super().build()
        built = {}
        for category in map(int, np.flatnonzero(np.diff(self.data.start) >= self.data.big)):
            first, last = self.data.range(category)
            say(f"HNSW of category {category}, {last - first:,} items")
            seconds, graph = timed(partial(self._graph, first, last))
            file = self.folder / f"{category}.faiss"
            faiss.write_index(graph, str(file))
            built[category] = {"build_s": seconds, "megabytes": file.stat().st_size / 1e6}
        (self.folder / "built.json").write_text(json.dumps(built))

    def _graph(self, first: int, last: int) -> faiss.IndexHNSWSQ:
        vectors = np.ascontiguousarray(self.data.items[first:last])
        half, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        graph = faiss.IndexHNSWSQ(vectors.shape[1], half, LINKS, metric)
        graph.hnsw.efConstruction = BUILT_WITH
        graph.is_trained = True  # 16-bit floats have nothing to learn
        graph.add(vectors)
        return graph

    def open(self) -> None:
        super().open()
        self.built = {int(c): of for c, of in json.loads((self.folder / "built.json").read_text()).items()}
        self.graphs = {c: faiss.read_index(str(self.folder / f"{c}.faiss")) for c in self.built}

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        answers: list[Any] = [None] * len(users_ND)
        in_graph = np.isin(contexts_N, list(self.graphs))
        for n in np.flatnonzero(in_graph):
            answers[n] = self._in_graph(users_ND[n], contexts_N[n], width)
        rest = np.flatnonzero(~in_graph)
        for n, answer in zip(rest, super().search(users_ND[rest], contexts_N[rest], width), strict=True):
            answers[n] = answer
        return answers

    def _in_graph(self, user: np.ndarray, category: int, width: int | None) -> np.ndarray:
        graph = self.graphs[category]
        graph.hnsw.efSearch = width
        return self.data.range(category)[0] + graph.search(user[None], self.data.K)[1][0]

    def more(self) -> dict[str, Any]:
        return {"by_size": [self._of_one(s) for s in range(len(self.data.large))]}

    def _of_one(self, s: int) -> dict[str, Any]:
        """A context alone, in one big category: NumPy, ours, and the graph at each width.

        Each way asks all users before the next way does, else it would find the pages of the one before.
        """
        category, users = int(self.data.large[s]), np.array(self.data.large_users[s])
        first, last = self.data.range(category)
        ways: dict[Any, Callable[[np.ndarray], np.ndarray]] = {
            "numpy": lambda user: brute_force(self.data, self.data.items, user[None], np.array([category]))[
                0
            ],
            "ours": lambda user: self.index.search(user[None], np.array([category]), self.data.K)[0][0],
            **{width: partial(self._in_graph, category=category, width=width) for width in WIDTHS},
        }
        best = {way: np.full(len(users), np.inf) for way in ways}
        found: dict[Any, Any] = {}
        for _, (way, ask) in itertools.product(range(ROUNDS), ways.items()):
            say(f"one category of {last - first:,} items: {way}")
            took, found[way] = zip(*(timed(partial(ask, user)) for user in users), strict=True)
            best[way] = np.minimum(best[way], took)
        ms = {way: 1e3 * float(np.median(took)) for way, took in best.items()}
        recalls = {
            way: float(np.mean([recall(t, a) for t, a in zip(found["numpy"], answers, strict=True)]))
            for way, answers in found.items()
        }
        return {
            "items": last - first,
            "numpy_ms": ms["numpy"],
            "ours_ms": ms["ours"],
            "ours_recall": recalls["ours"],
            **self.built[category],
            "points": [{"width": width, "recall": recalls[width], "ms": ms[width]} for width in WIDTHS],
        }


if __name__ == "__main__":
    main({"ours": Ours, "int8": EightBits, "int8-reranked": EightBitsReranked, "hnsw-big": OursBesideGraphs})
