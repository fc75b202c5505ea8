"""LanceDB: a table with an index on the category; vectors of the rows that the filter leaves are compared."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from index_common import Answers, Peer, main, say
from lancedb.index import BTree, IvfFlat


class Exact(Peer):
    def build(self) -> None:
        D = self.data.items.shape[1]
        fields = {"item": pa.int64(), "category": pa.int32(), "vector": pa.list_(pa.float32(), D)}
        schema = pa.schema(list(fields.items()))
        database = lancedb.connect(str(self.folder))
        reader = pa.RecordBatchReader.from_batches(schema, self._batches(schema))
        self.table = database.create_table("items", reader)
        self.table.create_index("category", config=BTree())

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        for first, chunk in self.data.chunks("LanceDB"):
            item = np.arange(first, first + len(chunk))
            category = (np.searchsorted(self.data.start, item, side="right") - 1).astype(np.int32)
            vector = pa.FixedSizeListArray.from_arrays(pa.array(chunk.ravel()), chunk.shape[1])
            yield pa.record_batch([pa.array(item), pa.array(category), vector], schema=schema)

    def open(self) -> None:
        self.table = lancedb.connect(str(self.folder)).open_table("items")

    def search(self, users_ND: np.ndarray, contexts_N: np.ndarray, width: int | None) -> Answers:
        return [self._one(user, c, width) for user, c in zip(users_ND, contexts_N, strict=True)]

    def _one(self, user: np.ndarray, category: int, width: int | None) -> np.ndarray:
        asked = self.table.search(user).distance_type("dot").where(f"category = {category}", prefilter=True)
        found = self._limited(asked, width).limit(self.data.K).select(["item", "_distance"]).to_arrow()
        return found["item"].to_numpy()

    def _limited(self, asked: Any, width: int | None) -> Any:
        return asked.bypass_vector_index()


class Grouped(Exact):
    """As many groups of near items as the square root of their number; `width` of them are looked at."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.groups = int(np.sqrt(len(self.data.items)))
        self.widths = tuple(max(1, self.groups * part // 16) for part in (1, 4, 12, 16))

    def build(self) -> None:
        super().build()
        say("LanceDB: groups")
        self.table.create_index("vector", config=IvfFlat(distance_type="dot", num_partitions=self.groups))

    def _limited(self, asked: Any, width: int | None) -> Any:
        return asked.nprobes(width)


if __name__ == "__main__":
    main({"lancedb": Exact, "lancedb-ivf": Grouped})
