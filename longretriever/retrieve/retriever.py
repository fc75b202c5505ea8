"""From a user and a moment to candidates with their reasons: the whole request in one place.

Interests choose contexts, each context's last behaviors become one user vector, one call searches all
contexts, the lists are merged. The store may be newer than the model (another ingest of the same log, with
new users, items and behaviors): ids are matched when a retriever is made, and an item that the model has
never seen still counts for its category. Nothing here reads the clock or draws from a hidden generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from longretriever.errors import InputError, Mismatch, NotSaved
from longretriever.events import LATEST
from longretriever.index import CORPUS, ExactIndex, Index, Searchable
from longretriever.model.exported import Model, Request
from longretriever.pgvector import Database, is_database
from longretriever.retrieve.interests import INTERESTS, Contexts, Interests, Pgin, RandomInTop
from longretriever.retrieve.merge import MERGES, Merge, Ranked
from longretriever.retrieve.numbers import Numbers
from longretriever.retrieve.pooled import pooled
from longretriever.retrieve.retrieval import Asked, Retrieval
from longretriever.retrieve.rules import Ruled, Rules
from longretriever.store.behaviors import Behaviors, Life, Store

WHOLE = "whole"
"""The folder, within that of a model, of another one whose vector searches all items."""

_LATELY = 20  # last behaviors, the reasons in a context without any, where the model itself reads none


BATCH = 64  # users that share one call of the user tower and of the index


class Found(NamedTuple):
    """What one user vector found: see `Index.search` and `Index.log_normaliser`."""

    item: np.ndarray
    cosine: np.ndarray
    scale: float
    normaliser: float
    user: np.ndarray  # [D] the vector itself


@dataclass(frozen=True, slots=True)
class Searched:
    """What finds items: user vectors of the one are searched for in the other."""

    model: Model
    index: Searchable


class Elsewhere(Protocol):
    """Where item vectors are kept if not in a folder beside the model: in shards, in a database."""

    def check(self, fingerprint: str, instead_of: str | None = None) -> None:
        """Raises `NotLoaded` where this model cannot be searched yet, or less well than another one."""

    def index_of(self, model: Model) -> Searchable:
        """Raises `NotLoaded`."""


IndexAt = str | os.PathLike[str] | Elsewhere


class Retriever:
    """A model, its index and a store of behaviors, ready to answer. Safe to share between threads.

    `whole` makes the vector that searches all items, where the model does not itself.
    """

    def __init__(
        self,
        model: Model,
        index: Searchable,
        store: Store,
        *,
        whole: Searched | None = None,
        interests: Interests | None = None,
        merge: Merge | None = None,
    ) -> None:
        self.model, self.index, self.store = model, index, store
        self.loaded: dict[str, Any] | None = None  # arguments of `load`, for another process to do the same
        self._of_contexts = self._of_all = Searched(model, index)
        if whole is not None:
            self._of_all = whole
        self._asks_all = self._of_all.model.asks_corpus
        if interests is None:
            interests = Pgin() if (model.path / INTERESTS).exists() else RandomInTop()
        self._pgin: dict[str | os.PathLike[str] | None, Pgin] = {}  # by the path given, opened once
        self.interests = self._bound(interests)
        self.merge = merge or MERGES[model.merge]
        self.numbers = Numbers(store, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        store: str | os.PathLike[str] | None = None,
        index: IndexAt | None = None,
        exact: bool = False,
        interests: Interests | None = None,
        merge: Merge | None = None,
        verify: bool = False,
        threads: int = 1,
    ) -> Retriever:
        """Open a model folder, with `path/index` and the store it was trained on unless others are given.

        What the model brings to search all items is opened with it, and searched where `index` is if that is
        no folder.

        `interests` and `merge` are those that the model was made for, unless given. `exact=True` scans all
        item vectors instead of opening an index. `threads` is for the user tower.
        Raises a `SavedError` when a folder is absent, damaged, or the index is not of this model.
        """
        model = Model.open(path, verify, threads)
        behaviors = Store.open(store, verify) if store else trained_on(model, verify)
        opened, whole = _opened(model, index or model.path / "index", exact, verify), None
        if (model.path / WHOLE).exists():
            of_all = Model.open(model.path / WHOLE, verify, threads)
            at = of_all.path / "index" if index is None or _is_folder(index) else index
            whole = Searched(of_all, _opened(of_all, at, exact, verify))
        made = cls(model, opened, behaviors, whole=whole, interests=interests, merge=merge)
        if index is None or isinstance(index, str | os.PathLike):  # else it is of this process alone
            made.loaded = {"path": path, "store": store, "index": index, "exact": exact}
            made.loaded |= {"interests": interests, "merge": merge}
        return made

    def retrieve(
        self,
        user_id: int | str,
        k: int = 500,
        *,
        now: float | None = None,
        rng: np.random.Generator | int = 0,
        interests: Interests | None = None,
        merge: Merge | None = None,
        rules: Rules = Rules(),
    ) -> Retrieval:
        """Up to k candidates for a user, from behaviors strictly before `now` (seconds since the epoch).

        `now=None` is just after the last event of the store. `rng` draws the contexts (a seed gives the same
        contexts for the same user). `interests` and `merge` replace the retriever's own for this request.
        Fewer than k come where the contexts hold fewer; none for a user without behaviors before `now`.

        Raises `UnknownUser`, `UnknownCategory`, `InputError`.
        """
        life = self._life(user_id, now)
        return self.answer([life], k, rng=rng, interests=interests, merge=merge, rules=rules)[0]

    def _life(self, user_id: int | str, now: float | None) -> Life:
        if now is not None and not now < LATEST:  # so written, NaN is wrong too
            raise InputError(f"now={now}: expected seconds since 1970, before the year 2100 (milliseconds?).")
        return self.store.life(self.store.user_number(user_id), now)

    def answer(
        self,
        lives: Sequence[Life],
        k: int = 500,
        *,
        rng: np.random.Generator | int = 0,
        interests: Interests | None = None,
        merge: Merge | None = None,
        rules: Rules = Rules(),
        lap: Callable[[str], None] = lambda stage: None,
    ) -> list[Retrieval]:
        """The answers to several requests at once: one call of the user tower, one of the index.

        `lap` is told each stage when it ends: interests, contexts, vectors, search, merge.
        """
        if k < 1:
            raise InputError(f"k={k}, expected at least 1.")
        ruled = Ruled(rules, self.model)
        owner: list[int] = []
        shares: list[float] = []
        rows: list[tuple[Request, Behaviors]] = []
        looked_at = [life.lately(self.model.within) for life in lives]
        chosen = self._choose(looked_at, rng, self._bound(interests) if interests else self.interests)
        lap("interests")
        for i, life in enumerate(looked_at):
            contexts = ruled.contexts(self.numbers.contexts(chosen[i]))
            mine = self._requests(life, contexts)
            rows += [row for row, _ in mine]
            shares += [share for _, share in mine]
            owner += [i] * len(mine)
        lap("contexts")
        asked: list[list[Asked]] = [[] for _ in lives]
        told = [r for r, _ in rows], [lives[i] for i in owner], shares
        for n, answer, unsearched in self._search(*told, k, ruled, lap):
            asked[owner[n]].append(Asked(*rows[n], answer.share, answer, unsearched))
        lap("search")
        merge = merge or self.merge
        answers = [
            Retrieval(self.model, life, of, merge(ruled.lists([a.answer for a in of]), k))
            for life, of in zip(lives, asked, strict=True)
        ]
        lap("merge")
        return answers

    def _bound(self, interests: Interests) -> Interests:
        """A `Pgin` without weights of its own gets those that were trained with the model, opened once."""
        if not isinstance(interests, Pgin):
            return interests
        if interests.path not in self._pgin:
            self._pgin[interests.path] = interests.beside(self.model.path)
        opened = self._pgin[interests.path]
        return replace(interests, path=opened.path, opened=opened.opened)

    def _choose(
        self, lives: Sequence[Life], rng: np.random.Generator | int, interests: Interests
    ) -> list[Contexts]:
        """The contexts of each life, in the store's numbers."""
        if not self.model.asks_contexts:
            return [Contexts.none()] * len(lives)
        if isinstance(interests, Pgin):  # one call of its model for all
            return interests.for_many(lives)
        if isinstance(rng, np.random.Generator):
            return [interests(life, rng) for life in lives]
        return [
            interests(life, np.random.default_rng([rng, life.store.stands_for(life.user)])) for life in lives
        ]

    def _requests(
        self, life: Life, contexts: Sequence[tuple[int, float]]
    ) -> list[tuple[tuple[Request, Behaviors], float]]:
        """Rows of the user tower for one life, each with the behaviors that speak in it, and its share."""
        numbers, model = self.numbers.of(life.store), self.model
        lately = numbers.known(life.sampled(model.recent_length or _LATELY, model.life_sample))
        recent, profile = numbers.behaviors(lately), numbers.profile(life.profile())
        out = []
        for category, share in contexts:
            at_store = int(numbers.category_of_model[category])
            met = life.in_context(at_store, model.context_length)
            request = Request(category, numbers.behaviors(met), recent, profile, life.now)
            out.append(((request, met if len(met.item) else lately), share))
        if self._asks_all and len(lately.item):
            met = numbers.known(life.recent(self._of_all.model.context_length))
            request = Request(CORPUS, numbers.behaviors(met), recent, profile, life.now)
            if self._of_all.model.factors is not None:
                request = replace(request, met=numbers.met(life))
            others = sum(share for _, share in contexts) or 1.0
            share = others * model.whole_share / (1 - model.whole_share)
            out.append(((request, met if len(met.item) else lately), share))
        return out

    def _search(
        self,
        rows: list[Request],
        lives: Sequence[Life],
        shares: Sequence[float],
        k: int,
        ruled: Ruled,
        lap: Callable[[str], None],
    ) -> Iterator[tuple[int, Ranked, float]]:
        """The answers, each with the row that it is of; a row has one for each of its user vectors.

        Behind each the share of its context that could not be searched, see `index.Nearest`.
        """
        unwanted = self._unwanted(rows, lives, ruled)
        whole = np.array([row.category == CORPUS for row in rows], bool)
        parts = [(self._of_contexts, ~whole), (self._of_all, whole)]
        if self._of_all is self._of_contexts:
            parts = [(self._of_contexts, np.ones(len(rows), bool))]
        for searched, which in parts:
            at = np.flatnonzero(which).tolist()
            if at:
                mine = [rows[i] for i in at], [shares[i] for i in at], [unwanted[i] for i in at]
                find = self._searched if searched.model.factors is None else pooled
                for n, ranked, unsearched in find(searched, *mine, k, ruled, lap):
                    yield at[n], ranked, unsearched

    def _searched(
        self,
        searched: Searched,
        rows: list[Request],
        shares: list[float],
        unwanted: list[np.ndarray],
        k: int,
        ruled: Ruled,
        lap: Callable[[str], None],
    ) -> Iterator[tuple[int, Ranked, float]]:
        """The same of rows that one model answers: one call of its user tower, one of its index."""
        model, index = searched.model, searched.index
        lap("search")
        vectors = model.user_vectors(rows)
        lap("vectors")
        row_N = np.repeat(np.arange(len(rows)), vectors.interests)
        user_ND = vectors.that_count()
        context_N = np.array([rows[i].category for i in row_N])
        fetch = max(1, min(k + max(map(len, unwanted)), self._largest(context_N)))
        scale_N = np.where(context_N == CORPUS, model.corpus_scale, model.scale)
        # Sums by the first k alone: what others of the call have fetched must not change a user's answer.
        near = index.nearest(user_ND, context_N, fetch, scale_N, k, tuple(ruled.excluded))
        for n, i in enumerate(map(int, row_N)):
            share, unsearched = shares[i] / vectors.interests[i], float(near.unsearched[n])
            if unsearched == 1:  # whom of it the user has met would be known, but not against what
                yield i, Ranked.nothing(rows[i].category, share), unsearched
                continue
            head = k + len(unwanted[i])  # as many as this row alone would have fetched
            found = Found(
                near.item[n, :head], near.cosine[n, :head], scale_N[n], near.normaliser[n], user_ND[n]
            )
            log_shares = None
            if vectors.shares is not None:
                log_shares = _shared(vectors.shares[i], ruled.rules.returns)
            item, cosine, log_prob = self._probable(rows[i], found, log_shares, unwanted[i], k)
            yield i, Ranked(rows[i].category, share, item, cosine, log_prob), unsearched

    def _largest(self, context_N: np.ndarray) -> int:
        """How many items the largest of these contexts holds."""
        if (context_N == CORPUS).any():
            return self.model.n_items
        return int(np.diff(self.model.category_start)[context_N].max())

    def _probable(
        self, row: Request, found: Found, log_shares: np.ndarray | None, unwanted: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The k items of highest probability, their cosines, and log P(item | user, context).

        With shares, an item that the user met in the context gets those of its behaviors beside what its
        vector earns it.
        """
        there = int(np.count_nonzero(found.item >= 0))  # the rest is padding
        item, cosine = found.item[:there], found.cosine[:there]
        if log_shares is not None:
            gone = self.model.is_removed(row.behaviors.item)
            if gone.any():
                log_shares = _of_those_left(log_shares, gone)
            met, places, missing = _met_among(item, np.where(gone, -1, self._met(row)))
            if len(missing):
                item = np.concatenate([item, missing])
                cosine = np.concatenate([cosine, self.model.item_vectors(missing) @ found.user])
        log_prob = found.scale * cosine.astype(np.float64) - found.normaliser
        if log_shares is not None:
            log_prob += log_shares[0]
            np.logaddexp.at(log_prob, places, log_shares[1:][met])
        if len(unwanted):
            keep = ~np.isin(item, unwanted)
            item, cosine, log_prob = item[keep], cosine[keep], log_prob[keep]
        best = slice(0, k) if log_shares is None else np.argsort(-log_prob, kind="stable")[:k]
        return item[best], cosine[best], log_prob[best]

    def _met(self, row: Request) -> np.ndarray:
        """[n] the items of the row's behaviors; -1 for one that was of another category in training."""
        met = row.behaviors.item
        if row.category == CORPUS:
            return met
        low, high = self.model.category_start[row.category : row.category + 2]
        return np.where((low <= met) & (met < high), met, -1)

    def _unwanted(self, rows: list[Request], lives: Sequence[Life], ruled: Ruled) -> list[np.ndarray]:
        """For each row, item numbers of its category that must not come back."""
        seen: dict[int, np.ndarray] = {}
        out = []
        for row, life in zip(rows, lives, strict=True):
            unwanted = ruled.items
            if ruled.rules.exclude_seen:
                if id(life) not in seen:
                    seen[id(life)] = np.sort(self.numbers.of(life.store).items(life.items()))
                unwanted = np.union1d(unwanted, seen[id(life)]) if len(ruled.items) else seen[id(life)]
            if row.category == CORPUS:
                out.append(unwanted)
                continue
            low, high = self.model.category_start[row.category : row.category + 2]
            out.append(unwanted[np.searchsorted(unwanted, low) : np.searchsorted(unwanted, high)])
        return out

    def retrieve_many(
        self,
        user_ids: Iterable[int | str],
        k: int = 500,
        *,
        now: float | None = None,
        seed: int = 0,
        rules: Rules = Rules(),
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Retrieval]:
        """`retrieve` for many users, in their order; equal to one call each, and faster."""
        pending: list[Life] = []
        done = 0
        for user_id in user_ids:
            pending.append(self._life(user_id, now))
            if len(pending) == BATCH:
                yield from self.answer(pending, k, rng=seed, rules=rules)
                done, pending = done + len(pending), []
                if progress:
                    progress(done)
        if pending:
            yield from self.answer(pending, k, rng=seed, rules=rules)
            if progress:
                progress(done + len(pending))

    def write(
        self,
        user_ids: Iterable[int | str],
        out: str | os.PathLike[str],
        k: int = 500,
        *,
        now: float | None = None,
        seed: int = 0,
        rules: Rules = Rules(),
        workers: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Candidates of many users to a Parquet file: user_id, rank, item_id, category_id, score.

        Returns the number of rows. The file appears only when it is complete, and is the same however many
        `workers`, processes that each open the model (as `load` did; a program that asks for several must
        start below `if __name__ == "__main__"`). `progress` is told how many users are done.
        """
        from longretriever.retrieve.bulk import Asking, write

        return write(self, user_ids, out, Asking(k, now, seed, rules), workers, progress)

    def context_vectors(self, lives: Sequence[Life], category: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[n, D] the user vector of each life in one context each, and [n] whether there is a behavior in it.

        `category` [n] are numbers of the store; -1 of the model's is not there, and its vector is 0.
        """
        vectors = np.zeros((len(lives), self.model.dim), np.float32)
        there = np.zeros(len(lives), bool)
        for at in range(0, len(lives), BATCH):
            rows, places = [], []
            for i, life in enumerate(lives[at : at + BATCH], start=at):
                number = int(self.numbers.category[category[i]])
                if number >= 0:
                    ((request, _), _), *_ = self._requests(life.lately(self.model.within), [(number, 1.0)])
                    rows.append(request)
                    places.append(i)
                    there[i] = len(request.behaviors.item) > 0
            if rows:
                vectors[places] = self.model.user_vectors(rows).user[:, 0]
        return vectors, there

    def corpus_vectors(self, lives: Sequence[Life]) -> np.ndarray:
        """[n, D] the user vectors that search all items, one or more of each life that has behaviors."""
        found, model = [np.empty((0, self._of_all.model.searched_dim), np.float32)], self._of_all.model
        for at in range(0, len(lives), BATCH):
            rows = [
                request
                for life in lives[at : at + BATCH]
                for (request, _), _ in self._requests(life.lately(self.model.within), [])
                if request.category == CORPUS
            ]
            if rows:
                found.append(model.searching_vectors(rows))
        return np.concatenate(found)

    def store_vectors(self) -> np.ndarray:
        """[I, D] the item vectors in the store's numbers; 0 for items that the model does not know."""
        vectors = np.zeros((len(self.numbers.item), self.model.dim), np.float32)
        known = np.flatnonzero(self.numbers.item >= 0)
        vectors[known] = self.model.item_vectors(self.numbers.item[known])
        return vectors

    def store_categories(self, categories: np.ndarray) -> np.ndarray:
        """The store's numbers of category numbers of the model, -1 where the store has no such category."""
        return np.where(categories >= 0, self.numbers.category_of_model[categories], -1)

    def store_items(self, items: np.ndarray) -> np.ndarray:
        """The store's numbers of item numbers of the model, -1 where the store has no such item."""
        return self.numbers.item_of_model[items]


def _shared(log_shares: np.ndarray, returns: float | None) -> np.ndarray:
    """Shares of all items and of each behavior (see `UserTower`), those of the behaviors `returns` in all."""
    explored = np.exp(log_shares[0])
    if returns is None or explored >= 1:  # nothing to return to
        return log_shares
    with np.errstate(divide="ignore"):
        factor = np.log(returns) - np.log1p(-explored)
        return np.append(np.log(1 - returns), log_shares[1:] + factor)


def _of_those_left(log_shares: np.ndarray, gone: np.ndarray) -> np.ndarray:
    """With the shares of the behaviors whose items are gone given to all others: nobody returns to those."""
    left = np.zeros(len(log_shares), bool)  # as what pads it stays
    left[: 1 + len(gone)] = np.append(True, ~gone)
    return np.where(left, log_shares - np.logaddexp.reduce(log_shares[left]), -np.inf)


def _met_among(item: np.ndarray, met: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which behaviors are of an item that counts (not -1), where it stands, and the items that are not there.

    Those are to be put behind the others, in order of their numbers, so their places begin there.
    """
    known = np.flatnonzero(met >= 0)
    order = np.argsort(item)
    at = np.searchsorted(item, met[known], sorter=order)
    places = order[np.minimum(at, len(item) - 1)] if len(item) else np.zeros(len(known), np.int64)
    absent = item[places] != met[known] if len(item) else np.ones(len(known), bool)
    missing, nth = np.unique(met[known[absent]], return_inverse=True)
    places[absent] = len(item) + nth
    return known, places, missing


def _is_folder(index: IndexAt) -> bool:
    return isinstance(index, str | os.PathLike) and not is_database(index)


def _opened(model: Model, index: IndexAt, exact: bool, verify: bool) -> Searchable:
    if exact:
        return ExactIndex(model.searched_vectors(slice(None)), model.category_start, model.removed)
    if not isinstance(index, str | os.PathLike):
        return index.index_of(model)
    if is_database(index):
        return Database(str(index)).index_of(model)
    opened = Index.open(index, verify)
    if opened.manifest.made_from.get("model") != model.fingerprint:
        raise Mismatch(
            f"{opened.path} was made from another model than {model.path}. "
            f"Make it again with `longretriever index {model.path}`."
        )
    return opened


def trained_on(model: Model, verify: bool) -> Store:
    try:
        return Store.open(model.manifest.facts["store_path"], verify)
    except NotSaved as error:
        raise NotSaved(
            f"{model.path} was trained on a store that is not there any more ({error}) "
            "Pass another store of the same log: --store (store=)."
        ) from error
