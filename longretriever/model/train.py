"""Training: one loop over one-category batches, that can be stopped at any moment and goes on the same.

Dense weights (a few hundred thousand) are updated by AdamW, item rows by row-wise Adagrad on the rows that
a step names. The newest slice of the log is held out: after each epoch its loss decides whether the weights
are kept, and training stops when it no longer falls. The order of samples, the masks of dropout and the
negatives depend on (seed, epoch, step) alone, so a run that was killed and resumed ends in the same weights
(a bound in minutes aside: it ends wherever the clock says).

Several processes train one model (`torchrun`): each computes the parts of a step that its shards hold, with
the item rows that it keeps (`sharding.py`); what they tell each other is in `exchange.py`.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longretriever.errors import InputError
from longretriever.events import SECONDS_PER_DAY
from longretriever.model.batches import Batches
from longretriever.model.checkpoint import load_state, save_model, save_state, shards_of, sweep_rows
from longretriever.model.config import Learning, TrainConfig
from longretriever.model.exchange import Exchange, Turn, Wire, joined
from longretriever.model.fading import half_life, newest_from
from longretriever.model.learner import ItemRows, Lesson, Lessons
from longretriever.model.sharding import Plan, plan_of, shard_of
from longretriever.model.warm import FACTORS
from longretriever.saved import check_replaceable, opening
from longretriever.store.behaviors import Store

PREFETCH = 4  # steps that are read ahead while one is computed
_WARM_UP = 100  # steps in which the rate rises to its full height
_LAST_RATE = 0.05  # of the full rate, at the end
_VALIDATION_SAMPLES = 20_000
SHARES = {"whole": 0.45, "interests": 0.2}
"""Of the minutes that a training may take: for what a model brings beside its own vectors, where it does.

