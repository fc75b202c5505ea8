"""How does an item that is newer than the model get a vector? From its category and its features, untrained.

An item's token is the sum of its own row, its category's and its features'; a new item has no row of its own.
Where a value of its features is known, that row is zero: training leaves rows out at random (`id_dropout`),
so that the rest makes a vector by itself. Where none is known, the mean of the category's rows stands in, for
the category's vector alone was never an item. docs/index.md has the measurements behind both.

Items are numbered by category, so all that goes by item number is written anew, in a folder that takes the
old one's place at once. Nothing here needs PyTorch.

I items of the model, n new ones, F feature fields, V codes of all fields, d width.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longretriever.errors import InputError, Mismatch, UnknownCategory
from longretriever.events import CATEGORY, ITEM, TITLE
from longretriever.saved import MANIFEST, Folder, Manifest, kind_of, opening, writing
from longretriever.store.behaviors import Vocabulary, read_arrow, vocabularies

BY_ITEM = ("items.arrow", "category_start.npy", "item_feature.npy", "item_token.npy")
"""Files of a model that go by item number, or count items."""

SHOWN = 5  # examples in an error

_CHUNK = 1 << 16  # items whose tokens are in memory at once
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"


@dataclass(frozen=True)
class Added:
    """What became of the items that were given."""

    rows: dict[str, int]  # of the input: read, unusable ones by reason, duplicate, conflicting
    added: int
    already: int  # items that the model had; they stay as they are
    categories: dict[int | str, int]  # category -> items added to it
    features: dict[str, dict[str, int]]  # field -> of the added: known, unknown to the model, missing
    plain: int  # of the added: without any known feature, so all of one category have one vector

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values; categories by their ids as text, as JSON wants them."""
        return {**asdict(self), "categories": {str(c): n for c, n in self.categories.items()}}


class _New(NamedTuple):
    """Items to add, sorted by id."""

    rows: pa.Table  # [n] item_id, as the model's are, and what else was given
    category: np.ndarray  # [n] category numbers of the model


def extend(
    path: str | os.PathLike[str],
    items: Any,
    *,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    then: Callable[[Path], object] | None = None,
) -> Added:
    """Add to a model folder the items that it does not have, and to the models inside it.

    `items`, `columns` and `max_rejected` are as in `ingest`. Items are added all or none, in a new folder
    that replaces the old one, and `then` is called with it before (see `writing`); where nothing is new,
    nothing happens. Several calls give the same model as one with all items.

    Raises `UnknownCategory` where a new item is of no category of the model, `EventsError` or `InputError`
    for an input that cannot be used, and a `SavedError`: `Mismatch` for a model that was saved without what
    makes vectors of new items, or that was replaced meanwhile.

    Memory: ids, titles and features of all items, and the tokens of the new ones. Time: about that of copying
    the folder twice, and of a sort of the ids.
    """
    from longretriever.store.ingest import read_counted  # which brings an engine that serving does not need

    base = opening(path, "model", verify=True)  # what is copied must not be damaged
    if "item_fields" not in base.facts:
        raise Mismatch(
            f"{base.path} was saved without the rows of item features, by an older version: no item can be "
            "added to it. Train it again with `longretriever train`."
        )
    given, counts = read_counted(items, "items", columns, max_rejected)
    new = _those_new(base, given)

    def finish(made: Path) -> None:
        if then is not None:
            then(made)
        if opening(path, "model").fingerprint != base.fingerprint:
            raise Mismatch(f"{base.path} was replaced while items were being added. Add them again.")

    if len(new.category):
        _write(base, new, Path(path), finish)
    return _report(base, given, counts, new)


