"""Training against peers: how many samples a second, and how good is what equal time has learned?

    python benchmarks/peers.py --events EVENTS --items ITEMS --minutes 1 --turns 3
    python benchmarks/peers.py --systems longretriever,sasrec --json    # a generated log of 300,000 events

    longretriever    the default: vectors of contexts, of the whole user, and the choice of contexts
    contexts         the first of these alone, `TrainConfig(whole=None, interests=None)`
    rechub           MIND of torch-rechub as shipped, learned as the package's own example has it
    rechub-repaired  the same model without its faults, see `peers/rechub_mind.py`
    sasrec           SASRec of RecTools, which learns from the last 51 events of each user
    implicit         ALS of implicit, a floor that takes seconds

The peers' versions are pinned in `PEERS`, their settings in `peers/`; width is 64, the history 50, 2 layers
where there are layers. Each has an environment of its own, which is made in `--work` the first time, and
each training a process of its own with one thread on one processor. All get the same events, those before
the cut in time (docs/evaluate.md), and the same seconds in which to learn. Only those of the training loop
count; starting, reading, ordering samples, warm starts, choosing settings and validation are "prepare". Then
each writes lists of 500 items for the users of the batch protocol, with repeats for ALL and without for NEW,
and the project's metrics judge them all. Systems take turns; figures are medians of the turns, and turn n
has the seed n.

A sample is an event to be foretold from those before it: a row of `rechub`, a position of `sasrec`, and the
sum of all that is learned for `longretriever`. `implicit` has none and is given its pairs of user and item,
once for each pass. "times" is the ratio to `longretriever`; "got" is the part of a processor that a process
had over its whole life: far under 100%, the machine is busy with other things and speeds don't compare.

Settings were chosen with `--validation`, which cuts the training events once more and judges there;
`--set sasrec.lr=0.003` tries another one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from longretriever.evaluate.report import measure_batch, summary
from longretriever.evaluate.rivals import Lists
from longretriever.evaluate.run import read_split, store_of
from longretriever.evaluate.split import Split, split
from longretriever.events import ITEM

HERE = Path(__file__).parent
EXTRAS = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TORCH = next(one for one in EXTRAS["train"] if one.startswith("torch"))  # ours, so that speeds compare
FIGURES = ("recall@50", "recall@200", "recall@500", "ndcg@50")
PARTS = ("all", "new")


PAIR = "pair, in each pass"


class Peer(NamedTuple):
    """A script of `peers/`, what it calls a sample, and what pip installs for it; nothing for ourselves."""

    script: str
    sample: str
    needs: tuple[str, ...] = ()


RECHUB = Peer("rechub_mind.py", "event, a row of 50", ("torch-rechub==0.9.0", TORCH, "pyarrow>=18,<27"))
PEERS = {
    "longretriever": Peer("ours.py", "event, of 3 models"),
    "contexts": Peer("ours.py", "event"),
    "rechub": RECHUB,
    "rechub-repaired": RECHUB,
    # RecTools holds NumPy below 2, which newer pyarrow refuses
    "sasrec": Peer(
        "rectools_sasrec.py", "event, a position", ("rectools[torch]==0.19.0", TORCH, "pyarrow>=18,<22")
    ),
    "implicit": Peer("implicit_als.py", PAIR, ("implicit==0.7.3", "pyarrow>=18,<27")),
}


class Failed(Exception):
    """A peer that could not be installed or did not run through, with its own last words."""


class Written:
    """The lists that a system left in a file, as a `Recommender` of the batch protocol."""

    def __init__(self, file: Path) -> None:
        table = pq.read_table(file)
        self.row = {user: n for n, user in enumerate(table["user"].to_pylist())}
        self.lists = {part: table[part].to_pylist() for part in PARTS}

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        """See `Recommender`; `before` is the cut, the only time for which there are lists."""
        item = np.full((len(users), k), -1, dtype=np.int64)
        for row, user in zip(item, users, strict=True):
            found = self.lists["new" if new else "all"][self.row[int(user)]][:k]
            row[: len(found)] = found
        return Lists(item)


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task"
        cut = _prepared(args, task)
        pythons, absent = _environments(args.systems, args.work or Path(folder))
        if hasattr(os, "sched_setaffinity"):  # what is started from here on has one processor
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in args.systems if name not in absent}
        for turn in range(1, args.turns + 1):
            for name in [name for name in turns if name not in absent]:
                _say(f"{name}: turn {turn} of {args.turns}, {args.minutes:g} min of training")
                try:
                    turns[name].append(_turn(name, pythons[name], task, cut, args, turn))
                except Failed as error:
                    absent[name] = str(error)
                    _say(f"{name} failed:\n{error}")
    result = _result(cut, turns, absent, args)
    if args.plot:
        _plot(result, args.plot)
    print(json.dumps(result, indent=1)) if args.json else Console().print(_tables(result))
    sys.exit(1 if absent else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", help="a log; default: a generated one of 300,000 events")
    parser.add_argument("--items", help="their categories and features")
    parser.add_argument("--systems", type=_systems, default=list(PEERS), help="default: all")
    parser.add_argument("--minutes", type=float, default=1.0, help="of each training")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--work", type=Path, help="keep the environments here for the next call")
    parser.add_argument("--validation", action="store_true", help="judge inside the training events")
    parser.add_argument("--set", type=_setting, action="append", default=[], metavar="SYSTEM.NAME=JSON")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=".svg or .png; needs matplotlib")
    return parser.parse_args()


def _systems(text: str) -> list[str]:
    names = text.split(",")
    strange = [name for name in names if name not in PEERS]
    if strange:
        raise argparse.ArgumentTypeError(f"{', '.join(strange)}: expected some of {', '.join(PEERS)}")
    return names


def _setting(text: str) -> tuple[str, str, Any]:
    where, _, value = text.partition("=")
    system, _, name = where.partition(".")
    if system not in PEERS or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r}: expected such as sasrec.lr=0.003")
    return system, name, json.loads(value)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -- what all are given


def _prepared(args: argparse.Namespace, task: Path) -> Split:
    """The log cut in time, and in the folder `task` what every system is given of it."""
    task.mkdir()
    events, items = args.events, args.items
    if events is None:
        from longretriever.market import Market, MarketConfig

        _say("generating a log")
        Market(MarketConfig.of_size(300_000)).write(task / "log")
        events, items = task / "log" / "events.parquet", task / "log" / "items.parquet"
    _say("reading the log")
    cut, tables = read_split(events, items, None, 0.9, {})
    if args.validation:
        cut = split(cut.train)
    store_of(cut.full, task / "full", tables, {})
    pq.write_table(cut.train, task / "events.parquet")
    if "items" in tables:
        known = pc.is_in(tables["items"][ITEM], value_set=cut.train[ITEM].unique())
        pq.write_table(tables["items"].filter(known), task / "items.parquet")
    user = np.repeat(np.arange(cut.n_users), np.diff(cut.user_start))
    early = cut.time <= cut.T
    train = {"user": user[early], "item": cut.item[early], "time": cut.time[early]}
    pq.write_table(pa.table(train), task / "train.parquet")
    pq.write_table(pa.table({"user": cut.batch().user}), task / "asked.parquet")
    return cut


def _environments(systems: Sequence[str], work: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The Python of each system, and why a system has none."""
    pythons, absent = {}, {}
    for name in systems:
        peer = PEERS[name]
        try:
            pythons[name] = _environment(peer.needs, work / f"environment-{Path(peer.script).stem}")
        except Failed as error:
            absent[name] = f"not installed: {error}"
            _say(f"{name} is not installed; pip says:\n{error}")
    return pythons, absent


