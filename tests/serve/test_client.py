"""The Python client: what it sends, when it tries again, what it says when it cannot."""

from __future__ import annotations

import httpx
import pytest

from longretriever import Client
from longretriever.errors import RequestFailed


def test_the_whole_way(server):
    with Client(server.url) as client:
        answer = client.retrieve(3, k=5, interests={"select": "top", "n": 2}, explain=True)
        assert len(answer["candidates"]) == 5
        assert [a["user_id"] for a in client.retrieve_batch([1, 2], k=3)] == [1, 2]
        stranger = 600_001
        assert client.events([{"user_id": stranger, "item_id": 1}]) == {"accepted": 1, "duplicates": 0}
        assert client.user(stranger, recent=1)["behaviors"] == 1
        assert client.forget(stranger) == {"user_id": stranger, "deleted": 1}
        assert client.similar(1, k=2)["item"]["item_id"] == 1
        assert client.reload() == {"model": client.model()["model"], "changed": False}
        with pytest.raises(RequestFailed, match="404, user 600001 is not known") as failed:
            client.user(stranger)
        assert failed.value.status == 404


class Flaky:
    """A server that fails some times first, each time in the way that is next on the list."""

    def __init__(self, *ways) -> None:
        self.ways, self.requests = list(ways), []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.ways:
            way = self.ways.pop(0)
            if isinstance(way, Exception):
                raise way
            return way
        return httpx.Response(200, json={"accepted": 1, "duplicates": 0})


def test_it_tries_again_with_the_same_event_ids_and_waits_as_told():
    busy = httpx.Response(503, json={"detail": "too many"}, headers={"Retry-After": "7"})
    server, slept = Flaky(httpx.ConnectError("refused"), busy), []
    client = Client("http://there", transport=httpx.MockTransport(server), sleep=slept.append)
    assert client.events([{"user_id": 1, "item_id": 2}])["accepted"] == 1
    assert len({request.content for request in server.requests}) == 1
    assert b'"event_id"' in server.requests[0].content
    assert len(slept) == 2
    assert 3.5 <= slept[1] <= 7


def test_it_gives_up_in_the_end_and_says_why():
    server = Flaky(*[httpx.ReadTimeout("slow")] * 9)
    client = Client("http://there", retries=2, transport=httpx.MockTransport(server), sleep=lambda s: None)
    with pytest.raises(RequestFailed, match="POST http://there/v1/retrieve: slow") as failed:
        client.retrieve(1)
    assert failed.value.status is None
    assert len(server.requests) == 3


def test_what_is_wrong_is_not_tried_again():
    server = Flaky(httpx.Response(422, json={"detail": "k: too many"}))
    client = Client("http://there", "secret", transport=httpx.MockTransport(server))
    with pytest.raises(RequestFailed, match="422, k: too many"):
        client.retrieve(1)
    assert len(server.requests) == 1
    assert server.requests[0].headers["authorization"] == "Bearer secret"


def test_ids_are_quoted_in_paths():
    server = Flaky()
    Client("http://there", transport=httpx.MockTransport(server)).forget("a/b?c")
    assert server.requests[0].url.raw_path == b"/v1/users/a%2Fb%3Fc"
