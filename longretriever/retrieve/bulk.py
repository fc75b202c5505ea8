"""Everyone's candidates to one Parquet file, by as many processes as there are cores.

Each process opens the model for itself; index, store and vectors are memory-mapped, so they share those. A
piece of work is some hundreds of users, and what comes back is written in their order: the file is the same
however many processes made it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longretriever.errors import InputError
from longretriever.events import CATEGORY, ITEM, USER
from longretriever.retrieve.retriever import BATCH, Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import beside, sync

PIECE = 16 * BATCH  # users of a piece of work: 512,000 candidates at k = 500

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Asking:
    """What is asked for every user; see `Retriever.retrieve`."""

    k: int = 500
    now: float | None = None
    seed: int = 0
    rules: Rules = Rules()


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write(
    retriever: Retriever,
    user_ids: Iterable[int | str],
    out: str | os.PathLike[str],
    asking: Asking,
    workers: int,
    progress: Progress | None,
) -> int:
    """See `Retriever.write`."""
    if workers < 1:
        raise InputError(f"workers={workers}, expected at least 1.")
    if workers > 1 and retriever.loaded is None:
        raise InputError(
            "workers above 1 need a retriever of `Retriever.load`, to be opened by each process."
        )
    target = Path(out)
    partial, schema = beside(target, "partial"), _schema(retriever)
    rows, done = 0, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for users, table in _tables(retriever, iter(user_ids), asking, workers):
                writer.write_table(table)
                rows, done = rows + len(table), done + users
                if progress:
                    progress(done)
        sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return rows


def _tables(
    retriever: Retriever, user_ids: Iterator[int | str], asking: Asking, workers: int
) -> Iterator[tuple[int, pa.Table]]:
    """Number of users and their candidates, piece by piece in the order of the users."""
    first = list(islice(user_ids, PIECE))
    if workers == 1 or len(first) < PIECE:  # else the others would start for nothing
        piece = first
        while piece:
            yield len(piece), _answered(retriever, piece, asking)
            piece = list(islice(user_ids, PIECE))
        return
    # Forked processes would inherit locks of the libraries' threads.
    context = multiprocessing.get_context("spawn")
    loaded = retriever.loaded or {}
    pool = ProcessPoolExecutor(workers, context, initializer=_open, initargs=(loaded, asking))
    waiting: deque[tuple[int, Future[pa.Table]]] = deque()
    try:
        piece = first
        while piece or waiting:
            while piece and len(waiting) < 2 * workers:  # no more, so that memory stays bounded
                waiting.append((len(piece), pool.submit(_piece, piece)))
                piece = list(islice(user_ids, PIECE))
            users, answer = waiting.popleft()
            yield users, answer.result()
    finally:
        pool.shutdown(cancel_futures=True)


_mine: tuple[Retriever, Asking] | None = None  # of this process


def _open(loaded: dict[str, Any], asking: Asking) -> None:
    global _mine
    faiss.omp_set_num_threads(1)  # the processes would compete
    _mine = Retriever.load(**{**loaded, "verify": False, "threads": 1}), asking


def _piece(user_ids: Sequence[int | str]) -> pa.Table:
    assert _mine is not None
    return _answered(_mine[0], user_ids, _mine[1])


def _schema(retriever: Retriever) -> pa.Schema:
    return pa.schema(
        [
            (USER, retriever.store.user_ids.values.type),
            ("rank", pa.int32()),
            (ITEM, retriever.model.items[ITEM].type),
            (CATEGORY, retriever.model.category_ids.values.type),
            ("score", pa.float32()),
        ]
    )


def _answered(retriever: Retriever, user_ids: Sequence[int | str], asking: Asking) -> pa.Table:
    store, model, asked = retriever.store, retriever.model, vars(asking)
    user, length, item, score = [], [], [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for answer in retriever.retrieve_many(user_ids, **asked):
        length.append(len(answer))
        user.append(answer._life.user)
        item.append(answer.item)
        score.append(answer.score.astype(np.float32))
    items = np.concatenate(item)
    return pa.table(
        [
            store.user_ids.values.take(pa.array(np.repeat(np.array(user, np.int64), length))),
            np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in [0, *length]]),
            model.items[ITEM].take(pa.array(items)).combine_chunks(),
            model.category_ids.values.take(pa.array(model.category_of(items))),
            np.concatenate(score),
        ],
        schema=_schema(retriever),
    )