def _report(base: Manifest, given: pa.Table, counts: dict[str, int], new: _New) -> Added:
    names = read_arrow(base.path / "categories.arrow")[CATEGORY]
    category, count = np.unique(new.category, return_counts=True)
    fields, code_nF = vocabularies(base.facts["item_fields"]), _codes(base, new.rows)
    return Added(
        rows=counts,
        added=len(new.category),
        already=given.num_rows - len(new.category),
        categories=dict(zip(names.take(pa.array(category)).to_pylist(), count.tolist(), strict=True)),
        features={field.name: _found(field, new.rows, code_nF[:, i]) for i, field in enumerate(fields)},
        plain=int((code_nF == 0).all(axis=1).sum()),
    )


def _found(field: Vocabulary, rows: pa.Table, code_n: np.ndarray) -> dict[str, int]:
    n, known = len(code_n), int(np.count_nonzero(code_n))
    missing = rows[field.name].null_count if field.name in rows.column_names else n
    return {"known": known, "unknown": n - known - missing, "missing": missing}


# -- what was given, in the model's terms


def _those_new(base: Manifest, given: pa.Table) -> _New:
    """The given items that the model does not have. Raises `InputError`, `UnknownCategory`."""
    known = read_arrow(base.path / "items.arrow")[ITEM]
    ids = _as_ids(given[ITEM], known.type, base.path)
    rows = given.set_column(given.schema.get_field_index(ITEM), ITEM, ids)
    rows = rows.filter(pc.invert(pc.is_in(ids, value_set=known)))
    categories = read_arrow(base.path / "categories.arrow")[CATEGORY]
    found = pc.index_in(rows[CATEGORY].cast(pa.large_string()), value_set=categories.cast(pa.large_string()))
    if found.null_count:
        raise UnknownCategory(_without_category(base, rows, found))
    return _New(rows, found.to_numpy().astype(np.int64))


def _as_ids(given: pa.ChunkedArray, dtype: pa.DataType, path: Path) -> pa.ChunkedArray:
    """Ids in the type that the model's have."""
    if pa.types.is_integer(dtype) and not pa.types.is_integer(given.type):
        odd = given.filter(pc.invert(pc.match_substring_regex(given, _INTEGER)))
        if len(odd):
            raise InputError(
                f"{ITEM} {odd[0].as_py()!r} is not an integer, the ids of {path} are. "
                f"Give ids of its log, or name another column with --item-column {ITEM}=NAME."
            )
    return given.cast(dtype)


def _without_category(base: Manifest, rows: pa.Table, found: pa.ChunkedArray) -> str:
    strange = rows.filter(pc.is_null(found))
    shown = strange.select([ITEM, CATEGORY]).slice(0, SHOWN).to_pylist()
    named = ", ".join(f"{row[ITEM]!r} (category {row[CATEGORY]!r})" for row in shown)
    advice = "Leave them out, or train again on a log that has their categories."
    if strange[CATEGORY].null_count == rows.num_rows:
        advice = f"Name the column of the category with --item-column {CATEGORY}=NAME."
    return (
        f"{strange.num_rows:,} of {rows.num_rows:,} new items are of no category that {base.path} was "
        f"trained on, such as {named}; no item was added. {advice}"
    )


def _codes(base: Manifest, rows: pa.Table) -> np.ndarray:
    """[n, F] codes of the features in the model's vocabularies; 0 is missing or unknown."""
    fields = vocabularies(base.facts["item_fields"])
    none = np.zeros((rows.num_rows, 0), np.int32)
    return np.concatenate([none, *(_code(field, rows)[:, None] for field in fields)], axis=1)


