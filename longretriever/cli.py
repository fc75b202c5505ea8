"""The commands, one for each stage: generate, ingest, train, index, retrieve, evaluate, experiment; and demo.

Results go to stdout, as tables for people or, with `--json`, as one JSON object; progress goes to stderr.
Exit codes: 0 done, 1 an error that is said in one line, 2 a wrong option, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import shlex
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import typer
from rich.markup import escape

from longretriever import __version__
from longretriever.console import (
    LEARNING,
    bar,
    day,
    err,
    out,
    print_json,
    show,
    show_retrieval,
    spinner,
    testing_bar,
    training_bar,
)
from longretriever.errors import InputError, LongRetrieverError
from longretriever.events import ITEM

if TYPE_CHECKING:
    from longretriever.retrieve.interests import Interests
    from longretriever.retrieve.merge import Merge
    from longretriever.retrieve.rules import Rules

app = typer.Typer(
    help="Candidates out of millions of items for each request, from a user's whole life of behaviors.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "LONGRETRIEVER"},
)
experiment = typer.Typer(help="Compare systems, with intervals and tests.", no_args_is_help=True)
app.add_typer(experiment, name="experiment")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Events = Annotated[
    list[str], typer.Option("--events", help="Log: file, folder or glob; Parquet, CSV, TSV, gzipped too.")
]
Items = Annotated[list[str] | None, typer.Option("--items", help="item_id, category_id, title, features.")]
Users = Annotated[list[str] | None, typer.Option("--users", help="user_id and categorical profile fields.")]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", metavar="OURS=THEIRS", help="A column of the log, e.g. user_id=visitorid."),
]
ItemColumns = Annotated[
    list[str] | None, typer.Option("--item-column", metavar="OURS=THEIRS", help="A column of the items file.")
]
UserColumns = Annotated[
    list[str] | None, typer.Option("--user-column", metavar="OURS=THEIRS", help="A column of the users file.")
]
TimeUnit = Annotated[
    str | None, typer.Option("--time-unit", metavar="s|ms", help="Only if the log cannot tell by itself.")
]
MaxRejected = Annotated[
    float, typer.Option("--max-rejected", min=0, max=1, help="Share of rows that may be unusable.")
]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory-limit", metavar="SIZE", help="Of ingest, e.g. 2GB; beyond, it spills.")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads; default all.")]


def _configuration(context: typer.Context, file: Path | None) -> Path | None:
    """Options of a TOML file become defaults, so that the command line and the environment win."""
    if file is None:
        return None
    try:
        given = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: not TOML ({error}).") from error
    known = {parameter.name for parameter in context.command.params}
    if strange := sorted(given.keys() - known):
        raise InputError(
            f"{file}: {strange[0]} is no option of {context.info_name}. "
            f"See longretriever {context.info_name} --help."
        )
    context.default_map = {**(context.default_map or {}), **given}
    return file


def _say_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_say_version,
            allow_from_autoenv=False,  # who sets LONGRETRIEVER_VERSION means something else
            help="Print the version.",
        ),
    ] = False,
) -> None:
    """What comes before a command."""


def main() -> None:
    """The entry point: errors of the package and of the disk become one line on stderr."""
    try:
        app()
    except (LongRetrieverError, OSError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def generate(
    path: Annotated[Path, typer.Argument(help="Folder to write events, items and users to.")],
    events: Annotated[int, typer.Option(min=1, help="Behaviors in the log.")] = 200_000,
    users: Annotated[int | None, typer.Option(min=1, help="Default: events / 100.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Default: events / 25.")] = None,
    categories: Annotated[int | None, typer.Option(min=1, help="Default: to suit the events.")] = None,
    string_ids: Annotated[bool, typer.Option("--string-ids", help='Ids such as "u0001234".')] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write the log of a simulated market, of any size, with known true taste."""
    from longretriever.market import Market, MarketConfig

    sizes = {"users": users, "items": items, "categories": categories}
    given = {name: value for name, value in sizes.items() if value is not None}
    config = MarketConfig.of_size(events, seed=seed, string_ids=string_ids, **given)
    with bar("writing events", events) as advance:
        Market(config).write(path, progress=advance)
    facts = {"path": str(path), **asdict(config)}
    show(facts, as_json, {k: facts[k] for k in ("path", "events", "users", "items", "categories", "seed")})


