"""A trained model without torch: the user tower in ONNX Runtime, item and category vectors as arrays.

N contexts of one request are N rows of one call. Behaviors enter as the token vectors of their items, which
are looked up here, so the ONNX file stays small however many items there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from longretriever.errors import Damaged
from longretriever.events import CATEGORY, ITEM
from longretriever.saved import Manifest, opening
from longretriever.store.behaviors import Behaviors, Ids, ItemIds, Vocabulary, read_arrow, vocabularies

INPUTS = ("behavior", "kind", "length", "profile", "context", "recent", "recent_count")
"""Names of the user tower's inputs, in the order of `UserTower.forward`."""


@dataclass(frozen=True)
class Request:
    """One context of one user, in the model's own numbers: a row of the user tower."""

    category: int
    behaviors: Behaviors  # of the context, oldest first, at most L
    recent: Behaviors  # of any category, oldest first, at most R
    profile: np.ndarray  # [P]


class Model:
    """A folder written by `longretriever train`, opened read-only.

    item_token      [I, d] what the user tower reads as a behavior; normalised, the item vector
    category_token  [C, d] the context, for the user tower
    category_start  [C+1] first item number of each category: a category is a range of items
    items.arrow, categories.arrow   the ids of those numbers
    user_tower.onnx                 see `INPUTS`
    """

    def __init__(self, manifest: Manifest, threads: int = 1) -> None:
        self.manifest, self.path, self.fingerprint = manifest, manifest.path, manifest.fingerprint
        self.item_token = manifest.load_array("item_token")
        self.category_token = manifest.load_array("category_token", mmap=False)
        self.category_start = manifest.load_array("category_start", mmap=False)
        self.items = read_arrow(manifest.path / "items.arrow")
        self.item_ids = ItemIds(self.items[ITEM])
        self.category_ids = Ids(read_arrow(manifest.path / "categories.arrow")[CATEGORY])
        facts = manifest.facts
        self.scale: float = facts["scale"]
        self.config: dict[str, Any] = facts["config"]
        self.behaviors: tuple[str, ...] = tuple(facts["behaviors"])
        self.profile_fields: tuple[Vocabulary, ...] = vocabularies(facts["profile_fields"])
        self.context_length: int = self.config["context_length"]
        self.recent_length: int = self.config["recent_length"]
        self.dim, self.n_items = self.item_token.shape[1], self.item_token.shape[0]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(manifest.path / "user_tower.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime's own exceptions share no base class
            raise Damaged(f"{manifest.path / 'user_tower.onnx'}: not loadable ({error}).") from error
        self._inputs = {i.name for i in self._session.get_inputs()}

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False, threads: int = 1) -> Model:
        """Open a model folder; `verify=True` also hashes every file. Raises a `SavedError`."""
        return cls(opening(path, "model", verify), threads)

    def item_vectors(self, items: slice | np.ndarray) -> np.ndarray:
        """[n, d] vectors of length 1 of these item numbers."""
        return unit(np.asarray(self.item_token[items]))

    def tokens(self, behaviors: Behaviors) -> np.ndarray:
        """[n, d] token vectors; an item that the model does not know (-1) counts as its category alone."""
        known = behaviors.item >= 0
        out = self.category_token[behaviors.category]
        out[known] = self.item_token[behaviors.item[known]]
        return out

    def user_vectors(self, requests: list[Request]) -> np.ndarray:
        """[n, d] one user vector of length 1 for each request. One call of ONNX Runtime."""
        n, d, R = len(requests), self.dim, self.recent_length
        length = np.array([len(r.behaviors.item) for r in requests], np.int64)
        N = max(1, int(length.max(initial=1)))
        feed: dict[str, np.ndarray] = {
            "behavior": np.zeros((n, N, d), np.float32),
            "kind": np.zeros((n, N), np.int64),
            "length": length,
            "profile": np.array([r.profile for r in requests], np.int64).reshape(n, -1),
            "context": self.category_token[[r.category for r in requests]],
            "recent": np.zeros((n, R, d), np.float32),
            "recent_count": np.array([len(r.recent.item) for r in requests], np.int64),
        }
        newest: dict[int, np.ndarray] = {}  # the contexts of one user share their recent behaviors
        for i, r in enumerate(requests):
            feed["behavior"][i, : length[i]] = self.tokens(r.behaviors)
            feed["kind"][i, : length[i]] = r.behaviors.kind
            if id(r.recent) not in newest:
                newest[id(r.recent)] = self.tokens(r.recent)[::-1]
            feed["recent"][i, : len(r.recent.item)] = newest[id(r.recent)]
        return self._session.run(None, {k: v for k, v in feed.items() if k in self._inputs})[0]


def unit(x_nd: np.ndarray) -> np.ndarray:
    """The rows, each divided by its length."""
    return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)
