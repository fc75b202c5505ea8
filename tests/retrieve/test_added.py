"""An item that nobody has met is found by those who like its kind, and serving goes on while it is added."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from longretriever.errors import Mismatch
from longretriever.index import ExactIndex, Index
from longretriever.model.config import EbrConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.model.train import train
from longretriever.retrieve.added import add_items, remove_items
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.interests import Top
from longretriever.retrieve.popular import Popular
from longretriever.retrieve.retriever import Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest
from tests.worlds import parity_items, parity_log

ALL = np.arange(36)
NEW = ALL[ALL % 12 >= 8]  # of each category, two of either parity
OLD = ALL[ALL % 12 < 8]
SHORT = {"dim": 16, "step_samples": 100, "id_dropout": 0.3}
TINY = TrainConfig(
    **SHORT,
    heads=2,
    context_length=8,
    recent_length=4,
    overlap=2,
    epochs=10,
    distance=0.0,
    interests=None,
    whole=EbrConfig(**SHORT, length=8, epochs=2),
)
LOG = parity_log()
LOG_OF_OLD = LOG.filter(pc.is_in(LOG["item_id"], value_set=pa.array(OLD)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A store without the new items, a model of it with its index, the items to add as a file."""
    path = tmp_path_factory.mktemp("added")
    ingest(LOG_OF_OLD, path / "store", items=parity_items(OLD))
    train(Store.open(path / "store"), path / "model", TINY)
    index_model(path / "model")
    pq.write_table(parity_items(NEW), path / "new.parquet")
    return path


@pytest.fixture
def model(trained, tmp_path) -> Path:
    """A copy of the model, to change."""
    return Path(shutil.copytree(trained / "model", tmp_path / "model"))


@pytest.fixture(scope="module")
def added(trained) -> Path:
    """The model with the new items."""
    path = Path(shutil.copytree(trained / "model", trained / "with new ones"))
    add_items(path, trained / "new.parquet")
    return path


def of_contexts(path: Path) -> Retriever:
    """Without the list of all items, which would be merged with theirs."""
    model = Model.open(path)
    store = Store.open(model.manifest.facts["store_path"])
    return Retriever(
        model, ExactIndex(model.item_vectors(slice(None)), model.category_start), store, interests=Top(3)
    )


def liked(store: Store, user: int, category: int) -> int:
    """The parity of what a user likes in a category."""
    return int(store.event_item[store.in_context(user, category, limit=1)][0]) % 2


