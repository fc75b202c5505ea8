"""Which shard has what now, and an index that asks them: searches go where the categories are.

Shards are addresses; what each holds it says itself, every second. From that follow groups of categories that
the same shards hold: one call for each group that a request needs, to one of its shards, the others if that
one fails or is slow. Of a context that nobody answers for, nothing is found, and that is said (`unsearched`);
the other contexts are as they would be. A shard that has gone over to another model refuses what was made
for this one, so what is found is always of the model asked for.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from longretriever.errors import InputError, NotLoaded, RequestFailed
from longretriever.index import CORPUS, Nearest, Part, Searchable, checked_queries, combined, summed
from longretriever.model.exported import Model
from longretriever.shards import wire
from longretriever.shards.calls import Call, Outcome, Server, Told, ask, log
from longretriever.shards.wire import Facts, Found, Range

LOOK = 1.0  # seconds between looks at what shards hold


class Group(NamedTuple):
    """Categories that the same shards hold."""

    ranges: list[Range]
    servers: tuple[Server, ...]


@dataclass(frozen=True)
class Layout:
    """Who has which category of one model.

    group  [C] which of `groups` each category is of, -1: nobody has it
    """

    groups: list[Group]
    group: np.ndarray


class Fleet:
    """All shards that are known, safe to share between threads; close it, or use it with `with`.

    `seconds` is for an answer, `hedge` after how many of them another shard with the same categories is asked
    as well (None: never). `told` hears of every try, see `calls.Told`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str | None = None,
        *,
        seconds: float = 0.5,
        hedge: float | None = 0.05,
        look: float = LOOK,
        told: Told = lambda url, how, seconds: None,
    ) -> None:
        if not urls or len(set(urls)) < len(urls):
            raise InputError(f"shards {', '.join(urls) or '(none)'}: expected addresses, each once.")
        self.servers = [Server(url, key) for url in urls]
        self.seconds, self.hedge, self.told = seconds, hedge, told
        self._facts: dict[str, Facts] = {}  # by url
        self._layouts: dict[str, Layout] = {}  # by model
        self._turns, self._stop, self._wake = itertools.count(), False, threading.Event()
        self.look_around()
        self._thread = threading.Thread(target=self._look_again, args=(look,), name="shards", daemon=True)
        self._thread.start()

    def look_around(self) -> None:
        """Ask every shard that is due what it holds."""
        due = [server for server in self.servers if server.is_due()]
        answers = ask([Call([server]) for server in due], wire.FACTS, seconds=1.0, method="GET")
        facts = dict(self._facts)
        for server, answer in zip(due, answers, strict=True):
            try:
                said = wire.decoded(answer.body, Facts) if answer.body is not None else None
            except InputError as error:
                server.failed(str(error), refused=True)
                continue
            if said is not None:
                facts[server.url] = said
                server.seen()
        if facts != self._facts:
            self._facts, self._layouts = facts, {}

    def _look_again(self, seconds: float) -> None:
        while True:
            self._wake.wait(seconds)
            self._wake.clear()
            if self._stop:
                return
            try:
                self.look_around()
            except Exception:  # else nobody would look ever again
                log.exception("looking at shards failed")

    def look_soon(self) -> None:
        """Something has changed."""
        self._wake.set()

    def layout(self, fingerprint: str) -> Layout:
        """Who has which category of a model, whether or not they are up."""
        found = self._layouts.get(fingerprint)
        if found is None:
            layouts, facts = self._layouts, self._facts
            found = layouts[fingerprint] = self._laid_out(fingerprint, facts)
        return found

    def _laid_out(self, fingerprint: str, facts: dict[str, Facts]) -> Layout:
        holding = [
            (server, holds)
            for server in self.servers
            for holds in facts.get(server.url, Facts([])).holds
            if holds.model == fingerprint
        ]
        n_categories = max((holds.categories for _, holds in holding), default=0)
        edges = {0, n_categories, *(edge for _, holds in holding for one in holds.ranges for edge in one)}
        groups: dict[tuple[Server, ...], list[Range]] = {}
        for first, end in itertools.pairwise(sorted(edges)):
            have = tuple(s for s, holds in holding if any(a <= first and end <= b for a, b in holds.ranges))
            if have:
                ranges = groups.setdefault(have, [])
                if ranges and ranges[-1][1] == first:
                    first = ranges.pop()[0]
                ranges.append((first, end))
        group = np.full(n_categories, -1, np.int64)
        for g, ranges in enumerate(groups.values()):
            for first, end in ranges:
                group[first:end] = g
        return Layout([Group(ranges, servers) for servers, ranges in groups.items()], group)

    def searchable(self, fingerprint: str) -> np.ndarray:
        """[C] whether each category of a model can be searched now."""
        layout = self.layout(fingerprint)
        up = np.array([*(any(s.up for s in group.servers) for group in layout.groups), False])
        return up[layout.group]

    def turn(self) -> int:
        """A number for each request: replicas take turns."""
        return next(self._turns)

    def in_order(self, group: Group, turn: int) -> list[Server]:
        """Those that are up, in turn, so that each gets its part of the work."""
        up = [server for server in group.servers if server.up]
        at = turn % len(up) if up else 0
        return up[at:] + up[:at]

    def check(self, fingerprint: str, instead_of: str | None = None) -> None:
        """Whether as large a share of a model can be searched as of the other, where one is given.

        Raises `NotLoaded`: that may change soon.
        """
        if instead_of is None:
            return
        now, before = (self.searchable(one) for one in (fingerprint, instead_of))
        if _share(now) < _share(before):
            raise NotLoaded(
                f"shards have {_share(now):.0%} of the categories of model {fingerprint[:12]}, and "
                f"{_share(before):.0%} of {instead_of[:12]}, which goes on. Have them load it; it will be "
                "tried again."
            )

    def index_of(self, model: Model) -> Sharded:
        return Sharded(self, model.fingerprint, model.category_start, model.searched_dim)

    def close(self) -> None:
        self._stop = True
        self._wake.set()
        self._thread.join(5)
        for server in self.servers:
            server.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Sharded(Searchable):
    """The index of one model, kept by a fleet of shards; safe to search from several threads."""

    def __init__(self, fleet: Fleet, fingerprint: str, category_start: np.ndarray, dimension: int) -> None:
        self.fleet, self.fingerprint, self.dimension = fleet, fingerprint, dimension
        self.category_start = np.asarray(category_start, np.int64)
        self.n_items, self.n_categories = int(self.category_start[-1]), len(self.category_start) - 1

    def search(
        self, user_vectors_ND: np.ndarray, contexts_N: np.ndarray, k: int, without: Sequence[int] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `Index.search`. Raises `RequestFailed` where some of it cannot be searched now."""
        near = self.nearest(user_vectors_ND, contexts_N, k, 1.0, k, without)
        self._check_all_searched(near, contexts_N)
        return near.item, near.cosine

    def log_normaliser(
        self,
        user_vectors_ND: np.ndarray,
        contexts_N: np.ndarray,
        scale: float | np.ndarray,
        items_Nk: np.ndarray,
        cosine_Nk: np.ndarray,
    ) -> np.ndarray:
        """See `Index.log_normaliser`; of single categories, searches again.

        The sum of all items is that of the shards that answer, as in `nearest`; -inf where none does. Raises
        `RequestFailed` where the shard of a category does not.
        """
        item_Nk, cosine_Nk = np.asarray(items_Nk), np.asarray(cosine_Nk)
        k = item_Nk.shape[-1]
        user_ND, context_N = checked_queries(
            user_vectors_ND, contexts_N, k, self.dimension, self.n_categories
        )
        scale_N = np.broadcast_to(np.asarray(scale, np.float64), len(user_ND))
        log_sum_N = np.full(len(user_ND), -np.inf)
        whole = context_N == CORPUS
        if (~whole).any():
            near = self.nearest(user_ND[~whole], context_N[~whole], k, scale_N[~whole], k)
            self._check_all_searched(near, context_N[~whole])
            log_sum_N[~whole] = near.normaliser
        if whole.any():
            rows = _Rows(user_ND[whole], context_N[whole], scale_N[whole], k=0, head=1, without=())
            parts = [said.part for said in self._ask(rows, np.arange(len(rows.user)), look_at_all=False)]
            if parts:
                log_sum_N[whole] = summed(parts, scale_N[whole], item_Nk[whole], cosine_Nk[whole])
        return log_sum_N

    def _check_all_searched(self, near: Nearest, contexts_N: np.ndarray) -> None:
        missing = np.asarray(contexts_N)[near.unsearched > 0]
        if len(missing):
            raise RequestFailed(
                f"no shard answers for context {missing[0]} (of {len(missing)}) of model "
                f"{self.fingerprint[:12]} now. See the log of the router, and /readyz of the shards.",
                503,
            )

    def nearest(
        self,
        user_vectors_ND: np.ndarray,
        contexts_N: np.ndarray,
        k: int,
        scale: float | np.ndarray,
        head: int,
        without: Sequence[int] = (),
    ) -> Nearest:
        """See `Searchable.nearest`: one way there and back, to all shards that are needed at once.

        A context that nobody answers for has no items and is `unsearched`; of all items, those of the shards
        that answer are found, and the sum is theirs.
        """
        user_ND, context_N = checked_queries(
            user_vectors_ND, contexts_N, k, self.dimension, self.n_categories
        )
        n = len(user_ND)
        scale_N = np.broadcast_to(np.asarray(scale, np.float64), n)
        out = Nearest(
            np.full((n, k), -1, np.int64),
            np.full((n, k), -np.inf, np.float32),
            np.full(n, -np.inf),
            np.ones(n),
        )
        rows = _Rows(user_ND, context_N, scale_N, k, head, tuple(without))
        whole = np.flatnonzero(context_N == CORPUS)
        answers = self._ask(rows, np.arange(n), look_at_all=False)
        for said in answers:
            for target, column in zip(out[:3], said.near[:3], strict=True):
                target[said.single] = column
            out.unsearched[said.single] = 0
        self._combine(rows, whole, answers, out)
        if not all(said.part.all_seen for said in answers) and (out.item[whole] < 0).any():
            answers = self._ask(rows, whole, look_at_all=True)  # the groups held fewer than k
            self._combine(rows, whole, answers, out)
        return out

    def _ask(self, rows: _Rows, which: np.ndarray, look_at_all: bool) -> list[_Answer]:
        """What the shards say to these rows, of those groups of categories for which one answers."""
        layout = self.fleet.layout(self.fingerprint)
        groups = _rows_by_group(layout, rows.context[which])
        whole = which[rows.context[which] == CORPUS]
        named, calls, turn = [], [], self.fleet.turn()
        for group, at in zip(layout.groups, groups, strict=True):
            mine = np.concatenate([which[at], whole])
            if len(mine):
                ranges = group.ranges if len(whole) else []
                named.append((group, mine, len(at)))
                calls.append(
                    Call(self.fleet.in_order(group, turn), rows.search(self, mine, ranges, look_at_all))
                )
        answers = []
        for (group, mine, n), outcome in zip(named, self._called(calls), strict=True):
            found = self._understood(outcome, rows.context[mine], rows.k)
            if found is not None:
                answers.append(_Answer(group, mine[:n], *found))
        return answers

    def _combine(self, rows: _Rows, whole: np.ndarray, answers: list[_Answer], out: Nearest) -> None:
        """Fill in the answers to the rows of all items."""
        if not len(whole) or not answers:
            return
        start, ranges = self.category_start, [one for said in answers for one in said.group.ranges]
        searched = sum(int(start[end] - start[first]) for first, end in ranges)
        parts = [said.part for said in answers]
        total = combined(parts, rows.k, rows.scale[whole], rows.head)
        width = total.item.shape[1]  # fewer than k where parts have fewer in all
        for target, column in ((out.item, total.item), (out.cosine, total.cosine)):
            target[whole, :width] = column
        out.normaliser[whole] = total.normaliser
        out.unsearched[whole] = 1 - searched / max(1, self.n_items)

    def _called(self, calls: list[Call]) -> list[Outcome]:
        fleet = self.fleet
        outcomes = ask(calls, wire.SEARCH, seconds=fleet.seconds, hedge=fleet.hedge, told=fleet.told)
        if any(outcome.failures for outcome in outcomes):
            fleet.look_soon()
        return outcomes

    def _understood(self, outcome: Outcome, context_n: np.ndarray, k: int) -> tuple[Nearest, Part] | None:
        if outcome.body is None:
            return None
        try:
            return wire.answers_of(wire.decoded(outcome.body, Found), context_n, k)
        except InputError as error:
            outcome.failures.append(str(error))
            return None


class _Answer(NamedTuple):
    """What one group's shard said: to the rows of single categories, and to all rows of all items."""

    group: Group
    single: np.ndarray  # which rows `near` answers
    near: Nearest
    part: Part


class _Rows(NamedTuple):
    """What is searched for, whoever is asked."""

    user: np.ndarray
    context: np.ndarray
    scale: np.ndarray
    k: int
    head: int
    without: tuple[int, ...]

    def search(self, index: Sharded, at: np.ndarray, ranges: Sequence[Range], look_at_all: bool) -> bytes:
        given = self.user[at], self.context[at], self.scale[at]
        return wire.encoded(
            wire.search_of(
                index.fingerprint,
                *given,
                k=self.k,
                head=self.head,
                ranges=ranges,
                without=self.without if ranges else (),
                look_at_all=look_at_all,
            )
        )


def _share(there: np.ndarray) -> float:
    return float(there.mean()) if len(there) else 0.0


def _rows_by_group(layout: Layout, context_n: np.ndarray) -> list[np.ndarray]:
    """For each group, which rows are of a category of it; those of all items are of none."""
    group_n = np.full(len(context_n), -1)
    known = (context_n >= 0) & (context_n < len(layout.group))
    group_n[known] = layout.group[context_n[known]]
    return [np.flatnonzero(group_n == g) for g in range(len(layout.groups))]
