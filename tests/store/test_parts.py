"""Parts of a store: together the whole, each usable as it is, alike in events, old or new after a crash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longretriever import TrainConfig, train
from longretriever.errors import Damaged, InputError, Mismatch
from longretriever.saved import opening
from longretriever.store import arrays
from longretriever.store import parts as module
from longretriever.store.behaviors import Store
from longretriever.store.compact import compact
from longretriever.store.ingest import ingest
from longretriever.store.live import Event, Journal
from longretriever.store.parts import Parts, check_parts, cuts
from tests.test_cli import run
from tests.worlds import random_log

LOG = random_log(3, events=600, users=23, items=40, categories=7)
ITEMS = pa.table({"item_id": np.arange(45), "category_id": np.arange(45) % 7, "size": np.arange(45) % 3})
USERS = pa.table({"user_id": np.arange(25), "town": [["Ur", "Uruk", None][n % 3] for n in range(25)]})
SIDES: dict[str, Any] = {"items": ITEMS, "users": USERS, "threads": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Store:
    out = tmp_path_factory.mktemp("whole") / "store"
    ingest(LOG, out, **SIDES)
    return Store.open(out, verify=True)


def cut(out: Path, by: str, count: int, **options: Any) -> list[Store]:
    report = ingest(LOG, out, parts=Parts(by, count), **SIDES, **options)
    assert [part["folder"] for part in report.parts] == [f"part-{n:05}" for n in range(count)]
    return [Store.open(out / part["folder"], verify=True) for part in report.parts]


def told(store: Store) -> list[tuple[Any, ...]]:
    """All events by ids, with the numbers of items and categories, in the order of the store."""
    user = np.repeat(np.arange(store.n_users), np.diff(store.group_start[store.user_group]))
    columns = [store.user_ids.take(user), store.items["item_id"].take(pa.array(store.event_item)).to_pylist()]
    columns += [store.event_item.tolist(), store.item_category[store.event_item].tolist()]
    return list(zip(*columns, store.event_time.tolist(), store.event_behavior.tolist(), strict=True))


def same_numbers(part: Store, whole: Store) -> None:
    """What a model is made of is the same in both."""
    assert part.items.equals(whole.items)
    assert part.category_ids.values.equals(whole.category_ids.values)
    assert np.array_equal(part.category_start, whole.category_start)
    assert np.array_equal(part.item_feature, whole.item_feature)
    assert (part.item_fields, part.profile_fields) == (whole.item_fields, whole.profile_fields)
    assert (part.behaviors, part.first_time, part.last_time) == (
        whole.behaviors,
        whole.first_time,
        whole.last_time,
    )


def same_reads(part: Store, whole: Store) -> None:
    """Every question of a request about each user of a part."""
    for number, user in enumerate(part.user_ids.take(range(part.n_users))):
        life, other = part.life(number), whole.life(whole.user_number(user))
        assert np.array_equal(life.profile(), other.profile())
        assert all(np.array_equal(*pair) for pair in zip(life.engagement(), other.engagement(), strict=True))
        for limit in (3, 1000):
            assert all(
                np.array_equal(*pair) for pair in zip(life.recent(limit), other.recent(limit), strict=True)
            )
        for category in range(whole.n_categories):
            mine, theirs = life.in_context(category, 4), other.in_context(category, 4)
            assert all(np.array_equal(*pair) for pair in zip(mine, theirs, strict=True))


def groups_of(store: Store, category: int) -> list[tuple[Any, list[int]]]:
    """The events of each user in a category, by the index that training reads."""
    start = store.category_group_start
    found = []
    for group in store.category_group[start[category] : start[category + 1]]:
        user = int(np.searchsorted(store.user_group, group, side="right")) - 1
        rows = slice(store.group_start[group], store.group_start[group + 1])
        found.append((store.user_ids.take([user])[0], store.event_item[rows].tolist()))
    return found


def test_parts_by_user_hold_whole_lives_and_are_together_the_store(whole: Store, tmp_path: Path) -> None:
    parts = cut(tmp_path / "out", "user", 3)
    assert [row for part in parts for row in told(part)] == told(whole)
    users = [user for part in parts for user in part.user_ids.take(range(part.n_users))]
    assert users == whole.user_ids.take(range(whole.n_users))
    for part in parts:
        same_numbers(part, whole)
        same_reads(part, whole)
    assert max(part.n_events for part in parts) < whole.n_events / 3 * 1.2


def test_parts_by_category_hold_all_of_their_categories(whole: Store, tmp_path: Path) -> None:
    parts = cut(tmp_path / "out", "category", 3)
    assert sorted(row for part in parts for row in told(part)) == sorted(told(whole))
    assert max(part.n_events for part in parts) < whole.n_events / 3 * 1.4
    for n, part in enumerate(parts):
        same_numbers(part, whole)
        said = part.manifest.facts["part"]
        mine = range(whole.category_number(said["first"]), whole.category_number(said["last"]) + 1)
        for category in range(whole.n_categories):
            found = groups_of(part, category)
            assert found == (groups_of(whole, category) if category in mine else []), n


@pytest.mark.parametrize("by", ["user", "category"])
def test_one_part_is_the_store(by: str, whole: Store, tmp_path: Path) -> None:
    (part,) = cut(tmp_path / "out", by, 1)
    assert {name: file for name, file in whole.manifest.files.items() if name != "rejected.parquet"} == (
        part.manifest.files
    )


def test_a_part_trains_as_a_store_does(tmp_path: Path) -> None:
    part = cut(tmp_path / "out", "category", 2)[0]
    train(part, tmp_path / "model", TrainConfig(dim=8, layers=1, epochs=1))
    assert opening(tmp_path / "model", "model").made_from["store"] == part.fingerprint


def test_live_events_are_folded_into_a_part_that_lies_elsewhere(whole: Store, tmp_path: Path) -> None:
    part = cut(tmp_path / "parts", "user", 2)[1]
    mine = Path(shutil.copytree(part.path, tmp_path / "mine"))
    user_id, item_id = part.user_ids.take([0])[0], whole.item_ids.take([44])[0]
    journal = Journal(tmp_path / "live.sqlite")
    journal.append([Event(user_id, item_id, None, whole.last_time + 1)]).result()
    journal.close()
    compact(mine, tmp_path / "live.sqlite")
    folded = Store.open(mine, verify=True)
    assert folded.n_events == part.n_events + 1
    last = folded.recent(folded.user_number(user_id), None, 1)
    assert folded.item_ids.take(folded.event_item[last]) == [item_id]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_cuts_leave_no_part_empty_and_none_larger_than_it_must(events: list[int], parts: int) -> None:
    counts = np.array(events)
    if np.count_nonzero(counts) < parts:
        with pytest.raises(InputError, match=r"parts by user, but only \d+ have an event. Ask for fewer"):
            cuts(counts, parts, "user")
        return
    bounds = cuts(counts, parts, "user")
    assert bounds[0] == 0
    assert bounds[-1] == len(counts)
    sizes = np.add.reduceat(counts, bounds[:-1])
    assert len(sizes) == parts
    assert sizes.min() > 0
    assert sizes.max() <= 2 * counts.sum() / parts + counts.max()


def test_many_small_ids_are_cut_evenly_around_a_large_one() -> None:
    for counts, sizes in (
        ([1] * 100 + [900] + [1] * 100, [100, 900, 50, 50]),
        ([1] * 1000, [250] * 4),
        ([900, 1, 1, 1], [900, 1, 1, 1]),
        ([1, 1, 1, 900], [1, 1, 1, 900]),
    ):
        bounds = cuts(np.array(counts), 4, "user")
        assert np.add.reduceat(np.array(counts), bounds[:-1]).tolist() == sizes


def test_as_many_parts_as_users_and_one_more(tmp_path: Path) -> None:
    parts = cut(tmp_path / "out", "user", 23)
    assert [part.n_users for part in parts] == [1] * 23
    with pytest.raises(InputError, match=r"24 parts by user, but only 23 have an event\. Ask for fewer"):
        cut(tmp_path / "more", "user", 24)
    assert not (tmp_path / "more").exists()
    for by, count, said in (
        ("item", 2, 'parts by .item.: expected "user" or "category"'),
        ("user", 0, "0 parts"),
    ):
        with pytest.raises(InputError, match=said):
            Parts(by, count)


def test_a_piece_without_rows_adds_nothing(tmp_path: Path) -> None:
    """A range of users that met none of the categories of a part, as a cluster's pieces may be."""
    np.save(tmp_path / arrays.ITEM_CATEGORY, np.array([0, 0, 1], np.int32))
    columns = {"user": pa.array([3, 3, 5], pa.int32()), "item": pa.array([0, 2, 2], pa.int32())}
    columns |= {"time": pa.array([7, 8, 9]), "behavior": pa.array([0, 0, 0], pa.int16())}
    (rows,) = pa.table(columns).to_batches()
    for number, batches in enumerate(([], [rows], [])):
        arrays.write_piece(str(tmp_path), False, number, batches)
    arrays.write_piece(str(tmp_path), False, 1, [rows])  # a second try comes too late, and is gone
    assert len(list((tmp_path / "pieces").iterdir())) == 3
    (tmp_path / "out").mkdir()
    written = arrays.put_together([arrays.piece_folder(tmp_path, n) for n in range(3)], tmp_path / "out")
    assert (written.rows, written.groups, written.users.tolist()) == (3, 3, [3, 5])
    assert np.load(tmp_path / "out/group_start.npy").tolist() == [0, 1, 2, 3]
    assert np.load(tmp_path / "out/user_group.npy").tolist() == [0, 2, 3]


