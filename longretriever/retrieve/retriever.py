"""From a user and a moment to candidates with their reasons: the whole request in one place.

Interests choose contexts, each context's last behaviors become one user vector, one call searches all
contexts, the lists are merged. The store may be newer than the model (another ingest of the same log, with
new users, items and behaviors): ids are matched when a retriever is made, and an item that the model has
never seen still counts for its category. Nothing here reads the clock or draws from a hidden generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from longretriever.errors import InputError, Mismatch, UnknownCategory
from longretriever.events import CATEGORY, ITEM, TITLE, USER
from longretriever.index import ExactIndex, Index, build
from longretriever.model.exported import Model, Request, unit
from longretriever.retrieve.interests import Contexts, Interests, RandomInTop
from longretriever.retrieve.merge import Merge, Merged, Ranked, boosted, capped, probability
from longretriever.saved import sync
from longretriever.store.behaviors import Behaviors, Life, Store

BATCH = 64  # users that share one call of the user tower and of the index
REASONS = 3  # behaviors named for a candidate


@dataclass(frozen=True)
class Reason:
    """A behavior that spoke for a candidate: one of those in its context that are most like it."""

    item_id: int | str
    title: str | None
    timestamp: int  # seconds since the epoch
    behavior: str
    similarity: float  # cosine of the two item vectors


@dataclass(frozen=True)
class Candidate:
    rank: int  # from 1
    item_id: int | str
    title: str | None
    category_id: int | str
    score: float  # what the merge ordered by
    cosine: float  # of user vector and item vector; comparable within a category only
    log_prob: float  # log P(item | user, category), nats
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class Context:
    """A category that was asked about."""

    category_id: int | str
    share: float  # P(category | user)
    behaviors: int  # that the user vector was made from
    candidates: int  # of the merged list


class Asked(NamedTuple):
    """One context of a request on its way: what was asked, and the answer once it is there."""

    request: Request  # in the model's numbers
    spoke: (
        Behaviors  # in the store's numbers: the behaviors of the context, or the recent ones if it has none
    )
    share: float
    answer: Ranked


class Retrieval:
    """The answer to one request. Arrays at once; ids, titles and reasons when they are asked for.

    item    [n] item numbers of the model, best first
    source  [n] which of `contexts` each came from
    score   [n] what the merge ordered by
    """

    def __init__(self, retriever: Retriever, life: Life, asked: Sequence[Asked], merged: Merged) -> None:
        self._retriever, self._life, self._asked = retriever, life, asked
        self.item, self.source, self.score = merged

    def __len__(self) -> int:
        return len(self.item)

    @property
    def user_id(self) -> Any:
        return self._life.store.user_ids.take([self._life.user])[0]

    @property
    def now(self) -> float:
        """Only behaviors strictly before this second were looked at."""
        return self._life.now

    @property
    def item_ids(self) -> list[Any]:
        return self._retriever.model.item_ids.take(self.item)

    @property
    def category_ids(self) -> list[Any]:
        """Of each candidate."""
        return self._retriever.model.category_ids.take(self.asked_categories[self.source])

    @property
    def asked_categories(self) -> np.ndarray:
        """[contexts] category numbers of the model, in the order in which they were chosen."""
        return np.array([a.request.category for a in self._asked], np.int64)

    @cached_property
    def contexts(self) -> list[Context]:
        """The categories asked about, in the order in which they were chosen."""
        ids = self._retriever.model.category_ids.take(self.asked_categories)
        count = np.bincount(self.source, minlength=len(ids))
        return [
            Context(category_id, a.share, len(a.request.behaviors.item), int(n))
            for category_id, a, n in zip(ids, self._asked, count, strict=True)
        ]

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Best first. Costs about 20 microseconds each, most of it for the reasons."""
        cosine, log_prob = np.empty(len(self)), np.empty(len(self))
        reasons: list[tuple[Reason, ...]] = [()] * len(self)
        for source, asked in enumerate(self._asked):
            mine = np.flatnonzero(self.source == source)
            order = np.argsort(asked.answer.item)
            at = order[np.searchsorted(asked.answer.item, self.item[mine], sorter=order)]
            cosine[mine], log_prob[mine] = asked.answer.cosine[at], asked.answer.log_prob[at]
            for i, spoke in zip(mine, self._reasons(asked, self.item[mine]), strict=True):
                reasons[i] = spoke
        columns = zip(
            self.item_ids,
            _titles(self._retriever.model.items, self.item),
            self.category_ids,
            self.score,
            cosine,
            log_prob,
            reasons,
            strict=True,
        )
        return [
            Candidate(rank, item_id, title, category_id, float(score), float(c), float(p), spoke)
            for rank, (item_id, title, category_id, score, c, p, spoke) in enumerate(columns, start=1)
        ]

    def _reasons(self, asked: Asked, items: np.ndarray) -> list[tuple[Reason, ...]]:
        """For each item, the behaviors of its context whose items are most like it, the likest first.

        Of an item that was met several times, the last time speaks.
        """
        request, model, store = asked.request, self._retriever.model, self._life.store
        behaviors = request.behaviors if len(request.behaviors.item) else request.recent
        if len(behaviors.item) == 0 or len(items) == 0:
            return [()] * len(items)
        _, newest = np.unique(asked.spoke.item[::-1], return_index=True)
        last = np.sort(len(behaviors.item) - 1 - newest)
        similarity = model.item_vectors(items) @ unit(model.tokens(behaviors.pick(last))).T
        likest = np.argsort(-similarity, axis=1, kind="stable")[:, :REASONS]
        spoke = asked.spoke.pick(last)
        said = [
            (item_id, title, time, store.behaviors[kind])
            for item_id, title, time, kind in zip(
                store.item_ids.take(spoke.item),
                _titles(store.items, spoke.item),
                spoke.time.tolist(),
                spoke.kind,
                strict=True,
            )
        ]
        return [
            tuple(Reason(*said[b], similarity=float(similarity[i, b])) for b in row)
            for i, row in enumerate(likest)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        return {
            "user_id": self.user_id,
            "now": self.now,
            "contexts": [asdict(c) for c in self.contexts],
            "candidates": [asdict(c) for c in self.candidates],
        }


@dataclass(frozen=True)
class Rules:
    """What a request may demand beyond the user's taste; ids are the log's own."""

    exclude_seen: bool = False  # items that the user met before `now`
    exclude_items: Collection[int | str] = ()
    exclude_categories: Collection[int | str] = ()
    include_categories: Collection[int | str] = ()  # asked about in any case, after those chosen
    quotas: Mapping[int | str, int] | None = None  # at most so many candidates of a category
    boosts: Mapping[int | str, float] | None = None  # factor on a category's share, see `merge`


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
        self._numbers = _Numbers(store, model)

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
        behaviors = Store.open(store or model.manifest.facts["store_path"], verify)
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
        life = self.store.life(self.store.user_number(user_id), now)
        return self.answer([life], k, rng=rng, interests=interests, merge=merge, rules=rules)[0]

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
        ruled = _Ruled(rules, self.model)
        owner: list[int] = []
        shares: list[float] = []
        rows: list[tuple[Request, Behaviors]] = []
        for i, life in enumerate(lives):
            draw = np.random.default_rng([rng, life.user]) if isinstance(rng, int) else rng
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
            Retrieval(self, life, mine, merge(ruled.lists([a.answer for a in mine]), k))
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
        self, rows: list[Request], lives: Sequence[Life], shares: Sequence[float], k: int, ruled: _Ruled
    ) -> list[Ranked]:
        if not rows:
            return []
        user_ND = self.model.user_vectors(rows)
        context_N = np.array([r.category for r in rows])
        unwanted = self._unwanted(rows, lives, ruled)
        largest = int(np.diff(self.model.category_start)[context_N].max())
        fetch = max(1, min(k + max(map(len, unwanted)), largest))
        item_Nk, cosine_Nk = self.index.search(user_ND, context_N, fetch)
        normaliser_N = self.index.log_normaliser(user_ND, context_N, self.model.scale, item_Nk, cosine_Nk)
        answers = []
        for i, row in enumerate(rows):
            keep = item_Nk[i] >= 0
            if len(unwanted[i]):
                keep &= ~np.isin(item_Nk[i], unwanted[i])
            item, cosine = item_Nk[i][keep][:k], cosine_Nk[i][keep][:k]
            log_prob = self.model.scale * cosine.astype(np.float64) - normaliser_N[i]
            answers.append(Ranked(row.category, shares[i], item, cosine, log_prob))
        return answers

    def _unwanted(self, rows: list[Request], lives: Sequence[Life], ruled: _Ruled) -> list[np.ndarray]:
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
            pending.append(self.store.life(self.store.user_number(user_id), now))
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
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
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


