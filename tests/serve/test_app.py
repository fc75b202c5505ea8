"""What the service promises to those who ask over HTTP."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from longretriever import Retriever, Top
from longretriever.retrieve.rules import Rules


def test_the_answer_is_that_of_the_retriever(server, model):
    retriever = Retriever.load(model)
    now = retriever.store.last_time + 1
    asked = {"user_id": 3, "k": 30, "seed": 5, "now": now, "interests": {"select": "top", "n": 4}}
    answer = server.post("/v1/retrieve", {**asked, "explain": True}).json()
    wanted = retriever.retrieve(3, 30, now=now, rng=5, interests=Top(4))
    assert [c["item_id"] for c in answer["candidates"]] == wanted.item_ids
    assert [c["context"] for c in answer["candidates"]] == wanted.source.tolist()
    assert [c["category_id"] for c in answer["contexts"]] == [c.category_id for c in wanted.contexts]
    assert sum(c["share"] for c in answer["contexts"]) == pytest.approx(1)
    for said, found in zip(answer["candidates"], wanted.candidates, strict=True):
        assert (said["title"], said["rank"]) == (found.title, found.rank)
        assert said["log_prob"] == pytest.approx(found.log_prob)
        assert [r["item_id"] for r in said["reasons"]] == [r.item_id for r in found.reasons]
    assert answer["fallback"] is None
    assert {"life", "interests", "vectors", "search", "merge", "total"} <= answer["timings"].keys()


def test_without_explain_only_what_a_ranker_needs(server):
    answer = server.post("/v1/retrieve", {"user_id": 3, "k": 5}).json()
    assert set(answer["candidates"][0]) == {"item_id", "category_id", "score", "rank", "context"}


@pytest.mark.parametrize(
    "field",
    [
        {"exclude_seen": True},
        {"merge": "quota"},
        {"returns": 0.0},
        {"interests": {"select": "random", "n": 2, "m": 3}},
        {"interests": {"select": "pgin", "n": 2}},
        {"interests": {"n": 2}},
    ],
)
def test_each_field_changes_the_answer(server, busy, field):
    plain = {"user_id": busy, "k": 100, "seed": 1}
    before, after = (server.post("/v1/retrieve", {**plain, **f}).json() for f in ({}, field))
    assert [c["item_id"] for c in before["candidates"]] != [c["item_id"] for c in after["candidates"]]


def test_rules_of_categories_and_items(server, model):
    retriever = Retriever.load(model)
    plain = {"user_id": 3, "k": 100, "seed": 1}
    first = server.post("/v1/retrieve", plain).json()
    category = first["candidates"][0]["category_id"]
    item = first["candidates"][0]["item_id"]
    interests = {"exclude": [category], "include": [1], "quotas": {"2": 1}, "boosts": {"3": 5.0}}
    ruled = server.post("/v1/retrieve", {**plain, "interests": interests, "exclude_items": [item]}).json()
    assert category not in {c["category_id"] for c in ruled["candidates"]}
    assert item not in {c["item_id"] for c in ruled["candidates"]}
    rules = Rules(
        exclude_categories=[category],
        include_categories=[1],
        quotas={2: 1},
        boosts={3: 5.0},
        exclude_items=[item],
    )
    wanted = retriever.retrieve(3, 100, rng=1, rules=rules)
    assert [c["item_id"] for c in ruled["candidates"]] == wanted.item_ids


def test_a_seed_repeats_and_is_told(server, busy):
    asked = {"user_id": busy, "interests": {"select": "random", "n": 1, "m": 20}}
    drawn = [server.post("/v1/retrieve", asked).json() for _ in range(12)]
    assert len({tuple(c["category_id"] for c in a["contexts"]) for a in drawn}) > 1
    again = server.post("/v1/retrieve", {**asked, "seed": drawn[0]["seed"]}).json()
    assert again["contexts"] == drawn[0]["contexts"]


def test_a_batch_is_the_same_as_one_by_one(server):
    users = [3, 999_999, 1, 3]
    asked = {"k": 20, "seed": 4, "interests": {"select": "random", "n": 2, "m": 5}}
    many = server.post("/v1/retrieve/batch", {"user_ids": users, **asked}).json()["answers"]
    for user, answer in zip(users, many, strict=True):
        alone = server.post("/v1/retrieve", {"user_id": user, **asked}).json()
        for part in ("candidates", "contexts"):
            assert len(answer[part]) == len(alone[part])
            for one, other in zip(answer[part], alone[part], strict=True):
                for name, value in one.items():  # sums of floats may be rounded otherwise in a batch
                    same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
                    assert other[name] == same


@pytest.mark.parametrize("user_id", [None, 424_242])
def test_who_is_not_known_gets_what_is_popular(server, model, user_id):
    asked = {"user_id": user_id, "k": 50, "interests": {"exclude": [1]}}
    answer = server.post("/v1/retrieve", asked).json()
    assert answer["fallback"] == "popular"
    assert len(answer["candidates"]) == 50
    assert 1 not in {c["category_id"] for c in answer["candidates"]}
    counts = dict.fromkeys(range(10_000), 0)
    store = Retriever.load(model).store
    late = store.event_time > store.last_time - 30 * 86_400
    for item in store.item_ids.take(store.event_item[late]):
        counts[item] += 1
    by_context: dict[int, list[int]] = {}
    for c in answer["candidates"]:
        by_context.setdefault(c["context"], []).append(counts[c["item_id"]])
    assert all(of == sorted(of, reverse=True) and min(of) > 0 for of in by_context.values())


# -- events


def test_an_event_counts_in_the_next_request(server):
    stranger = 500_001
    liked = server.post("/v1/retrieve", {"user_id": 3, "k": 1}).json()["candidates"][0]
    event = {"user_id": stranger, "item_id": liked["item_id"], "behavior": "click", "event_id": "first"}
    assert server.post("/v1/events", event).json() == {"accepted": 1, "duplicates": 0}
    answer = server.post("/v1/retrieve", {"user_id": stranger, "k": 20}).json()
    assert answer["fallback"] is None
    assert liked["category_id"] in {c["category_id"] for c in answer["contexts"]}
    assert server.post("/v1/events", event).json() == {"accepted": 0, "duplicates": 1}
    life = server.get(f"/v1/users/{stranger}").json()
    assert (life["behaviors"], life["live"]) == (1, 1)


def test_a_new_item_counts_for_its_category(server):
    stranger = 500_002
    event = {"user_id": stranger, "item_id": 77_777_777, "timestamp": 1.7e9}
    refused = server.post("/v1/events", event)
    assert refused.status_code == 422
    assert "send its category_id as well" in refused.json()["detail"]
    assert server.post("/v1/events", {"events": [{**event, "category_id": 2}]}).json()["accepted"] == 1
    answer = server.post("/v1/retrieve", {"user_id": stranger, "interests": {"select": "top"}}).json()
    assert [c["category_id"] for c in answer["contexts"]][:1] == [2]


def test_of_several_events_all_or_none_are_taken(server):
    good = {"user_id": 500_003, "item_id": 1}
    refused = server.post("/v1/events", {"events": [good, {"user_id": 500_003, "item_id": 88_888_888}]})
    assert refused.status_code == 422
    assert "events[1].item_id" in refused.json()["detail"]
    assert server.get("/v1/users/500003").status_code == 404


def test_order_of_arrival_does_not_matter(server):
    times = [1.70e9, 1.60e9, 1.65e9]
    for at in times:
        server.post("/v1/events", {"user_id": 500_004, "item_id": 5, "timestamp": at})
    recent = server.get("/v1/users/500004").json()["recent"]
    assert [b["timestamp"] for b in recent] == sorted(map(int, times), reverse=True)
    early = server.post("/v1/retrieve", {"user_id": 500_004, "now": 1.60e9}).json()
    assert early["fallback"] == "popular"  # strictly before


def test_a_forgotten_person_is_gone_and_may_come_back(server):
    assert server.get("/v1/users/5").json()["behaviors"] > 0
    server.post("/v1/events", {"user_id": 5, "item_id": 1})
    gone = httpx.delete(f"{server.url}/v1/users/5").json()
    assert gone == {"user_id": 5, "deleted": 1}
    assert server.get("/v1/users/5").status_code == 404
    assert server.post("/v1/retrieve", {"user_id": 5}).json()["fallback"] == "popular"
    server.post("/v1/events", {"user_id": 5, "item_id": 1})
    life = server.get("/v1/users/5").json()
    assert (life["behaviors"], life["live"]) == (1, 1)


# -- what there is


def test_a_life_adds_up(server, model):
    store = Retriever.load(model).store
    life = server.get("/v1/users/8?spans=10&categories=1000&recent=5").json()
    number = store.user_number(8)
    rows = store.rows_of(number)
    assert life["behaviors"] == rows.stop - rows.start == sum(c["behaviors"] for c in life["categories"])
    assert all(sum(c["counts"]) == c["behaviors"] for c in life["categories"])
    assert sum(c["share"] for c in life["categories"]) == pytest.approx(1)
    assert len(life["recent"]) == 5
    assert life["profile"].keys() == {field.name for field in store.profile_fields}
    half = server.get(f"/v1/users/8?now={(life['first'] + life['last']) / 2}").json()
    assert 0 < half["behaviors"] < life["behaviors"]


def test_catalogue_and_similar_items(server, model):
    items = server.get("/v1/catalogue/items?limit=3").json()["items"]
    assert len(items) == 3
    word = items[0]["title"].split()[0]
    found = server.get(f"/v1/catalogue/items?like={word.upper()}&limit=1000").json()["items"]
    assert found
    assert all(word in one["title"] for one in found)
    by_id = server.get(f"/v1/catalogue/items?like={items[2]['item_id']}").json()["items"]
    assert by_id[0] == items[2]
    category = items[0]["category_id"]
    inside = server.get(f"/v1/catalogue/items?category_id={category}&limit=5").json()["items"]
    assert {one["category_id"] for one in inside} == {category}
    categories = server.get("/v1/catalogue/categories").json()
    assert categories["total"] == len(categories["categories"])
    assert sum(c["items"] for c in categories["categories"]) == Retriever.load(model).model.n_items
    like = server.get(f"/v1/items/{items[0]['item_id']}/similar?k=4").json()
    assert len(like["similar"]) == 4
    assert items[0]["item_id"] not in {one["item_id"] for one in like["similar"]}
    assert server.get("/v1/items/123456789/similar").status_code == 404
    users = server.get("/v1/users?like=1&limit=50").json()
    assert [u["user_id"] for u in users["users"]][:2] == [1, 10]


def test_health_and_metrics(server):
    assert server.get("/healthz").json() == {"status": "alive"}
    for path in ("/", "/healthz", "/readyz"):
        assert httpx.head(f"{server.url}{path}").status_code == 200
    name = server.get("/v1/model").json()["model"]
    assert server.get("/readyz").json() == {"status": "ready", "model": name, "live": "ok"}
    text = server.get("/metrics").text
    for line in (
        "longretriever_stage_seconds_bucket",
        "longretriever_live_events",
        "index_age_seconds",
        name,
    ):
        assert line in text
    assert "/v1/users/{user_id}" in text or "/v1/retrieve" in text
    assert "/v1/users/8" not in text  # nobody's id becomes a label


# -- broken requests


BROKEN = [
    ({"user_id": "7"}, "ids here are integers"),
    ({"user_id": 7, "k": 0}, "greater than or equal to 1"),
    ({"user_id": 7, "k": 5_000}, "at most 2,000"),
    ({"user_id": 7, "k": "ten"}, "k: Input should be a valid integer"),
    ({"user_id": 7, "limit": 5}, "limit: Extra inputs"),
    ({"user_id": 7.5}, "user_id"),
    ({"user_id": True}, "user_id"),
    ({"user_id": 1 << 70}, "user_id"),
    ({"user_id": 7, "now": 1.7e12}, "now"),
    ({"user_id": 7, "now": -1}, "now"),
    ({"user_id": 7, "seed": -1}, "seed"),
    ({"user_id": 7, "merge": "best"}, "merge"),
    ({"user_id": 7, "returns": 2}, "returns"),
    ({"user_id": 7, "explain": "perhaps"}, "explain"),
    ({"user_id": 7, "exclude_seen": 3}, "exclude_seen"),
    ({"user_id": 7, "exclude_items": ["a"]}, "exclude_items: 'a', but ids here are integers"),
    ({"user_id": 7, "exclude_items": 3}, "exclude_items"),
    ({"user_id": 7, "interests": {"select": "best"}}, "select"),
    ({"user_id": 7, "interests": {"n": 0}}, "n"),
    ({"user_id": 7, "interests": {"select": "random", "n": 9, "m": 3}}, "expected n <= m"),
    ({"user_id": 7, "interests": {"include": [12_345]}}, "category 12345 is not among"),
    ({"user_id": 7, "interests": {"exclude": ["x"]}}, "interests.exclude"),
    ({"user_id": 7, "interests": {"quotas": {"a": 1}}}, "'a' is no id here"),
    ({"user_id": 7, "interests": {"quotas": {"1": -1}}}, "quotas"),
    ({"user_id": 7, "interests": {"boosts": {"1": 0}}}, "boosts"),
    ({"user_id": 7, "interests": []}, "interests"),
    ([], "body"),
]


@pytest.mark.parametrize(("body", "said"), BROKEN, ids=[json.dumps(body)[:60] for body, _ in BROKEN])
def test_a_broken_request_is_told_what_is_wrong(server, body, said):
    answer = server.post("/v1/retrieve", body)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]


BROKEN_EVENTS = [
    ({"item_id": 1}, "user_id"),
    ({"user_id": 1}, "item_id"),
    ({"user_id": "a", "item_id": 1}, "events[0].user_id: 'a', but ids here are integers"),
    ({"user_id": 1, "item_id": "a"}, "events[0].item_id"),
    ({"user_id": 1, "item_id": 1, "category_id": "a"}, "events[0].category_id"),
    ({"user_id": 1, "item_id": 1, "timestamp": 1.7e12}, "timestamp"),
    ({"user_id": 1, "item_id": 1, "timestamp": "yesterday"}, "timestamp"),
    ({"user_id": 1, "item_id": 1, "behavior": 3}, "behavior"),
    ({"user_id": 1, "item_id": 1, "behavior": "x" * 2_000}, "behavior"),
    ({"user_id": 1, "item_id": 1, "event_id": ""}, "event_id"),
    ({"events": []}, "events"),
    ({"user_id": 1, "item_id": 1, "when": 3}, "when"),
]


@pytest.mark.parametrize(("body", "said"), BROKEN_EVENTS)
def test_a_broken_event_is_not_taken(server, body, said):
    before = server.get("/v1/model").json()["live_events"]
    answer = server.post("/v1/events", body)
    assert answer.status_code == 422
    assert said in answer.text
    assert server.get("/v1/model").json()["live_events"] == before


def test_what_is_no_json_or_too_large(server):
    url = f"{server.url}/v1/retrieve"
    headers = {"Content-Type": "application/json"}
    assert httpx.post(url, content=b"{", headers=headers).status_code == 422
    huge = httpx.post(url, content=b" " * 1_000_001, headers=headers)
    assert huge.status_code == 413
    assert "expected at most 1,000,000" in huge.json()["detail"]
    chunks = (b" " * 100_000 for _ in range(30))  # no length declared
    assert httpx.post(url, content=chunks, headers=headers).status_code == 413
    assert server.post("/v1/retrieve", {"user_id": 3, "k": 1}).status_code == 200


def test_limits_of_batch(server):
    asked = {"user_ids": list(range(257))}
    answer = server.post("/v1/retrieve/batch", asked)
    assert answer.status_code == 422
    assert "user_ids: 257, expected at most 256" in answer.json()["detail"]


def test_paths_that_are_not_there(server):
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/retrieve").status_code == 405
    assert server.get("/v1/users/abc").status_code == 422
    assert server.get("/page/..%2fapp.py").status_code == 404


def test_a_name_that_points_here_is_not_enough(server):
    """A page elsewhere may have a host name resolved to this machine."""
    answer = server.get("/v1/model", headers={"Host": "evil.example"})
    assert answer.status_code == 400


def test_requests_have_names_and_no_ids_in_the_log(server):
    answer = server.get("/v1/users/8", headers={"X-Request-Id": "my-request.1"})
    assert answer.headers["x-request-id"] == "my-request.1"
    end = time.monotonic() + 5
    while "my-request.1" not in server.log.read_text():
        assert time.monotonic() < end
    (line,) = [line for line in server.log.read_text().splitlines() if "my-request.1" in line]
    said = json.loads(line)
    assert (said["route"], said["status"], said["method"]) == ("/v1/users/{user_id}", 200, "GET")
    assert said["ms"] > 0
    strange = server.get("/healthz", headers={"X-Request-Id": "a b\tc"})
    assert strange.headers["x-request-id"] != "a b\tc"
