"""How fast do both encoders train, how near to the limit, and does memory grow with the length of lives?

    python benchmarks/training.py                       # a generated log of 300,000 events
    python benchmarks/training.py --events LOG.parquet  # your own
    python benchmarks/training.py --lives               # peak memory at 50, 500 and 5,000 events a user

`packed` and `cls` train in turn on the same store in one run, so that the ratio holds on a noisy machine;
medians of the turns. "outside" is the share of the time in which no model is computed: waiting for data, and
all of the loop but the step itself. "of limit" is the share of a step's time that its matrix products take by
themselves: each product that PyTorch does in some steps, attention and gradients among them, is done again on
operands of the same shape with nothing else, in turn with the steps, on one thread. `plain` is `packed`
without what goes beyond the paper.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from longretriever.model.config import TrainConfig

ALONE = TrainConfig(whole=None, interests=None)
LIMITS = {
    "packed": ALONE,
    "plain": replace(ALONE, recent_length=0, ages=False, returns=False, bag=False, overlap=8),
}


def measure(store_path: str, encoder: str, seconds: float) -> dict[str, float]:
    """Train for some seconds from scratch; the first tenth does not count."""
    from longretriever.model.train import Training
    from longretriever.store.behaviors import Store

    config = replace(ALONE, encoder=encoder, minutes=1.1 * seconds / 60, epochs=10_000, patience=10_000)
    run = Training(Store.open(store_path), config)
    run.begin()
    in_model, step = 0.0, run.run_step

    def timed(batch):
        nonlocal in_model
        began = time.perf_counter()
        loss = step(batch)
        in_model += time.perf_counter() - began
        return loss

    run.run_step = timed
    marks: list[tuple[float, int, float]] = []
    while not run.at.finished:
        run.run_epoch(
            lambda: None, lambda t: marks.append((t.position.seconds, t.position.samples, in_model))
        )
        run.at.epoch, run.at.step = run.at.epoch + 1, 0
    first = next(m for m in marks if m[0] >= 0.1 * seconds)
    last = marks[-1]
    wall = last[0] - first[0]
    return {
        "samples_per_second": (last[1] - first[1]) / wall,
        "outside": 1 - (last[2] - first[2]) / wall,
        "waiting": run.at.waiting / run.at.seconds,
        "padded": 1 - run.at.tokens / max(1, run.at.padded),
    }


class _Products(TorchDispatchMode):
    """Notes the shapes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("aten.mm.") or name.startswith("aten.bmm."):
            self.shapes.append((tuple(args[0].shape), tuple(args[1].shape)))
        elif name.startswith("aten.addmm."):
            self.shapes.append((tuple(args[1].shape), tuple(args[2].shape)))
        elif name.startswith("aten._scaled_dot_product_flash_attention_for_cpu"):
            back = "backward" in name
            B, H, M, d = args[1 if back else 0].shape
            across, along = ((B * H, M, d), (B * H, d, M)), ((B * H, M, M), (B * H, M, d))
            self.shapes += [across, across, along, along, along] if back else [across, along]
        return func(*args, **(kwargs or {}))


def of_limit(store_path: str, config: TrainConfig, steps: int = 40) -> dict[str, float]:
    """The share of a step's time that its products take by themselves, on one thread."""
    from longretriever.model.train import Training
    from longretriever.store.behaviors import Store

    torch.set_num_threads(1)
    run = Training(Store.open(store_path), replace(config, warm_start=False), threads=1)
    run.begin()
    run.workers.map = map  # type: ignore[method-assign, assignment]
    rng, plans = np.random.default_rng(0), run.batches.epoch(0, 0)
    whole, bare, samples = 0.0, 0.0, 0
    for n, plan in zip(range(steps + 5), plans, strict=False):
        parts = run.batches.assemble(plan, rng, config.parts)
        turn = run.exchange.turn(parts, [(nth,) for nth in range(len(parts))], True)
        began = time.perf_counter()
        run.run_step(turn)
        took = time.perf_counter() - began
        with _Products() as products:  # slower for being watched, so not the step that is timed
            run.run_step(turn)
        operands = [(torch.randn(a), torch.randn(b)) for a, b in products.shapes]
        began = time.perf_counter()
        for a, b in operands:
            torch.matmul(a, b)
        if n >= 5:  # warm
            bare, whole = bare + time.perf_counter() - began, whole + took
            samples += sum(part.samples for part in parts)
    return {
        "of_limit": bare / whole,
        "limit_samples_per_second": samples / bare,
        "one_thread": samples / whole,
    }