class _Ruled:
    """`Rules` in the model's numbers."""

    def __init__(self, rules: Rules, model: Model) -> None:
        self.rules = rules
        self.items = np.unique(
            np.array(
                [n for n in map(model.item_ids.number_of, rules.exclude_items) if n is not None], np.int64
            )
        )
        self.excluded = {_category(model, c) for c in rules.exclude_categories}
        self.included = [_category(model, c) for c in rules.include_categories]
        self.quotas = {_category(model, c): n for c, n in (rules.quotas or {}).items()}
        self.boosts = {_category(model, c): x for c, x in (rules.boosts or {}).items()}

    def contexts(self, chosen: Contexts) -> list[tuple[int, float]]:
        """Category and share of each context to ask about."""
        out = [
            (int(c), float(s))
            for c, s in zip(chosen.category, chosen.share, strict=True)
            if c not in self.excluded
        ]
        present = {c for c, _ in out}
        least = min(
            (s for _, s in out), default=1.0
        )  # one that was not chosen is wanted no more than the last
        return out + [(c, least) for c in self.included if c not in present]

    def lists(self, lists: Sequence[Ranked]) -> Sequence[Ranked]:
        if self.boosts:
            lists = boosted(lists, self.boosts)
        return capped(lists, self.quotas) if self.quotas else lists


