"""What do the texts of options mean? Pairs, numbers, ids, and the objects that a text names; or an error that
says which option, what was given and what is expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longretriever.errors import InputError
from longretriever.events import ITEM

if TYPE_CHECKING:
    import pyarrow as pa

    from longretriever.market import MarketConfig
    from longretriever.retrieve.interests import Interests
    from longretriever.retrieve.merge import Merge
    from longretriever.retrieve.retriever import Retriever
    from longretriever.retrieve.rules import Rules
    from longretriever.shards.held import Share
    from longretriever.store.on_spark import Spark
    from longretriever.store.parts import Parts

# -- numbers, names and ids


def integer(text: str, option: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a whole number.") from None


def integers(text: str, option: str) -> list[int]:
    return [integer(n, option) for n in text.split(",")]


def number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is not a number.") from None


def listed(text: str) -> list[str]:
    """What stands between commas; empty parts are left out."""
    return [part.strip() for part in text.split(",") if part.strip()]


def one_of(option: str, given: str, allowed: Sequence[str]) -> Any:
    if given not in allowed:
        raise InputError(f"{option} {given}: expected one of {', '.join(allowed)}.")
    return given


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, str] | None:
    """NAME=VALUE of an option that is given several times; None, nothing said, for none."""
    found = {}
    for text in texts or ():
        left, equals, right = text.partition("=")
        if not (left and equals and right):
            raise InputError(f"{option} {text}: expected two names with = between, such as {option} a=b.")
        found[left] = right
    return found or None


def named_files(texts: Sequence[str] | None, option: str) -> dict[str, str]:
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


def as_id(text: str, dtype: pa.DataType) -> int | str:
    """An id as the log has it: an integer where its ids are integers."""
    import pyarrow as pa

    if not pa.types.is_integer(dtype):
        return text
    try:
        return int(text)
    except ValueError:
        return text


# -- a log and its store


def reading(
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
        "columns": pairs(column, "--column"),
        "item_columns": pairs(item_column, "--item-column"),
        "user_columns": pairs(user_column, "--user-column"),
        "time_unit": time_unit,
        "max_rejected": max_rejected,
        "memory_limit": memory_limit,
        "threads": threads,
    }


def engine(name: str, master: str | None) -> Spark | None:
    """What computes an ingest; Spark is imported only where it is asked for."""
    if name not in ("duckdb", "spark"):
        raise InputError(f"--engine {name}: expected duckdb or spark.")
    if name == "spark":
        from longretriever.store.on_spark import Spark

        return Spark(master)
    if master is not None:
        raise InputError(f"--spark-master {master} is of --engine spark. Pass that too, or leave it out.")
    return None


def parts(by: str | None, count: int | None) -> Parts | None:
    """How an ingest cuts the store, if it does."""
    if by is None and count is None:
        return None
    if by is None or count is None:
        raise InputError("--parts-by and --parts belong together: --parts-by user --parts 8.")
    from longretriever.store.parts import Parts

    return Parts(by, count)


# -- a model, and how it is asked


def configured(method: str, preset: str | None, given: Mapping[str, Any]) -> Any:
    """The configuration of a method, with what options say; those that are None stay as they are."""
    from longretriever.model.config import LEARNED, configuration

    config = configuration(one_of("--method", method, LEARNED))
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


def with_factors(config: Any, method: str, wanted: bool) -> Any:
    """The same, with factors of the weight that what is held out asks for, or without."""
    whole = config if method == "ebr" else getattr(config, "whole", None)
    if whole is None:
        raise InputError("--[no-]factors: for longretriever (but not the paper's) and ebr. Leave it out.")
    whole = replace(whole, factors=None if wanted else 0.0)
    return whole if method == "ebr" else replace(config, whole=whole)


def interests(text: str | None) -> Interests | None:
    """`pgin:20`, `random:5:20` and `top:20` as interests; None, the model's own, for None."""
    from longretriever.retrieve.interests import Pgin, RandomInTop, Top

    if text is None:
        return None
    name, *numbers = text.split(":")
    values = [integer(n, "--select") for n in numbers]
    if name == "random" and len(values) == 2:
        return RandomInTop(*values)
    if name == "top" and len(values) == 1:
        return Top(*values)
    if name == "pgin" and len(values) == 1:
        return Pgin(values[0])
    raise InputError(f"--select {text}: expected pgin:K, random:N:M or top:N, such as pgin:20.")


def merge(name: str | None) -> Merge | None:
    from longretriever.retrieve.merge import MERGES

    return None if name is None else MERGES[one_of("--merge", name, tuple(MERGES))]


def rules(
    retriever: Retriever,
    exclude_seen: bool,
    exclude_item: Sequence[str] | None,
    exclude_category: Sequence[str] | None,
    include_category: Sequence[str] | None,
    quota: Sequence[str] | None,
    boost: Sequence[str] | None,
) -> Rules:
    from longretriever.retrieve.rules import Rules

    items, categories = retriever.model.items[ITEM].type, retriever.model.category_ids.values.type
    quotas = pairs(quota, "--quota") or {}
    boosts = pairs(boost, "--boost") or {}
    return Rules(
        exclude_seen=exclude_seen,
        exclude_items=[as_id(i, items) for i in exclude_item or ()],
        exclude_categories=[as_id(c, categories) for c in exclude_category or ()],
        include_categories=[as_id(c, categories) for c in include_category or ()],
        quotas={as_id(c, categories): integer(n, "--quota") for c, n in quotas.items()},
        boosts={as_id(c, categories): number(x, "--boost") for c, x in boosts.items()},
    )


# -- a shard; a market


def share(shard: str | None, categories: str | None) -> Share:
    """`1/3` or `0:2500,4000:4100` as what a shard holds."""
    from longretriever.shards.held import Share

    def pair(text: str, option: str, sign: str) -> tuple[int, int]:
        first, between, second = text.partition(sign)
        if not between:
            raise InputError(f"{option} {text}: expected {'I/N, as 1/3' if sign == '/' else 'FIRST:END'}.")
        return integer(first, option), integer(second, option)

    ranges = tuple(pair(one, "--categories", ":") for one in categories.split(",")) if categories else ()
    return Share(pair(shard, "--shard", "/") if shard else None, ranges)


def market(events: int, users: int, items: int | None, categories: int | None, seed: int) -> MarketConfig:
    """The market of a test; None: of the usual size."""
    from longretriever.experiment.ab.plan import world

    given = {"items": items, "categories": categories}
    return world(events, users, seed, **{name: n for name, n in given.items() if n is not None})
