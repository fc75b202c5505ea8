"""Which model retrieves better, and how sure is that? Both protocols, ALL and NEW, as one dict and as tables.

`evaluate` asks every model the same requests, drawn once, and gives each figure with its 95% interval over
users and again by length of history. The values behind the means come from `measure_live` and
`measure_batch`; subtract those of two models to compare them request by request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Group
from rich.table import Table
from rich.text import Text

from longretriever.errors import InputError, Mismatch
from longretriever.evaluate import metrics
from longretriever.evaluate.rivals import Lists, Recommender
from longretriever.evaluate.split import BatchRequests, LiveRequests, Split
from longretriever.events import ITEM
from longretriever.store.behaviors import Store

HISTORY = (1, 10, 50, 200, 1000)
"""Where the groups of history lengths start: 1-9, 10-49, 50-199, 200-999, 1000+ events."""

SHORT = 50
"""NDCG, hit rate, categories and coverage look at this many places."""


@dataclass(frozen=True)
class Values:
    """One model's values for the N requests of one protocol, before they are averaged.

    user      [N] user numbers
    history   [N] how many events the user had at the request
    metric    name -> [N]; "selection" is among them where the model names the contexts it chose
    coverage  batch only: the figure, then its interval
    """

    user: np.ndarray
    history: np.ndarray
    metric: Mapping[str, np.ndarray]
    coverage: tuple[float, float, float] | None = None


def evaluate(
    full: Store,
    split: Split,
    models: Mapping[str, Recommender],
    k: Sequence[int] = (50, 200, 500),
    seed: int = 1,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Ask all models all requests; a dict that JSON can hold, as `docs/evaluate.md` describes it.

    `full` is the store that `ingest` made of `split.full`. Lists are asked for `max(k)` items. `progress` is
    told which model answers what. Raises `Mismatch` when store and split are of different logs, `EventsError`
    when no request can be drawn, `InputError` when a model's lists are not what `Lists` says.
    """
    if len(k) == 0 or min(k) < 1:
        raise InputError(f"k is {list(k)}, expected at least one list length of 1 or more, such as 50.")
    _check_same_log(full, split)
    live, batch = split.live(seed=seed), split.batch(seed=seed)
    result: dict[str, Any] = {"data": _data(split, live, batch, seed), "models": {}}
    for name, model in models.items():
        if progress:
            progress(f"{name}: {len(live.user):,} live requests")
        answers: dict[str, Any] = {
            "live": {
                "all": summary(measure_live(model, split, live, k), seed),
                "new": summary(measure_live(model, split, live.only_new(), k, new=True), seed),
            }
        }
        if progress:
            progress(f"{name}: {len(batch.user):,} batch requests")
        answers["batch"] = {
            "all": summary(measure_batch(model, split, batch, k), seed),
            "new": summary(measure_batch(model, split, batch.only_new(), k, new=True), seed),
        }
        facts = getattr(model, "facts", {})
        result["models"][name] = {**answers, "train_seconds": None, "samples_per_second": None, **facts}
    return result


def measure_live(
    model: Recommender,
    split: Split,
    requests: LiveRequests,
    k: Sequence[int] = (50, 200, 500),
    new: bool = False,
) -> Values:
    """The model's recall@10, recall at each `k`, and reciprocal rank for each live request.

    With `new`, pass `requests.only_new()`: the model is told to leave the history out of its lists.
    """
    lists = ask(model, split, requests.user, requests.before, max(10, *k), new)
    rank = metrics.ranks(lists.item, requests.target)
    metric = {f"recall@{n}": metrics.recall_at(rank, n) for n in sorted({10, *k})}
    metric["mrr"] = metrics.reciprocal_rank(rank)
    if lists.contexts is not None:
        metric["selection"] = metrics.selected(lists.contexts, split.item_category[requests.target][:, None])
    return Values(requests.user, requests.history, metric)


