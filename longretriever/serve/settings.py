"""What an operator decides about a server, checked before it starts."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from longretriever.errors import InputError
from longretriever.serve.serving import Clock, Source

VARIABLE = "LONGRETRIEVER_SERVING"
"""Carries the settings from the process that starts workers to each of them."""


@dataclass(frozen=True)
class Settings:
    """Options of `longretriever serve`. Sizes in bytes, times in seconds, limits for each worker."""

    model: str
    store: str | None = None  # None: the one that the model was trained on
    index: str | None = None  # None: MODEL/index
    live: str | None = None  # the journal, a file or redis://...; None: live.sqlite beside the model
    clock: Clock = "wall"
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 2  # of a worker, for batches and what people look at; other requests take turns
    read_keys: tuple[str, ...] = ()
    write_keys: tuple[str, ...] = ()  # may read too
    queue: int = 64  # requests of a worker that wait, beyond which the answer is 503
    seconds: float = 5.0  # of a request, beyond which the answer is 504
    body: int = 1_000_000
    k: int = 2_000
    batch: int = 256
    events: int = 10_000  # of one call
    cors: tuple[str, ...] = ()  # origins of other pages that may ask
    watch: float = 1.0  # between looks for a newer model, index or store; 0: only when asked
    log: Literal["json", "text"] = "json"

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("queue", 0), ("watch", 0), ("workers", 1), ("threads", 1)):
            _check(name, getattr(self, name), least)
        for name in ("body", "k", "batch", "events"):
            _check(name, getattr(self, name), 1)
        _check("seconds", self.seconds, 0.01)
        if not all(len(key) >= 16 for key in self.read_keys + self.write_keys):
            raise InputError(
                "an API key is shorter than 16 characters. Make one with `openssl rand -hex 24`."
            )
        if not self.needs_keys and not self.is_loopback:
            raise InputError(
                f"host {self.host} can be reached from elsewhere, and no API keys are set: anyone could read "
                "and forget users. Set --read-key and --write-key, or listen on 127.0.0.1."
            )

    @property
    def needs_keys(self) -> bool:
        return bool(self.read_keys or self.write_keys)

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def journal(self) -> str:
        return self.live or str(Path(self.model).parent / "live.sqlite")

    @property
    def source(self) -> Source:
        store, index = (Path(p) if p else None for p in (self.store, self.index))
        return Source(Path(self.model), store, index, self.clock)

    @property
    def limits(self) -> dict[str, float]:
        names = ("k", "batch", "events", "body", "seconds", "queue")
        return {name: getattr(self, name) for name in names}

    def to_environment(self) -> None:
        os.environ[VARIABLE] = msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def from_environment(cls) -> Settings:
        if VARIABLE not in os.environ:
            raise InputError(f"{VARIABLE} is not set. Start the server with `longretriever serve`.")
        return msgspec.json.decode(os.environ[VARIABLE], type=cls)


def _check(name: str, value: Any, least: float) -> None:
    if not value >= least:
        raise InputError(f"{name}={value}, expected at least {least}.")