def test_pieces_put_together_are_what_one_piece_is(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "user": rng.integers(0, 9, 300),
        "item": rng.integers(0, 6, 300),
        "time": rng.integers(0, 40, 300),
    }
    columns["behavior"] = rng.integers(0, 2, 300)
    category = np.array([0, 0, 1, 1, 2, 2], np.int32)
    order = np.lexsort(
        [columns["behavior"], columns["item"], columns["time"], category[columns["item"]], columns["user"]]
    )
    rows = {name: column[order] for name, column in columns.items()}
    for name, cuts_ in (("one", [0, 9]), ("three", [0, 2, 2, 7, 9])):
        work = tmp_path / name
        (work / "out").mkdir(parents=True)
        np.save(work / arrays.ITEM_CATEGORY, category)
        at = np.searchsorted(rows["user"], cuts_)
        for number, (first, last) in enumerate(pairwise(at)):
            (batch,) = pa.table({n: column[first:last] for n, column in rows.items()}).to_batches() or (None,)
            arrays.write_piece(str(work), True, number, [] if batch is None else [batch])
        pieces = [arrays.piece_folder(work, number) for number in range(len(cuts_) - 1)]
        written = arrays.put_together(pieces, work / "out")
        assert (written.read, written.users.tolist()) == (300, list(range(9)))
        assert written.groups < written.rows < 300
    files = sorted(file.name for file in (tmp_path / "one/out").iterdir())
    assert len(files) == 8
    for name in files:
        assert (tmp_path / "one/out" / name).read_bytes() == (tmp_path / "three/out" / name).read_bytes(), (
            name
        )