def measure_batch(
    model: Recommender,
    split: Split,
    requests: BatchRequests,
    k: Sequence[int] = (50, 200, 500),
    new: bool = False,
) -> Values:
    """The model's recall at each `k`, NDCG, hit rate and number of categories for each batch request.

    With `new`, pass `requests.only_new()`: the model is told to leave the history out of its lists.
    """
    lists = ask(model, split, requests.user, requests.before, max(SHORT, *k), new)
    hit, size = metrics.hits(lists.item, requests.target), metrics.sizes(requests.target)
    metric = {f"recall@{n}": metrics.recall(hit, size, n) for n in sorted(set(k))}
    metric[f"ndcg@{SHORT}"] = metrics.ndcg(hit, size, SHORT)
    metric[f"hit@{SHORT}"] = metrics.hit_rate(hit, SHORT)
    metric[f"categories@{SHORT}"] = metrics.categories(lists.item, split.item_category, SHORT)
    if lists.contexts is not None:
        wanted = [split.item_category[items] for items in requests.target]
        metric["selection"] = metrics.selected(lists.contexts, wanted)
    return Values(
        requests.user, requests.history, metric, metrics.coverage(lists.item, split.in_train, SHORT)
    )


def summary(values: Values, seed: int = 1) -> dict[str, Any]:
    """Means, intervals over users, and means by length of history; None where there is nothing to average.

    The same seed resamples the same users for every model, so that intervals of two models compare.
    """
    figures = _means(values, np.ones(len(values.user), dtype=bool))
    columns = np.stack(list(values.metric.values()), axis=1)
    ends = metrics.interval(columns, values.user, np.random.default_rng(seed))
    intervals = {
        name: [_number(low), _number(high)]
        for name, low, high in zip(values.metric, ends[0], ends[1], strict=True)
    }
    if values.coverage is not None:
        figure, low, high = values.coverage if len(values.user) else (np.nan,) * 3
        figures[f"coverage@{SHORT}"] = _number(figure)
        intervals[f"coverage@{SHORT}"] = [_number(low), _number(high)]
    figures.setdefault("selection", None)
    return {
        **figures,
        "requests": len(values.user),
        "users": len(np.unique(values.user)),
        "intervals": intervals,
        "by_history": _by_history(values),
    }


def _by_history(values: Values) -> dict[str, Any]:
    group = np.searchsorted(HISTORY, values.history, side="right") - 1
    result = {}
    for number in np.unique(group):
        inside = group == number
        counts = {"requests": int(inside.sum()), "users": len(np.unique(values.user[inside]))}
        result[_span(number)] = {**_means(values, inside), **counts}
    return result


def _span(number: int) -> str:
    start = HISTORY[number]
    return f"{start}+" if number + 1 == len(HISTORY) else f"{start}-{HISTORY[number + 1] - 1}"


def _means(values: Values, inside: np.ndarray) -> dict[str, float | None]:
    some = bool(inside.any())
    return {name: _number(v[inside].mean()) if some else None for name, v in values.metric.items()}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)


def _data(split: Split, live: LiveRequests, batch: BatchRequests, seed: int) -> dict[str, Any]:
    n_train = split.train.num_rows
    return {
        "events": split.full.num_rows,
        "train_events": n_train,
        "test_events": split.full.num_rows - n_train,
        "users": split.n_users,
        "items": split.n_items,
        "train_items": int(split.in_train.sum()),
        "categories": len(split.category_ids),
        "T": split.T,
        "seed": seed,
        "live": {"requests": len(live.user), "new_requests": int(live.new.sum())},
        "batch": {"requests": len(batch.user), "new_requests": len(batch.only_new().user)},
    }


def _check_same_log(full: Store, split: Split) -> None:
    """Both number users and items; the numbers must mean the same."""
    for what, ours, theirs in (
        ("users", split.user_ids, full.user_ids.values),
        ("items", split.item_ids, full.items[ITEM].combine_chunks()),
    ):
        if not _same_ids(ours, theirs):
            raise Mismatch(
                f"{full.path} has {len(theirs):,} {what}, the split {len(ours):,}, and they are not the "
                "same: the store is of another log, or of an items file with more items. Ingest "
                "`split.full`, with items of `split.item_ids` only, and pass that store."
            )


def _same_ids(ours: pa.Array, theirs: pa.Array) -> bool:
    try:
        return bool(ours.equals(theirs.cast(ours.type)))
    except pa.ArrowInvalid:  # text that is not a number
        return False


