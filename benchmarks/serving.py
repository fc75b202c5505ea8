"""Measures requests: in the process beside their bare parts, over HTTP, events, lives, memory.

    python benchmarks/serving.py [--work FOLDER] [--parts request,http,events,memory] [--json]

The log is generated: 2M items in 5,000 categories, users of 200 to 200,000 behaviors. The model is trained
for moments only: what is measured does not depend on how good it is. Requests ask 5 contexts at random out of
the top 20 for 500 candidates, as the paper does. Each figure is set beside another of the same run:

request  `Retriever.answer` beside what it cannot do without: reading 5 slices, ONNX runs, FAISS searches;
         they take turns on the same requests, one thread
lives    the same for users of 200, 2,000, 20,000 and (or else `--longest`) 200,000 behaviors
http     requests a second and latency at 50, 80 and 100% of what the server can do; the load generator runs
         on the same machine, and what it took of a core is said
events   an acknowledgement beside a bare write and sync of the same disk; and how long until the next
         answer knows of an event
memory   workers that share their files: start-up and memory (PSS, where shared pages count once; how much
         of it is no file's)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import httpx
import numpy as np
import psutil

from longretriever import RandomInTop, Retriever, TrainConfig, index_model, ingest
from longretriever.index import Index
from longretriever.market import Market, MarketConfig
from longretriever.store.behaviors import Store

K, N, M = 500, 5, 20
LIVES = (200, 2_000, 20_000)
PARTS = ("request", "http", "events", "memory")


def main() -> None:
    args = _arguments()
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary)
        model = args.model or _prepared(work, args)
        report: dict[str, Any] = {}
        if "request" in args.parts:
            report["request"], report["lives"] = in_process(model, args.repeats, args.longest)
        if "http" in args.parts:
            report["http"] = over_http(model, work, args.workers, args.seconds)
        if "events" in args.parts:
            report["events"] = of_events(model, work, args.seconds)
        if "memory" in args.parts:
            report["memory"] = [in_memory(model, work, workers) for workers in (1, 2, 4)]
    print(json.dumps(report, indent=1) if args.json else _table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", help="keep log, store and model here, and use them again")
    parser.add_argument("--model", type=Path, help="a model of your own instead")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--longest", type=int, default=200_000, help="behaviors of the longest life")
    parser.add_argument("--items", type=int, default=2_000_000)
    parser.add_argument("--categories", type=int, default=5_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _prepared(work: Path, args: argparse.Namespace) -> Path:
    """The folder of a model, made unless it is there."""
    from longretriever.model.train import train

    model, log = work / "model", work / "log"
    if not (model / "index").exists():
        sizes = {"users": args.users, "items": args.items, "categories": args.categories}
        Market(MarketConfig.of_size(args.events, least=200, most=args.longest, **sizes)).write(log)
        ingest(
            log / "events.parquet", work / "store", items=log / "items.parquet", users=log / "users.parquet"
        )
        brief = TrainConfig(whole=None, interests=None, warm_start=False, samples=100_000)
        train(Store.open(work / "store"), model, brief)
        index_model(model)
    return model


# -- in the process


def in_process(model: Path, repeats: int, longest: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The request of a user of about 20,000 behaviors beside its bare parts; and users of other lengths."""
    retriever = Retriever.load(model)
    lives = [_users_of(retriever.store, behaviors) for behaviors in (*LIVES, longest)]
    request = _beside_parts(retriever, lives[2], repeats)
    timed = [{"behaviors": int(np.median(sizes)), "ms": []} for _, sizes in lives]
    for n in range(repeats):  # turn by turn, so that all have the same luck
        for (users, _), row in zip(lives, timed, strict=True):
            row["ms"].append(_timed(lambda: _answer(retriever, users[n % len(users)], n)))  # noqa: B023
    for row in timed:
        row["ms"] = round(float(np.median(row["ms"])), 3)
    return request, timed


def _users_of(store: Store, behaviors: int) -> tuple[np.ndarray, np.ndarray]:
    """The 5 users whose lives are closest to this long, and how long they are."""
    size = np.diff(store.group_start[store.user_group])
    users = np.argsort(abs(np.log(size / behaviors)), kind="stable")[:5]
    return users, size[users]


