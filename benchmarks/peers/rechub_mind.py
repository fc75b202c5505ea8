"""torch-rechub's MIND, in an environment that has `torch-rechub` and `pyarrow`: as shipped, and repaired.

A sample is an event to be foretold from the 50 before it, a row each, as the package has it. As shipped it is
learned as the package's own example does: user ids and histories in, 3 negatives a sample drawn by
popularity ** .75, `MatchTrainer` in list-wise mode on its `MatchDataGenerator`, Adam. Kinder than the example
are the history, the last 50 events and not the first 50 of a life, the rate (.01, .001 found a third), and
that NumPy makes the rows.

Repaired it has a temperature, first weights that let the history through, routing among interests, the rest
of the batch as negatives, batches cut as arrays instead of row by row, and the weights of its best epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from task import Clock, Task, best
from torch import Tensor, nn
from torch_rechub.basic.features import SequenceFeature, SparseFeature
from torch_rechub.basic.initializers import RandomNormal
from torch_rechub.models.matching import MIND
from torch_rechub.trainers import MatchTrainer
from torch_rechub.utils.data import MatchDataGenerator

DIM, LENGTH = 64, 50
SHIPPED = {"lr": 1e-2, "batch_size": 256, "negatives": 3, "weight_decay": 1e-6, "temperature": 0.02}
REPAIRED = {
    "lr": 1e-2,
    "batch_size": 256,
    "weight_decay": 1e-6,
    "temperature": 0.1,
    "held_out": 0.02,  # newest part of the samples
    "patience": 3,  # epochs
}


class Repaired(MIND):  # type: ignore[misc]
    """The same model without its faults."""

    def __init__(self, *features: Any, **more: Any) -> None:
        super().__init__(*features, **more)
        # torch.rand leaves every weight of the last map positive: it adds up what the capsules hold, where it
        # should tell directions apart.
        nn.init.xavier_uniform_(self.convert_user_weight)
        # Item rows of length 1 that reach routing as they are. The package's are 8e-4 long at first; squash
        # nearly squares that, and with capsules of 1e-8 beside the row of the user's id of 8e-4, the
        # history has no say in the user's vectors: exchanged for another's, it leaves their cosine at 1.
        for table in self.embedding.embed_dict.values():
            nn.init.normal_(table.weight, std=DIM**-0.5)
        nn.init.eye_(self.capsule.linear.weight)
        self.capsule.forward = self._route

    def _route(self, item_eb: Tensor, mask: Tensor) -> Tensor:
        """Routing that shares each behavior out among the interests, as the paper has it. The package's
        softmax runs over behaviors, paddings among them: one behavior alone keeps a 50th of itself, and
        nothing keeps interests apart. It also copies each behavior for each interest."""
        low_BLd = self.capsule.linear(item_eb)
        still_BLd = low_BLd.detach()
        logit_BKL = torch.randn(len(low_BLd), self.interest_num, low_BLd.shape[1])
        for nth in range(self.capsule.routing_times):
            last = nth == self.capsule.routing_times - 1
            z_BKd = (logit_BKL.softmax(1) * mask[:, None]) @ (low_BLd if last else still_BLd)
            square = z_BKd.square().sum(-1, keepdim=True)
            capsule_BKd = z_BKd * torch.rsqrt(square + 1e-9) * square / (1 + square)
            logit_BKL = logit_BKL + capsule_BKd.detach() @ still_BLd.transpose(1, 2)
        return capsule_BKd

    def in_batch(self, x: dict[str, Tensor], log_q: Tensor) -> Tensor:
        """The loss with the other targets of the batch as competitors, less the log of their frequency.
        `MatchTrainer` offers such a loss for this model, too, and then refuses several interests."""
        user_BKd = self.user_tower(x)
        item_Bd = F.normalize(self.embedding(x, self.item_features)[:, 0], dim=-1)
        nearest_B = (user_BKd @ item_Bd[:, :, None])[..., 0].argmax(1)
        user_Bd = user_BKd[torch.arange(len(user_BKd)), nearest_B]
        # The package keeps the temperature and never divides by it. Of bare cosines the loss over 1 target
        # and 3 others cannot fall below .34, over 255 others not below 3.6.
        logit_BB = user_Bd @ item_Bd.T / self.temperature - log_q[x["item"].long()]
        same_BB = (x["item"][:, None] == x["item"]) & ~torch.eye(len(item_Bd), dtype=torch.bool)
        return F.cross_entropy(logit_BB.masked_fill(same_BB, -1e4), torch.arange(len(item_Bd)))


class Samples:
    """Events with at least one before them, as the package has them: a row of 50 numbers each, 0 pads."""

    def __init__(self, task: Task, users: bool) -> None:
        self.task, self.users = task, users
        place = np.arange(len(task.item)) - task.start[task.user]
        self.event = np.flatnonzero(place > 0)
        self.x = {
            "user_id": self.number(task.user[self.event]),
            "item": task.item[self.event].astype(np.int32) + 1,
            "hist_item": self.history(self.event, place[self.event]),
        }

    def history(self, end: np.ndarray, place: np.ndarray) -> np.ndarray:
        """[n, 50] the items of the last events before row `end`, oldest first, padded behind."""
        count = np.minimum(place, LENGTH)
        at = (end - count)[:, None] + np.arange(LENGTH)
        there = np.arange(LENGTH) < count[:, None]
        item = self.task.item[np.minimum(at, len(self.task.item) - 1)]
        return np.where(there, item + 1, 0).astype(np.int32)

    def number(self, user: np.ndarray) -> np.ndarray:
        return (user + 1 if self.users else np.zeros_like(user)).astype(np.int32)

    def asked(self) -> dict[str, np.ndarray]:
        user = self.task.asked
        end = self.task.start[user + 1]
        return {
            "user_id": self.number(user),
            "hist_item": self.history(end, end - self.task.start[user]),
        }


def main() -> None:
    task = Task()
    repaired = task.system == "rechub-repaired"
    c = {**(REPAIRED if repaired else SHIPPED), **task.settings}
    torch.set_num_threads(1)
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)
    # repaired, no user has a row of his own: it found no more than the history alone
    samples, clock = Samples(task, users=not repaired), Clock(60 * task.minutes)
    learned, more = (_repaired if repaired else _shipped)(task, samples, c, clock)
    torch.manual_seed(task.seed)  # routing begins at random, in serving too
    user_NKd, item_Jd, shown_J = _vectors(learned, task, samples)

    def lists(new: bool) -> Iterator[np.ndarray]:
        for user, vector_Kd in zip(task.asked, user_NKd, strict=True):
            score_J = (vector_Kd @ item_Jd.T).max(0)
            if new:
                score_J[np.isin(shown_J, task.met(user))] = -np.inf
            yield shown_J[best(score_J)]

    task.finish(lists, train_seconds=clock.seconds, settings=c, **more)


def _features(task: Task, std: float) -> tuple[list[Any], ...]:
    more = {"embed_dim": DIM, "initializer": RandomNormal(0, std)}
    user = SparseFeature("user_id", task.n_users + 1, **more)
    item = SparseFeature("item", task.n_items + 1, **more)
    lists = [
        SequenceFeature(name, task.n_items + 1, embed_dim=DIM, pooling="concat", shared_with="item")
        for name in ("hist_item", "neg_items")
    ]
    return [user], lists[:1], [item], lists[1:]


def _negatives(task: Task, size: tuple[int, ...]) -> np.ndarray:
    """Drawn by popularity ** .75, what the package's `sample_method=1` does, without its dictionaries."""
    weight = np.bincount(task.item) ** 0.75
    upto = np.cumsum(weight) / weight.sum()
    return (np.searchsorted(upto, np.random.random(size)) + 1).astype(np.int32)


