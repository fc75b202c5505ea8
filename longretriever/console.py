"""What people see: tables on stdout, progress on stderr, and JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from longretriever.model.train import Tick
    from longretriever.retrieve.retrieval import Retrieval

out = Console()
err = Console(stderr=True)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")


def show(facts: Mapping[str, Any], as_json: bool, summary: Mapping[str, Any] | None = None) -> None:
    if as_json:
        print_json(facts)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in (summary or facts).items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        grid.add_row(name, escape(text))
    out.print(grid)


def day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def show_retrieval(answer: Retrieval, most: int) -> None:
    """Print contexts and the first candidates, each with what spoke for it."""
    contexts = Table(
        title=f"Contexts asked for user {escape(str(answer.user_id))}", title_justify="left", box=None
    )
    for name, justify in (
        ("category", "left"),
        ("share", "right"),
        ("behaviors", "right"),
        ("candidates", "right"),
    ):
        contexts.add_column(name, justify=justify)  # type: ignore[arg-type]
    for c in answer.contexts:
        contexts.add_row(
            escape(str(c.category_id)), f"{c.share:.1%}", f"{c.behaviors:,}", f"{c.candidates:,}"
        )
    out.print(contexts)
    if not len(answer):
        out.print(
            "No candidates: the user has no behaviors before this time in a category of the model, "
            "or the rules left none."
        )
        return
    grid = Table(
        title=f"\nThe first {min(most, len(answer))} of {len(answer)} candidates",
        title_justify="left",
        box=None,
    )
    grid.add_column("#", justify="right")
    grid.add_column("item", overflow="fold")
    grid.add_column("category")
    grid.add_column("score", justify="right")
    grid.add_column("cosine", justify="right")
    grid.add_column("because of", overflow="fold", style="dim")
    for found in answer.candidates[:most]:
        because = ", ".join(
            f"{_named(r.item_id, r.title)} {r.behavior} {day(r.timestamp)}".replace("  ", " ")
            for r in found.reasons[:2]
        )
        grid.add_row(
            str(found.rank),
            escape(_named(found.item_id, found.title)),
            escape(str(found.category_id)),
            f"{found.score:.2f}",
            f"{found.cosine:.2f}",
            escape(because),
        )
    out.print(grid)


def _named(item_id: Any, title: str | None) -> str:
    return f"{item_id} {title}" if title else str(item_id)


@contextmanager
def spinner(first: str) -> Iterator[Callable[[str], None]]:
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=err
    ) as progress:
        task = progress.add_task(first, total=None)
        yield lambda line: progress.update(task, description=line)


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(what, total=total)

        def advance(done: int, of: int | None = None) -> None:
            progress.update(task, completed=done, total=of or total)

        yield advance


@contextmanager
def training_bar() -> Iterator[Callable[[Tick], None]]:
    """A bar that appears with the first step; a line for each epoch stays."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
    )
    recent = 0.0
    with Progress(*columns, console=err, transient=True) as progress:
        task: Any = None

        def show(tick: Tick) -> None:
            nonlocal task, recent
            at = tick.position
            if tick.loss != tick.loss:  # an epoch has ended
                gain = f", held out {tick.validation:.3f}" if tick.validation is not None else ""
                progress.console.print(
                    f"[dim]epoch {at.epoch}: {recent:.3f} nats below chance in training{gain}, "
                    f"{tick.samples_per_second:,.0f} samples/s[/]",
                    highlight=False,
                )
                return
            gain_now = tick.chance - tick.loss
            recent = gain_now if task is None else 0.95 * recent + 0.05 * gain_now
            if task is None:
                task = progress.add_task("training", total=1.0)
            progress.update(
                task,
                completed=tick.share,
                description=f"epoch {at.epoch + 1}: {recent:.2f} nats below chance, "
                f"{tick.samples_per_second:,.0f} samples/s",
            )

        yield show
