"""Measures what it costs to have the index on shards: one server beside a router with 2 and 3 shards.

    python benchmarks/routing.py [--work FOLDER] [--model MODEL] [--json]

All on this machine, over loopback. The log is generated and the model trained for moments only, as in
serving.py; requests ask 5 contexts at random out of the top 20 for 500 candidates, the same of all systems,
in turn, so that all have the same luck. `--whole` has the model search all items as well, which all shards do
together. Said for each number of shards:

times    p50 and p99 beside the single server's, one client; and requests a second of 8 clients
cpu      what a request takes of the processors, whoever else uses them: single, router, all shards
bytes    of all calls of a request: sent to shards, and back
memory   of the vectors' file in each process, and what is no file's, beside the single server's
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from longretriever import RandomInTop, Retriever, TrainConfig, index_model, ingest
from longretriever.market import Market, MarketConfig
from longretriever.model.config import EbrConfig
from longretriever.shards import calls as asking
from longretriever.shards import fleet as fleets
from longretriever.store.behaviors import Store

K, N, M = 500, 5, 20
CLIENTS = 8
WARM = 20  # requests that are not counted


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        model = args.model or _prepared(work, args)
        report = [compared(model, Path(temporary), shards, args) for shards in args.shards]
    print(json.dumps(report, indent=1) if args.json else _table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="keep log, store and model here, and use them again")
    parser.add_argument("--model", type=Path, help="a model of your own instead")
    parser.add_argument("--shards", type=lambda text: [*map(int, text.split(","))], default=[2, 3])
    parser.add_argument("--whole", action="store_true", help="the model searches all items as well")
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--categories", type=int, default=1_000)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _prepared(work: Path, args: argparse.Namespace) -> Path:
    """The folder of a model, made unless it is there."""
    from longretriever.model.train import train

    model, log = work / "model", work / "log"
    if not (model / "index").exists():
        sizes = {"users": 2_000, "items": args.items, "categories": args.categories}
        Market(MarketConfig.of_size(args.events, least=50, **sizes)).write(log)
        ingest(
            log / "events.parquet", work / "store", items=log / "items.parquet", users=log / "users.parquet"
        )
        whole = EbrConfig(samples=20_000) if args.whole else None
        brief = TrainConfig(whole=whole, interests=None, warm_start=False, samples=50_000)
        train(Store.open(work / "store"), model, brief)
        index_model(model)
    return model


def compared(model: Path, folder: Path, shards: int, args: argparse.Namespace) -> dict[str, Any]:
    users = Store.open(Retriever.load(model).store.path).user_ids.take(range(200))
    with ExitStack() as stack:
        start = lambda *words: stack.enter_context(_started(folder, *words))  # noqa: E731
        single = start("serve", str(model), "--live", str(folder / "one.sqlite"))
        pieces = [start("serve-shard", str(model), "--shard", f"{i}/{shards}") for i in range(1, shards + 1)]
        urls = ",".join(url for url, _ in pieces)
        live = str(folder / "router.sqlite")
        router = start("serve", str(model), "--shards", urls, "--shard-seconds", "5", "--live", live)
        before = [_processor(single[1:]), _processor([router[1]]), _processor(p for _, p in pieces)]
        times = _in_turn([single[0], router[0]], users, args.requests)
        after = [_processor(single[1:]), _processor([router[1]]), _processor(p for _, p in pieces)]
        single_ms, router_ms = times
        loads = [_at_once(url, users, args.seconds) for url in (single[0], router[0])]
        sent, back = _bytes(model, [url for url, _ in pieces], users[:50])
        return {
            "shards": shards,
            "p50_ms": [float(np.median(one).round(3)) for one in times],
            "p99_ms": [float(np.quantile(one, 0.99).round(3)) for one in times],
            "p50_ratio": float((np.median(router_ms) / np.median(single_ms)).round(3)),
            "p99_ratio": float((np.quantile(router_ms, 0.99) / np.quantile(single_ms, 0.99)).round(3)),
            "overhead_ms": float(np.median(router_ms - single_ms).round(3)),
            "cpu_ms": (1e3 * (np.array(after) - before) / (args.requests + WARM)).round(2).tolist(),
            "requests_a_second": [round(one, 1) for one in loads],
            "bytes_sent": sent,
            "bytes_back": back,
            "memory": {
                "single": _memory(single[1]),
                "router": _memory(router[1]),
                "shards": [_memory(process) for _, process in pieces],
            },
        }


@contextmanager
def _started(folder: Path, command: str, *words: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    line = [sys.executable, "-m", "longretriever", command, *words, "--port", str(port)]
    line += ["--clock", "log"] if command == "serve" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / f"{port}.log").open("w") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _is_ready(url):
            if process.poll() is not None:
                raise RuntimeError((folder / f"{port}.log").read_text())
            time.sleep(0.05)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _asked(user: Any, seed: int) -> dict[str, Any]:
    return {"user_id": user, "k": K, "seed": seed, "interests": {"select": "random", "n": N, "m": M}}


def _in_turn(urls: list[str], users: list[Any], requests: int) -> np.ndarray:
    """[servers, requests] milliseconds."""
    found = np.empty((len(urls), requests))
    clients = [httpx.Client(base_url=url, timeout=30) for url in urls]
    for n in range(-WARM, requests):
        asked = _asked(users[n % len(users)], n % 1000)
        for s in np.random.default_rng(n + WARM).permutation(len(urls)):
            start = time.perf_counter()
            answer = clients[s].post("/v1/retrieve", json=asked)
            if n >= 0:  # warm
                found[s, n] = 1e3 * (time.perf_counter() - start)
            if answer.status_code != 200 or answer.json()["partial"]:
                raise RuntimeError(answer.text[:500])
    for client in clients:
        client.close()
    return found


def _at_once(url: str, users: list[Any], seconds: float) -> float:
    """Requests a second of several clients."""
    end, done = time.perf_counter() + seconds, [0] * CLIENTS

    def ask(c: int) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while time.perf_counter() < end:
                n = done[c] * CLIENTS + c
                client.post("/v1/retrieve", json=_asked(users[n % len(users)], n % 1000)).raise_for_status()
                done[c] += 1

    threads = [threading.Thread(target=ask, args=(c,)) for c in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / seconds


def _processor(processes: Iterable[psutil.Process]) -> float:
    """Seconds that they have worked, whatever else the machine does."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def _bytes(model: Path, urls: list[str], users: list[Any]) -> tuple[int, int]:
    """Of the bodies of all calls of a request, on average: to the shards, and back."""
    sent, back = [], []
    plain: Callable[..., Any] = asking.ask

    def counted(calls: Any, *given: Any, **more: Any) -> Any:
        outcomes = plain(calls, *given, **more)
        if more.get("method") != "GET":
            sent.append(sum(len(call.body) for call in calls))
            back.append(sum(len(outcome.body or b"") for outcome in outcomes))
        return outcomes

    fleets.ask = counted
    try:
        with fleets.Fleet(urls, seconds=5) as fleet:
            retriever = Retriever.load(model, index=fleet)
            for user in users:
                retriever.retrieve(user, K, interests=RandomInTop(N, M))
    finally:
        fleets.ask = plain
    return round(sum(sent) / len(users)), round(sum(back) / len(users))


