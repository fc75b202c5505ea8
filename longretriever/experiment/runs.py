"""Which of these systems finds more on this log, and is that more than chance? A plan, run to its end.

Every training is repeated with every seed, for the same minutes or samples, in a process of its own; every
arm is asked the same requests by `measure_live` and `measure_batch`. What is finished stays in a folder
under the name that `plan.py` gives it, so a call that was stopped goes on, and a call with one arm changed
runs that arm alone. `docs/experiment.md` explains what comes out.

Axes: S seeds, N requests, M metrics.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from longretriever.errors import InputError, LongRetrieverError, SavedError
from longretriever.evaluate import metrics
from longretriever.evaluate.report import SHORT, Values, evaluate, measure_batch, measure_live, summary
from longretriever.evaluate.rivals import Recommender
from longretriever.evaluate.run import Retrieved, counted, read_split, store_of
from longretriever.evaluate.split import Split
from longretriever.experiment.apart import learn_apart
from longretriever.experiment.plan import Arm, Plan, Run, described
from longretriever.model.config import need_torch
from longretriever.retrieve.bulk import cores
from longretriever.retrieve.retriever import Retriever
from longretriever.saved import beside, package_version, sync
from longretriever.store.behaviors import Store

if TYPE_CHECKING:
    from longretriever.model.train import Tick

__all__ = ["PARTS", "Arm", "run"]

FORMAT = 1

PARTS = (("live", "all"), ("live", "new"), ("batch", "all"), ("batch", "new"))
"""Protocol, and which of its requests: every figure exists in these four parts."""

SURE = 0.05
"""A difference is called one where the corrected p-value is below this."""

Learn = Callable[[Path, Path, Any, "int | None", "Callable[[Tick], None] | None"], dict[str, Any]]
"""Trains and indexes: (store, where to, configuration, threads, told each step) -> facts."""


def run(
    events: Any,
    arms: Sequence[Arm],
    *,
    work: str | os.PathLike[str],
    items: Any = None,
    users: Any = None,
    seeds: Sequence[int] = (1, 2, 3),
    minutes: float | None = None,
    samples: int | None = None,
    quantile: float = 0.9,
    k: Sequence[int] = (50, 200, 500),
    request_seed: int = 1,
    reading: Mapping[str, Any] | None = None,
    said: Callable[[str], None] | None = None,
    trained: Callable[[Tick], None] | None = None,
    planned: Callable[[int, int], None] | None = None,
    command: str = "",
    date: str | None = None,
    learn: Learn = learn_apart,
) -> dict[str, Any]:
    """Train, ask and compare all arms on one log; a dict that JSON can hold, for `dossier.write`.

    `events`, `items`, `users` and the options in `reading` are those of `ingest`; the other options of the
    plan are explained at `Plan`. Stores, models and finished runs stay in `work`, and a second call skips
    what it finds there. `said` is told what goes on, `trained` each step of training, `planned` how many
    trainings and runs are done, of how many. `command` and `date` (now, unless given) are for the record.

    A run that fails is named in the result and does not stop the others; the next call tries it again.
    Raises `InputError` for a plan or a log that cannot be used, `MissingExtra` without PyTorch, and
    `LongRetrieverError` when no run at all has succeeded. Linux and macOS only, for the lock on the folder.
    """
    reading = dict(reading or {})
    plan = Plan(tuple(arms), tuple(seeds), minutes, samples, tuple(k), request_seed, reading.get("threads"))
    if any(arm.learn is not None for arm in arms):
        need_torch()
    say = said or (lambda _: None)
    with opened(Evaluated, plan, work, (events, items, users), quantile, reading, say, learn) as bench:
        measured, failed = bench.run(say, trained, planned or (lambda done, total: None))
    if not measured:
        raise LongRetrieverError(f"none of the {len(failed)} runs succeeded. The first: {failed[0]['why']}")
    say("comparing")
    of_arm = bench.of_arm(measured)
    return {
        "format": FORMAT,
        **bench.record(measured, command, date),
        "arms": {a.name: _figures(plan, a, of_arm[a.name]) for a in plan.arms if of_arm[a.name]},
        "comparisons": compare(plan, of_arm),
        "failed": failed,
    }


# -- doing it


Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Measured(Generic[Kept]):
    """A finished run: what its JSON says, and what was kept of its answers in each part of the protocol."""

    facts: Mapping[str, Any]
    values: Mapping[tuple[str, str], Kept]


Bench_ = TypeVar("Bench_", bound="Bench[Any]")


@contextmanager
def opened(
    bench: type[Bench_],
    plan: Plan,
    work: str | os.PathLike[str],
    log: tuple[Any, Any, Any],
    quantile: float,
    reading: Mapping[str, Any],
    say: Callable[[str], None],
    learn: Learn,
) -> Iterator[Bench_]:
    """A bench on a log (events, items, users), with the folder to itself while it is open."""
    folder = Path(work)
    with alone(folder):
        say("reading the log")
        cut, tables = read_split(*log, quantile, reading)
        say(f"{cut.full.num_rows:,} events after the filter, {cut.train.num_rows:,} of them to learn from")
        full, train = (
            store_of(part, folder / name, tables, reading)
            for part, name in ((cut.full, "full"), (cut.train, "train"))
        )
        yield bench(plan, folder, cut, full, train, learn)


class Bench(ABC, Generic[Kept]):
    """A plan on one log, with a folder for what is finished: `models/`, and what `kept` says for the runs.

    What a model is asked, and what of its answers is kept, is for those who make one of it to say.
    """

    kept: ClassVar[str]

    def __init__(self, plan: Plan, folder: Path, cut: Split, full: Store, train: Store, learn: Learn) -> None:
        self.plan, self.folder, self.cut, self.full, self.train = plan, folder, cut, full, train
        self.learn, self.environment = learn, environment()
        live, batch = cut.live(seed=plan.request_seed), cut.batch(seed=plan.request_seed)
        self.live = {"all": live, "new": live.only_new()}
        self.batch = {"all": batch, "new": batch.only_new()}
        self.runs = plan.runs({"split": _hash_of(cut), "full": full.fingerprint, "train": train.fingerprint})
        self.broken: dict[str, Exception] = {}  # by model, in this call
        for name in ("models", self.kept):
            (folder / name).mkdir(exist_ok=True)

    @abstractmethod
    def ask(self, model: Recommender) -> dict[tuple[str, str], Kept]:
        """All requests, of each part of the protocol."""

    @abstractmethod
    def arrays(self, values: Mapping[tuple[str, str], Kept]) -> dict[str, np.ndarray]:
        """What is kept, as arrays to save."""

    @abstractmethod
    def values(self, arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, str], Kept]:
        """The same read again. Raises `ValueError` or `KeyError` where it cannot be of these requests."""

    @property
    def asked(self) -> int:
        """How many requests `ask` makes."""
        return sum(len(r.user) for of in (self.live, self.batch) for r in of.values())

    def run(
        self,
        say: Callable[[str], None],
        trained: Callable[[Tick], None] | None,
        planned: Callable[[int, int], None],
    ) -> tuple[dict[str, Measured[Kept]], list[dict[str, Any]]]:
        """All runs: those finished, by name, and what became of the others."""
        distinct = {one.name: one for one in self.runs}
        measured = {name: m for name, one in distinct.items() if (m := self._read(one, say)) is not None}
        todo = [one for name, one in distinct.items() if name not in measured]
        if measured:
            titles = "; ".join(distinct[name].title for name in measured)
            say(f"{len(measured)} of {len(distinct)} runs were finished before and are skipped: {titles}")
        models = {one.model for one in self.runs if one.config is not None}
        left = {one.name for one in todo} | {one.model for one in todo if one.config is not None}
        total = len(distinct) + len(models)
        failed = []
        planned(total - len(left), total)
        for one in todo:
            try:
                model = self._recommender(one, say, trained)
                if one.model in left:
                    left.discard(one.model)
                    planned(total - len(left), total)
                say(f"{one.title}: answering")
                measured[one.name] = self._measure(one, model)
            except Exception as error:  # what is wrong with one arm must not cost the night's others
                say(f"{one.title}: failed. {_line(error)}")
                failed += [_failure(same, error) for same in self.runs if same.name == one.name]
            left -= {one.name, one.model}
            planned(total - len(left), total)
        return measured, failed

    def of_arm(self, measured: Mapping[str, Measured[Kept]]) -> dict[str, dict[int, Measured[Kept]]]:
        """The finished runs of each arm, by seed."""
        found: dict[str, dict[int, Measured[Kept]]] = {arm.name: {} for arm in self.plan.arms}
        for one in self.runs:
            if one.name in measured:
                found[one.arm.name][one.seed] = measured[one.name]
        return found

    def record(
        self, measured: Mapping[str, Measured[Kept]], command: str, date: str | None
    ) -> dict[str, Any]:
        """What the log is, what was planned and what made it: a part of every result."""
        plan = self.plan
        return {
            "data": evaluate(self.full, self.cut, {}, plan.k, plan.request_seed)["data"],
            "plan": {name: value for name, value in asdict(plan).items() if name != "arms"},
            "made": {
                **made(command, date),
                "stores": {"full": self.full.fingerprint, "train": self.train.fingerprint},
                "environments": _distinct(m.facts["environment"] for m in measured.values()),
            },
        }

    def _recommender(
        self, one: Run, say: Callable[[str], None], trained: Callable[[Tick], None] | None
    ) -> Any:
        if one.arm.rival is not None:
            return counted(one.arm.rival, self.full, self.cut.T)
        if one.model in self.broken:
            raise self.broken[one.model]
        path = self.folder / "models" / one.model
        facts = self._learned(path)
        if facts is None:
            say(f"{one.title}: learning")
            try:
                facts = self.learn(self.train.path, path, one.config, self.plan.threads, trained)
            except Exception as error:
                self.broken[one.model] = error
                raise
            facts = {**facts, "model_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file())}
            write_whole(path.with_suffix(".json"), json.dumps(facts, indent=1).encode())
        return Retrieved(Retriever.load(path, store=self.full.path, **one.arm.load), facts, one.seed)

    def _learned(self, path: Path) -> dict[str, Any] | None:
        """The facts of a finished training whose model can still be opened."""
        try:
            facts = json.loads(path.with_suffix(".json").read_bytes())
            Retriever.load(path, store=self.full.path)
        except (OSError, ValueError, SavedError):
            return None
        return facts

    def _measure(self, one: Run, model: Recommender) -> Measured[Kept]:
        began = time.perf_counter()
        values = self.ask(model)
        seconds = time.perf_counter() - began
        facts = {
            "format": FORMAT,
            "arm": one.arm.name,
            "seed": one.seed,
            "config": described(one.config),
            "asked": described(one.arm.load),
            "learning": dict(getattr(model, "facts", {})),
            "answer_ms": round(1000 * seconds / self.asked, 3),
            "environment": self.environment,
        }
        self._write(one, facts, values)
        return Measured(facts, values)

    # -- files

    def _write(self, one: Run, facts: dict[str, Any], values: Mapping[tuple[str, str], Kept]) -> None:
        """The JSON comes last: where it lies, the run is finished."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays(values))  # type: ignore[arg-type]
        data = buffer.getvalue()
        file = self.folder / self.kept / one.name
        write_whole(file.with_suffix(".npz"), data)
        facts["values_sha256"] = hashlib.sha256(data).hexdigest()
        write_whole(file.with_suffix(".json"), json.dumps(facts, indent=1).encode())

    def _read(self, one: Run, say: Callable[[str], None]) -> Measured[Kept] | None:
        """A finished run; None where there is none, or where its files are damaged, which is said."""
        file = self.folder / self.kept / f"{one.name}.json"
        if not file.exists():
            return None
        try:
            facts = json.loads(file.read_bytes())
            data = file.with_suffix(".npz").read_bytes()
            if hashlib.sha256(data).hexdigest() != facts["values_sha256"]:
                raise ValueError(f"the SHA-256 of {one.name}.npz is not the one written down")
            if not isinstance(facts["environment"], dict) or not isinstance(facts["learning"], dict):
                raise TypeError("something is not what it should be")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                values = self.values(arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            say(f"{file} is damaged ({type(error).__name__}: {error}), so {one.title} is run again")
            return None
        return Measured(facts, values)


class Evaluated(Bench[Values]):
    """What `run` asks: both protocols, of whose answers the values of each request are kept, in `runs/`."""

    kept = "runs"

    def ask(self, model: Recommender) -> dict[tuple[str, str], Values]:
        k, values = self.plan.k, {}
        for part in ("all", "new"):
            new = part == "new"
            values["live", part] = measure_live(model, self.cut, self.live[part], k, new)
            values["batch", part] = measure_batch(model, self.cut, self.batch[part], k, new)
        return values

    def arrays(self, values: Mapping[tuple[str, str], Values]) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        for (protocol, part), found in values.items():
            arrays |= {f"{protocol}/{part}/{name}": value for name, value in found.metric.items()}
            if found.coverage is not None:
                arrays[f"{protocol}/{part}/coverage"] = np.array(found.coverage)
        return arrays

    def values(self, arrays: Mapping[str, np.ndarray]) -> dict[tuple[str, str], Values]:
        return {(protocol, part): self._of(protocol, part, arrays) for protocol, part in PARTS}

    def _of(self, protocol: str, part: str, arrays: Mapping[str, np.ndarray]) -> Values:
        requests = self.live[part] if protocol == "live" else self.batch[part]
        start = f"{protocol}/{part}/"
        metric = {name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)}
        coverage = tuple(metric.pop("coverage").tolist()) if "coverage" in metric else None
        if not metric or any(len(value) != len(requests.user) for value in metric.values()):
            raise ValueError(f"there are not {len(requests.user)} values of {protocol} {part}")
        return Values(requests.user, requests.history, metric, coverage)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two experiments in one folder would train into each other's models."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder}: another experiment is at work here ({error}). Wait for it, or take another one."
            ) from error
        yield


