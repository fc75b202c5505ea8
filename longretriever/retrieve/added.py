"""Items come, move and go, in a model and its index, without training: see `model/extended.py`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from longretriever.model.extended import Added, Removed, extend, remove
from longretriever.retrieve.indexing import index_model


def add_items(
    path: str | os.PathLike[str],
    items: Any,
    *,
    move: bool = False,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Added:
    """Make items retrievable that a model folder does not have, by category and features, without training.

    `items` is a path, a folder, a glob, several of them, or a table that Arrow can read: `item_id`,
    `category_id`, and where there are some `title` and the features that the model was trained with;
    `columns` maps our names to theirs. Items that the model has already stay as they are, but for two: those
    removed before come back, and with `move` those that are of another category here go there.
    `max_rejected` is the share of rows without a usable id that is put up with.

    The model and its index, inside its folder, are replaced together and at once: whoever has the old ones
    open goes on with them, and a crash leaves the old ones or the new. Adding the same again changes nothing.

    Raises `UnknownCategory`, `EventsError`, `InputError` or a `SavedError`; then nothing has changed.
    """
    then = partial(index_model, progress=progress, before=path)
    added = extend(path, items, move=move, columns=columns, max_rejected=max_rejected, then=then)
    _index_if_absent(path, progress)
    return added


def remove_items(
    path: str | os.PathLike[str],
    items: Any,
    *,
    columns: Mapping[str, str] | None = None,
    max_rejected: float = 0.01,
    progress: Callable[[int, int], None] | None = None,
) -> Removed:
    """Have a model folder find these items no more. `add_items` brings them back.

    `items` is as in `add_items`, and needs the column `item_id` only. A removed item still counts where a
    user met it: as a behavior, and as a reason for other candidates. Probabilities are over the items left.

    Model and index are replaced as by `add_items`. Raises `EventsError`, `InputError` (nothing would be left)
    or a `SavedError`; then nothing has changed.
    """
    then = partial(index_model, progress=progress, before=path)
    removed = remove(path, items, columns=columns, max_rejected=max_rejected, then=then)
    _index_if_absent(path, progress)
    return removed


def _index_if_absent(path: str | os.PathLike[str], progress: Callable[[int, int], None] | None) -> None:
    if not (Path(path) / "index").exists():  # nothing has changed, and the model has never been indexed
        index_model(path, progress=progress)
