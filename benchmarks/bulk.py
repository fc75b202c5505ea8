"""How fast are all users answered, to Parquet, and how much of that is the search itself?

    python benchmarks/bulk.py [MODEL] [--users 20000] [--workers 2] [--turns 3] [--json]

Without a model, one of a generated log of a million events is made, learned for a moment. Its users (the
first so many) get k = 500 candidates each, written to a Parquet file by `--workers` processes: what the
command `retrieve --all-users` does. Beside it, in turn with it, FAISS alone: the very searches that those
requests make (one for each context, one of all items), all vectors at hand, many in a call, on as many
threads, nothing kept. "of it" is the share of our time that FAISS alone takes. Medians of the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from longretriever import Retriever, Store, TrainConfig, index_model, ingest, train
from longretriever.index import CORPUS, Index
from longretriever.market import Market, MarketConfig
from longretriever.retrieve.bulk import cores
from longretriever.retrieve.retriever import BATCH

K = 500
_AT_ONCE = 4096  # searches in a call of FAISS alone


class _Searches:
    """What an index is asked for while users are answered."""

    def __init__(self, index: Any) -> None:
        self.index, self._search = index, index.search
        self.users: list[np.ndarray] = []
        self.contexts: list[np.ndarray] = []
        index.search = self

    def __call__(self, user_ND: np.ndarray, context_N: np.ndarray, k: int, without: Any = ()) -> Any:
        self.users.append(user_ND)
        self.contexts.append(np.asarray(context_N))
        return self._search(user_ND, context_N, k, without)

    def alone(self) -> float:
        """Seconds that FAISS takes for all of them."""
        user_ND, context_N = np.concatenate(self.users), np.concatenate(self.contexts)
        whole_N = context_N == CORPUS
        start = time.perf_counter()
        for asked in (np.flatnonzero(~whole_N), np.flatnonzero(whole_N)):
            for at in range(0, len(asked), _AT_ONCE):
                some = asked[at : at + _AT_ONCE]
                self._faiss(user_ND[some], context_N[some])
        return time.perf_counter() - start

    def _faiss(self, user_nD: np.ndarray, context_n: np.ndarray) -> None:
        if context_n[0] != CORPUS:
            self.index._faiss.search_preassigned(user_nD, K, context_n[:, None], None)
        elif self.index._clusters is not None:
            self.index._clusters.search(user_nD, K)
        else:
            every = np.tile(np.arange(self.index.n_categories), (len(user_nD), 1))
            self.index._all.search_preassigned(user_nD, K, every, None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report, items = _measured(args.model or _made(Path(folder)), args, Path(folder) / "all.parquet")
    print(json.dumps(report, indent=1)) if args.json else Console().print(_table(report, args, items))


def _made(folder: Path) -> Path:
    log = folder / "log"
    Market(MarketConfig.of_size(1_000_000)).write(log)
    ingest(log / "events.parquet", folder / "store", items=log / "items.parquet", users=log / "users.parquet")
    train(Store.open(folder / "store"), folder / "model", TrainConfig(minutes=0.5))
    index_model(folder / "model")
    return folder / "model"


def _measured(model: Path, args: argparse.Namespace, file: Path) -> tuple[dict[str, float], int]:
    """The figures, and how many items the model has."""
    retriever = Retriever.load(model)
    users = retriever.store.user_ids.values[: args.users].to_pylist()
    sample = users[: 16 * BATCH]
    searches = [_Searches(index) for index in _indexes(retriever)]
    for _ in retriever.retrieve_many(sample, K):  # pages are warm too
        pass
    for one in searches:
        one.index.search = one._search
    turns: list[dict[str, float]] = []
    for _ in range(args.turns):
        faiss.omp_set_num_threads(args.workers)
        alone = sum(one.alone() for one in searches) / len(sample)
        start = time.perf_counter()
        rows = retriever.write(users, file, K, workers=args.workers)
        seconds = time.perf_counter() - start
        turns.append({"ours": len(users) / seconds, "faiss": 1 / alone, "mb": file.stat().st_size / 1e6})
    report = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    report |= {"of_it": report["ours"] / report["faiss"], "users": len(users), "rows": rows}
    report |= {"searches_of_a_user": sum(sum(map(len, one.contexts)) for one in searches) / len(sample)}
    return report, retriever.model.n_items


def _indexes(retriever: Retriever) -> list[Index]:
    """One, or two where all items are searched for another model."""
    found = [retriever._of_contexts.index, retriever._of_all.index]
    return [index for i, index in enumerate(found) if isinstance(index, Index) and index not in found[:i]]


def _table(report: dict[str, float], args: argparse.Namespace, items: int) -> Table:
    title = f"{report['users']:,} users, {items:,} items, k = {K}, {args.workers} processes"
    table = Table(title=title)
    for name in ("users/s", "candidates/s", "searches a user", "FAISS alone, users/s", "of it", "MB"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{report['ours']:,.0f}",
        f"{report['ours'] * report['rows'] / report['users']:,.0f}",
        f"{report['searches_of_a_user']:.1f}",
        f"{report['faiss']:,.0f}",
        f"{report['of_it']:.1%}",
        f"{report['mb']:,.0f}",
    )
    return table


if __name__ == "__main__":
    main()