def _environment(needs: tuple[str, ...], folder: Path) -> str:
    """The Python of an environment with what a peer needs; made unless it is there."""
    if not needs:
        return sys.executable
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready, wanted = folder / "ready.json", json.dumps(needs)
    if not (ready.exists() and ready.read_text() == wanted):
        _say(f"installing {', '.join(needs)}: minutes, the first time")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", *needs])
        ready.write_text(wanted)
    return str(python)


def _run(command: list[str], **more: Any) -> str:
    """What it prints. Raises `Failed` with its last lines of complaint."""
    done = subprocess.run(command, capture_output=True, text=True, **more)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-12:]
        raise Failed("\n".join(last) or f"it ended with {done.returncode} without a word")
    return done.stdout


# -- one training


def _turn(
    name: str, python: str, task: Path, cut: Split, args: argparse.Namespace, turn: int
) -> dict[str, Any]:
    """One training of one system: its facts, and the figures of the lists that it wrote."""
    for left in ("store", "model"):
        shutil.rmtree(task / left, ignore_errors=True)
    (task / "lists.parquet").unlink(missing_ok=True)
    settings = {key: value for system, key, value in args.set if system == name}
    asks = {"system": name, "minutes": args.minutes, "seed": turn, "settings": settings}
    (task / "settings.json").write_text(json.dumps(asks))
    alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    began, before = time.perf_counter(), os.times()
    told = _run(
        [python, str(HERE / "peers" / PEERS[name].script), str(task)],
        env={**os.environ, **alone, "TQDM_DISABLE": "1"},
    )
    wall, after = time.perf_counter() - began, os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    facts = json.loads(told.strip().splitlines()[-1])
    facts["samples_per_second"] = facts["samples"] / max(facts["train_seconds"], 1e-9)
    facts["got"] = used / wall
    facts["prepare_seconds"] = wall - facts["train_seconds"] - facts.pop("answer_seconds")
    for part in PARTS:
        requests = cut.batch().only_new() if part == "new" else cut.batch()
        found = summary(measure_batch(Written(task / "lists.parquet"), cut, requests, new=part == "new"))
        facts[part] = {figure: found[figure] for figure in FIGURES}
        facts[part]["intervals"] = {figure: found["intervals"][figure] for figure in FIGURES}
    _say(
        f"  {facts['samples_per_second']:,.0f} samples/s with {facts['got']:.0%} of a processor; "
        f"recall@200 ALL {facts['all']['recall@200']:.3f}, NEW {facts['new']['recall@200']:.3f}"
    )
    return facts


