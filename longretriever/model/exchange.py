"""What do the processes of one training tell each other? Gradients of dense weights, and rows of items.

Nothing that they send grows with the number of items, users or events. Three kinds of message, each counted
in bytes where it is sent (`Wire.sent`):

- "dense", once a step: the gradients of all dense weights in one buffer, added over the processes
  (all-reduce), so that each makes the same optimizer step on a copy of its own.
- "rows", only in steps in which a process names items of another: which rows it wants, the rows, and their
  gradients on the way back to the one process that keeps them and their optimizer state (all-to-all).
- "agreement", a few numbers: how many samples a step has, and whether there is a next one. That, and which
  rows are wanted, is agreed on while earlier steps are computed, by the thread that reads ahead.

All runs on the processors, by gloo, as training does. Alone (`Wire()`), nothing is sent and nothing changes.

d width, U distinct items of a process's step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from longretriever.errors import ProcessLost
from longretriever.model.learner import ItemRows, Lesson
from longretriever.model.sharding import Plan

_PATIENCE = timedelta(
    hours=12
)  # the others wait while the first factorizes; that one is gone, torchrun tells
T = TypeVar("T")


@contextmanager
def joined() -> Iterator[Wire]:
    """The processes that torchrun has started, or that have joined already; without, this one alone.

    Where one of several fails, one says why, and all end. What is joined stays so until the process ends:
    torchrun keeps what the processes said to find each other, and joining a second time would find that.
    """
    if not dist.is_initialized() and dist.is_torchelastic_launched() and os.environ["WORLD_SIZE"] != "1":
        # Where torchrun starts processes again, those before left their addresses in the store.
        store, rank, world = next(rendezvous("env://", timeout=_PATIENCE))
        store = dist.PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Wire()
        return
    try:
        yield Wire(dist.get_rank(), dist.get_world_size())
    except Exception as error:
        if not _first_to_fail(error):
            raise SystemExit(1) from None
        raise


def _first_to_fail(error: Exception) -> bool:
    """Whether no other process has failed before, with another error."""
    try:  # torchrun keeps this store, so it outlives the processes; there is no public way to it
        store = dist.distributed_c10d._get_default_store()
        mine = f"{dist.get_rank()} {id(error)}"  # within `joined` in `joined`, an error comes twice
        return bool(store.compare_set("longretriever/failed", "", mine).decode() == mine)
    except RuntimeError:  # it went with the first process
        return True


class Wire:
    """The processes of a training, as one of them sees them; each call is made by all, in one order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.sent = {"dense": 0, "rows": 0, "agreement": 0}  # bytes, by this process to others
        self.waited = 0.0  # seconds in which this process waited for others, or for the network
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if world > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def another(self) -> Wire:
        """A wire between the same processes for another thread, as the calls of each need an order."""
        return Wire(self.rank, self.world)

    def total(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """The sum over processes, of numbers of the same type in all."""
        total = np.array(values)
        if self.world > 1:
            self._all_reduce(torch.from_numpy(total), "agreement")
        return total

    def from_first(self, value: T) -> T:
        """What the first process says."""
        if self.world == 1:
            return value
        box = [value]
        self._call(lambda: dist.broadcast_object_list(box, src=0, group=self._group))
        return box[0]

    def together(self, value: T) -> list[T]:
        """What each process says, in their order."""
        if self.world == 1:
            return [value]
        said: list[Any] = [None] * self.world
        self._call(lambda: dist.all_gather_object(said, value, group=self._group))
        return said

    def meet(self) -> None:
        """Go on when all are here."""
        self.total([0])

    def add(self, tensors: Sequence[Tensor], said: Sequence[float]) -> tuple[list[Tensor], list[float]]:
        """The sums over processes of tensors, and beside them of a few numbers, in one message."""
        if self.world == 1:
            return list(tensors), list(said)
        flat = torch.cat([*(t.reshape(-1) for t in tensors), torch.tensor(said, dtype=torch.float32)])
        self._all_reduce(flat, "dense")
        *parts, numbers = flat.split([*(t.numel() for t in tensors), len(said)])
        return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)], numbers.tolist()

    def swap(self, out: Tensor, give: np.ndarray, take: np.ndarray, kind: str = "rows") -> Tensor:
        """Give the first `give[0]` rows of `out` to process 0, the next to 1, ...; take `take` of each."""
        if self.world == 1:
            return out
        into = out.new_empty(int(take.sum()), *out.shape[1:])
        self.sent[kind] += int(give.sum() - give[self.rank]) * out[:1].numel() * out.element_size()
        splits = take.tolist(), give.tolist()
        self._call(lambda: dist.all_to_all_single(into, out.contiguous(), *splits, group=self._group))
        return into

    def _all_reduce(self, flat: Tensor, kind: str) -> None:
        ring = 2 * (self.world - 1) / self.world  # what each process sends of a buffer, and gets
        self.sent[kind] += round(ring * flat.numel() * flat.element_size())
        self._call(lambda: dist.all_reduce(flat, group=self._group))

    def _call(self, what: Callable[[], object]) -> None:
        began = time.perf_counter()
        try:
            what()
        except RuntimeError as error:
            raise ProcessLost(
                f"process {self.rank} of {self.world} lost another, which was killed or cannot be reached "
                f"({str(error).splitlines()[0][:200]}). With --max-restarts, torchrun goes on from the last "
                "checkpoint; otherwise give the same command again, with any number of processes."
            ) from error
        self.waited += time.perf_counter() - began