def ask(model: Recommender, split: Split, user: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
    """The model's lists, which are what `Lists` says. Raises `InputError` otherwise."""
    if len(user) == 0:
        return Lists(np.empty((0, k), dtype=np.int64))
    lists = model.recommend(user, before, k, new)
    _check_lists(lists, len(user), k, split.n_items, type(model).__name__)
    return lists


def _check_lists(lists: Lists, n: int, k: int, n_items: int, model: str) -> None:
    item = lists.item
    if item.ndim != 2 or len(item) != n or item.shape[1] > k:
        raise InputError(f"{model} answered {n} requests for {k} items with lists of shape {item.shape}.")
    if item.size and (item.min() < -1 or item.max() >= n_items):
        raise InputError(
            f"{model} answered with item numbers from {item.min()} to {item.max()}; the store's are 0 to "
            f"{n_items - 1}, and -1 pads."
        )
    ordered = np.sort(item, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row = int(twice.any(axis=1).argmax())
        found = int(ordered[row, 1:][twice[row]][0])
        raise InputError(f"{model} lists item number {found} twice for request {row}; each counts once.")
    if lists.contexts is not None and len(lists.contexts) != n:
        raise InputError(f"{model} chose contexts for {len(lists.contexts)} requests of {n}.")


# -- tables


def table(result: Mapping[str, Any]) -> Group:
    """What `evaluate` found, to print: live, batch, and what the lists are made of. 80 columns are enough.

    Under each figure, half the width of its 95% interval; the best of each column in bold.
    """
    models, counts = result["models"], result["data"]
    if not models:
        raise InputError("there is no model in this result, expected at least one to make tables of.")
    first = next(iter(models.values()))
    live = [name for name in first["live"]["all"] if name.startswith(("recall@", "mrr"))]
    batch = [name for name in first["batch"]["all"] if name.startswith(("recall@", "ndcg@", "hit@"))]
    made_of = [
        *_columns("batch", [f"categories@{SHORT}", f"coverage@{SHORT}", "selection"]),
        *_columns("live", ["selection"]),
    ]
    return Group(
        _grid(f"Live: {_counted(counts['live'])}", models, _columns("live", live)),
        "",
        _grid(f"Batch: {_counted(counts['batch'])}", models, _columns("batch", batch)),
        "",
        _grid(f"What the {SHORT} first of the lists are made of", models, made_of, accuracy=False),
    )


_Column = tuple[str, str, str]  # protocol, "all" or "new", metric


def _columns(protocol: str, names: Sequence[str]) -> list[_Column]:
    return [(protocol, part, name) for part in ("all", "new") for name in names]


def _counted(counts: Mapping[str, int]) -> str:
    return f"{counts['requests']:,} requests, {counts['new_requests']:,} of them NEW"


def _grid(title: str, models: Mapping[str, Any], columns: Sequence[_Column], accuracy: bool = True) -> Table:
    grid = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    grid.add_column("")
    for protocol, part, name in columns:
        over = "" if accuracy else f"{protocol}\n"
        grid.add_column(f"{over}{part.upper()}\n{_heading(name)}", justify="right", no_wrap=True)
    best = {column: _best(models, column) if accuracy else None for column in columns}
    for model, answers in models.items():
        grid.add_row(model, *[_cell(answers, column, best[column]) for column in columns])
    return grid


def _heading(name: str) -> str:
    short = {"mrr": "MRR", f"ndcg@{SHORT}": "NDCG", f"hit@{SHORT}": "hit", "selection": "select"}
    short |= {f"categories@{SHORT}": "categ.", f"coverage@{SHORT}": "cover"}
    return short.get(name, name.replace("recall@", "R@"))


def _best(models: Mapping[str, Any], column: _Column) -> float | None:
    protocol, part, name = column
    found = [answers[protocol][part].get(name) for answers in models.values()]
    return max((value for value in found if value), default=None)


def _cell(answers: Mapping[str, Any], column: _Column, best: float | None) -> Text:
    protocol, part, name = column
    figures = answers[protocol][part]
    if figures.get(name) is None:
        return Text("–", style="dim")
    low, high = figures["intervals"][name]
    cell = Text(_digits(figures[name]), style="bold" if figures[name] == best else "")
    return cell.append(f"\n±{_digits((high - low) / 2)}", style="dim not bold")


def _digits(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}".removeprefix("0")
