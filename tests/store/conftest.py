"""Where journals are kept: a file, a Redis, a cluster of three. The servers are started once, and emptied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from longretriever.store.behaviors import Store
from longretriever.store.live import LiveJournal, open_journal
from tests.store.redises import RedisServer, cluster_url, emptied, redis_cluster, redis_server
from tests.worlds import START, stored, table

EVERYWHERE = pytest.mark.parametrize("where", ["file", "redis", "cluster"], indirect=True)


@pytest.fixture(scope="session")
def _one(tmp_path_factory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def _three(tmp_path_factory) -> Iterator[list[RedisServer]]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


@pytest.fixture
def one_redis(_one: RedisServer) -> RedisServer:
    """An empty one, for tests that leave it running."""
    emptied([_one])
    return _one


@pytest.fixture
def three_redises(_three: list[RedisServer]) -> list[RedisServer]:
    """An empty cluster, for tests that leave it running."""
    emptied(_three)
    return _three


@pytest.fixture
def where(request, tmp_path: Path, monkeypatch) -> str:
    """What `--live` is given: a file, unless a test says `EVERYWHERE`.

    A disk that others use may take longer for a sync than a request should wait; these tests wait.
    """
    kind = getattr(request, "param", "file")
    if kind == "file":
        return str(tmp_path / "live")
    servers = request.getfixturevalue("one_redis" if kind == "redis" else "three_redises")
    monkeypatch.setattr("longretriever.store.redis.SECONDS", 5.0)
    monkeypatch.setattr("longretriever.store.redis.WRITE_SECONDS", 20.0)
    return servers.url if kind == "redis" else cluster_url(servers)


@pytest.fixture
def journal(where: str) -> Iterator[LiveJournal]:
    found = open_journal(where)
    yield found
    found.close()


@pytest.fixture
def base(tmp_path: Path) -> Store:
    """Users 1 and 2 have met items 10 and 11 of category 0, user 1 also item 20 of category 1."""
    return stored(
        table([1, 1, 1, 2], [10, 11, 20, 10], [0, 0, 1, 0], [START, START + 1, START + 2, START + 9]),
        tmp_path / "base",
    )
