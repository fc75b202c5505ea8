"""A router in front of shards: the answers of a single server, and what it does when shards come and go."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from longretriever.cli import app
from longretriever.errors import InputError
from longretriever.serve.settings import Settings
from tests.serve.running import Server, copied, free_port, made, refused_to_start, serving, wait_until
from tests.shards.running import nth, shards

KEY = "s" * 24


@contextmanager
def in_a_process(
    model: Path, folder: Path, *options: str, port: int = 0
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A shard as anybody would start it."""
    port = port or free_port()
    command = [sys.executable, "-m", "longretriever", "serve-shard", str(model), "--port", str(port)]
    with (folder / "shard.log").open("w") as out:
        process = subprocess.Popen([*command, *options], stdout=out, stderr=out, text=True)
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"))
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(30)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def retrieved(server: Server, user: object, **asked: object) -> dict:
    answer = server.post("/v1/retrieve", {"user_id": user, "seed": 1, "now": 1.9e9, **asked})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_its_answers_are_those_of_a_single_server(model, server, busy, tmp_path):
    """All that a request may demand; and the log, the metrics and the page are there too."""
    with (
        shards(model, nth(1, 3), nth(2, 3), nth(3, 3), read_keys=(KEY,)) as running,
        serving(
            model,
            tmp_path,
            "--shards",
            ",".join(one.url for one in running),
            "--shard-key",
            KEY,
            "--shard-seconds",
            "5",
        ) as router,
    ):
        category = retrieved(server, busy)["candidates"][0]["category_id"]
        demands = [
            {},
            {"k": 500, "explain": True},
            {"exclude_seen": True, "merge": "quota"},
            {"interests": {"select": "random", "n": 3, "m": 9, "exclude": [category], "include": [1]}},
        ]
        for user, demand in itertools.product((busy, 3, 999_999, None), demands):
            wanted, found = (retrieved(one, user, **demand) for one in (server, router))
            assert not found["partial"]
            assert [c["unsearched"] for c in found["contexts"]] == [0] * len(found["contexts"])
            for answer in (wanted, found):
                del answer["timings"]
            assert [c["item_id"] for c in found["candidates"]] == [c["item_id"] for c in wanted["candidates"]]
            scores = [[c["score"] for c in answer.pop("candidates")] for answer in (found, wanted)]
            np.testing.assert_allclose(*scores, atol=1e-4)
            assert found == wanted
        batch = {"user_ids": [1, 2, busy], "seed": 1, "now": 1.9e9, "k": 50}
        many, one = (s.post("/v1/retrieve/batch", batch).json()["answers"] for s in (router, server))
        for a, b in zip(many, one, strict=True):
            assert [c["item_id"] for c in a["candidates"]] == [c["item_id"] for c in b["candidates"]]
        similar = [s.get("/v1/items/5/similar").json() for s in (router, server)]
        assert similar[0] == similar[1]
        metrics = router.get("/metrics").text
        assert f'longretriever_shard_up{{shard="{running[0].url}"}} 1.0' in metrics
        assert 'result="answered"' in metrics