# -- what comes out


def _result(
    cut: Split, turns: dict[str, list[dict[str, Any]]], absent: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    batch = cut.batch()
    systems: dict[str, Any] = {}
    for name in args.systems:
        if absent.get(name) or not turns.get(name):
            systems[name] = {"failed": absent.get(name, "")}
            continue
        row: dict[str, Any] = {
            key: statistics.median(turn[key] for turn in turns[name])
            for key in ("samples", "samples_per_second", "train_seconds", "prepare_seconds", "got")
        }
        for part in PARTS:
            row[part] = {f: statistics.median(turn[part][f] for turn in turns[name]) for f in FIGURES}
        systems[name] = {**row, "turns": turns[name]}
    ours = systems.get("longretriever", {}).get("samples_per_second")
    for name, row in systems.items():
        if ours and "turns" in row and PEERS[name].sample != PAIR:
            row["times_ours"] = row["samples_per_second"] / ours
    return {
        "log": {
            "train_events": cut.train.num_rows,
            "users": cut.n_users,
            "train_items": int(cut.in_train.sum()),
            "asked": len(batch.user),
            "asked_new": len(batch.only_new().user),
        },
        "minutes": args.minutes,
        "validation": args.validation,
        "systems": systems,
    }


def _tables(result: dict[str, Any]) -> Group:
    """How fast, and how good; under each figure half of its 95% interval over users, in the first turn."""
    log, rows = result["log"], result["systems"]
    found = {name: row for name, row in rows.items() if "turns" in row}
    speed = _grid(
        f"{result['minutes']:g} min of training on {log['train_events']:,} events of {log['users']:,} users "
        f"and {log['train_items']:,} items"
    )
    for heading in ("samples/s", "times", "train s", "prepare s", "got"):
        speed.add_column(heading, justify="right", no_wrap=True)
    speed.add_column("a sample is", no_wrap=True)
    for name, row in rows.items():
        if name in found:
            times = f"{row['times_ours']:.2f}" if "times_ours" in row else "–"
            figures = [f"{row['samples_per_second']:,.0f}", times]
            figures += [f"{row[key]:,.1f}" for key in ("train_seconds", "prepare_seconds")]
            speed.add_row(name, *figures, f"{row['got']:.0%}", PEERS[name].sample)
        else:
            speed.add_row(name, "not installed" if row["failed"].startswith("not inst") else "failed")

    quality = _grid(f"Batch: {log['asked']:,} users, {log['asked_new']:,} of them with NEW items")
    columns = [(part, figure) for part in PARTS for figure in FIGURES]
    for part, figure in columns:
        short = "NDCG" if figure == "ndcg@50" else figure.replace("recall", "R")
        quality.add_column(f"{part.upper()}\n{short}", justify="right", no_wrap=True)
    best = {(part, figure): max(r[part][figure] for r in found.values()) for part, figure in columns if found}
    for name, row in found.items():
        cells = []
        for part, figure in columns:
            low, high = row["turns"][0][part]["intervals"][figure]
            cell = Text(_digits(row[part][figure]), "bold" if row[part][figure] == best[part, figure] else "")
            cells.append(cell.append(f"\n±{_digits((high - low) / 2)}", "dim not bold"))
        quality.add_row(name, *cells)
    return Group(speed, "", quality)


def _grid(title: str) -> Table:
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    grid.add_column("", no_wrap=True)
    return grid


def _digits(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _plot(result: dict[str, Any], file: Path) -> None:
    """Speed beside quality, a line for each system; thin lines go from the least to the most of the turns."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = {name: row for name, row in result["systems"].items() if "turns" in row}
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#d9d9d9",
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "peers",  # the same ids each time
    }
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(8, 1.3 + 0.35 * len(rows)), layout="constrained")
        speed, quality = figure.subplots(1, 2, sharey=True)
        for y, (name, row) in enumerate(rows.items()):
            if PEERS[name].sample != PAIR:
                _dots(speed, y, [turn["samples_per_second"] for turn in row["turns"]], "black", "black")
            for part, color, filled in (("all", "#1f5fa8", "#1f5fa8"), ("new", "#c2571a", "none")):
                _dots(quality, y, [turn[part]["recall@200"] for turn in row["turns"]], color, filled)
        speed.set_xlim(left=0)
        speed.locator_params(axis="x", nbins=4)
        speed.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        speed.set_xlabel("samples a second")
        speed.set_yticks(range(len(rows)), list(rows))
        speed.set_ylim(len(rows) - 0.5, -0.5)
        quality.set_xlim(left=0)
        quality.set_xlabel(f"recall@200 after {result['minutes']:g} min: ● ALL  ○ NEW")
        for axes in (speed, quality):
            axes.grid(axis="x")
        about = dict.fromkeys(("Creator", "Date", "Format", "Type")) if file.suffix == ".svg" else {}
        figure.savefig(file, metadata=about, dpi=150)


def _dots(axes: Any, y: int, values: list[float], color: str, filled: str) -> None:
    axes.plot([min(values), max(values)], [y, y], color=color, linewidth=2)
    axes.plot(statistics.median(values), y, "o", color=color, markerfacecolor=filled, markersize=7)


if __name__ == "__main__":
    main()