def _answer(retriever: Retriever, user: int, seed: int) -> Any:
    return retriever.answer([retriever.store.life(int(user))], K, rng=seed, interests=RandomInTop(N, M))


def _beside_parts(retriever: Retriever, lives: tuple[np.ndarray, np.ndarray], repeats: int) -> dict[str, Any]:
    users, sizes = lives
    whole, parts = [], []
    stages: dict[str, list[float]] = {}
    for n in range(repeats + 10):
        user = int(users[n % len(users)])
        seen = _recorded(retriever, user, n)
        took, laps = _lapped(retriever, user, n)
        bare = [_timed(part) for part in seen.parts(retriever.store, user)]
        if n >= 10:  # warm
            whole.append(took)
            parts.append(bare)
            for stage, milliseconds in laps.items():
                stages.setdefault(stage, []).append(milliseconds)
    bare_ms = np.median(parts, axis=0)
    return {
        "behaviors": int(np.median(sizes)),
        "p50_ms": round(float(np.median(whole)), 3),
        "p99_ms": round(float(np.quantile(whole, 0.99)), 3),
        "bare_ms": dict(zip(("slices", "onnx", "faiss"), bare_ms.round(3).tolist(), strict=True)),
        "times_bare": round(float(np.median(whole) / np.median(np.sum(parts, axis=1))), 2),
        "stages_ms": {stage: round(float(np.median(ms)), 3) for stage, ms in stages.items()},
    }


class Bare(NamedTuple):
    """What one request has to do at least: calls of ONNX Runtime and FAISS, and slices of the store."""

    runs: list[tuple[Any, dict[str, np.ndarray]]]  # sessions and what they are fed with
    searches: list[tuple[Any, np.ndarray, np.ndarray, int]]  # indexes and what they are asked
    categories: np.ndarray  # numbers of the store

    def parts(self, store: Store, user: int) -> list[Callable[[], Any]]:
        def slices() -> None:
            for category in self.categories:
                rows = store.in_context(user, int(category))
                np.array(store.event_item[rows]), np.array(store.event_time[rows])

        def onnx() -> None:
            for session, feed in self.runs:
                session.run(None, feed)

        def search() -> None:
            for index, user_vectors, contexts, k in self.searches:
                whole = contexts < 0
                if whole.any() and index._clusters is not None:
                    index._clusters.search(user_vectors[whole], k)
                elif whole.any():
                    index._all.search_preassigned(user_vectors[whole], k, _every(index, whole), None)
                if not whole.all():
                    wanted = np.ascontiguousarray(contexts[~whole, None])
                    index._faiss.search_preassigned(user_vectors[~whole], k, wanted, None)

        return [slices, onnx, search]


def _every(index: Index, which: np.ndarray) -> np.ndarray:
    return np.tile(np.arange(index.n_categories), (int(which.sum()), 1))


def _recorded(retriever: Retriever, user: int, seed: int) -> Bare:
    """What one request feeds to ONNX and FAISS."""
    bare, categories = Bare([], [], np.empty(0)), []
    searched = [retriever._of_contexts]
    if retriever._of_all is not searched[0]:
        searched.append(retriever._of_all)
    for model, index in [(one.model, one.index) for one in searched]:

        def keep_feed(rows: Any, model: Any = model, feed: Any = model._feed) -> Any:
            categories.extend(row.category for row in rows if row.category >= 0)
            bare.runs.append((model._session, feed(rows)))
            return bare.runs[-1][1]

        def keep_search(
            vectors: Any, contexts: Any, k: int, without: Any, index: Any = index, search: Any = index.search
        ) -> Any:
            bare.searches.append((index, vectors, contexts, k))
            return search(vectors, contexts, k, without)

        model._feed, index.search = keep_feed, keep_search
    try:
        _answer(retriever, user, seed)
    finally:
        for model, index in [(one.model, one.index) for one in searched]:
            del model._feed, index.search
    return bare._replace(categories=retriever.store_categories(np.array(categories)))


