"""New items into a model and its index, without training: see `model/extended.py` for their vectors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from longretriever.model.extended import Added, extend
from longretriever.retrieve.indexing import index_model


def add_items(
    path: str | os.PathLike[str],
    items: Any,
    *,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Added:
    """Make items retrievable that a model folder does not have, by category and features, without training.

    `items` is a path, a folder, a glob, several of them, or a table that Arrow can read: `item_id`,
    `category_id`, and where there are some `title` and the features that the model was trained with;
    `columns` maps our names to theirs. Items that the model has already stay as they are. `max_rejected` is
    the share of rows without a usable id that is put up with.

    The model and its index, inside its folder, are replaced together and at once: whoever has the old ones
    open goes on with them, and a crash leaves the old ones or the new. Adding the same again changes nothing.

    Raises `UnknownCategory`, `EventsError`, `InputError` or a `SavedError`; then nothing has changed.
    """
    indexed = partial(index_model, progress=progress)
    added = extend(path, items, columns=columns, max_rejected=max_rejected, then=indexed)
    if not (Path(path) / "index").exists():  # nothing was new, and the model has never been indexed
        indexed(path)
    return added
