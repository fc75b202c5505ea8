"""What a server counts of itself, for Prometheus; with several workers, summed over all of them."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from longretriever.serve.serving import Serving
    from longretriever.shards.fleet import Fleet
    from longretriever.shards.held import Shard

SHARED = "PROMETHEUS_MULTIPROC_DIR"
"""Where workers keep their counts; read by prometheus_client when it is imported."""

_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)

requests = Counter(
    "longretriever_requests", "Answered, by what was asked and how it went.", ["route", "status"]
)
latency = Histogram(
    "longretriever_request_seconds", "From first byte to answer.", ["route"], buckets=_BUCKETS
)
stage = Histogram("longretriever_stage_seconds", "Of a retrieval, by stage.", ["stage"], buckets=_BUCKETS)
fallbacks = Counter("longretriever_fallbacks", "Answers of what is popular, for want of behaviors.")
without_live = Counter(
    "longretriever_without_live", "Answers of the store alone, as live events could not be had."
)
refused = Counter("longretriever_refused", "Requests that found the queue full, or ran out of time.", ["why"])
events = Counter("longretriever_events", "Live events.", ["result"])
reloads = Counter("longretriever_reloads", "Newer models, indexes and stores.", ["result"])
partial = Counter("longretriever_partial", "Answers for which not all that was asked could be searched.")
shard_calls = Counter(
    "longretriever_shard_calls", "Tries of a router, by how they went.", ["shard", "result"]
)
shard_latency = Histogram(
    "longretriever_shard_seconds",
    "Of a shard's answers, as the router sees them.",
    ["shard"],
    buckets=_BUCKETS,
)
waiting = Gauge("longretriever_waiting", "Requests that wait or are worked on.", multiprocess_mode="livesum")


def told(shard: str, how: str, seconds: float) -> None:
    """How a try to ask a shard went."""
    shard_calls.labels(shard, how).inc()
    if how == "answered":
        shard_latency.labels(shard).observe(seconds)


def exposition(serving: Serving, fleet: Fleet | None = None) -> bytes:
    """The text that Prometheus reads. Counts the journal's rows: some milliseconds for a million."""
    registry, live = CollectorRegistry(), serving.live_events()
    gauges: dict[str, tuple[str, float]] = {
        "live_events": (
            "Events newer than the store; NaN: cannot be counted.",
            math.nan if live is None else live,
        ),
        "live_up": ("1 if all live events can be had.", float(serving.journal.trouble() is None)),
        "journal_waiting": ("Calls of this worker that wait for the disk.", serving.journal.waiting),
        "index_age_seconds": ("Since the model was made.", time.time() - serving.made),
        "loaded_seconds": ("Since this worker loaded it.", time.time() - serving.loaded),
        "store_events": ("Behaviors in the store.", serving.store.n_events),
    }
    if fleet is not None:
        up = Gauge("longretriever_shard_up", "Whether this worker asks it.", ["shard"], registry=registry)
        for server in fleet.servers:
            up.labels(server.url).set(server.up)
    return _counted() + _now(serving.name, gauges, registry)


def exposition_of_shard(shard: Shard) -> bytes:
    """The same of a shard."""
    gauges = {
        "loaded_seconds": ("Since this worker loaded it.", time.time() - shard.loaded),
        "shard_items": ("Items of the newest model held here.", shard.items),
    }
    return _counted() + _now(shard.name, gauges, CollectorRegistry())


def _counted() -> bytes:
    registry = REGISTRY
    if os.environ.get(SHARED):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return generate_latest(registry)


def _now(model: str, gauges: Mapping[str, tuple[str, float]], registry: CollectorRegistry) -> bytes:
    """What is looked up rather than counted."""
    for name, (about, value) in gauges.items():
        Gauge(f"longretriever_{name}", about, registry=registry).set(value)
    Gauge("longretriever_model_info", "What is served.", ["model"], registry=registry).labels(model).set(1)
    return generate_latest(registry)