def _memory(process: psutil.Process) -> dict[str, float]:
    """MB: of the vectors' files that are in its memory, and what is no file's."""
    maps = process.memory_maps(grouped=False)
    lists = [one for one in maps if one.path.endswith(("lists.faiss", "clusters.faiss"))]
    private = sum(one.anonymous for one in maps)
    return {
        "vectors_MB": round(sum(one.rss for one in lists) / 1e6, 1),
        "own_MB": round(private / 1e6, 1),
    }


def _table(report: list[dict[str, Any]]) -> str:
    lines = []
    for one in report:
        memory = one["memory"]
        lines += [
            f"{one['shards']} shards",
            f"  one client, p50: {one['p50_ms'][0]} ms single, {one['p50_ms'][1]} router, ratio "
            f"{one['p50_ratio']}; p99: {one['p99_ms'][0]}, {one['p99_ms'][1]}, ratio {one['p99_ratio']}",
            f"  more for a request: {one['overhead_ms']} ms, {one['bytes_sent']:,} bytes to shards, "
            f"{one['bytes_back']:,} back",
            f"  of the processors, for a request: {one['cpu_ms'][0]} ms single; {one['cpu_ms'][1]} router, "
            f"{one['cpu_ms'][2]} all shards",
            f"  {CLIENTS} clients, requests a second: {one['requests_a_second'][0]} single, "
            f"{one['requests_a_second'][1]} router",
            f"  vectors in memory: {memory['single']['vectors_MB']} MB single, router "
            f"{memory['router']['vectors_MB']}, shards {[s['vectors_MB'] for s in memory['shards']]}",
            f"  no file's: {memory['single']['own_MB']} MB single, router {memory['router']['own_MB']}, "
            f"shards {[s['own_MB'] for s in memory['shards']]}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
