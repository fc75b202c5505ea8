"""A plan is run once: what is finished is skipped, what changed is repeated, what fails stops nothing else.

Most tests stand in for training and for the retriever: a "model" of skill .7 lists what the user really meets
next in 7 of 10 requests. One test at the end goes the whole way.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longretriever.errors import InputError, LongRetrieverError, NotSaved
from longretriever.evaluate import metrics
from longretriever.evaluate.report import evaluate
from longretriever.evaluate.rivals import Lists, Recent
from longretriever.evaluate.split import split
from longretriever.experiment import runs
from longretriever.experiment.runs import PARTS, Arm, exchanges, main_metric, run
from longretriever.model.config import TrainConfig
from longretriever.retrieve import merge
from longretriever.retrieve.interests import Top
from longretriever.store.behaviors import Store
from tests.worlds import parity_log, random_log, stored

LOG = parity_log(users=16)
K = (3, 12)


@dataclass(frozen=True)
class Skill:
    skill: float
    seed: int = 0
    minutes: float | None = None
    samples: int | None = None


class Knowing:
    """Knows what follows, and says it where a coin allows."""

    def __init__(self, full: Store, skill: float, seed: int) -> None:
        self.full, self.skill, self.seed = full, skill, seed

    def recommend(self, users: np.ndarray, before: np.ndarray, k: int, new: bool) -> Lists:
        rng = np.random.default_rng(self.seed)
        item = np.full((len(users), k), -1)
        for row, user, now in zip(item, users, before, strict=True):
            rows = self.full.recent(user, float("inf"), self.full.n_events)
            events, met = self.full.event_item[rows], self.full.event_time[rows] < now
            other = np.ones(self.full.n_items, dtype=bool)
            other[events[~met]] = False
            if new:
                other[events[met]] = False
            wanted = events[~met][:1] if rng.random() < self.skill else events[:0]
            wanted = np.setdiff1d(wanted, events[met] if new else [])
            chosen = np.r_[wanted, rng.permutation(np.flatnonzero(other))][:k]
            row[: len(chosen)] = chosen
        return Lists(item)


class Model:
    """In the place of `Retriever`."""

    def __init__(self, path: Path, store: Path, interests: Top | None) -> None:
        self.config, self.store, self.interests = json.loads(path.read_text()), Store.open(store), interests

    @classmethod
    def load(cls, path: Path, *, store: Path, interests: Top | None = None, merge: Any = None) -> Model:
        if not (path / "model.json").exists():
            raise NotSaved(f"{path}: no model")
        return cls(path / "model.json", store, interests)


def answering(model: Model, facts: dict, seed: int) -> Knowing:
    """In the place of `Retrieved`."""
    worse = 0 if model.interests is None else 0.1 * model.interests.n
    made = Knowing(model.store, model.config["skill"] - worse, seed)
    made.facts = facts
    return made


class Learning:
    """In the place of `learn_apart`: counts, and fails or stops where it is told to."""

    def __init__(self) -> None:
        self.calls: list[Skill] = []
        self.fail: Callable[[Skill], None] = lambda config: None

    def __call__(self, store, out, config, threads, trained) -> dict:
        self.calls.append(config)
        self.fail(config)
        out.mkdir(parents=True)
        (out / "model.json").write_text(json.dumps(asdict(config)))
        curve = [[10.0 * n, 100 * n, round(1 - 0.5**n + config.seed / 100, 3)] for n in range(1, 6)]
        facts = {"samples": 500, "epochs": 5, "curve": curve, "ended": "5 epochs are done"}
        return {
            "train_seconds": 50.0,
            "samples_per_second": 10.0,
            "training": facts,
            "peak_memory_bytes": 10**9,
        }


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Callable[[pytest.MonkeyPatch], None]:
    """Puts them in place; each log is read and ingested once, not once for each call."""
    folder, read = tmp_path_factory.mktemp("stores"), {}

    def read_split(events, *rest):
        if id(events) not in read:
            cut = split(events)
            parts = {part.num_rows: part for part in (cut.full, cut.train)}
            read[id(events)] = (
                cut,
                {n: stored(part, folder / f"{len(read)}-{n}") for n, part in parts.items()},
            )
        return read[id(events)]

    def put(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(runs, "read_split", read_split)
        patch.setattr(runs, "store_of", lambda part, path, stores, reading: stores[part.num_rows])
        patch.setattr(runs, "Retriever", Model)
        patch.setattr(runs, "Retrieved", answering)
        patch.setattr(metrics, "interval", partial(metrics.interval, resamples=50))

    return put


@pytest.fixture(autouse=True)
def quick(request, stand_ins, monkeypatch):
    if "whole_way" not in request.node.name:
        stand_ins(monkeypatch)


@pytest.fixture
def learning() -> Learning:
    return Learning()


GOOD = Arm("good", "It knows most.", learn=Skill(0.9))
ARMS = (
    GOOD,
    Arm("again", "The same, asked otherwise.", learn=Skill(0.9), interests=Top(1)),
    Arm("bad", "It knows little.", learn=Skill(0.2), against="again"),
    Arm("recent", "The user's last items.", rival=Recent),
)


def go(work: Path, learning: Learning, arms=ARMS, **options) -> dict:
    given = {"seeds": (1, 2), "k": K, "date": "today"}
    return run(options.pop("log", LOG), arms, work=work, learn=learning, **{**given, **options})


def timeless(result: dict) -> dict:
    """Without what differs between two runs of the same."""
    return json.loads(
        json.dumps(result),
        object_hook=lambda d: {k: v for k, v in d.items() if k not in ("answer_ms", "train_seconds")},
    )


def files(work: Path) -> set[Path]:
    return set((work / "runs").glob("*.json"))


# -- what is run, and what is not


def test_arms_share_trainings_and_every_training_has_every_seed(tmp_path, learning):
    go(tmp_path, learning, minutes=2.0, samples=70)
    assert learning.calls == [
        Skill(0.9, 1, 2.0, 70),
        Skill(0.2, 1, 2.0, 70),
        Skill(0.9, 2, 2.0, 70),
        Skill(0.2, 2, 2.0, 70),
    ]
    assert len(files(tmp_path)) == 3 * 2 + 1


def test_the_same_seeds_give_the_same_result(tmp_path, learning):
    first, second = (timeless(go(tmp_path / name, learning)) for name in ("a", "b"))
    assert first == second
    other = timeless(go(tmp_path / "c", learning, request_seed=5))
    assert other["arms"]["good"]["live"] != first["arms"]["good"]["live"]


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_plan_that_was_stopped_goes_on_where_it_was(tmp_path, learning, after):
    def stop(config):
        if len(learning.calls) == after:
            raise KeyboardInterrupt

    learning.fail = stop
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "work", learning)
    stopped, learning.calls, learning.fail = learning.calls, [], lambda config: None
    result = go(tmp_path / "work", learning)
    assert stopped[:-1] + learning.calls == [Skill(s, seed) for seed in (1, 2) for s in (0.9, 0.2)]
    assert timeless(result) == timeless(go(tmp_path / "straight", Learning()))


def test_a_plan_that_is_finished_is_only_read(tmp_path, learning):
    said: list[str] = []
    done: list[tuple[int, int]] = []
    first = go(tmp_path, learning, planned=lambda *n: done.append(n))
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == ((0, 11), (11, 11))
    learning.calls.clear()
    second = go(tmp_path, learning, said=said.append, planned=lambda *n: done.append(n))
    assert not learning.calls
    assert done[-1] == (11, 11)
    assert second == first
    (skipped,) = [line for line in said if "skipped" in line]
    assert skipped.startswith("7 of 7 runs were finished before and are skipped: recent; good, seed 1; ")
    assert not [line for line in said if "answering" in line]


@pytest.mark.parametrize(
    ("change", "trained", "asked"),
    [
        ({"about": "Other words.", "name": "renamed", "against": "good"}, 0, 0),
        ({"merge": merge.score}, 0, 2),
        ({"interests": Top(2)}, 0, 2),
        ({"learn": Skill(0.3)}, 2, 2),
    ],
)
def test_a_changed_arm_alone_is_run_again(tmp_path, learning, change, trained, asked):
    go(tmp_path, learning)
    before = files(tmp_path)
    learning.calls.clear()
    result = go(tmp_path, learning, (*ARMS[:2], replace(ARMS[2], **change), ARMS[3]))
    assert len(learning.calls) == trained
    assert len(files(tmp_path) - before) == asked
    assert list(result["arms"])[2] == change.get("name", "bad")


def test_another_seed_is_added_to_those_there(tmp_path, learning):
    go(tmp_path, learning, seeds=(1,))
    learning.calls.clear()
    result = go(tmp_path, learning, seeds=(1, 2, 3))
    assert {config.seed for config in learning.calls} == {2, 3}
    assert timeless(result) == timeless(go(tmp_path / "at once", Learning(), seeds=(1, 2, 3)))


OTHER_LOG = parity_log(users=16, seed=1)


def test_another_log_in_the_same_folder_repeats_all_and_the_first_is_not_forgotten(tmp_path, learning):
    first = go(tmp_path, learning)
    other = go(tmp_path, learning, log=OTHER_LOG)
    assert len(learning.calls) == 8
    assert other["made"]["stores"] != first["made"]["stores"]
    assert timeless(go(tmp_path, learning)) == timeless(first)
    assert len(learning.calls) == 8


def test_a_model_that_is_gone_is_trained_again_where_it_is_needed(tmp_path, learning):
    go(tmp_path, learning)
    for model in tmp_path.glob("models/*/model.json"):
        model.unlink()
        model.parent.rmdir()
    learning.calls.clear()
    go(tmp_path, learning)
    assert not learning.calls, "nothing is asked, so no model is needed"
    go(tmp_path, learning, (*ARMS[:2], replace(ARMS[2], interests=Top(1)), ARMS[3]))
    assert [config.skill for config in learning.calls] == [0.2, 0.2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: file.write_text("{}"),
        lambda file: file.write_bytes(file.read_bytes()[:100]),
        lambda file: file.with_suffix(".npz").unlink(),
        lambda file: file.with_suffix(".npz").write_bytes(b"PK"),
        lambda file: file.write_text(file.read_text().replace('"learning": {', '"learned": {')),
    ],
)
def test_a_damaged_run_is_named_and_repeated_alone(tmp_path, learning, damage):
    first = go(tmp_path, learning)
    (hurt,) = (f for f in files(tmp_path) if json.loads(f.read_text())["arm"] == "recent")
    damage(hurt)
    before = {file: file.stat().st_mtime_ns for file in files(tmp_path)}
    said: list[str] = []
    assert timeless(go(tmp_path, learning, said=said.append)) == timeless(first)
    (line,) = [line for line in said if "damaged" in line]
    assert line.startswith(f"{hurt} is damaged (")
    assert line.endswith("so recent is run again")
    assert {f for f in before if f.stat().st_mtime_ns != before[f]} == {hurt}
    assert len(learning.calls) == 4


def test_values_of_other_requests_are_not_taken_for_these(tmp_path, learning):
    """Their file is whole, but of another number of requests."""
    go(tmp_path, learning)
    (a,) = (f for f in files(tmp_path) if json.loads(f.read_text())["arm"] == "recent")
    facts = json.loads(a.read_text())
    with np.load(a.with_suffix(".npz")) as arrays:
        np.savez(a.with_suffix(".npz"), **{name: value[:-1] for name, value in arrays.items()})
    sha = runs.hashlib.sha256(a.with_suffix(".npz").read_bytes()).hexdigest()
    a.write_text(json.dumps({**facts, "values_sha256": sha}))
    said: list[str] = []
    go(tmp_path, learning, said=said.append)
    assert any("damaged (ValueError: there are not" in line for line in said)


# -- what fails


class Careless:
    def __init__(self, full: Store, T: int) -> None:
        pass

    def recommend(self, users, before, k, new) -> Lists:
        return Lists(np.zeros((len(users), 2), dtype=int))


def test_what_fails_is_reported_and_stops_nothing_else(tmp_path, learning):
    def fail(config):
        if config.skill == 0.9 and config.seed == 2:
            raise ValueError("no luck\nat all")

    learning.fail = fail
    said: list[str] = []
    arms = (*ARMS, Arm("careless", rival=Careless))
    result = go(tmp_path, learning, arms, said=said.append)
    assert [(one["arm"], one["seed"]) for one in result["failed"]] == [
        ("careless", 1),
        ("good", 2),
        ("again", 2),
    ]
    assert result["failed"][0]["why"].startswith("Careless lists item number 0 twice")
    assert result["failed"][1]["why"] == "ValueError: no luck"
    assert "Traceback" in result["failed"][1]["told"]
    assert "good, seed 2: failed. ValueError: no luck" in said
    assert len(learning.calls) == 4, "a training that failed is not tried again for the next arm"
    assert "careless" not in result["arms"]
    assert result["arms"]["good"]["seeds"] == [1]
    assert result["arms"]["bad"]["seeds"] == [1, 2]
    rows = [row for row in result["comparisons"] if row["arm"] == "bad"]
    assert {len(row["by_seed"]) for row in rows} == {1}, "only a seed that both have"

    learning.calls.clear()
    learning.fail = lambda config: None
    again = go(tmp_path, learning)
    assert learning.calls == [Skill(0.9, 2)]
    assert timeless(again) == timeless(go(tmp_path / "straight", Learning()))


def test_when_nothing_succeeds_the_first_reason_is_the_error(tmp_path):
    with pytest.raises(LongRetrieverError, match=r"none of the 1 runs succeeded\. The first: Careless lists"):
        go(tmp_path, Learning(), (Arm("careless", rival=Careless),))


def test_two_experiments_in_one_folder_are_refused(tmp_path, learning):
    (tmp_path / ".lock").touch()
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another experiment is at work here"):
            go(tmp_path, learning)
    go(tmp_path, learning)


def test_a_plan_that_cannot_be_is_refused_before_anything_is_read(tmp_path, learning):
    with pytest.raises(InputError, match="seeds"):
        run("nowhere.parquet", ARMS, work=tmp_path / "work", seeds=())
    assert not (tmp_path / "work").exists()


# -- what comes out


@pytest.fixture(scope="module")
def result(tmp_path_factory, stand_ins) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        stand_ins(patch)
        return go(tmp_path_factory.mktemp("result"), Learning(), seeds=(1, 2, 3))


def test_the_figures_are_those_of_an_evaluation_averaged_over_seeds(result, tmp_path):
    cut = split(LOG)
    full = stored(cut.full, tmp_path / "full")
    models = {"recent": Recent(full, cut.T)} | {f"{s}": Knowing(full, 0.9, s) for s in (1, 2, 3)}
    expected = evaluate(full, cut, models, K)["models"]
    for protocol, part in PARTS:
        found = result["arms"]["recent"][protocol][part]
        assert {**expected["recent"][protocol][part], "sd": {}, "by_seed": found["by_seed"]} == found
        good, seeds = result["arms"]["good"][protocol][part], [expected[s][protocol][part] for s in "123"]
        for name in good["intervals"]:
            values = [seed[name] for seed in seeds]
            assert good["by_seed"][name] == values
            assert good[name] == pytest.approx(np.mean(values), abs=2e-6)
            assert good["sd"][name] == pytest.approx(np.std(values, ddof=1), abs=2e-6)
            assert good["intervals"][name][0] <= good[name] <= good["intervals"][name][1]
            assert [found["by_history"].keys() for found in seeds] == [good["by_history"].keys()] * 3
    assert result["data"] == evaluate(full, cut, {}, K)["data"]
    json.dumps(result, allow_nan=False)


def test_a_clearly_better_arm_is_found_and_an_equal_one_is_not(result):
    rows = {(r["arm"], r["protocol"], r["part"], r["metric"]): r for r in result["comparisons"]}
    bad = rows["bad", "live", "all", "recall@3"]
    assert bad["against"] == "again"
    assert bad["found"] == "less"
    assert bad["p"] <= bad["p_holm"] < 0.05
    assert bad["interval"][0] < bad["difference"] < bad["interval"][1] < 0
    assert bad["difference"] == pytest.approx(np.mean(bad["by_seed"]), abs=2e-6)
    assert len(bad["by_seed"]) == 3
    ours, theirs = (result["arms"][name]["live"]["all"]["recall@3"] for name in ("bad", "again"))
    assert bad["difference"] == pytest.approx(ours - theirs, abs=2e-6)
    assert rows["recent", "live", "new", "recall@3"]["difference"] < 0
    assert not [row for row in result["comparisons"] if row["arm"] == "good"]
    assert {r["metric"] for r in rows.values()} == {
        "recall@3",
        "recall@10",
        "recall@12",
        "mrr",
        "ndcg@50",
        "hit@50",
    }


def test_equal_arms_are_told_apart_by_nothing(tmp_path, learning):
    result = go(tmp_path, learning, (GOOD, replace(GOOD, name="twin")))
    assert len(learning.calls) == 2
    for row in result["comparisons"]:
        assert (row["difference"], row["p"], row["p_holm"], row["found"]) == (0, 1, 1, "undecided")


def test_the_main_figure_is_recall_at_200_or_in_the_middle():
    for k, metric in (([10, 200], "recall@200"), ([500, 5, 50], "recall@50"), ([7], "recall@7")):
        assert main_metric(k) == metric


def test_comparisons_by_the_main_figure_are_corrected_among_themselves(result):
    main = main_metric(K)
    assert main == "recall@12"
    for chosen in (True, False):
        family = [row for row in result["comparisons"] if (row["metric"] == main) is chosen]
        assert len(family) > 3
        assert [r["p_holm"] for r in family] == metrics.holm(np.array([r["p"] for r in family])).tolist()


def test_the_correction_cannot_hide_the_largest_difference():
    for tests in (1, 20, 400):
        assert tests / (exchanges(tests) + 1) < runs.SURE


def test_one_arm_and_one_seed_make_an_experiment_too(tmp_path, learning):
    result = go(tmp_path, learning, (GOOD,), seeds=(4,))
    assert result["comparisons"] == []
    assert result["arms"]["good"]["live"]["all"]["sd"] == {}
    only_rivals = go(tmp_path, learning, (ARMS[3], replace(ARMS[3], name="twin")), seeds=(1, 2))
    assert {len(row["by_seed"]) for row in only_rivals["comparisons"]} == {1}


FEW_ITEMS = random_log(1, events=2000, items=12)


def test_a_log_without_anything_new_has_no_such_figures(tmp_path, learning):
    result = go(tmp_path, learning, log=FEW_ITEMS, k=(3,))
    assert result["data"]["live"]["new_requests"] == 0
    assert result["arms"]["good"]["live"]["new"]["recall@3"] is None
    assert not [row for row in result["comparisons"] if row["part"] == "new"]


def test_what_produced_it_is_in_the_result(tmp_path, learning):
    result = go(tmp_path, learning, command="longretriever experiment", date="2026-01-02", minutes=1.0)
    made = result["made"]
    assert (made["command"], made["date"]) == ("longretriever experiment", "2026-01-02")
    cut = split(LOG)
    parts = {"full": cut.full, "train": cut.train}
    assert made["stores"] == {name: stored(part, tmp_path / name).fingerprint for name, part in parts.items()}
    (machine,) = made["environments"]
    assert machine["numpy"] == np.__version__
    assert machine["processors"] >= 1
    assert result["plan"] == {
        "seeds": (1, 2),
        "minutes": 1.0,
        "samples": None,
        "k": K,
        "request_seed": 1,
        "threads": None,
    }
    learns = result["arms"]["good"]["learns"]
    assert learns == {"is": f"{__name__}.Skill", "skill": 0.9, "seed": 1, "minutes": 1.0, "samples": None}
    assert result["arms"]["again"]["asked"]["interests"]["n"] == 1
    assert result["arms"]["recent"]["rival"] == "longretriever.evaluate.rivals.Recent"


# -- the whole way


def test_the_whole_way_with_a_real_training_in_its_process(tmp_path):
    tiny = TrainConfig(
        dim=8, context_length=8, recent_length=4, overlap=2, step_samples=100, epochs=1, layers=1, whole=None
    )
    arms = (
        Arm("ours", learn=tiny),
        Arm("top 1", learn=tiny, interests=Top(1), merge=merge.score),
        Arm("recent", rival=Recent),
    )
    ticks: list[float] = []
    given = {"work": tmp_path, "seeds": (1,), "k": K, "reading": {"threads": 1}, "date": "today"}
    result = run(LOG, arms, **given, trained=lambda tick: ticks.append(tick.share))
    assert result["failed"] == []
    assert 1.0 in ticks
    assert [facts["training"]["epochs"] for facts in result["arms"]["ours"]["learning"]] == [1]
    assert result["arms"]["ours"]["live"]["all"]["selection"] == 1
    assert result["arms"]["top 1"]["live"]["all"]["selection"] < 1
    assert {row["arm"] for row in result["comparisons"]} == {"top 1", "recent"}
    for facts in result["arms"]["ours"]["learning"]:
        assert facts["peak_memory_bytes"] > 1e7
        assert facts["model_bytes"] > 1e4
    assert run(LOG, arms, **given, trained=pytest.fail) == result