def _timed(work: Callable[[], Any]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _lapped(retriever: Retriever, user: int, seed: int) -> tuple[float, dict[str, float]]:
    spent: dict[str, float] = {}
    begin = last = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        spent[stage] = spent.get(stage, 0.0) + 1e3 * (now - last)
        last = now

    life = retriever.store.life(user)
    retriever.answer([life], K, rng=seed, interests=RandomInTop(N, M), lap=lap)
    return 1e3 * (last - begin), spent


# -- over HTTP


@contextmanager
def _server(model: Path, work: Path, *options: str) -> Iterator[tuple[str, psutil.Process, float]]:
    """Its address, its process, and the seconds until it was ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    live = work / f"live-{time.time_ns()}.sqlite"
    command = [
        sys.executable,
        "-m",
        "longretriever",
        "serve",
        str(model),
        "--port",
        str(port),
        "--live",
        str(live),
    ]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    start = time.perf_counter()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(
            [*command, "--clock", "log", "--threads", "1", "--queue", "1000", *options],
            stderr=nothing,
            env=one_thread,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                httpx.get(f"{url}/readyz").raise_for_status()
                break
            except httpx.HTTPError:
                if process.poll() is not None:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.02)
        yield url, psutil.Process(process.pid), time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        for file in work.glob(f"{live.name}*"):
            file.unlink()


def over_http(model: Path, work: Path, workers: int, seconds: float) -> dict[str, Any]:
    store = Store.open(Retriever.load(model).store.path)
    users = store.user_ids.take(_users_of(store, 20_000)[0])
    bodies = [_asking(user, seed) for seed in range(40) for user in users]
    with _server(model, work, "--workers", str(workers)) as (url, process, _):
        alone = asyncio.run(_closed(url, bodies, 1, seconds))
        cpu = _cpu_of(process)
        full = asyncio.run(_closed(url, bodies, 8 * workers, seconds))
        full["server_cpu_ms"] = round(1e3 * (_cpu_of(process) - cpu) / (full["a_second"] * seconds), 2)
        capacity = full["a_second"]
        loads = {
            share: asyncio.run(_open(url, bodies, share * capacity, 32 * workers, seconds))
            for share in (0.5, 0.8, 1.0)
        }
    within = alone.pop("within_ms")
    return {
        "workers": workers,
        "alone": alone,
        "server_overhead": round(alone["p50_ms"] / within - 1, 3),
        "capacity": full,
        "load": {f"{share:.0%}": found for share, found in loads.items()},
    }


def _asking(user: int | str, seed: int) -> bytes:
    interests = {"select": "random", "n": N, "m": M}
    return json.dumps({"user_id": user, "k": K, "seed": seed, "interests": interests}).encode()


async def _closed(url: str, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Each client asks again as soon as it is answered."""
    took: list[float] = []
    within: list[float] = []
    end = time.perf_counter() + seconds
    cpu = _own_cpu()

    async def client(first: int) -> None:
        async with _Connection(url) as connection:
            n = first
            while time.perf_counter() < end:
                start = time.perf_counter()
                answer = await connection.post("/v1/retrieve", bodies[n % len(bodies)])
                took.append(time.perf_counter() - start)
                if clients == 1:
                    within.append(json.loads(answer)["timings"]["total"])
                n += clients

    await asyncio.gather(*(client(n) for n in range(clients)))
    found = _latencies(took, seconds, _own_cpu() - cpu)
    if within:
        found["within_ms"] = float(np.median(within))
    return found


async def _open(
    url: str, bodies: list[bytes], rate: float, connections: int, seconds: float
) -> dict[str, Any]:
    """Requests arrive at random at this rate, whether or not earlier ones are answered; waiting counts."""
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(1 / rate, round(rate * seconds)))
    took: list[float] = []
    free: asyncio.Queue[_Connection] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await _Connection(url).__aenter__())
    cpu, begin = _own_cpu(), time.perf_counter()

    async def ask(n: int, due: float) -> None:
        connection = await free.get()
        await connection.post("/v1/retrieve", bodies[n % len(bodies)])
        took.append(time.perf_counter() - begin - due)
        free.put_nowait(connection)

    tasks = []
    for n, due in enumerate(arrivals):
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - begin)))
        tasks.append(asyncio.create_task(ask(n, due)))
    await asyncio.gather(*tasks)
    return _latencies(took, time.perf_counter() - begin, _own_cpu() - cpu)


