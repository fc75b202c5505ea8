"""Ask a server from Python: the requests of `longretriever serve` as methods, with time limits and retries.

    client = Client("http://127.0.0.1:8000")
    client.events([{"user_id": 7, "item_id": 42, "behavior": "click"}])
    client.retrieve(7, k=100)["candidates"]

Answers are the plain values of the wire. Every call may be repeated without harm (events get an id before
they are sent), so a connection that breaks and a server that is busy are tried again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import httpx

from longretriever.errors import RequestFailed

_AGAIN = (502, 503, 504)  # statuses that another try may mend


class Client:
    """One server. Safe to share between threads; keeps connections open, so close it, or use it with `with`.

    `timeout` is in seconds for each try; `retries` are tries after the first, after waits that double from
    0.1 seconds (or as long as the server says).
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)
        self._retries, self._sleep = retries, sleep

    def retrieve(self, user_id: int | str | None = None, **asked: Any) -> dict[str, Any]:
        """Candidates for a user; `asked` are the other fields of the request, such as `k=100`."""
        return self._ask("POST", "/v1/retrieve", {"user_id": user_id, **asked})

    def retrieve_batch(self, user_ids: Sequence[int | str], **asked: Any) -> list[dict[str, Any]]:
        """The answers for several users, in their order."""
        body = {"user_ids": list(user_ids), **asked}
        return self._ask("POST", "/v1/retrieve/batch", body)["answers"]

    def events(self, events: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Tell of behaviors; returns once they are on the server's disk: how many are new, and were known."""
        named = [{"event_id": uuid4().hex, **event} for event in events]
        return self._ask("POST", "/v1/events", {"events": named})

    def user(self, user_id: int | str, **asked: Any) -> dict[str, Any]:
        """A user's life: engagement by category over time, newest behaviors."""
        return self._ask("GET", f"/v1/users/{_path(user_id)}", asked=asked)

    def forget(self, user_id: int | str) -> dict[str, Any]:
        """Forget a person."""
        return self._ask("DELETE", f"/v1/users/{_path(user_id)}")

    def similar(self, item_id: int | str, k: int = 20) -> dict[str, Any]:
        """The items of the same category that are most like this one."""
        return self._ask("GET", f"/v1/items/{_path(item_id)}/similar", asked={"k": k})

    def model(self) -> dict[str, Any]:
        """What is served."""
        return self._ask("GET", "/v1/model")

    def reload(self) -> dict[str, Any]:
        """Take over a newer model, index or store."""
        return self._ask("POST", "/v1/admin/reload")

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, method: str, path: str, body: Any = None, asked: Mapping[str, Any] | None = None) -> Any:
        """The answer. Raises `RequestFailed` when no try brought one."""
        wait, failure = 0.1, RequestFailed("not tried")
        for again in range(self._retries + 1):
            if again:
                self._sleep(wait * random.uniform(0.5, 1))
            try:
                answer = self._http.request(method, path, json=body, params=asked)
            except httpx.TransportError as error:
                failure = RequestFailed(
                    f"{method} {self._http.base_url}{path}: {error or type(error).__name__}"
                )
                wait *= 2
                continue
            if answer.is_success:
                return answer.json()
            failure = RequestFailed(
                f"{method} {path}: {answer.status_code}, {_why(answer)}", answer.status_code
            )
            if answer.status_code not in _AGAIN:
                break
            wait = max(2 * wait, _told_to_wait(answer))
        raise failure


def _path(key: int | str) -> str:
    return quote(str(key), safe="")


def _why(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _told_to_wait(answer: httpx.Response) -> float:
    try:
        return min(30.0, float(answer.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0
