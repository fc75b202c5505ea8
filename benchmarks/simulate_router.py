"""Simulates a router before shards under long-tailed load: who is busy, what caches hold. No server runs.

    python benchmarks/simulate_router.py [--shards 4,8,16] [--replicas 2] [--tail 0.75] [--json]

At 1/1000 of 900M users and 150M items, in as many categories as there would be (20,000). What is assumed:

- items of a category fall as 1 / rank ** tail, and so does how much it is wanted, with noise between the two
- a user has 20 categories, drawn by how much each is wanted; requests come from users as 1 / rank ** 0.8,
  and each asks 5 of the user's categories
- a search costs 60 microseconds and 20 nanoseconds an item (docs/index.md measures 10 to 30)
- a shard keeps in memory the categories used last, up to a share of its bytes (an LRU of whole categories);
  the router keeps the lives of the users who asked last

Shards are cut by number of items, as `serve-shard --shard I/N` does, or by work, the cost of the first half
of the requests; both are measured on the second half. Repeats itself exactly by `--seed`.
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from longretriever.shards.held import cuts

SCALE = 1_000
FIXED_US, ITEM_US = 60.0, 0.02
BYTES = 64 * 2 + 8  # of an item: 16-bit floats, and its number
OWN, ASKED = 20, 5  # categories of a user, and of a request


@dataclass(frozen=True)
class World:
    """Requests against a catalogue.

    size      [C] items
    user      [R] who asks
    category  [R, ASKED]
    """

    size: np.ndarray
    user: np.ndarray
    category: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """[C] microseconds of one search."""
        return FIXED_US + ITEM_US * self.size * SCALE  # a search costs what it would at full size

    def work(self, requests: slice) -> np.ndarray:
        """[C] of these requests."""
        return np.bincount(self.category[requests].ravel(), minlength=len(self.size)) * self.cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=900_000)
    parser.add_argument("--items", type=int, default=150_000)
    parser.add_argument("--categories", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--tail", type=float, default=0.75)
    parser.add_argument("--shards", type=lambda text: [*map(int, text.split(","))], default=[4, 8, 16])
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    world = made(args.users, args.items, args.categories, args.requests, args.tail, rng)
    report = {
        "lives": {
            f"{share:.1%}": lives_found(world, round(share * args.users)) for share in (0.001, 0.01, 0.1)
        },
        "shards": [of_shards(world, n, args.replicas, by) for n in args.shards for by in ("items", "work")],
    }
    print(json.dumps(report, indent=1) if args.json else _table(report, args.replicas))


def made(
    users: int, items: int, categories: int, requests: int, tail: float, rng: np.random.Generator
) -> World:
    falling = np.arange(1, categories + 1) ** -tail
    size = items * falling / falling.sum()  # fractions of an item: 1/1000 of what they would be
    order = rng.permutation(categories)  # numbers of categories say nothing of their sizes
    wanted = falling * np.exp(rng.normal(0, 1, categories))
    asks = np.arange(1, users + 1) ** -0.8
    user = rng.choice(users, requests, p=asks / asks.sum())
    of_user = np.empty((requests, ASKED), np.int64)
    who, row = np.unique(user, return_inverse=True)
    own = rng.choice(categories, (len(who), OWN), p=wanted / wanted.sum())
    for column in range(ASKED):
        of_user[:, column] = own[row, rng.integers(0, OWN, requests)]
    sizes = np.empty(categories)
    sizes[order] = size
    return World(sizes, user, order[of_user])


def lives_found(world: World, room: int) -> float:
    """Share of requests whose user's life the router has."""
    kept = Lru(room)
    return round(float(np.mean([kept.uses(user) for user in world.user.tolist()])), 3)


