"""How does a model's catalogue change between trainings? Items come, move to another category, and go.

A new item's vector is of its category and its features, untrained. An item's token is the sum of its own
row, its category's and its features'; a new item has no row of its own. Where a value of its features is
known, that row is zero: training leaves rows out at random (`id_dropout`), so that the rest makes a vector by
itself. Where none is known, the mean of the category's rows stands in, for the category's vector alone was
never an item. docs/index.md has the measurements behind both. An item that moves changes one category's
vector for the other's. One that goes stays in the model, for users have met it; it is only found no more.

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
from longretriever.model.exported import removed
from longretriever.model.factors import ITEM_FACTOR
from longretriever.saved import MANIFEST, Folder, Manifest, kind_of, opening, writing
from longretriever.store.behaviors import Vocabulary, read_arrow, vocabularies

_FACTOR = f"{ITEM_FACTOR}.npy"
BY_ITEM = ("items.arrow", "category_start.npy", "item_feature.npy", "item_token.npy", _FACTOR)
"""Files of a model that go by item number, or count items; the last is not in every one."""

_REMOVED = "removed.npy"

SHOWN = 5  # examples in an error

_CHUNK = 1 << 16  # items whose tokens are in memory at once
_INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"


@dataclass(frozen=True)
class Added:
    """What became of the items that were given."""

    rows: dict[str, int]  # of the input: read, unusable ones by reason, duplicate, conflicting
    added: int
    already: int  # items that the model had; but for those counted below, they stay as they are
    back: int  # of those: they had been removed, and are found again
    elsewhere: int  # of those: the input has another category, in which they were not put
    moved: int  # of those: the input has another category, in which they are now
    categories: dict[int | str, int]  # category -> items added to it
    features: dict[str, dict[str, int]]  # field -> of the added: known, unknown to the model, missing
    plain: int  # of the added: without any known feature, so all of one category have one vector

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values; categories by their ids as text, as JSON wants them."""
        return {**asdict(self), "categories": {str(c): n for c, n in self.categories.items()}}


@dataclass(frozen=True)
class Removed:
    """What became of the items that were to go."""

    rows: dict[str, int]  # of the input: read, unusable ones by reason, duplicate, conflicting
    removed: int
    already: int  # items that had been removed before
    unknown: int  # ids that the model does not have
    left: int  # items of the model that are found

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


class _New(NamedTuple):
    """Items to add, sorted by id."""

    rows: pa.Table  # [n] item_id, as the model's are, and what else was given
    category: np.ndarray  # [n] category numbers of the model


class _Change(NamedTuple):
    """All that is to become different, in item numbers of the model as it is."""

    new: _New
    moved: np.ndarray  # [m] items
    to: np.ndarray  # [m] their category
    removed: np.ndarray  # [r] sorted: all that shall not be found from now on

    @property
    def renumbers(self) -> bool:
        """Do items get other numbers?"""
        return bool(len(self.new.category) or len(self.moved))


def extend(
    path: str | os.PathLike[str],
    items: Any,
    *,
    move: bool = False,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    then: Callable[[Path], object] | None = None,
) -> Added:
    """Add to a model folder the items that it does not have, and to the models inside it.

    `items`, `columns` and `max_rejected` are as in `ingest`. Items that had been removed come back. With
    `move`, those that are of another category here than in the model go there. All happens or nothing, in
    a new folder that replaces the old one, and `then` is called with it before (see `writing`); where
    nothing is new, nothing happens. Several calls give the same model as one with all items.

    Raises `UnknownCategory` where an item is to go to a category that the model does not have, `EventsError`
    or `InputError` for an input that cannot be used, and a `SavedError`: `Mismatch` for a model that was
    saved without what makes vectors of new items, or that was replaced meanwhile.

    Memory: ids, titles and features of all items, and the tokens of the new ones. Time: about that of copying
    the folder twice, and of a sort of the ids.
    """
    base, given, counts = _read(path, items, columns, max_rejected)
    if "item_fields" not in base.facts:
        raise Mismatch(
            f"{base.path} was saved without the rows of item features, by an older version: no item can be "
            "added to it. Train it again with `longretriever train`."
        )
    number = _numbers(base, given)
    already, gone = number[number >= 0], removed(base)
    new = _those_new(base, given.filter(pa.array(number < 0)))
    elsewhere, to = _elsewhere(base, given.filter(pa.array(number >= 0)), already, move)
    still_gone = np.setdiff1d(gone, already)
    moved = slice(None) if move else slice(0)
    change = _Change(new, elsewhere[moved], to[moved], still_gone)
    if change.renumbers or len(still_gone) < len(gone):
        _replace(base, change, Path(path), then)
    return _report(base, counts, change, len(already), len(gone) - len(still_gone), len(elsewhere))


