"""Measures how well items that came after training are found by the vectors that `add_items` gives them.

    python benchmarks/new_items.py --events EVENTS --items ITEMS [--users USERS] [--minutes 0.5] [--json]

A tenth of the items is kept from training altogether: the log is cut by time, a model learns from the events
before that are of the other items, and then they are added. Requests come just before a user meets such an
item for the first time after the cut (recall of that item), and just before one of the others is met, to see
what the added ones cost. What a user has met is left out of the lists. Beside the choice of `add_items`:

    zero        the new item's own row is zero
    mean        it is the mean of its category's
    alike       it is the mean of those of the category's items that share the most features
    trained     the item was trained with the others, in as many minutes: what waiting for the night brings
    contexts    no vectors: as many items at random of each context as its share says
    neighbours  no model: items whose category and features the last 200 behaviors share most
    chance      200 of all items

± is half of the 95% interval over requests. `--work` keeps stores and models, for a second call.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longretriever.evaluate.run import learn, read_split, store_of
from longretriever.events import CATEGORY, ITEM, TIME
from longretriever.model import extended
from longretriever.model.config import TrainConfig
from longretriever.model.exported import Model
from longretriever.retrieve.added import add_items
from longretriever.retrieve.retrieval import Retrieval
from longretriever.retrieve.retriever import Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import Manifest
from longretriever.store.behaviors import Life, Store

BATCH, LATELY, PER_USER = 64, 200, 5


class Requests(NamedTuple):
    """Each asks just before its user meets its target for the first time."""

    lives: list[Life]
    target: list[Any]  # item ids


def main() -> None:
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        report = _measured(args, args.work or Path(folder))
    print(json.dumps(report, indent=1) if args.json else _table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", required=True)
    parser.add_argument("--items", required=True)
    parser.add_argument("--users")
    parser.add_argument("--held", type=float, default=0.1, help="share of the items kept from training")
    parser.add_argument("--split", type=float, default=0.9, help="share of the events before the cut")
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--variants", default="added,zero,mean,alike,trained")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


class World(NamedTuple):
    """A log without the past of some items."""

    histories: Store
    model: Path  # that knows nothing of these
    trained: Callable[[Path], None]  # makes one that has learned from all
    new: pa.Table  # these, as an items file has them
    asked: Requests  # for these
    others: Requests


def _world(args: argparse.Namespace, work: Path) -> World:
    cut, tables = read_split(args.events, args.items, args.users, args.split, {"threads": 1})
    rng = np.random.default_rng(args.seed)
    there = rng.permutation(np.flatnonzero(cut.in_train))
    held = np.sort(there[: round(args.held * len(there))])
    ids = cut.item_ids.take(pa.array(held))
    early = pc.less_equal(cut.full[TIME], cut.T)
    histories = cut.full.filter(pc.invert(pc.and_(pc.is_in(cut.full[ITEM], value_set=ids), early)))
    learned = histories.filter(pc.less_equal(histories[TIME], cut.T))
    new = pa.table({ITEM: ids, CATEGORY: cut.category_ids.take(pa.array(cut.item_category[held]))})
    new = new.filter(pc.is_in(new[CATEGORY], value_set=pc.unique(learned[CATEGORY])))
    new = new.join(tables["items"], ITEM)
    place = _kept(work / "histories", lambda out: store_of(histories, out, tables, {"threads": 1}))
    store = Store.open(place)
    return World(
        store,
        _kept(work / "cold", lambda out: _learn(learned, out, tables, args)),
        lambda out: _learn(cut.train, out, tables, args),
        new,
        _requests(store, cut.T, new[ITEM], args.requests, rng),
        _requests(store, cut.T, pc.unique(learned[ITEM]), args.requests, rng),
    )


def _measured(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    w = _world(args, work)
    rows: dict[str, Any] = {"before": {"others": _recall(w.model, w.histories, w.others)["R@200"]}}
    for name in args.variants.split(","):
        path = work / f"with {name}"
        if name == "trained":
            _kept(path, w.trained)
        else:
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(w.model, path)
            extended.tokens = VARIANTS[name]
            add_items(path, w.new)
        rows[name] = _recall(path, w.histories, w.asked, w.new[ITEM])
        rows[name]["others"] = _recall(path, w.histories, w.others)["R@200"]
    path = work / f"with {args.variants.split(',')[0]}"
    n = Model.open(path).n_items
    rows["contexts"] = {"R@200": _by_contexts(path, w.histories, w.asked)}
    rows["neighbours"] = {"R@200": _by_neighbours(path, w.histories, w.asked, args.seed)}
    rows["chance"] = {"R@200": 200 / n}
    counts = {
        "items": n,
        "added": w.new.num_rows,
        "requests": len(w.asked.target),
        "others": len(w.others.target),
    }
    return {**counts, "rows": rows}


def _kept(path: Path, make: Callable[[Path], object]) -> Path:
    if not path.exists():
        make(path)
    return path


def _learn(events: pa.Table, out: Path, tables: dict[str, pa.Table], args: argparse.Namespace) -> None:
    store = store_of(events, out.with_name(f"{out.name} store"), tables, {"threads": 1})
    learn(store, out, TrainConfig(minutes=args.minutes, seed=args.seed), threads=1)


def _requests(store: Store, T: int, among: Any, n: int, rng: np.random.Generator) -> Requests:
    """Some first meetings after T with these items, of users who did something before, a few of each."""
    user = np.repeat(np.arange(store.n_users), np.diff(store.group_start[store.user_group]))
    item, time = np.asarray(store.event_item), np.asarray(store.event_time)
    order = np.lexsort((time, item, user))
    first = order[np.flatnonzero(np.diff(user[order] * store.n_items + item[order], prepend=-1))]
    lived = np.bincount(user, time <= T, minlength=store.n_users) > 0
    wanted = pc.is_in(store.items[ITEM], value_set=among.cast(store.items[ITEM].type)).to_numpy()
    rows = rng.permutation(first[(time[first] > T) & lived[user[first]] & wanted[item[first]]])
    nth: dict[int, int] = {}
    few = []
    for row in rows:
        nth[user[row]] = nth.get(user[row], 0) + 1
        if nth[user[row]] <= PER_USER:
            few.append(row)
    few = few[:n]
    lives = [store.life(int(user[row]), float(time[row])) for row in few]
    return Requests(lives, store.item_ids.take(item[few]))


def _answers(path: Path, store: Store, asked: Requests, k: int) -> list[Retrieval]:
    retriever, rules = Retriever.load(path, store=store.path), Rules(exclude_seen=True)
    parts = (asked.lives[at : at + BATCH] for at in range(0, len(asked.lives), BATCH))
    return [answer for lives in parts for answer in retriever.answer(lives, k, rules=rules)]


def _recall(path: Path, store: Store, asked: Requests, new: Any = ()) -> dict[str, float]:
    """Recall, half of its interval, and the part of the lists that new items are."""
    new, ranks, part = set(new.to_pylist() if new else ()), [], []
    for answer, target in zip(_answers(path, store, asked, 200), asked.target, strict=True):
        found = answer.item_ids
        ranks.append(found.index(target) if target in found else 200)
        part.append(np.mean([item in new for item in found]) if found else 0.0)
    rank = np.array(ranks)
    half = 1.96 * np.std(rank < 200) / np.sqrt(len(rank))
    figures = {"R@50": np.mean(rank < 50), "R@200": np.mean(rank < 200), "±": half, "of lists": np.mean(part)}
    return {name: float(x) for name, x in figures.items()}


def _by_contexts(path: Path, store: Store, asked: Requests) -> float:
    """How often the target is among 200 items that are drawn from the contexts chosen, each by its share."""
    model = Model.open(path)
    size, chances = np.diff(model.category_start), []
    for answer, target in zip(_answers(path, store, asked, 1), asked.target, strict=True):
        share = np.zeros(len(size))
        for context in answer.contexts:
            if context.category_id is not None:
                share[model.category_ids.number_of(context.category_id)] = context.share
        drawn = _drawn(share, size)
        c = model.category_of(np.array([model.item_ids.number_of(target)]))[0]
        chances.append(drawn[c] / size[c])
    return float(np.mean(chances))


def _drawn(share: np.ndarray, size: np.ndarray) -> np.ndarray:
    """[C] how many of 200 items go to each category; what a small one cannot take goes to the others."""
    drawn, left = np.zeros(len(size)), 200.0
    while left > 1e-6 and (open_ := np.where(drawn < size - 1e-9, share, 0)).any():
        more = np.minimum(open_ / open_.sum() * left, size - drawn)
        drawn, left = drawn + more, left - more.sum()
    return drawn


def _by_neighbours(path: Path, store: Store, asked: Requests, seed: int) -> float:
    """Each behavior gives 1 to the items of its category, and 1 more for each feature in common."""
    code = np.c_[store.item_category, np.asarray(store.item_feature)].astype(np.int64)
    values = code.max(axis=0) + 1
    key = code[:, :1] * values + code  # a feature counts within the category
    there = pc.is_in(store.items[ITEM], value_set=Model.open(path).items[ITEM]).to_numpy()
    rng, found = np.random.default_rng(seed), []
    for life, target in zip(asked.lives, asked.target, strict=True):
        met = key[life.recent(LATELY).item]
        score = np.where(there, rng.random(len(key)) / 2, -1000)
        for f in range(key.shape[1]):
            known = (code[:, f] > 0) | (f == 0)
            score += known * np.bincount(met[:, f], minlength=key[:, f].max() + 1)[key[:, f]]
        score[life.items()] = -1000
        found.append((score > score[store.item_number(target)]).sum() < 200)
    return float(np.mean(found))


# -- other choices of a new item's own row


def zero(base: Manifest, category: np.ndarray, code_nF: np.ndarray) -> np.ndarray:
    plain = (code_nF == 0).all(axis=1)
    return _TOKENS(base, category, code_nF) - base.load_array("category_row")[category] * plain[:, None]


def mean(base: Manifest, category: np.ndarray, code_nF: np.ndarray) -> np.ndarray:
    return zero(base, category, code_nF) + base.load_array("category_row")[category]


def alike(base: Manifest, category: np.ndarray, code_nF: np.ndarray) -> np.ndarray:
    start, feature = base.load_array("category_start"), base.load_array("item_feature")
    of_item = np.repeat(np.arange(len(start) - 1), np.diff(start))
    own = base.load_array("item_token") - zero(base, of_item, feature)
    out = zero(base, category, code_nF)
    for i, c in enumerate(category):
        mine = slice(start[c], start[c + 1])
        common = ((feature[mine] == code_nF[i]) & (code_nF[i] > 0)).sum(axis=1)
        out[i] += own[mine][common == common.max()].mean(axis=0)
    return out


_TOKENS = extended.tokens
VARIANTS = {"added": _TOKENS, "zero": zero, "mean": mean, "alike": alike}


def _table(report: dict[str, Any]) -> str:
    columns = {"R@50": 7, "R@200": 7, "±": 7, "of lists": 10, "others": 8}
    lines = [
        f"{report['added']:,} of {report['items']:,} items added; {report['requests']:,} requests for them, "
        f"{report['others']:,} for others (the last column is their R@200)",
        f"{'':11}" + "".join(f"{name:>{width}}" for name, width in columns.items()),
    ]
    for name, row in report["rows"].items():
        cells = {column: f"{row[column]:.3f}" if column in row else "" for column in columns}
        lines.append(f"{name:11}" + "".join(f"{cells[column]:>{width}}" for column, width in columns.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
