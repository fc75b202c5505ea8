"""From the store to training steps: every batch holds samples of one category only.

A sample is an event and the user's behaviors in its category strictly before it. Rows of samples stream
past in a shuffled order and gather in a cache, one buffer for each category, which releases a batch when
a buffer is full or has waited too long; so no batch mixes categories (LongRetriever section 2.3), no
small category starves and none is dropped. A step carries several batches, each with a softmax of its own:
that keeps every negative inside the target's category and the processor busy even where categories are small.

Everything here is NumPy on slices of the memory-mapped store: memory does not grow with the length of lives.

B rows, N behaviors of a row, S samples, R recent behaviors, P profile fields, U distinct items of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from longretriever.store.behaviors import Store

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
    category: np.ndarray  # [S]
    recent: np.ndarray  # [S, R] positions in `numbers`, newest first
    recent_count: np.ndarray  # [S]
    contests: list[Contest]
    tokens: int  # behaviors that are no padding
    padded: int  # with padding

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
    candidates: list[np.ndarray]  # for each category of the part, in its order
    cuts: np.ndarray  # where its samples begin

    def items(self) -> list[np.ndarray]:
        return [*(b.item for b in self.buckets), self.recent, *self.candidates]


def _count(candidate: slice | np.ndarray) -> int:
    return candidate.stop - candidate.start if isinstance(candidate, slice) else len(candidate)


@dataclass(frozen=True)
class Sampling:
    """How samples are cut and grouped."""

    packed: bool = True  # rows of many samples (causal), or one sample a row (cls)
    context_length: int = 50  # L: behaviors that a sample may look back on
    recent_length: int = 20  # R
    overlap: int = 8  # behaviors of context that a packed row repeats from the row before it
    samples: int = 4096  # of a step, and of a full batch
    max_wait: int = 16  # steps after which a buffer is released unfilled
    whole_category_up_to: int = 8192  # items: larger categories compete by sample
    sampled_negatives: int = 2048


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


def first_not_before(time: np.ndarray, low: np.ndarray, high: np.ndarray, when: np.ndarray) -> np.ndarray:
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


class Batches:
    """The training samples of a store: events at or before `until`, in categories of at least two items.

    A category with a single item teaches nothing (its softmax is always right), so it has no samples.
    """

    def __init__(self, store: Store, sampling: Sampling, until: int) -> None:
        self.store, self.sampling, self.until = store, sampling, until
        self.group_user = np.repeat(np.arange(store.n_users, dtype=np.int32), np.diff(store.user_group))
        self.teaches = np.diff(store.category_start) > 1
        self._position = np.empty(store.n_items, np.int32)
        self._named = np.zeros(store.n_items, bool)
        self._share: np.ndarray | None = None

    @cached_property
    def n_samples(self) -> int:
        """Of one epoch."""
        n_groups = len(self.store.group_category)
        parts = (np.arange(at, min(at + (1 << 20), n_groups)) for at in range(0, n_groups, 1 << 20))
        return sum(int(self.rows(part, None).samples.sum()) for part in parts)

    def rows(self, groups: np.ndarray, rng: np.random.Generator | None) -> Rows:
        """Cut the training events of these groups into rows; `rng` shifts the cuts of long groups."""
        store, s = self.store, self.sampling
        groups = groups[self.teaches[store.group_category[groups]]]
        begin, end = store.group_start[groups], store.group_start[groups + 1]
        end = first_not_before(store.event_time, begin, end, np.full(len(groups), self.until + 1))
        groups, begin, end = (x[end > begin] for x in (groups, begin, end))
        width = s.context_length + 1 - s.overlap if s.packed else 1
        size = end - begin
        shift = np.zeros(len(groups), np.int64)
        if rng is not None and s.packed:
            shift = np.where(size > width, rng.integers(0, width, len(groups)), 0)
        pieces = -(-(size + shift) // width)
        owner = np.repeat(np.arange(len(groups)), pieces)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        first = np.maximum(begin[owner], begin[owner] - shift[owner] + nth * width)
        stop = np.minimum(end[owner], begin[owner] - shift[owner] + (nth + 1) * width)
        start = np.maximum(begin[owner], first - s.overlap)
        return Rows(groups[owner], start, first, stop)

    def epoch(self, seed: int, epoch: int) -> Iterator[list[Rows]]:
        """One pass over all samples as steps; each element of a step holds rows of one category.

        The order depends on (seed, epoch) alone.
        """
        s, rng = self.sampling, np.random.default_rng([seed, epoch])
        n_groups = len(self.store.group_category)
        blocks = rng.permutation(-(-n_groups // _BLOCK))
        cache = CategoryCache(s.samples, s.max_wait * s.samples)

        def batches() -> Iterator[tuple[int, Rows]]:
            for at in range(0, len(blocks), _WINDOW):
                groups = (blocks[at : at + _WINDOW, None] * _BLOCK + np.arange(_BLOCK)).ravel()
                rows = self.rows(groups[groups < n_groups], rng)
                rows = rows.take(rng.permutation(len(rows.group)))
                yield from cache.add(self.store.group_category[rows.group], rows)
            yield from cache.flush()

        return self._steps(batches())

    def _steps(self, batches: Iterator[tuple[int, Rows]]) -> Iterator[list[Rows]]:
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
        rows = self.rows(np.arange(len(self.store.group_category)), None)
        late = first_not_before(
            self.store.event_time, rows.first, rows.stop, np.full(len(rows.first), when + 1)
        )
        start = np.maximum(self.store.group_start[rows.group], rows.stop - 1 - self.sampling.context_length)
        rows = Rows(rows.group, start, late, rows.stop)
        rows = rows.take(rows.samples > 0)
        rows = rows.take(rng.permutation(len(rows.group)))
        rows = rows.take(slice(0, int(np.searchsorted(np.cumsum(rows.samples), limit)) + 1))
        cache = CategoryCache(self.sampling.samples, limit + 1)
        released = [*cache.add(self.store.group_category[rows.group], rows), *cache.flush()]
        return list(self._steps(iter(released)))

    # -- from rows to arrays

    def assemble(self, batches: list[Rows], rng: np.random.Generator, parts: int = 1) -> list[Step]:
        """Read from the store all that a step needs. `rng` draws negatives for the large categories.

        `parts` of about as many samples each, to be computed side by side; they share `numbers`. Fewer come
        where there are few rows, none where no sample is left (see `_targets`).
        """
        drafts = [self._draft(part, rng) for part in _split(concatenate(batches), parts)]
        drafts = [draft for draft in drafts if len(draft.events)]
        numbers = self._name(
            [x for d in drafts for x in (*(b.item for b in d.buckets), d.recent, *d.candidates)]
        )
        return [self._placed(draft, numbers) for draft in drafts]

    def _draft(self, rows: Rows, rng: np.random.Generator) -> _Draft:
        rows, stop = self._inputs(rows)
        length = np.maximum(stop - rows.start, 0)
        bucket_of = np.searchsorted(_WIDTHS, length)
        order = np.argsort(bucket_of, kind="stable")
        rows, length, bucket_of = rows.take(order), length[order], bucket_of[order]

        events, row_of, slot = self._targets(rows)
        category = self.store.group_category[rows.group[row_of]]
        by_category = np.argsort(category, kind="stable")
        events, row_of, slot, category = (x[by_category] for x in (events, row_of, slot, category))

        recent, recent_count = self._recent(events, self.group_user[rows.group[row_of]])
        buckets, offsets = self._gather(rows, length, bucket_of)
        candidates, cuts = self._candidates(events, category, rng)
        state = offsets[row_of] + slot
        return _Draft(events, category, state, buckets, recent, recent_count, candidates, cuts)

    def _placed(self, draft: _Draft, numbers: np.ndarray) -> Step:
        """A draft with its items as positions in `numbers`, right after `_name` has made them."""
        position = self._position
        return Step(
            numbers=numbers,
            buckets=[b._replace(item=position[b.item]) for b in draft.buckets],
            state=draft.state,
            category=draft.category.astype(np.int64),
            recent=position[draft.recent],
            recent_count=draft.recent_count,
            contests=self._contests(draft.events, draft.category, draft.candidates, draft.cuts),
            tokens=sum(int(b.length.sum()) for b in draft.buckets),
            padded=sum(b.item.size for b in draft.buckets),
        )

    def _inputs(self, rows: Rows) -> tuple[Rows, np.ndarray]:
        """Where the input of each row ends; for one sample a row, also where it begins."""
        if self.sampling.packed:
            return rows, rows.stop - 1  # the last target is nobody's past
        begin = self.store.group_start[rows.group]
        stop = first_not_before(self.store.event_time, begin, rows.first, self.store.event_time[rows.first])
        start = np.maximum(begin, stop - self.sampling.context_length)
        return rows._replace(start=start), stop

    def _targets(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every sample: its event row, its row in `rows`, the token whose state may be used.

        The state is the one after the last strictly earlier behavior. Where equal times reach back to the
        beginning of a row that is not the beginning of the group, no state of the row is right: left out.
        """
        n_prefix = 1 + self.store.profile.shape[1]
        row_of = np.repeat(np.arange(len(rows.group)), rows.samples)
        within = np.arange(len(row_of)) - np.repeat(np.cumsum(rows.samples) - rows.samples, rows.samples)
        events = rows.first[row_of] + within
        if not self.sampling.packed:
            return events, row_of, np.zeros(len(events), np.int64)
        time = self.store.event_time
        earlier = first_not_before(time, rows.start[row_of], events, time[events])
        known = earlier - rows.start[row_of]
        right = (known > 0) | (rows.start == self.store.group_start[rows.group])[row_of]
        return events[right], row_of[right], (known + n_prefix - 1)[right]

    def _recent(self, events: np.ndarray, user: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S, R] items of the user's last behaviors of any category strictly before each event."""
        store, R = self.store, self.sampling.recent_length
        begin = store.group_start[store.user_group[user]]
        position = store.time_position[events].astype(np.int64)
        stop = self._first_of_time(begin, position, store.event_time[events])
        count = np.minimum(stop - begin, R)
        at = np.maximum(stop[:, None] - 1 - np.arange(R), begin[:, None])
        item = store.event_item[store.time_order[at]]
        # what stands beyond a user's first behavior is padding: name the newest item again, not another
        return np.where(np.arange(R) < count[:, None], item, item[:, :1]), count

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
            width = int(length[part].max())
            at = rows.start[part, None] + np.arange(width)
            inside = np.arange(width) < length[part, None]
            at = np.where(inside, at, rows.start[part, None])
            user = self.group_user[rows.group[part]]
            kind = store.event_behavior[at].astype(np.int64)
            buckets.append(
                Bucket(store.event_item[at], kind, length[part], store.profile[user].astype(np.int64))
            )
            offsets[part] = token + np.arange(len(part)) * (n_prefix + width)
            token += len(part) * (n_prefix + width)
        return buckets, offsets

    def _candidates(
        self, events: np.ndarray, category: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """For each category of the step, the item numbers that compete; and where its samples begin."""
        s, start = self.sampling, self.store.category_start
        cuts = (
            np.r_[0, np.flatnonzero(np.diff(category)) + 1, len(category)]
            if len(category)
            else np.zeros(1, int)
        )
        candidates = []
        for a, b in pairwise(cuts):
            low, high = int(start[category[a]]), int(start[category[a] + 1])
            if high - low <= s.whole_category_up_to:
                candidates.append(np.arange(low, high))
            else:
                drawn = rng.integers(low, high, s.sampled_negatives)
                candidates.append(np.unique(np.concatenate([self.store.event_item[events[a:b]], drawn])))
        return candidates, cuts

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
            c = int(category[a])
            whole = len(candidate) == self.store.category_start[c + 1] - self.store.category_start[c]
            target = np.searchsorted(candidate, self.store.event_item[events[a:b]])
            place = self._position[candidate]
            if whole:  # a category is a range of item numbers, so its places are a range as well
                contests.append(Contest(slice(a, b), slice(int(place[0]), int(place[-1]) + 1), target, None))
            else:
                log_q = self._log_q(c, candidate, b - a)
                contests.append(Contest(slice(a, b), place.astype(np.int64), target, log_q))
        return contests

    def _log_q(self, category: int, candidate: np.ndarray, samples: int) -> np.ndarray:
        """Log of the probability that an item competes: as a target of the batch, or drawn evenly."""
        start = self.store.category_start
        expected = samples * self._item_share()[candidate]
        expected = expected + self.sampling.sampled_negatives / (start[category + 1] - start[category])
        return np.log(-np.expm1(-expected)).astype(np.float32)

    def _item_share(self) -> np.ndarray:
        """[I] each item's part of its category's events."""
        if self._share is None:
            count = np.zeros(self.store.n_items, np.int64)
            for at in range(0, self.store.n_events, 1 << 22):  # a part at a time: the log may exceed memory
                part = slice(at, at + (1 << 22))
                known = self.store.event_time[part] <= self.until
                count += np.bincount(self.store.event_item[part][known], minlength=self.store.n_items)
            total = np.add.reduceat(count, self.store.category_start[:-1])  # a category has an item or more
            self._share = (count / np.maximum(total, 1)[self.store.item_category]).astype(np.float32)
        return self._share


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