def write_whole(path: Path, data: bytes) -> None:
    """Put a file in its place so that a crash leaves the old one or the new one."""
    partial = beside(path, "partial")
    try:
        partial.write_bytes(data)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def _hash_of(cut: Split) -> str:
    """Of all that requests and targets are drawn from; the stores' fingerprints hold the ids and the rest."""
    found = hashlib.sha256(str(cut.T).encode())
    for array in (cut.user_start, cut.item, cut.time, cut.in_train):
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _failure(one: Run, error: Exception) -> dict[str, Any]:
    told = str(error) if isinstance(error, LongRetrieverError) else "".join(traceback.format_exception(error))
    return {"arm": one.arm.name, "seed": one.seed, "why": _line(error), "told": told}


def _line(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, LongRetrieverError) else f"{type(error).__name__}: {first}"


# -- what came out


def main_metric(k: Sequence[int]) -> str:
    """What conclusions are drawn from: Recall@200, or at the middle one of the lengths of list."""
    return f"recall@{main_length(k)}"


def main_length(k: Sequence[int]) -> int:
    return 200 if 200 in k else sorted(k)[len(k) // 2]


def exchanges(tests: int) -> int:
    """How often two systems are exchanged at random in each test: the least p must survive the correction."""
    return max(10_000, 100 * tests)


class Difference(NamedTuple):
    """An arm's values less those of the arm it is compared with, in one of `PARTS`.

    value  [S, N, M], user  [N]
    """

    arm: str
    against: str
    part: tuple[str, str]
    metrics: list[str]
    value: np.ndarray
    user: np.ndarray


def compare(plan: Plan, of_arm: Mapping[str, Mapping[int, Measured[Values]]]) -> list[dict[str, Any]]:
    """Every accuracy figure of every arm against that of the arm it is compared with, request by request.

    `difference` is the mean over the seeds that both have; its interval and p-value are over users; `by_seed`
    are the differences of single trainings. `p_holm` is corrected for the number of comparisons by the main
    figure, which is fixed beforehand, or else for the number of those by all other figures.
    """
    found = [d for arm in plan.arms for d in _differences(plan, arm, of_arm)]
    flips = exchanges(sum(len(d.metrics) for d in found))
    rows = [row for d in found for row in tested(d, plan.request_seed, flips)]
    main = main_metric(plan.k)
    correct([r for r in rows if r["metric"] == main])
    correct([r for r in rows if r["metric"] != main])
    return rows


def correct(
    family: Sequence[dict[str, Any]], is_more: Callable[[dict[str, Any]], bool] | None = None
) -> None:
    """Set `p_holm`, corrected for the number of these comparisons, and what is `found` by it.

    A row whose p is NaN is undecided, and counts for nothing. `is_more` tells the direction of rows that have
    no `difference`.
    """
    for row in family:
        row |= {"p_holm": float("nan"), "found": "undecided"}
    known = [row for row in family if not np.isnan(row["p"])]
    for row, p in zip(known, metrics.holm(np.array([row["p"] for row in known])), strict=True):
        row["p_holm"] = float(p)
        if p < SURE:
            row["found"] = "more" if (is_more(row) if is_more else row["difference"] > 0) else "less"


def _differences(
    plan: Plan, arm: Arm, of_arm: Mapping[str, Mapping[int, Measured[Values]]]
) -> Iterator[Difference]:
    other = next((a for a in plan.arms if a.name == plan.against(arm)), None)
    if other is None:
        return
    seeds = plan.seeds if arm.learn is not None or other.learn is not None else plan.seeds[:1]
    ours, theirs = (
        [of_arm[a.name].get(seed if a.learn is not None else plan.seeds[0]) for seed in seeds]
        for a in (arm, other)
    )
    both = [(o.values, t.values) for o, t in zip(ours, theirs, strict=True) if o and t]
    for part in PARTS if both else ():
        first = both[0][0][part]
        if len(first.user):
            names = [name for name in first.metric if is_accuracy(name)]
            value_SNM = np.stack([_columns(o[part], names) - _columns(t[part], names) for o, t in both])
            yield Difference(arm.name, other.name, part, names, value_SNM, first.user)


def _columns(values: Values, names: Sequence[str]) -> np.ndarray:
    return np.stack([values.metric[name] for name in names], axis=1)


def tested(d: Difference, seed: int, flips: int) -> Iterator[dict[str, Any]]:
    mean_NM = d.value.mean(axis=0)
    low_M, high_M = metrics.interval(mean_NM, d.user, np.random.default_rng(seed))
    p_M = metrics.sign_flip(mean_NM, d.user, np.random.default_rng(seed), flips)
    for m, name in enumerate(d.metrics):
        yield {
            "arm": d.arm,
            "against": d.against,
            "protocol": d.part[0],
            "part": d.part[1],
            "metric": name,
            "difference": round(float(mean_NM[:, m].mean()), 6),
            "interval": [round(float(low_M[m]), 6), round(float(high_M[m]), 6)],
            "by_seed": [round(float(value), 6) for value in d.value[:, :, m].mean(axis=1)],
            "p": float(p_M[m]),
        }


def is_accuracy(metric: str) -> bool:
    """Whether more of it is better: not so of categories, coverage or selection."""
    return metric.startswith(("recall@", "ndcg@", "hit@", "mrr"))


def what_is(plan: Plan, arm: Arm, found: Mapping[int, Measured[Any]]) -> dict[str, Any]:
    """One arm, how it is asked, and how each of its trainings went."""
    return {
        "about": arm.about,
        "against": plan.against(arm),
        "learns": described(arm.config(plan.seeds[0], plan.minutes, plan.samples)),
        "rival": described(arm.rival),
        "asked": described(arm.load),
        "seeds": list(found),
        "answer_ms": [m.facts["answer_ms"] for m in found.values()],
        "learning": [m.facts["learning"] for m in found.values()],
    }


def _figures(plan: Plan, arm: Arm, found: Mapping[int, Measured[Values]]) -> dict[str, Any]:
    """What is known of one arm: figures averaged over its seeds, and how each training went."""
    result: dict[str, Any] = {**what_is(plan, arm, found), "live": {}, "batch": {}}
    for protocol, part in PARTS:
        values = [m.values[protocol, part] for m in found.values()]
        averaged, by_seed = summary(_averaged(values), plan.request_seed), _by_seed(values)
        several = {name: v for name, v in by_seed.items() if len(v) > 1}
        sd = {name: round(float(np.std(v, ddof=1)), 6) for name, v in several.items()}
        result[protocol][part] = {**averaged, "by_seed": by_seed, "sd": sd}
    return result


def _averaged(values: Sequence[Values]) -> Values:
    """Mean over seeds of each request's values; of a coverage, the mean of each end of its interval."""
    first = values[0]
    metric = {name: np.mean([v.metric[name] for v in values], axis=0) for name in first.metric}
    covered = [v.coverage for v in values if v.coverage is not None]
    mean = tuple(np.mean(covered, axis=0).tolist()) if covered else None
    return Values(first.user, first.history, metric, mean)


def _by_seed(values: Sequence[Values]) -> dict[str, list[float]]:
    """Metric -> its mean with each seed; nothing where there are no requests."""
    if len(values[0].user) == 0:
        return {}
    figures = {name: [round(float(v.metric[name].mean()), 6) for v in values] for name in values[0].metric}
    if values[0].coverage is not None:
        figures[f"coverage@{SHORT}"] = [round(v.coverage[0], 6) for v in values if v.coverage is not None]
    return figures


def made(command: str, date: str | None) -> dict[str, str]:
    """What called for a result, and when (now, unless given)."""
    return {"command": command, "date": date or datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}


def environment() -> dict[str, Any]:
    """What this process runs on: versions, machine, processors."""
    versions: dict[str, Any] = {"longretriever": package_version(), "python": platform.python_version()}
    for name in ("numpy", "torch", "faiss-cpu", "onnxruntime", "pyarrow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        **versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "processors": cores(),
    }


def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        for line in cpus.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _distinct(what: Any) -> list[Any]:
    found: list[Any] = []
    for one in what:
        if one not in found:
            found.append(one)
    return found
