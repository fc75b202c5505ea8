"""One generation of what is served: a model, its index, a store, joined with the journal of live events.

Everything that an answer needs hangs on one object, so that a newer one takes its place in one assignment and
requests on their way finish with the one that they began with. Nothing here knows HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from secrets import randbits
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from longretriever.errors import InputError, Mismatch, Unavailable, UnknownCategory
from longretriever.events import ITEM
from longretriever.retrieve.interests import INTERESTS, Interests, Pgin, RandomInTop, Top
from longretriever.retrieve.merge import MERGES, Merge
from longretriever.retrieve.popular import Popular
from longretriever.retrieve.retrieval import Retrieval
from longretriever.retrieve.retriever import WHOLE, Elsewhere, Retriever
from longretriever.retrieve.rules import Rules
from longretriever.saved import MANIFEST, opening, stamp
from longretriever.serve import wire
from longretriever.serve.settings import Clock
from longretriever.store.behaviors import Life
from longretriever.store.joined import Joined, LiveEvents
from longretriever.store.live import Event, LiveJournal, Reader


@dataclass(frozen=True)
class Source:
    """Where a generation is opened from; see `Retriever.load`.

    clock  what "now" is for a request that does not say: the wall clock's time, or "log", just after the
           newest event known of those asked about and of the store, for logs that ended long ago
    """

    model: Path
    store: Path | None = None
    index: Path | Elsewhere | None = None
    clock: Clock = "wall"
    threads: int = 1  # of the user tower

    def signature(self, store: Path | None = None) -> tuple[Any, ...]:
        """Changes whenever one of the folders is replaced. Costs a few looks at the disk.

        `store` is the one in use, where the model names it.
        """
        model = self.model.resolve()
        index = self.index if isinstance(self.index, Path) else model / "index"
        folders = [model] if self.is_elsewhere else [model, index, model / WHOLE / "index"]
        folders += [one for one in (self.store or store,) if one]
        return tuple(map(stamp, folders))

    @property
    def is_elsewhere(self) -> bool:
        """Whether the index is asked over a network."""
        return self.index is not None and not isinstance(self.index, Path)

    def check(self, replaces: Serving | None) -> None:
        """Raises `NotLoaded` where what searches elsewhere does not have this model yet."""
        if self.index is None or isinstance(self.index, Path):
            return
        found = self.fingerprints()
        before = replaces.fingerprints if replaces is not None else (None,) * len(found)
        for fingerprint, old in zip_longest(found, before[: len(found)]):
            self.index.check(fingerprint, old)

    def fingerprints(self) -> tuple[str, ...]:
        """Of the model, and of what it brings to search all items."""
        model = self.model.resolve()
        folders = [one for one in (model, model / WHOLE) if one == model or one.exists()]
        return tuple(opening(one, "model").fingerprint for one in folders)


class Serving:
    """A retriever ready to answer over the wire. Safe to share between threads."""

    def __init__(self, source: Source, journal: LiveJournal, replaces: Serving | None = None) -> None:
        """Open everything, and answer one request, so that what cannot serve is found here.

        Raises a `SavedError`, and `NotLoaded` where it could answer less than what it replaces.
        """
        self.source, self.journal = source, journal
        before = source.signature()
        source.check(replaces)
        self.fingerprints = source.fingerprints()
        self.retriever = Retriever.load(
            source.model, store=source.store, index=source.index, threads=source.threads
        )
        self.store, self.model = self.retriever.store, self.retriever.model
        self.reader = Reader(self.store, journal)
        self.popular = Popular(self.store, self.model, self.retriever.numbers)
        self.name = f"{self.model.method}-{self.model.fingerprint[:12]}"
        self.loaded = time.time()
        self.made = (self.model.path / MANIFEST).stat().st_mtime
        self._warm()
        self.signature = source.signature(self.store.path)
        if self.signature[: len(before)] != before:
            raise Mismatch(f"{source.model} was replaced while it was being opened. It will be tried again.")

    def _warm(self) -> None:
        """Touch what would be opened at the first request: a folder may be replaced before there is one."""
        ids = self.store.user_ids.take(range(min(1, self.store.n_users)))
        answer, *_ = self._answers(ids or [None], wire.Asking(k=10, explain=True), lambda stage: None)
        assert answer.candidates is not None
        for number_of in (self.store.item_ids.number_of, self.model.item_ids.number_of):
            number_of(0)
        self.store.titles(np.arange(min(1, self.store.n_items)))

    # -- candidates

    def retrieve(self, asked: wire.RetrieveAsked) -> wire.Answer:
        """The answer to one request. Raises `InputError`."""
        return self._timed([asked.user_id], asked)[0]

    def retrieve_many(self, asked: wire.BatchAsked) -> wire.BatchAnswer:
        """Answers in the order of the users; the same as one by one."""
        return wire.BatchAnswer(self._timed(asked.user_ids, asked))

    def _timed(self, user_ids: Sequence[int | str | None], asked: wire.Asking) -> list[wire.Answer]:
        watch = _Watch()
        answers = self._answers(user_ids, asked, watch)
        timings = watch.milliseconds()
        for answer in answers:
            answer.timings = timings
        return answers

    def _answers(
        self, user_ids: Sequence[int | str | None], asked: wire.Asking, lap: Callable[[str], None]
    ) -> list[wire.Answer]:
        for user_id in user_ids:
            if user_id is not None:
                check_id(user_id, self.store.user_ids.values, "user_id")
        lives = self.lives(user_ids, asked.now)
        lap("life")
        rules, merge = self._rules(asked), MERGES[asked.merge] if asked.merge else None
        seed = randbits(32) if asked.seed is None else asked.seed
        found = self._found(lives, asked, seed, rules, merge, lap)
        answers = [
            self._said(user_id, seed, *one, life.is_all, asked.explain)
            for user_id, life, one in zip(user_ids, lives, found, strict=True)
        ]
        lap("answer")
        return answers

    def _found(
        self,
        lives: Sequence[Life],
        asked: wire.Asking,
        seed: int,
        rules: Rules,
        merge: Merge | None,
        lap: Callable[[str], None],
    ) -> list[tuple[Retrieval, bool, bool]]:
        """Of each life what is retrieved, or what is popular where it is empty or nothing can be searched.

        And whether it is what is popular, and whether not all could be searched.
        """
        lived = [len(life.recent(1).item) > 0 for life in lives]
        known = [life for life, one in zip(lives, lived, strict=True) if one]
        interests = self._interests(asked.interests)
        answers = iter(
            self.retriever.answer(
                known, asked.k, rng=seed, interests=interests, merge=merge, rules=rules, lap=lap
            )
            if known
            else ()
        )
        popular = {} if merge is None else {"merge": merge}
        out = []
        for life, one in zip(lives, lived, strict=True):
            own = next(answers) if one else None
            partial = own is not None and own.partial
            if own is None or (partial and not len(own)):
                out.append((self.popular.answer(life, asked.k, rules, **popular), True, partial))
            else:
                out.append((own, False, partial))
        return out

    def lives(self, user_ids: Sequence[int | str | None], now: float | None) -> list[Life]:
        """Of each user, all that is known of him before `now`; an empty life for None.

        Where live events cannot be had, what the store knows: `Life.is_all` says it.
        """
        when: Any = now
        if now is None:
            when = time.time() if self.source.clock == "wall" else lambda newest: float(newest + 1)
        known = iter(self.reader.lives([u for u in user_ids if u is not None], when))
        return [self._nobody(when) if user_id is None else next(known) for user_id in user_ids]

    def _nobody(self, when: Any) -> Life:
        none = LiveEvents(*np.empty((4, 0), np.int64))
        placeholder: int | str = 0 if self.store.user_ids.are_integers else ""
        now = when(self.store.last_time) if callable(when) else when
        return Joined(self.store, [None], [placeholder], [none]).life(0, now)

    def _said(
        self,
        user_id: int | str | None,
        seed: int,
        found: Retrieval,
        fallback: bool,
        partial: bool,
        live: bool,
        explain: bool,
    ) -> wire.Answer:
        total = float(sum(context.share for context in found.contexts)) or 1.0
        contexts = [
            wire.ContextAsked(
                c.category_id,
                float(c.share),
                float(c.share) / total,
                c.behaviors,
                c.candidates,
                round(c.unsearched, 4),
            )
            for c in found.contexts
        ]
        candidates = _explained(found) if explain else _plain(found)
        said: Literal["popular"] | None = "popular" if fallback else None
        return wire.Answer(user_id, found.now, seed, self.name, said, partial, live, contexts, candidates, {})

    def _interests(self, asked: wire.InterestsAsked) -> Interests | None:
        """What chooses the contexts; None for the model's own."""
        if asked.select == "model":
            if asked.n is None and asked.m is None:
                return None
            own = self.retriever.interests
            if isinstance(own, Pgin):
                return Pgin(asked.n or own.k)
            return _random(asked)
        if asked.select == "random":
            return _random(asked)
        if asked.select == "top":
            return Top(asked.n or 20)
        if "pgin" not in self.selects:
            raise InputError(
                f"interests.select: pgin, but {self.name} foresees no categories. Use top or random."
            )
        return Pgin(asked.n or 20)

    def _rules(self, asked: wire.Asking) -> Rules:
        interests, categories = asked.interests, self.model.category_ids.values
        for field, ids in (("include", interests.include), ("exclude", interests.exclude)):
            for category in ids:
                check_id(category, categories, f"interests.{field}")
        for item in asked.exclude_items:
            check_id(item, self.model.items[ITEM], "exclude_items")
        return Rules(
            exclude_seen=asked.exclude_seen,
            exclude_items=asked.exclude_items,
            exclude_categories=interests.exclude,
            include_categories=interests.include,
            quotas={as_id(c, categories): n for c, n in interests.quotas.items()},
            boosts={as_id(c, categories): x for c, x in interests.boosts.items()},
            returns=asked.returns,
        )

    # -- events

    def live_events(self) -> int | None:
        """How many are newer than the store; None where they cannot be counted now."""
        try:
            return self.journal.count(self.reader.after)
        except Unavailable:
            return None

    def events(self, sent: Sequence[wire.EventSent], arrived: float) -> list[Event]:
        """Events as the journal takes them. Raises `InputError` for one that would never count."""
        return [self._event(event, i, arrived) for i, event in enumerate(sent)]

    def _event(self, sent: wire.EventSent, i: int, arrived: float) -> Event:
        where = f"events[{i}]"
        check_id(sent.user_id, self.store.user_ids.values, f"{where}.user_id")
        check_id(sent.item_id, self.store.items[ITEM], f"{where}.item_id")
        if sent.category_id is not None:
            check_id(sent.category_id, self.store.category_ids.values, f"{where}.category_id")
        category_id = sent.category_id
        if self.store.item_ids.number_of(sent.item_id) is None:
            category_id = self._category_at_model(sent.item_id, category_id)
            if category_id is None:
                raise InputError(
                    f"{where}.item_id: {sent.item_id!r} is not known here: send its category_id as well."
                )
        when = int(arrived if sent.timestamp is None else sent.timestamp)
        return Event(sent.user_id, sent.item_id, category_id, when, sent.behavior, sent.event_id)

    def _category_at_model(self, item_id: int | str, otherwise: int | str | None) -> int | str | None:
        """What an item that the store does not know belongs to, where it was added to the model."""
        item = self.model.item_ids.number_of(item_id)
        if item is None:
            return otherwise
        known: int | str = self.model.category_ids.take(self.model.category_of(np.array([item])))[0]
        return known

    def range_of(self, category_id: str) -> tuple[int, int]:
        """The item numbers of a category whose id comes as text. Raises `UnknownCategory`, `InputError`."""
        key = as_id(category_id, self.model.category_ids.values)
        number = self.model.category_ids.number_of(key)
        if number is None:
            raise UnknownCategory(f"category {key!r} is not among those of {self.name}.")
        start = self.model.category_start
        return int(start[number]), int(start[number + 1])

    @property
    def selects(self) -> list[str]:
        if not self.model.asks_contexts:
            return ["model"]
        foresees = ["pgin"] if (self.model.path / INTERESTS).exists() else []
        return ["model", *foresees, "top", "random"]