# -- the folder of parts


def test_the_command_writes_and_verifies_parts(tmp_path: Path) -> None:
    pq.write_table(LOG, tmp_path / "log.parquet")
    command = ["ingest", "--events", tmp_path / "log.parquet", "--out", tmp_path / "out"]
    done = run(*command, "--parts-by", "user", "--parts", 2)
    assert done.code == 0, done.err
    assert "part-00001" in done.out
    assert run("verify", tmp_path / "out", "--json").json["kind"] == "partition"
    assert "belong together" in run(*command, "--parts", 2).error
    assert "expected duckdb or spark" in run(*command, "--engine", "flink").error
    assert "is of --engine spark" in run(*command, "--spark-master", "local[2]").error
    with pytest.raises(Mismatch, match="holds a saved partition, expected: store"):
        Store.open(tmp_path / "out")
    assert "holds a saved partition, so it will not be overwritten by a store" in run(*command).error


@pytest.mark.parametrize("damage", ["flipped", "gone", "another"])
def test_a_damaged_part_is_found(damage: str, tmp_path: Path) -> None:
    cut(tmp_path / "out", "user", 2)
    manifest = opening(tmp_path / "out", "partition")
    assert check_parts(manifest) > 0
    file = tmp_path / "out/part-00001/event_time.npy"
    if damage == "flipped":
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    elif damage == "gone":
        file.unlink()
    else:
        shutil.rmtree(tmp_path / "out/part-00001")
        shutil.copytree(tmp_path / "out/part-00000", tmp_path / "out/part-00001")
    with pytest.raises(Damaged, match="part-00001"):
        check_parts(manifest)


def test_an_error_while_parts_are_written_leaves_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [part.fingerprint for part in cut(tmp_path / "out", "user", 2)]

    def fails(*_: Any) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(module, "seal", fails)
    with pytest.raises(RuntimeError, match="disk on fire"):
        cut(tmp_path / "out", "user", 3)
    monkeypatch.undo()
    assert [
        Store.open(path, verify=True).fingerprint for path in sorted((tmp_path / "out").glob("part-*"))
    ] == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_between_two_parts_leaves_the_old_ones(tmp_path: Path) -> None:
    before = [part.fingerprint for part in cut(tmp_path / "out", "user", 2)]
    program = f"""
        import time
        from longretriever.store import ingest as module
        from tests.store.test_parts import LOG, SIDES, Parts
        write = module.write_part
        def waits(recipe, number):
            write(recipe, number)
            print("one of two", flush=True)
            time.sleep(60)
        module.write_part = waits
        module.ingest(LOG, {str(tmp_path / "out")!r}, parts=Parts("category", 2), **SIDES)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "one of two\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    check_parts(opening(tmp_path / "out", "partition", verify=True))
    assert [Store.open(path).fingerprint for path in sorted((tmp_path / "out").glob("part-*"))] == before
    assert len(cut(tmp_path / "out", "category", 2)) == 2
