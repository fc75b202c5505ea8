"""What ingest does with every kind of input: good, odd, and bad."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from longretriever.errors import EventsError, InputError, NotSaved
from longretriever.store import arrays
from longretriever.store import ingest as ingest_module
from longretriever.store.behaviors import Store
from longretriever.store.ingest import IngestReport, ingest, read_events, read_table

DATA = Path(__file__).parents[2] / "../shared/data"
real_logs = pytest.mark.skipif(not DATA.is_dir(), reason="the real logs are not here")

HEADER = "user_id,item_id,category_id,timestamp\n"
FINE = "1,10,5,1700000000\n1,11,5,1700000060\n2,10,5,1700000120\n"


def events(**columns: Any) -> pa.Table:
    """A log of a few events, with some columns replaced, added or (None) left out."""
    given = {"user_id": [1, 1, 2], "item_id": [10, 11, 10], "category_id": [5, 5, 5], "timestamp": [7, 8, 9]}
    return pa.table({name: values for name, values in (given | columns).items() if values is not None})


def stored(out: Path, given: Any, **options: Any) -> tuple[Store, IngestReport]:
    report = ingest(given, out, threads=1, **options)
    return Store.open(out, verify=True), report


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def rejected(out: Path) -> list[tuple[str, int, str]]:
    table = pq.read_table(out / "rejected.parquet").select(["file", "row", "reason"]).to_pylist()
    return [(Path(row["file"]).name, row["row"], row["reason"]) for row in table]


# -- formats


def as_parquet(folder: Path, table: pa.Table) -> Any:
    pq.write_table(table, folder / "log.parquet")
    return folder / "log.parquet"


def as_parquet_gz(folder: Path, table: pa.Table) -> Any:
    (folder / "log.parquet.gz").write_bytes(gzip.compress(as_parquet(folder, table).read_bytes()))
    return str(folder / "log.parquet.gz")


def as_csv(folder: Path, table: pa.Table) -> Any:
    table.to_pandas().to_csv(folder / "log.csv", index=False)
    return folder / "log.csv"


def as_tsv_gz(folder: Path, table: pa.Table) -> Any:
    table.to_pandas().to_csv(folder / "log.tsv.gz", index=False, sep="\t")
    return folder / "log.tsv.gz"


def as_folder_of_both(folder: Path, table: pa.Table) -> Any:
    as_csv(folder, table.slice(0, 10).select(table.column_names[::-1]))
    as_parquet(folder, table.slice(10))
    (folder / "README.md").write_text("not a log")
    return folder


def as_glob(folder: Path, table: pa.Table) -> Any:
    as_folder_of_both(folder, table)
    return str(folder / "lo*.[cp]*")


def as_list(folder: Path, table: pa.Table) -> Any:
    as_folder_of_both(folder, table)
    return [folder / "log.parquet", folder / "log.csv"]


def as_pandas(folder: Path, table: pa.Table) -> Any:
    return table.to_pandas()


def as_categoricals(folder: Path, table: pa.Table) -> Any:
    columns = {name: pc.dictionary_encode(table[name]) for name in ("behavior", "category_id")}
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})


FORMATS = [
    *(as_parquet, as_parquet_gz, as_csv, as_tsv_gz, as_folder_of_both, as_glob, as_list),
    *(as_pandas, as_categoricals),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, str]:
    """A log of 40 events, and the fingerprint of its store when it comes as an Arrow table."""
    rng = np.random.default_rng(3)
    log = {name: rng.integers(0, 7, 40) for name in ("user_id", "item_id")}
    log["category_id"] = rng.choice(["tea, green", 'so-called "tea"', "é"], 40)
    log |= {"timestamp": 1_700_000_000 + rng.integers(0, 9, 40), "behavior": rng.choice(["a", "b"], 40)}
    table = pa.table(log)
    out = tmp_path_factory.mktemp("plain") / "store"
    return table, stored(out, table)[0].fingerprint


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_log_in_any_form_is_the_same_store(form: Any, plain: Any, tmp_path: Path) -> None:
    log, fingerprint = plain
    (tmp_path / "in").mkdir()
    assert stored(tmp_path / "store", form(tmp_path / "in", log))[0].fingerprint == fingerprint


def test_the_order_of_rows_and_the_number_of_threads_leave_no_trace(plain: Any, tmp_path: Path) -> None:
    log, fingerprint = plain
    shuffled = log.take(np.random.default_rng(0).permutation(len(log)))
    for threads in (1, 2):
        ingest(shuffled, tmp_path / "store", threads=threads)
        assert Store.open(tmp_path / "store").fingerprint == fingerprint


def test_mapped_columns_win_over_columns_of_that_name(tmp_path: Path) -> None:
    log = events(visitorid=[8, 8, 9])
    store, report = stored(tmp_path / "store", log, columns={"user_id": "visitorid"})
    assert store.user_ids.take([0, 1]) == [8, 9]
    assert report.columns_skipped == {"events.user_id": "an event has no place for it"}


def test_types_in_the_names_of_atomic_files_are_dropped(tmp_path: Path) -> None:
    log = written(
        tmp_path / "l.inter", "user_id:token\titem_id:token\tclass:token_seq\ttimestamp:float\n1\t2\ta b\t5\n"
    )
    store, _ = stored(tmp_path / "store", log, columns={"category_id": "class"})
    assert store.category_ids.take([0]) == ["a b"]


@real_logs
def test_daily_files_of_a_shop(tmp_path: Path) -> None:
    shop = DATA / "online_retail"
    options: dict[str, Any] = {
        "columns": {"user_id": "CustomerID", "item_id": "StockCode", "timestamp": "InvoiceDate"},
        "items": shop / "items.parquet",
        "item_columns": {"item_id": "stock_code"},
    }
    message = (
        r"10,422 of 31,102 .*10,422 no user_id\), such as\n(  2010-12-01\.csv row \d+: .*\n){5}.*--max-rej"
    )
    with pytest.raises(EventsError, match=message):
        ingest(shop / "raw", tmp_path / "store", **options)
    store, report = stored(tmp_path / "store", shop / "raw", max_rejected=0.5, **options)
    assert (report.kept + report.duplicates, store.n_items) == (20_680, 4_070)
    assert store.user_ids.are_integers
    assert any("decimal point" in note for note in report.notes)
    assert store.item_ids.number_of("85123A") is not None


@real_logs
def test_atomic_files_with_users_and_items(tmp_path: Path) -> None:
    raw = DATA / "ml_100k/raw"
    store, _ = stored(
        tmp_path / "store",
        raw / "ml-100k.inter",
        items=raw / "ml-100k.item",
        users=raw / "ml-100k.user",
        item_columns={"category_id": "class", "title": "movie_title"},
    )
    assert (store.n_events, store.n_users, store.n_items) == (100_000, 943, 1_682)
    assert [field.name for field in store.profile_fields] == ["age", "gender", "occupation", "zip_code"]


# -- ids


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (["2", "10", "1"], [1, 2, 10]),
        (["2.0", "10.0", ""], [2, 10]),
        (["007", "7", "10"], ["007", "10", "7"]),
        (["2", "x", "10"], ["10", "2", "x"]),
        (["2.5", "1.0", "1.0"], ["1.0", "2.5"]),
    ],
)
def test_ids_of_text_are_integers_only_if_all_are(text: list[str], ids: list[Any], tmp_path: Path) -> None:
    log = written(tmp_path / "log.csv", HEADER + "".join(f"{u},1,1,{n}\n" for n, u in enumerate(text)))
    store, _ = stored(tmp_path / "store", log, max_rejected=0.5)
    assert store.user_ids.take(range(store.n_users)) == ids


def test_strings_of_digits_in_parquet_stay_strings(tmp_path: Path) -> None:
    store, _ = stored(tmp_path / "store", as_parquet(tmp_path, events(user_id=["1", "1", "2"])))
    assert store.user_ids.take([0, 1]) == ["1", "2"]


def test_whole_floats_are_integers_and_others_are_rejected(tmp_path: Path) -> None:
    store, report = stored(tmp_path / "store", events(user_id=[17850.0, 1.5, float("nan")]), max_rejected=0.9)
    assert store.user_ids.take([0]) == [17850]
    assert report.rejected == {"user_id is not a whole number": 2}
    assert report.notes == ("events.user_id: whole numbers written with a decimal point, read as integers",)


def test_hashes_above_63_bits_become_strings(tmp_path: Path) -> None:
    store, _ = stored(tmp_path / "store", events(user_id=pa.array([1, 2, 2**64 - 1], pa.uint64())))
    assert store.user_ids.take([2]) == ["2"]


def test_ids_of_the_items_take_the_type_of_the_events(tmp_path: Path) -> None:
    items = pa.table({"item_id": ["10", "11"], "title": ["ten", "eleven"]})
    store, _ = stored(tmp_path / "store", events(), items=items)
    assert store.items.to_pylist() == [{"item_id": 10, "title": "ten"}, {"item_id": 11, "title": "eleven"}]
    items = pa.table({"item_id": [10, 11], "title": ["ten", "eleven"]})
    store, _ = stored(tmp_path / "store", events(item_id=["10", "11", "10"]), items=items)
    assert store.items["title"].to_pylist() == ["ten", "eleven"]


def test_ids_of_the_items_that_cannot_be_cast_are_an_error(tmp_path: Path) -> None:
    items = pa.table({"item_id": ["10", "A12"]})
    with pytest.raises(
        EventsError, match=r"items: item_id 'A12' is not an integer, the ids of events are.*--item-c"
    ):
        ingest(events(), tmp_path / "store", items=items)


def test_ids_of_text_follow_the_items(tmp_path: Path) -> None:
    log, items = (
        written(tmp_path / "log.csv", HEADER + FINE),
        pa.table({"item_id": ["10", "A12"], "category_id": [5, 6]}),
    )
    store, _ = stored(tmp_path / "store", log, items=items)
    assert store.item_ids.take([0, 1, 2]) == ["10", "11", "A12"]


# -- categories


def test_an_item_takes_its_most_frequent_category_and_the_smallest_of_equals(tmp_path: Path) -> None:
    log = events(
        user_id=[1] * 6, item_id=[1, 1, 1, 2, 2, 2], category_id=[9, 9, 3, 4, 3, None], timestamp=range(6)
    )
    store, report = stored(tmp_path / "store", log)
    assert [store.category_ids.take([c])[0] for c in store.item_category] == [3, 9]
    assert store.item_ids.take([0, 1]) == [2, 1]
    assert report.recategorised == 2
    # as it is: which category is the usual one may depend on events that a reader must not look at yet
    assert read_events(log)["category_id"].to_pylist() == [9, 9, 3, 4, 3, 3]


def test_the_items_file_has_the_say_on_categories(tmp_path: Path) -> None:
    items = pa.table({"item_id": [10, 12, 13], "category_id": [6, 7, None], "title": ["a", "b", "c"]})
    store, report = stored(tmp_path / "store", events(), items=items)
    assert store.item_ids.take(range(store.n_items)) == [11, 10, 12], "12 is new, and can be retrieved"
    assert store.category_ids.take(range(3)) == [5, 6, 7]
    assert report.recategorised == 2
    assert report.items_input == {"read": 3, "duplicate": 0, "conflicting": 0, "without category": 1}


def test_items_without_a_category_reject_their_events(tmp_path: Path) -> None:
    items = pa.table({"item_id": [10], "category_id": ["x"]})
    store, report = stored(tmp_path / "store", events(category_id=None), items=items, max_rejected=0.5)
    assert (store.n_events, report.rejected) == (2, {"item has no category": 1})
    assert rejected(tmp_path / "store") == [("events", 2, "item has no category")]
    with pytest.raises(EventsError, match=r"1 of 3 rows of the events .*1 item has no category"):
        ingest(events(category_id=None), tmp_path / "store", items=items)


def test_users_without_an_event_left_are_not_users(tmp_path: Path) -> None:
    items = pa.table({"item_id": [10], "category_id": ["x"]})
    log = events(category_id=None, user_id=[1, 2, 3])
    users = pa.table({"user_id": [1, 2, 3], "color": ["red", "green", "blue"]})
    store, _ = stored(tmp_path / "store", log, items=items, users=users, max_rejected=0.5)
    assert store.user_ids.take([0, 1]) == [1, 3]
    assert store.user_group.tolist() == [0, 1, 2]
    assert [store.profile_fields[0].values[code - 1] for code in store.profile[:, 0]] == ["red", "blue"]


def test_rows_of_one_item_identical_and_conflicting(tmp_path: Path) -> None:
    items = pa.table({"item_id": [10, 10, 10, 11, 11], "title": ["b", "b", "a", "z", "y"]})
    for order in (slice(None), slice(None, None, -1)):
        shuffled = items.take(np.arange(5)[order])
        store, report = stored(tmp_path / "store", events(), items=shuffled)
        assert store.items["title"].to_pylist() == ["b", "y"], "the most frequent, then the smallest"
        assert report.items_input == {"read": 5, "duplicate": 1, "conflicting": 2, "without category": 0}


def test_no_category_anywhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        EventsError, match=r"no column category_id, neither in the events nor in the items.*--item-c"
    ):
        ingest(events(category_id=None), tmp_path / "store", items=pa.table({"item_id": [10]}))


# -- times


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (pa.array([1_700_000_000, 1_700_000_001, 1_700_000_002]), "seconds"),
        (pa.array([1_700_000_000_000, 1_700_000_001_999, 1_700_000_002_000]), "milliseconds"),
        (pa.array([1_700_000_000.9, 1_700_000_001.0, 1_700_000_002.5]), "seconds"),
        (pa.array(["2023-11-14 22:13:20", "2023-11-14T22:13:21.7Z", "2023-11-15T00:13:22+02:00"]), "dates"),
        (pa.array(["1700000000", "1700000001.5", "1.700000002e9"]), "seconds"),
        (pa.array([1_700_000_000, 1_700_000_001, 1_700_000_002], pa.timestamp("s")), "dates"),
        (
            pa.array([n * 10**9 for n in range(1_700_000_000, 1_700_000_003)], pa.timestamp("ns", "UTC")),
            "dates",
        ),
    ],
)
def test_times_in_any_form_are_seconds(times: pa.Array, unit: str, tmp_path: Path) -> None:
    store, report = stored(tmp_path / "store", events(timestamp=times))
    assert sorted(store.event_time) == [1_700_000_000, 1_700_000_001, 1_700_000_002]
    assert report.time_unit == unit


def test_dates_after_2038_and_whole_days(tmp_path: Path) -> None:
    times = pa.array([19_675, 19_676, 40_000], pa.date32())
    store, _ = stored(tmp_path / "store", events(timestamp=times))
    assert sorted(store.event_time // 86_400) == [19_675, 19_676, 40_000]


def test_mixed_units_are_an_error_that_names_a_row(tmp_path: Path) -> None:
    lines = [f"1,10,5,{1_700_000_000 + n}\n" for n in range(1_203)] + ["1,10,5,1700000000000\n", FINE]
    written(tmp_path / "a.csv", HEADER + FINE)
    log = written(tmp_path / "events.csv", HEADER + "broken\n" + "".join(lines[1:]))
    message = (
        r"^events.csv row 1204: timestamp 1700000000000 is in milliseconds, earlier rows in seconds. Pass -"
    )
    for given in (log, tmp_path):
        with pytest.raises(EventsError, match=message):
            ingest(given, tmp_path / "store")
    _, report = stored(tmp_path / "store", log, time_unit="s")
    assert report.rejected == {"timestamp is not in seconds": 1, "broken row": 1}
    assert rejected(tmp_path / "store")[1] == ("events.csv", 1204, "timestamp is not in seconds")


def test_absurd_and_unreadable_times_are_rejected(tmp_path: Path) -> None:
    times = ["1700000000", "-5", "4102444800000000", "soon", "2100-01-01", "1969-12-31", "", "nan"]
    log = events(**{name: [1] * 8 for name in ("user_id", "item_id", "category_id")}, timestamp=times)
    _, report = stored(tmp_path / "store", log, max_rejected=0.9)
    assert report.rejected == {
        "timestamp is before 1970 or after 2100": 4,
        "timestamp is unreadable": 2,
        "no timestamp": 1,
    }


def test_an_unknown_time_unit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"time_unit='h': expected \"s\" for seconds or \"ms\""):
        ingest(events(), tmp_path / "store", time_unit="h")


# -- small logs


@pytest.mark.parametrize(
    "log",
    [
        events(user_id=[1, 1, 1]),
        events(category_id=[5, 5, 5]),
        events(item_id=[10, 10, 10], timestamp=[7, 7, 7], user_id=[1, 2, 3]),
        events(item_id=[10, 11, 12], category_id=["a", "b", "c"]),
        events().slice(0, 1),
    ],
    ids=["one user", "one category", "one item, users with one event", "categories of one item", "one event"],
)
def test_the_smallest_logs_have_answers(log: pa.Table, tmp_path: Path) -> None:
    store, _ = stored(tmp_path / "store", log)
    assert store.n_events == len(log)
    for user in range(store.n_users):
        met = store.engagement(user)[0]
        found = sum(len(store.life(user).in_context(int(category)).item) for category in met)
        assert found == len(store.life(user).recent().item) > 0


@pytest.mark.parametrize("empty", ["parquet", "csv", "table"])
def test_an_empty_log_is_an_error(empty: str, tmp_path: Path) -> None:
    table = events().slice(0, 0)
    given = {"table": table, "parquet": as_parquet(tmp_path, table), "csv": as_csv(tmp_path, table)}[empty]
    with pytest.raises(EventsError, match="the log holds no events"):
        ingest(given, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_file_of_no_bytes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EventsError, match=r"log.csv: empty. Expected a first line that names the columns"):
        ingest(written(tmp_path / "log.csv", ""), tmp_path / "store")


# -- bad rows and files


def test_null_keys_are_rejected(tmp_path: Path) -> None:
    log = pa.concat_tables([events()] * 40 + [events(user_id=[None, 1, 1], item_id=[1, None, 1])])
    log = log.set_column(3, "timestamp", pa.array([None, *range(1, len(log))]))
    _, report = stored(tmp_path / "store", log, max_rejected=0.03)
    assert report.rejected == {"no user_id": 1, "no item_id": 1, "no timestamp": 1}
    found = rejected(tmp_path / "store")
    assert found == [
        ("events", 1, "no timestamp"),
        ("events", 121, "no user_id"),
        ("events", 122, "no item_id"),
    ]


def test_rejected_rows_show_what_was_there(tmp_path: Path) -> None:
    log = written(tmp_path / "log.csv", HEADER + "1,2\n" + "1,10,5,soon\n" + FINE)
    ingest(log, tmp_path / "store", max_rejected=0.5)
    broken, unreadable = pq.read_table(tmp_path / "store/rejected.parquet").to_pylist()
    assert (broken["line"], broken["user_id"]) == ("1,2", None)
    assert (unreadable["user_id"], unreadable["timestamp"], unreadable["line"]) == ("1", "soon", None)


def test_broken_rows_of_text_keep_their_place(tmp_path: Path) -> None:
    rows = ['1,"10\n11",5,7\n', "1,10\n", ",10,5,9\n", "1,10,5,9,9\n", '1,"1"0,5,8\n', "2,,5,7\n", FINE]
    log = written(tmp_path / "log.csv", HEADER + "".join(rows))
    store, report = stored(tmp_path / "store", log, max_rejected=0.9)
    found = [(row, reason.split(":")[0]) for _, row, reason in rejected(tmp_path / "store")]
    reasons = ["broken row", "no user_id", "broken row", "broken row", "no item_id"]
    assert found == list(zip([2, 3, 4, 5, 6], reasons, strict=True))
    assert report.rejected == {"broken row": 3, "no user_id": 1, "no item_id": 1}
    assert (report.read, store.n_events) == (9, 4)


def test_bytes_that_are_not_utf8_break_only_their_row(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(HEADER.replace(",", ";").encode() + b"caf\xe9;10;5;7\n" + FINE.replace(",", ";").encode())
    store, report = stored(tmp_path / "store", log, max_rejected=0.5)
    assert (store.n_events, report.rejected) == (3, {"broken row": 1})


def test_too_many_bad_rows_stop_with_five_examples(tmp_path: Path) -> None:
    log = written(tmp_path / "log.csv", HEADER + FINE + "1,10\n" * 9)
    message = (
        r"9 of 12 rows of the events cannot be used \(9 broken row\), such as\n"
        r"(  log.csv row \d+: broken row: Expected Number of Columns: 4 Found: 2 \(1,10\)\n){5}"
        r"At most 1.00% may be: mend the input, or raise it with --max-rejected."
    )
    with pytest.raises(EventsError, match=message):
        ingest(log, tmp_path / "store")
    assert list(tmp_path.iterdir()) == [log]


def test_bad_rows_of_items_and_users_count_too(tmp_path: Path) -> None:
    items = pa.table({"item_id": [10, None], "title": ["a", "b"]})
    with pytest.raises(EventsError, match=r"1 of 2 rows of the items cannot be used \(1 no item_id\)"):
        ingest(events(), tmp_path / "store", items=items)
    users = written(tmp_path / "users.csv", "user_id,color\n1,red\n2\n3,blue\n")
    _, report = stored(tmp_path / "store", events(), items=items, users=users, max_rejected=0.5)
    assert report.users_input == {"read": 3, "broken row": 1, "duplicate": 0, "conflicting": 0}
    assert sorted(row[::2] for row in rejected(tmp_path / "store")) == [
        ("items", "no item_id"),
        ("users.csv", "broken row: Expected Number of Columns: 2 Found: 1"),
    ]


@pytest.mark.parametrize("role", ["events", "items", "users"])
def test_a_missing_column_names_those_there(role: str, tmp_path: Path) -> None:
    table, option = (
        pa.table({"uid": [1], "sku": [2]}),
        {"events": "--column"}.get(role, f"--{role[:-1]}-column"),
    )
    given = {"events": events(), role: table}
    key = "item_id" if role == "items" else "user_id"
    with pytest.raises(
        EventsError, match=rf"{role}: no column {key}; it has \['uid', 'sku'\].*{option} {key}=NAME"
    ):
        ingest(given.pop("events"), tmp_path / "store", **given)


def test_a_mapping_to_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EventsError, match="events: no column uid, which should be user_id; it has"):
        ingest(events(), tmp_path / "store", columns={"user_id": "uid"})
    with pytest.raises(EventsError, match=r"columns names \['price'\], but an event has only"):
        ingest(events(), tmp_path / "store", columns={"price": "p"})


def test_a_column_missing_in_one_of_many_files_names_that_file(tmp_path: Path) -> None:
    written(tmp_path / "in/a.csv", HEADER + FINE)
    written(tmp_path / "in/b.csv", "user,item_id,category_id,timestamp\n" + FINE)
    with pytest.raises(EventsError, match=r"b\.csv: no column user_id"):
        ingest(tmp_path / "in", tmp_path / "store")


@pytest.mark.parametrize("where", ["footer", "pages"])
def test_a_damaged_parquet_file_is_an_error(where: str, tmp_path: Path) -> None:
    log = as_parquet(tmp_path, pa.table({c: np.arange(100_000) % 997 for c in events().column_names}))
    whole = log.read_bytes()
    log.write_bytes(
        whole[: len(whole) // 2] if where == "footer" else whole[:400] + b"\xff" * 60_000 + whole[60_400:]
    )
    with pytest.raises(
        EventsError, match=r"(?s)(log.parquet: not a whole Parquet file|cannot be read).*Restore"
    ):
        ingest(log, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_a_cut_off_gzip_file_is_an_error(tmp_path: Path) -> None:
    lines = "".join(f"{n},{n * 7919 % 10007},1,{n}\n" for n in range(20_000))
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((HEADER + lines).encode())[:-9_000])
    with pytest.raises(EventsError, match=r"log.csv.gz.*Restore"):
        ingest(tmp_path / "log.csv.gz", tmp_path / "store")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.csv", "nowhere.csv: no events file there"),
        ([], "no events files were given"),
        (7, "events is a int: expected a path"),
        (None, "no events were given"),
    ],
)
def test_what_is_no_input_is_an_error(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(EventsError, match=message):
        ingest(given, tmp_path / "store")


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    log = written(tmp_path / "log.csv", "user_id,item_id,timestamp,user_id\n1,1,1,1\n")
    with pytest.raises(EventsError, match=r"log\.csv: two columns of one name"):
        ingest(log, tmp_path / "store")


def test_more_kinds_of_behavior_than_a_byte_holds_are_an_error(tmp_path: Path) -> None:
    log = pa.table({name: np.arange(256) for name in events().column_names})
    with pytest.raises(EventsError, match=r"256 kinds of behavior, such as .*at most 255"):
        ingest(log.append_column("behavior", pa.array([f"k{n}" for n in range(256)])), tmp_path / "store")
    store, _ = stored(
        tmp_path / "store", log.append_column("behavior", pa.array([f"k{n % 255}" for n in range(256)]))
    )
    assert store.event_behavior.max() == 254


def test_too_little_memory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Pass a memory limit such as 2GB"):
        ingest(events(), tmp_path / "store", memory_limit="plenty")


# -- profile fields and item features


def users_and_items() -> tuple[pa.Table, pa.Table]:
    users = {"user_id": [1, 2, 3], "gender": ["m", "", "f"], "age": [30, 20, 20], "vip": [True, False, None]}
    users |= {"height": [1.5, 1.6, 1.7], "country": ["NL"] * 3}
    items = {"item_id": [10, 11, 12], "category_id": [5, 5, 6], "title": ["a", "b", "c"]}
    return pa.table(users), pa.table(items | {"brand": ["y", "x", "y"], "shelf": ["s", "s", "t"]})


def test_fields_that_suit_are_coded_by_sorted_value(tmp_path: Path) -> None:
    users, items = users_and_items()
    store, report = stored(tmp_path / "store", events(), users=users, items=items)
    fields = {field.name: field.values for field in store.profile_fields}
    assert fields == {"age": (20, 30), "vip": (False, True)}, (
        "gender and country have one value among users 1, 2"
    )
    assert store.profile.tolist() == [[2, 2], [1, 1]]
    assert [(field.name, field.values) for field in store.item_fields] == [("brand", ("x", "y"))]
    assert store.item_feature.tolist() == [[2], [1], [2]]
    assert report.columns_skipped == {
        "items.shelf": "constant within every category",
        "users.country": "1 distinct values, not 2 to 10,000",
        "users.gender": "1 distinct values, not 2 to 10,000",
        "users.height": "holds double, not strings, booleans or integers",
    }


def test_fields_that_are_named_are_used_as_they_are(tmp_path: Path) -> None:
    users, items = users_and_items()
    options: dict[str, Any] = {
        "users": users,
        "items": items,
        "profile": ["gender"],
        "item_features": ["shelf"],
    }
    store, _ = stored(tmp_path / "store", events(), **options)
    assert store.profile.tolist() == [[1], [0]], "an empty string is a missing value"
    assert store.item_fields[0].values == ("s", "t")
    with pytest.raises(EventsError, match=r"users has no column size; it has \['age'"):
        ingest(events(), tmp_path / "store", users=users, profile=["size"])


def test_read_table_is_what_ingest_reads(tmp_path: Path) -> None:
    text = written(tmp_path / "u.csv", "uid,zip,age\n2,0123,30\n1,999,20.0\n1,999,20.0\n")
    table = read_table(text, "users", {"user_id": "uid"})
    assert sorted(table.to_pylist(), key=lambda row: row["user_id"]) == [
        {"user_id": 1, "age": 20, "zip": "999"},
        {"user_id": 2, "age": 30, "zip": "0123"},
    ]


def test_read_events_keeps_duplicates_and_cleans_the_rest() -> None:
    log = pa.concat_tables([events(behavior=["x", None, "y"], timestamp=[9_000, 8_000, 7_000])] * 2)
    table = read_events(log)
    assert table.column_names == ["user_id", "item_id", "category_id", "timestamp", "behavior"]
    assert table["timestamp"].to_pylist() == [7_000, 7_000, 8_000, 8_000, 9_000, 9_000]
    assert table["behavior"].to_pylist() == ["y", "y", None, None, "x", "x"]


# -- memory and crashes


def test_a_log_larger_than_the_memory_limit_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sizes = {"user_id": 50_000, "item_id": 20_000, "category_id": 1, "timestamp": 10**9}
    log = as_parquet(
        tmp_path, pa.table({name: rng.integers(0, top, 1_500_000) for name, top in sizes.items()})
    )
    spilled, whole_users = [], arrays._whole_users

    def watched(batches: Any) -> Any:
        for block in whole_users(batches):
            spilled.extend(tmp_path.glob(".*partial*/work/*.tmp"))
            yield block

    monkeypatch.setattr(arrays, "_whole_users", watched)
    roomy, _ = stored(tmp_path / "roomy", log)
    assert not spilled
    tight, _ = stored(tmp_path / "tight", log, memory_limit="45MB")
    assert spilled
    assert tight.fingerprint == roomy.fingerprint
    with pytest.raises(InputError, match=r"5MB is too little for this log .*Pass --memory-limit with more"):
        ingest(log, tmp_path / "tight", memory_limit="5MB", threads=1)


def test_a_life_longer_than_a_batch_is_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user = np.repeat([0, 1, 2, 3], [5, 300_000, 7, 90_000])
    log = {
        "user_id": user,
        "item_id": rng.integers(0, 50, len(user)),
        "timestamp": rng.permutation(len(user)),
    }
    store, _ = stored(tmp_path / "store", pa.table(log | {"category_id": log["item_id"] % 7}))
    assert np.diff(store.group_start[store.user_group]).tolist() == [5, 300_000, 7, 90_000]
    assert store.life(1).recent(10**6).time.tolist() == sorted(log["timestamp"][user == 1])


def test_an_error_in_the_middle_leaves_the_old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, _ = stored(tmp_path / "store", events())

    def fails(*_: Any) -> None:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(ingest_module, "write_category_groups", fails)
    with pytest.raises(RuntimeError, match="disk on fire"):
        ingest(events(user_id=[7, 8, 9]), tmp_path / "store")
    assert Store.open(tmp_path / "store", verify=True).fingerprint == before.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_kill_in_the_middle_leaves_the_old_store(tmp_path: Path) -> None:
    before, _ = stored(tmp_path / "store", events())
    program = f"""
        import time, pyarrow as pa
        from longretriever.store import ingest as module
        def waits(*_):
            print("half written", flush=True)
            time.sleep(60)
        module.write_category_groups = waits
        log = pa.table({{name: [1, 2] for name in ("user_id", "item_id", "category_id", "timestamp")}})
        module.ingest(log, {str(tmp_path / "store")!r})
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "half written\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert Store.open(tmp_path / "store", verify=True).fingerprint == before.fingerprint
    store, _ = stored(tmp_path / "store", events(user_id=[7, 8, 9]))
    assert store.user_ids.take([0]) == [7], "and what the killed one left behind is in nobody's way"


def test_a_folder_that_is_no_store_is_left_alone(tmp_path: Path) -> None:
    written(tmp_path / "precious/letters.txt", "dear")
    with pytest.raises(
        NotSaved, match="holds no saved store of longretriever, so it will not be overwritten"
    ):
        ingest(events(), tmp_path / "precious")


# -- the report


def test_the_report_accounts_for_every_row(tmp_path: Path) -> None:
    log = events(user_id=[1, 1, None], item_id=[10, 10, 10], timestamp=[7, 7, 7])
    said: list[str] = []
    store, report = stored(tmp_path / "store", log, max_rejected=0.5, progress=said.append)
    assert report.read == report.kept + report.duplicates + sum(report.rejected.values()) == 3
    facts = store.manifest.facts["report"]
    told = json.loads(json.dumps(report.as_dict()))
    assert facts == {name: told[name] for name in told if name not in ("seconds", "parts")}
    assert set(report.seconds) == {"read", "number", "sort", "describe", "save", "total"}
    assert said[1] == "numbering the users and items of 3 rows"