class _Watch:
    """Sums the time up to each call under the stage that it names."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._spent: dict[str, float] = {}

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self._spent[stage] = self._spent.get(stage, 0.0) + now - self._last
        self._last = now

    def milliseconds(self) -> dict[str, float]:
        spent = {**self._spent, "total": self._last - self._start}
        return {stage: round(1e3 * seconds, 3) for stage, seconds in spent.items()}


def _random(asked: wire.InterestsAsked) -> RandomInTop:
    n = asked.n or 5
    return RandomInTop(n, asked.m or max(20, n))


def _plain(found: Retrieval) -> list[wire.CandidateFound]:
    columns = zip(
        found.item_ids,
        found.category_ids,
        found.score.tolist(),
        range(1, len(found) + 1),
        found.source.tolist(),
        strict=True,
    )
    return [wire.CandidateFound(*row) for row in columns]


def _explained(found: Retrieval) -> list[wire.CandidateFound]:
    return [
        wire.CandidateFound(
            c.item_id,
            c.category_id,
            c.score,
            c.rank,
            int(context),
            c.title,
            c.cosine,
            c.log_prob,
            [wire.ReasonSaid(r.item_id, r.title, r.timestamp, r.behavior, r.similarity) for r in c.reasons],
        )
        for c, context in zip(found.candidates, found.source, strict=True)
    ]


def as_id(text: str, ids: pa.Array | pa.ChunkedArray) -> int | str:
    """An id out of a path or a key, where all is text; `ids` are those it is to be among."""
    if not pa.types.is_integer(ids.type):
        return text
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{text!r} is no id here: expected an integer, such as {_example(ids)}.") from None


def check_id(given: int | str, ids: pa.Array | pa.ChunkedArray, field: str) -> None:
    """An id of the wrong type would be unknown for ever, and nobody would be told."""
    integers = pa.types.is_integer(ids.type)
    if isinstance(given, int) != integers:
        kind = "integers" if integers else "strings"
        raise InputError(f"{field}: {given!r}, but ids here are {kind}, such as {_example(ids)}.")


def _example(ids: pa.Array | pa.ChunkedArray) -> str:
    return repr(ids[0].as_py()) if len(ids) else "none, there are no others yet"
