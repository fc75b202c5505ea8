"""Which options do several commands share? Each is said once, as the type of a command's parameter.

An option that only one command has stands in its signature.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from longretriever.errors import InputError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of tables.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same result.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Processor threads; default all.")]

# -- a log and how to read it

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

# -- what was saved

StoreFolder = Annotated[Path, typer.Argument(help="Folder of the store.")]
ModelFolder = Annotated[Path, typer.Argument(help="Folder of the model.")]
OtherStore = Annotated[Path | None, typer.Option("--store", help="A store other than the one trained on.")]
OtherIndex = Annotated[
    str | None,
    typer.Option("--index", help="An index other than MODEL/index: a folder, or postgresql://..."),
]

# -- models compared on a log

Split = Annotated[float, typer.Option("--split", help="Share of the events, by time, to learn from.")]
Lengths = Annotated[str, typer.Option("--k", help="Lengths of list, comma-separated.")]
Minutes = Annotated[float | None, typer.Option("--minutes", min=0.01, help="Training of each model at most.")]
Samples = Annotated[int | None, typer.Option("--samples", min=1, help="Of each training at most.")]
Trainings = Annotated[int, typer.Option("--seeds", min=1, help="Trainings of each model.")]
ReportFolder = Annotated[
    Path, typer.Option("--out", help="Folder for the report, and for what it is made of.")
]

# -- tests in a market

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

# -- services


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


Host = Annotated[str, typer.Option("--host", help="Address to listen on; keys are needed if not loopback.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
Processes = Annotated[int, typer.Option("--workers", min=1, help="Processes.")]
ReadKeys = Annotated[
    list[str] | None,
    typer.Option("--read-key", help="API key that may ask. Several: separated by spaces in the variable."),
]
Queue = Annotated[int, typer.Option("--queue", min=0, help="Requests that may wait in a worker; then 503.")]
Body = Annotated[int, typer.Option("--body", min=1, help="Bytes of a request at most.")]
LogLines = Annotated[str, typer.Option("--log", help="Lines of json or text.")]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--config", callback=_configuration, is_eager=True, help="TOML file with these options."),
]