class _Connection:
    """HTTP/1.1 with the least that it needs, so that the load generator takes little of the machine."""

    def __init__(self, url: str) -> None:
        self.host, port = url.removeprefix("http://").split(":")
        self.port = int(port)

    async def __aenter__(self) -> _Connection:
        self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    async def post(self, path: str, body: bytes) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = await self.reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.splitlines()[0].decode())
        length = int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        return await self.reader.readexactly(length)


def _latencies(took: list[float], seconds: float, cpu: float) -> dict[str, Any]:
    p50, p99 = 1e3 * np.quantile(took, [0.5, 0.99])
    figures = {
        "a_second": len(took) / seconds,
        "p50_ms": p50,
        "p99_ms": p99,
        "generator_cores": cpu / seconds,
    }
    return {name: round(float(value), 2) for name, value in figures.items()}


def _cpu_of(process: psutil.Process) -> float:
    """Seconds that it and its children have used."""
    used = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in used)


def _own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# -- events


def of_events(model: Path, work: Path, seconds: float) -> dict[str, Any]:
    store = Retriever.load(model).store
    user = store.user_ids.take(_users_of(store, 20_000)[0][:1])[0]
    item = store.item_ids.take([0])[0]
    with _server(model, work) as (url, _, _):
        rates = {size: asyncio.run(_storm(url, item, size, seconds)) for size in (1, 100)}
        seen = asyncio.run(_until_seen(url, user, item, seconds))
        alone = asyncio.run(_storm(url, item, 1, seconds, clients=1))
    sync = _bare_sync(work)
    return {
        "8_clients": {f"batches of {size}": found for size, found in rates.items()},
        "1_client": alone,
        "bare_write_and_sync_ms": sync,
        "acknowledged_times_bare": round(alone["p50_ms"] / sync, 2),
        "until_the_next_answer_knows": seen,
    }


async def _storm(url: str, item: Any, size: int, seconds: float, clients: int = 8) -> dict[str, Any]:
    took: list[float] = []
    end = time.perf_counter() + seconds
    first = time.time_ns()

    async def client(number: int) -> None:
        n = 0
        async with _Connection(url) as connection:
            while time.perf_counter() < end:
                one = {"user_id": 10_000_000 + number, "item_id": item}
                sent = [
                    {**one, "timestamp": n * size + i, "event_id": f"{first}-{number}-{n}-{i}"}
                    for i in range(size)
                ]
                body = json.dumps({"events": sent}).encode()
                start = time.perf_counter()
                await connection.post("/v1/events", body)
                took.append(time.perf_counter() - start)
                n += 1

    await asyncio.gather(*(client(n) for n in range(clients)))
    p50, p99 = 1e3 * np.quantile(took, [0.5, 0.99])
    figures = {"events_a_second": len(took) * size / seconds, "p50_ms": p50, "p99_ms": p99}
    return {name: round(float(value), 2) for name, value in figures.items()}