def remove(
    path: str | os.PathLike[str],
    items: Any,
    *,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    then: Callable[[Path], object] | None = None,
) -> Removed:
    """Have a model, and those inside it, find these items no more; they still count where a user met them.

    `items` needs the column `item_id` only; ids that the model does not have are counted. The rest, and what
    is raised, is as in `extend`. Raises `InputError` where nothing would be left. Time: that of copying the
    folder.
    """
    base, given, counts = _read(path, items, columns, max_rejected)
    number, gone = _numbers(base, given), removed(base)
    found = number[number >= 0]
    all_gone = np.union1d(gone, found)
    left = int(base.load_array("category_start")[-1]) - len(all_gone)
    if left == 0:
        raise InputError(f"All items of {base.path} would be removed; nothing was. Leave some to be found.")
    if len(all_gone) > len(gone):
        nothing = _New(given.slice(0, 0), np.empty(0, np.int64))
        _replace(base, _Change(nothing, found[:0], found[:0], all_gone), Path(path), then)
    removed_now = len(all_gone) - len(gone)
    return Removed(counts, removed_now, len(found) - removed_now, len(number) - len(found), left)


def _read(
    path: str | os.PathLike[str], items: Any, columns: Mapping[str, str] | None, max_rejected: float
) -> tuple[Manifest, pa.Table, dict[str, int]]:
    """The model as it is, the items that were given, with ids as the model's are, and what became of rows."""
    from longretriever.store.ingest import read_counted  # which brings an engine that serving does not need

    base = opening(path, "model", verify=True)  # what is copied must not be damaged
    given, counts = read_counted(items, "items", columns, max_rejected)
    ids = _as_ids(given[ITEM], read_arrow(base.path / "items.arrow")[ITEM].type, base.path)
    return base, given.set_column(given.schema.get_field_index(ITEM), ITEM, ids), counts


def _numbers(base: Manifest, given: pa.Table) -> np.ndarray:
    """[n] the model's numbers of the given items, -1 where it does not have one."""
    known = read_arrow(base.path / "items.arrow")[ITEM]
    return pc.index_in(given[ITEM], value_set=known).fill_null(-1).to_numpy().astype(np.int64)


def _replace(base: Manifest, change: _Change, path: Path, then: Callable[[Path], object] | None) -> None:
    def finish(made: Path) -> None:
        if then is not None:
            then(made)
        if opening(path, "model").fingerprint != base.fingerprint:
            raise Mismatch(f"{base.path} was replaced while its items were being changed. Change them again.")

    _write(base, change, path, finish)


def _report(
    base: Manifest, counts: dict[str, int], change: _Change, already: int, back: int, elsewhere: int
) -> Added:
    names, new = read_arrow(base.path / "categories.arrow")[CATEGORY], change.new
    category, count = np.unique(new.category, return_counts=True)
    fields, code_nF = vocabularies(base.facts["item_fields"]), _codes(base, new.rows)
    return Added(
        rows=counts,
        added=len(new.category),
        already=already,
        back=back,
        elsewhere=elsewhere - len(change.moved),
        moved=len(change.moved),
        categories=dict(zip(names.take(pa.array(category)).to_pylist(), count.tolist(), strict=True)),
        features={field.name: _found(field, new.rows, code_nF[:, i]) for i, field in enumerate(fields)},
        plain=int((code_nF == 0).all(axis=1).sum()),
    )


def _found(field: Vocabulary, rows: pa.Table, code_n: np.ndarray) -> dict[str, int]:
    n, known = len(code_n), int(np.count_nonzero(code_n))
    missing = rows[field.name].null_count if field.name in rows.column_names else n
    return {"known": known, "unknown": n - known - missing, "missing": missing}


# -- what was given, in the model's terms


def _those_new(base: Manifest, rows: pa.Table) -> _New:
    """Of items that the model does not have. Raises `UnknownCategory`."""
    category = _categories(base, rows)
    if (category < 0).any():
        raise UnknownCategory(_without_category(base, rows, category))
    return _New(rows, category)


