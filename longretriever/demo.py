"""The whole way in a few minutes, told as a story: what `make demo` shows.

A simulated market writes a log; the log is evaluated exactly as any real one would be (`evaluate_log`: cut by
time, ingest, train, index, requests), and then one user is looked at closely. Since the market is simulated,
the user's true taste is known, so the candidates can be held against the truth and not only against clicks.
At last people of a smaller market live some days with and without LongRetriever: a small `experiment ab`.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.panel import Panel

from longretriever.console import show_retrieval, testing_bar, training_bar
from longretriever.errors import MissingExtra
from longretriever.evaluate.report import table
from longretriever.evaluate.run import evaluate_log
from longretriever.experiment.ab.plan import Arm, Plan, Route, world
from longretriever.experiment.ab.ranking import need_sklearn
from longretriever.experiment.ab.report import write
from longretriever.experiment.ab.routes import ItemToItem, Popular
from longretriever.experiment.ab.run import run as run_test
from longretriever.experiment.ab.terminal import tables, whiskers
from longretriever.experiment.page import need_extra
from longretriever.market import Market, MarketConfig
from longretriever.model.config import TrainConfig
from longretriever.retrieve.interests import Pgin
from longretriever.retrieve.retrieval import Retrieval
from longretriever.retrieve.retriever import Retriever
from longretriever.retrieve.rules import Rules
from longretriever.store.behaviors import Store


def run(path: Path, events: int, minutes: float, seed: int, console: Console) -> None:
    """Write everything under `path` and tell what happens on the console."""
    began = time.perf_counter()
    log = path / "log"
    console.print(Panel("[bold]1  A log[/]  of a simulated market, whose users' true taste is known"))
    market = Market(MarketConfig.of_size(events, seed=seed))
    market.write(log)
    c = market.config
    console.print(
        f"{c.events:,} behaviors of {c.users:,} users with {c.items:,} items in {c.categories:,} categories, "
        f"in {log}\n"
    )
    console.print(Panel("[bold]2  Store, model, index, quality[/]  learned from the first 90% of the time"))
    with training_bar() as trained:
        result = evaluate_log(
            log / "events.parquet",
            items=log / "items.parquet",
            users=log / "users.parquet",
            minutes=minutes,
            config=TrainConfig(seed=seed),
            work=path,
            said=lambda line: console.print(f"  {line}", style="dim", highlight=False),
            trained=trained,
        )
    console.print(table(result))
    console.print(
        "NEW counts only items that the user had never met: the part that memory cannot answer.\n"
        "[dim]recent: the user's own last items. popular: of the last day, week or month, the best of them.\n"
        "popular-in-context: popularity inside the user's own categories.[/]\n"
    )
    console.print(Panel("[bold]3  One user[/]  what to show next, and why"))
    retriever = Retriever.load(path / "model", store=path / "full", interests=Pgin(5))
    user_id = _someone(retriever.store)
    answer = retriever.retrieve(user_id, k=500, rules=Rules(exclude_seen=True))
    show_retrieval(answer, 12)
    console.print(_truth(market, retriever, answer))
    console.print(Panel("[bold]4  A test[/]  800 people live two days with it, and the same people without"))
    _test(path / "ab", seed, console)
    console.print(
        f"\nDone in {time.perf_counter() - began:.0f} s. Look at any user and why, in a browser: "
        f"`longretriever serve {path}/model --store {path}/full --clock log`. "
        "Or go on with a log of yours: `longretriever evaluate --events YOUR_LOG`."
    )


def _test(path: Path, seed: int, console: Console) -> None:
    """A small A/B test: one table, one plot, and a report."""
    popular, neighbours = Route("popular", counted=Popular), Route("item-to-item", counted=ItemToItem)
    ours = Route("LongRetriever", learn=TrainConfig())
    arms = Arm("without", (popular, neighbours)), Arm("with LongRetriever", (popular, neighbours, ours))
    market = world(150_000, 800, seed, items=25_000)
    plan = Plan(market, arms, days=2, samples=100_000, seed=seed)
    try:
        need_sklearn()
        need_extra()
    except MissingExtra as error:
        console.print(f"Left out: {error}")
        return
    with testing_bar() as (trained, lived):
        result = run_test(
            plan,
            path / "work",
            said=lambda line: console.print(f"  {line}", style="dim", highlight=False),
            trained=trained,
            lived=lived,
        )
    files = write(result, path)
    console.print(tables(result)[0])
    console.print(whiskers(result, ("clicks", "uv_ctr", "orders", "clicked_categories")))
    console.print(f"[dim]Ranker and dice are the same, so only what was shown differs. More: {files[-1]}[/]")


def _someone(store: Store) -> int | str:
    """A user with a long life: the one at the 95th percentile by number of behaviors."""
    length = np.diff(store.group_start[store.user_group])
    user = int(np.argsort(length, kind="stable")[int(0.95 * (len(length) - 1))])
    return store.user_ids.take([user])[0]


def _truth(market: Market, retriever: Retriever, answer: Retrieval) -> str:
    """How the candidates stand in the user's true taste, which no model was shown: against the other items
    of their category that the user has not met, since those that he has met are not among them either."""
    store, user = retriever.store, int(answer.user_id)
    life = store.life(store.user_number(answer.user_id))
    met = np.array(store.item_ids.take(life.items()), np.int64)
    above = []
    for item_id in answer.item_ids[:50]:
        rivals = np.setdiff1d(market.items_of(int(market.category_of([item_id])[0])), met)
        taste = market.taste(np.full(len(rivals), user), rivals, at=answer.now)
        mine = market.taste([user], [item_id], at=answer.now)[0]
        above.append(((taste < mine).sum() + 0.5 * (taste == mine).sum()) / len(rivals))
    return (
        f"\nHeld against the truth: the user's true taste puts the first {len(above)} candidates above "
        f"[bold]{np.mean(above):.0%}[/] of the items that he has not met in their categories (chance: 50%)."
    )