async def _until_seen(url: str, user: Any, item: Any, seconds: float) -> dict[str, float]:
    """From sending an event to having an answer that counts it: one event and one request, in turn."""
    took, end, n = [], time.perf_counter() + min(seconds, 5), 0
    async with _Connection(url) as connection:
        while time.perf_counter() < end:
            event = {"user_id": user, "item_id": item, "timestamp": 1_800_000_000 + n}
            start = time.perf_counter()
            await connection.post("/v1/events", json.dumps(event).encode())
            answer = json.loads(await connection.post("/v1/retrieve", _asking(user, n)))
            took.append(time.perf_counter() - start)
            if answer["now"] != event["timestamp"] + 1:
                raise RuntimeError("the answer does not know of the event")
            n += 1
    p50, p99 = 1e3 * np.quantile(took, [0.5, 0.99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "live_events_in_the_end": n}


def _bare_sync(work: Path, writes: int = 300) -> float:
    """Median milliseconds of appending a page to a file and forcing it to the disk."""
    file = os.open(work / "sync", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    took = []
    for _ in range(writes):
        start = time.perf_counter()
        os.write(file, b"\0" * 4096)
        os.fdatasync(file)
        took.append(time.perf_counter() - start)
    os.close(file)
    (work / "sync").unlink()
    return round(1e3 * float(np.median(took)), 3)


# -- memory


def in_memory(model: Path, work: Path, workers: int) -> dict[str, Any]:
    store = Retriever.load(model).store
    bodies = [_asking(user, 0) for user in store.user_ids.take(np.arange(min(200, store.n_users)))]
    with _server(model, work, "--workers", str(workers)) as (url, process, ready):
        asyncio.run(_closed(url, bodies, 4 * workers, 2.0))
        family = [process, *process.children(recursive=True)]
        kinds = [memory_of(one.pid) for one in family]
    return {
        "workers": workers,
        "ready_s": round(ready, 2),
        "pss_mb": round(sum(kind["Pss"] for kind in kinds) / 1e3),
        "own_mb": round(sum(kind["Anonymous"] for kind in kinds) / 1e3),
    }


def memory_of(pid: int) -> dict[str, int]:
    """kB by kind. What is not anonymous are pages of files, which the system can take back."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}


def _table(report: dict[str, Any]) -> str:
    printers = {"request": _of_request, "lives": _of_lives, "http": _of_http, "events": _of_events}
    lines = [line for part, of in printers.items() if part in report for line in of(report[part])]
    for row in report.get("memory", []):
        memory = f"{row['pss_mb']} MB, {row['own_mb']} MB of it not pages of files"
        lines.append(f"{row['workers']} workers: ready in {row['ready_s']} s, {memory}")
    return "\n".join(lines)


def _of_request(r: dict[str, Any]) -> Iterator[str]:
    p50, p99 = f"p50 {r['p50_ms']} ms", f"p99 {r['p99_ms']} ms"
    yield f"request of a user of {r['behaviors']:,} behaviors: {p50}, {p99}"
    yield f"  bare parts, ms: {_listed(r['bare_ms'])}: {r['times_bare']} times their sum"
    yield f"  by stage, ms: {_listed(r['stages_ms'])}"


def _of_lives(rows: list[dict[str, Any]]) -> Iterator[str]:
    fastest = min(row["ms"] for row in rows)
    for row in rows:
        ratio = f"{row['ms'] / fastest:.2f} times the fastest"
        yield f"  {row['behaviors']:>9,} behaviors  {row['ms']:6.2f} ms  {ratio}"


def _of_http(h: dict[str, Any]) -> Iterator[str]:
    alone, cpu = h["alone"], h["capacity"]["server_cpu_ms"]
    yield f"over HTTP, {h['workers']} workers, {cpu} ms of a core a request"
    yield f"  one client: p50 {alone['p50_ms']} ms, {h['server_overhead']:.1%} above the work itself"
    for name, load in {"full": h["capacity"], **h["load"]}.items():
        latency = f"p50 {load['p50_ms']:>7} ms  p99 {load['p99_ms']:>7} ms"
        generator = f"generator {load['generator_cores']} cores"
        yield f"  {name:>5}  {load['a_second']:>7} requests/s  {latency}  {generator}"


def _of_events(e: dict[str, Any]) -> Iterator[str]:
    for name, found in {**e["8_clients"], "one client": e["1_client"]}.items():
        latency = f"p50 {found['p50_ms']} ms, p99 {found['p99_ms']} ms"
        yield f"events, {name}: {found['events_a_second']:,} a second, {latency}"
    bare, ratio = e["bare_write_and_sync_ms"], e["acknowledged_times_bare"]
    yield f"  bare write and sync {bare} ms: acknowledged in {ratio} times that"
    seen = e["until_the_next_answer_knows"]
    yield f"  event sent to an answer that counts it: p50 {seen['p50_ms']} ms, p99 {seen['p99_ms']} ms"


def _listed(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.items())


if __name__ == "__main__":
    main()
