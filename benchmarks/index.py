"""Measures a search of 5 contexts over 1M items in long-tailed categories, beside exact brute force.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python benchmarks/index.py [--json]

Category sizes fall as 1 / rank. Items and users scatter around centres, as many in a category as the square
root of its size, whose popularity falls as 1 / rank too. A context is drawn with probability proportional to
size ** power: 1 asks most for the largest (the hardest case), 0 for all alike. Index and brute force take
turns on the same queries, with warm pages, on one thread; all queries are asked in several passes, and the
best time of each counts, so that what else the machine does weighs less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil

from longretriever.index import ExactIndex, Index, build

K, N, SCALE = 500, 5, 20.0

Query = tuple[np.ndarray, np.ndarray]  # user vectors [N, D], contexts [N]


def main() -> None:
    args = _arguments()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    sizes = rng.multinomial(args.items, _falling(args.categories))
    start = np.concatenate([[0], np.cumsum(sizes)])
    items, centres = _clustered_items(sizes, args.dimension, rng)
    queries = [_query(sizes, centres, args.power, rng) for _ in range(args.queries)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        report = _build_and_open(items, start, path)
        index = Index.open(path)
        report |= _quality(index, items, start, queries)  # and all pages are warm: a server's usual state
        report |= _latency(index, items, start, queries, args.passes)
    print(json.dumps(report, indent=1) if args.json else _table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--categories", type=int, default=2_000)
    parser.add_argument("--dimension", type=int, default=64)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--power", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _near(centre_nD: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors at a cosine of about 0.78 to their centres."""
    dimension = centre_nD.shape[-1]
    return _unit(centre_nD + 0.8 * rng.standard_normal(centre_nD.shape) / np.sqrt(dimension))


def _falling(n: int) -> np.ndarray:
    """[n] probabilities in proportion to 1 / rank."""
    weight = 1 / np.arange(1, n + 1)
    return weight / weight.sum()


def _clustered_items(
    sizes: np.ndarray, dimension: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    centres = [_unit(rng.standard_normal((max(1, int(np.sqrt(n))), dimension))) for n in sizes]
    items = [_near(_drawn(centre, n, rng), rng) for centre, n in zip(centres, sizes, strict=True)]
    return np.concatenate(items), centres


def _drawn(centre: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return centre[rng.choice(len(centre), n, p=_falling(len(centre)))]


def _query(sizes: np.ndarray, centres: list[np.ndarray], power: float, rng: np.random.Generator) -> Query:
    weight = np.where(sizes > 0, np.maximum(sizes, 1.0) ** power, 0)
    context = rng.choice(len(sizes), N, replace=False, p=weight / weight.sum())
    return _near(np.concatenate([_drawn(centres[c], 1, rng) for c in context]), rng), context


def _build_and_open(items: np.ndarray, start: np.ndarray, path: Path) -> dict[str, float]:
    seconds = _seconds(lambda: build(items, start, path, made_from={}))
    before = psutil.Process().memory_info().rss
    opened = _seconds(lambda: Index.open(path))
    return {
        "build_s": round(seconds, 2),
        "megabytes_on_disk": round(sum(f.stat().st_size for f in path.iterdir()) / 1e6, 1),
        "open_ms": round(1e3 * opened, 2),
        "open_rss_megabytes": round((psutil.Process().memory_info().rss - before) / 1e6, 1),
    }


def _latency(
    index: Index, items: np.ndarray, start: np.ndarray, queries: list[Query], passes: int
) -> dict[str, float]:
    times: dict[str, list[float]] = {"index": [], "log_normaliser": [], "brute_force": []}
    for users, contexts in queries * passes:
        item, cosine = _timed(times["index"], partial(index.search, users, contexts, K))
        question = (users, contexts, SCALE, item, cosine)
        _timed(times["log_normaliser"], partial(index.log_normaliser, *question))
        _timed(times["brute_force"], partial(_brute_force, items, start, users, contexts))
    best = {name: 1e3 * np.reshape(t, (passes, -1)).min(axis=0) for name, t in times.items()}
    p50 = {name: float(np.median(ms)) for name, ms in best.items()}
    return {
        "items_scanned_p50": int(np.median([np.diff(start)[c].sum() for _, c in queries])),
        "index_ms_p50": round(p50["index"], 3),
        "index_ms_p99": round(float(np.percentile(best["index"], 99)), 3),
        "brute_force_ms_p50": round(p50["brute_force"], 3),
        "brute_force_over_index": round(p50["brute_force"] / p50["index"], 2),
        "log_normaliser_ms_p50": round(p50["log_normaliser"], 3),
    }


def _quality(index: Index, items: np.ndarray, start: np.ndarray, queries: list[Query]) -> dict[str, float]:
    exact = ExactIndex(items, start)
    recalls: list[float] = []
    errors: list[np.ndarray] = []
    for users, contexts in queries:
        item, cosine = index.search(users, contexts, K)
        question = (users, contexts, SCALE, item, cosine)
        errors.append(index.log_normaliser(*question) - exact.log_normaliser(*question))
        truth = _brute_force(items, start, users, contexts)
        recalls += [np.isin(t, row).mean() for t, row in zip(truth, item, strict=True)]
    return {
        f"recall@{K}": round(float(np.mean(recalls)), 5),
        "log_normaliser_rms_error": round(float(np.sqrt(np.mean(np.square(errors)))), 4),
    }


def _brute_force(
    items: np.ndarray, start: np.ndarray, users: np.ndarray, contexts: np.ndarray
) -> list[np.ndarray]:
    """The best NumPy does for exact float32: a product, a partition, a sort of the k best."""
    answers = []
    for user, c in zip(users, contexts, strict=True):
        cosine = items[start[c] : start[c + 1]] @ user
        best = np.argpartition(-cosine, K)[:K] if len(cosine) > K else np.arange(len(cosine))
        answers.append(start[c] + best[np.argsort(-cosine[best])])
    return answers


def _timed(into: list[float], call: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = call()
    into.append(time.perf_counter() - started)
    return result


def _seconds(call: Callable[[], object]) -> float:
    into: list[float] = []
    _timed(into, call)
    return into[0]


def _table(report: dict[str, float]) -> str:
    return "\n".join(f"{name:26} {value:>12,}" for name, value in report.items())


if __name__ == "__main__":
    main()
