"""How large is everything at which scale? A formula for each part, held against what a real run wrote.

    python benchmarks/sizes.py                              a thousandth of the paper's size, and on
    python benchmarks/sizes.py --store STORE --model MODEL  a store and model of your own instead
    python benchmarks/sizes.py --only-project               the projection alone

A thousandth is 18M events of 900,000 users on 150,000 items (of 900M users with 20,000 behaviors, and 150M
items): generated, ingested, trained on for `--minutes` and indexed by the commands of the package. "Ratio" is
what the formula foresees over what lies on the disk, so 1.00 is exact.

Then the formulas at each order of magnitude, from a laptop's log to the paper's, with the number of machines
of `--disk` and `--memory` bytes that would hold each: a projection, which nobody has run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

WIDE = 1 << 31  # events or groups from which on their numbers take 8 bytes


@dataclass(frozen=True)
class Size:
    """A log, and its model. `met` are pairs of a user and a category that met."""

    users: float
    items: float
    events: float
    met: float
    dim: int = 64
    factors: bool = True  # beside the vector of all items; some logs do without

    def store(self) -> dict[str, float]:
        """Bytes of the arrays; ids are integers, without titles, profiles and features."""
        row, group = (8 if n >= WIDE else 4 for n in (self.events, self.met))
        return {
            "events": self.events * (4 + 8 + 1 + 2 * row),  # item, time, kind; order of time, and back
            "groups": self.met * (4 + 8 + group),  # category, first row; by category
            "users": self.users * (8 + 8),  # id, first group
        }

    def model(self) -> dict[str, float]:
        """Bytes of what grows with items, for the default's two vectors: of contexts, and of all items."""
        return {
            "tokens": 2 * self.items * 4 * self.dim,
            "index": self.items * (2 * self.dim + 8) + self.of_all(),
            "factors": self.items * 4 * (self.dim - 1) if self.factors else 0.0,
        }

    def of_all(self) -> float:
        """Bytes of vectors that are searched whole: 16-bit floats, twice as many with factors; its number."""
        return self.items * (2 * self.dim * (1 + self.factors) + 8)

    def groups_of_near(self) -> float:
        """Bytes of the second file of the index of all items, which there is above 100,000."""
        return self.of_all() if self.items >= 100_000 else 0.0

    def training(self) -> dict[str, float]:
        """Bytes of memory of the largest of its stages, each of which comes after the other."""
        pairs = self.events  # at most: no item met twice
        return {
            "warm start": 12 * self.dim * self.items + 4 * self.dim * self.users + 20 * pairs,
            "vectors": self.items * (4 * self.dim + 4),  # a row and one number of state
        }


PAPER = (900e6, 20_000, 150e6)
"""Users, behaviors of each, and items: what LongRetriever (arXiv 2508.15486) serves."""

SCALES: dict[str, Size] = {
    "a shop": Size(1e5, 1e5, 1e7, 1e6),
    "a city": Size(1e6, 4e6, 1e8, 2e7),
    "a country": Size(1e7, 1e7, 1e10, 4e8),
    "a continent": Size(1e8, 5e7, 5e11, 1e10),
    "the paper": Size(900e6, 150e6, 900e6 * 20_000, 900e6 * 200),
}
"""Categories that a user meets (`met`) grow from 10 to 200 with his life: assumed, not the paper's."""


def main() -> None:
    args = _arguments()
    checked: list[dict[str, Any]] = []
    if args.store:
        checked = _checked(args.store, args.model)
    elif not args.only_project:
        with tempfile.TemporaryDirectory() as folder:
            checked = _checked(*_made(Path(folder), args))
    projected = [_projected(name, size, args) for name, size in SCALES.items()]
    if args.json:
        print(json.dumps({"checked": checked, "projected": projected}, indent=1))
        return
    console = Console(width=120)
    if checked:
        console.print(_table_of_check(checked))
    console.print(_table_of_projection(projected, args))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only-project", action="store_true")
    parser.add_argument("--share", type=float, default=1e-3, help="of the paper's users, lives and items")
    parser.add_argument("--minutes", type=float, default=1.0, help="of training")
    parser.add_argument("--disk", type=float, default=8e12, help="bytes of a machine's disk")
    parser.add_argument("--memory", type=float, default=256e9, help="bytes of a machine's memory")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if (args.store is None) != (args.model is None):
        parser.error("--store and --model belong together")
    return args


