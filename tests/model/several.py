"""What tests have several processes do: `torchrun ... -m tests.model.several STORE[:STORE] OUT NAME...`.

Trains each named configuration to OUT/NAME, on the second store to OUT/NAME-1; with KILL="RANK STEP" in the
environment, the process RANK of the first life kills itself in that step. With FAIL, the command trains, and
that process raises there instead.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from longretriever import cli
from longretriever.errors import InputError
from longretriever.model.baselines.mind import MindConfig
from longretriever.model.baselines.ulim import UlimConfig
from longretriever.model.config import EbrConfig, Learning, PginConfig, TrainConfig
from longretriever.model.train import Training, train
from longretriever.store.behaviors import Store

SMALL = {"dim": 8, "step_samples": 150, "epochs": 1, "shards": 3, "warm_start": False}
CONTEXTS = TrainConfig(
    **SMALL,
    context_length=8,
    overlap=2,
    whole_category_up_to=8,
    sampled_negatives=6,
    whole=None,
    interests=None,
)
CONFIGS: dict[str, Learning] = {
    "contexts": CONTEXTS,
    "default": replace(
        CONTEXTS,
        warm_start=True,
        recent_length=4,
        epochs=2,
        whole=EbrConfig(**SMALL, length=8, whole_up_to=8, sampled_negatives=6),
        interests=PginConfig(dim=8, recent_length=4, categories=3, step_samples=200, epochs=2),
    ),
    "mind": MindConfig(**SMALL, length=6),
    "ulim": UlimConfig(**SMALL, context_length=6, recent_length=6, interests=None),
    "ebr": EbrConfig(**{**SMALL, "shards": 2}, length=8, whole_up_to=0, sampled_negatives=20),
    "minutes": replace(CONTEXTS, shards=2, epochs=10_000, patience=10_000, minutes=0.02),
}


def main() -> None:
    stores, out, *names = sys.argv[1:]
    wrong = os.environ.get("KILL") or os.environ.get("FAIL")
    if wrong and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        rank, step = map(int, wrong.split())
        run_step = Training.run_step

        def fatal(run: Training, turn) -> float:
            if (run.wire.rank, run.at.steps) == (rank, step):
                if "FAIL" in os.environ:
                    raise InputError("the disk of this machine is full of holes")
                os.kill(os.getpid(), signal.SIGKILL)
            return run_step(run, turn)

        Training.run_step = fatal  # type: ignore[method-assign]
    torch.set_num_threads(1)
    if "FAIL" in os.environ:
        sys.argv = ["longretriever", "train", stores, "--out", f"{out}/model", "--dim", "8", "--epochs", "1"]
        cli.main()
    for nth, store in enumerate(stores.split(":")):
        for name in names:
            path = Path(out) / (f"{name}-{nth}" if nth else name)
            train(Store.open(store), path, CONFIGS[name], checkpoint_seconds=0 if wrong else 60)


if __name__ == "__main__":
    main()
