"""`train`: a store becomes a model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longretriever.cli import options, parsing
from longretriever.console import LEARNING, show, training_bar

if TYPE_CHECKING:
    from longretriever.model.train import Position


def train(
    store: options.StoreFolder,
    path: Annotated[Path, typer.Option("--out", help="Folder of the model.")],
    method: Annotated[str, typer.Option(help="longretriever, ebr, mind or ulim.")] = "longretriever",
    preset: Annotated[
        str | None, typer.Option(help="paper: as published (longretriever, ebr), without what we added.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="packed: every prefix in one pass. cls: the paper's, one sample a row.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most; stops early by itself.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Wall time at most.")] = None,
    dim: Annotated[int | None, typer.Option(min=2, help="Width of all vectors.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the user tower.")] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Behaviors of a context that are read.")
    ] = None,
    step_samples: Annotated[int | None, typer.Option(min=1, help="Samples of an optimizer step.")] = None,
    validation: Annotated[
        float | None, typer.Option(min=0, help="Newest share of the log, held out.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="To learn from at most.")] = None,
    factors: Annotated[
        bool | None,
        typer.Option(
            help="Factors of who met what join the vector of all items; default yes for longretriever."
        ),
    ] = None,
    threads: options.Threads = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Of several processes (torchrun); default one each.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an unfinished training.")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Between checkpoints.")] = 120,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Train a model; goes on by itself where a killed training of the same settings stopped."""
    from longretriever.model.config import need_torch

    need_torch()
    from longretriever.model.exchange import joined
    from longretriever.model.train import train as run
    from longretriever.retrieve.retriever import WHOLE
    from longretriever.saved import opening
    from longretriever.store.behaviors import Store

    given: dict[str, Any] = {
        "encoder": encoder,
        "samples": samples,
        "epochs": epochs,
        "minutes": minutes,
        "dim": dim,
        "layers": layers,
        "context_length": context_length,
        "step_samples": step_samples,
        "validation": validation,
        "shards": shards,
    }
    with joined() as processes:  # from the beginning, so that of several one says what is wrong
        config = parsing.configured(method, preset, {**given, "seed": seed})
        if factors is not None:
            config = parsing.with_factors(config, method, factors)
        opened = Store.open(store)
        with training_bar() if processes.first else nullcontext() as progress:
            at = run(
                opened,
                path,
                config,
                progress=progress,
                fresh=fresh,
                checkpoint_seconds=checkpoint_seconds,
                threads=threads,
            )
        if not processes.first:
            return
    facts = {"path": str(path), "config": asdict(config), "training": asdict(at)}
    searching_all = path / WHOLE if (path / WHOLE).exists() else path
    of_factors = opening(searching_all, "model").facts.get("factors")
    if of_factors is not None:
        facts["factors"] = of_factors
    show(facts, as_json, _summary(path, at, of_factors))


def _summary(path: Path, at: Position, of_factors: Mapping[str, Any] | None) -> dict[str, Any]:
    seconds = max(at.seconds, 1e-9)
    summary = {
        "model": path,
        "samples": f"{at.samples:,} in {at.epoch} epochs",
        "time": f"{at.seconds:.0f} s, {at.samples / seconds:,.0f} samples/s",
        "waiting for data": f"{at.waiting / seconds:.1%}",
        "validation": f"{max(at.validation):.3f} nats below chance"
        if at.validation
        else "no held-out events",
        "ended because": at.finished,
    }
    if at.sent:
        megabytes = sum(at.sent.values()) / max(1, at.steps) / 1e6
        waited = at.waiting_for_others / seconds
        summary["between processes"] = f"{megabytes:.2f} MB a step, of the time {waited:.1%}"
    for name, of in at.beside.items():
        gain = max(of["validation"], default=None)
        told = f", {gain:.3f} nats below chance" if gain else ""
        summary[LEARNING[name]] = f"{of['seconds']:.0f} s{told}"
    if of_factors is not None:
        gained = f"{of_factors['gain']:.3f} nats a request, {of_factors['requests']} held out"
        summary["factors"] = f"weight {of_factors['weight']:g}: {gained}; {of_factors['seconds']:.0f} s"
    return summary
