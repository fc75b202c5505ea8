"""From a user and a moment to candidates with their reasons: the whole request in one place.

Interests choose contexts, each context's last behaviors become one user vector, one call searches all
contexts, the lists are merged. The store may be newer than the model (another ingest of the same log, with
new users, items and behaviors): ids are matched when a retriever is made, and an item that the model has
never seen still counts for its category. Nothing here reads the clock or draws from a hidden generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from longretriever.errors import InputError, Mismatch, NotSaved
from longretriever.events import CATEGORY, ITEM, LATEST, USER
from longretriever.index import ExactIndex, Index, build
from longretriever.model.exported import Model, Request
from longretriever.retrieve.interests import Interests, RandomInTop
from longretriever.retrieve.merge import Merge, Ranked, probability
from longretriever.retrieve.numbers import Numbers
from longretriever.retrieve.retrieval import Asked, Retrieval
from longretriever.retrieve.rules import Ruled, Rules
from longretriever.saved import beside, sync
from longretriever.store.behaviors import Behaviors, Life, Store

BATCH = 64  # users that share one call of the user tower and of the index


class Retriever:
    """A model, its index and a store of behaviors, ready to answer. Safe to share between threads."""

    def __init__(
        self,
        model: Model,
        index: Index | ExactIndex,
        store: Store,
        *,
        interests: Interests | None = None,
        merge: Merge = probability,
    ) -> None:
        self.model, self.index, self.store = model, index, store
        self.interests: Interests = interests or RandomInTop()
        self.merge = merge
        self._numbers = Numbers(store, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        store: str | os.PathLike[str] | None = None,
        index: str | os.PathLike[str] | None = None,
        exact: bool = False,
        interests: Interests | None = None,
        merge: Merge = probability,
        verify: bool = False,
        threads: int = 1,
    ) -> Retriever:
        """Open a model folder, with `path/index` and the store it was trained on unless others are given.

        `exact=True` scans all item vectors instead of opening an index. `threads` is for the user tower.
        Raises a `SavedError` when a folder is absent, damaged, or the index is not of this model.
        """
        model = Model.open(path, verify, threads)
        behaviors = Store.open(store, verify) if store else _trained_on(model, verify)
        if exact:
            vectors = model.item_vectors(slice(None))
            return cls(
                model, ExactIndex(vectors, model.category_start), behaviors, interests=interests, merge=merge
            )
        opened = Index.open(index or Path(path) / "index", verify)
        if opened.manifest.made_from.get("model") != model.fingerprint:
            raise Mismatch(
                f"{opened.path} was made from another model than {model.path}. "
                f"Make it again with `longretriever index {path}`."
            )
        return cls(model, opened, behaviors, interests=interests, merge=merge)

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
    ) -> list[Retrieval]:
        """The answers to several requests at once: one call of the user tower, one of the index."""
        if k < 1:
            raise InputError(f"k={k}, expected at least 1.")
        ruled = Ruled(rules, self.model)
        owner: list[int] = []
        shares: list[float] = []
        rows: list[tuple[Request, Behaviors]] = []
        for i, life in enumerate(lives):
            draw = rng if isinstance(rng, np.random.Generator) else np.random.default_rng([rng, life.user])
            chosen = self._numbers.contexts((interests or self.interests)(life, draw))
            contexts = ruled.contexts(chosen)
            rows += self._requests(life, [category for category, _ in contexts])
            shares += [share for _, share in contexts]
            owner += [i] * len(contexts)
        answers = self._search([r for r, _ in rows], [lives[i] for i in owner], shares, k, ruled)
        asked: list[list[Asked]] = [[] for _ in lives]
        for i, (request, spoke), share, answer in zip(owner, rows, shares, answers, strict=True):
            asked[i].append(Asked(request, spoke, share, answer))
        merge = merge or self.merge
        return [
            Retrieval(self.model, life, mine, merge(ruled.lists([a.answer for a in mine]), k))
            for life, mine in zip(lives, asked, strict=True)
        ]

    def _requests(self, life: Life, categories: Sequence[int]) -> list[tuple[Request, Behaviors]]:
        """Rows of the user tower for one life, each with the behaviors that speak in it."""
        numbers = self._numbers
        lately = numbers.known(life.recent(self.model.recent_length))
        recent, profile = numbers.behaviors(lately), numbers.profile(life.profile())
        out = []
        for category in categories:
            at_store = int(numbers.category_of_model[category])
            met = life.in_context(at_store, self.model.context_length)
            request = Request(category, numbers.behaviors(met), recent, profile)
            out.append((request, met if len(met.item) else lately))
        return out

    def _search(
        self, rows: list[Request], lives: Sequence[Life], shares: Sequence[float], k: int, ruled: Ruled
    ) -> list[Ranked]:
        if not rows:
            return []
        user_ND = self.model.user_vectors(rows)
        context_N = np.array([r.category for r in rows])
        unwanted = self._unwanted(rows, lives, ruled)
        largest = int(np.diff(self.model.category_start)[context_N].max())
        fetch = max(1, min(k + max(map(len, unwanted)), largest))
        item_Nk, cosine_Nk = self.index.search(user_ND, context_N, fetch)
        # By the first k alone: what others of the call have fetched must not change a user's answer.
        head_Nk = item_Nk[:, :k], cosine_Nk[:, :k]
        normaliser_N = self.index.log_normaliser(user_ND, context_N, self.model.scale, *head_Nk)
        answers = []
        for i, row in enumerate(rows):
            keep = item_Nk[i] >= 0
            if len(unwanted[i]):
                keep &= ~np.isin(item_Nk[i], unwanted[i])
            item, cosine = item_Nk[i][keep][:k], cosine_Nk[i][keep][:k]
            log_prob = self.model.scale * cosine.astype(np.float64) - normaliser_N[i]
            answers.append(Ranked(row.category, shares[i], item, cosine, log_prob))
        return answers

    def _unwanted(self, rows: list[Request], lives: Sequence[Life], ruled: Ruled) -> list[np.ndarray]:
        """For each row, item numbers of its category that must not come back."""
        seen: dict[int, np.ndarray] = {}
        out = []
        for row, life in zip(rows, lives, strict=True):
            unwanted = ruled.items
            if ruled.rules.exclude_seen:
                if id(life) not in seen:
                    seen[id(life)] = np.sort(self._numbers.items(life.items()))
                unwanted = np.union1d(unwanted, seen[id(life)]) if len(ruled.items) else seen[id(life)]
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
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Candidates of many users to a Parquet file: user_id, rank, item_id, category_id, score.

        Returns the number of rows. The file appears only when it is complete.
        """
        target = Path(out)
        partial = beside(target, "partial")
        schema = pa.schema(
            [
                (USER, self.store.user_ids.values.type),
                ("rank", pa.int32()),
                (ITEM, self.model.items[ITEM].type),
                (CATEGORY, self.model.category_ids.values.type),
                ("score", pa.float32()),
            ]
        )
        rows = 0
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                answers = self.retrieve_many(user_ids, k, now=now, seed=seed, rules=rules, progress=progress)
                for table in self._tables(answers, schema):
                    writer.write_table(table)
                    rows += len(table)
            sync(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return rows

    def _tables(self, answers: Iterator[Retrieval], schema: pa.Schema) -> Iterator[pa.Table]:
        while group := list(islice(answers, 16 * BATCH)):
            length = [len(a) for a in group]
            user = self.store.user_ids.values.take(pa.array(np.repeat([a._life.user for a in group], length)))
            item = np.concatenate([a.item for a in group])
            category = np.searchsorted(self.model.category_start, item, side="right") - 1
            yield pa.table(
                [
                    user,
                    np.concatenate([np.arange(1, n + 1, dtype=np.int32) for n in length]),
                    self.model.items[ITEM].take(pa.array(item)).combine_chunks(),
                    self.model.category_ids.values.take(pa.array(category)),
                    np.concatenate([a.score for a in group]).astype(np.float32),
                ],
                schema=schema,
            )

    def store_categories(self, categories: np.ndarray) -> np.ndarray:
        """The store's numbers of category numbers of the model, -1 where the store has no such category."""
        return self._numbers.category_of_model[categories]

    def store_items(self, items: np.ndarray) -> np.ndarray:
        """The store's numbers of item numbers of the model, -1 where the store has no such item."""
        return self._numbers.item_of_model[items]


def _trained_on(model: Model, verify: bool) -> Store:
    try:
        return Store.open(model.manifest.facts["store_path"], verify)
    except NotSaved as error:
        raise NotSaved(
            f"{model.path} was trained on a store that is not there any more ({error}) "
            "Pass another store of the same log: --store (store=)."
        ) from error


def index_model(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Build the index of a model folder, by default inside it, and return where it is."""
    model = Model.open(path)
    target = Path(out) if out else Path(path) / "index"
    chunks = (model.item_vectors(slice(at, at + (1 << 16))) for at in range(0, model.n_items, 1 << 16))
    build(chunks, model.category_start, target, made_from={"model": model.fingerprint}, progress=progress)
    return target
