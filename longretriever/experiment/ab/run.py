"""Which version of the platform do people like better? An A/B test in the simulated market, run to its end.

The world is made once: the market's log, a store of all before the test, every distinct model. Then day
after day: the ranker learns from what all arms have shown so far, and each arm lives its day in a process of
its own. Whatever is finished lies in `work` under a name that is a hash of all that decides it: a test that
was stopped goes on where it was, and tests that share a world or a model share its making.

What the platform counts (popularity, click rates, the ranker) it counts over all arms together, as a real one
does; so no arm has a luck of its own beside that of its users, and users are what figures are resampled over.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from zipfile import BadZipFile

import faiss
import numpy as np
import pyarrow.parquet as pq

from longretriever.errors import NotSaved, SavedError
from longretriever.events import SECONDS_PER_DAY, TIME
from longretriever.experiment.ab import online
from longretriever.experiment.ab.day import Day, Numbering, Platform, Shown, write
from longretriever.experiment.ab.plan import MOST_ROUTES, Arm, Finder, Plan, Route
from longretriever.experiment.ab.ranking import Features, Ranker, Statistics, learned, need_sklearn
from longretriever.experiment.ab.routes import Learned
from longretriever.experiment.apart import learn_apart
from longretriever.experiment.plan import described
from longretriever.experiment.runs import Learn, alone, correct, environment, made, write_whole
from longretriever.market import Log, Market, MarketConfig
from longretriever.market.feed import Feed
from longretriever.market.log import BEHAVIORS
from longretriever.model.warm import item_factors
from longretriever.retrieve.bulk import cores
from longretriever.retrieve.retriever import Retriever
from longretriever.saved import package_version
from longretriever.store.behaviors import Store
from longretriever.store.compact import compact
from longretriever.store.ingest import ingest
from longretriever.store.live import Journal, Reader

if TYPE_CHECKING:
    from longretriever.model.train import Tick

FORMAT = 1
WARM_UP = "warm-up"
WEEK = 7 * SECONDS_PER_DAY
_FACTORS = 32  # dimension of what the ranker knows of items


def run(
    plan: Plan,
    work: str | os.PathLike[str],
    *,
    workers: int | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
    lived: Callable[[int, int], None] | None = None,
    command: str = "",
    date: str | None = None,
    learn: Learn = learn_apart,
) -> dict[str, Any]:
    """Run a test; a dict that JSON can hold: figures of arms and routes, and comparisons with the control.

    `workers` processes live the arms' days (None: one for each core); the result does not depend on it. A
    program that calls this must start below `if __name__ == "__main__"`. `said` is told what goes on,
    `trained` each step of training, `lived` how many days of arms are over, of how many.

    Raises `InputError` for a plan that cannot be run, `MissingExtra` without scikit-learn, or without PyTorch
    where a route learns. Linux and macOS only, for the lock on the folder.
    """
    need_sklearn()
    say, folder = said or (lambda _: None), Path(work)
    with alone(folder):
        test = Test(plan, folder, learn, say, trained)
        test.prepare()
        test.live(workers or cores(), lived or (lambda done, total: None))
        say("comparing")
        return test.result(command, date)


@contextmanager
def processes(count: int) -> Iterator[Callable[..., Callable[[], Any]]]:
    """What takes a function and its arguments, and gives what waits for the result; 1: this very process."""
    if count == 1:
        yield lambda function, *given: partial(function, *given)
        return
    context = multiprocessing.get_context("spawn")  # forked processes would inherit locks of threads
    with ProcessPoolExecutor(count, context) as pool:
        yield lambda function, *given: pool.submit(function, *given).result


class World(NamedTuple):
    """What a process needs to live an arm's day, beside the plan."""

    folder: Path  # of the test
    store: Path
    models: Mapping[str, Path]  # by route


class Knowledge(NamedTuple):
    """What the platform knows at midnight; items are the market's numbers."""

    trees: Any
    statistics: Statistics
    factors: np.ndarray