@dataclass
class Turn:
    """A step of all processes, and the parts of it that this one computes."""

    parts: Sequence[Lesson]
    keys: Sequence[tuple[int, ...]]  # of each part: which of its shard's, and its shard if there are several
    samples: int  # this and what follows: of all processes
    chance: float
    tokens: int
    padded: int
    places: list[Tensor]  # of each part: where the rows that it names are, in `ItemRows` or in `trade`
    trade: Trade | None  # where some process names rows of another

    def gather(self, rows: ItemRows) -> list[Tensor]:
        """The rows that each part names, as leaves to take the gradient of."""
        if self.trade is None:
            return [rows.gather(place) for place in self.places]
        found_Ud = self.trade.fetch(rows)
        return [found_Ud[place].requires_grad_() for place in self.places]

    def update(self, rows: ItemRows, grads: Sequence[Tensor], factor: float) -> None:
        """Apply the gradients of those rows where they are kept."""
        pairs = list(zip(self.places, grads, strict=True))
        if self.trade is not None:
            pairs = self.trade.settle(pairs, rows.weight.shape[1])
        if pairs:
            rows.update(pairs, factor)


class Trade:
    """Rows that processes want of each other in one step: asked for, fetched, and paid for in gradients."""

    def __init__(self, numbers: np.ndarray, plan: Plan, ahead: Wire, wire: Wire) -> None:
        """`numbers` [U] are distinct, ascending; they are told to their owners over `ahead`."""
        owner = plan.process_of(numbers, wire.world)
        order = np.argsort(owner, kind="stable")
        self.wire, self.order = wire, torch.from_numpy(order)
        self.want = np.bincount(owner, minlength=wire.world)
        one = np.ones(wire.world, np.int64)
        self.give = ahead.swap(torch.from_numpy(self.want), one, one, "agreement").numpy()
        asked = ahead.swap(torch.from_numpy(numbers[order].astype(np.int32)), self.want, self.give)
        self.asked = torch.from_numpy(plan.place(asked.numpy()))

    def fetch(self, rows: ItemRows) -> Tensor:
        """[U, d] the rows of `numbers`."""
        found_Ud = torch.empty(len(self.order), rows.weight.shape[1])
        found_Ud[self.order] = self.wire.swap(rows.weight[self.asked], self.give, self.want)
        return found_Ud

    def settle(self, pairs: Sequence[tuple[Tensor, Tensor]], width: int) -> list[tuple[Tensor, Tensor]]:
        """From (positions in `numbers`, gradients) of parts here to (places, gradients) of each process's."""
        total_Ud = torch.zeros(len(self.order), width)
        for place, grad in pairs:
            total_Ud[place] += grad
        back = self.wire.swap(total_Ud[self.order], self.want, self.give)
        each = self.give.tolist()
        return list(zip(self.asked.split(each), back.split(each), strict=True))


class Exchange:
    """Makes a step of all processes from the parts of each."""

    def __init__(self, wire: Wire, plan: Plan | None) -> None:
        self.wire, self.ahead, self.plan = wire, wire.another(), plan

    @property
    def sent(self) -> dict[str, int]:
        """Bytes that this process has sent, by kind."""
        return {kind: n + self.ahead.sent[kind] for kind, n in self.wire.sent.items()}

    def turn(
        self, parts: Sequence[Lesson], keys: Sequence[tuple[int, ...]], going: bool, wire: Wire | None = None
    ) -> Turn | None:
        """The step of which these are this process's parts; None when no process is `going` on.

        Agreed on by `wire`, that of the thread that reads ahead unless another is given.
        """
        ahead, plan = wire or self.ahead, self.plan
        named = [part.numbers for part in parts]
        if plan is None:
            union, remote = None, 0
        else:
            union = np.unique(np.concatenate([np.empty(0, np.int64), *named]))
            remote = int((plan.process_of(union, self.wire.world) != self.wire.rank).sum())
        mine = [going, *(sum(getattr(p, what) for p in parts) for what in ("samples", "chance"))]
        mine += [sum(p.tokens for p in parts), sum(p.padded for p in parts), remote]
        told = ahead.total(np.array(mine, np.float64))  # exact for whole numbers below 2^53
        any_going, samples, chance, tokens, padded, remote = told.tolist()
        if not any_going:
            return None
        trade = None
        if plan is None or union is None:
            places = [torch.from_numpy(numbers) for numbers in named]
        elif remote:
            trade = Trade(union, plan, ahead, self.wire)
            places = [torch.from_numpy(np.searchsorted(union, numbers)) for numbers in named]
        else:
            places = [torch.from_numpy(plan.place(numbers)) for numbers in named]
        return Turn(parts, keys, int(samples), chance, int(tokens), int(padded), places, trade)
