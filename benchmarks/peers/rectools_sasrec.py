"""RecTools' SASRec, in an environment that has `rectools[torch]` and `pyarrow`.

A sample is a position: one behavior to be foretold from those before it, paddings not counted. The package
learns from the last 51 behaviors of each user and no others. That is left so: given older ones as the lives
of further users, it found less of what comes next on two logs. The last event of some users is held out, as
the package's guide has it: the weights of the best epoch are kept, and learning ends when it is long past.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from task import Clock, K, Task

DIM, LENGTH = 64, 50
SETTINGS = {
    "lr": 3e-3,
    "loss": None,  # softmax over all items up to `softmax_up_to`; beyond, gBCE finds as much and is faster
    "softmax_up_to": 2048,
    "n_negatives": 64,
    "gbce_t": 0.75,
    "batch_size": 128,
    "dropout": 0.2,
    "heads": 2,
    "held_out": 500,  # users at most, and a tenth of them at most
    "patience": 3,
}


class Budget(Callback):  # type: ignore[misc]
    """Stops at the clock, or when validation has not been better for some epochs; counts positions."""

    def __init__(self, seconds: float, patience: int) -> None:
        self.clock, self.patience, self.samples = Clock(seconds), patience, 0
        self.losses: list[float] = []
        self.weights: dict[str, Any] = {}

    def on_train_epoch_start(self, trainer: Trainer, model: Any) -> None:
        self.clock.start()

    def on_train_batch_end(self, trainer: Trainer, model: Any, outputs: Any, batch: Any, nth: int) -> None:
        self.samples += int((batch["y"] != 0).sum())
        trainer.should_stop |= self.clock.over

    def on_validation_start(self, trainer: Trainer, model: Any) -> None:
        self.clock.stop()

    def on_validation_end(self, trainer: Trainer, model: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val_loss"]))
        if self.losses[-1] == min(self.losses):
            self.weights = copy.deepcopy(model.state_dict())
        best = int(np.argmin(self.losses))
        trainer.should_stop |= len(self.losses) - 1 - best >= self.patience


def main() -> None:
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    task = Task()
    c = {**SETTINGS, **task.settings}
    torch.set_num_threads(1)
    seed_everything(task.seed, verbose=False)
    loss = c["loss"] or ("softmax" if len(np.unique(task.item)) <= c["softmax_up_to"] else "gBCE")
    lives = _frame(task.user, task.item)
    model = SASRecModel(
        n_blocks=2,
        n_heads=c["heads"],
        n_factors=DIM,
        dropout_rate=c["dropout"],
        session_max_len=LENGTH,
        loss=loss,
        n_negatives=c["n_negatives"],
        gbce_t=c["gbce_t"],
        lr=c["lr"],
        batch_size=c["batch_size"],
        get_val_mask_func=lambda events: _last_of_some(events, task, c["held_out"]),
        get_trainer_func=lambda: _trainer(60 * task.minutes, c["patience"]),
    )
    model.fit(Dataset.construct(lives))
    budget = next(b for b in model.fit_trainer.callbacks if isinstance(b, Budget))
    model.lightning_model.load_state_dict(budget.weights)

    def lists(new: bool) -> Iterator[np.ndarray]:
        found = model.recommend(
            task.asked, Dataset.construct(lives), k=K, filter_viewed=new, on_unsupported_targets="ignore"
        )
        of = dict(tuple(found.groupby(Columns.User)[Columns.Item]))
        nothing = np.empty(0, np.int64)
        yield from (of[user].to_numpy(np.int64) if user in of else nothing for user in task.asked)

    task.finish(
        lists,
        samples=budget.samples,
        train_seconds=budget.clock.seconds,
        settings={**c, "loss": loss},
        validation=[round(x, 4) for x in budget.losses],
    )


def _trainer(seconds: float, patience: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        min_epochs=0,
        max_epochs=100_000,
        num_sanity_val_steps=0,
        callbacks=[Budget(seconds, patience)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )


def _frame(user: np.ndarray, item: np.ndarray) -> pd.DataFrame:
    """Events as RecTools wants them; their place stands for the time, which decides the order alone."""
    frame = pd.DataFrame({Columns.User: user, Columns.Item: item, Columns.Weight: 1.0})
    frame[Columns.Datetime] = pd.to_datetime(np.arange(len(frame)), unit="s")
    return frame


def _last_of_some(events: pd.DataFrame, task: Task, most: int) -> np.ndarray:
    """[events] whether it is the last event of one of the users that are drawn for validation."""
    user = events[Columns.User].to_numpy()
    rng = np.random.default_rng(task.seed)
    drawn = rng.permutation(np.unique(task.user))[: min(most, max(1, task.n_users // 10))]
    last = ~events.duplicated(Columns.User, keep="last").to_numpy()
    return last & np.isin(user, drawn)


if __name__ == "__main__":
    main()