@dataclass
class Test:
    """A plan, with the folder in which its world, models and days lie."""

    plan: Plan
    folder: Path
    learn: Learn
    say: Callable[[str], None]
    trained: Callable[[Tick], None] | None

    # -- the world before the test

    @cached_property
    def market(self) -> Market:
        return Market(self.plan.market)

    @cached_property
    def log(self) -> Log:
        return self.market.log(0, self.plan.market.users)

    @cached_property
    def world(self) -> Path:
        return self.folder / f"world-{_hash([package_version(), self.plan.market, self.plan.begin])}"

    @cached_property
    def path(self) -> Path:
        """Where the days lie: named by the whole plan, since all arms share the ranker."""
        return self.folder / f"test-{_hash([package_version(), self.plan])}"

    @cached_property
    def users(self) -> np.ndarray:
        """[U] who takes part, sorted."""
        return self.plan.taking_part()

    @cached_property
    def days(self) -> range:
        """Those of the test, counted from the first of the warm-up."""
        return range(self.plan.platform.warm_up, self.plan.platform.warm_up + self.plan.days)

    def prepare(self) -> None:
        """Make what is not there yet: log, store, models."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._make_store()
        for arm in self.plan.arms:
            self._make_models(arm, None)

    def _make_store(self) -> None:
        if not (self.world / "store").exists():
            log = self.world / "log"
            self.say(f"drawing a log of {self.plan.market.events:,} behaviors")
            self.market.write(log)
            before = pq.read_table(log / "events.parquet", filters=[(TIME, "<", self.plan.begin)])
            self.say(f"ingesting the {before.num_rows:,} behaviors before the test")
            ingest(before, self.world / "store", items=log / "items.parquet", users=log / "users.parquet")

    def _make_models(self, arm: Arm, day: int | None) -> None:
        for route in arm.routes:
            if route.learn is not None:
                self._make_model(route, self._store(arm, day), self._model(route, arm, day))

    def _make_model(self, route: Route, store: Path, path: Path) -> None:
        try:
            Retriever.load(path, store=store)
        except SavedError:
            self.say(f"{route.name}: learning")
            self.learn(store, path, self._config(route), self.plan.threads, self.trained)

    def _config(self, route: Route) -> Any:
        return route.config(self.plan.seed, self.plan.minutes, self.plan.samples)

    def _store(self, arm: Arm, day: int | None) -> Path:
        """Of what was known when the models of this day were last trained; None: before the test."""
        return self.world / "store" if day is None else self.path / f"store-{_slug(arm)}-{day}"

    def _model(self, route: Route, arm: Arm, day: int | None) -> Path:
        if day is None:
            return self.world / f"model-{_hash([self._config(route), self.plan.threads])}"
        return self.path / f"model-{_slug(arm)}-{day}-{_hash(self._config(route))}"

    def _last_training(self, day: int) -> int | None:
        """The day at whose beginning models were last trained; None: before the test."""
        since = day - self.days[0]
        every = self.plan.retrain
        return day - since % every if every and since >= every else None

    # -- the days

    def live(self, workers: int, lived: Callable[[int, int], None]) -> None:
        """Live all days that are not over yet."""
        total = self.plan.platform.warm_up + self.plan.days * len(self.plan.arms)
        done = 0
        with processes(min(workers, len(self.plan.arms))) as pool:
            for day in range(self.days[-1] + 1):
                arms = self._arms_of(day)
                todo = [arm for arm in arms if not self._file(arm, day).exists()]
                done += len(arms) - len(todo)
                lived(done, total)
                if todo:
                    self._begin(day, todo)
                    knows = self._knowledge(day)
                    asked = [(self.plan, self._world(arm, day), arm, day, knows) for arm in todo]
                    for waiting in [pool(_live, *one) for one in asked]:
                        waiting()
                        done += 1
                        lived(done, total)

    def _file(self, arm: Arm | None, day: int) -> Path:
        return _file(self.path, arm, day)

    def _world(self, arm: Arm | None, day: int) -> World:
        of = arm or self.plan.arms[0]
        at = self._last_training(day)
        models = {r.name: self._model(r, of, at) for r in of.routes if r.learn is not None}
        return World(self.path, self._store(of, at), models)

    def _begin(self, day: int, arms: Sequence[Arm | None]) -> None:
        """Journals for those who need one, and models, if it is their day."""
        for arm in arms:
            if arm is None:
                continue
            if day == self.days[0]:
                journal = _journal(self.path, arm)
                if not journal.exists():
                    _copied(_journal(self.path, None), journal)
            if self._last_training(day) == day:
                store = self._store(arm, day)
                if not store.exists():
                    self.say(f"{arm.name}: day {day}, folding what happened into the store")
                    # Of the store before the test: nothing leaves the journal, any day can be lived again.
                    compact(self._store(arm, None), _journal(self.path, arm), store)
                self._make_models(arm, day)

    def _knowledge(self, day: int) -> Knowledge:
        """What can be known at midnight before this day, from all arms."""
        c, now = self.plan.market, self.plan.begin + day * SECONDS_PER_DAY
        past = {before: [self._shown(arm, before) for arm in self._arms_of(before)] for before in range(day)}
        lately = (self.log.time < now) & (self.log.time >= now - WEEK)
        events = np.bincount(self.log.item[lately], minlength=c.items).astype(np.float64)
        shown, clicked = np.zeros(c.items), np.zeros(c.items)
        for before, arms in past.items():
            clicks = np.zeros(c.items)
            for one in arms:
                shown += np.bincount(one.item, minlength=c.items)
                clicks += np.bincount(one.item[one.click], minlength=c.items)
            clicked += clicks
            if (day - before) * SECONDS_PER_DAY <= WEEK:
                events += clicks / len(arms)
        trees = None
        if past:
            self.say(f"day {day}: the ranker learns")
            trees = self._trees([one for arms in past.values() for one in arms])
        return Knowledge(trees, Statistics(events, shown, clicked), self._factors)

    def _trees(self, past: Sequence[Shown]) -> Any:
        rows = Shown.together(past, past[0].feature.shape[1])
        newest = np.argsort(rows.time, kind="stable")[-self.plan.platform.ranker_rows :]
        told = Shown(*(column[newest] for column in rows))
        weight = self.plan.platform.order_weight
        return learned(told.feature, told.slot, told.click, told.order, weight, self.plan.seed)

    def _arms_of(self, day: int) -> Sequence[Arm | None]:
        return [None] if day < self.days[0] else self.plan.arms

    def _shown(self, arm: Arm | None, day: int) -> Shown:
        return read_day(self._file(arm, day)).shown

    @cached_property
    def _factors(self) -> np.ndarray:
        """[I of the market, D] of unit length."""
        file = self.world / f"factors-{self.plan.seed}.npy"
        if not file.exists():
            store = Store.open(self.world / "store")
            found = item_factors(store, store.last_time, _FACTORS, self.plan.seed, self.plan.threads)
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
            of_market = np.zeros((self.plan.market.items, _FACTORS), np.float32)
            of_market[Numbering.of(store, len(of_market)).market_of] = found
            buffer = io.BytesIO()
            np.save(buffer, of_market)
            write_whole(file, buffer.getvalue())
        return np.load(file)

    # -- what came of it

    def result(self, command: str, date: str | None) -> dict[str, Any]:
        """Figures with intervals, comparisons with the control, and what produced them."""
        plan, category_of = self.plan, self.market.category_of(np.arange(self.plan.market.items))
        sums, routes, by_day = {}, {}, {}
        for arm in plan.arms:
            days = [read_day(self._file(arm, day)) for day in self.days]
            sums[arm.name] = online.of_arm(days, self.users, category_of)
            routes[arm.name] = online.of_routes(days, self.users, [r.name for r in arm.routes])
            each = [online.of_arm([day], self.users, category_of) for day in days]
            by_day[arm.name] = {name: [online.value(of[name]) for of in each] for name in online.FIGURES}
        pairs = [(arm.name, other) for arm in plan.arms if (other := plan.against(arm)) is not None]
        rows = [
            {"arm": name, "against": other, **row}
            for name, other in pairs
            for row in online.compare(sums[name], sums[other], plan.draw)
        ]
        return {
            "format": FORMAT,
            "plan": {
                **{name: value for name, value in asdict(plan).items() if name not in ("arms", "market")},
                "users": len(self.users),
                "market": asdict(plan.market),
            },
            "figures": online.FIGURES,
            "of_route": online.OF_ROUTE,
            "arms": {
                arm.name: {
                    "about": arm.about,
                    "against": plan.against(arm),
                    "luck": arm.luck,
                    "figures": online.summary(sums[arm.name], plan.draw),
                    "routes": {name: online.summary(of, plan.draw) for name, of in routes[arm.name].items()},
                    "by_day": by_day[arm.name],
                }
                for arm in plan.arms
            },
            "comparisons": corrected(rows),
            "routes": {route.name: _told(route) for route in plan.routes},
            "made": {
                **made(command, date),
                "store": Store.open(self.world / "store").fingerprint,
                "environment": environment(),
            },
        }


def _told(route: Route) -> dict[str, Any]:
    made = {"learns": described(route.learn), "counted": described(route.counted)}
    rules = {name: value for name, value in described(route.rules).items() if value and name != "is"}
    asked = {"asked": described(route.load), "rules": rules, "k": route.k}
    return {name: what for name, what in made.items() if what} | asked


def corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with `p_holm`, corrected for the number of all these comparisons, and what was `found`."""
    correct(rows, lambda row: row["treatment"] > row["control"])
    return rows


