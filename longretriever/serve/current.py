"""Which generation answers now? A newer one, once it has proved that it can; else the old one stays."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from longretriever.errors import LongRetrieverError, NotLoaded, RequestFailed
from longretriever.serve import metrics

log = logging.getLogger("longretriever.serve")


class Generation(Protocol):
    """What is served at a time: it has a name, and says what it was opened from."""

    name: str
    signature: tuple[Any, ...]


G = TypeVar("G", bound=Generation)


class Current(Generic[G]):
    """Holds what is served. `serving` is read without a lock: whoever has it keeps it for its request."""

    def __init__(self, opened: Callable[[G | None], G], signature: Callable[[G], tuple[Any, ...]]) -> None:
        """`opened` opens what lies on the disk in the place of what is given; `signature` is the disk's now.

        Raises a `SavedError` where there is nothing to serve yet.
        """
        self._opened, self._found = opened, signature
        self.serving = opened(None)
        self._refused: tuple[Any, ...] | None = None
        self._said: str | None = None  # why it was refused, so that the same is not said every second
        self._turn = asyncio.Lock()

    async def reload(self) -> bool:
        """Take over what lies on the disk now, if it is not what is served; was it?

        Raises a `LongRetrieverError` when it cannot be served; the old one then goes on. Opening and trying
        happen on a thread of their own, beside requests.
        """
        async with self._turn:
            found = self._found(self.serving)
            if found == self.serving.signature:
                return False
            try:
                self.serving = await asyncio.to_thread(self._opened, self.serving)
            except (LongRetrieverError, OSError) as error:
                # What depends on others may be served soon although nothing changes here.
                self._refused = None if isinstance(error, NotLoaded | RequestFailed) else found
                metrics.reloads.labels("refused").inc()
                if str(error) != self._said:
                    facts = {"why": str(error), "serving": self.serving.name}
                    log.error("reload refused", extra={"facts": facts})
                self._said = str(error)
                raise
            self._said = None
            metrics.reloads.labels("done").inc()
            log.info("reloaded", extra={"facts": {"model": self.serving.name}})
            return True

    async def watch(self, seconds: float) -> None:
        """Reload whenever something was replaced; what was refused is tried again once it changes."""
        while True:
            await asyncio.sleep(seconds)
            found = self._found(self.serving)
            if found not in (self.serving.signature, self._refused):
                try:
                    await self.reload()
                except (LongRetrieverError, OSError):
                    continue  # has been logged
