"""How long does a day of an A/B test take, and how much of it is the product's own retrieval?

    python benchmarks/ab.py [--users 10000] [--events 2000000] [--samples 100000] [--work FOLDER] [--json]

One arm of five routes (popular, item-to-item, EBR, MIND, the paper's LongRetriever) lives a day of the
simulated market after its warm-up, in this process, on one core. Beside the seconds stands a share: what of
the day the routes took to answer. The rest is the journal, features, ranker, pages and people.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longretriever.experiment.ab import run as ab
from longretriever.experiment.ab.plan import Arm, Finder, Plan, world
from longretriever.experiment.ab.routes import known
from longretriever.experiment.apart import learn_apart
from longretriever.store.behaviors import Life

ROUTES = ("popular", "item-to-item", "ebr", "mind", "longretriever-paper")


@dataclass
class Timed:
    """A route that counts the seconds it takes, and the requests."""

    finder: Finder
    seconds: float = 0.0
    requests: int = 0

    def find(self, lives: Sequence[Life], k: int, seed: int) -> list[np.ndarray]:
        began = time.perf_counter()
        found = self.finder.find(lives, k, seed)
        self.seconds += time.perf_counter() - began
        self.requests += len(lives)
        return found


def measure(users: int, events: int, samples: int, folder: Path) -> dict[str, object]:
    routes = known()
    arm = Arm("five routes", tuple(routes[name] for name in ROUTES))
    plan = Plan(world(events, users), (arm,), days=1, samples=samples)
    test = ab.Test(plan, folder, learn_apart, print, None)
    test.prepare()
    place, day = test._world(arm, 1), test.days[0]
    if not test._file(None, 0).exists():
        ab._live(plan, test._world(None, 0), None, 0, test._knowledge(0))
    test._begin(day, [arm])
    timed = {route.name: Timed(ab._finder(route, place)) for route in arm.routes}
    for key, finder in ab._opened.items():
        ab._opened[key] = next(one for one in timed.values() if one.finder is finder)
    knows = test._knowledge(day)
    began = time.perf_counter()
    ab._live(plan, place, arm, day, knows)
    seconds = time.perf_counter() - began
    shown = ab.read_day(test._file(arm, day)).shown
    asked = next(iter(timed.values())).requests
    return {
        "users": users,
        "visits": asked,
        "impressions": len(shown.user),
        "seconds": round(seconds, 1),
        "visits_per_second": round(asked / seconds, 1),
        "share_of_retrieval": round(sum(one.seconds for one in timed.values()) / seconds, 3),
        "requests_per_second": {name: round(one.requests / one.seconds) for name, one in timed.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--work", type=Path, help="keep world and models here")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with nullcontext(given.work) if given.work else tempfile.TemporaryDirectory() as folder:
        found = measure(given.users, given.events, given.samples, Path(folder))
    if given.json:
        print(json.dumps(found))
        return
    print(
        f"{found['visits']:,} visits of {found['users']:,} users, {found['impressions']:,} impressions: "
        f"{found['seconds']} s, {found['visits_per_second']} visits/s, of which retrieval "
        f"{found['share_of_retrieval']:.0%}"
    )
    for name, speed in found["requests_per_second"].items():  # type: ignore[attr-defined]
        print(f"  {name:24} {speed:>8,} requests/s")


if __name__ == "__main__":
    main()
