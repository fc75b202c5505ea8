"""From the store to training steps: every batch holds samples of one category only.

A sample is an event and the user's behaviors in its category strictly before it. Rows of samples stream
past in a shuffled order and gather in a cache, one buffer for each category, which releases a batch when
a buffer is full or has waited too long; so no batch mixes categories (LongRetriever section 2.3), no
small category starves and none is dropped. A step carries several batches, each with a softmax of its own:
that keeps every negative inside the target's category and the processor busy even where categories are small.

What the papers compare with differs in two switches of `Sampling`: `along="life"` lets a sample look back on
behaviors of any category, and `mixed` lets items of any category compete.

Everything here is NumPy on slices of the memory-mapped store: memory does not grow with the length of lives.

B rows, N behaviors of a row, S samples, R recent behaviors, P profile fields, U distinct items of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import numpy as np

from longretriever.errors import InputError
from longretriever.model.age import age_class
from longretriever.model.fading import oldest, weight
from longretriever.store.behaviors import Store, spread

_BLOCK = 16  # groups that stay together in the shuffle: they lie side by side on disk
_WINDOW = 64  # blocks that are shuffled and handed to the cache at once
_WIDTHS = np.array(
    [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 26, 33, 41, 50, 64, 80, 100, 128, 160, 200, 256, 320, 400, 512]
)


class Rows(NamedTuple):
    """Runs of events to predict, each within one (user, category) group. Every field is [n].

    Targets are the event rows `first` to `stop` - 1; what they may look back on begins at `start`.
    """

    group: np.ndarray
    start: np.ndarray
    first: np.ndarray
    stop: np.ndarray

    def take(self, index: np.ndarray | slice) -> Rows:
        return Rows(*(field[index] for field in self))

    @property
    def samples(self) -> np.ndarray:
        return self.stop - self.first


def of_heavy(size: np.ndarray, most: int | None) -> np.ndarray:
    """The share of the events of users of so many that leaves each about `most`; None: all."""
    return np.minimum(1.0, (most or np.inf) / np.maximum(size, 1))


def concatenate(rows: Iterable[Rows]) -> Rows:
    return Rows(*(np.concatenate(field) for field in zip(*rows, strict=True)))


class Bucket(NamedTuple):
    """Rows of similar length, padded to the longest of them."""

    item: np.ndarray  # [B, N] positions in `Step.numbers`; padding points at 0
    kind: np.ndarray  # [B, N]
    length: np.ndarray  # [B] behaviors that are no padding
    profile: np.ndarray  # [B, P]


class Contest(NamedTuple):
    """One category's batch: its samples, and the items that compete in its softmax."""

    samples: slice  # of the step's samples
    candidate: slice | np.ndarray  # positions in `Step.numbers`
    target: np.ndarray  # [samples] positions in `candidate`
    log_q: np.ndarray | None  # [candidates] log probability of competing; None when all items do


class Step(NamedTuple):
    """What one optimizer step, or a part of one, needs as arrays: all that touches the store is done."""

    numbers: np.ndarray  # [U] distinct item numbers, ascending
    buckets: list[Bucket]
    state: np.ndarray  # [S] which state (over all tokens of all buckets) knows the sample's past
    target: np.ndarray  # [S] positions in `numbers`
    category: np.ndarray  # [S] of the target
    recent: np.ndarray  # [S, R] positions in `numbers`, newest first
    recent_count: np.ndarray  # [S]
    since: np.ndarray  # [S, 2] age class of the last behavior: of the context, of any category
    past: np.ndarray  # [S, N] the token of each behavior that the state knows, newest first
    past_item: np.ndarray  # [S, N] the same behaviors as positions in `numbers`
    past_age: np.ndarray  # [S, N] their age classes
    past_count: np.ndarray  # [S]
    contests: list[Contest]
    tokens: int  # behaviors that are no padding
    padded: int  # with padding

    @property
    def samples(self) -> int:
        return len(self.state)

    @property
    def chance(self) -> float:
        """Summed loss of guessing evenly: log of the number of competitors, for each sample."""
        return float(
            sum((c.samples.stop - c.samples.start) * np.log(_count(c.candidate)) for c in self.contests)
        )


