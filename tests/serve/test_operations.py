"""What an operator relies on: keys, limits, newer models under load, several workers, sudden death."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from longretriever.errors import InputError
from longretriever.retrieve.added import add_items, remove_items
from longretriever.serve.door import Busy, OutOfTime, Workroom
from longretriever.serve.settings import Settings
from longretriever.store.compact import compact
from longretriever.store.live import Journal
from tests.serve.running import Server, copied, made, refused_to_start, serving, start, wait_until

READ, WRITE = "r" * 24, "w" * 24


@pytest.fixture(scope="module")
def newer(tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp("newer"), seed=1)


def test_keys_for_reading_and_for_writing(model, tmp_path):
    keys = {"LONGRETRIEVER_SERVE_READ_KEY": READ, "LONGRETRIEVER_SERVE_WRITE_KEY": WRITE}
    event = {"user_id": 1, "item_id": 1}
    with serving(model, tmp_path, environment=keys) as server:
        for key, read, write in ((None, 401, 401), ("x" * 24, 401, 401), (READ, 200, 403), (WRITE, 200, 200)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            assert server.get("/v1/model", headers=headers).status_code == read
            assert server.get("/metrics", headers=headers).status_code == read
            assert server.post("/v1/retrieve", {"user_id": 1}, headers=headers).status_code == read
            assert server.post("/v1/events", event, headers=headers).status_code == write
            assert server.post("/v1/admin/reload", {}, headers=headers).status_code == write
            gone = httpx.delete(f"{server.url}/v1/users/999", headers=headers)
            assert gone.status_code == write
        assert server.get("/v1/model").headers["www-authenticate"] == "Bearer"
        assert server.get("/healthz").status_code == server.get("/").status_code == 200
        assert READ not in server.log.read_text()


def test_it_does_not_listen_to_the_world_without_keys():
    with pytest.raises(InputError, match="can be reached from elsewhere, and no API keys are set"):
        Settings("model", host="0.0.0.0")
    with pytest.raises(InputError, match="shorter than 16 characters"):
        Settings("model", read_keys=("short",))
    assert Settings("model", host="0.0.0.0", write_keys=(WRITE,)).needs_keys


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"queue": -1}, {"seconds": 0}, {"k": 0}, {"port": -1}])
def test_settings_out_of_range(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}=.*expected at least"):
        Settings("model", **wrong)


def test_options_from_a_file_and_what_is_wrong_with_one(model, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('k = 30\nthreads = 1\nread_key = ["' + READ + '"]\n')
    with serving(model, tmp_path, "--config", str(file)) as server:
        headers = {"Authorization": f"Bearer {READ}"}
        assert server.get("/v1/model").status_code == 401
        assert server.get("/v1/model", headers=headers).json()["limits"]["k"] == 30
    file.write_text("prot = 3\n")
    assert "prot is no option of serve" in refused_to_start(model, ["--config", str(file)])
    file.write_text("port = \n")
    assert "not TOML" in refused_to_start(model, ["--config", str(file)])


def test_what_cannot_be_served_is_said_before_it_starts(tmp_path, model):
    assert "no such folder" in refused_to_start(tmp_path / "nothing", [])
    broken = copied(model, tmp_path)
    shutil.rmtree(broken / "index")
    assert "index" in refused_to_start(broken, ["--store", str(tmp_path / "store")])
    (tmp_path / "foreign").write_text("this is no journal" * 100)
    said = refused_to_start(model, ["--live", str(tmp_path / "foreign")])
    assert "not readable as live events" in said


def test_the_queue_is_bounded_and_time_is_limited():
    async def long() -> None:
        room = Workroom(threads=1, queue=1, seconds=0.2)
        release = threading.Event()
        held = [asyncio.create_task(room.long(release.wait)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy):
            await room.long(int)
        for task in held:
            with pytest.raises(OutOfTime):
                await task
        with pytest.raises(Busy):  # the thread is still taken
            await asyncio.gather(room.long(int), room.long(int))
        release.set()
        await asyncio.sleep(0.05)
        assert await room.long(int) == 0
        room.close()

    async def short() -> None:
        room = Workroom(threads=1, queue=1, seconds=0.05)
        asked = [asyncio.create_task(room.short(time.sleep, 0.1)) for _ in range(4)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(one) for one in found] == [type(None), OutOfTime, Busy, Busy]
        with pytest.raises(ZeroDivisionError):
            await room.short(lambda: 1 / 0)
        assert await room.short(int) == 0
        room.close()

    asyncio.run(long())
    asyncio.run(short())


def test_a_full_queue_answers_503_and_says_when_to_come_again(model, tmp_path):
    with serving(model, tmp_path, "--threads", "1", "--queue", "0") as server:
        body = {"user_ids": list(range(80)), "k": 500, "explain": True}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.post("/v1/retrieve/batch", body), range(16)))
        busy = [a for a in answers if a.status_code == 503]
        assert busy
        assert {a.headers["retry-after"] for a in busy} == {"1"}
        assert {a.status_code for a in answers} == {200, 503}
    with serving(model, tmp_path, "--seconds", "0.01") as server:
        assert server.post("/v1/retrieve/batch", body).status_code == 504


def test_a_newer_model_takes_over_under_load_and_a_broken_one_does_not(model, newer, tmp_path):
    live = copied(model, tmp_path)
    with serving(live, tmp_path, "--store", str(tmp_path / "store"), "--watch", "0") as server:
        before = server.get("/v1/model").json()["model"]
        stop, statuses, names = threading.Event(), [], set()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                for user in itertools.cycle(range(50)):
                    if stop.is_set():
                        return
                    answer = client.post("/v1/retrieve", json={"user_id": user, "k": 50})
                    statuses.append(answer.status_code)
                    names.add(answer.json()["model"])

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        (live / "item_token.npy").rename(tmp_path / "moved")  # damage
        os.utime(live / "manifest.json")
        refused = server.post("/v1/admin/reload", {})
        assert refused.status_code == 409
        assert "item_token.npy: missing" in refused.json()["detail"]
        assert server.get("/v1/model").json()["model"] == before
        shutil.rmtree(live)
        shutil.copytree(newer, live)
        taken = server.post("/v1/admin/reload", {}).json()
        assert taken["changed"]
        assert taken["model"] != before
        assert not server.post("/v1/admin/reload", {}).json()["changed"]
        time.sleep(0.3)
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert names == {before, taken["model"]}


def test_a_link_that_is_turned_is_followed(model, newer, tmp_path):
    copied(model, tmp_path)
    link = tmp_path / "CURRENT"
    link.symlink_to(tmp_path / "model")
    options = ("--store", str(tmp_path / "store"), "--watch", "0.1", "--workers", "2")
    with serving(link, tmp_path, *options) as server:
        before = server.get("/readyz").json()["model"]
        turned = tmp_path / "turned"
        turned.symlink_to(newer)
        turned.replace(link)
        wait_until(lambda: server.get("/readyz").json()["model"] != before)
        wait_until(lambda: server.log.read_text().count('"reloaded"') == 2)


def test_items_added_beside_a_running_server_are_found_met_and_folded_in(model, tmp_path):
    live = copied(model, tmp_path)
    options = ("--store", str(tmp_path / "store"), "--watch", "0.1")
    with serving(live, tmp_path, *options) as server:
        event = {"user_id": 8, "item_id": 900_001, "timestamp": 1.7e9}
        assert server.post("/v1/events", event).status_code == 422
        add_items(live, pa.table({"item_id": [900_001], "category_id": [2]}))
        wait_until(lambda: server.post("/v1/events", event).status_code == 200)
        asked = {"user_id": 8, "k": 1000, "interests": {"select": "top", "n": 1, "include": [2]}}

        def found(**more: object) -> dict[int, int]:
            answer = server.post("/v1/retrieve", {**asked, **more}).json()
            return {c["item_id"]: c["category_id"] for c in answer["candidates"]}

        assert found()[900_001] == 2
        assert found(exclude_seen=True).keys() == found().keys() - met(server, 8)
        assert 900_001 in met(server, 8)
        compact(tmp_path / "store", tmp_path / "live.sqlite")
        wait_until(lambda: server.get("/v1/model").json()["live_events"] == 0)
        assert 900_001 in met(server, 8)
        assert 900_001 not in found(exclude_seen=True)


def test_what_was_taken_out_is_not_shown_among_the_items(model, tmp_path):
    live = copied(model, tmp_path)
    with serving(live, tmp_path, "--store", str(tmp_path / "store"), "--watch", "0.1") as server:

        def shown(query: str) -> list[int]:
            return [one["item_id"] for one in server.get(f"/v1/catalogue/items?{query}").json()["items"]]

        first, second, third = shown("limit=3")
        remove_items(live, pa.table({"item_id": [first]}))
        wait_until(lambda: shown("limit=2") == [second, third])
        assert first not in shown(f"like={first}&limit=1000")
        assert first not in shown(f"like={first}&limit=1000&category_id={category_of(server, second)}")


def category_of(server: Server, item_id: int) -> int:
    return server.get(f"/v1/items/{item_id}/similar?k=1").json()["item"]["category_id"]


def met(server: Server, user_id: int) -> set[int]:
    """All items of a life that is not long."""
    life = server.get(f"/v1/users/{user_id}?recent=1000").json()
    assert len(life["recent"]) == life["behaviors"]
    return {behavior["item_id"] for behavior in life["recent"]}


def test_compaction_beside_a_running_server_changes_no_life(model, tmp_path):
    live = copied(model, tmp_path)
    options = ("--store", str(tmp_path / "store"), "--watch", "0.1")
    with serving(live, tmp_path, *options) as server:
        stranger = {"user_id": 800_000, "item_id": 66_000_000, "category_id": 1, "timestamp": 1.7e9}
        server.post("/v1/events", {"events": [stranger, {**stranger, "user_id": 8, "item_id": 1}]})
        httpx.delete(f"{server.url}/v1/users/9")
        asked = {"user_id": 8, "k": 50, "seed": 1, "now": 1.8e9}

        def seen() -> list[object]:
            lives = [server.get(f"/v1/users/{user}?now=1.8e9").json() for user in (8, 9, 800_000)]
            return [server.post("/v1/retrieve", asked).json()["candidates"], lives]

        before = seen()
        compact(tmp_path / "store", tmp_path / "live.sqlite")
        wait_until(lambda: server.get("/v1/model").json()["live_events"] == 0)
        (candidates, lives), (candidates_before, lives_before) = seen(), before
        assert [life.pop("live") for life in lives if "live" in life] == [0, 0]
        assert [life.pop("live") for life in lives_before if "live" in life] == [1, 1]
        assert lives == lives_before
        assert [c["item_id"] for c in candidates] == [c["item_id"] for c in candidates_before]
        assert server.get("/v1/users/9").status_code == 404


def test_workers_share_what_happens(model, tmp_path):
    with serving(model, tmp_path, "--workers", "2") as server:
        workers = set()
        for n in range(40):  # a connection each, so that both workers get some
            event = {"user_id": 700_000, "item_id": 1 + n % 5, "timestamp": 1.6e9 + n}
            assert server.post("/v1/events", event).json()["accepted"] == 1
            assert server.get("/v1/users/700000").json()["behaviors"] == n + 1
        for line in server.log.read_text().splitlines():
            workers.add(json.loads(line)["worker"])
        assert len(workers) >= 2
        counted = [
            line
            for line in server.get("/metrics").text.splitlines()
            if line.startswith('longretriever_requests_total{route="/v1/events"')
        ]
        assert counted == ['longretriever_requests_total{route="/v1/events",status="200"} 40.0']


def test_every_acknowledged_event_survives_kill_9_once(model, tmp_path):
    server = start(model, tmp_path)
    acknowledged: list[str] = []

    def storm(client_number: int) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            for n in itertools.count():
                name = f"{client_number}-{n}"
                event = {"user_id": client_number, "item_id": 1, "timestamp": 1.6e9 + n, "event_id": name}
                try:
                    answer = client.post("/v1/events", json=event)
                except httpx.TransportError:
                    return
                assert answer.json() == {"accepted": 1, "duplicates": 0}
                acknowledged.append(name)

    threads = [threading.Thread(target=storm, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(acknowledged) > 200)
    server.stop(signal.SIGKILL)
    for thread in threads:
        thread.join()
    with serving(model, tmp_path) as again:
        last = acknowledged[-1]
        event = {"user_id": int(last.split("-")[0]), "item_id": 1, "event_id": last}
        assert again.post("/v1/events", event).json() == {"accepted": 0, "duplicates": 1}
    journal = Journal(tmp_path / "live.sqlite")
    found = [event.event_id for event in journal.between(0, journal.last())]
    journal.close()
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert len(found) <= len(acknowledged) + 4  # written, but killed before it was said


def test_sigterm_finishes_requests(model, tmp_path):
    with serving(model, tmp_path, "--threads", "1", "--seconds", "60") as server:
        body = {"user_ids": list(range(80)), "k": 500, "explain": True}
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(server.post, "/v1/retrieve/batch", body) for _ in range(3)]
            wait_until(lambda: any(a.done() for a in asked))
            code = server.stop(signal.SIGTERM)
            assert [a.result().status_code for a in asked] == [200] * 3
        assert code in (0, -signal.SIGTERM)  # uvicorn ends itself as it was told to
        assert "stopped" in server.log.read_text()


def test_other_origins_only_where_allowed(model, tmp_path, server):
    ask = {"Origin": "https://shop.example"}
    assert "access-control-allow-origin" not in server.get("/v1/model", headers=ask).headers
    with serving(model, tmp_path, "--cors", "https://shop.example") as open_server:
        headers = open_server.get("/v1/model", headers=ask).headers
        assert headers["access-control-allow-origin"] == "https://shop.example"
        other = open_server.get("/v1/model", headers={"Origin": "https://else.example"}).headers
        assert "access-control-allow-origin" not in other


def test_no_torch_in_the_server(server):
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert "libtorch" not in maps
