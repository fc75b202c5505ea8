"""Measures journals of live events: what is acknowledged and read, a file beside a Redis and a cluster.

    python benchmarks/live.py [--work FOLDER] [--seconds 2] [--repeats 3] [--cluster] [--json]

All are on this machine and on the same disk; the servers (`redis-server` must be installed) are started here,
with `appendonly yes` and `appendfsync always`, and share its cores. They take turns; figures are medians over
repeats, and what counts are the ratios to the file of the same run.

write  events acknowledged a second: one caller with one event a call, 32 and 256 calls at a time, 1,000
       events a call
read   the live events of one user who has 50, and of 100 such users at once: p50 and p99 in milliseconds,
       alone and while 32 calls write; and round trips, counted
size   bytes of an event with an event_id of 32 characters: of the file, or of the servers' memory
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import redis

from longretriever.store.live import Event, LiveJournal, open_journal

USERS, EACH = 2_000, 50
AT_ONCE = {"1 call": (1, 1), "32 calls": (32, 1), "256 calls": (256, 1), "1,000 events a call": (1, 1_000)}


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory(dir=args.work) as folder, ExitStack() as stack:
        places = {"file": str(Path(folder) / "live.sqlite")}
        places["redis"] = stack.enter_context(_redis(Path(folder) / "redis"))
        if args.cluster:
            places["cluster"] = stack.enter_context(_cluster(Path(folder) / "cluster"))
        journals = {name: stack.enter_context(closing(open_journal(url))) for name, url in places.items()}
        found = _measured(journals, args)
        found["bytes an event"] = {name: _size(name, places[name], journals[name]) for name in journals}
    print(json.dumps(found, indent=1) if args.json else _table(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="a folder on the disk to be measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cluster", action="store_true", help="a cluster of three as well")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _measured(journals: dict[str, LiveJournal], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Name of the figure -> journal -> median over repeats."""
    for journal in journals.values():
        _fill(journal)
    rows: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.repeats):
        for name, journal in journals.items():
            for what, value in _once(journal, args.seconds).items():
                rows.setdefault(what, {}).setdefault(name, []).append(value)
    return {what: {name: float(np.median(v)) for name, v in by.items()} for what, by in rows.items()}


def _fill(journal: LiveJournal) -> None:
    """The users that are read, with 50 events each."""
    for n in range(EACH):
        journal.append([_event(user, n) for user in range(USERS)]).result()


_number = count(1_000_000)


def _event(user: int, n: int) -> Event:
    return Event(user, n, n % 50, 1_790_000_000 + n, "click", uuid4().hex)


def _once(journal: LiveJournal, seconds: float) -> dict[str, float]:
    found = {}
    for name, (at_once, events) in AT_ONCE.items():
        found[f"events/s, {name}"] = _writing(journal, at_once, events, seconds)
    for name, users in (("a user", 1), ("100 users", 100)):
        before = getattr(journal, "round_trips", 0)
        p50, p99, reads = _reading(journal, users, seconds)
        found[f"round trips, {name}"] = (getattr(journal, "round_trips", 0) - before) / reads
        found[f"p50 ms, {name}"], found[f"p99 ms, {name}"] = p50, p99
    with _meanwhile(lambda: _writing(journal, 32, 1, seconds + 0.2)):
        p50, p99, _ = _reading(journal, 1, seconds)
        found["p50 ms, a user, 32 writing"], found["p99 ms, a user, 32 writing"] = p50, p99
    return found


def _writing(journal: LiveJournal, at_once: int, events: int, seconds: float) -> float:
    """Events acknowledged a second, with so many calls on their way."""
    end, start, done, on_the_way = time.perf_counter() + seconds, time.perf_counter(), 0, deque()
    while time.perf_counter() < end or on_the_way:
        while time.perf_counter() < end and len(on_the_way) < at_once:
            calls = [_event(10_000 + n % 5_000, n) for n in (next(_number) for _ in range(events))]
            on_the_way.append(journal.append(calls))
        if on_the_way:
            done += on_the_way.popleft().result().accepted
    return done / (time.perf_counter() - start)


def _reading(journal: LiveJournal, users: int, seconds: float) -> tuple[float, float, int]:
    """p50 and p99 in milliseconds, and how many reads there were."""
    rng, took = np.random.default_rng(1), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        asked = rng.integers(0, USERS, users).tolist()
        start = time.perf_counter()
        found = journal.of_each(asked)
        took.append(1e3 * (time.perf_counter() - start))
        assert all(one.is_all and len(one.events) == EACH for one in found)
    return float(np.median(took)), float(np.quantile(took, 0.99)), len(took)


@contextmanager
def _meanwhile(work: Callable[[], Any]) -> Iterator[None]:
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _size(name: str, place: str, journal: LiveJournal) -> float:
    """On the disk of a file; in the memory of all servers otherwise."""
    if name == "file":
        return Path(place).stat().st_size / journal.count()
    used = 0
    for host in place.split("://")[1].split("/")[0].split(","):
        used += redis.Redis.from_url(f"redis://{host}").info("memory")["used_memory_dataset"]
    return used / journal.count()


# -- servers


@contextmanager
def _redis(folder: Path, *options: str) -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        raise SystemExit("redis-server is not installed: apt-get install redis-server")
    folder.mkdir(parents=True)
    port = _free_port()
    given = f"--port {port} --bind 127.0.0.1 --save --appendonly yes --appendfsync always --dir".split()
    given[given.index("--save") + 1 : given.index("--save") + 1] = [""]
    command = [program, *given, str(folder), *options]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log) as process:
        try:
            _wait(lambda: redis.Redis(port=port).ping())
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.terminate()


@contextmanager
def _cluster(folder: Path) -> Iterator[str]:
    with ExitStack() as stack:
        options = "--cluster-enabled", "yes", "--cluster-port"
        buses = [_free_port() for _ in range(3)]
        urls = [
            stack.enter_context(_redis(folder / str(n), *options, str(bus))) for n, bus in enumerate(buses)
        ]
        nodes = [redis.Redis.from_url(url) for url in urls]
        for n, node in enumerate(nodes):
            node.execute_command("CLUSTER ADDSLOTSRANGE", 16_384 * n // 3, 16_384 * (n + 1) // 3 - 1)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", n + 1)
            port = urls[n].split(":")[2].split("/")[0]
            nodes[0].execute_command("CLUSTER MEET", "127.0.0.1", port, buses[n])
        _wait(lambda: all(_is_whole(node.execute_command("CLUSTER INFO")) for node in nodes))
        yield f"redis+cluster://{','.join(url.split('/')[2] for url in urls)}"


def _is_whole(said: dict[str, str]) -> bool:
    return said["cluster_state"] == "ok" and said["cluster_known_nodes"] == "3"


def _wait(true: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if true():
                return
        except redis.RedisError:
            pass
        time.sleep(0.05)
    raise SystemExit("the servers did not start")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _table(found: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(found.values())))
    lines = [f"{'':32}" + "".join(f"{name:>12}" for name in names) + "   times the file"]
    for what, by in found.items():
        ratios = [f"{by[name] / by['file']:.2f}" for name in names[1:]] if by["file"] else []
        lines.append(f"{what:32}" + "".join(f"{by[n]:12,.3f}" for n in names) + "   " + ", ".join(ratios))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
