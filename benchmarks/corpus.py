"""Measures searches of all items, with a model's own vectors: looking at all, at the nearest groups, HNSW.

    OMP_NUM_THREADS=1 python benchmarks/corpus.py MODEL [--users 300] [--hnsw] [--json]

Users are drawn by their number of behaviors, as requests come, and are others than those by whom the index
was tuned. Each way answers the same users in turn, one at a time, on one thread, pages warm; k = 500. "found"
is the part of the truly nearest 500 (and 50) that is in the answer, "worst" that of the user in twenty who
fares worst. Beside FAISS's HNSW (`--hnsw`; 16-bit vectors, 32 links, built with 80) at several widths.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from longretriever import Retriever
from longretriever.clusters import Clusters
from longretriever.index import CORPUS, Index
from longretriever.retrieve.indexing import busy_users_vectors

K = 500
Answers = Callable[[np.ndarray], np.ndarray]  # a user vector [1, D] -> item numbers [k]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--hnsw", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    faiss.omp_set_num_threads(1)
    retriever = Retriever.load(args.model)
    vectors, index = (
        busy_users_vectors(retriever, args.users, np.random.default_rng(1)),
        retriever._of_all.index,
    )
    assert isinstance(index, Index)
    groups, index._clusters = index._clusters, None
    rows = [_measured("look at all", lambda user: index.search(user, np.array([CORPUS]), K)[0][0], vectors)]
    truth = rows[0].pop("answers")
    others = [*_grouped(groups), *(_hnsw(retriever) if args.hnsw else ())]
    rows += [_measured(name, answer, vectors, truth) for name, answer in others]
    for row in rows:
        row["times_faster"] = round(rows[0]["ms"] / row["ms"], 1)
    report = {"items": index.n_items, "users": len(vectors), "ways": rows}
    print(json.dumps(report, indent=1)) if args.json else Console().print(_table(report))


def _grouped(groups: Clusters | None) -> Iterator[tuple[str, Answers]]:
    if groups is None:
        return
    chosen = groups.probes
    for factor in (0.25, 0.5, 1, 2):
        probes = max(1, round(factor * chosen))

        def answer(user: np.ndarray, probes: int = probes) -> np.ndarray:
            groups.probes = probes
            return groups.search(user, K)[0][0]

        mark = ", as tuned" if factor == 1 else ""
        yield f"{probes:,} of {groups.number:,} groups{mark}", answer


def _hnsw(retriever: Retriever) -> Iterator[tuple[str, Answers]]:
    model = retriever._of_all.model
    vectors = model.searched_vectors(slice(None))
    graph = faiss.IndexHNSWSQ(vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, 32, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = 80
    start = time.perf_counter()
    graph.train(vectors[:1000])
    graph.add(vectors)
    built = time.perf_counter() - start
    for width in (500, 1_000, 2_000):

        def answer(user: np.ndarray, width: int = width) -> np.ndarray:
            graph.hnsw.efSearch = width
            return graph.search(user, K)[1][0]

        yield f"HNSW of width {width:,} (built in {built:,.0f} s)", answer


def _measured(
    name: str, answer: Answers, vectors: np.ndarray, truth: list[np.ndarray] | None = None
) -> dict[str, Any]:
    for user in vectors[:10]:
        answer(user[None])
    took, answers = [], []
    for user in vectors:
        start = time.perf_counter()
        answers.append(answer(user[None]))
        took.append(1e3 * (time.perf_counter() - start))
    found = [np.isin(a, b).mean() for a, b in zip(truth or answers, answers, strict=True)]
    first = [np.isin(a[:50], b).mean() for a, b in zip(truth or answers, answers, strict=True)]
    figures = {
        "ms": float(np.median(took)),
        "p99_ms": float(np.quantile(took, 0.99)),
        "found": float(np.mean(found)),
        "worst": float(np.quantile(found, 0.05)),
        "found_of_50": float(np.mean(first)),
    }
    row: dict[str, Any] = {"way": name, **{key: round(value, 4) for key, value in figures.items()}}
    return row if truth else {**row, "answers": answers}


def _table(report: dict[str, Any]) -> Table:
    table = Table("way", title=f"{report['items']:,} items, {report['users']:,} user vectors, k = {K}")
    for name in ("p50 ms", "p99 ms", "times faster", "found", "worst", "of the first 50"):
        table.add_column(name, justify="right")
    for row in report["ways"]:
        shares = [f"{row[name]:.3f}" for name in ("found", "worst", "found_of_50")]
        table.add_row(
            row["way"], f"{row['ms']:.2f}", f"{row['p99_ms']:.2f}", f"{row['times_faster']}", *shares
        )
    return table


if __name__ == "__main__":
    main()
