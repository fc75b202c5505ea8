"""How many samples more do two processes learn from than one, and what goes between them?

    python benchmarks/sharding.py                       # a generated log of 300,000 events, some 2 minutes
    python benchmarks/sharding.py --events LOG.parquet  # your own

Each of the three learners of the default model trains by itself, one process on one processor, then two on a
processor each (pinned, one thread, started by torchrun), in turn and from scratch, in one run, so that the
ratios hold on a noisy machine; of each the median of the turns. "shards" is one process with the two shards
that two processes have: the difference to "1 process" is what sharing out costs by itself. "sent" is what one
process sends in a step. "by processor time" is the ratio that would be if nobody waited: samples for each
second in which a processor worked, twice; it also holds where others use the machine. "waits" is the share of
the time in which it waits for the other, or for the network; "uneven" is what the plan foresees of the fuller
shard's work beyond the mean's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

LEARNERS = ("contexts", "all items", "next category")
WAYS = {"1 process": (1, 1), "shards": (1, 2), "2 processes": (2, 2)}  # processes, shards


def measure(store: str, learner: str, shards: int, seconds: float, step_samples: int) -> dict[str, float]:
    """Train for some seconds, of which the first fifth does not count. In every process; one answers."""
    import torch

    from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
    from longretriever.model.exchange import joined
    from longretriever.model.train import Training
    from longretriever.store.behaviors import Store

    torch.set_num_threads(1)
    with joined() as wire:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[wire.rank % len(cores)]})
        base = {
            "contexts": TrainConfig(whole=None, interests=None, warm_start=False),
            "all items": EbrConfig(warm_start=False),
            "next category": PginConfig(),
        }[learner]
        of_run = {"minutes": seconds / 60, "epochs": 10_000, "shards": shards if shards > 1 else None}
        run = Training(Store.open(store), replace(base, **of_run, step_samples=step_samples), 1, wire)
        run.begin()
        marks: list[tuple[float, int, int, float, int, float]] = []

        def mark(tick: Any) -> None:
            at = tick.position
            sent, worked = sum(run.exchange.sent.values()), time.process_time()
            marks.append((at.seconds, at.samples, at.steps, at.waiting_for_others, sent, worked))

        while not run.at.finished:
            run.run_epoch(lambda: None, mark)
            run.at.epoch, run.at.step = run.at.epoch + 1, 0
        first = next(m for m in marks if m[0] >= seconds / 5)
        wall, samples, steps, waits, sent, worked = (b - a for a, b in zip(first, marks[-1], strict=True))
        work = [1.0] if run.plan is None else run.plan.work
        return {
            "samples_per_second": samples / wall,
            "samples_per_processor_second": samples / float(wire.total([worked])[0]),
            "sent_bytes_per_step": sent / steps,
            "waits": waits / wall,
            "uneven": max(work) / (sum(work) / len(work)) - 1,
            "first": wire.first,
        }


def _measured(store: str, learner: str, way: str, seconds: float, step_samples: int) -> dict[str, float]:
    processes, shards = WAYS[way]
    child = [__file__, "--child", store, learner, str(shards), str(seconds), str(step_samples)]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *start, *child], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{learner}, {way}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(store: str, seconds: float, turns: int, step_samples: int) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for learner in LEARNERS:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(turns):
            for way, values in found.items():
                values.append(_measured(store, learner, way, seconds, step_samples))
        median = {way: {k: statistics.median(v[k] for v in vs) for k in vs[0]} for way, vs in found.items()}
        ends = median["1 process"], median["2 processes"]
        one, two = (m["samples_per_second"] for m in ends)
        one_worked, two_worked = (m["samples_per_processor_second"] for m in ends)
        result[learner] = {**median, "ratio": two / one, "by_processor_time": 2 * two_worked / one_worked}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", help="a log; default: a generated one")
    parser.add_argument("--seconds", type=float, default=6, help="of each training")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--step-samples", type=int, default=4096, help="what large logs have")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        store, learner, *numbers = options.child
        answer = measure(store, learner, int(numbers[0]), float(numbers[1]), int(numbers[2]))
        if answer.pop("first"):
            print(json.dumps(answer))
        return
    with tempfile.TemporaryDirectory() as name:
        from longretriever.market import Market, MarketConfig
        from longretriever.store.ingest import ingest

        folder, log = Path(name), options.events
        if log is None:
            Market(MarketConfig.of_size(300_000)).write(folder / "log")
            log = folder / "log" / "events.parquet"
        ingest(log, folder / "store")
        result = compare(str(folder / "store"), options.seconds, options.turns, options.step_samples)
    if options.json:
        print(json.dumps(result))
        return
    names = (*WAYS, "ratio", "by processor time", "sent, MB a step", "waits", "uneven")
    table = Table("samples/s", *names, title=f"steps of {options.step_samples:,} samples")
    for learner, row in result.items():
        two = row["2 processes"]
        table.add_row(
            learner,
            *(f"{row[way]['samples_per_second']:,.0f}" for way in WAYS),
            f"{row['ratio']:.2f}",
            f"{row['by_processor_time']:.2f}",
            f"{two['sent_bytes_per_step'] / 1e6:.2f}",
            f"{two['waits']:.1%}",
            f"{two['uneven']:.1%}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
