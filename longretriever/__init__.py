"""Candidates out of millions of items for each request, from a user's whole life of behaviors, with reasons.

    from longretriever import Retriever, Store, ingest, train

Names are loaded when they are first used, so that serving does not import what only training needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longretriever.errors import LongRetrieverError
from longretriever.saved import package_version

if TYPE_CHECKING:
    from longretriever.client import Client
    from longretriever.evaluate.run import evaluate_log
    from longretriever.market import Market, MarketConfig
    from longretriever.model.baselines.mind import MindConfig
    from longretriever.model.baselines.ulim import UlimConfig
    from longretriever.model.config import EbrConfig, PginConfig, TrainConfig
    from longretriever.model.extended import Added, Removed
    from longretriever.model.train import train
    from longretriever.retrieve.added import add_items, remove_items
    from longretriever.retrieve.indexing import index_model
    from longretriever.retrieve.interests import Contexts, Pgin, RandomInTop, Top
    from longretriever.retrieve.merge import probability, quota, round_robin, score
    from longretriever.retrieve.retrieval import Candidate, Retrieval
    from longretriever.retrieve.retriever import Retriever
    from longretriever.retrieve.rules import Rules
    from longretriever.store.behaviors import Life, Store
    from longretriever.store.ingest import ingest
    from longretriever.store.on_spark import Spark
    from longretriever.store.parts import Parts

_HOME = {
    "Added": "model.extended",
    "Candidate": "retrieve.retrieval",
    "Client": "client",
    "Contexts": "retrieve.interests",
    "EbrConfig": "model.config",
    "Life": "store.behaviors",
    "Market": "market",
    "MarketConfig": "market",
    "MindConfig": "model.baselines.mind",
    "Parts": "store.parts",
    "Pgin": "retrieve.interests",
    "PginConfig": "model.config",
    "RandomInTop": "retrieve.interests",
    "Removed": "model.extended",
    "Retrieval": "retrieve.retrieval",
    "Retriever": "retrieve.retriever",
    "Rules": "retrieve.rules",
    "Spark": "store.on_spark",
    "Store": "store.behaviors",
    "Top": "retrieve.interests",
    "TrainConfig": "model.config",
    "UlimConfig": "model.baselines.ulim",
    "add_items": "retrieve.added",
    "evaluate_log": "evaluate.run",
    "index_model": "retrieve.indexing",
    "ingest": "store.ingest",
    "probability": "retrieve.merge",
    "quota": "retrieve.merge",
    "remove_items": "retrieve.added",
    "round_robin": "retrieve.merge",
    "score": "retrieve.merge",
    "train": "model.train",
}

__version__ = package_version()
__all__ = [
    "Added",
    "Candidate",
    "Client",
    "Contexts",
    "EbrConfig",
    "Life",
    "LongRetrieverError",
    "Market",
    "MarketConfig",
    "MindConfig",
    "Parts",
    "Pgin",
    "PginConfig",
    "RandomInTop",
    "Removed",
    "Retrieval",
    "Retriever",
    "Rules",
    "Spark",
    "Store",
    "Top",
    "TrainConfig",
    "UlimConfig",
    "__version__",
    "add_items",
    "evaluate_log",
    "index_model",
    "ingest",
    "probability",
    "quota",
    "remove_items",
    "round_robin",
    "score",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longretriever' has no attribute {name!r}")
    try:
        return getattr(import_module(f"longretriever.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("torch", "onnx", "onnxscript", "safetensors"):
            from longretriever.errors import MissingExtra

            raise MissingExtra(
                f"longretriever.{name} needs {error.name}: `pip install 'longretriever[train]'`."
            ) from error
        raise


def __dir__() -> list[str]:
    return sorted(__all__)
