"""The exported vectors: searched by brute force, they give what the index gives."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longretriever import Retriever
from longretriever.errors import InputError, NotSaved
from longretriever.index import CORPUS
from longretriever.model.config import EbrConfig, TrainConfig
from longretriever.model.exported import Model
from longretriever.model.train import train
from longretriever.retrieve import export as module
from longretriever.retrieve.added import remove_items
from longretriever.retrieve.export import METADATA, export
from longretriever.retrieve.indexing import index_model
from tests.worlds import parity_log, stored


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Vectors of contexts and of the whole, of different widths; two items are removed."""
    path = tmp_path_factory.mktemp("exported")
    store = stored(parity_log(), path / "store")
    short = {"layers": 1, "epochs": 1, "step_samples": 500}
    config = TrainConfig(dim=8, whole=EbrConfig(dim=12, **short), interests=None, **short)
    train(store, path / "model", config, threads=1)
    index_model(path / "model")
    remove_items(path / "model", pa.table({"item_id": [3, 14]}))
    return path / "model"


def test_what_is_searched_in_it_is_what_the_index_finds(model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 10)  # several row groups
    retriever = Retriever.load(model)
    rng = np.random.default_rng(0)
    done: list[tuple[int, int]] = []
    for searched, space in ((retriever._of_contexts, "contexts"), (retriever._of_all, "whole")):
        rows = export(model, tmp_path / "v.parquet", space, progress=lambda *at: done.append(at))
        table = pq.read_table(tmp_path / "v.parquet")
        of = searched.model
        assert rows == len(table) == of.n_items - 2
        assert done[-1] == (of.n_items, of.n_items)
        assert table.schema.field("vector").type == pa.list_(pa.float32(), of.dim)
        said = json.loads(table.schema.metadata[METADATA])
        assert said == {
            space: {
                "model": of.fingerprint,
                "scale": of.scale,
                "corpus_scale": of.corpus_scale,
                "dimension": of.dim,
            }
        }
        item, category = (np.array(table[name]) for name in ("item_id", "category_id"))
        vector = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        assert not np.isin([3, 14], item).any()
        np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, atol=1e-5)
        for n, asked in enumerate([*of.category_ids.values.to_pylist(), None]):
            user = rng.standard_normal(of.dim).astype(np.float32)
            user /= np.linalg.norm(user)
            here = np.flatnonzero(category == asked) if asked is not None else np.arange(len(item))
            best = here[np.argsort(-(vector[here] @ user), kind="stable")[:5]]
            number = CORPUS if asked is None else n
            found, cosine = searched.index.search(user[None], np.array([number]), 5)
            np.testing.assert_allclose(vector[best] @ user, cosine[0], atol=2e-3)  # of 16 bits there
            assert len(set(item[best]) & set(of.item_ids.take(found[0]))) >= 4


def test_what_cannot_be_exported(model, tmp_path):
    with pytest.raises(InputError, match=r"different widths, contexts 8, whole 12: export each"):
        export(model, tmp_path / "v.parquet")
    with pytest.raises(InputError, match="has no space 'both', but contexts, whole"):
        export(model, tmp_path / "v.parquet", "both")
    with pytest.raises(NotSaved):
        export(tmp_path / "none", tmp_path / "v.parquet")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_breaks_off_leaves_the_old_file(model, tmp_path, monkeypatch):
    target = tmp_path / "v.parquet"
    target.write_text("the old one")
    monkeypatch.setattr(Model, "item_vectors", lambda self, items: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, target, "contexts")
    assert target.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [target]
