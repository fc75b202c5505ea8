"""`retrieve`: candidates of a user with their reasons, or everyone's in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing
from longretriever.console import bar, print_json, show, show_retrieval
from longretriever.errors import InputError


def retrieve(
    model: options.ModelFolder,
    user: Annotated[str | None, typer.Option(help="A user's id.")] = None,
    all_users: Annotated[
        bool, typer.Option("--all-users", help="Everyone, to the Parquet file --out.")
    ] = False,
    path: Annotated[Path | None, typer.Option("--out", help="Parquet file for --all-users.")] = None,
    k: Annotated[int, typer.Option(help="Candidates at most.")] = 500,
    now: Annotated[
        float | None, typer.Option(help="Unix seconds; only behaviors before count. Default: after the last.")
    ] = None,
    select: Annotated[
        str | None,
        typer.Option(help="Contexts: pgin:K, top:N, or random:N:M (N of the top M). Default: the model's."),
    ] = None,
    merge: Annotated[
        str | None, typer.Option(help="probability, quota, round-robin or score. Default: the model's.")
    ] = None,
    exclude_seen: Annotated[
        bool, typer.Option("--exclude-seen", help="Leave out what the user met.")
    ] = False,
    exclude_item: Annotated[list[str] | None, typer.Option(help="An item to leave out.")] = None,
    exclude_category: Annotated[list[str] | None, typer.Option(help="A category to leave out.")] = None,
    include_category: Annotated[list[str] | None, typer.Option(help="A category to ask in any case.")] = None,
    quota: Annotated[
        list[str] | None, typer.Option(metavar="CATEGORY=N", help="At most N candidates of a category.")
    ] = None,
    boost: Annotated[
        list[str] | None, typer.Option(metavar="CATEGORY=X", help="Factor on a category's share.")
    ] = None,
    returns: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share for items met before. Default: as the model judges."),
    ] = None,
    store: options.OtherStore = None,
    index: options.OtherIndex = None,
    exact: Annotated[bool, typer.Option("--exact", help="Scan all items instead of using an index.")] = False,
    most: Annotated[int, typer.Option("--show", min=1, help="Candidates to print; --json prints all.")] = 20,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes for --all-users. Default: one for each processor."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of the user tower.")] = 1,
    seed: options.Seed = 0,
    as_json: options.Json = False,
) -> None:
    """Candidates for a user, each with the behaviors that spoke for it; or for all users, to a file."""
    from longretriever.retrieve.bulk import cores
    from longretriever.retrieve.retriever import Retriever

    if (user is None) == (not all_users):
        raise InputError("retrieve needs --user ID, or --all-users together with --out FILE.parquet.")
    if all_users and path is None:
        raise InputError("--all-users needs --out FILE.parquet to write to.")
    if user is not None and path is not None:
        raise InputError("--out is for --all-users; for one user, --json prints all candidates.")
    retriever = Retriever.load(
        model,
        store=store,
        index=index,
        exact=exact,
        interests=parsing.interests(select),
        merge=parsing.merge(merge),
        threads=threads,
    )
    rules = parsing.rules(
        retriever, exclude_seen, exclude_item, exclude_category, include_category, quota, boost
    )
    rules = replace(rules, returns=returns)
    if user is not None:
        user_id = parsing.as_id(user, retriever.store.user_ids.values.type)
        answer = retriever.retrieve(user_id, k, now=now, rng=seed, rules=rules)
        if as_json:
            print_json(answer.as_dict())
        else:
            show_retrieval(answer, most)
        return
    assert path is not None
    everyone = retriever.store.user_ids
    with bar("users", len(everyone)) as advance:
        ids = (value.as_py() for value in everyone.values)
        every = workers or cores()
        rows = retriever.write(ids, path, k, now=now, seed=seed, rules=rules, workers=every, progress=advance)
    show({"path": str(path), "users": len(everyone), "rows": rows}, as_json)