def _category(model: Model, category_id: int | str) -> int:
    number = model.category_ids.number_of(category_id)
    if number is None:
        raise UnknownCategory(
            f"category {category_id!r} is not among the {len(model.category_ids):,} categories of "
            f"{model.path} (such as {model.category_ids.take([0])[0]!r})."
        )
    return number


class _Numbers:
    """From the store's numbers to the model's, by id: the store may be of a later day than the model.

    item, category [store numbers] -> model numbers or -1; kind -> model codes or 0; `*_of_model` the inverse.
    """

    def __init__(self, store: Store, model: Model) -> None:
        self.same = model.manifest.made_from.get("store") == store.fingerprint
        self.item = _matched(store.items[ITEM], model.items[ITEM])
        self.category = _matched(store.category_ids.values, model.category_ids.values)
        self.item_of_model = _inverse(self.item, model.n_items)
        self.category_of_model = _inverse(self.category, len(model.category_ids))
        known = {kind: code for code, kind in enumerate(model.behaviors)}
        self.kind = np.array([known.get(kind, 0) for kind in store.behaviors] or [0], np.int64)
        mine = {field.name: (i, field) for i, field in enumerate(store.profile_fields)}
        self._profile = [
            (mine[f.name][0], mine[f.name][1].codes_in(f)) if f.name in mine else None
            for f in model.profile_fields
        ]

    def items(self, items: np.ndarray) -> np.ndarray:
        """Those that the model knows."""
        found = self.item[items]
        return found[found >= 0]

    def contexts(self, chosen: Contexts) -> Contexts:
        """Those that the model knows."""
        category = self.category[chosen.category]
        return Contexts(category[category >= 0], chosen.share[category >= 0])

    def known(self, b: Behaviors) -> Behaviors:
        """Those of a category that the model knows; of the others it can say nothing."""
        return b if self.same else b.pick(self.category[b.category] >= 0)

    def behaviors(self, b: Behaviors) -> Behaviors:
        """Known ones in the model's numbers; an item that the model has never seen is -1."""
        if self.same:
            return b
        return Behaviors(self.item[b.item], self.category[b.category], b.time, self.kind[b.kind])

    def profile(self, codes: np.ndarray) -> np.ndarray:
        return np.array(
            [0 if field is None else field[1][codes[field[0]]] for field in self._profile], np.int64
        )


def _titles(items: pa.Table, numbers: np.ndarray) -> list[str | None]:
    """None where the log's owner gave none."""
    if TITLE not in items.column_names:
        return [None] * len(numbers)
    return items[TITLE].take(pa.array(np.asarray(numbers, np.int64))).to_pylist()


def _matched(ids: Any, among: Any) -> np.ndarray:
    """[len(ids)] where each id stands in `among`, -1 where it does not."""
    if ids.type != among.type:
        raise Mismatch(
            f"the store's ids are {ids.type}, the model's {among.type}. "
            "Ingest the log with ids of the same type."
        )
    found = pa.compute.fill_null(pa.compute.index_in(ids, value_set=among), -1)
    return found.to_numpy().astype(np.int64)


def _inverse(numbers: np.ndarray, size: int) -> np.ndarray:
    out = np.full(size, -1, np.int64)
    at = np.flatnonzero(numbers >= 0)
    out[numbers[at]] = at
    return out


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