def _elsewhere(
    base: Manifest, rows: pa.Table, number: np.ndarray, move: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Items of the model that are of another category in these rows, and that one, -1 if it has no such.

    A row without a category says nothing. Raises `UnknownCategory` where an item cannot `move` there.
    """
    category, said = _categories(base, rows), rows[CATEGORY].is_valid().to_numpy()
    start = base.load_array("category_start")
    other = said & (category != np.searchsorted(start, number, side="right") - 1)
    if move and (category[other] < 0).any():
        raise UnknownCategory(_without_category(base, rows.filter(pa.array(other)), category[other]))
    return number[other], category[other]


def _categories(base: Manifest, rows: pa.Table) -> np.ndarray:
    """[n] the model's numbers of the rows' categories, -1 where it does not have one."""
    known = read_arrow(base.path / "categories.arrow")[CATEGORY].cast(pa.large_string())
    found = pc.index_in(rows[CATEGORY].cast(pa.large_string()), value_set=known)
    return found.fill_null(-1).to_numpy().astype(np.int64)


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


def _without_category(base: Manifest, rows: pa.Table, category: np.ndarray) -> str:
    strange = rows.filter(pa.array(category < 0))
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


def _write(base: Manifest, change: _Change, out: Path, then: Callable[[Path], object] | None = None) -> None:
    """Write a model with this change, and so the models inside it."""
    inside = [Path(name).parent for name in base.files if name.endswith(f"/{MANIFEST}")]
    inside = [name for name in inside if kind_of(base.path / name) == "model"]
    anew = {_REMOVED, *(BY_ITEM if change.renumbers else ())}
    with writing(out, "model", then) as folder:
        for name in base.files:
            if name not in anew and not any(Path(name).is_relative_to(part) for part in inside):
                (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(base.path / name, folder.path / name)
        for part in inside:
            _write(opening(base.path / part, "model"), change, folder.path / part)
        gone = _write_items(base, change, folder) if change.renumbers else change.removed
        if len(gone):
            folder.save_array("removed", gone)
        folder.made_from = {"model": base.fingerprint}
        folder.facts = {"trained_from": base.made_from, **base.facts}
        folder.facts["added"] = base.facts.get("added", 0) + len(change.new.category)


def _write_items(base: Manifest, change: _Change, folder: Folder) -> np.ndarray:
    """The files of `BY_ITEM`, items sorted by category and id. Returns the new numbers of those removed."""
    start, new = base.load_array("category_start"), change.new
    n_categories, code_nF = len(start) - 1, _codes(base, new.rows)
    items = _joined(read_arrow(base.path / "items.arrow"), new.rows)
    category = np.concatenate([np.repeat(np.arange(n_categories), np.diff(start)), new.category])
    token_md = _moved(base, category[change.moved], change)
    category[change.moved] = change.to
    by = [("category", "ascending"), (ITEM, "ascending")]
    keys = items.select([ITEM]).append_column("category", pa.array(category))
    order = pc.sort_indices(keys, sort_keys=by).to_numpy()
    items = items.take(pa.array(order)).combine_chunks()
    with (
        pa.OSFile(str(folder.path / "items.arrow"), "wb") as file,
        pa.ipc.new_file(file, items.schema) as out,
    ):
        out.write_table(items)
    size = np.bincount(category, minlength=n_categories)
    folder.save_array("category_start", np.concatenate([[0], np.cumsum(size)]))
    folder.save_array("item_feature", np.concatenate([base.load_array("item_feature"), code_nF])[order])
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    new_nd = tokens(base, new.category, code_nF)
    token_Id = _write_rows("item_token", base, new_nd, order, folder)
    token_Id[place[change.moved]] = token_md
    token_Id.flush()
    if _FACTOR in base.files:  # nobody has met a new item
        width = base.load_array(ITEM_FACTOR).shape[1]
        _write_rows(ITEM_FACTOR, base, np.zeros((len(new_nd), width), np.float32), order, folder).flush()
    return np.sort(place[change.removed])


def _moved(base: Manifest, category: np.ndarray, change: _Change) -> np.ndarray:
    """[m, d] tokens of the items that move, with the vector of the new category for that of the old."""
    token_Cd = base.load_array("category_token")
    return base.load_array("item_token")[change.moved] - token_Cd[category] + token_Cd[change.to]


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


def _write_rows(name: str, base: Manifest, new: np.ndarray, order: np.ndarray, folder: Folder) -> np.memmap:
    """An array of the model with rows of new items, in the order of their numbers."""
    old = base.load_array(name)
    out = np.lib.format.open_memmap(
        folder.path / f"{name}.npy", mode="w+", dtype=old.dtype, shape=(len(order), old.shape[1])
    )
    for at in range(0, len(order), _CHUNK):
        rows = order[at : at + _CHUNK]
        mine = rows < len(old)
        out[at : at + _CHUNK][mine] = old[rows[mine]]
        out[at : at + _CHUNK][~mine] = new[rows[~mine] - len(old)]
    return out
