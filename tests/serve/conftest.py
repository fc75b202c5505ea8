"""One small model for all tests of the server, and one running server for those that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longretriever.store.behaviors import Store
from tests.serve.running import Server, made, serving


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def busy(model) -> int:
    """The user of most categories."""
    store = Store.open(model.parent / "store")
    return store.user_ids.take([int(np.argmax(np.diff(store.user_group)))])[0]


@pytest.fixture(scope="session")
def server(model, tmp_path_factory) -> Iterator[Server]:
    with serving(model, tmp_path_factory.mktemp("server")) as running:
        yield running
