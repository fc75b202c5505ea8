"""Every exception of the package, so that a caller can catch one branch of it.

LongRetrieverError
├── InputError            what was given cannot be used
│   ├── EventsError       a log, items or users file is unreadable, or has too many bad rows
│   ├── UnknownUser       no such user in the store
│   ├── UnknownItem       no such item in the store
│   └── UnknownCategory   no such category in the store
├── SavedError            a saved store, model or index cannot be opened
│   ├── NotSaved          there is nothing of the package's own at that path
│   ├── Damaged           a file is missing, cut off or altered
│   ├── Mismatch          it was made from something other than what it is used with
│   └── NotLoaded         shards or a database do not have this model, or not yet
├── EngineFailed          what computes an ingest stopped: a worker died, a disk is full
├── Unavailable           live events cannot be read or written now; that may pass
├── ProcessLost           another process of a training ended
├── RequestFailed         a server refused a request, or could not be reached
└── MissingExtra          an optional part is not installed

Every message says what was found, what was wanted, and what to do about it.
"""

from __future__ import annotations


class LongRetrieverError(Exception):
    """The root: `except LongRetrieverError` catches all that the package raises on purpose."""


class InputError(LongRetrieverError, ValueError):
    """What was given cannot be used as it is."""


class EventsError(InputError):
    """A log, items or users file is unreadable, lacks a column, or has too many bad rows."""


class UnknownUser(InputError, KeyError):
    """The store has no behaviors of this user."""

    __str__ = Exception.__str__  # KeyError would print the message as a quoted repr


class UnknownItem(InputError, KeyError):
    """The store has no such item."""

    __str__ = Exception.__str__


class UnknownCategory(InputError, KeyError):
    """The store has no such category."""

    __str__ = Exception.__str__


class SavedError(LongRetrieverError):
    """A saved folder cannot be opened."""


class NotSaved(SavedError, FileNotFoundError):
    """There is nothing at the path that this package has saved."""


class Damaged(SavedError):
    """A file of the folder is missing, cut off or altered."""


class Mismatch(SavedError):
    """The folder was made from something other than what it is now used with."""


class NotLoaded(SavedError):
    """Shards or a database do not have the vectors of this model, or not yet."""


class EngineFailed(LongRetrieverError):
    """What computes an ingest stopped before the end: a worker died, a disk is full."""


class Unavailable(LongRetrieverError):
    """Live events cannot be read or written now: their server is gone, full, or being started."""


class ProcessLost(LongRetrieverError):
    """Another process of a training was killed or cannot be reached."""


class RequestFailed(LongRetrieverError):
    """A server refused a request, or could not be reached.

    status  of the answer; None where there was none
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class MissingExtra(LongRetrieverError, ImportError):
    """An optional part of the package is needed and not installed."""
