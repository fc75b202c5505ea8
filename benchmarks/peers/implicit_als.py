"""implicit's ALS with 64 factors, in an environment that has `implicit` and `pyarrow`.

How sure a count makes it, and the regularization, are chosen by the mean of recall@200 over ALL and NEW on
the newest tenth of the events; that choice is preparation, the one fit of the winner is training. It has no
samples: a sample is a pair of user and item, once for each of its 15 passes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import product

import numpy as np
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix
from task import K, Task

FACTORS, PASSES = 64, 15
SCALES = {"log x 10": lambda n: 1 + 10 * np.log1p(n), "log x 40": lambda n: 1 + 40 * np.log1p(n)}
SCALES["count x 40"] = lambda n: 40 * n
GRID = tuple(product(SCALES, (0.01, 100)))


def main() -> None:
    task = Task()
    late = task.time > np.quantile(task.time, 0.9)
    recall = {setting: _recall(task, late, *setting) for setting in GRID}
    chosen = max(recall, key=lambda setting: recall[setting])
    counts = _counts(task, np.ones(len(task.user), dtype=bool))
    began = time.perf_counter()
    model = _fit(counts, *chosen, seed=task.seed)
    seconds = time.perf_counter() - began

    def lists(new: bool) -> Iterator[np.ndarray]:
        yield from _lists(model, counts, task.asked, K, new)

    task.finish(
        lists, samples=counts.nnz * PASSES, train_seconds=seconds, settings=f"{chosen[0]}, {chosen[1]:g}"
    )


def _counts(task: Task, kept: np.ndarray) -> csr_matrix:
    """[users, items] how many of the kept events each pair has."""
    one = np.ones(int(kept.sum()), np.float32)
    return csr_matrix((one, (task.user[kept], task.item[kept])), shape=(task.n_users, task.n_items))


def _fit(counts: csr_matrix, scale: str, regularization: float, seed: int) -> AlternatingLeastSquares:
    weight = counts.copy()
    weight.data = SCALES[scale](weight.data).astype(np.float32)
    model = AlternatingLeastSquares(
        FACTORS, regularization=regularization, iterations=PASSES, num_threads=1, random_state=seed
    )
    model.fit(weight, show_progress=False)
    return model


def _lists(
    model: AlternatingLeastSquares, counts: csr_matrix, user: np.ndarray, k: int, new: bool
) -> Iterator[np.ndarray]:
    known = np.asarray(counts.sum(axis=0)).ravel() > 0
    found, score = model.recommend(
        user,
        counts[user],
        N=k,
        filter_already_liked_items=new,
        filter_items=np.flatnonzero(~known),
    )
    # what is filtered ends up last, with the lowest number there is for a score
    yield from (f[(f >= 0) & (s > -1e30)] for f, s in zip(found, score, strict=True))


def _recall(task: Task, late: np.ndarray, scale: str, regularization: float) -> float:
    """Mean recall@200 over ALL and NEW, of the late events, by what was learned from the others."""
    before, later = _counts(task, ~late), _counts(task, late)
    user = np.flatnonzero((np.diff(before.indptr) > 0) & (np.diff(later.indptr) > 0))
    user = np.random.default_rng(task.seed).permutation(user)[:1000]
    model = _fit(before, scale, regularization, task.seed)
    figures = []
    for new in (False, True):
        shares = []
        for u, row in zip(user, _lists(model, before, user, 200, new), strict=True):
            wanted = later[u].indices
            if new:
                wanted = np.setdiff1d(wanted, before[u].indices)
            if len(wanted):
                shares.append(np.isin(wanted, row).mean())
        figures.append(np.mean(shares) if shares else 0.0)
    return float(np.mean(figures))


if __name__ == "__main__":
    main()
