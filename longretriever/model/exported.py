"""A trained model without torch: the user tower in ONNX Runtime, item and category vectors as arrays.

N contexts of one request are N rows of one call. Behaviors enter as the token vectors of their items, which
are looked up here, so the ONNX file stays small however many items there are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

from longretriever.errors import Damaged
from longretriever.events import CATEGORY, ITEM
from longretriever.model.age import age_class
from longretriever.model.factors import NOTHING, Factors, Met
from longretriever.saved import Manifest, opening
from longretriever.store.behaviors import Behaviors, Ids, ItemIds, Vocabulary, read_arrow, vocabularies

_WIDTHS = np.array([2, 6, 16])  # behaviors: requests up to each share a call, and all longer ones


@dataclass(frozen=True)
class Request:
    """A row of the user tower, in the model's own numbers: one context of a user, or the user as a whole."""

    category: int  # -1: items of all categories are asked for
    behaviors: Behaviors  # of the context (of any for the whole), oldest first, at most L
    recent: Behaviors  # of any category, oldest first, at most R and those of the life's sample
    profile: np.ndarray  # [P]
    now: float  # seconds since the epoch
    met: Met = NOTHING  # in the whole life; asked of models with factors


class UserVectors(NamedTuple):
    """What the user tower says to n requests.

    user       [n, V, d] vectors of length 1; V is 1 but for methods of several interests
    interests  [n] how many of the V count
    shares     [n, 1 + N] log shares of probability: of all items by vectors, then of each behavior's item
            (padded behind, oldest first); None for methods without
    """

    user: np.ndarray
    interests: np.ndarray
    shares: np.ndarray | None

    def that_count(self) -> np.ndarray:
        """[interests in all, d] request after request."""
        return self.user[np.arange(self.user.shape[1]) < self.interests[:, None]]