@app.command()
def ingest(
    events: Events,
    path: Annotated[Path, typer.Option("--out", help="Folder of the store.")],
    items: Items = None,
    users: Users = None,
    column: Columns = None,
    item_column: ItemColumns = None,
    user_column: UserColumns = None,
    time_unit: TimeUnit = None,
    max_rejected: MaxRejected = 0.01,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    profile: Annotated[
        list[str] | None, typer.Option(help="Profile field to use; default all that suit.")
    ] = None,
    item_feature: Annotated[
        list[str] | None, typer.Option(help="Item feature to use; default all that suit.")
    ] = None,
    engine: Annotated[str, typer.Option(help="duckdb, or spark for a cluster.")] = "duckdb",
    spark_master: Annotated[
        str | None,
        typer.Option(
            "--spark-master", metavar="URL", help="local[4], spark://host:7077; default as submitted."
        ),
    ] = None,
    parts_by: Annotated[
        str | None,
        typer.Option("--parts-by", help="Cut the store by user (to serve) or category (to train)."),
    ] = None,
    parts: Annotated[
        int | None, typer.Option("--parts", min=1, help="How many stores to cut it into.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn log files into a store: numbered, sorted, deduplicated, memory-mapped."""
    from longretriever.store.ingest import ingest as run

    with spinner("reading") as say:
        report = run(
            events,
            path,
            items=items,
            users=users,
            columns=_pairs(column, "--column"),
            item_columns=_pairs(item_column, "--item-column"),
            user_columns=_pairs(user_column, "--user-column"),
            time_unit=time_unit,
            max_rejected=max_rejected,
            memory_limit=memory_limit,
            threads=threads,
            engine=_engine(engine, spark_master),
            parts=_parts(parts_by, parts),
            profile=profile,
            item_features=item_feature,
            progress=say,
        )
    facts = report.as_dict()
    show({"path": str(path), **facts}, as_json, _ingest_summary(str(path), facts))


@app.command()
def train(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
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
    threads: Threads = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Of several processes (torchrun); default one each.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard an unfinished training.")] = False,
    checkpoint_seconds: Annotated[float, typer.Option(min=0, help="Between checkpoints.")] = 120,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a model; goes on by itself where a killed training of the same settings stopped."""
    torch_train = _training()
    from longretriever.model.exchange import joined
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
        config = _configured(method, preset, {**given, "seed": seed})
        if factors is not None:
            config = _with_factors(config, method, factors)
        opened = Store.open(store)
        with training_bar() if processes.first else nullcontext() as progress:
            at = torch_train(
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
    summary = {
        "model": path,
        "samples": f"{at.samples:,} in {at.epoch} epochs",
        "time": f"{at.seconds:.0f} s, {at.samples / max(at.seconds, 1e-9):,.0f} samples/s",
        "waiting for data": f"{at.waiting / max(at.seconds, 1e-9):.1%}",
        "validation": f"{max(at.validation):.3f} nats below chance"
        if at.validation
        else "no held-out events",
        "ended because": at.finished,
    }
    if at.sent:
        waited = at.waiting_for_others / max(at.seconds, 1e-9)
        summary["between processes"] = (
            f"{sum(at.sent.values()) / max(1, at.steps) / 1e6:.2f} MB a step, of the time {waited:.1%}"
        )
    for name, of in at.beside.items():
        gain, seconds = max(of["validation"], default=None), of["seconds"]
        summary[LEARNING[name]] = f"{seconds:.0f} s" + (f", {gain:.3f} nats below chance" if gain else "")
    searching_all = path / WHOLE if (path / WHOLE).exists() else path
    of = opening(searching_all, "model").facts.get("factors")
    if of is not None:
        facts["factors"] = of
        gained = f"{of['gain']:.3f} nats a request, {of['requests']} held out"
        summary["factors"] = f"weight {of['weight']:g}: {gained}; {of['seconds']:.0f} s"
    show(facts, as_json, summary)


@app.command()
def index(
    model: Annotated[Path, typer.Argument(help="Folder of the model.")],
    path: Annotated[
        str | None,
        typer.Option("--out", help="Folder of the index, or postgresql://...; default MODEL/index."),
    ] = None,
    add: Annotated[
        list[str] | None,
        typer.Option("--add", help="New items to add to the model first: as --items of ingest."),
    ] = None,
    move: Annotated[
        bool, typer.Option("--move", help="With --add: items of another category there go to it.")
    ] = False,
    remove: Annotated[
        list[str] | None,
        typer.Option("--remove", help="Items that shall not be found any more: a file with item_id."),
    ] = None,
    item_column: ItemColumns = None,
    max_rejected: MaxRejected = 0.01,
    exact: Annotated[
        bool, typer.Option("--exact", help="Search all items by looking at all, however many.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put the item vectors into one FAISS list per category; with --add and --remove, items come and go."""
    from longretriever.pgvector import is_database
    from longretriever.retrieve.added import add_items, remove_items
    from longretriever.retrieve.indexing import WHOLE, index_model

    changes = bool(add or remove)
    if item_column and not changes:
        raise InputError("--item-column is for --add and --remove, the items that come or go.")
    if move and not add:
        raise InputError("--move is for --add: name the items file that says where items are now.")
    if path is not None and changes:
        raise InputError(
            "--add and --remove replace the model together with MODEL/index: index to --out afterwards."
        )
    if exact and changes:
        raise InputError("--add and --remove index as it is always done: index with --exact afterwards.")
    if path is not None and is_database(path):
        _load_into(path, model, as_json)
        return
    found: dict[str, Any] = {}
    with bar("indexing items", None) as advance:
        if not changes:
            index_model(model, path, progress=advance, exact=exact)
        columns = _pairs(item_column, "--item-column")
        options: dict[str, Any] = {"columns": columns, "max_rejected": max_rejected, "progress": advance}
        if remove:
            found["removed"] = remove_items(model, remove, **options).as_dict()
        if add:
            found["items"] = add_items(model, add, move=move, **options).as_dict()
    target = Path(path) if path else model / "index"
    size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file())
    grouped = next(filter(None, map(_groups, (target, model / WHOLE / "index"))), None)
    facts = {"path": str(target), "bytes": size, "clusters": grouped, **found}
    summary = {
        **_removed_summary(found.get("removed")),
        **_added_summary(found.get("items")),
        "index": target,
        "size": f"{size / 1e6:,.1f} MB",
    }
    if grouped:
        summary["all items"] = (
            f"{grouped['number']:,} groups, of which {grouped['probes']:,} are looked at for "
            f"{grouped['recall']:.1%} of the nearest {grouped['k']}"
        )
    show(facts, as_json, summary)


def _load_into(url: str, model: Path, as_json: bool) -> None:
    """The vectors of a model, and of what it brings to search all items, into a database."""
    from longretriever.pgvector import Database
    from longretriever.retrieve.indexing import load_into

    database = Database(url)
    with bar("loading items", None) as advance:
        load_into(database, model, progress=advance)
    facts = {"database": database.where, "models": [fingerprint for fingerprint, _ in database.models()]}
    short = {**facts, "models": ", ".join(f"{one[:12]} ({kind})" for one, kind in database.models())}
    show(facts, as_json, short)


def _groups(index: Path) -> dict[str, Any] | None:
    """How an index searches all items, where it does not look at all of them."""
    from longretriever.saved import opening

    return opening(index, "index").facts.get("clusters") if index.exists() else None


@app.command()
def retrieve(
    model: Annotated[Path, typer.Argument(help="Folder of the model.")],
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
    store: Annotated[Path | None, typer.Option(help="A store other than the one trained on.")] = None,
    index: Annotated[
        str | None, typer.Option(help="An index other than MODEL/index: a folder, or postgresql://...")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Scan all items instead of using an index.")] = False,
    most: Annotated[int, typer.Option("--show", min=1, help="Candidates to print; --json prints all.")] = 20,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes for --all-users. Default: one for each processor."),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of the user tower.")] = 1,
    seed: Seed = 0,
    as_json: Json = False,
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
        interests=parse_interests(select),
        merge=_merge(merge),
        threads=threads,
    )
    rules = _rules(retriever, exclude_seen, exclude_item, exclude_category, include_category, quota, boost)
    rules = replace(rules, returns=returns)
    if user is not None:
        user_id = _as_id(user, retriever.store.user_ids.values.type)
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


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="Folder of the model; a link to one may be turned.")],
    store: Annotated[Path | None, typer.Option(help="A store other than the one trained on.")] = None,
    index: Annotated[
        str | None, typer.Option(help="An index other than MODEL/index: a folder, or postgresql://...")
    ] = None,
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
    host: Annotated[
        str, typer.Option(help="Address to listen on; keys are needed if not loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of a worker, for batches and the page.")] = 2,
    read_key: Annotated[
        list[str] | None,
        typer.Option(help="API key that may ask. Several: separated by spaces in the variable."),
    ] = None,
    write_key: Annotated[
        list[str] | None, typer.Option(help="API key that may also send events, forget, reload.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait in a worker; then 503.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of a request; then 504.")] = 5.0,
    body: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 1_000_000,
    k: Annotated[int, typer.Option("--k", min=1, help="Candidates of a request at most.")] = 2_000,
    batch: Annotated[int, typer.Option(min=1, help="Users of a request at most.")] = 256,
    events: Annotated[int, typer.Option(min=1, help="Events of a call at most.")] = 10_000,
    cors: Annotated[list[str] | None, typer.Option(help="Origin of another page that may ask.")] = None,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between looks for a newer model; 0: only when asked.")
    ] = 1.0,
    log: Annotated[str, typer.Option(help="Lines of json or text.")] = "json",
    config: Annotated[
        Path | None,
        typer.Option(callback=_configuration, is_eager=True, help="TOML file with these options."),
    ] = None,
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
        clock=_one_of("--clock", clock, ("wall", "log")),
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
        shards=tuple(filter(None, (url.strip() for url in (shards or "").split(",")))),
        shard_key=shard_key,
        shard_seconds=shard_seconds,
        hedge=hedge,
        watch=watch,
        log=_one_of("--log", log, ("json", "text")),
    )
    run(settings)


