"""How is a store cut into parts for several machines? By ranges of users or categories, each part a store.

A part numbers items and categories as the whole does, and has the same vocabularies, so that a model
trained on one serves on another; only its users are counted from 0. A part by user holds the whole lives of
its users: what a serving machine needs. A part by category holds every event of its categories: what a
training process needs. Parts are alike in events, not in ids; no user, and no category, is cut, so the
largest bounds how alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa

from longretriever.errors import Damaged, InputError
from longretriever.events import CATEGORY, USER
from longretriever.saved import Folder, Manifest, opening, package_version, seal
from longretriever.store.arrays import link, move_unless_there, put_together, write_category_groups
from longretriever.store.behaviors import read_arrow

LIST = "parts.json"
PRESENT = "present.npy"
"""[U] numbers, among all users of the log, of those with an event that was kept."""

_SHARED = ("categories.arrow", "items.arrow", "category_start.npy", "item_feature.npy")


@dataclass(frozen=True)
class Parts:
    """Cut the output `by` "user" or "category" into `count` stores."""

    by: str
    count: int

    def __post_init__(self) -> None:
        if self.by not in ("user", "category"):
            raise InputError(f'parts by {self.by!r}: expected "user" or "category".')
        if self.count < 1:
            raise InputError(f"{self.count} parts: expected 1 or more.")


def cuts(events: np.ndarray, parts: int, of: str) -> np.ndarray:
    """[parts + 1] where ranges of ids begin that have about the same share of the `events` [ids].

    None is without events. Each range ends where it is nearest to its fair share of what those before it have
    left. Raises `InputError` where there are fewer ids with an event than ranges.
    """
    met = np.flatnonzero(events)
    if len(met) < parts:
        raise InputError(
            f"{parts:,} parts by {of}, but only {len(met):,} have an event. Ask for fewer parts."
        )
    end, bounds, at = np.cumsum(events[met]), [0], 0
    for left in range(parts, 1, -1):
        done = int(end[at - 1]) if at else 0
        wanted = done + (int(end[-1]) - done) / left
        near = int(np.searchsorted(end, wanted))  # with this id the share is reached, without it not
        below = int(end[near - 1]) if near else 0
        at = min(max(near + int(end[near] - wanted < wanted - below), at + 1), len(met) - left + 1)
        bounds.append(int(met[at]))
    return np.array([*bounds, len(events)])


@dataclass(frozen=True)
class Recipe:
    """What whoever writes a part must know, so that any process that sees the files can."""

    parts: Parts
    pieces: tuple[tuple[Path, ...], ...]  # of each part
    out: Path  # where the parts go
    work: Path  # has what they share, and of all users `users.arrow`, `profile.npy` and PRESENT
    facts: Mapping[str, Any]
    made_from: Mapping[str, str]
    package: str = field(default_factory=package_version)  # a worker may not know


def write_part(recipe: Recipe, number: int) -> None:
    """One part, as a saved store. Its items are links to one copy, where the disk knows links."""
    out, work = recipe.out / folder_of(number), recipe.work
    mine = work / f"{out.name}-{uuid4().hex}"
    mine.mkdir()
    written = put_together(recipe.pieces[number], mine)
    write_category_groups(mine, written.category_groups)
    for name in _SHARED:
        link(work / name, mine / name)
    place = np.searchsorted(np.load(work / PRESENT, mmap_mode="r"), written.users)
    users = read_arrow(work / "users.arrow")[USER].take(pa.array(place))
    write_arrow(mine, "users", pa.table({USER: users}))
    np.save(mine / "profile.npy", np.load(work / "profile.npy", mmap_mode="r")[place])
    ids = users
    if recipe.parts.by == "category":
        met = np.flatnonzero(written.category_groups)
        ids = read_arrow(work / "categories.arrow")[CATEGORY].take(pa.array(met))
    facts = {**asdict(recipe.parts), "number": number, "first": ids[0].as_py(), "last": ids[-1].as_py()}
    facts |= {"events": written.rows, "groups": written.groups, "users": len(users)}
    seal(
        Folder(mine, {**recipe.facts, "part": facts}, dict(recipe.made_from), package=recipe.package), "store"
    )
    move_unless_there(mine, out)


def folder_of(number: int) -> str:
    return f"part-{number:05}"


def write_list(folder: Folder, parts: Parts) -> tuple[dict[str, Any], ...]:
    """Say in `parts.json` what parts there are, with their fingerprints, so that all of them have one too."""
    names = [folder_of(number) for number in range(parts.count)]
    stores = [opening(folder.path / name, "store") for name in names]
    told = [
        {"folder": name, **store.facts["part"], "fingerprint": store.fingerprint}
        for name, store in zip(names, stores, strict=True)
    ]
    (folder.path / LIST).write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    folder.inside.extend(names)
    return tuple(told)


def check_parts(manifest: Manifest) -> int:
    """Verify every part of a partition; their bytes. Raises `SavedError`, also for a part from elsewhere."""
    size = 0
    for said in json.loads((manifest.path / LIST).read_text()):
        part = opening(manifest.path / said["folder"], "store", verify=True)
        if part.fingerprint != said["fingerprint"]:
            raise Damaged(
                f"{part.path}: not the part that was written here (its fingerprint is "
                f"{part.fingerprint[:16]}, expected {said['fingerprint'][:16]}). Restore it from a copy, or "
                "ingest the log again."
            )
        size += sum(file["bytes"] for file in part.files.values())
    return size


def write_arrow(folder: Path, name: str, table: pa.Table) -> None:
    """One batch, so that the whole column is mapped as it lies; large strings may pass 2 GiB."""
    columns = {
        column: table[column].cast(pa.large_string())
        if pa.types.is_string(table[column].type)
        else table[column]
        for column in table.column_names
    }
    table = pa.table(columns).combine_chunks()
    with (
        pa.OSFile(str(folder / f"{name}.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