def of_shards(world: World, shards: int, replicas: int, by: str) -> dict[str, Any]:
    half = len(world.user) // 2
    learned, measured = slice(0, half), slice(half, None)
    start = cuts(world.size if by == "items" else world.work(learned), shards)
    shard_C = np.repeat(np.arange(shards), np.diff(start))
    work_S = np.bincount(shard_C, world.work(measured), shards)
    bytes_S = np.bincount(shard_C, world.size * SCALE * BYTES, shards)
    asked = shard_C[world.category[measured]]
    cost = world.cost[world.category[measured]]
    longest = np.max([np.where(asked == s, cost, 0).sum(axis=1) for s in range(shards)], axis=0)
    return {
        "shards": shards,
        "cut_by": by,
        "work_most_of_mean": round(float(work_S.max() / work_S.mean()), 3),
        "replicas_by_work": _with_replicas(work_S, shards * replicas),
        "bytes_most_of_mean": round(float(bytes_S.max() / bytes_S.mean()), 3),
        "largest_GB": round(float(bytes_S.max()) / 1e9, 2),
        "calls_a_request": round(
            float((np.diff(np.sort(asked, axis=1), axis=1) > 0).sum(axis=1).mean()) + 1, 2
        ),
        "slowest_call_ms": [round(float(q) / 1e3, 2) for q in np.quantile(longest, [0.5, 0.99])],
        "found_in_memory": {
            f"{share:.0%}": pages_found(world, shard_C, bytes_S, share, replicas) for share in (0.1, 0.3)
        },
    }


def _with_replicas(work_S: np.ndarray, servers: int) -> float:
    """The busiest server's work beside the mean, where busy shards have more of as many servers."""
    of_S = np.ones(len(work_S))
    for _ in range(servers - len(work_S)):
        of_S[np.argmax(work_S / of_S)] += 1
    return round(float((work_S / of_S).max() / (work_S.sum() / servers)), 3)


def pages_found(
    world: World, shard_C: np.ndarray, bytes_S: np.ndarray, share: float, replicas: int
) -> dict[str, float]:
    """Share of the bytes searched that are in memory: replicas take turns, or each has its categories."""
    out = {}
    for how in ("turns", "own"):
        kept = [[Lru(share * room) for _ in range(replicas)] for room in bytes_S]
        there = total = 0.0
        for n, row in enumerate(world.category.tolist()):
            for category in row:
                shard = int(shard_C[category])
                of = kept[shard][n % replicas if how == "turns" else category % replicas]
                size = float(world.size[category]) * SCALE * BYTES
                found = of.uses(category, size)
                if n >= len(world.user) // 2:
                    there, total = there + size * found, total + size
        out[how] = round(there / total, 3)
    return out


class Lru:
    """What was used last, up to so much."""

    def __init__(self, room: float) -> None:
        self._room, self._total = room, 0.0
        self._kept: OrderedDict[int, float] = OrderedDict()

    def uses(self, key: int, size: float = 1.0) -> bool:
        """Whether it was there; it is now, if it fits at all, in the place of what was used longest ago."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return True
        if size <= self._room:
            self._kept[key] = size
            self._total += size
            while self._total > self._room:
                self._total -= self._kept.popitem(last=False)[1]
        return False


def _table(report: dict[str, Any], replicas: int) -> str:
    lines = ["lives kept by the router, of all users: share of requests that find theirs"]
    lines += [f"  {share:>6} {found:.1%}" for share, found in report["lives"].items()]
    lines += [
        f"{replicas} replicas of each shard; found in memory: of the bytes searched, where replicas take "
        "turns / each has its part of the categories",
        "shards  cut by  work, most/mean  the same, replicas by work  bytes, most/mean  largest  calls  "
        "slowest call p50, p99 ms  "
        "memory of 10%, 30% of the shard",
    ]
    for one in report["shards"]:
        memory = ", ".join(f"{f['turns']:.0%}/{f['own']:.0%}" for f in one["found_in_memory"].values())
        p50, p99 = one["slowest_call_ms"]
        lines.append(
            f"{one['shards']:6}  {one['cut_by']:6}  {one['work_most_of_mean']:15}  "
            f"{one['replicas_by_work']:26}  {one['bytes_most_of_mean']:16}  {one['largest_GB']:4} GB  "
            f"{one['calls_a_request']:5}  "
            f"{p50:17}, {p99:5}     {memory}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