def test_new_items_are_found_by_those_who_like_their_kind(added):
    retriever = of_contexts(added)
    store, right = retriever.store, []
    for user in range(store.n_users):
        answer = retriever.retrieve(user, 100)
        for c in np.unique(store.group_category[store.user_group[user] : store.user_group[user + 1]]):
            found = [i for i in answer.item_ids if i in NEW and i // 12 == c]
            assert len(found) == 4, "every item of a context that was asked is in a list that long"
            right.append(np.mean([i % 2 == liked(store, user, c) for i in found[:2]]))
    assert np.mean(right) > 0.9  # chance is 0.5


def test_candidates_have_titles_and_reasons(added):
    for candidate in Retriever.load(added).retrieve(3, 100).candidates:
        assert candidate.title == f"thing {candidate.item_id}"
        assert candidate.category_id == candidate.item_id // 12
        assert candidate.reasons
        assert {reason.item_id for reason in candidate.reasons} <= set(OLD.tolist())


def test_probabilities_count_the_new_items(added):
    retriever, index = of_contexts(added), Index.open(added / "index")
    for indexed in (False, True):
        if indexed:
            retriever = Retriever(retriever.model, index, retriever.store, interests=Top(3))
        for user in range(0, 60, 9):
            answer = retriever.retrieve(user, 1000)
            assert len(answer) == 12 * len(answer.contexts)
            total = np.bincount(answer.source, np.exp([c.log_prob for c in answer.candidates]))
            np.testing.assert_allclose(total, 1, atol=0.01)
    user_ND = retriever.model.item_vectors(np.array([0]))
    item_Nk, cosine_Nk = index.search(user_ND, np.array([1]), 3)
    cosine = retriever.model.item_vectors(slice(12, 24)) @ user_ND[0]
    found = index.log_normaliser(user_ND, np.array([1]), 10.0, item_Nk, cosine_Nk)
    assert found[0] == pytest.approx(np.logaddexp.reduce(10 * cosine.astype(np.float64)), abs=0.01)


def test_the_index_and_a_scan_of_all_say_the_same(added):
    indexed, exact = (Retriever.load(added, interests=Top(3), exact=e) for e in (False, True))
    for user in range(0, 60, 7):
        a, b = indexed.retrieve(user, 12), exact.retrieve(user, 12)
        assert len({*a.item_ids} & {*b.item_ids}) >= 11, "16-bit vectors: neighbours may trade places"


def test_old_items_are_answered_with_as_before(trained, added):
    """With the same vectors, in the order in which they were."""
    before, after = of_contexts(trained / "model"), of_contexts(added)
    old = [before.model.item_ids.number_of(i) for i in OLD.tolist()]
    new = [after.model.item_ids.number_of(i) for i in OLD.tolist()]
    assert np.array_equal(before.model.item_vectors(np.array(old)), after.model.item_vectors(np.array(new)))
    rules = Rules(returns=0.0)  # those met before share out what is left beside all others, who are more now
    for user in range(0, 60, 6):
        for c in range(3):
            one, two = (
                [i for i in r.retrieve(user, 100, rules=rules).item_ids if i in OLD and i // 12 == c]
                for r in (before, after)
            )
            assert one == two


def test_rules_name_new_items(added):
    retriever = Retriever.load(added)
    rules = Rules(exclude_items=NEW[:4].tolist(), exclude_categories=[2])
    found = set(retriever.retrieve(3, 100, rules=rules).item_ids)
    assert not found & {*NEW[:4].tolist(), *range(24, 36)}
    assert found & set(NEW.tolist())


def test_a_later_store_has_met_them(added, tmp_path):
    """Behaviors with a new item count as with any other: as a reason, and as seen."""
    ingest(LOG, tmp_path / "later", items=parity_items(ALL))
    retriever = Retriever.load(added, store=tmp_path / "later", interests=Top(3))
    reasons = set()
    for user in range(60):
        answer = retriever.retrieve(user, 100)
        reasons |= {r.item_id for c in answer.candidates for r in c.reasons}
        met = set(LOG["item_id"].to_numpy()[LOG["user_id"].to_numpy() == user].tolist())
        unseen = retriever.retrieve(user, 100, rules=Rules(exclude_seen=True))
        assert set(unseen.item_ids) == set(answer.item_ids) - met
    assert reasons & set(NEW.tolist())


def test_an_index_elsewhere_is_of_another_model_now(model, trained, tmp_path):
    index_model(model, tmp_path / "index")
    add_items(model, trained / "new.parquet")
    with pytest.raises(Mismatch, match="was made from another model than"):
        Retriever.load(model, index=tmp_path / "index")
    index_model(model, tmp_path / "index")
    assert len(Retriever.load(model, index=tmp_path / "index").retrieve(3, 100)) == 36


def test_where_nothing_is_new_a_missing_index_is_made(model):
    shutil.rmtree(model / "index")
    assert add_items(model, parity_items(OLD)).added == 0
    assert len(Retriever.load(model).retrieve(3, 100)) == 24


# -- items that go, and move


def every_item(path: Path, **options: object) -> list[set[int]]:
    retriever = Retriever.load(path, **options)
    return [set(retriever.retrieve(user, 100).item_ids) for user in range(0, 60, 7)]


def test_what_is_removed_is_nobodys_candidate_however_asked(model):
    """Though they have met it: neither the index finds it, nor what brings back items met, nor the scan."""
    gone = [3, 12, 13, 26]
    met = set(LOG_OF_OLD["item_id"].to_pylist())
    assert set(gone) <= met
    found = remove_items(model, pa.table({"item_id": gone}))
    assert (found.removed, found.left) == (4, 20)
    left = set(OLD.tolist()) - set(gone)
    for options in ({}, {"exact": True}, {"interests": Top(3)}):
        assert all(answer == left for answer in every_item(model, **options)), options
    retriever, reasons = Retriever.load(model, interests=Top(3)), set()
    for user in range(60):
        answer = retriever.retrieve(user, 100)
        total = np.bincount(answer.source, np.exp([c.log_prob for c in answer.candidates]))
        assert (total < 1.02).all()
        reasons |= {r.item_id for c in answer.candidates for r in c.reasons}
    assert reasons & set(gone), "they still speak for others"


def test_probabilities_are_over_what_is_left(model):
    remove_items(model, pa.table({"item_id": [3, 12, 13, 26]}))
    loaded = Model.open(model)
    exact = ExactIndex(loaded.item_vectors(slice(None)), loaded.category_start, loaded.removed)
    store = Store.open(loaded.manifest.facts["store_path"])
    for retriever in (
        Retriever(loaded, exact, store, interests=Top(3)),
        Retriever(loaded, Index.open(model / "index"), store, interests=Top(3)),
    ):
        for user in range(0, 60, 9):
            answer = retriever.retrieve(user, 1000)
            total = np.bincount(answer.source, np.exp([c.log_prob for c in answer.candidates]))
            np.testing.assert_allclose(total, 1, atol=0.01)


def test_who_is_unknown_gets_nothing_removed_either(model):
    retriever = Retriever.load(model)
    before = Popular(retriever.store, retriever.model, retriever.numbers)
    most = before.answer(retriever.store.life(0, None), 5).item_ids[0]
    remove_items(model, pa.table({"item_id": [most]}))
    retriever = Retriever.load(model)
    after = Popular(retriever.store, retriever.model, retriever.numbers)
    assert most not in after.answer(retriever.store.life(0, None), 1000).item_ids


def test_what_comes_back_is_found_as_before(model, trained):
    before = every_item(model)
    remove_items(model, pa.table({"item_id": [3, 12]}))
    assert add_items(model, parity_items(np.array([3, 12]))).back == 2
    assert every_item(model) == before
    old, new = (opening(path / "index" / ".", "index") for path in (trained / "model", model))
    assert old.files["lists.faiss"] == new.files["lists.faiss"]


def test_an_index_made_again_leaves_out_the_same(model):
    remove_items(model, pa.table({"item_id": [3, 12]}))
    index_model(model)
    assert all(answer == set(OLD.tolist()) - {3, 12} for answer in every_item(model))


def test_what_has_moved_is_found_where_it_is_now(model):
    add_items(model, pa.table({"item_id": [3, 4], "category_id": [1, 1]}), move=True)
    only = Rules(include_categories=[1])
    for options in ({}, {"exact": True}):
        answer = Retriever.load(model, **options).retrieve(8, 100, rules=only)
        assert {3, 4} <= {c.item_id for c in answer.candidates if c.category_id == 1}
    assert all(answer == set(OLD.tolist()) for answer in every_item(model))


# -- while it is served, and when it is killed

SERVES = """
import sys
from longretriever import Retriever
retriever = Retriever.load(sys.argv[1])
for line in sys.stdin:
    answer = retriever.retrieve(int(line), 30)
    print([(c.item_id, c.title, round(c.score, 5)) for c in answer.candidates], flush=True)
"""


def test_a_process_that_has_the_old_one_open_goes_on(model, trained):
    command = [sys.executable, "-c", SERVES, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def asked(user: int) -> str:
            process.stdin.write(f"{user}\n")
            process.stdin.flush()
            return process.stdout.readline()

        before = asked(3)
        add_items(model, trained / "new.parquet")
        assert asked(3) == before
        later = asked(8)
        process.stdin.close()
    assert process.returncode == 0
    assert before.count("thing") == later.count("thing") == 24
    assert len(Retriever.load(model).retrieve(3, 100)) == 36


KILLED = """
import importlib, os, signal, sys
from longretriever import add_items
module, name = sys.argv[3].rsplit(".", 1)
setattr(importlib.import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
add_items(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(
    "moment",
    ["model.extended._write_rows", "retrieve.indexing.build", "saved._exchange", "saved.sync"],
)
def test_killed_at_any_moment_the_old_one_stays(model, trained, moment):
    before = opening(model, "model").fingerprint
    words = [str(model), str(trained / "new.parquet"), f"longretriever.{moment}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert opening(model, "model", verify=True).fingerprint == before
    assert len(Retriever.load(model, verify=True).retrieve(3, 100)) == 24
    assert add_items(model, trained / "new.parquet").added == 12
    assert len(Retriever.load(model, verify=True).retrieve(3, 100)) == 36


@pytest.mark.parametrize("moment", ["model.extended._write", "retrieve.indexing.build", "saved._exchange"])
def test_killed_while_items_go_all_are_still_found(model, moment):
    program = KILLED.replace("add_items", "remove_items")
    (model.parent / "gone.csv").write_text("item_id\n3\n12\n")
    words = [str(model), str(model.parent / "gone.csv"), f"longretriever.{moment}"]
    killed = subprocess.run([sys.executable, "-c", program, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(Retriever.load(model, verify=True).retrieve(3, 100)) == 24
    assert remove_items(model, model.parent / "gone.csv").removed == 2
    assert len(Retriever.load(model, verify=True).retrieve(3, 100)) == 22


def test_an_error_while_indexing_leaves_the_old_one(model, trained, monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    before = opening(model, "model").fingerprint
    monkeypatch.setattr("longretriever.retrieve.indexing.build", fails)
    with pytest.raises(OSError, match="No space left"):
        add_items(model, trained / "new.parquet")
    assert opening(model, "model", verify=True).fingerprint == before
    assert not [name for name in os.listdir(model.parent) if name.startswith(".")]