@app.command(name="serve-shard")
def serve_shard(
    model: Annotated[Path, typer.Argument(help="Folder of the model, of which MODEL/index is enough.")],
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="The I-th of N shares of about as many items each.")
    ] = None,
    categories: Annotated[
        str | None,
        typer.Option(metavar="FIRST:END,...", help="Ranges of category numbers instead; END not included."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; keys are needed if not loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8100,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    read_key: Annotated[
        list[str] | None,
        typer.Option(help="API key that may ask. Several: separated by spaces in the variable."),
    ] = None,
    write_key: Annotated[list[str] | None, typer.Option(help="API key that may also reload.")] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait in a worker; then 503.")] = 64,
    seconds: Annotated[float, typer.Option(min=0.01, help="That a request may wait; then 504.")] = 1.0,
    body: Annotated[int, typer.Option(min=1, help="Bytes of a request at most.")] = 16_000_000,
    watch: Annotated[
        float, typer.Option(min=0, help="Seconds between looks for a newer index; 0: only when asked.")
    ] = 1.0,
    log: Annotated[str, typer.Option(help="Lines of json or text.")] = "json",
    config: Annotated[
        Path | None,
        typer.Option(callback=_configuration, is_eager=True, help="TOML file with these options."),
    ] = None,
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
            share=_share(shard, categories),
            host=host,
            port=port,
            workers=workers,
            read_keys=tuple(read_key or ()),
            write_keys=tuple(write_key or ()),
            queue=queue,
            seconds=seconds,
            body=body,
            watch=watch,
            log=_one_of("--log", log, ("json", "text")),
        )
    )


