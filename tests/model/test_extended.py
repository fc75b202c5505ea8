"""New items get the numbers that ingest would give them and vectors of what is known; others move and go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from longretriever.errors import Damaged, EventsError, InputError, Mismatch, NotSaved, UnknownCategory
from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.model.extended import Added, extend, remove
from longretriever.model.train import train
from longretriever.saved import MANIFEST, opening
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest
from tests.worlds import parity_items, parity_log

ALL = np.arange(36)  # 12 in each of 3 categories
NEW = ALL[ALL % 12 >= 8]  # of each category, two of either parity
OLD = ALL[ALL % 12 < 8]
OLD_ROWS = parity_items(OLD).to_pylist()
SHORT = {"dim": 8, "step_samples": 200, "epochs": 1, "warm_start": False}
TINY = TrainConfig(
    **SHORT,
    heads=2,
    context_length=8,
    recent_length=4,
    overlap=2,
    interests=PginConfig(dim=8, recent_length=4, categories=3, step_samples=200, epochs=1),
    whole=EbrConfig(**SHORT, length=8),
)
WITHOUT = TrainConfig(**SHORT, context_length=8, recent_length=4, overlap=2, interests=None, whole=None)


def log_of(items: np.ndarray) -> pa.Table:
    """The events of `parity_log` with these items alone."""
    log = parity_log()
    return log.filter(pc.is_in(log["item_id"], value_set=pa.array(items)))


def as_text(table: pa.Table) -> pa.Table:
    """The same with strings for ids, whose order is another."""
    for name in ("user_id", "item_id", "category_id"):
        if name in table.column_names:
            texts = [f"{name[0]}{n}" for n in table[name].to_pylist()]
            table = table.set_column(table.schema.get_field_index(name), name, [texts])
    return table


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """store; model, of the old items with features; text, with strings for ids; bare, without features."""
    path = tmp_path_factory.mktemp("extended")
    log, items = log_of(OLD), parity_items(OLD)
    ingest(log, path / "store", items=items)
    ingest(as_text(log), path / "text store", items=as_text(items))
    ingest(log, path / "bare store")
    train(Store.open(path / "store"), path / "model", TINY)
    train(Store.open(path / "text store"), path / "text", WITHOUT)
    train(Store.open(path / "bare store"), path / "bare", WITHOUT)
    return path


@pytest.fixture
def place(trained, tmp_path) -> Callable[[str], Path]:
    """A copy of one of them, to change."""
    return lambda name="model": Path(shutil.copytree(trained / name, tmp_path / name))


@pytest.mark.parametrize("of", ["model", "text"])
def test_items_are_numbered_as_ingest_numbers_them(place, tmp_path, of):
    as_given = as_text if of == "text" else (lambda table: table)
    path = place(of)
    extend(path, as_given(parity_items(NEW[::-1])))
    ingest(as_given(log_of(OLD)), tmp_path / "all", items=as_given(parity_items(ALL)))
    store, model = Store.open(tmp_path / "all"), Model.open(path, verify=True)
    assert model.items.equals(store.items)
    assert model.category_start.tolist() == store.category_start.tolist()
    assert np.array_equal(model.manifest.load_array("item_feature"), store.item_feature)
    assert np.array_equal(model.category_of(np.arange(36)), store.item_category)
    assert model.item_ids.number_of(store.items["item_id"][35].as_py()) == 35


def test_items_of_the_model_keep_what_they_have_and_new_ones_get_a_sum(place, trained):
    path = place()
    extend(path, parity_items(NEW))
    old, model = Model.open(trained / "model"), Model.open(path)
    before = [old.item_ids.number_of(i) for i in OLD.tolist()]
    after = [model.item_ids.number_of(i) for i in OLD.tolist()]
    assert np.array_equal(model.item_token[after], old.item_token[before])
    kind, year = old.manifest.facts["item_fields"]
    rows = old.manifest.load_array("feature_token")
    for item in NEW.tolist():
        which = [
            kind["values"].index(("even", "odd")[item % 2]) + 1,
            year["values"].index(item % 5 + 1990) + 1,
        ]
        wanted = old.category_token[item // 12] + rows[which[0]] + rows[3 + which[1]]
        np.testing.assert_allclose(model.item_token[model.item_ids.number_of(item)], wanted, rtol=1e-6)


def test_without_a_known_feature_the_mean_row_of_the_category_stands_in(place, trained):
    old = Model.open(trained / "bare")
    path = place("bare")
    assert extend(path, parity_items(NEW)).plain == 12
    model = Model.open(path)
    for c in range(3):
        mean = old.item_token[old.category_start[c] : old.category_start[c + 1]].mean(axis=0)
        for item in NEW[c == NEW // 12].tolist():
            found = model.item_token[model.item_ids.number_of(item)]
            np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)


def test_features_that_are_unknown_or_missing_are_counted_and_say_nothing(place):
    rows = parity_items(NEW).to_pylist()
    rows[0]["kind"], rows[1]["kind"], rows[1]["year"], rows[2]["year"] = "prime", None, 2050, None
    path = place()
    added = extend(path, pa.Table.from_pylist(rows))
    assert added.features == {
        "kind": {"known": 10, "unknown": 1, "missing": 1},
        "year": {"known": 10, "unknown": 1, "missing": 1},
    }
    assert added.plain == 1
    codes = Model.open(path).manifest.load_array("item_feature")
    assert codes[[8, 9, 10, 11]].tolist() == [[0, 4], [0, 0], [1, 0], [2, 2]]


@pytest.mark.parametrize(
    "year", [pa.float64(), pa.string(), pa.int16()], ids=["with a point", "as text", "narrow"]
)
def test_a_value_is_known_in_whatever_type_it_comes(place, year):
    given = parity_items(NEW)
    given = given.set_column(given.schema.get_field_index("year"), "year", given["year"].cast(year))
    assert extend(place(), given).features["year"] == {"known": 12, "unknown": 0, "missing": 0}


def test_a_file_without_the_features(place):
    added = extend(place(), parity_items(NEW).select(["item_id", "category_id"]))
    assert added.features["kind"] == {"known": 0, "unknown": 0, "missing": 12}
    assert added.plain == 12


def test_the_models_inside_are_extended_and_the_rest_is_the_same(place, trained):
    path = place()
    extend(path, parity_items(NEW))
    old, new = opening(trained / "model", "model"), opening(path, "model", verify=True)
    assert old.files.keys() == new.files.keys()
    for name in ("user_tower.onnx", "weights.safetensors", "interests/pgin.onnx", "whole/user_tower.onnx"):
        assert old.files[name] == new.files[name]
    whole = Model.open(path / "whole", verify=True)
    assert whole.items.equals(Model.open(path).items)
    assert whole.manifest.made_from == {"model": opening(trained / "model" / "whole", "model").fingerprint}


def test_where_it_came_from_is_said(place, trained):
    path = place()
    extend(path, parity_items(NEW[:3]))
    first = opening(path, "model")
    extend(path, parity_items(NEW))
    last = opening(path, "model")
    assert last.made_from == {"model": first.fingerprint}, "its numbers are no longer those of the store"
    assert last.facts["trained_from"] == {"store": Store.open(trained / "store").fingerprint}
    assert (first.facts["added"], last.facts["added"]) == (3, 12)
    assert last.facts["scale"] == first.facts["scale"]


@pytest.mark.parametrize("of", ["model", "bare"])
def test_in_two_steps_as_in_one(place, trained, tmp_path, of):
    once = place(of)
    twice = Path(shutil.copytree(trained / of, tmp_path / "twice"))
    some = parity_items(NEW[[1, 5, 7]]).drop_columns(["kind"])
    rest = parity_items(NEW[[0, 2, 3, 4, 6, 8, 9, 10, 11]])
    extend(once, pa.concat_tables([some, rest], promote_options="default"))
    extend(twice, rest)
    extend(twice, some)
    a, b = opening(once, "model", verify=True), opening(twice, "model", verify=True)
    for name in ("category_start", "item_feature", "item_token"):
        assert np.array_equal(a.load_array(name), b.load_array(name)), name
    assert Model.open(once).items.equals(Model.open(twice).items)


def test_the_same_again_changes_nothing(place):
    path = place()
    assert extend(path, parity_items(ALL)).added == 12
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.rglob("*")}
    again = extend(path, parity_items(ALL), then=lambda made: pytest.fail("there is nothing to finish"))
    assert (again.added, again.already, again.categories) == (0, 36, {})
    assert {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.rglob("*")} == before


def test_items_that_are_there_stay_as_they_are(place, trained):
    """Also where the file has another title, category or feature for them."""
    path = place()
    rows = [
        {"item_id": 3, "category_id": 2, "title": "renamed", "kind": "even"},
        *parity_items(NEW).to_pylist(),
    ]
    assert extend(path, pa.Table.from_pylist(rows)).already == 1
    old, model = Model.open(trained / "model"), Model.open(path)
    number = model.item_ids.number_of(3)
    assert number == 3
    assert model.items["title"][number].as_py() == "thing 3"
    assert np.array_equal(model.item_token[number], old.item_token[3])


def test_titles(place):
    path = place()
    extend(path, parity_items(NEW).drop_columns(["title"]))
    assert Model.open(path).items["title"].to_pylist()[6:10] == ["thing 6", "thing 7", None, None]
    bare = place("bare")
    extend(bare, parity_items(NEW))
    assert Model.open(bare).items["title"].to_pylist()[6:10] == [None, None, "thing 8", "thing 9"]


def test_what_became_of_the_rows_is_said(place, tmp_path):
    lines = [
        "thing,category_id,title,kind",
        "8,0,a,even",
        "8,0,a,even",
        "8,0,b,even",
        "3,0,c,odd",
        "20,1,d,odd",
    ]
    (tmp_path / "items.csv").write_text("\n".join(lines) + "\n")
    added = extend(place(), tmp_path / "items.csv", columns={"item_id": "thing"})
    assert added == Added(
        rows={"read": 5, "duplicate": 1, "conflicting": 1},
        added=2,
        already=1,
        back=0,
        elsewhere=0,
        moved=0,
        categories={0: 1, 1: 1},
        features={
            "kind": {"known": 2, "unknown": 0, "missing": 0},
            "year": {"known": 0, "unknown": 0, "missing": 2},
        },
        plain=0,
    )
    assert json.loads(json.dumps(added.as_dict()))["categories"] == {"0": 1, "1": 1}


def test_a_file_without_rows_adds_nothing(place, tmp_path):
    (tmp_path / "items.csv").write_text("item_id,category_id\n")
    assert extend(place(), tmp_path / "items.csv").added == 0


# -- what cannot be added


def given(**columns: list) -> pa.Table:
    return pa.table({"item_id": [100, 101], "category_id": [0, 1], **columns})


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (
            given(category_id=[0, 7]),
            UnknownCategory,
            r"1 of 2 new items are of no category that .*model was trained on, such as 101 \(category 7\); "
            "no item was added. Leave them out, or train again",
        ),
        (given(category_id=[0, None]), UnknownCategory, r"1 of 2 .* such as 101 \(category None\)"),
        (given(category_id=["x", "y"]), UnknownCategory, r"100 \(category 'x'\), 101 \(category 'y'\)"),
        (given().drop_columns(["category_id"]), UnknownCategory, "--item-column category_id=NAME"),
        (given().drop_columns(["item_id"]), EventsError, "no column item_id"),
        (given(item_id=["a7", "9"]), InputError, r"item_id 'a7' is not an integer, the ids of .*model are"),
        (given(item_id=["07", "9"]), InputError, "item_id '07' is not an integer"),
        (given(item_id=[None, 9]), EventsError, r"1 of 2 rows of the items cannot be used \(1 no item_id\)"),
        ("nowhere.parquet", EventsError, "nowhere.parquet: no items file there"),
        (7, EventsError, "items is a int: expected a path"),
    ],
    ids=[
        *("unknown category", "one without", "of another type", "no column of it", "no column of ids"),
        *("text for a number", "a number with a zero before it", "no id", "no file", "no table"),
    ],
)
def test_what_cannot_be_added_changes_nothing(place, items, error, message):
    path = place()
    before = opening(path, "model").fingerprint
    with pytest.raises(error, match=message):
        extend(path, items)
    assert opening(path, "model", verify=True).fingerprint == before
    assert not list(path.parent.glob(".*"))


def test_five_examples_at_most(place):
    strange = pa.table({"item_id": range(100, 110), "category_id": range(50, 60)})
    with pytest.raises(UnknownCategory, match=r"10 of 10 .* 104 \(category 54\); no item") as error:
        extend(place(), strange)
    assert "105" not in str(error.value)


def test_few_rows_without_an_id_can_be_put_up_with(place):
    added = extend(place(), given(item_id=[None, 101]), max_rejected=0.5)
    assert (added.added, added.rows["no item_id"]) == (1, 1)


def test_ids_of_the_other_type(place):
    """Text that is a number for a model whose ids are numbers, and the other way round."""
    path = place()
    extend(path, pa.table({"item_id": ["100", "-7"], "category_id": ["1", "1"]}))
    assert [Model.open(path).item_ids.number_of(i) for i in (-7, 12, 100)] == [8, 9, 17]
    path = place("text")
    extend(path, pa.table({"item_id": [7], "category_id": ["c1"]}))
    assert Model.open(path).item_ids.number_of("7") == 8, "before i12, the first of its category"


def test_a_model_that_was_saved_without_the_rows_of_features(place):
    path = place()
    file = path / MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["facts"]["item_fields"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(Mismatch, match=r"older version: no item can be added to it\. Train it again with"):
        extend(path, parity_items(NEW))


def test_no_model_or_a_damaged_one(place, trained, tmp_path):
    with pytest.raises(NotSaved, match="longretriever train"):
        extend(tmp_path / "nowhere", parity_items(NEW))
    with pytest.raises(Mismatch, match="holds a saved store, expected: model"):
        extend(trained / "store", parity_items(NEW))
    path = place()
    file = path / "whole" / "item_token.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Damaged, match=r"whole/item_token\.npy: its SHA-256"):
        extend(path, parity_items(NEW))


def test_of_two_at_a_time_the_second_is_told(place):
    path, other = place(), parity_items(NEW[:2])
    with pytest.raises(Mismatch, match=r"was replaced while its items were being changed\. Change"):
        extend(path, parity_items(NEW), then=lambda made: extend(path, other))
    assert Model.open(path, verify=True).n_items == 26
    extend(path, parity_items(NEW))
    assert Model.open(path).n_items == 36


def test_a_link_and_a_file_of_items(place, tmp_path):
    path = place()
    (tmp_path / "link").symlink_to(path)
    pq.write_table(parity_items(NEW), tmp_path / "items.parquet")
    extend(tmp_path / "link", [tmp_path / "items.parquet"])
    assert (tmp_path / "link").is_symlink()
    assert Model.open(path).n_items == 36


# -- items that move


def test_an_item_moves_to_the_category_that_it_has_here(place, trained, tmp_path):
    moving = {4: 2, 13: 0, 30: 1}
    rows = [{**row, "category_id": moving.get(row["item_id"], row["category_id"])} for row in OLD_ROWS]
    path = place()
    added = extend(path, pa.Table.from_pylist(rows), move=True)
    assert (added.added, added.already, added.moved, added.elsewhere) == (0, len(OLD), 3, 0)
    ingest(log_of(OLD), tmp_path / "moved", items=pa.Table.from_pylist(rows))
    store = Store.open(tmp_path / "moved")
    for inside in (".", "whole"):
        old, model = Model.open(trained / "model" / inside), Model.open(path / inside, verify=True)
        assert model.items.equals(store.items)
        assert model.category_start.tolist() == store.category_start.tolist()
        assert np.array_equal(model.manifest.load_array("item_feature"), store.item_feature)
        for item in OLD.tolist():
            before = old.item_token[old.item_ids.number_of(item)]
            after = model.item_token[model.item_ids.number_of(item)]
            if item in moving:
                before = before - old.category_token[item // 12] + old.category_token[moving[item]]
            assert np.array_equal(after, before)


def test_an_item_stays_unless_it_is_said_to_move(place, trained):
    path, there = place(), pa.table({"item_id": [4, 5, 6], "category_id": [2, 0, None]})
    added = extend(path, there)
    assert (added.already, added.moved, added.elsewhere) == (3, 0, 1)
    assert opening(path, "model").fingerprint == opening(trained / "model", "model").fingerprint
    assert extend(path, there, move=True).moved == 1
    assert extend(path, there, move=True).moved == 0, "it is there now"
    assert extend(path, pa.table({"item_id": [4], "category_id": [0]}), move=True).moved == 1
    assert Model.open(path).items.equals(Model.open(trained / "model").items)


def test_no_item_moves_to_a_category_that_the_model_does_not_have(place, trained):
    path = place()
    with pytest.raises(UnknownCategory, match=r"1 of 2 .*such as 5 \(category 77\)"):
        extend(path, pa.table({"item_id": [4, 5], "category_id": [2, 77]}), move=True)
    assert opening(path, "model").fingerprint == opening(trained / "model", "model").fingerprint
    assert extend(path, pa.table({"item_id": [4, 5], "category_id": [2, 77]})).elsewhere == 2


# -- items that go


def ids(path: Path) -> list[int]:
    model = Model.open(path, verify=True)
    return sorted(model.item_ids.take(model.removed))


def test_items_go_come_back_and_keep_their_places_in_between(place, trained):
    path = place()
    gone = remove(path, pa.table({"item_id": [25, 3, 3, 12, 999]}))
    assert (gone.removed, gone.already, gone.unknown, gone.left) == (3, 0, 1, len(OLD) - 3)
    assert gone.rows["duplicate"] == 1
    assert ids(path) == ids(path / "whole") == [3, 12, 25]
    again = remove(path, pa.table({"item_id": [3, 4]}))
    assert (again.removed, again.already) == (1, 1)
    added = extend(path, pa.concat_tables([parity_items(NEW), parity_items(np.array([12]))]))
    assert (added.added, added.already, added.back) == (len(NEW), 1, 1)
    assert ids(path) == ids(path / "whole") == [3, 4, 25], "under their new numbers"
    assert extend(path, pa.table({"item_id": [4], "category_id": [1]}), move=True).back == 1
    assert ids(path) == [3, 25]
    assert extend(path, parity_items(OLD)).back == 2
    assert "removed.npy" not in opening(path, "model").files
    assert np.array_equal(Model.open(path).category_token, Model.open(trained / "model").category_token)


def test_nothing_changes_where_nothing_goes(place):
    path = place()
    before = opening(path, "model").fingerprint
    assert remove(path, pa.table({"item_id": [999]})).unknown == 1
    assert opening(path, "model").fingerprint == before
    remove(path, pa.table({"item_id": [3]}))
    before = opening(path, "model").fingerprint
    assert remove(path, pa.table({"item_id": [3]})).already == 1
    assert opening(path, "model").fingerprint == before


def test_what_cannot_be_removed(place, tmp_path):
    path = place()
    before = opening(path, "model").fingerprint
    with pytest.raises(InputError, match=r"All items of .* would be removed; nothing was"):
        remove(path, parity_items(OLD))
    with pytest.raises(EventsError, match="no column item_id"):
        remove(path, pa.table({"thing": [3]}))
    with pytest.raises(EventsError, match="1 of 2 rows of the items cannot be used"):
        remove(path, pa.table({"item_id": [3, None]}))
    with pytest.raises(InputError, match="'x' is not an integer"):
        remove(path, pa.table({"item_id": ["x"]}))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(EventsError, match=r"broken\.parquet"):
        remove(path, tmp_path / "broken.parquet")
    assert opening(path, "model").fingerprint == before
