"""How do sorted events become the arrays of a store? Whole users at a time, in pieces, then put together.

A piece is what one sort gives: some whole users, or what they did in some categories. Its arrays are those of
a store whose rows, groups and users count from 0; pieces below each other are a store once these are shifted.
So pieces can be written by many processes, and none of it needs an engine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa

from longretriever.events import LATEST

_GROUPS_AT_ONCE = 1 << 22
_ROWS_AT_ONCE = 1 << 22
_PRESENT, _CATEGORY_GROUPS, _COUNTS = "present.npy", "category_groups.npy", "counts.json"  # of a piece
ITEM_CATEGORY = "item_category.npy"
"""[I] the category number of each item, in the folder that pieces are written in."""


@dataclass(frozen=True)
class Written:
    """What is in a piece, or in several below each other."""

    read: int  # rows, duplicates among them
    rows: int
    groups: int
    first_time: int | None  # seconds since the epoch; None without a row
    last_time: int | None
    users: np.ndarray  # numbers, among all users of the log, of those with an event here
    category_groups: np.ndarray  # [C] groups of each category


def piece_folder(work: str | Path, number: int) -> Path:
    return Path(work) / "pieces" / f"{number:05}"


def write_piece(work: str, wide: bool, number: int, batches: Iterable[pa.RecordBatch]) -> None:
    """All arrays of a piece whose length is that of its events or groups; `wide` event rows need 64 bits.

    `batches` have user, item, time and behavior, sorted by (user, category, time, item, behavior). The folder
    appears whole; where two write it at once, as a cluster may, the first to finish stays.
    """
    folder = piece_folder(work, number)
    mine = folder.with_name(f"{folder.name}-{uuid4().hex}")
    mine.mkdir(parents=True)
    _write_arrays(mine, batches, np.load(Path(work) / ITEM_CATEGORY, mmap_mode="r"), wide)
    move_unless_there(mine, folder)


def move_unless_there(mine: Path, folder: Path) -> None:
    """Rename a folder that another process may have written, too."""
    try:
        mine.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(mine)


def _write_arrays(
    folder: Path, batches: Iterable[pa.RecordBatch], item_category: np.ndarray, wide: bool
) -> None:
    row = np.int64 if wide else np.int32
    dtypes = {"event_item": np.int32, "event_time": np.int64, "event_behavior": np.uint8}
    dtypes |= {"group_category": np.int32, "group_start": np.int64, "user_group": np.int64}
    dtypes |= {"time_order": row, "time_position": row}
    with ExitStack() as files:
        columns = {n: files.enter_context(closing(_Column(folder, n, dtype))) for n, dtype in dtypes.items()}
        written = _append_all(columns, _whole_users(batches), item_category)
    np.save(folder / _PRESENT, written.users)
    np.save(folder / _CATEGORY_GROUPS, written.category_groups)
    counts = {n: v for n, v in vars(written).items() if n not in ("users", "category_groups")}
    (folder / _COUNTS).write_text(json.dumps(counts))


def put_together(pieces: Sequence[Path], out: Path) -> Written:
    """Put the arrays of pieces, whose users follow each other, into the folder `out`.

    A single piece is linked, so that the pieces stay as they are, for who must begin again.
    """
    found = [written_in(piece) for piece in pieces]
    for column in sorted(file.stem for file in pieces[0].glob("*.npy")):
        if f"{column}.npy" in (_PRESENT, _CATEGORY_GROUPS):
            continue
        if len(pieces) == 1:
            link(pieces[0] / f"{column}.npy", out / f"{column}.npy")
        else:
            _concatenate(column, pieces, found, out)
    return total(found)


def link(file: Path, to: Path) -> None:
    """The same file under another name, or a copy where the disk knows no links."""
    try:
        os.link(file, to)
    except OSError:
        shutil.copyfile(file, to)


def written_in(piece: Path) -> Written:
    counts = json.loads((piece / _COUNTS).read_text())
    return Written(
        **counts, users=np.load(piece / _PRESENT), category_groups=np.load(piece / _CATEGORY_GROUPS)
    )


def total(found: Sequence[Written]) -> Written:
    """What is in all of these; users are those of any, in order."""
    times = [time for piece in found for time in (piece.first_time, piece.last_time) if time is not None]
    users = np.concatenate([piece.users for piece in found])
    return Written(
        sum(piece.read for piece in found),
        sum(piece.rows for piece in found),
        sum(piece.groups for piece in found),
        min(times, default=None),
        max(times, default=None),
        users if np.all(users[1:] > users[:-1]) else np.unique(users),
        np.sum([piece.category_groups for piece in found], axis=0),
    )


def _concatenate(name: str, pieces: Sequence[Path], found: Sequence[Written], out: Path) -> None:
    """What points to rows or groups is shifted by those before; of ends of pieces only the last stays."""
    steps = {"group_start": "rows", "time_order": "rows", "time_position": "rows", "user_group": "groups"}
    shift = 0
    first = np.load(pieces[0] / f"{name}.npy", mmap_mode="r")
    with closing(_Column(out, name, first.dtype.type)) as column:
        for piece, written in zip(pieces, found, strict=True):
            values = np.load(piece / f"{name}.npy", mmap_mode="r")
            last = piece == pieces[-1] or name not in ("group_start", "user_group")
            values = values if last else values[:-1]
            for at in range(0, len(values), _ROWS_AT_ONCE):
                column.append(values[at : at + _ROWS_AT_ONCE] + values.dtype.type(shift))
            shift += getattr(written, steps[name]) if name in steps else 0


def _whole_users(batches: Iterable[pa.RecordBatch]) -> Iterator[dict[str, np.ndarray]]:
    """The same rows cut only between users, so that what concerns one user is done in one place.

    Holds a batch and the longest life.
    """
    held: list[dict[str, np.ndarray]] = []
    for batch in batches:
        rows = {name: batch[name].to_numpy() for name in ("user", "item", "time", "behavior")}
        if not batch.num_rows:
            continue
        cut = int(np.searchsorted(rows["user"], rows["user"][-1]))
        if cut == 0 and (not held or held[-1]["user"][-1] == rows["user"][0]):
            held.append(rows)
            continue
        yield _joined([*held, {name: column[:cut] for name, column in rows.items()}])
        held = [{name: column[cut:] for name, column in rows.items()}]
    if held:
        yield _joined(held)


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class _Column:
    """A one-dimensional .npy file that grows: its header has room for any length."""

    def __init__(self, folder: Path, name: str, dtype: type) -> None:
        self._stream = (folder / f"{name}.npy").open("wb")
        self._dtype = np.dtype(dtype)
        self._length = 0
        self._write_header()

    def append(self, values: np.ndarray | Sequence[int]) -> None:
        values = np.asarray(values, dtype=self._dtype)
        self._stream.write(values.data)
        self._length += len(values)

    def close(self) -> None:
        self._stream.seek(0)
        self._write_header()
        self._stream.close()

    def _write_header(self) -> None:
        shape = {"shape": (self._length,), "fortran_order": False, "descr": self._dtype.str}
        np.lib.format.write_array_header_1_0(self._stream, shape)


def _append_all(
    columns: Mapping[str, _Column], blocks: Iterable[dict[str, np.ndarray]], item_category: np.ndarray
) -> Written:
    category_groups = np.zeros(int(item_category[-1]) + 1, dtype=np.int64)
    read = rows = groups = 0
    times: list[int] = []
    users = [np.empty(0, dtype=np.int32)]
    for block in blocks:
        read += len(block["user"])
        part = _arranged(_without_duplicates(block), item_category)
        users.append(part.pop("user"))
        for name in ("group_start", "time_order", "time_position"):
            part[name] += rows
        part["user_group"] += groups
        for name, values in part.items():
            columns[name].append(values)
        category_groups += np.bincount(part["group_category"], minlength=len(category_groups))
        times = [min([*times, int(part["event_time"].min())]), max([*times, int(part["event_time"].max())])]
        rows, groups = rows + len(part["event_item"]), groups + len(part["group_category"])
    columns["group_start"].append([rows])
    columns["user_group"].append([groups])
    first, last = times or (None, None)
    return Written(read, rows, groups, first, last, np.concatenate(users), category_groups)


def _without_duplicates(block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Equal events lie next to each other in the order of the store."""
    fresh = np.ones(len(block["user"]), dtype=bool)
    fresh[1:] = np.logical_or.reduce([column[1:] != column[:-1] for column in block.values()])
    return {name: column[fresh] for name, column in block.items()}


