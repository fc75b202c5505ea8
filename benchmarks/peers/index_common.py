"""What all peers share: the data, how a peer is built, opened and asked, and how that is measured.

NumPy and the standard library only, since most peers run in an environment of their own. A script of peers
ends in `main({name: class})`; `index_peers.py` starts it once to build and once to search.

Axes: I items, C categories, D dimensions, Q requests, N contexts of each, K results of each, S big categories
and U users of each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TOLD = 2.0  # seconds between lines of progress
SLOW = 5.0  # seconds of a request from which no larger width is tried
ENOUGH = 0.99  # recall from which none is
WARM = 15.0  # seconds at most of requests before any is timed

Answers = Sequence[np.ndarray]  # item numbers for each context


class Data:
    """The folder that `index_peers.py` wrote, each file mapped and an attribute here."""

    items: np.ndarray  # [I, D] float32 of length 1, by category
    start: np.ndarray  # [C+1]
    users: np.ndarray  # [Q, N, D]
    contexts: np.ndarray  # [Q, N]
    truth: np.ndarray  # [Q, N, K], -1 pads
    large: np.ndarray  # [S] categories, the smallest first
    large_users: np.ndarray  # [S, U, D]
    K: int
    big: int  # items from which a category is big

    def __init__(self, folder: Path) -> None:
        for file in folder.glob("*.npy"):
            setattr(self, file.stem, np.load(file, mmap_mode="r"))
        vars(self).update(json.loads((folder / "facts.json").read_text()))
        self.start = np.array(self.start)

    def range(self, category: int) -> tuple[int, int]:
        return int(self.start[category]), int(self.start[category + 1])

    def chunks(self, what: str, size: int = 100_000) -> Any:
        """(first number, vectors) of the items, said on stderr."""
        for first in range(0, len(self.items), size):
            say(f"{what}: {first:,} of {len(self.items):,} items")
            yield first, np.ascontiguousarray(self.items[first : first + size])


class Peer:
    """One way to search, with files in a folder of its own."""

    widths: Sequence[int | None] = (None,)
    """What it can be tuned by, if anything: the wider, the more it finds and the longer it takes."""

    every_width = False
    """Measures all widths, also where one has found enough."""

    def __init__(self, data: Data, folder: Path) -> None:
        self.data, self.folder = data, folder

    def build(self) -> None: ...

    def open(self) -> None: ...

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        """Up to K item numbers for each context of a request."""
        raise NotImplementedError

    def more(self) -> dict[str, Any]:
        """Figures that only this peer has."""
        return {}

    def processes(self) -> list[int]:
        """Those that hold its memory beside this one."""
        return []

    def close(self) -> None: ...


def main(peers: dict[str, type[Peer]]) -> None:
    """NAME build|search DATA FOLDER SECONDS PASSES: prints figures as JSON, the last line of stdout."""
    name, stage, data, folder, seconds, passes = sys.argv[1:]
    peer = peers[name](Data(Path(data)), Path(folder))
    if stage == "build":
        took, _ = timed(peer.build)
        figures: dict[str, Any] = {"build_s": took}
    else:
        # All threads of it, its server's too, share one processor, whatever a library makes of its settings.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        figures = _searched(peer, name, float(seconds), int(passes))
    print(json.dumps(figures))


def _searched(peer: Peer, name: str, seconds: float, passes: int) -> dict[str, Any]:
    before = memory([os.getpid()])
    try:
        opened, _ = timed(peer.open)
        deadline = time.perf_counter() + WARM
        for users, contexts in zip(peer.data.users, peer.data.contexts, strict=True):
            peer.search(users, contexts, peer.widths[0])
            if time.perf_counter() > deadline:
                break
        after = memory([os.getpid(), *peer.processes()])
        figures: dict[str, Any] = {"open_s": opened, "points": []}
        figures |= {f"{kind}_mb": (after[kind] - before[kind]) / 1e6 for kind in after}
        for width in peer.widths:
            point = _point(peer, name, width, seconds, passes)
            figures["points"].append(point)
            if point["ms_p50"] > 1e3 * SLOW or (point["recall"] > ENOUGH and not peer.every_width):
                break
        return figures | peer.more()
    finally:
        peer.close()


def _point(peer: Peer, name: str, width: int | None, seconds: float, passes: int) -> dict[str, Any]:
    """Recall and latency, NumPy and the peer taking turns; the best time of several passes counts.

    Ends after `seconds`, so with slow ones only the first requests are measured: `requests` says how many.
    """
    data = peer.data
    best = {"peer": np.full(len(data.users), np.inf), "numpy": np.full(len(data.users), np.inf)}
    recalls: list[float] = []
    deadline = time.perf_counter() + seconds
    turns = [q for _ in range(passes) for q in range(len(data.users))]
    for turn, q in enumerate(turns):
        say(f"{name}{'' if width is None else f', width {width:,}'}: request {turn:,} of {len(turns):,}")
        users, contexts = np.array(data.users[q]), np.array(data.contexts[q])
        took, answers = timed(lambda u=users, c=contexts: peer.search(u, c, width))
        best["peer"][q] = min(best["peer"][q], took)
        took, _ = timed(lambda u=users, c=contexts: brute_force(data, data.items, u, c))
        best["numpy"][q] = min(best["numpy"][q], took)
        if turn < len(data.users):
            recalls += [recall(t, a) for t, a in zip(data.truth[q], answers, strict=True)]
        if time.perf_counter() > deadline:
            break
    asked = min(len(turns), turn + 1, len(data.users))
    ms = {who: 1e3 * took[:asked] for who, took in best.items()}
    p50 = {who: float(np.median(took)) for who, took in ms.items()}
    return {
        "width": width,
        "recall": float(np.mean(recalls)),
        "ms_p50": p50["peer"],
        "ms_p99": float(np.percentile(ms["peer"], 99)),
        "numpy_ms_p50": p50["numpy"],
        "times_numpy": p50["peer"] / p50["numpy"],
        "requests": asked,
    }


def brute_force(
    data: Data, items_ID: np.ndarray, users_ND: np.ndarray, contexts_N: np.ndarray
) -> list[np.ndarray]:
    """The best that NumPy does: a product with the slice of a category, a partition, a sort of the best."""
    answers = []
    for user, category in zip(users_ND, contexts_N, strict=True):
        first, last = data.range(category)
        cosine = items_ID[first:last] @ user
        answers.append(first + best_of(cosine, data.K))
    return answers


def best_of(cosine: np.ndarray, k: int) -> np.ndarray:
    """Where the k largest are, the largest first."""
    some = np.argpartition(-cosine, k)[:k] if len(cosine) > k else np.arange(len(cosine))
    return some[np.argsort(-cosine[some])]


def recall(truth_K: np.ndarray, answer: np.ndarray) -> float:
    return float(np.isin(truth_K[truth_K >= 0], answer).mean())


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


_told = time.perf_counter()


def say(what: str) -> None:
    """A line on stderr, unless there was one a few seconds ago."""
    global _told
    if time.perf_counter() > _told + TOLD:
        _told = time.perf_counter()
        print(what, file=sys.stderr, flush=True)


def memory(processes: Sequence[int]) -> dict[str, float]:
    """Bytes resident, pages shared among processes counted once; those of files can be taken back."""
    kinds = {"resident": "Pss", "of_files": "Pss_File"}
    found = dict.fromkeys(kinds, 0.0)
    for pid in processes:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        values = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        for kind, name in kinds.items():
            found[kind] += 1024 * int(values[name][0])
    return found