def compare(store: str, seconds: float, turns: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {"packed": [], "cls": []}
    for _ in range(turns):
        for encoder, values in found.items():
            values.append(measure(store, encoder, seconds))
    result = {e: {k: statistics.median(v[k] for v in vs) for k in vs[0]} for e, vs in found.items()}
    for name, config in LIMITS.items():
        result.setdefault(name, {}).update(of_limit(store, config))
    return result


def lives(folder: Path, seconds: float) -> dict[str, dict[str, float]]:
    """Peak memory of ingest and of training, each in a process of its own, for 100,000 events."""
    out = {}
    for length in (50, 500, 5_000):
        rng = np.random.default_rng(length)
        user = np.repeat(np.arange(100_000 // length), length)
        item = np.minimum(rng.zipf(1.3, 100_000), 5_000) - 1
        time_ = 1_600_000_000 + np.tile(np.arange(length), 100_000 // length) * 600
        log = folder / f"lives-{length}.parquet"
        columns = {"user_id": user, "item_id": item, "category_id": item % 50, "timestamp": time_}
        pq.write_table(pa.table(columns), log)
        store = folder / f"store-{length}"
        out[str(length)] = {
            "ingest_mb": _peak("ingest", str(log), str(store)),
            "training_mb": _peak("train", str(store), str(seconds)),
        }
    return out


def _peak(*arguments: str) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def _child(what: str, path: str, more: str) -> None:
    if what == "ingest":
        from longretriever.store.ingest import ingest

        ingest(path, more)
    else:
        measure(path, "packed", float(more))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def _cells(row: dict[str, float]) -> list[str]:
    counts = {"samples_per_second", "one_thread", "limit_samples_per_second"}
    names = ("samples_per_second", "outside", "waiting", "padded")
    names += ("one_thread", "limit_samples_per_second", "of_limit")
    return [(f"{row[k]:,.0f}" if k in counts else f"{row[k]:.1%}") if k in row else "" for k in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", help="a log; default: a generated one")
    parser.add_argument("--seconds", type=float, default=15, help="of each turn")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, help="default: all")
    parser.add_argument("--lives", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.lives:
            result = lives(folder, options.seconds)
            table = Table("events a user", "ingest, peak MB", "training, peak MB", title="100,000 events")
            for length, row in result.items():
                table.add_row(length, f"{row['ingest_mb']:,.0f}", f"{row['training_mb']:,.0f}")
        else:
            from longretriever.market import Market, MarketConfig
            from longretriever.store.ingest import ingest

            log = options.events
            if log is None:
                Market(MarketConfig.of_size(300_000)).write(folder / "log")
                log = folder / "log" / "events.parquet"
            ingest(log, folder / "store")
            result = compare(str(folder / "store"), options.seconds, options.turns)
            ratio = result["packed"]["samples_per_second"] / result["cls"]["samples_per_second"]
            names = ("samples/s", "outside", "waiting", "padding", "one thread", "its limit", "of limit")
            table = Table("encoder", *names, title=f"packed is {ratio:.1f} times cls")
            for encoder, row in result.items():
                table.add_row(encoder, *_cells(row))
    if options.json:
        print(json.dumps(result))
    else:
        console.print(table)


if __name__ == "__main__":
    main()
