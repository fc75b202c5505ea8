"""The commands: results on stdout, progress on stderr, errors in one line; and nothing imported in vain."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import typer.main

import longretriever
from longretriever import Retriever, Rules, Top
from longretriever.cli import app, main
from longretriever.retrieve.merge import quota
from longretriever.store.behaviors import Store
from tests.experiment.test_paper_report import made_by_hand as paper_result

SIDES = ("--items", "market/items.parquet", "--users", "market/users.parquet")
TRAIN = ("--dim", "8", "--layers", "1", "--epochs", "1", "--threads", "1")


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """Of the one JSON object that stdout must hold, and nothing else."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that says it, the last on stderr; progress may stand before it."""
        assert self.code == 1
        assert self.out == ""
        assert "Traceback" not in self.err
        line = self.err.splitlines()[-1]
        assert line.startswith("error: ")
        assert self.err.count("error: ") == 1
        return line


def run(*arguments: object) -> Said:
    """`longretriever ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["longretriever", *map(str, arguments)])
        patch.setenv("COLUMNS", "100")
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return Said(code, out.getvalue(), err.getvalue())


def shell(code: str, *arguments: object, cwd: Path) -> Said:
    """The same in a process of its own, which first runs some code."""
    command = [sys.executable, "-c", code, *map(str, arguments)] if code else [sys.executable, "-m"]
    command += [] if code else ["longretriever", *map(str, arguments)]
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return Said(ran.returncode, ran.stdout, ran.stderr)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """market, store, model and model/index, made by the commands themselves."""
    path = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        made = [
            run("generate", "market", "--events", 4000, "--seed", 3, "--json"),
            run("ingest", "--events", "market/events.parquet", *SIDES, "--out", "store"),
            run("train", "store", "--out", "model", *TRAIN),
            run("index", "model", "--json"),
        ]
    for said in made:
        assert said.code == 0, said.err
    assert made[0].json["events"] == 4000
    assert "4,000 read" in made[1].out
    assert "1 epochs are done" in made[2].out
    assert "epoch 1" in made[2].err
    assert made[3].json["path"] == "model/index"
    return path


@pytest.fixture
def command(monkeypatch, workspace) -> Callable[..., Said]:
    """`run` in the workspace."""
    monkeypatch.chdir(workspace)
    return run


@pytest.fixture(scope="module")
def busy(workspace) -> int:
    """The user with the most behaviors."""
    store = Store.open(workspace / "store")
    return store.user_ids.take([np.diff(store.group_start[store.user_group]).argmax()])[0]


# -- one user, everyone


def test_one_user_as_a_table(command):
    said = command("retrieve", "model", "--user", 7, "--show", 3)
    assert said.code == 0
    assert said.err == ""
    assert "Contexts asked for user 7" in said.out
    assert "The first 3 of " in said.out
    assert "because the user met" in said.out


def test_one_user_as_json(command, workspace):
    found = command("retrieve", "model", "--user", 7, "--select", "top:3", "--k", 20, "--json").json
    answer = Retriever.load(workspace / "model").retrieve(7, 20, interests=Top(3))
    assert found == json.loads(json.dumps(answer.as_dict()))
    assert found.keys() == {"user_id", "now", "contexts", "candidates"}
    assert len(found["candidates"]) == 20
    assert found["candidates"][0]["reasons"][0].keys() == {
        "item_id",
        "title",
        "timestamp",
        "behavior",
        "similarity",
    }


def test_every_rule_as_an_option(command, workspace, busy):
    retriever = Retriever.load(workspace / "model", interests=Top(4), merge=quota, exact=True)
    plain = retriever.retrieve(busy, 50)
    a, b, c = [context.category_id for context in plain.contexts][:3]
    items = plain.item_ids[:2]
    now = Store.open(workspace / "store").last_time - 86_400
    found = command(
        *(
            "retrieve",
            "model",
            "--user",
            busy,
            "--k",
            50,
            "--now",
            now,
            "--select",
            "top:4",
            "--merge",
            "quota",
        ),
        *("--exact", "--exclude-seen", "--exclude-item", items[0], "--exclude-item", items[1]),
        *("--exclude-category", a, "--include-category", 1, "--include-category", 2),
        *("--quota", f"{b}=3", "--boost", f"{c}=4", "--boost", f"{b}=1.5", "--threads", 1, "--json"),
    ).json
    rules = Rules(
        exclude_seen=True,
        exclude_items=items,
        exclude_categories=[a],
        include_categories=[1, 2],
        quotas={b: 3},
        boosts={c: 4.0, b: 1.5},
    )
    wanted = retriever.retrieve(busy, 50, now=now, rules=rules).as_dict()
    assert found == json.loads(json.dumps(wanted))
    assert wanted["candidates"] != plain.as_dict()["candidates"]


def test_the_seed_draws(command):
    def drawn(seed: int) -> list:
        said = command("retrieve", "model", "--user", 7, "--select", "random:1:10", "--seed", seed, "--json")
        return [c["category_id"] for c in said.json["contexts"]]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 1


def test_everyone_to_a_file(command, workspace):
    said = command(
        "retrieve", "model", "--all-users", "--out", "all.parquet", "--k", 5, "--seed", 2, "--json"
    )
    rows = pq.read_table(workspace / "all.parquet")
    assert said.json == {"path": "all.parquet", "users": 40, "rows": rows.num_rows}
    assert "users" in said.err
    first = [row["item_id"] for row in rows.to_pylist() if row["user_id"] == 7]
    one = command("retrieve", "model", "--user", 7, "--k", 5, "--seed", 2, "--json").json
    assert [c["item_id"] for c in one["candidates"]] == first


def test_another_store_and_nobody_before_now(command):
    command("ingest", "--events", "market/events.parquet", "--out", "plain store")
    said = command("retrieve", "model", "--store", "plain store", "--user", 7, "--now", 0)
    assert said.code == 0
    assert "No candidates: the user has no behaviors before this time" in said.out


def test_ids_with_brackets_are_printed_as_they_are(command, workspace):
    """Square brackets are mark-up to the library that prints the tables."""
    rows = pq.read_table(workspace / "market/events.parquet").to_pylist()[:600]
    lines = [f"[/red] {r['user_id']},[b]{r['item_id']},[/] {r['category_id']},{r['timestamp']}" for r in rows]
    text = "\n".join(["user_id,item_id,category_id,timestamp", *lines])
    (workspace / "brackets.csv").write_text(text)
    assert command("ingest", "--events", "brackets.csv", "--out", "brackets").code == 0
    assert command("train", "brackets", "--out", "bracket-model", *TRAIN).code == 0
    user = lines[0].split(",")[0]
    said = command("retrieve", "bracket-model", "--user", user, "--exact", "--show", 2)
    assert f"Contexts asked for user {user}" in said.out
    assert "[/] " in said.out
    assert "[b]" in said.out


# -- new items


@pytest.fixture
def growing(workspace) -> Path:
    """A copy of the model, and items to add: two new ones and one that it has."""
    shutil.rmtree(workspace / "growing", ignore_errors=True)
    shutil.copytree(workspace / "model", workspace / "growing")
    lines = [
        "thing,category_id,title,brand",
        "100000,0,a new lamp,brand 07",
        "100001,1,another,none",
        "0,0,x,y",
    ]
    (workspace / "new.csv").write_text("\n".join(lines))
    return workspace / "growing"


def says(said, *lines: str) -> None:
    """The command went well, and each of these patterns is in what it printed."""
    assert said.code == 0, said.err
    for line in lines:
        assert re.search(line, said.out), line


def test_new_items_are_added_and_found(command, growing):
    words = ("index", "growing", "--add", "new.csv", "--item-column", "item_id=thing")
    said = command(*words)
    says(
        said,
        r"rows +3 read",
        r"added +2 items in 2 categories",
        r"already there +1 items, left as they are",
        r"feature brand +1 known, 1 unknown, 0 missing",
        r"feature price_band +0 known, 0 unknown, 2 missing",
        r"no feature known +1 items: those of one category have one vector",
        r"index +growing/index",
    )
    asked = ("retrieve", "growing", "--user", 7, "--include-category", 0, "--k", 500, "--json")
    found = {c["item_id"]: c["title"] for c in command(*asked).json["candidates"]}
    assert found[100000] == "a new lamp"
    before = command("verify", "growing", "--json").json["fingerprint"]
    again = command(*words, "--json").json
    assert (again["items"]["added"], again["items"]["already"]) == (0, 3)
    assert command("verify", "growing", "--json").json["fingerprint"] == before


AB = ("--users", 80, "--events", 8000, "--days", 2, "--workers", 1)


def test_an_ab_test_in_the_market(command, workspace):
    arms = ("--arm", "both=popular,item-to-item", "--arm", "popular alone=popular")
    words = (
        "experiment",
        "ab",
        "--out",
        "ab",
        *AB,
        *arms,
        "--set",
        "feed.slots=4",
        "--set",
        "market.stay=0.5",
    )
    said = command(*words)
    assert said.code == 0, said.err
    says(said, r"A/B test of 2 arms", r"UV CTR +\.\d+", r"Routes of popular alone", r"unique")
    assert "ab/report.html" in said.out
    result = json.loads((workspace / "ab" / "results.json").read_text())
    assert list(result["arms"]) == ["both", "popular alone"]
    assert result["plan"]["feed"]["slots"] == 4
    assert result["plan"]["market"]["stay"] == 0.5
    assert result["made"]["command"].startswith("longretriever experiment ab --out ab")
    again = command(*words, "--json")
    assert again.json["arms"] == result["arms"]
    assert "ranker" not in again.err, "all days are there"


def test_aa_tests_in_the_market(command):
    words = ("experiment", "ab", "--out", "aa", *AB, "--arm", "both=popular,item-to-item", "--aa", 2)
    found = command(*words, "--json").json
    assert found["runs"] == 2
    assert set(found["figures"]["clicks"]) == {
        "p_under_level",
        "interval_misses_0",
        "standard_error",
        "least_p",
    }
    says(command(*words), r"2 A/A tests", r"interval misses 0", r"clicks +\d+\.\d%")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("--arm", "a=popular,nobody"),
            r"arm 'a=popular,nobody': there is no route 'nobody'. Routes are pop",
        ),
        (("--arm", "popular"), r"arm 'popular': expected NAME=ROUTE,ROUTE"),
        (("--set", "feed.slotz=3"), r"'feed.slotz=3': expected market.FIELD=VALUE.* slots, "),
        (("--set", "slots=3"), r"'slots=3': expected market.FIELD=VALUE.*market, feed, platform"),
        (("--set", "market.start=5"), r"'market.start=5': expected market.FIELD=VALUE.* events, users, "),
        (("--set", "feed.slots=many"), r"'many' is no int, as 10 is"),
        (("--test-users", 9_000), r"9,000 users, expected 1 to 80"),
    ],
)
def test_what_cannot_be_tested_is_said(command, words, error):
    said = command("experiment", "ab", "--out", "ab", *AB, *words)
    assert re.search(error, said.error)


def test_the_papers_tables_become_a_report(command, workspace, monkeypatch):
    """Trainings and days are tested elsewhere."""
    given = {}

    def made(plan, work, **options):
        given.update(options, plan=plan)
        return paper_result()

    monkeypatch.setattr("longretriever.experiment.paper.run_paper", made)
    (workspace / "own.json").write_text('{"Table 1": {"LongRetriever, paper": {"uv_ctr": 0.01}}}')
    words = ("experiment", "paper", "--out", "paper", "--users", 500, "--events", 100_000, "--worlds", 2)
    said = command(*words, "--paper-figures", "own.json", "--sweep-worlds", 0)
    assert said.code == 0, said.err
    assert (given["worlds"], given["sweep_worlds"], given["plan"].market.users) == (2, 0, 500)
    assert given["figures_of_paper"]["Table 1"]["LongRetriever, paper"]["uv_ctr"] == 0.01
    assert "paper/report.html" in said.out
    (workspace / "own.json").write_text('{"Table 1": {"LongRetriever, paper": {"clickz": 0.01}}}')
    assert (
        "found the figures ['clickz'], expected some of pv, uv_ctr"
        in command(*words, "--paper-figures", "own.json").error
    )
    assert "Expected JSON such as" in command(*words, "--paper-figures", "nowhere.json").error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--add", "nowhere.csv"], r"nowhere\.csv: no items file there"),
        (["--add", "new.csv"], "no column item_id; .*Name the right one with --item-column item_id=NAME"),
        (["--item-column", "item_id=thing"], "--item-column is for --add"),
        (["--move"], "--move is for --add"),
        (["--remove", "nowhere.csv"], r"nowhere\.csv: no items file there"),
        (["--remove", "new.csv"], "no column item_id; .*Name the right one with --item-column item_id=NAME"),
        (["--remove", "new.csv", "--exact"], "--add and --remove index as it is always done"),
        (
            ["--add", "new.csv", "--out", "x"],
            "--add and --remove replace the model together with MODEL/index",
        ),
        (
            ["--add", "new.csv", "--item-column", "item_id=title", "--item-column", "title=thing"],
            "item_id 'a new lamp' is not an integer, the ids of growing are",
        ),
        (
            ["--add", "new.csv", "--item-column", "item_id=thing", "--item-column", "category_id=thing"],
            r"2 of 2 new items are of no category .* such as 100000 \(category 100000\)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_new_items(command, growing, options, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(command("index", "growing", *options).error)


def test_items_go_move_and_come_back(command, growing, workspace):
    (workspace / "gone.csv").write_text("item_id\n0\n1\n77777777\n")
    (workspace / "there.csv").write_text("item_id,category_id\n1,0\n2,1\n3,\n")
    asked = ("retrieve", "growing", "--user", 7, "--include-category", 0, "--k", 500, "--json")
    before = {c["item_id"] for c in command(*asked).json["candidates"]}
    assert 0 in before
    said = command("index", "growing", "--remove", "gone.csv", "--add", "there.csv", "--move")
    says(
        said,
        r"rows to remove +3 read",
        r"removed +2 items, 1 are not in the model",
        r"left +[0-9,]+ items",
        r"already there +3 items",
        r"back +1 of those, which had been removed",
        r"moved +\d of those, to the category that they have here",
    )
    after = {c["item_id"]: c["category_id"] for c in command(*asked).json["candidates"]}
    assert 0 not in after
    assert after.get(2) == 1
    found = command("index", "growing", "--add", "new.csv", "--item-column", "item_id=thing", "--json").json
    assert (found["items"]["added"], found["items"]["back"]) == (2, 1)
    assert 0 in {c["item_id"] for c in command(*asked).json["candidates"]}


def test_new_items_need_no_torch(workspace, growing):
    words = ("index", "growing", "--add", "new.csv", "--item-column", "item_id=thing", "--json")
    assert shell(WITHOUT_TORCH, *words, cwd=workspace).json["items"]["added"] == 2


# -- evaluate, verify


def test_evaluate_prints_one_object_with_the_figures_promised(command, workspace):
    said = command(
        *("evaluate", "--events", "market/events.parquet", "--models", "longretriever,recent"),
        *("--epochs", 1, "--minutes", 0.05, "--work", "evaluation", "--threads", 1, "--json"),
    )
    result = said.json
    live = {"recall@10", "recall@50", "recall@200", "recall@500", "mrr"}
    batch = {"recall@50", "recall@200", "recall@500", "ndcg@50", "hit@50", "categories@50", "coverage@50"}
    assert result.keys() >= {"data", "models"}
    assert list(result["models"]) == ["longretriever", "recent"]
    for model in result["models"].values():
        for protocol, figures in (("live", live), ("batch", batch)):
            for part in ("all", "new"):
                assert model[protocol][part].keys() >= figures
        assert model["live"]["all"]["recall@50"] > 0
        assert model.keys() >= {"train_seconds", "samples_per_second"}
    assert result["models"]["longretriever"]["samples_per_second"] > 0
    assert "longretriever: learning" in said.err
    assert (workspace / "evaluation" / "model" / "user_tower.onnx").exists()


def test_evaluate_as_tables(command):
    said = command("evaluate", "--events", "market/events.parquet", "--models", "recent,popular", "--k", "20")
    assert said.code == 0
    assert "Live: " in said.out
    assert "R@20" in said.out
    assert "popular" in said.out


def test_the_leak_of_mixed_batches(command):
    words = ("experiment", "leak", "--events", "market/events.parquet", "--samples", 300)
    found = command(*words, "--json").json["models"]
    assert list(found) == ["mixed batches", "one category a batch"]
    assert 0 < found["mixed batches"]["in_category@50"] <= 1


def test_an_experiment_writes_its_report_and_goes_on(command, workspace):
    words = ("experiment", "ablations", "--events", "market/events.parquet", "--out", "report")
    words = (*words, "--only", "recent", "--only", "popular", "--seeds", 1, "--samples", 300)
    said = command(*words)
    assert said.code == 0, said.err
    assert "LongRetriever" in said.out
    assert "report/report.html" in said.out
    result = json.loads((workspace / "report" / "results.json").read_text())
    assert list(result["arms"]) == ["LongRetriever", "recent", "popular"]
    assert result["made"]["command"].startswith("longretriever experiment ablations --events market")
    again = command(*words, "--json").json
    assert again["arms"]["recent"]["live"] == result["arms"]["recent"]["live"]


def test_a_replay_says_which_route_alone_found_what(command, workspace):
    words = ("experiment", "replay", "--events", "market/events.parquet", "--out", "replay", "--seeds", 1)
    routes = [word for name in ("recent", "popular", "EBR") for word in ("--only", name)]
    said = command(*words, *routes, "--k", "5,20", "--samples", 300, "--horizon", 7)
    assert said.code == 0, said.err
    says(
        said, r"ALL, 5 items a route: [0-9,]+ requests, [0-9,]+ items met within 7 days", r"all together +\d"
    )
    assert "replay/report.html" in said.out
    assert "EBR, seed 1: learning" in said.err
    result = json.loads((workspace / "replay" / "results.json").read_text())
    assert list(result["found"]["20"]["all"]["routes"]) == ["EBR", "recent", "popular"]
    assert result["made"]["command"].startswith("longretriever experiment replay --events market")
    two = ("--only", "recent", "--only", "popular", "--work", "replay/work", "--k", 20, "--json")
    again = command(*words[:-4], "--out", "replay-again", "--seeds", 1, *two)
    assert "2 of 2 runs were finished before and are skipped: recent; popular" in again.err
    assert again.json["found"]["20"]["all"]["routes"]["recent"]["next"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--only", "foo", "--only", "EBR"],
            "route 'foo': expected one of LongRetriever; LongRetriever, paper;",
        ),
        (["--only", "EBR"], "a replay of 'EBR' alone, expected two or more routes"),
        (["--horizon", "-1"], r"the horizon is -1\.0 days, expected 0 or more"),
        (["--k", "0,5"], r"k is \[0, 5\], expected at least one list length of 1 or more"),
        (["--k", "5,x"], "--k: 'x' is not a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_a_replay(command, options, message):
    words = ("experiment", "replay", "--events", "market/events.parquet", "--out", "wrong")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(command(*words, *options).error)


def test_other_methods_are_trained_and_asked_by_the_same_commands(command):
    trained = command("train", "store", "--out", "mind", "--method", "mind", "--samples", 300, "--json").json
    assert trained["training"]["samples"] >= 300
    command("index", "mind")
    answer = command("retrieve", "mind", "--user", 7, "--k", 5, "--json").json
    assert len(answer["candidates"]) == 5
    assert {context["category_id"] for context in answer["contexts"]} == {None}


def test_training_with_factors(command):
    words = ("--samples", 300, "--factors", "--validation", 0.1)
    trained = command("train", "store", "--out", "pooled", "--method", "ebr", *words, "--json").json
    assert trained["config"]["factors"] is None
    assert trained["factors"]["weight"] >= 0
    assert trained["factors"]["requests"] > 0
    command("index", "pooled")
    assert len(command("retrieve", "pooled", "--user", 7, "--k", 5, "--json").json["candidates"]) == 5
    plain = command("train", "store", "--out", "plain", "--samples", 300, "--no-factors", "--json").json
    assert plain["config"]["whole"]["factors"] == 0
    assert "factors" not in plain
    for others in (["--factors", "--method", "mind"], ["--no-factors", "--preset", "paper"]):
        said = command("train", "store", "--out", "no", *others).error
        assert "--[no-]factors: for longretriever (but not the paper's) and ebr" in said


def test_verify(command, workspace):
    found = command("verify", "model", "--json").json
    assert found["kind"] == "model"
    assert found["intact"] is True
    assert found["made_from"]["store"] == Store.open(workspace / "store").fingerprint
    said = command("verify", "store")
    assert "made_from    nothing saved" in said.out
    assert "intact       True" in said.out
    assert "no such folder" in command("verify", "nowhere").error


def test_verify_finds_damage(command, workspace):
    assert command("generate", "damaged", "--events", 1000).code == 0
    file = workspace / "damaged" / "events.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "events.parquet: its SHA-256 is not the one written down" in command("verify", "damaged").error


# -- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--user", "12345"], "user 12345 is not among the 40 users of "),
        (["--user", "Ann"], "user 'Ann' is not among the 40 users of .*integers, such as 0"),
        (
            ["--user", "7", "--select", "foo"],
            "--select foo: expected pgin:K, random:N:M or top:N, such as pgin:20",
        ),
        (["--user", "7", "--select", "pgin:0"], r"Pgin\(k=0\): expected more than 0"),
        (["--user", "7", "--select", "top:x"], "--select: 'x' is not a whole number"),
        (["--user", "7", "--select", "random:5:2"], r"RandomInTop\(n=5, m=2\): n of m are drawn"),
        (
            ["--user", "7", "--merge", "foo"],
            "--merge foo: expected one of probability, quota, round-robin, score",
        ),
        (["--user", "7", "--quota", "x"], "--quota x: expected two names with = between"),
        (["--user", "7", "--quota", "1=x"], "--quota: 'x' is not a whole number"),
        (["--user", "7", "--quota", "1=-2"], "quota of category 1 is -2, expected 0 or more"),
        (["--user", "7", "--boost", "1=x"], "--boost: 'x' is not a number"),
        (["--user", "7", "--boost", "1=0"], "boost of category 1 is 0.0, expected more than 0"),
        (
            ["--user", "7", "--include-category", "x"],
            "category 'x' is not among the [0-9]+ categories of model",
        ),
        (["--user", "7", "--k", "0"], "k=0, expected at least 1"),
        (["--user", "7", "--now", "1700000000000"], "now=1.*expected seconds since 1970"),
        (["--user", "7", "--now", "nan"], "now=nan: expected seconds"),
        (["--user", "7", "--store", "nowhere"], "nowhere: no such folder, where a saved store was wanted"),
        (["--user", "7", "--store", "model"], "model holds a saved model, expected: store"),
        (["--user", "7", "--index", "nowhere"], "nowhere: no such folder, where a saved index was wanted"),
        (["--user", "7", "--out", "x.parquet"], "--out is for --all-users"),
        (["--user", "7", "--all-users", "--out", "x.parquet"], "retrieve needs --user ID, or --all-users"),
        ([], "retrieve needs --user ID, or --all-users"),
        (["--all-users"], "--all-users needs --out FILE.parquet"),
        (["--all-users", "--out", "/proc/nowhere/x.parquet"], "No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_retrieve(command, options, message):
    with pytest.raises(AssertionError, match=message):  # `match` searches as the tests of errors elsewhere do
        raise AssertionError(command("retrieve", "model", *options).error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["retrieve", "nowhere", "--user", "7"], "nowhere: no such folder, where a saved model was wanted"),
        (["retrieve", "store", "--user", "7"], "store holds a saved store, expected: model"),
        (["index", "store"], "store holds a saved store, expected: model"),
        (["index", "model", "--out", "store"], "store holds a saved store, so it will not be overwritten"),
        (["index", "model", "--out", "."], "exists and holds no saved index"),
        (["train", "nowhere", "--out", "x"], "nowhere: no such folder"),
        (
            ["train", "store", "--out", "store"],
            "store holds a saved store, so it will not be overwritten by a model",
        ),
        (["train", "store", "--out", "x", "--dim", "9"], "dim=9 cannot be divided among heads=2"),
        (["train", "store", "--out", "x", "--encoder", "gru"], "encoder='gru': expected 'packed' or 'cls'"),
        (["ingest", "--events", "nowhere.csv", "--out", "x"], "nowhere.csv"),
        (
            ["ingest", "--events", "market", "--out", "x", "--column", "user_id"],
            "--column user_id: expected two",
        ),
        (
            ["evaluate", "--events", "market/events.parquet", "--models", "recent,foo"],
            r"models \['foo'\]: expected",
        ),
        (["evaluate", "--events", "market/events.parquet", "--models", ""], r"models \[\]: expected"),
        (["evaluate", "--events", "market/events.parquet", "--k", "5,x"], "--k: 'x' is not a whole number"),
        (["evaluate", "--events", "market/events.parquet", "--k", "0"], r"k is \[0\], expected at least one"),
        (["evaluate", "--events", "market/events.parquet", "--split", "2"], "quantile is 2.0, expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_of_the_others(command, words, message):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(command(*words).error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["retrieve", "model", "--user", "7", "--k", "a"], "--k"),
        (["retrieve", "model", "--usr", "7"], "--usr"),
        (["retrieve"], "model"),
        (["generate", "x", "--events", "-1"], "--events"),
        (["nonsense"], "nonsense"),
    ],
    ids=" ".join,
)
def test_wrong_options_are_the_parser_s_matter(command, words, message):
    said = command(*words)
    assert said.code == 2
    assert said.out == ""
    assert message in said.err
    assert "Traceback" not in said.err


# -- the process


def test_an_error_in_a_process_of_its_own(workspace):
    assert "user 12345 is not among" in shell("", "retrieve", "model", "--user", 12345, cwd=workspace).error


def test_ctrl_c(workspace):
    process = subprocess.Popen(
        [sys.executable, "-m", "longretriever", "generate", "huge", "--events", "50000000"],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    assert process.stderr is not None
    while not list(workspace.glob(".huge.*")):  # it is writing
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(workspace.glob("*huge*"))
    assert not list(workspace.glob(".huge*"))


MAIN = """
sys.argv = ["longretriever", *sys.argv[1:]]
main()
"""
LIGHT = f"""
import atexit, os, sys
from longretriever.cli import main
heavy = {{"torch", "onnxruntime", "faiss", "duckdb", "ibis", "pyarrow"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
atexit.register(lambda: "torch" in sys.modules and os._exit(77))
{MAIN}
"""
WITHOUT_TORCH = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from longretriever.cli import main
{MAIN}
"""


@pytest.mark.parametrize(
    "words",
    [
        ["retrieve", "model", "--user", "7", "--json"],
        ["evaluate", "--events", "market/events.parquet", "--models", "recent", "--json"],
    ],
    ids=lambda words: words[0],
)
def test_only_training_imports_torch(workspace, words):
    assert shell(LIGHT, *words, cwd=workspace).json


def test_training_without_torch_says_what_to_install(workspace):
    said = shell(WITHOUT_TORCH, "train", "store", "--out", "x", cwd=workspace)
    assert "pip install 'longretriever[train]'" in said.error


def test_it_says_its_version(command):
    said = command("--version")
    assert (said.code, said.out.strip()) == (0, longretriever.__version__)
    assert f"## {said.out.strip()}" in (Path(__file__).parents[1] / "CHANGELOG.md").read_text()


def test_every_command_and_option_says_what_it_is():
    group = typer.main.get_command(app)
    for name, sub in group.commands.items():  # type: ignore[attr-defined]
        assert sub.help, name
        for option in sub.params:
            assert option.help, f"{name} {option.name}"
