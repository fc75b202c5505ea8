"""Which generation answers now? A newer one, once it has proved that it can; else the old one stays."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from longretriever.errors import LongRetrieverError
from longretriever.serve import metrics
from longretriever.serve.serving import Serving, Source
from longretriever.store.live import LiveJournal

log = logging.getLogger("longretriever.serve")


class Current:
    """Holds what is served. `serving` is read without a lock: whoever has it keeps it for its request."""

    def __init__(self, source: Source, journal: LiveJournal) -> None:
        """Raises a `SavedError` where there is nothing to serve yet."""
        self._source, self._journal = source, journal
        self.serving = Serving(source, journal)
        self._refused: tuple[Any, ...] | None = None
        self._turn = asyncio.Lock()

    async def reload(self) -> bool:
        """Take over what lies on the disk now, if it is not what is served; was it?

        Raises a `LongRetrieverError` when it cannot be served; the old one then goes on. Opening and trying
        happen on a thread of their own, beside requests.
        """
        async with self._turn:
            found = self._source.signature(self.serving.store.path)
            if found == self.serving.signature:
                return False
            try:
                self.serving = await asyncio.to_thread(Serving, self._source, self._journal)
            except (LongRetrieverError, OSError) as error:
                self._refused = found
                metrics.reloads.labels("refused").inc()
                log.error(
                    "reload refused", extra={"facts": {"why": str(error), "serving": self.serving.name}}
                )
                raise
            metrics.reloads.labels("done").inc()
            log.info("reloaded", extra={"facts": {"model": self.serving.name}})
            return True

    async def watch(self, seconds: float) -> None:
        """Reload whenever something was replaced; what was refused is tried again once it changes."""
        while True:
            await asyncio.sleep(seconds)
            found = self._source.signature(self.serving.store.path)
            if found not in (self.serving.signature, self._refused):
                try:
                    await self.reload()
                except (LongRetrieverError, OSError):
                    continue  # has been logged