def _arranged(block: dict[str, np.ndarray], item_category: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of the store for some whole users, rows and groups counted from 0; `user` has each once."""
    user, category = block["user"], item_category[block["item"]]
    new_user = np.ones(len(user), dtype=bool)
    new_user[1:] = user[1:] != user[:-1]
    new_group = new_user.copy()
    new_group[1:] |= category[1:] != category[:-1]
    group_start, user_start = np.flatnonzero(new_group), np.flatnonzero(new_user)
    order = np.argsort(user.astype(np.int64) * LATEST + block["time"], kind="stable")  # below 2^63
    position = np.empty_like(order)
    position[order] = np.arange(len(order))
    return {
        "user": user[user_start],
        "event_item": block["item"],
        "event_time": block["time"],
        "event_behavior": block["behavior"],
        "group_category": category[group_start],
        "group_start": group_start,
        "user_group": np.searchsorted(group_start, user_start),
        "time_order": order,
        "time_position": position,
    }


def write_category_groups(folder: Path, category_groups: np.ndarray) -> None:
    """A counting sort of the groups by category, some millions at a time; groups of one stay in order."""
    start = np.concatenate([[0], np.cumsum(category_groups)])
    np.save(folder / "category_group_start.npy", start)
    category = np.load(folder / "group_category.npy", mmap_mode="r")
    dtype = np.int32 if len(category) < 1 << 31 else np.int64
    out = np.lib.format.open_memmap(
        folder / "category_group.npy", mode="w+", dtype=dtype, shape=(len(category),)
    )
    free = start[:-1].copy()
    for base in range(0, len(category), _GROUPS_AT_ONCE):
        some = np.asarray(category[base : base + _GROUPS_AT_ONCE])
        order = np.argsort(some, kind="stable")
        here = np.bincount(some, minlength=len(free))
        among = np.arange(len(some)) - np.repeat(np.cumsum(here) - here, here)
        out[free[some[order]] + among] = base + order
        free += here
    out.flush()
