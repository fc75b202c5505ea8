"""`serve` and `serve-shard`: candidates, and searches over a part of the items, over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longretriever.cli import options, parsing


def serve(
    model: Annotated[Path, typer.Argument(help="Folder of the model; a link to one may be turned.")],
    store: options.OtherStore = None,
    index: options.OtherIndex = None,
    live: Annotated[
        str | None,
        typer.Option(
            help="Live events: a file, redis://HOST:PORT/0 or redis+cluster://HOST:PORT,...; "
            "default live.sqlite beside the model."
        ),
    ] = None,
    clock: Annotated[
        str, typer.Option(help="What now is: wall, or log: just after the newest event, for old logs.")
    ] = "wall",
    shards: Annotated[
        str | None,
        typer.Option(metavar="URL,URL", help="Shards that search instead; of one range: replicas."),
    ] = None,
    shard_key: Annotated[str | None, typer.Option(help="API key that the shards want.")] = None,
    shard_seconds: Annotated[
        float, typer.Option(min=0.001, help="For a shard's answer; then its categories are missing.")
    ] = 0.5,
    hedge: Annotated[
        float, typer.Option(min=0, help="Seconds after which a replica is asked as well; 0: never.")
    ] = 0.05,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    workers: options.Processes = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of a worker, for batches and the page.")] = 2,
    read_key: options.ReadKeys = None,
    write_key: Annotated[
        list[str] | None, typer.Option(help="API key that may also send events, forget, reload.")
    ] = None,
    queue: options.Queue = 64,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of a request; then 504.")] = 5.0,
    body: options.Body = 1_000_000,
    k: Annotated[int, typer.Option("--k", min=1, help="Candidates of a request at most.")] = 2_000,
    batch: Annotated[int, typer.Option(min=1, help="Users of a request at most.")] = 256,
    events: Annotated[int, typer.Option(min=1, help="Events of a call at most.")] = 10_000,
    cors: Annotated[list[str] | None, typer.Option(help="Origin of another page that may ask.")] = None,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between looks for a newer model; 0: only when asked.")
    ] = 1.0,
    log: options.LogLines = "json",
    config: options.SettingsFile = None,
) -> None:
    """Serve candidates over HTTP, take live events in, and show a page that says why.

    Every option can also be set in the environment, as LONGRETRIEVER_SERVE_PORT, or in the TOML file.
    """
    from longretriever.serve.run import run
    from longretriever.serve.settings import Settings

    settings = Settings(
        model=str(model),
        store=str(store) if store else None,
        index=index,
        live=live,
        clock=parsing.one_of("--clock", clock, ("wall", "log")),
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        read_keys=tuple(read_key or ()),
        write_keys=tuple(write_key or ()),
        queue=queue,
        seconds=seconds,
        body=body,
        k=k,
        batch=batch,
        events=events,
        cors=tuple(cors or ()),
        shards=tuple(parsing.listed(shards or "")),
        shard_key=shard_key,
        shard_seconds=shard_seconds,
        hedge=hedge,
        watch=watch,
        log=parsing.one_of("--log", log, ("json", "text")),
    )
    run(settings)


def serve_shard(
    model: Annotated[Path, typer.Argument(help="Folder of the model, of which MODEL/index is enough.")],
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="The I-th of N shares of about as many items each.")
    ] = None,
    categories: Annotated[
        str | None,
        typer.Option(metavar="FIRST:END,...", help="Ranges of category numbers instead; END not included."),
    ] = None,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8100,
    workers: options.Processes = 1,
    read_key: options.ReadKeys = None,
    write_key: Annotated[list[str] | None, typer.Option(help="API key that may also reload.")] = None,
    queue: options.Queue = 64,
    seconds: Annotated[float, typer.Option(min=0.01, help="That a request may wait; then 504.")] = 1.0,
    body: options.Body = 16_000_000,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between looks for a newer index; 0: only when asked.")
    ] = 1.0,
    log: options.LogLines = "json",
    config: options.SettingsFile = None,
) -> None:
    """Serve searches over some categories of an index, for `serve --shards`.

    Needs neither the store nor the user tower.

    Every option can also be set in the environment, as LONGRETRIEVER_SERVE_SHARD_PORT, or in the TOML file.
    """
    from longretriever.serve.run import run_shard
    from longretriever.serve.settings import ShardSettings

    run_shard(
        ShardSettings(
            model=str(model),
            share=parsing.share(shard, categories),
            host=host,
            port=port,
            workers=workers,
            read_keys=tuple(read_key or ()),
            write_keys=tuple(write_key or ()),
            queue=queue,
            seconds=seconds,
            body=body,
            watch=watch,
            log=parsing.one_of("--log", log, ("json", "text")),
        )
    )
