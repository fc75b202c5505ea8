"""What a server counts of itself, for Prometheus; with several workers, summed over all of them."""

from __future__ import annotations

import math
import os
import time

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from longretriever.serve.serving import Serving

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
waiting = Gauge("longretriever_waiting", "Requests that wait or are worked on.", multiprocess_mode="livesum")


def exposition(serving: Serving) -> bytes:
    """The text that Prometheus reads. Counts the journal's rows: some milliseconds for a million."""
    registry = REGISTRY
    if os.environ.get(SHARED):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    return generate_latest(registry) + generate_latest(_now(serving))


def _now(serving: Serving) -> CollectorRegistry:
    """What is looked up rather than counted."""
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
    for name, (about, value) in gauges.items():
        Gauge(f"longretriever_{name}", about, registry=registry).set(value)
    Gauge("longretriever_model_info", "What is served.", ["model"], registry=registry).labels(
        serving.name
    ).set(1)
    return registry
