"""A model's item vectors as one Parquet file, for vector databases that others run.

One row an item and space: `contexts` are the vectors that a context's user vector searches, within its
category; `whole` those that the user's vector as a whole searches, in all categories. Where they are the
same, there is one row, of `both`. Whoever searches filters by category and orders by inner product: all have
length 1.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longretriever.errors import InputError
from longretriever.events import CATEGORY, ITEM
from longretriever.model.exported import Model
from longretriever.retrieve.retriever import WHOLE
from longretriever.saved import beside, sync

SPACES = "contexts", "whole", "both"
METADATA = b"longretriever"
"""The key in the file's metadata under which JSON says, for each space, of which model it is, and its scale.
"""

_CHUNK = 1 << 15  # items of a row group: 8 MB of 64-dimensional float32


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    space: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the item vectors of a model folder to a Parquet file; returns the number of rows.

    Columns `item_id`, `category_id`, `space`, `vector` (as many float32 each, of length 1), in order of space
    and category; removed items are left out. `space` takes one of those that the model has. The file appears
    when it is complete. Memory: one chunk and the ids.

    Raises `InputError` where the model has no such space, or spaces of different widths are to go into one
    file; a `SavedError`.
    """
    spaces = _spaces(Path(path))
    if space is not None:
        if space not in spaces:
            raise InputError(f"{path} has no space {space!r}, but {', '.join(spaces)}.")
        spaces = {space: spaces[space]}
    widths = {model.dim for model in spaces.values()}
    if len(widths) > 1:
        found = ", ".join(f"{name} {model.dim}" for name, model in spaces.items())
        raise InputError(
            f"the spaces of {path} have vectors of different widths, {found}: export each to a file of "
            "its own, with --space (space=)."
        )
    target, schema = Path(out), _schema(spaces)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, rows = beside(target, "partial"), 0
    total = sum(model.n_items for model in spaces.values())
    done = 0
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=["space"]) as writer:
            for name, model in spaces.items():
                for at, table in _tables(name, model, schema):
                    writer.write_table(table)
                    rows += len(table)
                    if progress:
                        progress(done + at, total)
                done += model.n_items
        sync(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return rows


def _spaces(path: Path) -> dict[str, Model]:
    model = Model.open(path)
    if (path / WHOLE).exists():
        return {"contexts": model, "whole": Model.open(path / WHOLE)}
    if model.asks_contexts and model.asks_corpus:
        return {"both": model}
    return {"contexts" if model.asks_contexts else "whole": model}


def _schema(spaces: dict[str, Model]) -> pa.Schema:
    model = next(iter(spaces.values()))
    said = {
        name: {
            "model": of.fingerprint,
            "scale": of.scale,
            "corpus_scale": of.corpus_scale,
            "dimension": of.dim,
        }
        for name, of in spaces.items()
    }
    return pa.schema(
        [
            pa.field(ITEM, model.items[ITEM].type, nullable=False),
            pa.field(CATEGORY, model.category_ids.values.type, nullable=False),
            pa.field("space", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.float32(), model.dim), nullable=False),
        ],
        {METADATA: json.dumps(said).encode()},
    )


def _tables(name: str, model: Model, schema: pa.Schema) -> Iterator[tuple[int, pa.Table]]:
    """How many items have been gone through, and the rows of those of the last chunk that are left."""
    for at in range(0, model.n_items, _CHUNK):
        number = np.arange(at, min(at + _CHUNK, model.n_items))
        number = number[~model.is_removed(number)]
        taken = pa.array(number)
        flat = np.ascontiguousarray(model.item_vectors(number), dtype=np.float32).reshape(-1)
        columns = [
            model.items[ITEM].take(taken),
            model.category_ids.values.take(pa.array(model.category_of(number))),
            pa.array([name] * len(number), pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(flat), model.dim),
        ]
        yield min(at + _CHUNK, model.n_items), pa.table(columns, schema=schema)