def _code(field: Vocabulary, rows: pa.Table) -> np.ndarray:
    """[n] Values are compared as text: what is a year in one file may be text in another."""
    if field.name not in rows.column_names:
        return np.zeros(rows.num_rows, np.int32)
    found = pc.index_in(_text(rows[field.name]), value_set=_text(pa.chunked_array([pa.array(field.values)])))
    return found.fill_null(-1).to_numpy().astype(np.int32) + 1


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whole numbers without a decimal point, which some programs write where a value is missing."""
    if pa.types.is_floating(column.type):
        with suppress(pa.ArrowInvalid):  # a fraction is among them
            column = column.cast(pa.int64())
    return column.cast(pa.large_string())


# -- the folder


def _write(base: Manifest, new: _New, out: Path, then: Callable[[Path], object] | None = None) -> None:
    """Write a model with new items among its own, and so the models inside it."""
    inside = [Path(name).parent for name in base.files if name.endswith(f"/{MANIFEST}")]
    inside = [name for name in inside if kind_of(base.path / name) == "model"]
    with writing(out, "model", then) as folder:
        for name in base.files:
            if name not in BY_ITEM and not any(Path(name).is_relative_to(part) for part in inside):
                (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(base.path / name, folder.path / name)
        for part in inside:
            _write(opening(base.path / part, "model"), new, folder.path / part)
        _write_items(base, new, folder)
        folder.made_from = {"model": base.fingerprint}
        folder.facts = {"trained_from": base.made_from, **base.facts}
        folder.facts["added"] = base.facts.get("added", 0) + len(new.category)


def _write_items(base: Manifest, new: _New, folder: Folder) -> None:
    """The files of `BY_ITEM`: items of the model and new ones, sorted by category and id."""
    start = base.load_array("category_start")
    n_categories, code_nF = len(start) - 1, _codes(base, new.rows)
    items = _joined(read_arrow(base.path / "items.arrow"), new.rows)
    category = np.concatenate([np.repeat(np.arange(n_categories), np.diff(start)), new.category])
    by = [("category", "ascending"), (ITEM, "ascending")]
    keys = items.select([ITEM]).append_column("category", pa.array(category))
    order = pc.sort_indices(keys, sort_keys=by).to_numpy()
    items = items.take(pa.array(order)).combine_chunks()
    with (
        pa.OSFile(str(folder.path / "items.arrow"), "wb") as file,
        pa.ipc.new_file(file, items.schema) as out,
    ):
        out.write_table(items)
    before = np.concatenate([[0], np.cumsum(np.bincount(new.category, minlength=n_categories))])
    folder.save_array("category_start", start + before)
    folder.save_array("item_feature", np.concatenate([base.load_array("item_feature"), code_nF])[order])
    _write_tokens(base.load_array("item_token"), tokens(base, new.category, code_nF), order, folder)


def _joined(old: pa.Table, new: pa.Table) -> pa.Table:
    """Ids, and titles where one of the two has them."""
    titled = any(TITLE in table.column_names for table in (old, new))
    return pa.concat_tables([_titled(t) if titled else t.select([ITEM]) for t in (old, new)])


def _titled(items: pa.Table) -> pa.Table:
    title = items[TITLE] if TITLE in items.column_names else pa.nulls(items.num_rows)
    return items.select([ITEM]).append_column(TITLE, title.cast(pa.large_string()))


def tokens(base: Manifest, category: np.ndarray, code_nF: np.ndarray) -> np.ndarray:
    """[n, d] what the user tower reads as a behavior of each new item; its direction is the item's vector."""
    plain = (code_nF == 0).all(axis=1)
    row_Vd, first = base.load_array("feature_token"), 0
    out = base.load_array("category_token")[category]
    out = out + base.load_array("category_row")[category] * plain[:, None]
    for i, field in enumerate(vocabularies(base.facts["item_fields"])):
        out += row_Vd[first + code_nF[:, i]]
        first += field.size
    return out


def _write_tokens(old: np.ndarray, new: np.ndarray, order: np.ndarray, folder: Folder) -> None:
    out = np.lib.format.open_memmap(
        folder.path / "item_token.npy", mode="w+", dtype=old.dtype, shape=(len(order), old.shape[1])
    )
    for at in range(0, len(order), _CHUNK):
        rows = order[at : at + _CHUNK]
        mine = rows < len(old)
        out[at : at + _CHUNK][mine] = old[rows[mine]]
        out[at : at + _CHUNK][~mine] = new[rows[~mine] - len(old)]
    out.flush()
