"""Training: one loop over one-category batches, that can be stopped at any moment and goes on the same.

Dense weights (a few hundred thousand) are updated by AdamW, item rows by row-wise Adagrad on the rows that
a step names. The newest slice of the log is held out: after each epoch its loss decides whether the weights
are kept, and training stops when it no longer falls. The order of samples, the masks of dropout and the
negatives depend on (seed, epoch, step) alone, so a run that was killed and resumed ends in the same weights
(a bound in minutes aside: it ends wherever the clock says).
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longretriever.errors import InputError
from longretriever.events import SECONDS_PER_DAY
from longretriever.model.checkpoint import load_state, save_model, save_state
from longretriever.model.config import Learning, TrainConfig
from longretriever.model.fading import half_life, newest_from
from longretriever.model.learner import ItemRows, Lesson, Lessons
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
    tokens: int = 0
    padded: int = 0
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
    """What `progress` is told after each step, and once more after each epoch (with `validation`)."""

    position: Position
    share: float  # of the whole training, 0 to 1
    loss: float  # nats a sample, of this step
    chance: float  # the same for guessing evenly
    samples_per_second: float
    validation: float | None = None
    learning: str = "contexts"  # or what else is learned, see `SHARES`


class Training:
    """Weights, optimizers and position of one run; `train` is the function to call."""

    def __init__(self, store: Store, config: Learning, threads: int | None = None) -> None:
        if config.half_life is None:
            config = replace(config, half_life=half_life(store))
        self.store, self.config, self.at = store, config, Position()
        self.boundary = _boundary(store, config)
        torch.manual_seed(config.seed)
        self.learner = config.learner(store)
        self.batches = self.learner.batches(self.boundary)
        self.held_out = self.learner.batches(store.last_time, held_out=True)
        if self.batches.n_samples == 0:
            raise InputError(
                f"nothing to learn from: {store.n_events:,} events in {store.n_categories:,} categories, but "
                "no category has two items or more. Check the category column of the log."
            )
        self.epochs = config.epochs_for(self.batches.n_samples, self.batches.step_samples)
        self.minutes = config.minutes and config.minutes * (1 - sum(SHARES[name] for name in _beside(config)))
        self.total = min(self.batches.n_samples * self.epochs, config.samples or sys.maxsize)
        self.workers = ThreadPoolExecutor(min(config.parts, threads or config.parts))
        self.rows = ItemRows(torch.empty(0, config.dim), config.row_lr)
        self.optimizer = torch.optim.AdamW(
            self.learner.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )

    def begin(self, work: Path | None = None) -> None:
        """Give the item rows their first values; a resumed run has others. What may be used again is kept
        in the folder `work`."""
        generator = torch.Generator().manual_seed(self.config.seed)
        self.rows = ItemRows(self.learner.first_rows(self.boundary, generator, work), self.config.row_lr)

    @property
    def share(self) -> float:
        """Part of the training that is done, by samples or by the clock, whichever is further."""
        by_clock = self.at.seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(self.at.samples / self.total, by_clock))

    def run_step(self, parts: Sequence[Lesson]) -> float:
        """One optimizer step; the summed loss.

        Parts run side by side on a thread each, and their gradients are added in their order, so the result
        does not depend on the threads. Two threads of one processor each, and not one operation on both:
        operations are short, and waiting for the slower half of each costs more than the half saves.
        """
        c = self.config
        factor = min(1.0, (self.at.steps + 1) / _WARM_UP) * max(_LAST_RATE, 1 - self.share)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * factor
        numbers = [torch.from_numpy(part.numbers) for part in parts]
        rows = [self.rows.gather(named) for named in numbers]
        parameters = list(self.learner.parameters())
        samples = sum(part.samples for part in parts)

        def compute(nth: int) -> tuple[float, Sequence[Tensor]]:
            seed = _mixed(c.seed, self.at.epoch, self.at.step, nth)
            generator = torch.Generator().manual_seed(seed)  # of the masks of dropout
            loss = self.learner.loss(rows[nth], parts[nth], generator)
            leaves = [*parameters, rows[nth]]
            return loss.item(), torch.autograd.grad(loss / samples, leaves, materialize_grads=True)

        done = list(self.workers.map(compute, range(len(parts))))
        for parameter, grads in zip(parameters, zip(*(g for _, g in done), strict=True), strict=False):
            parameter.grad = sum(grads[1:], start=grads[0])
        self.optimizer.step()
        self.rows.update([(named, g[-1]) for named, (_, g) in zip(numbers, done, strict=True)], factor)
        return sum(loss for loss, _ in done)

    def run_epoch(self, save: Callable[[], None], progress: Callable[[Tick], None] | None) -> None:
        """From the current position to the end of its epoch, or of the minutes."""
        at, began, before = self.at, time.perf_counter(), self.at.seconds
        plan = islice(self.batches.epoch(self.config.seed, at.epoch), at.step, None)
        for parts, waited in _read_ahead(self.batches, plan, self.config, at):
            samples, chance = sum(p.samples for p in parts), sum(p.chance for p in parts)
            loss = self.run_step(parts) if parts else 0.0
            at.step, at.steps, at.samples = at.step + 1, at.steps + 1, at.samples + samples
            at.waiting, at.seconds = at.waiting + waited, before + time.perf_counter() - began
            at.tokens += sum(p.tokens for p in parts)
            at.padded += sum(p.padded for p in parts)
            if progress and samples:
                progress(Tick(at, self.share, loss / samples, chance / samples, at.samples / at.seconds))
            save()
            if self.minutes and at.seconds >= 60 * self.minutes:
                at.finished = f"{60 * self.minutes:g} seconds are over"
                break
            if at.samples >= self.total and self.config.samples:
                at.finished = f"{self.config.samples:,} samples are learned"
                break

    @torch.no_grad()
    def validate(self) -> float | None:
        """Nats below chance, a sample, on events that training has not seen; None if there are none."""
        rng, gain, samples = np.random.default_rng(self.config.seed), 0.0, 0
        for plan in self.held_out.after(self.boundary, _VALIDATION_SAMPLES, rng):
            for step in self.held_out.assemble(plan, rng):
                rows_Ud = self.rows.weight[torch.from_numpy(step.numbers)]
                loss = self.learner.loss(rows_Ud, step)
                gain, samples = gain + step.chance - loss.item(), samples + step.samples
        return gain / samples if samples else None

    def end_epoch(self) -> float | None:
        """Validate, move on to the next epoch, and decide whether there is to be one."""
        at, c = self.at, self.config
        gain = self.validate()
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

    Raises `InputError` for a store that has nothing to learn from.
    """
    target = Path(out)
    work = target.with_name(f".{target.name}.training")
    run = Training(store, config, threads)
    check_replaceable(target, run.learner.kind)  # now, and not after hours of training
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    if (work / "latest").exists():  # not `work`: a run may be killed while it writes its first checkpoint
        load_state(work / "latest", run)
    else:
        run.begin(work)
    saved_at = time.perf_counter()

    def save_now_and_then() -> None:
        nonlocal saved_at
        if time.perf_counter() - saved_at >= checkpoint_seconds:
            save_state(run, work / "latest")
            saved_at = time.perf_counter()

    with _processors(threads, config.parts):
        while not run.at.finished:
            run.run_epoch(save_now_and_then, progress)
            gain = run.end_epoch()
            if run.at.best == run.at.epoch - 1:
                save_state(run, work / "best")
            save_state(run, work / "latest")
            saved_at = time.perf_counter()
            if progress:
                progress(Tick(run.at, run.share, float("nan"), float("nan"), _rate(run.at), gain))
    position = run.at
    if position.validation and position.best < position.epoch - 1:
        load_state(work / "best", run)
        run.at = position
    beside = {}
    for name, of in _beside(config).items():
        beside[name] = _learn_beside(run, name, of, work, progress, checkpoint_seconds, threads)
    save_model(run, target, beside)
    shutil.rmtree(work, ignore_errors=True)
    return position


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
            progress(replace(tick, learning=name))

    path = work / name
    if path.exists():  # a run was killed between that and the saving of the model
        run.at.beside[name] = opening(path, "interests" if name == "interests" else "model").facts["training"]
        return path
    whole = run.config
    minutes = None
    if whole.minutes:
        left = (1 - sum(SHARES[n] for n in _beside(whole) if n not in run.at.beside)) * whole.minutes
        minutes = whole.minutes * SHARES[name] + max(0.0, left - run.at.all_seconds / 60)
    _share_factors(work, path.with_name(f".{path.name}.training"))
    config = replace(config, seed=whole.seed, minutes=minutes, samples=config.samples or whole.samples)
    if config.half_life is None:
        config = replace(config, half_life=whole.half_life)
    at = train(run.store, path, config, progress=say, checkpoint_seconds=checkpoint_seconds, threads=threads)
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


def _read_ahead(
    batches: Lessons, plan: Iterator[Any], config: Learning, at: Position
) -> Iterator[tuple[Sequence[Lesson], float]]:
    """Assemble steps on another thread while the model computes; yields (parts, seconds waited for them)."""
    waiting: deque[Future[Sequence[Lesson]]] = deque()
    first, epoch = at.step, at.epoch
    with ThreadPoolExecutor(1) as reader:  # one: `assemble` has scratch arrays of its own

        def submit_next(nth: int) -> None:
            rows = next(plan, None)
            if rows is not None:
                rng = np.random.default_rng([config.seed, epoch, nth])
                waiting.append(reader.submit(batches.assemble, rows, rng, config.parts))

        for nth in range(first, first + PREFETCH):
            submit_next(nth)
        nth = first + PREFETCH
        while waiting:
            began = time.perf_counter()
            parts = waiting.popleft().result()
            waited = time.perf_counter() - began
            submit_next(nth)
            nth += 1
            yield parts, waited