def _shipped(task: Task, samples: Samples, c: dict[str, Any], clock: Clock) -> tuple[MIND, dict[str, Any]]:
    model = MIND(*_features(task, 1e-4), max_length=LENGTH, temperature=c["temperature"])
    x = {**samples.x, "neg_items": _negatives(task, (len(samples.event), c["negatives"]))}
    loader, _, _ = MatchDataGenerator(x, np.zeros(len(samples.event), np.int64)).generate_dataloader(
        {"user_id": task.asked}, {"item": np.arange(1)}, batch_size=c["batch_size"], num_workers=0
    )
    optimizer = {"lr": c["lr"], "weight_decay": c["weight_decay"]}
    trainer = MatchTrainer(model, mode=2, optimizer_params=optimizer)
    seen, losses = 0, []

    def until_over() -> Iterator[Any]:
        nonlocal seen
        for batch in loader:
            yield batch
            seen += len(batch[1])
            if clock.over:
                break

    clock.start()
    while not clock.over:
        losses.append(trainer.train_one_epoch(until_over()))
    clock.stop()
    return model, {"samples": seen, "losses": [round(x, 4) for x in losses[-5:]]}


def _repaired(task: Task, samples: Samples, c: dict[str, Any], clock: Clock) -> tuple[MIND, dict[str, Any]]:
    model = Repaired(*_features(task, 1.0), max_length=LENGTH, temperature=c["temperature"])
    count = np.bincount(samples.x["item"], minlength=task.n_items + 1)
    log_q = torch.from_numpy(np.log(np.maximum(count, 1))).float()
    x = {name: torch.from_numpy(column) for name, column in samples.x.items()}
    newest = np.argsort(task.time[samples.event], kind="stable")
    cut = len(newest) - int(c["held_out"] * len(newest))
    learn, held_out = newest[:cut], torch.from_numpy(newest[cut:])
    optimizer = torch.optim.Adam(model.parameters(), lr=c["lr"], weight_decay=c["weight_decay"])
    rng, seen, losses, weights = np.random.default_rng(task.seed), 0, [], {}

    def loss_of(rows: Tensor) -> Tensor:
        return model.in_batch({name: column[rows] for name, column in x.items()}, log_q)

    while not clock.over:
        model.train()
        clock.start()
        order = torch.from_numpy(rng.permutation(learn))
        for rows in order.split(c["batch_size"]):
            loss = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(rows)
            if clock.over:
                break
        clock.stop()
        model.eval()
        with torch.no_grad():
            parts = [loss_of(rows).item() for rows in held_out.split(c["batch_size"])]
        losses.append(float(np.mean(parts)))
        if losses[-1] == min(losses):
            weights = copy.deepcopy(model.state_dict())
        if len(losses) - 1 - int(np.argmin(losses)) >= c["patience"]:
            break
    model.load_state_dict(weights)
    return model, {"samples": seen, "losses": [round(x, 4) for x in losses]}


@torch.no_grad()
def _vectors(model: MIND, task: Task, samples: Samples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[N, K, d] of the users asked, [J, d] of the items that occur, [J] their numbers."""
    model.eval()
    shown_J = np.unique(task.item)
    asked = {name: torch.from_numpy(column) for name, column in samples.asked().items()}
    model.mode = "user"
    user_NKd = model(asked)
    model.mode = "item"
    item_Jd = model({"item": torch.from_numpy(shown_J + 1)})
    return user_NKd.numpy(), item_Jd.numpy(), shown_J


if __name__ == "__main__":
    main()