In this order; what one does not need is left for the next."""


@dataclass
class Position:
    """How far training has come: with the weights, all that a resumed run needs to know."""

    epoch: int = 0
    step: int = 0  # of the epoch
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waiting: float = 0.0  # seconds in which the model waited for data
    waiting_for_others: float = 0.0  # and for other processes, or for the network
    tokens: int = 0
    padded: int = 0
    sent: dict[str, int] = field(default_factory=dict)  # bytes between processes, by what for
    validation: list[float] = field(default_factory=list)  # nats below chance, after each epoch
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, samples, that figure
    best: int = -1  # epoch with the best validation
    finished: str = ""  # why training ended
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)  # the same of each of `SHARES`

    @property
    def all_seconds(self) -> float:
        return self.seconds + sum(at["seconds"] for at in self.beside.values())


@dataclass(frozen=True)
class Tick:
    """What `progress` is told after each step, once more after each epoch (with `validation`), and before
    factors are learned, which takes a while."""

    position: Position
    share: float  # of the whole training, 0 to 1
    loss: float  # nats a sample, of this step
    chance: float  # the same for guessing evenly
    samples_per_second: float
    validation: float | None = None
    learning: str = "contexts"  # or what else is learned, see `SHARES`, and "factors"


class Training:
    """Weights, optimizers and position of one run; `train` is the function to call."""

    def __init__(
        self, store: Store, config: Learning, threads: int | None = None, wire: Wire | None = None
    ) -> None:
        wire = wire or Wire()
        if config.half_life is None:
            config = replace(config, half_life=half_life(store))
        self.store, self.config, self.at = store, config, Position()
        self.boundary = _boundary(store, config)
        torch.manual_seed(config.seed)
        self.learner = config.learner(store)
        self.batches = self.learner.batches(self.boundary)
        self.lessons, self.held_out, self.plan = self._shared_out(wire)
        self.wire, self.exchange = wire, Exchange(wire, self.plan)
        self.n_samples = self.batches.n_samples if self.plan is None else round(self.plan.samples.sum())
        if self.n_samples == 0:
            raise InputError(
                f"nothing to learn from: {store.n_events:,} events in {store.n_categories:,} categories, but "
                "no category has two items or more. Check the category column of the log."
            )
        self.epochs = config.epochs_for(self.n_samples, self.batches.step_samples)
        self.minutes = config.minutes and config.minutes * (1 - sum(SHARES[name] for name in _beside(config)))
        self.total = min(self.n_samples * self.epochs, config.samples or sys.maxsize)
        self.parts = config.parts_of_shard * max(1, len(self.lessons))  # of a step, that are computed here
        most = threads or max(config.parts, os.cpu_count() or 1)
        self.workers = ThreadPoolExecutor(min(self.parts, most))
        self.rows = ItemRows(torch.empty(0, config.dim), config.row_lr)
        self.began, self.clock = time.perf_counter(), 0.0
        self.sent = self.exchange.sent
        self.saved_rows: tuple[int, dict[str, str]] = (-1, {})  # after how many steps, and where
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )

    def begin(self, work: Path | None = None) -> None:
        """Give the item rows their first values; a resumed run has others. What may be used again is kept
        in the folder `work`."""
        seed, plan = self.config.seed, self.plan
        if plan is None:
            rows = self.learner.first_rows(self.boundary, torch.Generator().manual_seed(seed), work)
        else:

            def mine() -> list[Tensor]:
                return [
                    self.learner.first_rows(
                        self.boundary,
                        torch.Generator().manual_seed(_mixed(seed, shard)),
                        work,
                        plan.ranges(shard),
                    )
                    for shard in plan.mine
                ]

            first = mine() if self.wire.first else []  # who comes first makes the file of factors
            self.wire.meet()
            rows = torch.cat([torch.empty(0, self.config.dim), *(first or mine())])
        self.rows = ItemRows(rows, self.config.row_lr)

    def _shared_out(self, wire: Wire) -> tuple[list[Lessons], list[tuple[Lessons, float]], Plan | None]:
        """What this process learns from; what it validates on, with shares; the plan, if there is one."""
        store, dim, whole = self.store, self.config.dim, self.batches
        late = self.learner.batches(store.last_time, held_out=True)
        shards = self.config.shards or 1
        if shards == 1:
            return [whole], [(late, 1.0)], None
        plan = plan_of(whole, store, shards, dim, wire)  # type: ignore[arg-type]

        def shard(of: Any, nth: int) -> Lessons:
            if isinstance(of, Batches):
                return shard_of(of, plan, nth, dim)
            assert plan.users is not None
            samples = max(1, round(of.step_samples * plan.samples[nth] / max(plan.samples.sum(), 1e-9)))
            return of.shard(nth, slice(*plan.users[nth : nth + 2].tolist()), samples)

        share = plan.samples / max(plan.samples.sum(), 1e-9)
        held_out = [(shard(late, nth), float(share[nth])) for nth in plan.mine]
        return [shard(whole, nth) for nth in plan.mine], held_out, plan

    @property
    def share(self) -> float:
        """Part of the training that is done, by samples or by the clock, whichever is further."""
        by_clock = self.at.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.at.samples / self.total, by_clock))

    def run_step(self, turn: Turn) -> float:
        """One optimizer step; the summed loss.

        Parts run side by side on a thread each, and their gradients are added in their order, so the result
        does not depend on the threads. Two threads of one processor each, and not one operation on both:
        operations are short, and waiting for the slower half of each costs more than the half saves.
        """
        c, at = self.config, self.at
        factor = min(1.0, (at.steps + 1) / _WARM_UP) * max(_LAST_RATE, 1 - self.share)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * factor
        rows = turn.gather(self.rows)
        parameters = list(self.learner.parameters())

        def compute(nth: int) -> tuple[float, Sequence[Tensor]]:
            seed = _mixed(c.seed, at.epoch, at.step, *turn.keys[nth])
            generator = torch.Generator().manual_seed(seed)  # of the masks of dropout
            loss = self.learner.loss(rows[nth], turn.parts[nth], generator)
            leaves = [*parameters, rows[nth]]
            return loss.item(), torch.autograd.grad(loss / turn.samples, leaves, materialize_grads=True)

        done = list(self.workers.map(compute, range(len(turn.parts))))
        dense = [sum(grads[1:], start=grads[0]) for grads in zip(*(g[:-1] for _, g in done), strict=True)]
        dense = dense or [torch.zeros_like(parameter) for parameter in parameters]
        said = [sum(loss for loss, _ in done), self._seconds if self.wire.first else 0.0]
        dense, (loss, self.clock) = self.wire.add(dense, said)
        for parameter, grad in zip(parameters, dense, strict=True):
            parameter.grad = grad
        self.optimizer.step()
        turn.update(self.rows, [grads[-1] for _, grads in done], factor)
        return loss

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self.began

    def run_epoch(self, save: Callable[[], None], progress: Callable[[Tick], None] | None) -> None:
        """From the current position to the end of its epoch, or of the minutes."""
        at = self.at
        self.began = time.perf_counter() - at.seconds
        for turn, waited in self._read_ahead():
            others = self.wire.waited
            loss = self.run_step(turn) if turn.samples else 0.0
            at.step, at.steps, at.samples = at.step + 1, at.steps + 1, at.samples + turn.samples
            at.waiting, at.waiting_for_others = (
                at.waiting + waited,
                at.waiting_for_others + self.wire.waited - others,
            )
            at.seconds = self._seconds if self.wire.world == 1 else self.clock  # the first one's, for all
            at.tokens, at.padded = at.tokens + turn.tokens, at.padded + turn.padded
            if progress and turn.samples:
                loss, chance = loss / turn.samples, turn.chance / turn.samples
                progress(Tick(at, self.share, loss, chance, at.samples / max(at.seconds, 1e-9)))
            save()
            if self.minutes and at.seconds >= 60 * self.minutes:
                at.finished = f"{60 * self.minutes:g} seconds are over"
                break
            if at.samples >= self.total and self.config.samples:
                at.finished = f"{self.config.samples:,} samples are learned"
                break

    def _read_ahead(self) -> Iterator[tuple[Turn, float]]:
        """Assemble steps on another thread while the model computes; yields (step, seconds waited for it)."""
        c, epoch, first = self.config, self.at.epoch, self.at.step
        plans = [islice(lessons.epoch(c.seed, epoch), first, None) for lessons in self.lessons]

        failed: list[Exception] = []

        def read(nth: int) -> Turn | None:
            if failed:  # nothing more is told to the others, who would take it for the step that failed
                raise failed[0]
            rngs = [np.random.default_rng([c.seed, epoch, nth, *lessons.key]) for lessons in self.lessons]
            try:
                return self.exchange.turn(*_assembled(self.lessons, plans, rngs, c.parts_of_shard))
            except Exception as error:
                failed.append(error)
                raise

        with ThreadPoolExecutor(1) as reader:  # one: `assemble` has scratch arrays of its own
            waiting = deque(reader.submit(read, nth) for nth in range(first, first + PREFETCH))
            for nth in count(first + PREFETCH):
                began = time.perf_counter()
                turn = waiting.popleft().result()
                waited = time.perf_counter() - began
                if turn is None:
                    return
                waiting.append(reader.submit(read, nth))
                yield turn, waited

    @torch.no_grad()
    def validate(self) -> float | None:
        """Nats below chance, a sample, on events that training has not seen; None if there are none."""
        lessons, seed = [lessons for lessons, _ in self.held_out], self.config.seed
        rngs = [np.random.default_rng([seed, *of.key] if of.key else seed) for of in lessons]
        limits = [round(_VALIDATION_SAMPLES * share) for _, share in self.held_out]
        plans = [
            iter(of.after(self.boundary, n, rng)) for of, n, rng in zip(lessons, limits, rngs, strict=True)
        ]
        gain, samples = 0.0, 0
        while (turn := self.exchange.turn(*_assembled(lessons, plans, rngs, 1), self.wire)) is not None:
            for part, rows_Ud in zip(turn.parts, turn.gather(self.rows), strict=True):
                loss = self.learner.loss(rows_Ud, part)
                gain, samples = gain + part.chance - loss.item(), samples + part.samples
        gain, samples = self.wire.total([gain, samples]).tolist()
        return gain / samples if samples else None

    def end_epoch(self) -> float | None:
        """Validate, move on to the next epoch, and decide whether there is to be one."""
        at, c = self.at, self.config
        gain = self.validate()
        self._count_sent()
        if gain is not None:
            at.validation.append(gain)
            at.curve.append((round(at.seconds, 3), at.samples, round(gain, 6)))
            if gain >= max(at.validation):
                at.best = at.epoch
            elif at.epoch - at.best >= c.patience and not at.finished:
                at.finished = f"no better validation for {c.patience} epochs"
        at.epoch, at.step = at.epoch + 1, 0
        if at.epoch >= self.epochs and not at.finished:
            at.finished = f"{self.epochs} epochs are done"
        return gain

    def _count_sent(self) -> None:
        if self.wire.world > 1:
            before, self.sent = self.sent, self.exchange.sent
            new = self.wire.total([self.sent[kind] - before[kind] for kind in self.sent]).tolist()
            self.at.sent = {
                kind: self.at.sent.get(kind, 0) + n for kind, n in zip(self.sent, new, strict=True)
            }


def train(
    store: Store,
    out: str | os.PathLike[str],
    config: Learning = TrainConfig(),
    *,
    progress: Callable[[Tick], None] | None = None,
    checkpoint_seconds: float = 120,
    fresh: bool = False,
    threads: int | None = None,
) -> Position:
    """Train a method on a store and save the model to `out`; returns how training went.

    `config` says which method: `TrainConfig` is LongRetriever, `baselines/` has others.


    Checkpoints go to a hidden folder beside `out`, at every epoch and about every `checkpoint_seconds`; a
    call with the same store and configuration goes on from there, unless `fresh`. The folder is removed when
    the model is saved. Memory is that of the weights plus a few steps, whatever the size of the log.
    `threads` is how many processors to use, all by default; PyTorch's own number is set back afterwards.

    Under `torchrun`, or in an initialised process group of `torch.distributed`, all processes train one
    model: each calls this with the same arguments, `store` and `out` on a disk that all see; only the first
    one's `progress` is called.

    Raises `InputError` for a store that has nothing to learn from, `ProcessLost` where another process ended.
    """
    with joined() as wire:
        said = progress if wire.first else None
        if wire.world > 1:
            threads = threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        return _train(store, Path(out), config, wire, said, checkpoint_seconds, fresh, threads)


def _train(
    store: Store,
    target: Path,
    config: Learning,
    wire: Wire,
    progress: Callable[[Tick], None] | None,
    checkpoint_seconds: float,
    fresh: bool,
    threads: int | None,
) -> Position:
    work = target.with_name(f".{target.name}.training")
    latest, best = work / "latest", work / "best"
    if fresh and wire.first:
        shutil.rmtree(work, ignore_errors=True)
    # `latest` and not `work`: a run may be killed while it writes its first checkpoint
    resumed = wire.from_first(not fresh and latest.exists())
    run = Training(store, _with_shards(config, latest if resumed else None, wire), threads, wire)
    check_replaceable(target, run.learner.kind)  # now, and not after hours of training
    if wire.first and run.plan is not None:
        sweep_rows(work)
    wire.meet()
    if resumed:
        load_state(latest, run)
    else:
        run.begin(work)
    saved_at = run.at.seconds

    def save_now_and_then() -> None:
        nonlocal saved_at
        if run.at.seconds - saved_at >= checkpoint_seconds:
            save_state(run, latest)
            saved_at = run.at.seconds

    with _processors(threads, run.parts):
        while not run.at.finished:
            run.run_epoch(save_now_and_then, progress)
            gain = run.end_epoch()
            if run.at.best == run.at.epoch - 1:
                save_state(run, best)
            save_state(run, latest)
            saved_at = run.at.seconds
            if progress:
                progress(Tick(run.at, run.share, float("nan"), float("nan"), _rate(run.at), gain))
    position, kept = run.at, latest
    if position.validation and position.best < position.epoch - 1:
        kept = best
        load_state(best, run)
        run.at = position
    beside = {}
    for name, of in _beside(run.config).items():
        beside[name] = _learn_beside(run, name, of, work, progress, checkpoint_seconds, threads)
    if wire.first:
        if progress and getattr(run.config, "factors", 0.0) != 0:
            progress(Tick(run.at, 1.0, 0.0, 0.0, _rate(run.at), learning="factors"))
        save_model(run, target, beside, kept, threads)
        shutil.rmtree(work, ignore_errors=True)
    wire.meet()
    return position


def _with_shards(config: Learning, unfinished: Path | None, wire: Wire) -> Learning:
    """The number of shards is that of an unfinished training, or else of the processes."""
    before = shards_of(unfinished) if unfinished else None
    shards = config.shards or before or wire.world
    if shards == 1 and wire.world > 1:
        what = f"{unfinished} is an unfinished training with" if before else "there is"
        raise InputError(
            f"{what} one shard, which {wire.world} processes cannot share. "
            "Go on with one process, or start anew with more shards and --fresh (fresh=True)."
        )
    return replace(config, shards=shards) if shards > 1 else config


def _beside(config: Learning) -> dict[str, Learning]:
    """What else a configuration asks to learn, each by its own."""
    found = {name: getattr(config, name, None) for name in SHARES}
    return {name: of for name, of in found.items() if of is not None}


def _learn_beside(
    run: Training,
    name: str,
    config: Learning,
    work: Path,
    progress: Callable[[Tick], None] | None,
    checkpoint_seconds: float,
    threads: int | None,
) -> Path:
    """Train what a model brings beside its vectors of contexts: from its seed, in the time that is left."""

    def say(tick: Tick) -> None:
        if progress:
            progress(tick if tick.learning == "factors" else replace(tick, learning=name))

    path, wire = work / name, run.wire
    if wire.from_first(path.exists()):  # a run was killed between that and the saving of the model
        run.at.beside[name] = opening(path, "interests" if name == "interests" else "model").facts["training"]
        return path
    whole = run.config
    minutes = None
    if whole.minutes:
        left = (1 - sum(SHARES[n] for n in _beside(whole) if n not in run.at.beside)) * whole.minutes
        minutes = whole.minutes * SHARES[name] + max(0.0, left - run.at.all_seconds / 60)
    if wire.first:
        _share_factors(work, path.with_name(f".{path.name}.training"))
    config = replace(config, seed=whole.seed, minutes=minutes, samples=config.samples or whole.samples)
    config = replace(config, shards=config.shards or whole.shards)
    if config.half_life is None:
        config = replace(config, half_life=whole.half_life)
    at = _train(run.store, path, config, wire, say, checkpoint_seconds, False, threads)
    run.at.beside[name] = asdict(at)
    return path


def _share_factors(work: Path, other: Path) -> None:
    """Item rows of both trainings start from the same file."""
    other.mkdir(parents=True, exist_ok=True)
    for file in work.glob(f"{FACTORS}*.npy"):
        if not (other / file.name).exists():
            os.link(file, other / file.name)


@contextmanager
def _processors(threads: int | None, parts: int) -> Iterator[None]:
    """Share the processors out among the parts of a step: PyTorch's threads are for each of them."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (threads or os.cpu_count() or 1) // parts))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(at: Position) -> float:
    return at.samples / max(at.seconds, 1e-9)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _boundary(store: Store, config: Learning) -> int:
    """The time after which the newest `validation` part of the events lies.

    None lies there where they fade so fast that this part is much of what there is to learn.
    """
    if config.validation == 0:
        return int(store.last_time)
    boundary = newest_from(store, config.validation)
    fades = config.half_life and store.last_time - boundary > config.half_life * SECONDS_PER_DAY / 2
    return int(store.last_time) if fades else boundary


def _assembled(
    lessons: Sequence[Lessons],
    plans: Sequence[Iterator[Any]],
    rngs: Sequence[np.random.Generator],
    parts: int,
) -> tuple[list[Lesson], list[tuple[int, ...]], bool]:
    """The next step's parts of each shard here, their keys, and whether there was one."""
    found: list[Lesson] = []
    keys: list[tuple[int, ...]] = []
    going = False
    for of, plan, rng in zip(lessons, plans, rngs, strict=True):
        if (rows := next(plan, None)) is not None:
            mine = of.assemble(rows, rng, parts)
            found += mine
            keys += [(nth, *of.key) for nth in range(len(mine))]
            going = True
    return found, keys, going