def _made(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    users, life, items = (max(1, round(n * args.share)) for n in PAPER)
    log, store, model = folder / "log", folder / "store", folder / "model"
    _run("generate", log, "--events", users * life, "--users", users, "--items", items)
    _run("ingest", "--events", log / "events.parquet", "--out", store)
    _run("train", store, "--out", model, "--minutes", args.minutes)
    _run("index", model)
    return store, model


def _run(*words: object) -> None:
    print(*words[:1], file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "longretriever", *map(str, words), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


# -- against a real run


def _checked(store: Path, model: Path) -> list[dict[str, Any]]:
    report = _manifest(store)["facts"]["report"]
    dim = int(np.load(model / "item_token.npy", mmap_mode="r").shape[1])
    folders = [model, model / "whole"]
    if not folders[1].exists():
        sys.exit(f"{model} has no vector of all items, expected a model of the default's two vectors.")
    factors = any((folder / "item_factor.npy").exists() for folder in folders)
    size = Size(report["users"], report["items"], report["kept"], report["groups"], dim, factors)
    written = {
        "events": _bytes(store, "event_*.npy", "time_*.npy"),
        "groups": _bytes(store, "group_*.npy", "category_group.npy"),
        "users": _bytes(store, "users.arrow", "user_group.npy"),
        "tokens": sum(_bytes(folder, "item_token.npy") for folder in folders),
        "index": sum(_bytes(folder / "index", "lists.faiss") for folder in folders),
        "factors": sum(_bytes(folder, "item_factor.npy") for folder in folders),
    }
    foreseen = size.store() | size.model()
    if near := sum(_bytes(folder / "index", "clusters.faiss") for folder in folders):
        written["groups of near items"], foreseen["groups of near items"] = near, size.groups_of_near()
    rows = [{"part": p, "foreseen": foreseen[p], "written": written[p]} for p in written if written[p]]
    return [{**row, "ratio": row["foreseen"] / row["written"], **asdict(size)} for row in rows]


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def _bytes(folder: Path, *patterns: str) -> int:
    return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern))


def _table_of_check(rows: list[dict[str, Any]]) -> Table:
    of = rows[0]
    title = f"{of['events']:,.0f} events of {of['users']:,.0f} users, {of['items']:,.0f} items"
    table = Table("part", title=title, title_justify="left", box=None)
    for name in ("foreseen MB", "written MB", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = [f"{row[name] / 1e6:,.1f}" for name in ("foreseen", "written")]
        table.add_row(row["part"], *sizes, f"{row['ratio']:.2f}")
    return table


# -- at other scales


def _projected(name: str, size: Size, args: argparse.Namespace) -> dict[str, Any]:
    store, training = sum(size.store().values()), size.training()
    served = sum(size.model().values()) + size.groups_of_near()
    return {
        "scale": name,
        **asdict(size),
        "store": store,
        "served": served,
        "warm_start": training["warm start"],
        "training": training["vectors"],
        "disks": int(np.ceil(store / args.disk)),
        "memories": int(np.ceil(served / args.memory)),
    }


def _table_of_projection(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    title = f"Projected; machines of {_short(args.disk)}B of disk and {_short(args.memory)}B of memory"
    table = Table("", title=title, title_justify="left", box=None)
    sizes = ("store", "disks", "model, index", "memories", "rows", "warm start")
    for head in ("users", "items", "events", *sizes):
        table.add_column(head, justify="right")
    for row in rows:
        bytes_ = {what: f"{_short(row[what])}B" for what in ("store", "served", "training", "warm_start")}
        counts = [_short(row[what]) for what in ("users", "items", "events")]
        table.add_row(
            row["scale"],
            *counts,
            *(bytes_["store"], f"{row['disks']:,}", bytes_["served"], f"{row['memories']:,}"),
            *(bytes_["training"], bytes_["warm_start"]),
        )
    return table


def _short(n: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if n < 999.5:
            return f"{n:.3g} {unit}".strip() if unit else f"{n:.3g}"
        n /= 1000
    return f"{n:.3g} E"


if __name__ == "__main__":
    main()
