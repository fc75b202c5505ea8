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
    from longretriever.retrieve.retrieval import Reason, Retrieval

LEARNING = {"interests": "next category", "whole": "all items", "factors": "factors of who met what"}
"""What a model learns beside its vectors of contexts, in words for people."""

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


def say(line: str) -> None:
    """A line about progress."""
    err.print(f"[dim]{escape(line)}[/]", highlight=False)


def day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def show_retrieval(answer: Retrieval, most: int) -> None:
    """Print contexts and the first candidates, each with the behavior that spoke most for it."""
    contexts = _grid(f"Contexts asked for user {answer.user_id}")
    contexts.add_column("category")
    for name in ("part of the answer", "behaviors", "candidates"):
        contexts.add_column(name, justify="right")
    total = sum(c.share for c in answer.contexts)
    for c in answer.contexts:
        name = "all items" if c.category_id is None else str(c.category_id)
        contexts.add_row(escape(name), f"{c.share / total:.1%}", f"{c.behaviors:,}", f"{c.candidates:,}")
    out.print(contexts)
    if not len(answer):
        out.print(
            "No candidates: the user has no behaviors before this time in a category of the model, "
            "or the rules left none."
        )
        return
    candidates = _grid(f"\nThe first {min(most, len(answer))} of {len(answer)} candidates")
    candidates.add_column("#", justify="right")
    candidates.add_column("item", overflow="fold")
    candidates.add_column("category")
    candidates.add_column("score", justify="right")
    candidates.add_column("because the user met", overflow="fold", style="dim")
    for found in answer.candidates[:most]:
        candidates.add_row(
            str(found.rank),
            escape(_named(found.item_id, found.title)),
            escape(str(found.category_id)),
            f"{found.score:.2f}",
            escape("".join(_said(reason) for reason in found.reasons[:1])),
        )
    out.print(candidates)


def _grid(title: str) -> Table:
    return Table(
        title=escape(title), title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0)
    )


def _named(item_id: Any, title: str | None) -> str:
    return title or str(item_id)


def _said(reason: Reason) -> str:
    kind = f"{reason.behavior}, " if reason.behavior else ""
    return f"{_named(reason.item_id, reason.title)} ({kind}{day(reason.timestamp)})"


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
    """A bar, which moves from the first step on; a line for each epoch stays."""
    with testing_bar() as (trained, _):
        yield trained


@contextmanager
def testing_bar() -> Iterator[tuple[Callable[[Tick], None], Callable[[int, int], None]]]:
    """The same, and a bar for what follows the trainings of a test: so many days are lived, of so many."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f}%"),
        TimeElapsedColumn(),
    )
    recent = 0.0
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("preparing", total=None)
        steps = 0

        def show(tick: Tick) -> None:
            nonlocal steps, recent
            at = tick.position
            if tick.learning == "factors":
                progress.update(task, total=None, description=LEARNING["factors"])
                return
            what = f"{LEARNING[tick.learning]}, " if tick.learning in LEARNING else ""
            if tick.loss != tick.loss:  # an epoch has ended
                gain = f", held out {tick.validation:.3f}" if tick.validation is not None else ""
                progress.console.print(
                    f"[dim]{what}epoch {at.epoch}: {recent:.3f} nats below chance in training{gain}, "
                    f"{tick.samples_per_second:,.0f} samples/s[/]",
                    highlight=False,
                )
                return
            gain_now = tick.chance - tick.loss
            recent = gain_now if steps == 0 else 0.95 * recent + 0.05 * gain_now
            steps += 1
            progress.update(
                task,
                total=1.0,
                completed=tick.share,
                description=f"{what}epoch {at.epoch + 1}: {recent:.2f} nats below chance, "
                f"{tick.samples_per_second:,.0f} samples/s",
            )

        def lived(done: int, total: int) -> None:
            progress.update(task, total=total, completed=done, description=f"day {done} of {total} lived")

        yield show, lived
