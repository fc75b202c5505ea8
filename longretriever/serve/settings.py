"""What an operator decides about a server, checked before it starts."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from longretriever.errors import InputError
from longretriever.shards.held import Share

if TYPE_CHECKING:
    from longretriever.retrieve.retriever import Elsewhere
    from longretriever.serve.serving import Source
    from longretriever.shards.fleet import Fleet

Clock = Literal["wall", "log"]

AT_ONCE = 8
"""Requests that a worker works on at a time where others search: it waits for them most of the time."""

S = TypeVar("S", bound="Listening")

VARIABLE = "LONGRETRIEVER_SERVING"
"""Carries the settings from the process that starts workers to each of them."""


@dataclass(frozen=True, kw_only=True)
class Listening:
    """What all our services have. Sizes in bytes, times in seconds, limits for each worker."""

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 2  # of a worker, for batches and what people look at; other requests take turns
    read_keys: tuple[str, ...] = ()
    write_keys: tuple[str, ...] = ()  # may read too
    queue: int = 64  # requests of a worker that wait, beyond which the answer is 503
    seconds: float = 5.0  # of a request, beyond which the answer is 504
    body: int = 1_000_000
    watch: float = 1.0  # between looks for a newer model, index or store; 0: only when asked
    log: Literal["json", "text"] = "json"

    def __post_init__(self) -> None:
        for name, least in (("port", 0), ("queue", 0), ("watch", 0), ("workers", 1), ("threads", 1)):
            _check(name, getattr(self, name), least)
        _check("body", self.body, 1)
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

    def to_environment(self) -> None:
        os.environ[VARIABLE] = msgspec.json.encode(asdict(self)).decode()

    @classmethod
    def from_environment(cls: type[S]) -> S:
        if VARIABLE not in os.environ:
            raise InputError(f"{VARIABLE} is not set. Start the server with `longretriever serve`.")
        return msgspec.json.decode(os.environ[VARIABLE], type=cls)


@dataclass(frozen=True)
class Settings(Listening):
    """Options of `longretriever serve`."""

    model: str
    store: str | None = None  # None: the one that the model was trained on
    index: str | None = None  # a folder or postgresql://...; None: MODEL/index
    live: str | None = None  # the journal, a file or redis://...; None: live.sqlite beside the model
    clock: Clock = "wall"
    k: int = 2_000
    batch: int = 256
    events: int = 10_000  # of one call
    cors: tuple[str, ...] = ()  # origins of other pages that may ask
    shards: tuple[str, ...] = ()  # addresses; then the index is searched there
    shard_key: str | None = None
    shard_seconds: float = 0.5  # for the answer of a shard
    hedge: float = 0.05  # seconds after which another shard of the same categories is asked as well; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("k", "batch", "events"):
            _check(name, getattr(self, name), 1)
        _check("shard_seconds", self.shard_seconds, 0.001)
        _check("hedge", self.hedge, 0)
        if self.shards and self.index:
            raise InputError("an index and shards were given: searches go to one of the two.")

    @property
    def journal(self) -> str:
        return self.live or str(Path(self.model).parent / "live.sqlite")

    @property
    def is_remote(self) -> bool:
        """Whether searches wait for others."""
        from longretriever.pgvector import is_database

        return bool(self.shards) or is_database(self.index)

    @property
    def at_once(self) -> int:
        """Threads for requests and all else."""
        return max(AT_ONCE, self.threads) if self.is_remote else self.threads

    def fleet(self) -> Fleet | None:
        from longretriever.serve import metrics
        from longretriever.shards.fleet import Fleet

        if not self.shards:
            return None
        hedge = self.hedge or None
        return Fleet(self.shards, self.shard_key, seconds=self.shard_seconds, hedge=hedge, told=metrics.told)

    def source(self, fleet: Fleet | None) -> Source:
        from longretriever.pgvector import Database, is_database
        from longretriever.serve.serving import Source

        index: Path | Elsewhere | None = fleet or (Path(self.index) if self.index else None)
        if self.index and is_database(self.index):
            index = Database(self.index, self.seconds)
        return Source(Path(self.model), Path(self.store) if self.store else None, index, self.clock)

    @property
    def limits(self) -> dict[str, float]:
        names = ("k", "batch", "events", "body", "seconds", "queue")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ShardSettings(Listening):
    """Options of `longretriever serve-shard`."""

    model: str
    share: Share
    port: int = field(default=8100, kw_only=True)
    body: int = field(default=16_000_000, kw_only=True)  # a batch of users, each with many contexts


def _check(name: str, value: Any, least: float) -> None:
    if not value >= least:
        raise InputError(f"{name}={value}, expected at least {least}.")