class _Draft(NamedTuple):
    """A part of a step whose items are still item numbers. Fields as in `Step`."""

    events: np.ndarray  # [S] event rows of the samples
    category: np.ndarray
    state: np.ndarray
    buckets: list[Bucket]
    recent: np.ndarray
    recent_count: np.ndarray
    since: np.ndarray
    past: _Past
    candidates: list[np.ndarray]  # for each category of the part, in its order
    cuts: np.ndarray  # where its samples begin

    def items(self) -> list[np.ndarray]:
        return [*(b.item for b in self.buckets), self.recent, *self.candidates]


class _Past(NamedTuple):
    """The behaviors that each sample's state knows, newest first; see `Step`."""

    token: np.ndarray
    item: np.ndarray
    age: np.ndarray
    known: np.ndarray


def _count(candidate: slice | np.ndarray) -> int:
    return candidate.stop - candidate.start if isinstance(candidate, slice) else len(candidate)


@dataclass(frozen=True)
class Sampling:
    """How samples are cut and grouped."""

    packed: bool = True  # rows of many samples (causal), or one sample a row (cls)
    along: Literal["context", "life"] = "context"  # what a sample looks back on
    mixed: bool = False  # items of any category compete, and batches mix categories
    context_length: int = 50  # L: behaviors that a sample may look back on; 0: none but the recent ones
    recent_length: int = 20  # R, with the next; 0: none
    life_sample: int = 0  # of the R: behaviors spread evenly over what is older than the others
    within: int | None = None  # look back on the user's last so many behaviors only
    most: int | None = None  # samples of a user in an epoch, about; None: all
    half_life: float | None = (
        None  # days in which an event's chance to be in an epoch halves; 0, None: none fades
    )
    distance: float = 0.0  # share of samples that are asked for earlier than just before the event
    returns: bool = False  # list what each state knows, for a model that points back at it
    overlap: int = 8  # behaviors of context that a packed row repeats from the row before it
    samples: int = 4096  # of a step, and of a full batch
    max_wait: int = 16  # steps after which a buffer is released unfilled
    whole_up_to: int = 8192  # items: more than these compete by sample
    sampled_negatives: int = 2048

    def __post_init__(self) -> None:
        if self.along == "life" and not self.mixed:
            raise InputError(
                "along='life' with mixed=False: a row of a life holds samples of several categories, which "
                "would have to be kept apart. Pass mixed=True."
            )


class Cost(NamedTuple):
    """What a step of a shard may cost, and what makes it up; in any unit."""

    budget: float
    of_sample: np.ndarray  # [C] of that category
    of_batch: np.ndarray  # [C] beside its samples