def _share(shard: str | None, categories: str | None) -> Any:
    """`1/3` or `0:2500,4000:4100` as what a shard holds."""
    from longretriever.shards.held import Share

    def pair(text: str, option: str, sign: str) -> tuple[int, int]:
        first, between, second = text.partition(sign)
        if not between:
            raise InputError(f"{option} {text}: expected {'I/N, as 1/3' if sign == '/' else 'FIRST:END'}.")
        return _integer(first, option), _integer(second, option)

    ranges = tuple(pair(one, "--categories", ":") for one in categories.split(",")) if categories else ()
    return Share(pair(shard, "--shard", "/") if shard else None, ranges)


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="Folder of the model.")],
    path: Annotated[Path, typer.Option("--out", help="Parquet file.")],
    space: Annotated[
        str | None, typer.Option(help="contexts or whole: only these vectors. Default: all that there are.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the item vectors to a Parquet file, for Milvus, Qdrant, pgvector and the like."""
    from longretriever.retrieve.export import export as run

    with bar("items", None) as advance:
        rows = run(model, path, space, progress=advance)
    show({"path": str(path), "rows": rows, "bytes": path.stat().st_size}, as_json)


@app.command()
def evaluate(
    events: Events,
    items: Items = None,
    users: Users = None,
    models: Annotated[
        str, typer.Option(help="Comma-separated; ebr, mind, ulim, als and bm25 as well.")
    ] = "longretriever,recent,popular,popular-in-context",
    split: Annotated[float, typer.Option(help="Share of the events, by time, to learn from.")] = 0.9,
    k: Annotated[str, typer.Option("--k", help="Lengths of list, comma-separated.")] = "50,200,500",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training of each model at most.")] = None,
    select: Annotated[
        str | None, typer.Option(help="Contexts of longretriever and ulim, see retrieve.")
    ] = None,
    merge: Annotated[str | None, typer.Option(help="Of longretriever and ulim, see retrieve.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of longretriever, see train.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Of longretriever, see train.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="At most.")] = None,
    column: Columns = None,
    item_column: ItemColumns = None,
    user_column: UserColumns = None,
    time_unit: TimeUnit = None,
    max_rejected: MaxRejected = 0.01,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    work: Annotated[Path | None, typer.Option(help="Keep stores and model in this folder.")] = None,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Compare models on a log: requests as they came, and one list for the whole future."""
    from longretriever.evaluate.report import table
    from longretriever.evaluate.run import evaluate_log

    config = None
    names = [name.strip() for name in models.split(",") if name.strip()]
    if "longretriever" in names:
        config = _configured("longretriever", preset, {"encoder": encoder, "epochs": epochs, "seed": seed})
    with training_bar() as trained:
        result = evaluate_log(
            events,
            items=items,
            users=users,
            models=names,
            quantile=split,
            k=[_integer(n, "--k") for n in k.split(",")],
            seed=seed,
            minutes=minutes,
            config=config,
            interests=parse_interests(select),
            merge=_merge(merge),
            work=work,
            reading=_reading(
                column, item_column, user_column, time_unit, max_rejected, memory_limit, threads
            ),
            said=_say,
            trained=trained,
        )
    if as_json:
        print_json(result)
    else:
        out.print(table(result))


@experiment.command()
def ablations(
    events: Events,
    path: Annotated[Path, typer.Option("--out", help="Folder for the report, and for what it is made of.")],
    items: Items = None,
    users: Users = None,
    parts: Annotated[
        str, typer.Option(help="Comma-separated: systems, paper, ours, ulim.")
    ] = "systems,paper,ours,ulim",
    only: Annotated[
        list[str] | None, typer.Option(help="An arm to run, by its name; the default model is always run.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training of each model at most.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of each training at most.")] = None,
    split: Annotated[float, typer.Option(help="Share of the events, by time, to learn from.")] = 0.9,
    k: Annotated[str, typer.Option("--k", help="Lengths of list, comma-separated.")] = "50,200,500",
    column: Columns = None,
    item_column: ItemColumns = None,
    user_column: UserColumns = None,
    time_unit: TimeUnit = None,
    max_rejected: MaxRejected = 0.01,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Train and compare the papers' systems and their ablations; writes report.html, .md and results.json."""
    from longretriever.experiment.ablations import PARTS, arms
    from longretriever.experiment.dossier import write
    from longretriever.experiment.page import need_extra
    from longretriever.experiment.runs import main_metric
    from longretriever.experiment.runs import run as run_plan

    need_extra()
    names = tuple(part.strip() for part in parts.split(",") if part.strip())
    if not names or set(names) - set(PARTS):
        raise InputError(f"--parts {parts}: expected some of {', '.join(PARTS)}.")
    chosen = arms(names)
    strange = set(only or ()) - {arm.name for arm in chosen}
    if strange:
        raise InputError(f"--only {strange.pop()}: expected one of {'; '.join(arm.name for arm in chosen)}.")
    if only:
        wanted = {chosen[0].name, *only}
        chosen = [
            arm if arm.against in wanted else replace(arm, against=None)
            for arm in chosen
            if arm.name in wanted
        ]
    chosen_k = [_integer(n, "--k") for n in k.split(",")]
    with training_bar() as trained:
        result = run_plan(
            events,
            chosen,
            work=path / "work",
            items=items,
            users=users,
            seeds=tuple(range(seed, seed + seeds)),
            minutes=minutes,
            samples=samples,
            quantile=split,
            k=chosen_k,
            reading=_reading(
                column, item_column, user_column, time_unit, max_rejected, memory_limit, threads
            ),
            said=_say,
            trained=trained,
            planned=lambda done, total: _say(f"{done} of {total} done"),
            command=shlex.join(["longretriever", *sys.argv[1:]]),
        )
    written = write(result, path)
    if as_json:
        print_json(result)
    else:
        _show_arms(result["arms"], main_metric(chosen_k))
        _say_written(written)
    _say_failed(result["failed"])


@experiment.command()
def leak(
    events: Events,
    items: Items = None,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training of each of the two.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of each training at most.")] = None,
    split: Annotated[float, typer.Option(help="Share of the events, by time, to learn from.")] = 0.9,
    column: Columns = None,
    item_column: ItemColumns = None,
    time_unit: TimeUnit = None,
    max_rejected: MaxRejected = 0.01,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    work: Annotated[Path | None, typer.Option(help="Keep stores and models in this folder.")] = None,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Does a model trained on mixed batches win them by taste, or by the category alone?"""
    from longretriever.experiment.leak import leak_log, table

    _training()
    with training_bar() as trained:
        result = leak_log(
            events,
            items=items,
            quantile=split,
            minutes=minutes,
            samples=samples,
            seed=seed,
            work=work,
            reading=_reading(column, item_column, None, time_unit, max_rejected, memory_limit, threads),
            said=_say,
            trained=trained,
        )
    if as_json:
        print_json(result)
    else:
        out.print(table(result))


@experiment.command()
def replay(
    events: Events,
    path: Annotated[Path, typer.Option("--out", help="Folder for the report, and for what it is made of.")],
    items: Items = None,
    users: Users = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A route, by its name; at least two. Default: the usual eight.")
    ] = None,
    horizon: Annotated[float, typer.Option(help="Days after the request that count as next.")] = 1.0,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each model.")] = 3,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Training of each model at most.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of each training at most.")] = None,
    split: Annotated[float, typer.Option(help="Share of the events, by time, to learn from.")] = 0.9,
    k: Annotated[str, typer.Option("--k", help="Items of each route's list, comma-separated.")] = "200",
    column: Columns = None,
    item_column: ItemColumns = None,
    user_column: UserColumns = None,
    time_unit: TimeUnit = None,
    max_rejected: MaxRejected = 0.01,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of stores, models and lists; default: work in the report's.")
    ] = None,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Replay retrieval routes over the log: which alone finds what users did next? Writes a report."""
    from longretriever.experiment.page import need_extra
    from longretriever.experiment.replay import replay as run
    from longretriever.experiment.replay import routes
    from longretriever.experiment.replayed import tables, write

    need_extra()
    with training_bar() as trained:
        result = run(
            events,
            routes(only),
            work=work or path / "work",
            items=items,
            users=users,
            seeds=tuple(range(seed, seed + seeds)),
            minutes=minutes,
            samples=samples,
            quantile=split,
            k=[_integer(n, "--k") for n in k.split(",")],
            horizon=horizon,
            reading=_reading(
                column, item_column, user_column, time_unit, max_rejected, memory_limit, threads
            ),
            said=_say,
            trained=trained,
            planned=lambda done, total: _say(f"{done} of {total} done"),
            command=shlex.join(["longretriever", *sys.argv[1:]]),
        )
    written = write(result, path)
    if as_json:
        print_json(result)
    else:
        out.print(tables(result))
        _say_written(written)
    _say_failed(result["failed"])


@experiment.command()
def likeness(
    log: Annotated[
        list[str],
        typer.Option("--log", metavar="NAME=FILE", help="A real log: file, folder or glob; give several."),
    ],
    path: Annotated[Path, typer.Option("--out", help="Folder for the report.")],
    items: Annotated[
        list[str] | None,
        typer.Option("--items", metavar="NAME=FILE", help="Items of the log of this name: their categories."),
    ] = None,
    events: Annotated[
        int | None,
        typer.Option(min=10, help="Of the generated log; default: as the real ones, at most a million."),
    ] = None,
    market: Annotated[
        Path | None, typer.Option(help="Folder of a market that was generated, instead of a new one.")
    ] = None,
    column: Columns = None,
    item_column: ItemColumns = None,
    time_unit: TimeUnit = None,
    max_rejected: MaxRejected = 0.01,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    work: Annotated[Path | None, typer.Option(help="Keep stores and market in this folder.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """How like is a generated log to real ones? Writes report.html, report.md and results.json."""
    from longretriever.experiment.likeness import in_short, table, write
    from longretriever.experiment.likeness import likeness as compare_logs
    from longretriever.experiment.page import need_extra

    need_extra()
    result = compare_logs(
        _named_files(log, "--log"),
        items=_named_files(items, "--items"),
        events=events,
        market=market,
        seed=seed,
        work=work,
        reading=_reading(column, item_column, None, time_unit, max_rejected, memory_limit, threads),
        said=_say,
        command=shlex.join(["longretriever", *sys.argv[1:]]),
    )
    written = write(result, path)
    if as_json:
        print_json(result)
    else:
        out.print(table(result))
        out.print(f"\n{in_short(result)}\nWritten: " + ", ".join(map(str, written)), highlight=False)


Population = Annotated[int, typer.Option("--users", min=2, help="People of the market.")]
Behaviors = Annotated[int, typer.Option("--events", min=20, help="Behaviors of their log.")]
MarketItems = Annotated[int | None, typer.Option("--items", min=1, help="Default: one for 25 behaviors.")]
MarketCategories = Annotated[
    int | None, typer.Option("--categories", min=1, help="Default: to suit the log.")
]
TestDays = Annotated[int, typer.Option("--days", min=1, help="Of the test, after the warm-up.")]
TakingPart = Annotated[int | None, typer.Option("--test-users", min=1, help="Who take part; default all.")]
EachMinutes = Annotated[float | None, typer.Option("--minutes", min=0.01, help="Training of each model.")]
EachSamples = Annotated[int, typer.Option("--samples", min=1, help="Of each training at most.")]
Retrieved = Annotated[int, typer.Option("--k", min=1, help="Candidates of a route for each visit.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="WHERE.FIELD=VALUE", help="Of market, feed or platform: feed.slots=20."),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Processes; default one for each core.")
]


@experiment.command()
def ab(
    path: Annotated[Path, typer.Option("--out", help="Folder for the report, and for what it is made of.")],
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME=ROUTE,ROUTE", help="A platform; the first is the control."),
    ] = None,
    population: Population = 2_000,
    behaviors: Behaviors = 800_000,
    items: MarketItems = None,
    categories: MarketCategories = None,
    days: TestDays = 7,
    taking_part: TakingPart = None,
    k: Retrieved = 100,
    minutes: EachMinutes = None,
    samples: EachSamples = 300_000,
    retrain: Annotated[int, typer.Option(min=0, help="Train again every so many days; 0: never.")] = 0,
    assignments: Fields = None,
    aa: Annotated[
        int | None,
        typer.Option("--aa", min=1, help="So many A/A tests of the control instead."),
    ] = None,
    threads: Threads = None,
    workers: Workers = None,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """Test platforms on the people of a simulated market; writes report.html, .md and results.json."""
    from longretriever.experiment.ab.plan import Plan
    from longretriever.experiment.ab.report import strict, write
    from longretriever.experiment.ab.routes import known, parse_arm
    from longretriever.experiment.ab.run import run as run_test
    from longretriever.experiment.ab.sanity import run_aa
    from longretriever.experiment.ab.sanity import table as aa_table
    from longretriever.experiment.ab.terminal import tables
    from longretriever.experiment.page import need_extra

    need_extra()
    routes = known(k)
    chosen = tuple(parse_arm(text, routes) for text in arm or AB_ARMS)
    plan = Plan(
        _world(behaviors, population, items, categories, seed),
        chosen,
        users=taking_part,
        days=days,
        retrain=retrain,
        minutes=minutes,
        samples=samples,
        seed=seed,
        threads=threads,
    ).changed(assignments or ())
    with testing_bar() as (trained, lived):
        if aa is not None:
            found = run_aa(plan, aa, path / "work", workers=workers, said=_say, trained=trained, tested=lived)
        else:
            command = shlex.join(["longretriever", *sys.argv[1:]])
            told: dict[str, Any] = {"said": _say, "trained": trained, "lived": lived, "command": command}
            result = run_test(plan, path / "work", workers=workers, **told)
    if aa is not None:
        print_json(found) if as_json else out.print(aa_table(found))
        return
    written = write(result, path)
    if as_json:
        print_json(strict(result))
    else:
        for table in tables(result):
            out.print(table)
        out.print("\nWritten: " + ", ".join(map(str, written)), highlight=False)


@experiment.command()
def paper(
    path: Annotated[Path, typer.Option("--out", help="Folder for the report, and for what it is made of.")],
    worlds: Annotated[int, typer.Option(min=2, help="Markets of different seeds.")] = 5,
    sweep_worlds: Annotated[
        int, typer.Option(min=0, help="Markets for each value of the sweeps; 0: none.")
    ] = 1,
    sweep_days: Annotated[int, typer.Option(min=1, help="Days of a test in the sweeps.")] = 3,
    swept: Annotated[
        str, typer.Option("--sweeps", help="Comma-separated: lives, interests, taste, drift.")
    ] = "lives,interests,taste,drift",
    paper_figures: Annotated[
        Path | None, typer.Option(help="JSON of the paper's own lifts, to be printed beside.")
    ] = None,
    population: Population = 2_000,
    behaviors: Behaviors = 800_000,
    items: MarketItems = 60_000,
    categories: MarketCategories = 300,
    days: TestDays = 7,
    taking_part: TakingPart = None,
    k: Retrieved = 100,
    minutes: EachMinutes = None,
    samples: EachSamples = 400_000,
    assignments: Fields = None,
    threads: Threads = None,
    workers: Workers = None,
    seed: Seed = 1,
    as_json: Json = False,
) -> None:
    """LongRetriever's Tables 1 to 5 again, in simulated markets, and in which of them each claim holds."""
    from longretriever.experiment.ab.plan import Plan
    from longretriever.experiment.ab.report import strict
    from longretriever.experiment.page import need_extra
    from longretriever.experiment.paper import arms, read_figures, run_paper
    from longretriever.experiment.paper_report import table, write

    need_extra()
    of_paper = read_figures(paper_figures) if paper_figures else None
    plan = Plan(
        _world(behaviors, population, items, categories, seed),
        arms(k),
        users=taking_part,
        days=days,
        minutes=minutes,
        samples=samples,
        seed=seed,
        threads=threads,
    ).changed(assignments or ())
    with testing_bar() as (trained, lived):
        result = run_paper(
            plan,
            path / "work",
            worlds=worlds,
            sweep_worlds=sweep_worlds,
            sweep_days=sweep_days,
            swept=[key.strip() for key in swept.split(",") if key.strip()],
            figures_of_paper=of_paper,
            workers=workers,
            said=_say,
            trained=trained,
            lived=lived,
            command=shlex.join(["longretriever", *sys.argv[1:]]),
        )
    written = write(result, path)
    if as_json:
        print_json(strict(result))
    else:
        out.print(table(result))
        out.print("\nWritten: " + ", ".join(map(str, written)), highlight=False)


AB_ARMS = ("MIND=popular,item-to-item,mind", "LongRetriever=popular,item-to-item,longretriever")
"""What is tested unless another test is asked for: who fills the third slot."""


@app.command()
def compact(
    store: Annotated[Path, typer.Argument(help="Folder of the store.")],
    live: Annotated[
        str, typer.Option("--live", help="Live events: a file, redis://... or redis+cluster://...")
    ],
    path: Annotated[
        Path | None, typer.Option("--out", help="Folder of the new store; default: in place of the old one.")
    ] = None,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Fold live events into the store, and leave out what of it is forgotten. Writers may go on meanwhile."""
    from longretriever.store.compact import compact as run

    with spinner("checking") as say:
        report = run(store, live, path, memory_limit=memory_limit, threads=threads, progress=say)
    facts = report.as_dict()
    show(facts, as_json, _compact_summary(facts))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Folder of a store, model or index.")],
    as_json: Json = False,
) -> None:
    """Check every file of a saved folder against its SHA-256, and say what the folder is."""
    from longretriever.saved import kind_of, opening
    from longretriever.store.parts import check_parts

    manifest = opening(path, kind_of(path), verify=True)
    size = sum(file["bytes"] for file in manifest.files.values())
    size += check_parts(manifest) if manifest.kind == "partition" else 0
    facts = {
        "path": str(path),
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "made_from": manifest.made_from,
        "files": len(manifest.files),
        "bytes": size,
        "intact": True,
    }
    origins = ", ".join(f"{kind} {print_[:16]}" for kind, print_ in manifest.made_from.items())
    short = {"fingerprint": manifest.fingerprint[:16], "made_from": origins or "nothing saved"}
    show(facts, as_json, {**facts, **short})


@app.command()
def demo(
    path: Annotated[Path, typer.Option("--out", help="Folder to work in.")] = Path("demo"),
    events: Annotated[int, typer.Option(min=2_000, help="Behaviors of the simulated log.")] = 400_000,
    minutes: Annotated[float, typer.Option(min=0.01, help="Training at most.")] = 1.5,
    seed: Seed = 0,
) -> None:
    """The whole way on a simulated market: log, store, model, index, quality, candidates with reasons."""
    from longretriever.demo import run

    _training()
    run(path, events, minutes, seed, out)


def _world(events: int, users: int, items: int | None, categories: int | None, seed: int) -> Any:
    from longretriever.experiment.ab.plan import world

    given = {"items": items, "categories": categories}
    return world(events, users, seed, **{name: n for name, n in given.items() if n is not None})


def _show_arms(arms: Mapping[str, Any], metric: str) -> None:
    """The main figures, one line an arm; the report has the rest."""
    from rich.table import Table

    columns = [(p, part) for p in ("batch", "live") for part in ("all", "new")]
    grid = Table(title=f"{metric}, mean over seeds", title_justify="left", box=None, padding=(0, 1, 0, 0))
    grid.add_column("")
    for protocol, part in columns:
        grid.add_column(f"{protocol}\n{part.upper()}", justify="right")
    for name, figures in arms.items():
        cells = [figures[protocol][part][metric] for protocol, part in columns]
        grid.add_row(name, *["–" if c is None else f"{c:.3f}".removeprefix("0") for c in cells])
    out.print(grid)


def _say_written(files: Sequence[Path]) -> None:
    out.print("\nWritten: " + ", ".join(map(str, files)), highlight=False)


def _say_failed(runs: Sequence[Mapping[str, Any]]) -> None:
    """What of an experiment failed, which is an error although there is a report."""
    for failure in runs:
        err.print(f"[bold red]failed:[/] {escape(str(failure))}", highlight=False)
    if runs:
        raise typer.Exit(1)


# -- what options mean


def _reading(
    column: list[str] | None,
    item_column: list[str] | None,
    user_column: list[str] | None,
    time_unit: str | None,
    max_rejected: float,
    memory_limit: str | None,
    threads: int | None,
) -> dict[str, Any]:
    """How a log is to be read, as `evaluate.run.read_split` takes it."""
    return {
        "columns": _pairs(column, "--column"),
        "item_columns": _pairs(item_column, "--item-column"),
        "user_columns": _pairs(user_column, "--user-column"),
        "time_unit": time_unit,
        "max_rejected": max_rejected,
        "memory_limit": memory_limit,
        "threads": threads,
    }


def _say(line: str) -> None:
    err.print(f"[dim]{escape(line)}[/]", highlight=False)


def _one_of(option: str, given: str, allowed: Sequence[str]) -> Any:
    if given not in allowed:
        raise InputError(f"{option} {given}: expected one of {', '.join(allowed)}.")
    return given


def parse_interests(text: str | None) -> Interests | None:
    """`pgin:20`, `random:5:20` and `top:20` as interests; None, the model's own, for None."""
    from longretriever.retrieve.interests import Pgin, RandomInTop, Top

    if text is None:
        return None
    name, *numbers = text.split(":")
    values = [_integer(n, "--select") for n in numbers]
    if name == "random" and len(values) == 2:
        return RandomInTop(*values)
    if name == "top" and len(values) == 1:
        return Top(*values)
    if name == "pgin" and len(values) == 1:
        return Pgin(values[0])
    raise InputError(f"--select {text}: expected pgin:K, random:N:M or top:N, such as pgin:20.")


def _merge(name: str | None) -> Merge | None:
    from longretriever.retrieve.merge import MERGES

    if name is not None and name not in MERGES:
        raise InputError(f"--merge {name}: expected one of {', '.join(MERGES)}.")
    return MERGES[name] if name else None


def _configured(method: str, preset: str | None, given: Mapping[str, Any]) -> Any:
    """The configuration of a method, with what options say; those that are None stay as they are."""
    from longretriever.model.config import LEARNED, configuration

    if method not in LEARNED:
        raise InputError(f"--method {method}: expected one of {', '.join(LEARNED)}.")
    config = configuration(method)
    if preset is not None:
        if preset != "paper" or not hasattr(config, "paper"):
            raise InputError(f"--preset {preset} of {method}: expected paper, of longretriever or ebr.")
        config = type(config).paper()
    changes = {name: value for name, value in given.items() if value is not None}
    strange = changes.keys() - vars(config).keys()
    if strange:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(strange))
        raise InputError(f"{names}: not an option of {method}. Leave it out.")
    return replace(config, **changes)


def _with_factors(config: Any, method: str, wanted: bool) -> Any:
    """The same, with factors of the weight that what is held out asks for, or without."""
    whole = config if method == "ebr" else getattr(config, "whole", None)
    if whole is None:
        raise InputError("--[no-]factors: for longretriever (but not the paper's) and ebr. Leave it out.")
    whole = replace(whole, factors=None if wanted else 0.0)
    return whole if method == "ebr" else replace(config, whole=whole)


def _rules(
    retriever: Any,
    exclude_seen: bool,
    exclude_item: Sequence[str] | None,
    exclude_category: Sequence[str] | None,
    include_category: Sequence[str] | None,
    quota: Sequence[str] | None,
    boost: Sequence[str] | None,
) -> Rules:
    from longretriever.retrieve.rules import Rules

    items, categories = retriever.model.items[ITEM].type, retriever.model.category_ids.values.type
    quotas = _pairs(quota, "--quota") or {}
    boosts = _pairs(boost, "--boost") or {}
    return Rules(
        exclude_seen=exclude_seen,
        exclude_items=[_as_id(i, items) for i in exclude_item or ()],
        exclude_categories=[_as_id(c, categories) for c in exclude_category or ()],
        include_categories=[_as_id(c, categories) for c in include_category or ()],
        quotas={_as_id(c, categories): _integer(n, "--quota") for c, n in quotas.items()},
        boosts={_as_id(c, categories): _number(x, "--boost") for c, x in boosts.items()},
    )


def _as_id(text: str, dtype: pa.DataType) -> int | str:
    """An id as the log has it: an integer where its ids are integers."""
    if not pa.types.is_integer(dtype):
        return text
    try:
        return int(text)
    except ValueError:
        return text


def _named_files(texts: Sequence[str] | None, option: str) -> dict[str, str]:
    """NAME=FILE of an option that is given several times, each name once."""
    files: dict[str, str] = {}
    for text in texts or ():
        name, _, file = text.partition("=")
        if not (name and file):
            raise InputError(
                f"{option} {text}: expected a name and a file, such as {option} shop=events.parquet."
            )
        if name in files:
            raise InputError(
                f"{option} {text}: {name} is {files[name]} already. Choose another name, "
                "or name a folder or glob of files that are one."
            )
        files[name] = file
    return files


def _pairs(texts: Sequence[str] | None, option: str) -> dict[str, str] | None:
    pairs = {}
    for text in texts or ():
        left, equals, right = text.partition("=")
        if not (left and equals and right):
            raise InputError(f"{option} {text}: expected two names with = between, such as {option} a=b.")
        pairs[left] = right
    return pairs or None


def _integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a whole number.") from None


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a number.") from None


def _training() -> Callable[..., Any]:
    from longretriever.model.config import need_torch

    need_torch()
    from longretriever.model.train import train as torch_train

    return torch_train


def _engine(name: str, master: str | None) -> Any:
    """What computes an ingest; Spark is imported only where it is asked for."""
    if name not in ("duckdb", "spark"):
        raise InputError(f"--engine {name}: expected duckdb or spark.")
    if name == "spark":
        from longretriever.store.on_spark import Spark

        return Spark(master)
    if master is not None:
        raise InputError(f"--spark-master {master} is of --engine spark. Pass that too, or leave it out.")
    return None


def _parts(by: str | None, count: int | None) -> Any:
    if by is None and count is None:
        return None
    if by is None or count is None:
        raise InputError("--parts-by and --parts belong together: --parts-by user --parts 8.")
    from longretriever.store.parts import Parts

    return Parts(by, count)


def _compact_summary(facts: Mapping[str, Any]) -> dict[str, Any]:
    if facts["ingest"] is None:
        nothing = f"nothing to fold: it has all of {facts['journal']}, up to number {facts['upto']:,}"
        return {"store": facts["store"], "live events": nothing}
    told = _ingest_summary(facts["store"], facts["ingest"])
    return {
        "store": facts["store"],
        "live events": f"{facts['live']:,}, numbers {facts['after'] + 1:,} to {facts['upto']:,}"
        f" of {facts['journal']}",
        "forgotten": f"{facts['forgotten']:,} users of the store",
        **{name: told[name] for name in ("events", "rejected", "users", "items", "times")},
        "deleted": f"{facts['deleted']:,} live events that the store had before",
        "seconds": f"{facts['seconds']:.1f}",
    }


def _rows(rows: Mapping[str, int]) -> str:
    return f"{rows['read']:,} read" + "".join(
        f", {n:,} {why}" for why, n in rows.items() if n and why != "read"
    )


def _removed_summary(removed: Mapping[str, Any] | None) -> dict[str, Any]:
    """What became of items to remove, in words for people; nothing where none were given."""
    if removed is None:
        return {}
    before = f", {removed['already']:,} had been before" if removed["already"] else ""
    unknown = f", {removed['unknown']:,} are not in the model" if removed["unknown"] else ""
    return {
        "rows to remove": _rows(removed["rows"]),
        "removed": f"{removed['removed']:,} items{before}{unknown}",
        "left": f"{removed['left']:,} items",
    }


def _added_summary(added: Mapping[str, Any] | None) -> dict[str, Any]:
    """What became of items to add, in words for people; nothing where none were given."""
    if added is None:
        return {}
    rows, features = added["rows"], added["features"]
    stay = not (added["back"] or added["moved"])
    into = f" in {len(added['categories']):,} categories" if added["added"] else ""
    summary = {
        "rows": _rows(rows),
        "added": f"{added['added']:,} items{into}",
        "already there": f"{added['already']:,} items{', left as they are' if stay else ''}",
    }
    if added["back"]:
        summary["back"] = f"{added['back']:,} of those, which had been removed"
    if added["moved"]:
        summary["moved"] = f"{added['moved']:,} of those, to the category that they have here"
    if added["elsewhere"]:
        summary["elsewhere"] = f"{added['elsewhere']:,} of those have another category here (see --move)"
    for name, found in features.items():
        summary[f"feature {name}"] = ", ".join(f"{n:,} {what}" for what, n in found.items())
    if added["plain"]:
        summary["no feature known"] = f"{added['plain']:,} items: those of one category have one vector"
    return summary


def _parts_summary(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        part["folder"]: f"{part['events']:,} events of {part['users']:,} users, "
        f"{'users' if part['by'] == 'user' else 'categories'} {part['first']} to {part['last']}"
        for part in parts
    }


def _ingest_summary(path: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    rejected = facts["rejected"]
    reasons = "; ".join(f"{n:,} {reason}" for reason, n in rejected.items())
    return {
        "store": path,
        "events": f"{facts['read']:,} read, {facts['kept']:,} kept, {facts['duplicates']:,} duplicates",
        "rejected": f"{sum(rejected.values()):,}"
        + (f" ({reasons}): see {path}/rejected.parquet" if reasons else ""),
        "users": f"{facts['users']:,}",
        "items": f"{facts['items']:,} in {facts['categories']:,} categories",
        "times": f"{facts['time_unit']}, {day(facts['first_time'])} to {day(facts['last_time'])}",
        "other category": f"{facts['recategorised']:,} events counted under their item's usual one",
        **_parts_summary(facts["parts"]),
        "columns": ", ".join(facts["columns_used"]),
        **{f"skipped {name}": why for name, why in facts["columns_skipped"].items()},
        **{f"note {i}": note for i, note in enumerate(facts["notes"], start=1)},
        "seconds": ", ".join(f"{stage} {s:.1f}" for stage, s in facts["seconds"].items()),
    }