class Model:
    """A folder written by `longretriever train`, opened read-only.

    item_token      [I, d] what the user tower reads as a behavior; normalised, the item vector
    category_token  [C, d] the context, for the user tower
    category_start  [C+1] first item number of each category: a category is a range of items
    removed         [n] sorted numbers of items that shall not be retrieved, though users have met them
    items.arrow, categories.arrow   the ids of those numbers
    user_tower.onnx                 see `_feed` and `UserVectors`
    """

    def __init__(self, manifest: Manifest, threads: int = 1) -> None:
        self.manifest, self.path, self.fingerprint = manifest, manifest.path, manifest.fingerprint
        self.item_token = manifest.load_array("item_token")
        self.category_token = manifest.load_array("category_token", mmap=False)
        self.category_start = manifest.load_array("category_start", mmap=False)
        self.removed = removed(manifest)
        self.items = read_arrow(manifest.path / "items.arrow")
        self.item_ids = ItemIds(self.items[ITEM])
        self.category_ids = Ids(read_arrow(manifest.path / "categories.arrow")[CATEGORY])
        facts = manifest.facts
        self.scale: float = facts["scale"]
        self.config: dict[str, Any] = facts["config"]
        self.behaviors: tuple[str, ...] = tuple(facts["behaviors"])
        self.profile_fields: tuple[Vocabulary, ...] = vocabularies(facts["profile_fields"])
        self.method: str = facts["method"]
        self.asks_contexts: bool = facts["contexts"]  # one vector for each context, searching that category
        self.asks_corpus: bool = facts["corpus"]  # vectors that search all items
        self.corpus_scale: float = facts.get("corpus_scale", self.scale)  # for what is found among all items
        self.whole_share: float = facts.get("whole_share", 0.5)  # of an answer's probability: for that
        self.merge: str = facts.get("merge", "probability")  # how its lists become one, see `retrieve.merge`
        self.context_length: int = facts["context_length"]
        self.recent_length: int = facts["recent_length"]
        self.life_sample: int = facts.get("life_sample", 0)
        self.within: int | None = facts["within"]
        self.dim, self.n_items = self.item_token.shape[1], self.item_token.shape[0]
        self.factors = Factors.opened(manifest)
        self.searched_dim = self.dim if self.factors is None else self.factors.width(self.dim)
        self._session = session(manifest.path / "user_tower.onnx", threads)
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False, threads: int = 1) -> Model:
        """Open a model folder; `verify=True` also hashes every file. Raises a `SavedError`."""
        return cls(opening(path, "model", verify), threads)

    def category_of(self, items: np.ndarray) -> np.ndarray:
        """[n] category numbers of item numbers."""
        return np.searchsorted(self.category_start, items, side="right") - 1

    def is_removed(self, items: np.ndarray) -> np.ndarray:
        """[n] whether each of these item numbers shall not be retrieved; -1, an unknown item, is not."""
        if not len(self.removed):
            return np.zeros(len(items), bool)
        at = np.searchsorted(self.removed, items)
        return self.removed[np.minimum(at, len(self.removed) - 1)] == items

    def item_vectors(self, items: slice | np.ndarray) -> np.ndarray:
        """[n, d] vectors of length 1 of these item numbers."""
        return unit(np.asarray(self.item_token[items]))

    def tokens(self, behaviors: Behaviors) -> np.ndarray:
        """[n, d] token vectors; an item that the model does not know (-1) counts as its category alone."""
        known = behaviors.item >= 0
        out = self.category_token[behaviors.category]
        out[known] = self.item_token[behaviors.item[known]]
        return out

    def searched_vectors(self, items: slice | np.ndarray) -> np.ndarray:
        """[n, W] what the index holds of these items, of length 1: their vectors, with factors if any."""
        vectors = self.item_vectors(items)
        return vectors if self.factors is None else self.factors.items(vectors, self.corpus_scale, items)

    def searching_vectors(self, requests: list[Request]) -> np.ndarray:
        """[interests in all, W] what is searched for among those, of length 1, request after request."""
        vectors = self.user_vectors(requests)
        if self.factors is None:
            return vectors.that_count()
        factor = self.factors.of_users([request.met for request in requests])
        return self.factors.queries(vectors.user[:, 0], factor).vector

    def user_vectors(self, requests: list[Request]) -> UserVectors:
        """What the user tower says to these requests. One call of ONNX Runtime for each of `_WIDTHS`.

        Most contexts are short: padded to the longest, they would take three times as long.
        """
        length = np.array([len(r.behaviors.item) for r in requests])
        bucket = np.searchsorted(_WIDTHS, length)
        if len(requests) and (bucket == bucket[0]).all():
            return self._of_alike(requests)
        parts = [np.flatnonzero(bucket == b) for b in np.unique(bucket)]
        found = [self._of_alike([requests[i] for i in part]) for part in parts]
        order = np.argsort(np.concatenate(parts))
        user, interests = (np.concatenate(x)[order] for x in list(zip(*found, strict=True))[:2])
        parted = [f.shares for f in found if f.shares is not None]  # of each, or of none
        shares = None
        if parted:
            widest = max(s.shape[1] for s in parted)
            shares = np.zeros((len(requests), widest), np.float32)
            for part, one in zip(parts, parted, strict=True):
                shares[part, : one.shape[1]] = one
        return UserVectors(user, interests, shares)

    def _of_alike(self, requests: list[Request]) -> UserVectors:
        """The same of requests of similar length, in one call."""
        outputs = dict(zip(self._outputs, self._session.run(None, self._feed(requests)), strict=True))
        user, n = outputs["user"], len(requests)
        if user.ndim == 2:
            user = user[:, None]
        return UserVectors(user, outputs.get("interests", np.ones(n, np.int64)), outputs.get("shares"))

    def _feed(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """The inputs that the tower has, of all those that a tower may have."""
        n, d, R = len(requests), self.dim, self.recent_length + self.life_sample
        length = np.array([len(r.behaviors.item) for r in requests], np.int64)
        N = max(1, int(length.max(initial=1)))
        category = np.array([r.category for r in requests], np.int64)
        feed: dict[str, np.ndarray] = {
            "behavior": np.zeros((n, N, d), np.float32),
            "kind": np.zeros((n, N), np.int64),
            "age": np.zeros((n, N), np.int64),
            "length": length,
            "profile": np.array([r.profile for r in requests], np.int64).reshape(n, -1),
            "context": self.category_token[category] * (category >= 0)[:, None],
            "since": np.zeros((n, 2)),
            "recent": np.zeros((n, R, d), np.float32),
            "recent_count": np.array([len(r.recent.item[-R:]) if R else 0 for r in requests], np.int64),
            "whole": np.array([r.category < 0 for r in requests]),
        }
        every = Behaviors(*map(np.concatenate, zip(*(r.behaviors for r in requests), strict=True)))
        row = np.repeat(np.arange(n), length)
        at = row, np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
        now = np.array([r.now for r in requests])
        feed["behavior"][at] = self.tokens(every)
        feed["kind"][at] = every.kind
        feed["age"][at] = age_class(now[row] - every.time)
        newest: dict[int, np.ndarray] = {}  # the contexts of one user share their recent behaviors
        for i, r in enumerate(requests):
            for j, past in enumerate((r.behaviors, r.recent)):
                if len(past.time):
                    feed["since"][i, j] = now[i] - past.time[-1]
            if id(r.recent) not in newest:
                newest[id(r.recent)] = self.tokens(r.recent)[::-1]
            feed["recent"][i, : len(r.recent.item)] = newest[id(r.recent)][:R]
        there = np.array([[len(r.behaviors.time), len(r.recent.time)] for r in requests]) > 0
        feed["since"] = age_class(feed["since"]) * there
        return {k: v for k, v in feed.items() if k in self._inputs}


def removed(manifest: Manifest) -> np.ndarray:
    """See `Model`."""
    if "removed.npy" not in manifest.files:
        return np.empty(0, np.int64)
    return manifest.load_array("removed", mmap=False)


def session(file: Path, threads: int) -> Any:
    """An ONNX Runtime session on the CPU. Raises `Damaged`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions share no base class
        raise Damaged(f"{file}: not loadable ({error}).") from error


def unit(x_nd: np.ndarray) -> np.ndarray:
    """The rows, each divided by its length."""
    return x_nd / np.maximum(np.linalg.norm(x_nd, axis=1, keepdims=True), 1e-12)
