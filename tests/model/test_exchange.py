"""Several processes train what one trains, send what the batch asks for, and survive being killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from longretriever.errors import Damaged, InputError, Mismatch, ProcessLost
from longretriever.model.config import TrainConfig
from longretriever.model.exchange import Wire
from longretriever.model.exported import Model
from longretriever.model.train import _with_shards, train
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from tests.model.several import CONFIGS, CONTEXTS
from tests.model.test_train import TINY, parity_right
from tests.worlds import parity_log, random_log, stored

ROOT = Path(__file__).parents[2]
LOG = random_log(7, events=1200, users=24, items=60, categories=4, times=400)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return stored(LOG, tmp_path_factory.mktemp("several") / "store")


def torchrun(processes: int, *arguments: object, restarts: int = 0, **environment: str):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "-m", *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=given, cwd=ROOT, timeout=120
    )


def arrays(path: Path) -> dict[str, np.ndarray]:
    return {str(file.relative_to(path)): np.load(file) for file in sorted(path.rglob("*.npy"))}


def assert_alike(path: Path, other: Path) -> None:
    """The same numbers up to the order in which they were added."""
    found, wanted = arrays(path), arrays(other)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=2e-5, err_msg=name)
    for manifest in ("", *(f.parent.name for f in other.glob("*/manifest.json"))):
        kind = "interests" if manifest == "interests" else "model"
        a, b = (opening(p / manifest, kind).facts["training"] for p in (path, other))
        assert (a["samples"], a["steps"], a["epoch"]) == (b["samples"], b["steps"], b["epoch"])
        np.testing.assert_allclose(a["validation"], b["validation"], atol=1e-4)


@pytest.fixture(scope="module")
def by_one(store, tmp_path_factory) -> Path:
    """What one process makes of three shards."""
    path = tmp_path_factory.mktemp("one")
    for name in ("default", "mind", "ulim", "contexts"):
        train(store, path / name, CONFIGS[name], threads=1)
    return path


@pytest.mark.parametrize(("processes", "names"), [(2, ["default", "mind", "ulim"]), (3, ["default"])])
def test_several_processes_end_in_the_weights_of_one(store, by_one, tmp_path, processes, names):
    done = torchrun(processes, "tests.model.several", store.path, tmp_path, *names)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert_alike(tmp_path / name, by_one / name)
    assert not list(tmp_path.glob(".*")), "the working folders must be gone"
    model = Model.open(tmp_path / "default", verify=True)
    assert model.n_items == store.n_items
    trained = opening(tmp_path / "default", "model").facts["training"]
    assert trained["sent"]["rows"] > 0, "recent behaviors are of any category"
    assert trained["beside"]["interests"]["sent"]["rows"] == 0, "there are no item rows"


def test_shards_learn_about_as_much_as_one_process_without(tmp_path):
    store = stored(parity_log(), tmp_path / "store")
    train(store, tmp_path / "model", replace(TINY, epochs=12, row_lr=0.1, shards=2))
    assert parity_right(tmp_path / "model", store) > 0.95


def test_bytes_do_not_depend_on_the_number_of_items(store, tmp_path):
    """A catalogue of ten times the items, of which the log meets the same; and all stop by one clock."""
    items = np.arange(600)
    catalogue = pa.table({"item_id": items, "category_id": items % 4})
    more = stored(LOG, tmp_path / "more", items=catalogue)
    assert more.n_items == 10 * store.n_items
    done = torchrun(2, "tests.model.several", f"{store.path}:{more.path}", tmp_path, "ebr", "minutes")
    assert done.returncode == 0, done.stderr
    few, many = (opening(tmp_path / name, "model").facts["training"] for name in ("ebr", "ebr-1"))
    assert few["steps"] == many["steps"]
    assert few["sent"]["dense"] == many["sent"]["dense"]
    assert many["sent"]["rows"] < 1.5 * few["sent"]["rows"], "draws of few items meet more of the same"
    assert few["sent"]["agreement"] == many["sent"]["agreement"]
    ended = opening(tmp_path / "minutes", "model").facts["training"]
    assert ended["finished"] == "1.2 seconds are over"
    assert ended["sent"]["rows"] == 0, "categories are whole, and behaviors of their own"


def test_killed_it_goes_on_from_the_last_checkpoint(store, by_one, tmp_path):
    done = torchrun(2, "tests.model.several", store.path, tmp_path, "contexts", restarts=1, KILL="1 4")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("lost another") <= 1
    assert_alike(tmp_path / "contexts", by_one / "contexts")


def test_killed_it_goes_on_with_another_number_of_processes(store, by_one, tmp_path):
    done = torchrun(2, "tests.model.several", store.path, tmp_path, "contexts", KILL="1 4")
    assert done.returncode != 0
    assert not (tmp_path / "contexts").exists()
    work = tmp_path / ".contexts.training"
    (work / "rows-99-00000000-0").mkdir()  # of a checkpoint that was never finished
    seen = []

    def look(tick):
        seen.append(tick.position.steps)
        assert len(list(work.glob("rows-*"))) == 3

    config = replace(CONFIGS["contexts"], shards=None)  # the checkpoint knows
    train(store, tmp_path / "contexts", config, threads=1, progress=look)
    assert seen[0] == 5, "it must go on from the checkpoint, not from the start"
    assert_alike(tmp_path / "contexts", by_one / "contexts")


def test_one_process_says_what_is_wrong_for_all(store, tmp_path):
    done = torchrun(2, "tests.model.several", store.path, tmp_path, FAIL="1 2")
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "error: the disk of this machine is full of holes" in done.stderr
    assert done.stdout == ""


# -- in one process


def stopped(store: Store, path: Path, config: TrainConfig) -> Path:
    """The working folder of a training that was stopped in its third step."""

    def stop(tick):
        if tick.position.steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(store, path, config, progress=stop, checkpoint_seconds=0)
    return path.with_name(f".{path.name}.training")


def test_damaged_rows_and_those_of_another_moment_are_refused(store, tmp_path):
    work = stopped(store, tmp_path / "m", CONTEXTS)
    other = stopped(store, tmp_path / "other", replace(CONTEXTS, seed=1))
    rows = sorted(work.glob("rows-*"))[1]
    shutil.rmtree(rows)
    shutil.copytree(sorted(other.glob("rows-*"))[1], rows)
    with pytest.raises(Mismatch, match=r"rows-2-.*-1 is not of the same moment as .*latest\. .*--fresh"):
        train(store, tmp_path / "m", CONTEXTS)
    file = rows / "rows.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(Damaged, match=r"rows\.safetensors: .* bytes, expected"):
        train(store, tmp_path / "m", CONTEXTS)
    assert train(store, tmp_path / "m", CONTEXTS, fresh=True).epoch == 1


def test_another_number_of_shards_is_other_settings(store, tmp_path):
    stopped(store, tmp_path / "m", CONTEXTS)
    with pytest.raises(Mismatch, match=r"other settings \(shards\)"):
        train(store, tmp_path / "m", replace(CONTEXTS, shards=2))
    with pytest.raises(InputError, match="shards=0: expected 1 or more, or None for as many"):
        replace(CONTEXTS, shards=0)
    with pytest.raises(InputError, match="shards=25: more than the 24 users of the store"):
        train(store, tmp_path / "n", replace(CONTEXTS, shards=25))


def test_one_shard_is_no_work_for_two(store, tmp_path):
    with pytest.raises(InputError, match="there is one shard, which 2 processes cannot share"):
        _with_shards(replace(CONTEXTS, shards=1), None, SimpleNamespace(world=2))
    stopped(store, tmp_path / "m", replace(CONTEXTS, shards=None))
    unfinished = tmp_path / ".m.training" / "latest"
    with pytest.raises(InputError, match="latest is an unfinished training with one shard, which 2"):
        _with_shards(replace(CONTEXTS, shards=None), unfinished, SimpleNamespace(world=2))


def test_a_process_that_is_gone_is_an_error_that_says_so():
    def gone():
        raise RuntimeError("Connection closed by peer [127.0.0.1]\nand more")

    with pytest.raises(ProcessLost, match=r"process 0 of 1 lost another.*\(Connection closed by peer"):
        Wire()._call(gone)
