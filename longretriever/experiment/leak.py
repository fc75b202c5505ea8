"""Does the model win its batches by taste, or by reading the category off what the user did?

A batch that mixes categories is easy for a user vector made from behaviors of one category: most of its
negatives are of other categories, and those it can tell apart without knowing anything of taste
(LongRetriever section 2.3). For a model trained on mixed batches and one trained in context, side by side:
what each believes of itself in a mixed batch, how much of that the category alone explains, and what it
really finds in the category and in the whole corpus.

N requests, b requests of one batch, D dimensions, I items.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from longretriever.errors import InputError
from longretriever.evaluate.rivals import train_counts
from longretriever.evaluate.run import learn, read_split, store_of
from longretriever.evaluate.split import LiveRequests
from longretriever.model.config import TrainConfig
from longretriever.retrieve.retriever import Retriever
from longretriever.store.behaviors import Store

if TYPE_CHECKING:
    from longretriever.model.train import Tick

BATCH = 512  # requests that compete with each other's targets
K = (50, 200)


def leak_log(
    events: Any,
    *,
    items: Any = None,
    quantile: float = 0.9,
    minutes: float | None = None,
    samples: int | None = None,
    seed: int = 1,
    work: str | os.PathLike[str] | None = None,
    reading: Mapping[str, Any] | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
) -> dict[str, Any]:
    """Train the plain user tower on mixed and on one-category batches, and ask both; a dict for JSON.

    `minutes` or `samples` bound each of the two trainings alike. The requests are the live ones of
    `docs/evaluate.md` whose user has a behavior in the target's category; each is asked with that category as
    its context, which is what training does. The other arguments are those of `evaluate_log`.
    """
    say, reading = said or (lambda _: None), dict(reading or {})
    with nullcontext(str(work)) if work else tempfile.TemporaryDirectory(prefix="longretriever-") as folder:
        say("reading the log")
        cut, tables = read_split(events, items, None, quantile, reading)
        full = store_of(cut.full, Path(folder) / "full", tables, reading)
        store = store_of(cut.train, Path(folder) / "train", tables, reading)
        requests = cut.live(seed=seed)
        models = {}
        for name, mixed in (("mixed batches", True), ("one category a batch", False)):
            say(f"{name}: learning")
            config = TrainConfig(
                mixed=mixed,
                recent_length=0,
                ages=False,
                returns=False,
                warm_start=False,
                interests=None,
                minutes=minutes,
                samples=samples,
                seed=seed,
            )
            path = Path(folder) / ("mixed" if mixed else "in-context")
            facts = learn(store, path, config, trained, reading.get("threads"))
            retriever = Retriever.load(path, store=full.path, exact=True)
            models[name] = {**measure(retriever, full, cut.T, requests, seed), **facts}
        return {"models": models}


def measure(
    retriever: Retriever, full: Store, T: int, requests: LiveRequests, seed: int = 1
) -> dict[str, Any]:
    """What the model believes in mixed batches, and what it finds, for requests with a past in the category.

    in_batch            share of requests whose target is the best of the batch's items
    in_batch_nats       how far above guessing evenly that is, in nats a request
    category_alone      share, were only the category known and items of it drawn evenly
    category_alone_nats the same in nats
    explained           the part of the model's nats that the category alone explains, at most 1
    same_category       share of requests whose target is the best of the batch's items of its own category
    in_category@k       share of requests whose target is among the k best of its whole category
    in_corpus@k         the same among all items of train
    """
    lives = [full.life(int(u), float(t)) for u, t in zip(requests.user, requests.before, strict=True)]
    category = full.item_category[requests.target]
    vectors, known = retriever.context_vectors(lives, category)
    if known.sum() < 2:
        raise InputError(
            f"{known.sum()} live requests have a past in their target's category, expected 2 or more."
        )
    target, user_ND = requests.target[known], vectors[known]
    count = train_counts(full, T)
    item_ID, shown = retriever.store_vectors(), count > 0
    with np.errstate(divide="ignore"):
        log_q = np.log(count / count.sum())
    order = np.random.default_rng(seed).permutation(len(target))
    batches = np.array_split(order, max(1, round(len(order) / BATCH)))
    scale = retriever.model.scale
    believed = [_believed(user_ND[b], target[b], item_ID, full.item_category, log_q, scale) for b in batches]
    sums = np.array([[len(b) * value for value in row] for b, row in zip(batches, believed, strict=True)])
    hit, nats, alone, alone_nats, same = sums.sum(axis=0) / len(order)
    found = {"in_category": [], "in_corpus": []}  # type: dict[str, list[int]]
    for user_D, item in zip(user_ND, target, strict=True):
        cosine_I = np.where(shown, item_ID @ user_D, -np.inf)
        ahead = cosine_I > cosine_I[item]
        found["in_corpus"].append(int(ahead.sum()))
        found["in_category"].append(int(ahead[full.item_category == full.item_category[item]].sum()))
    recalls = {f"{where}@{k}": float(np.mean(np.array(rank) < k)) for where, rank in found.items() for k in K}
    return {
        "requests": len(order),
        "in_batch": float(hit),
        "in_batch_nats": float(nats),
        "category_alone": float(alone),
        "category_alone_nats": float(alone_nats),
        "explained": float(min(1.0, alone_nats / nats)) if nats > 0 else None,
        "same_category": float(same),
        **recalls,
    }


def _believed(
    user_bD: np.ndarray,
    target_b: np.ndarray,
    item_ID: np.ndarray,
    item_category: np.ndarray,
    log_q: np.ndarray,
    scale: float,
) -> tuple[float, float, float, float, float]:
    """In-batch accuracy and nats; the same of the category alone; accuracy among items of the category."""
    item, column = np.unique(target_b, return_inverse=True)
    logit = scale * (user_bD @ item_ID[item].T) - log_q[item]
    row = np.arange(len(target_b))
    highest = logit.max(axis=1)
    log_sum = highest + np.log(np.exp(logit - highest[:, None]).sum(axis=1))
    same = item_category[item] == item_category[target_b][:, None]
    among = np.where(same, logit, -np.inf)
    n_same = same.sum(axis=1)
    return (
        float((logit.argmax(axis=1) == column).mean()),
        float(np.log(len(item)) - (log_sum - logit[row, column]).mean()),
        float((1 / n_same).mean()),
        float(np.log(len(item)) - np.log(n_same).mean()),
        float((among.argmax(axis=1) == column).mean()),
    )


def table(result: Mapping[str, Any]) -> Table:
    """What `leak_log` found, to print."""
    models: Mapping[str, Mapping[str, Any]] = result["models"]
    grid = Table(box=None, padding=(0, 2, 0, 0))
    grid.add_column("")
    for name in models:
        grid.add_column(name, justify="right")
    for label, key, form in _LINES:
        grid.add_row(label, *[_cell(answers[key], form) for answers in models.values()])
    return grid


_LINES: Sequence[tuple[str, str, str]] = (
    ("believed: best of a mixed batch", "in_batch", "{:.3f}"),
    ("  nats above guessing", "in_batch_nats", "{:.2f}"),
    ("by the category alone", "category_alone", "{:.3f}"),
    ("  nats above guessing", "category_alone_nats", "{:.2f}"),
    ("  part of the nats explained", "explained", "{:.0%}"),
    ("best of its category in the batch", "same_category", "{:.3f}"),
    *((f"found: Recall@{k} in the category", f"in_category@{k}", "{:.3f}") for k in K),
    *((f"found: Recall@{k} in the corpus", f"in_corpus@{k}", "{:.3f}") for k in K),
    ("requests", "requests", "{:,}"),
    ("samples learned from a second", "samples_per_second", "{:,.0f}"),
)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