class CategoryCache:
    """A buffer for each category; hands out one-category batches.

    `full` samples release a buffer at once, `max_wait` samples seen since its oldest row release it
    unfilled, `flush` releases the rest. What goes in comes out exactly once.
    """

    def __init__(self, full: int, max_wait: int) -> None:
        self.full, self.max_wait, self.seen = full, max_wait, 0
        self._rows: dict[int, list[Rows]] = {}
        self._samples: dict[int, int] = {}
        self._since: dict[int, int] = {}  # in order of arrival, so the first is the oldest

    def add(self, category: np.ndarray, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Put rows in; yields (category, rows) of every buffer that is full or has waited too long."""
        order = np.argsort(category, kind="stable")
        category, rows = category[order], rows.take(order)
        cuts = np.flatnonzero(np.diff(category)) + 1
        for part in np.split(np.arange(len(category)), cuts):
            if len(part) == 0:
                continue
            c, mine = int(category[part[0]]), rows.take(slice(part[0], part[-1] + 1))
            self._rows.setdefault(c, []).append(mine)
            self._since.setdefault(c, self.seen)
            self._samples[c] = self._samples.get(c, 0) + int(mine.samples.sum())
            self.seen += int(mine.samples.sum())
            if self._samples[c] >= self.full:
                yield self._release(c)
        while self._since:
            oldest = next(iter(self._since))
            if self.seen - self._since[oldest] < self.max_wait:
                return
            yield self._release(oldest)

    def flush(self) -> Iterator[tuple[int, Rows]]:
        while self._since:
            yield self._release(next(iter(self._since)))

    def _release(self, category: int) -> tuple[int, Rows]:
        del self._since[category], self._samples[category]
        return category, concatenate(self._rows.pop(category))


class _Times(Protocol):
    """Times by position: an array, or `_Lines`."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: np.ndarray, /) -> np.ndarray: ...


def first_not_before(time: _Times, low: np.ndarray, high: np.ndarray, when: np.ndarray) -> np.ndarray:
    """For each i, the first position in [low[i], high[i]) with `time >= when[i]`, or high[i].

    Bisection of all ranges at once; `time` must ascend within each range.
    """
    low, high = low.astype(np.int64), high.astype(np.int64)
    while True:
        open_ = low < high
        if not open_.any():
            return low
        middle = (low + high) >> 1
        earlier = time[np.minimum(middle, len(time) - 1)] < when
        low = np.where(open_ & earlier, middle + 1, low)
        high = np.where(open_ & ~earlier, middle, high)


class _Lines:
    """The sequences that samples look back along, one after the other, each in order of time.

    A line is a (user, category) group, whose positions are event rows, or the whole life of a user, whose
    positions are those of `Store.time_order`. Line n has the positions `start[n]` to `start[n + 1]` - 1.
    """

    def __init__(self, store: Store, along: Literal["context", "life"]) -> None:
        self.store = store
        self.order = None if along == "context" else store.time_order
        self.start = store.group_start if self.order is None else store.group_start[store.user_group]
        users = np.arange(store.n_users, dtype=np.int32)
        self.user = np.repeat(users, np.diff(store.user_group)) if self.order is None else users

    def event(self, at: np.ndarray) -> np.ndarray:
        """Event rows of positions."""
        return at if self.order is None else np.asarray(self.order[at], np.int64)

    def __len__(self) -> int:
        return self.store.n_events

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """Times of positions."""
        return self.store.event_time[self.event(at)]

    def nth(self, at: np.ndarray) -> np.ndarray:
        """Where in `Store.time_order`, the order of lives, the events of positions stand."""
        return np.asarray(at if self.order is not None else self.store.time_position[at], np.int64)

    def first_from(self, low: np.ndarray, high: np.ndarray, nth: np.ndarray) -> np.ndarray:
        """For each i, the first position in [low[i], high[i]) at `nth[i]` or later in a life, or high[i]."""
        if self.order is not None:
            return np.clip(nth, low, high)
        # event rows of a group ascend in the order of life, as times do
        return first_not_before(self.store.time_position, low, high, nth)


class Batches:
    """The training samples of a store: events at or before `until`, in categories of at least two items.

    A category with a single item teaches nothing (its softmax is always right), so it has no samples, unless
    items of other categories compete as well.
    """

    def __init__(self, store: Store, sampling: Sampling, until: int) -> None:
        self.store, self.sampling, self.until = store, sampling, until
        self.lines = _Lines(store, sampling.along)
        self.teaches = np.diff(store.category_start) > 1
        self._position = np.empty(store.n_items, np.int32)
        self._named = np.zeros(store.n_items, bool)
        self._share: np.ndarray | None = None
        self.key: tuple[int, ...] = ()
        """Beside seed and epoch, what the order depends on: the number of a shard."""
        self._lines: np.ndarray | None = None  # of a shard, ascending; None: all
        self._cost: Cost | None = None
        self._all = self

    @property
    def step_samples(self) -> int:
        return self.sampling.samples

    @property
    def by_category(self) -> bool:
        """Whether batches of other categories need neither these samples nor these items."""
        return not self.sampling.mixed

    def shard(self, nth: int, lines: np.ndarray, samples: int, cost: Cost) -> Batches:
        """The samples on these lines (ascending): full batches are of so many, steps cost alike."""
        part = copy(self)
        part.__dict__.pop("n_samples", None)
        part.key, part._lines, part._cost = (nth,), lines, cost
        part.sampling = replace(self.sampling, samples=samples)
        return part

    def _nth_lines(self, at: np.ndarray) -> np.ndarray:
        return at if self._lines is None else self._lines[at]

    @property
    def _n_lines(self) -> int:
        return len(self.lines.start) - 1 if self._lines is None else len(self._lines)

    @cached_property
    def n_samples(self) -> int:
        """Of one epoch; with `most` or `half_life`, about."""
        n_lines, total = self._n_lines, 0.0
        for at in range(0, n_lines, 1 << 20):
            rows = self.rows(self._nth_lines(np.arange(at, min(at + (1 << 20), n_lines))), None)
            total += float(self.expected(rows).sum())
        return round(total)

    def expected_of_users(self) -> np.ndarray:
        """[U] how many samples of each user an epoch keeps, on average."""
        n_lines, total = len(self.lines.start) - 1, np.zeros(self.store.n_users)
        for at in range(0, n_lines, 1 << 20):
            rows = self.rows(np.arange(at, min(at + (1 << 20), n_lines)), None)
            user = self.lines.user[rows.group].astype(np.int64)
            first = user.min(initial=self.store.n_users)
            found = np.bincount(user - first, self.expected(rows))
            total[first : first + len(found)] += found
        return total

    def expected(self, rows: Rows) -> np.ndarray:
        """[n] how many samples of each row an epoch keeps, on average."""
        if not self.sampling.half_life:
            return rows.samples * self._of_heavy(rows)
        owner, within = _each(rows.samples)
        kept = weight(self.lines[rows.first[owner] + within], self.until, self.sampling.half_life)
        return np.bincount(owner, kept, minlength=len(rows.group)) * self._of_heavy(rows)

    def _of_heavy(self, rows: Rows) -> np.ndarray:
        """The share of rows like each that `most` leaves, so that a few users do not outweigh all others."""
        store, user = self.store, self.lines.user[rows.group]
        size = store.group_start[store.user_group[user + 1]] - store.group_start[store.user_group[user]]
        return of_heavy(size, self.sampling.most)

    def _thinned(self, rows: Rows, rng: np.random.Generator) -> Rows:
        """In random order, without what `most` and `half_life` leave out.

        Events weigh the more the newer they are, so of a row those that weigh more than a random number are
        its last ones: each stays as often as it weighs, and the others remain as context.
        """
        rows = rows.take(rng.permutation(len(rows.group)))
        rows = rows.take(rng.random(len(rows.group)) < self._of_heavy(rows))
        days = self.sampling.half_life
        if days:
            since = oldest(self.until, days, 1 - rng.random(len(rows.group)))
            first = first_not_before(self.lines, rows.first, rows.stop, since)
            rows = rows._replace(first=first).take(first < rows.stop)
        return rows

    def rows(self, lines: np.ndarray, rng: np.random.Generator | None) -> Rows:
        """Cut the training events of these lines into rows; `rng` shifts the cuts of long ones."""
        s = self.sampling
        if not s.mixed:
            lines = lines[self.teaches[self.store.group_category[lines]]]
        begin, end = self.lines.start[lines], self.lines.start[lines + 1]
        end = first_not_before(self.lines, begin, end, np.full(len(lines), self.until + 1))
        lines, begin, end = (x[end > begin] for x in (lines, begin, end))
        width = s.context_length + 1 - s.overlap if s.packed else 1
        size = end - begin
        shift = np.zeros(len(lines), np.int64)
        if rng is not None and s.packed:
            shift = np.where(size > width, rng.integers(0, width, len(lines)), 0)
        pieces = -(-(size + shift) // width)
        owner = np.repeat(np.arange(len(lines)), pieces)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = np.maximum(begin[owner], begin[owner] - shift[owner] + nth * width)
        stop = np.minimum(end[owner], begin[owner] - shift[owner] + (nth + 1) * width)
        start = np.maximum(begin[owner], first - s.overlap)
        rows = Rows(lines[owner], start, first, stop)
        return self._near(rows) if s.within and s.packed and len(first) else rows

    def _near(self, rows: Rows) -> Rows:
        """Cut rows so that none looks back further than `within` behaviors of the user's life.

        The targets of a row lie within half of that, and it reads what its last target may see: a sample
        sees between a half and the whole of what it may.
        """
        s, half = self.sampling, max(1, (self.sampling.within or 0) // 2)
        owner, within = _each(rows.samples)
        at = rows.first[owner] + within
        life = self.lines.nth(at)
        begin = self.store.group_start[self.store.user_group[self.lines.user[rows.group[owner]]]]
        block = (life - begin) // half
        new = np.r_[True, (np.diff(owner) != 0) | (np.diff(block) != 0)]
        last = np.r_[np.flatnonzero(new)[1:], len(at)] - 1
        group, first, stop = rows.group[owner[new]], at[new], at[last] + 1
        start = np.maximum(self.lines.start[group], stop - 1 - s.context_length)
        earliest = self.lines.first_from(start, first, life[last] - (s.within or 0))
        return Rows(group, earliest, first, stop)

    def epoch(self, seed: int, epoch: int) -> Iterator[list[Rows]]:
        """One pass over the samples as steps; each element of a step holds rows of one category.

        With `mixed`, an element holds rows of all. The order depends on (seed, epoch) and the shard alone.
        """
        s, rng = self.sampling, np.random.default_rng([seed, epoch, *self.key])
        n_lines = self._n_lines
        blocks = rng.permutation(-(-n_lines // _BLOCK))
        cache = CategoryCache(s.samples, s.max_wait * s.samples)

        def batches() -> Iterator[tuple[int, Rows]]:
            for at in range(0, len(blocks), _WINDOW):
                lines = (blocks[at : at + _WINDOW, None] * _BLOCK + np.arange(_BLOCK)).ravel()
                rows = self._thinned(self.rows(self._nth_lines(lines[lines < n_lines]), rng), rng)
                yield from cache.add(self._buffer(rows), rows)
            yield from cache.flush()

        return self._steps(batches())

    def _buffer(self, rows: Rows) -> np.ndarray:
        """In which buffer of the cache each row waits: that of its category, or one for all."""
        if self.sampling.mixed:
            return np.zeros(len(rows.group), np.int64)
        return self.store.group_category[rows.group]

    def _steps(self, batches: Iterator[tuple[int, Rows]]) -> Iterator[list[Rows]]:
        if self._cost is not None:
            return self._even_steps(batches, self._cost)
        return self._full_steps(batches)

    def _even_steps(self, batches: Iterator[tuple[int, Rows]], cost: Cost) -> Iterator[list[Rows]]:
        """Steps that cost alike, as other shards wait for each: batches are cut where a step is full."""
        step: list[Rows] = []
        left = cost.budget
        for category, rows in batches:
            while len(rows.group):
                samples = np.cumsum(rows.samples)
                spent = cost.of_batch[category] + cost.of_sample[category] * samples
                fits = int(np.searchsorted(spent, left, side="right"))
                if not step:  # vectors of a large category may cost more than a step should
                    fits = max(1, fits, int(np.searchsorted(samples, self.sampling.samples / 2)))
                if fits:
                    step.append(rows.take(slice(0, fits)))
                    left -= spent[min(fits, len(spent)) - 1]
                    rows = rows.take(slice(fits, None))
                if len(rows.group):
                    yield step
                    step, left = [], cost.budget + max(left, -cost.budget / 2)
        if step:
            yield step

    def _full_steps(self, batches: Iterator[tuple[int, Rows]]) -> Iterator[list[Rows]]:
        step: list[Rows] = []
        size = 0
        for _, rows in batches:
            for part in _parts(rows, self.sampling.samples):
                step.append(part)
                size += int(part.samples.sum())
                if size >= self.sampling.samples:
                    yield step
                    step, size = [], 0
        if step:
            yield step

    def after(self, when: int, limit: int, rng: np.random.Generator) -> list[list[Rows]]:
        """Steps of at most about `limit` samples later than `when` (and not after `until`).

        For validation: whole rows are drawn at random, the same for the same `rng`.
        """
        rows = self.rows(self._nth_lines(np.arange(self._n_lines)), None)
        late = first_not_before(self.lines, rows.first, rows.stop, np.full(len(rows.first), when + 1))
        start = rows.start
        if not self.sampling.within:  # a row with fewer targets may read further back
            start = np.maximum(
                self.lines.start[rows.group], rows.stop - 1 - max(1, self.sampling.context_length)
            )
        rows = Rows(rows.group, np.minimum(start, late), late, rows.stop)
        rows = self._thinned(rows.take(rows.samples > 0), rng)
        rows = rows.take(slice(0, int(np.searchsorted(np.cumsum(rows.samples), limit)) + 1))
        cache = CategoryCache(self.sampling.samples, limit + 1)
        released = [*cache.add(self._buffer(rows), rows), *cache.flush()]
        return list(self._steps(iter(released)))

    # -- from rows to arrays

    def assemble(self, batches: list[Rows], rng: np.random.Generator, parts: int = 1) -> list[Step]:
        """Read from the store all that a step needs. `rng` draws negatives, and when samples are asked for.

        `parts` of about as many samples each, to be computed side by side. Fewer come where there are few
        rows, none where no sample is left (see `_targets`).
        """
        drafts = [self._draft(part, rng) for part in _split(concatenate(batches), parts)]
        return [self._placed(draft) for draft in drafts if len(draft.events)]

    def _draft(self, rows: Rows, rng: np.random.Generator) -> _Draft:
        rows, stop = self._inputs(rows, rng)
        length = np.maximum(stop - rows.start, 0)
        bucket_of = np.searchsorted(_WIDTHS, length)
        order = np.argsort(bucket_of, kind="stable")
        rows, stop, length, bucket_of = rows.take(order), stop[order], length[order], bucket_of[order]

        at, row_of, asked, known = self._targets(rows, stop, rng)
        events = self.lines.event(at)
        category = self.store.item_category[self.store.event_item[events]]
        if not self.sampling.mixed:
            by_category = np.argsort(category, kind="stable")
            row_of, asked, known = row_of[by_category], asked[by_category], known[by_category]
            events, category = events[by_category], category[by_category]

        moment = self.lines.event(asked)
        recent, recent_count, newest = self._recent(moment, self.lines.user[rows.group[row_of]])
        buckets, offsets = self._gather(rows, length, bucket_of)
        candidates, cuts = self._candidates(events, category, rng)
        n_prefix = 1 + self.store.profile.shape[1]
        slot = known + (n_prefix - 1) if self.sampling.packed else np.zeros(len(known), np.int64)
        return _Draft(
            events=events,
            category=category,
            state=offsets[row_of] + slot,
            buckets=buckets,
            recent=recent,
            recent_count=recent_count,
            since=self._since(self.store.event_time[moment], rows.start[row_of] + known - 1, known, newest),
            past=self._past(
                self.store.event_time[moment], rows.start[row_of], known, offsets[row_of] + n_prefix
            ),
            candidates=candidates,
            cuts=cuts,
        )

    def _placed(self, draft: _Draft) -> Step:
        """A draft with its items as positions among those that it names."""
        numbers, position = self._name(draft.items()), self._position
        return Step(
            numbers=numbers,
            buckets=[b._replace(item=position[b.item]) for b in draft.buckets],
            state=draft.state,
            target=position[self.store.event_item[draft.events]].astype(np.int64),
            category=draft.category.astype(np.int64),
            recent=position[draft.recent],
            recent_count=draft.recent_count,
            since=draft.since,
            past=draft.past.token,
            past_item=np.where(draft.past.known[:, None] > 0, position[draft.past.item], 0),
            past_age=draft.past.age,
            past_count=draft.past.known,
            contests=self._contests(draft.events, draft.category, draft.candidates, draft.cuts),
            tokens=sum(int(b.length.sum()) for b in draft.buckets),
            padded=sum(b.item.size for b in draft.buckets),
        )

    def _inputs(self, rows: Rows, rng: np.random.Generator) -> tuple[Rows, np.ndarray]:
        """Where the input of each row ends; for one sample a row, also where it begins."""
        if self.sampling.packed:
            return rows, rows.stop - 1  # the last target is nobody's past
        s, begin = self.sampling, self.lines.start[rows.group]
        asked = self._earlier(rows.first, np.maximum(begin, rows.first - max(1, s.context_length)), rng)
        stop = first_not_before(self.lines, begin, asked, self.lines[asked])
        start = np.maximum(begin, stop - s.context_length)
        if s.within:
            start = self.lines.first_from(start, stop, self.lines.nth(asked) - s.within)
        return rows._replace(start=start), stop

    def _targets(
        self, rows: Rows, stop: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of every sample: the position of its event, its row in `rows`, the position of the event just
        before which it is asked for, and how many behaviors of the row are known then.

        Known are those strictly earlier. Where equal times reach back to the beginning of a row that is not
        the beginning of the line, no state of the row is right: left out.
        """
        if not self.sampling.packed:  # what follows the input has the time of the request
            return rows.first, np.arange(len(rows.first)), stop, stop - rows.start
        row_of, within = _each(rows.samples)
        at, start = rows.first[row_of] + within, rows.start[row_of]
        asked = self._earlier(at, start + 1, rng)
        known = first_not_before(self.lines, start, asked, self.lines[asked]) - start
        right = (known > 0) | (rows.start == self.lines.start[rows.group])[row_of]
        if self.sampling.within:
            right |= known == 0  # nothing near enough is a past as well
        return at[right], row_of[right], asked[right], known[right]

    def _earlier(self, at: np.ndarray, least: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """When each event is asked for: mostly just before it, for a `distance` share of them some events
        earlier (log-uniform, not before `least`): what a list for the next weeks has to foresee."""
        s = self.sampling
        if s.distance == 0:
            return at
        room = np.maximum(at - least, 0)
        back = np.exp(rng.random(len(at)) * np.log1p(room)).astype(np.int64)
        return np.where((rng.random(len(at)) < s.distance) & (room > 0), at - np.minimum(back, room), at)

    def _since(self, now: np.ndarray, last: np.ndarray, known: np.ndarray, newest: np.ndarray) -> np.ndarray:
        """[S, 2] age classes of the context's last known behavior and of the user's newest."""
        in_context = age_class(now - self.lines[np.maximum(last, 0)])
        of_any = age_class(now - self.store.event_time[np.maximum(newest, 0)])
        return np.stack([np.where(known > 0, in_context, 0), np.where(newest >= 0, of_any, 0)], axis=1)

    def _past(self, now: np.ndarray, start: np.ndarray, known: np.ndarray, token: np.ndarray) -> _Past:
        """What each state knows, newest first; `token` is that of the row's first behavior."""
        width = int(known.max(initial=0)) if self.sampling.returns else 0
        back = np.maximum(known[:, None] - 1 - np.arange(width), 0)
        at = start[:, None] + np.minimum(back, np.maximum(known[:, None] - 1, 0))
        age = age_class(now[:, None] - self.lines[at]) if width else np.zeros(at.shape, np.int64)
        item = self.store.event_item[self.lines.event(at)]
        return _Past(token[:, None] + back, item, age, known)

    def _recent(self, events: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[S, R] items of the user's last behaviors of any category strictly before each event, how many they
        are, and the event row of the newest (-1 where there is none)."""
        store, s = self.store, self.sampling
        begin = store.group_start[store.user_group[user]]
        position = store.time_position[events].astype(np.int64)
        stop = self._first_of_time(begin, position, store.event_time[events])
        begin = np.maximum(begin, stop - s.within) if s.within else begin
        place, count = spread(stop - begin, s.recent_length - s.life_sample, s.life_sample)
        item = store.event_item[store.time_order[begin[:, None] + place]]
        newest = np.where(stop > begin, store.time_order[np.maximum(stop - 1, begin)], -1)
        # what stands beyond a user's first behavior is padding: name the newest item again, not another
        there = np.arange(s.recent_length) < count[:, None]
        return np.where(there, item, item[:, :1]), count, newest.astype(np.int64)

    def _first_of_time(self, begin: np.ndarray, position: np.ndarray, when: np.ndarray) -> np.ndarray:
        """Where, in the user's order of time, the behaviors of time `when` begin. Ties are short, so look
        back one by one, for those only that still have one."""
        store = self.store
        stop = position.copy()
        open_ = np.flatnonzero(stop > begin)
        while len(open_):
            tied = store.event_time[store.time_order[stop[open_] - 1]] == when[open_]
            open_ = open_[tied]
            stop[open_] -= 1
            open_ = open_[stop[open_] > begin[open_]]
        return stop

    def _gather(
        self, rows: Rows, length: np.ndarray, bucket_of: np.ndarray
    ) -> tuple[list[Bucket], np.ndarray]:
        """Behaviors of each row, in buckets; and of each row, the position of its first token."""
        store, n_prefix = self.store, 1 + self.store.profile.shape[1]
        offsets = np.empty(len(length), np.int64)
        buckets, token = [], 0
        for part in np.split(np.arange(len(length)), np.flatnonzero(np.diff(bucket_of)) + 1):
            width = int(length[part].max(initial=0))
            at = rows.start[part, None] + np.arange(width)
            inside = np.arange(width) < length[part, None]
            event = self.lines.event(np.where(inside, at, rows.start[part, None]))
            user = self.lines.user[rows.group[part]]
            kind = store.event_behavior[event].astype(np.int64)
            buckets.append(
                Bucket(store.event_item[event], kind, length[part], store.profile[user].astype(np.int64))
            )
            offsets[part] = token + np.arange(len(part)) * (n_prefix + width)
            token += len(part) * (n_prefix + width)
        return buckets, offsets

    def _candidates(
        self, events: np.ndarray, category: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """For each contest of the step, the item numbers that compete; and where its samples begin."""
        s = self.sampling
        if len(events) == 0:
            return [], np.zeros(1, int)
        cuts = np.r_[0, np.flatnonzero(np.diff(category)) + 1, len(category)]
        if s.mixed:
            cuts = np.array([0, len(events)])
        candidates = []
        for a, b in pairwise(cuts):
            low, high = self._range(category[a])
            if high - low <= s.whole_up_to:
                candidates.append(np.arange(low, high))
            else:
                drawn = rng.integers(low, high, s.sampled_negatives)
                candidates.append(np.unique(np.concatenate([self.store.event_item[events[a:b]], drawn])))
        return candidates, cuts

    def _range(self, category: int) -> tuple[int, int]:
        """The item numbers that may compete with an item of this category."""
        if self.sampling.mixed:
            return 0, self.store.n_items
        start = self.store.category_start
        return int(start[category]), int(start[category + 1])

    def _name(self, items: list[np.ndarray]) -> np.ndarray:
        """The distinct items, ascending; `_position` then maps an item number to its place among them."""
        for x in items:
            self._named[x] = True
        numbers = np.flatnonzero(self._named)
        self._named[numbers] = False
        self._position[numbers] = np.arange(len(numbers), dtype=np.int32)
        return numbers

    def _contests(
        self, events: np.ndarray, category: np.ndarray, candidates: list[np.ndarray], cuts: np.ndarray
    ) -> list[Contest]:
        contests = []
        for a, b, candidate in zip(cuts[:-1], cuts[1:], candidates, strict=True):
            low, high = self._range(category[a])
            target = np.searchsorted(candidate, self.store.event_item[events[a:b]])
            place = self._position[candidate]
            if len(candidate) == high - low:  # a range of item numbers, so its places are a range as well
                contests.append(Contest(slice(a, b), slice(int(place[0]), int(place[-1]) + 1), target, None))
            else:
                log_q = self._log_q(candidate, b - a, high - low)
                contests.append(Contest(slice(a, b), place.astype(np.int64), target, log_q))
        return contests

    def _log_q(self, candidate: np.ndarray, samples: int, of: int) -> np.ndarray:
        """Log of the probability that an item competes: as a target of the batch, or drawn evenly."""
        expected = samples * self._item_share()[candidate] + self.sampling.sampled_negatives / of
        return np.log(-np.expm1(-expected)).astype(np.float32)

    def _item_share(self) -> np.ndarray:
        """[I] each item's part of the events of its category, or of all."""
        if self._all is not self:
            return self._all._item_share()  # counted once for all shards of a process
        if self._share is None:
            count = np.zeros(self.store.n_items, np.int64)
            for at in range(0, self.store.n_events, 1 << 22):  # a part at a time: the log may exceed memory
                part = slice(at, at + (1 << 22))
                known = self.store.event_time[part] <= self.until
                count += np.bincount(self.store.event_item[part][known], minlength=self.store.n_items)
            if self.sampling.mixed:
                total = np.array([count.sum()])
                of = np.zeros(1, np.int64)
            else:  # a category has an item or more
                total = np.add.reduceat(count, self.store.category_start[:-1])
                of = self.store.item_category
            self._share = (count / np.maximum(total, 1)[of]).astype(np.float32)
        return self._share


def _each(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For runs of these sizes: the run of each element, and its place within the run."""
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return owner, np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _parts(rows: Rows, size: int) -> Iterator[Rows]:
    """Cut rows of one category into parts of about `size` samples."""
    total = np.cumsum(rows.samples)
    cuts = np.searchsorted(total, np.arange(size, total[-1], size)) + 1
    for part in np.split(np.arange(len(total)), np.unique(cuts)):
        if len(part):
            yield rows.take(part)


def _split(rows: Rows, parts: int) -> list[Rows]:
    """Cut rows into at most so many parts of about as many samples each."""
    total = np.cumsum(rows.samples)
    cuts = np.searchsorted(total, total[-1] * np.arange(1, parts) / parts) + 1
    return [rows.take(part) for part in np.split(np.arange(len(total)), cuts) if len(part)]