def test_a_shard_that_is_killed_is_missing_and_said_until_it_is_back(model, busy, tmp_path):
    plain = {"interests": {"select": "top", "n": 20}, "k": 200}
    with (
        shards(model, nth(1, 2)) as (first,),
        in_a_process(model, tmp_path, "--shard", "2/2") as (url, process),
        serving(model, tmp_path, "--shards", f"{first.url},{url}", "--shard-seconds", "5") as router,
    ):
        whole = retrieved(router, busy, **plain)
        assert not whole["partial"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        part = retrieved(router, busy, **plain)
        assert part["partial"]
        assert part["fallback"] is None
        missing = {c["category_id"] for c in part["contexts"] if c["unsearched"] == 1}
        (everything,) = [c for c in part["contexts"] if c["category_id"] is None]
        assert 0 < everything["unsearched"] < 1
        assert missing
        assert not {c["category_id"] for c in part["candidates"]} & missing
        by_context = {
            c["category_id"]: [
                x["item_id"] for x in part["candidates"] if x["category_id"] == c["category_id"]
            ]
            for c in part["contexts"]
            if not c["unsearched"]
        }
        assert any(by_context.values())
        wait_until(lambda: "longretriever_partial_total 0.0" not in router.get("/metrics").text)
        assert f'longretriever_shard_up{{shard="{url}"}} 0.0' in router.get("/metrics").text
        assert '"shard down"' in router.log.read_text()
        assert '"partial"' in router.log.read_text()
        with in_a_process(model, tmp_path, "--shard", "2/2", port=int(url.rsplit(":", 1)[1])):
            wait_until(lambda: not retrieved(router, busy, **plain)["partial"])
            again = retrieved(router, busy, **plain)
            assert [c["item_id"] for c in again["candidates"]] == [c["item_id"] for c in whole["candidates"]]


def test_without_any_shard_what_is_popular_is_answered_and_it_is_not_ready(model, busy, tmp_path):
    with shards(model, nth(1, 1)) as (only,), serving(model, tmp_path, "--shards", only.url) as router:
        assert router.get("/readyz").status_code == 200
        only.stop()
        answer = retrieved(router, busy)
        assert (answer["partial"], answer["fallback"]) == (True, "popular")
        assert answer["candidates"]
        similar = router.get("/v1/items/5/similar")
        assert similar.status_code == 503
        assert "no shard answers for context" in similar.json()["detail"]
        assert router.get("/readyz").status_code == 503
        only.start()
        wait_until(lambda: router.get("/readyz").status_code == 200)
        assert not retrieved(router, busy)["partial"]


def test_a_newer_model_is_taken_over_shard_by_shard_under_load(model, tmp_path):
    """No request fails or is partial; the router waits until the shards have what it would answer with."""
    newer = made(tmp_path / "newer", events=4_000, seed=1)
    live = copied(model, tmp_path)
    with shards(live, nth(1, 2), nth(2, 2)) as running:
        options = ("--store", str(tmp_path / "store"), "--watch", "0.2", "--shard-seconds", "5")
        urls = ",".join(one.url for one in running)
        with serving(live, tmp_path, "--shards", urls, *options) as router:
            before = router.get("/v1/model").json()["model"]
            stop, found = threading.Event(), []

            def ask() -> None:
                with httpx.Client(base_url=router.url, timeout=30) as client:
                    for user in itertools.cycle(range(50)):
                        if stop.is_set():
                            return
                        answer = client.post("/v1/retrieve", json={"user_id": user, "k": 50})
                        said = answer.json()
                        found.append((answer.status_code, said["partial"], said["model"]))

            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            shutil.rmtree(live)
            shutil.copytree(newer, live)
            refused = router.post("/v1/admin/reload", {})
            assert refused.status_code == 409
            assert "goes on: shards have 0% of the categories of model" in refused.json()["detail"]
            running[0].reload()
            wait_until(
                lambda: router.log.read_text().count("it will be tried again") >= 2,
                15,
                lambda: router.log.read_text()[-3000:],
            )
            assert router.get("/v1/model").json()["model"] == before
            running[1].reload()
            wait_until(lambda: router.get("/v1/model").json()["model"] != before)
            n = len(found)
            wait_until(lambda: len(found) > n + 20)
            stop.set()
            for thread in threads:
                thread.join()
    assert {one[:2] for one in found} == {(200, False)}
    assert len({one[2] for one in found}) == 2


def test_settings_that_make_no_sense(model):
    with pytest.raises(InputError, match="an index and shards were given"):
        Settings("model", index="i", shards=("http://a:1",))
    with pytest.raises(InputError, match="shard_seconds=0"):
        Settings("model", shard_seconds=0)
    assert "no address of a shard" in refused_to_start(model, ["--shards", "10.0.0.1:8100"])
    for options, said in (
        ([], "give one of the two"),
        (["--shard", "1"], "expected I/N, as 1/3"),
        (["--categories", "5"], "expected FIRST:END"),
        (["--categories", "0:4,a:5"], "not a whole number"),
        (["--shard", "1/2", "--host", "0.0.0.0"], "no API keys are set"),
        (["--shard", "1/2", "--port", "-1"], None),
    ):
        done = CliRunner().invoke(app, ["serve-shard", str(model), *options])
        assert done.exit_code != 0
        assert said is None or said in str(done.exception)


def test_a_shard_has_neither_tower_nor_store(model, tmp_path):
    """The index folders alone will do."""
    for one in ("index", "whole/index"):
        shutil.copytree(model / one, tmp_path / "bare" / one)
    with in_a_process(tmp_path / "bare", tmp_path, "--shard", "1/2") as (_, process):
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "faiss" in maps
        assert "onnxruntime" not in maps
