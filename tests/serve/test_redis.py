"""A server whose Redis is gone answers from the store, says so, refuses events, and recovers by itself."""

from __future__ import annotations

import time
from statistics import median

from tests.serve.running import Server, refused_to_start, serving, wait_until
from tests.store.redises import paused, redis_server


def asked(server: Server) -> dict:
    found = server.post("/v1/retrieve", {"user_id": 7, "k": 5})
    assert found.status_code == 200
    assert len(found.json()["candidates"]) == 5
    return found.json()


def sent(server: Server, event_id: str):
    body = {"user_id": 7, "item_id": 1, "timestamp": 4_000_000_000 + int(event_id), "event_id": event_id}
    return server.post("/v1/events", body)


def live(server: Server) -> str:
    ready = server.get("/readyz")
    assert ready.status_code == 200
    return ready.json()["live"]


def metric(server: Server, name: str) -> str:
    (line,) = [one for one in server.get("/metrics").text.splitlines() if one.startswith(f"{name} ")]
    return line.split()[1]


def test_without_its_redis_and_with_it_again(model, tmp_path):
    with redis_server(tmp_path / "redis") as redis:
        redis.stop()
        with serving(model, tmp_path, "--live", redis.url) as server:
            _degraded(server, "0")
            redis.start()
            _healthy(server, "1", events=1)
            before = asked(server)["now"]
            paused(redis)
            took = [_seconds(server) for _ in range(10)]
            assert median(took) < 0.2, "whoever finds it so waits, the others do not"
            _degraded(server, "2")
            redis.stop()
            _degraded(server, "3")
            redis.start()
            _healthy(server, "4", events=2)
            assert asked(server)["now"] == before + 3, "the newest event is known again"
            assert sent(server, "1").json() == {"accepted": 0, "duplicates": 1}
            log = server.log.read_text()
            assert log.count('"live events cannot be had"') >= 2
            assert log.count('"live events again"') == 2
            assert '"not written"' in log


def _degraded(server: Server, event_id: str) -> None:
    assert live(server) == "unavailable"
    answer = asked(server)
    assert (answer["live"], answer["fallback"]) == (False, None)
    refused = sent(server, event_id)
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
    assert refused.json()["detail"] == (
        "live events cannot be read or written now; nothing was acknowledged. Send it again."
    )
    assert server.get("/v1/users/7").json()["live"] is None
    both = server.post("/v1/retrieve/batch", {"user_ids": [7, 8], "k": 1}).json()["answers"]
    assert [one["live"] for one in both] == [False, False]
    assert server.post("/v1/retrieve", {"k": 1}).json()["live"], "of nobody there are none"
    assert metric(server, "longretriever_live_up") == "0.0"
    assert metric(server, "longretriever_live_events") == "NaN"
    assert float(metric(server, "longretriever_without_live_total")) > 0
    assert server.get("/v1/model").json()["live_events"] is None


def _healthy(server: Server, event_id: str, events: int) -> None:
    wait_until(lambda: live(server) == "ok", 10)
    assert sent(server, event_id).json() == {"accepted": 1, "duplicates": 0}
    assert asked(server)["live"] is True
    assert server.get("/v1/users/7").json()["live"] == events
    assert metric(server, "longretriever_live_up") == "1.0"
    assert metric(server, "longretriever_live_events") == f"{events}.0"


def _seconds(server: Server) -> float:
    start = time.perf_counter()
    asked(server)
    return time.perf_counter() - start


def test_a_redis_that_would_lose_events_is_not_served_with(model, tmp_path):
    with redis_server(tmp_path, appendonly="no") as redis:
        said = refused_to_start(model, ["--live", redis.url])
    assert "appendonly no): a crash would lose events that were acknowledged" in said
