"""Several processes train the model that one trains, send what the batch asks for, and survive being killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from longretriever.errors import InputError, Mismatch
from longretriever.model.config import TrainConfig
from longretriever.model.exported import Model
from longretriever.model.train import train
from longretriever.saved import opening
from longretriever.store.behaviors import Store
from tests.model.several import CONFIGS, CONTEXTS
from tests.worlds import random_log, stored

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
    from tests.model.test_train import TINY, parity_log, parity_right

    store = stored(parity_log(), tmp_path / "store")
    train(store, tmp_path / "model", replace(TINY, epochs=12, row_lr=0.1, shards=2))
    assert parity_right(tmp_path / "model", store) > 0.95


def test_bytes_do_not_depend_on_the_number_of_items(store, tmp_path):
    """A catalogue of ten times the items, of which the log meets the same."""
    items = np.arange(600)
    catalogue = pa.table({"item_id": items, "category_id": items % 4})
    more = stored(LOG, tmp_path / "more", items=catalogue)
    assert more.n_items == 10 * store.n_items
    sent = {}
    for name, given in (("few", store), ("many", more)):
        done = torchrun(
            2, "longretriever", "train", given.path, "--out", tmp_path / name, "--method", "ebr", "--dim", "8",
            "--epochs", "1", "--step-samples", "150", "--json", LONGRETRIEVER_TRAIN_VALIDATION="0.1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1, "only the first process speaks"
        training = json.loads(done.stdout)["training"]
        sent[name] = {kind: n / training["steps"] for kind, n in training["sent"].items()}
    assert sent["few"]["rows"] > 0