# -- a day, in a process of its own


def _live(plan: Plan, world: World, arm: Arm | None, day: int, knows: Knowledge) -> None:
    """Live an arm's day (None: of the warm-up, in the control's place) and write down what came of it."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # the processes would compete
        _lived(plan, world, arm, day, knows)


def _lived(plan: Plan, world: World, arm: Arm | None, day: int, knows: Knowledge) -> None:
    faiss.omp_set_num_threads(1)
    store = Store.open(world.store)
    with closing(Journal(_journal(world.folder, arm))) as journal:
        market, users = _market(plan.market), plan.taking_part()
        _by_themselves(market, journal, users, plan.begin + day * SECONDS_PER_DAY)
        of = arm or plan.arms[0]
        numbering = Numbering.of(store, plan.market.items)
        statistics = Statistics(*(counts[numbering.market_of] for counts in vars(knows.statistics).values()))
        features = Features(store, knows.factors[numbering.market_of], statistics)
        ranker = Ranker(features, knows.trees)
        finders = {route.name: _finder(route, world) for route in of.routes}
        platform = Platform(
            plan.platform,
            finders,
            [route.k for route in of.routes],
            ranker,
            Reader(store, journal),
            Feed(market, plan.feed, plan.begin, of.luck),
            plan.draw,
            warming_up=arm is None,
        )
        log = _log(market)
        known = (log.time >= plan.begin) & (log.time < plan.begin + day * SECONDS_PER_DAY)
        platform.feed.meets(log.user[known], log.item[known])
        for before in range(day):
            past = arm if before >= plan.platform.warm_up else None
            platform.remember(read_day(_file(world.folder, past, before)).shown)
        write_day(_file(world.folder, arm, day), platform.run(users, day))


@lru_cache(1)
def _market(config: MarketConfig) -> Market:
    return Market(config)


@lru_cache(1)
def _log(market: Market) -> Log:
    return market.log(0, market.config.users)


def _by_themselves(market: Market, journal: Journal, users: np.ndarray, midnight: int) -> None:
    """What the users of the test do by themselves on the day that begins then, put into the journal."""
    log = _log(market)
    today = (log.time >= midnight) & (log.time < midnight + SECONDS_PER_DAY) & np.isin(log.user, users)
    for kind, name in enumerate(BEHAVIORS):
        of = today & (log.kind == kind)
        write(journal, log.user[of], log.item[of], log.category[of], log.time[of], name)


_opened: dict[Any, Finder] = {}  # by this process, since opening costs more than a round of visits


def _finder(route: Route, world: World) -> Finder:
    key = (_hash(route), world.store, world.models.get(route.name))
    if key not in _opened:
        if len(_opened) > MOST_ROUTES:  # of former trainings, or other tests
            _opened.clear()
        if route.counted is not None:
            _opened[key] = route.counted(Store.open(world.store))
        else:
            path = world.models[route.name]
            retriever = Retriever.load(path, store=world.store, threads=1, **route.load)
            _opened[key] = Learned(retriever, route.rules)
    return _opened[key]


# -- files


def _copied(journal: Path, out: Path) -> None:
    """Whole, also what a process that was killed has left beside the file."""
    partial = out.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(journal)) as source, closing(sqlite3.connect(partial)) as target:
        source.backup(target)
    os.replace(partial, out)


def _slug(arm: Arm | None) -> str:
    return WARM_UP if arm is None else f"{_hash(arm.name)}-{arm.luck}"


def _journal(folder: Path, arm: Arm | None) -> Path:
    return folder / f"{_slug(arm)}.sqlite"


def _file(folder: Path, arm: Arm | None, day: int) -> Path:
    return folder / f"{_slug(arm)}-day-{day}.npz"


def write_day(path: Path, day: Day) -> None:
    """Whole, or not at all."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {f"shown/{name}": column for name, column in day.shown._asdict().items()}
    arrays |= {name: column for name, column in day._asdict().items() if name != "shown"}
    np.savez_compressed(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def read_day(path: Path) -> Day:
    """What `write_day` wrote. Raises `NotSaved` where it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            shown = Shown(*(arrays[f"shown/{name}"] for name in Shown._fields))
            return Day(shown, *(arrays[name] for name in Day._fields[1:]))
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, zlib.error) as error:
        raise NotSaved(f"{path}: {error}. Remove this file, and the day is lived again.") from error


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(described(what), sort_keys=True).encode()).hexdigest()[:16]
