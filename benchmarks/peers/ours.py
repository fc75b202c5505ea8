"""LongRetriever on the task of the peers, in the project's own environment: one processor, one process.

A sample is an event to be foretold. The default learns three things in its minutes, vectors of contexts, one
of the whole user and the choice of contexts: samples and seconds of all three are summed. Ingest, the warm
start of the item rows, validation and indexing are preparation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from task import K, Task

from longretriever.evaluate.run import Retrieved
from longretriever.model.config import TrainConfig
from longretriever.model.train import train
from longretriever.retrieve.indexing import index_model
from longretriever.retrieve.retriever import Retriever
from longretriever.store.behaviors import Store
from longretriever.store.ingest import ingest

CONFIGS = {"longretriever": TrainConfig(), "contexts": TrainConfig(whole=None, interests=None)}


def main() -> None:
    task = Task()
    torch.set_num_threads(1)
    events, items = task.folder / "events.parquet", task.folder / "items.parquet"
    store, model = task.folder / "store", task.folder / "model"
    ingest(events, store, items=items if items.exists() else None, threads=1)
    config = replace(CONFIGS[task.system], minutes=task.minutes, seed=task.seed, **task.settings)
    at = train(Store.open(store), model, config, threads=1, fresh=True)
    index_model(model)
    retriever = Retriever.load(model, store=task.folder / "full")
    asked = Retrieved(retriever, {}, task.seed)
    before = np.full(len(task.asked), int(task.time.max()) + 1)

    def lists(new: bool) -> Iterator[np.ndarray]:
        for row in asked.recommend(task.asked, before, K, new).item:
            yield row[row >= 0]

    task.finish(
        lists,
        samples=at.samples + sum(of["samples"] for of in at.beside.values()),
        train_seconds=at.all_seconds,
        ended={"contexts": at.finished, **{name: of["finished"] for name, of in at.beside.items()}},
    )


if __name__ == "__main__":
    main()
