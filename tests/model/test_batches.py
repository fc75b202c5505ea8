"""Every sample once, its past strictly earlier, its rivals those that the sampling says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from longretriever.errors import InputError
from longretriever.model.age import age_class
from longretriever.model.batches import Batches, CategoryCache, Rows, Sampling, first_not_before
from tests.worlds import START, once_log, random_log, stored, table

SMALL = {"context_length": 6, "recent_length": 4, "overlap": 2, "samples": 40}
LIFE = {"along": "life", "mixed": True}
few_and_slow = settings(  # without shrinking: each example is a whole ingest
    max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(random_log(3), tmp_path_factory.mktemp("batches") / "store")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return stored(once_log(2), tmp_path_factory.mktemp("once") / "store")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return stored(random_log(3, items=200), tmp_path_factory.mktemp("many") / "store")


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return stored(once_log(4, times=None), tmp_path_factory.mktemp("untied") / "store")


def samples_of(store, sampling, until=None, seed=0, epoch=0):
    """Every sample of an epoch as plain values: what is asked, what its state knows, who its rivals are."""
    batches = Batches(store, sampling, store.last_time if until is None else until)
    for rows in batches.epoch(seed, epoch):
        yield from samples_in(store, sampling, batches.assemble(rows, np.random.default_rng(seed))[0])


def samples_in(store, sampling, step):
    prefix = 1 + store.profile.shape[1]
    place, token = [], []  # of each state, the items that it knows; of each token, its item
    for bucket in step.buckets:
        for b in range(len(bucket.length)):
            width = bucket.item.shape[1]
            assert width <= sampling.context_length, "there are no more positions in the user tower"
            items = step.numbers[bucket.item[b]].tolist()
            token += [None] * prefix + items
            for t in range(prefix + width):
                known = t - prefix + 1 if sampling.packed else bucket.length[b]
                place.append(items[: max(0, known)])
    assert ((step.past_item >= 0) & (step.past_item < len(step.numbers))).all()
    for contest in step.contests:
        candidates = step.numbers[contest.candidate]
        for i, s in enumerate(range(contest.samples.start, contest.samples.stop)):
            n = step.past_count[s]
            target = int(candidates[contest.target[i]])
            assert step.numbers[step.target[s]] == target
            assert store.item_category[target] == step.category[s]
            yield {
                "category": int(step.category[s]),
                "target": target,
                "past": place[step.state[s]],
                "recent": step.numbers[step.recent[s, : step.recent_count[s]]].tolist(),
                "since": step.since[s].tolist(),
                "returns": step.numbers[step.past_item[s, :n]].tolist(),
                "return_tokens": [token[at] for at in step.past[s, :n]],
                "return_ages": step.past_age[s, :n].tolist(),
                "candidates": candidates.tolist(),
            }


def order_of_life(store, user):
    """Event rows of a user in order of time; equal times in order of rows."""
    rows = np.arange(*store.rows_of(user).indices(store.n_events))
    return rows[np.lexsort((rows, store.event_time[rows]))]


def naive_samples(store, length, recent_length, until, along="context"):
    """The same by scanning: for each event, the user's earlier items of its category and of any."""
    found = []
    for user in range(store.n_users):
        order = order_of_life(store, user)
        for row in order:
            t, c = store.event_time[row], store.item_category[store.event_item[row]]
            if t > until:
                continue
            earlier = [int(store.event_item[r]) for r in order if store.event_time[r] < t]
            past = [i for i in earlier if along == "life" or store.item_category[i] == c]
            past = past[len(past) - min(length, len(past)) :]
            recent = earlier[::-1][:recent_length]
            found.append((int(c), int(store.event_item[row]), tuple(past), tuple(recent)))
    return sorted(found)


def facts(samples):
    return sorted((s["category"], s["target"], tuple(s["past"]), tuple(s["recent"])) for s in samples)


# -- what a sample looks back on


@pytest.mark.parametrize("switches", [{}, {"mixed": True}, LIFE], ids=["context", "mixed", "life"])
@pytest.mark.parametrize("length", [0, 1, 6])
def test_one_sample_a_row_is_the_definition(store, switches, length):
    sampling = Sampling(packed=False, **{**SMALL, **switches, "context_length": length})
    along = switches.get("along", "context")
    wanted = naive_samples(store, length, SMALL["recent_length"], store.last_time, along)
    assert facts(samples_of(store, sampling)) == wanted


@few_and_slow
@given(
    seed=st.integers(0, 10_000),
    overlap=st.integers(1, 5),
    length=st.integers(5, 9),
    switches=st.sampled_from([{}, {"mixed": True}, LIFE]),
)
def test_packed_pasts_are_strictly_earlier(tmp_path_factory, seed, overlap, length, switches):
    store = stored(random_log(seed, events=200, users=3, times=90), tmp_path_factory.mktemp("p") / "store")
    sampling = Sampling(context_length=length, recent_length=4, overlap=overlap, samples=30, **switches)
    truth = {}
    along = switches.get("along", "context")
    for c, target, past, recent in naive_samples(store, 10_000, 4, store.last_time, along):
        truth.setdefault((c, target, recent), []).append(past)
    n = 0
    for s in samples_of(store, sampling, seed=seed):
        n += 1
        # the past is an unbroken run of the true one, up to its very end: nothing later, nothing missing
        wanted = truth[s["category"], s["target"], tuple(s["recent"])]
        past = tuple(s["past"])
        assert any(past == full[len(full) - len(past) :] for full in wanted), (s, wanted)
        assert len(past) > 0 or () in wanted
        assert len(past) <= length
    assert n >= 0.7 * store.n_events  # samples are left out only for ties at the start of a row


@pytest.mark.parametrize("switches", [{}, LIFE], ids=["context", "life"])
def test_without_ties_packed_leaves_nothing_out(untied, switches):
    found = [s["target"] for s in samples_of(untied, Sampling(**SMALL, **switches))]
    assert sorted(found) == list(range(untied.n_items))
    short = [len(s["past"]) for s in samples_of(untied, Sampling(**SMALL, **switches))]
    # a row repeats `overlap` behaviors of the one before it, so only the first of a line know fewer
    lines = untied.n_users if switches else len(untied.group_category)
    assert sum(n < SMALL["overlap"] for n in short) == lines * SMALL["overlap"]


@pytest.mark.parametrize("switches", [{}, LIFE], ids=["context", "life"])
def test_a_later_event_never_changes_an_earlier_sample(store, switches):
    until = int(np.median(store.event_time))
    early = list(samples_of(store, Sampling(packed=False, **SMALL, **switches), until))
    assert 0 < len(early) < store.n_events
    wanted = naive_samples(store, 6, 4, until, switches.get("along", "context"))
    assert facts(early) == wanted


def test_a_life_cannot_be_cut_by_category():
    with pytest.raises(InputError, match=r"along='life' with mixed=False.*Pass mixed=True"):
        Sampling(along="life")


def test_categories_of_one_item_teach_only_where_others_compete(tmp_path):
    log = table([1] * 6, ["a", "b", "a", "c", "b", "a"], list("xyxxyx"), [START + i for i in range(6)])
    store = stored(log, tmp_path / "store")
    of = {
        mixed: [s["target"] for s in samples_of(store, Sampling(**SMALL, mixed=mixed))]
        for mixed in (False, True)
    }
    single = store.item_number("b")
    assert len(of[True]) == 6
    assert sorted(of[False]) == sorted(t for t in of[True] if t != single)


# -- only the user's last behaviors


def last_of_life(store, target, within):
    """Of the event of an item that occurs once: the user's last behaviors strictly earlier, oldest first."""
    row = int(np.flatnonzero(store.event_item == target)[0])
    group = np.searchsorted(store.group_start, row, side="right") - 1
    order = order_of_life(store, np.searchsorted(store.user_group, group, side="right") - 1)
    earlier = store.event_item[[r for r in order if store.event_time[r] < store.event_time[row]]].tolist()
    return earlier[len(earlier) - min(within, len(earlier)) :]


@few_and_slow
@given(
    seed=st.integers(0, 10_000),
    within=st.integers(1, 30),
    packed=st.booleans(),
    switches=st.sampled_from([{}, {"mixed": True}, LIFE]),
    distance=st.sampled_from([0.0, 0.7]),
)
def test_nobody_looks_further_back_than_within(tmp_path_factory, seed, within, packed, switches, distance):
    """Of any moment of asking, which is never later than the target."""
    store = stored(once_log(seed), tmp_path_factory.mktemp("w") / "store")
    found = list(
        samples_of(store, Sampling(packed, within=within, distance=distance, **SMALL, **switches), seed=seed)
    )
    assert len(found) == store.n_events, "nothing near enough is a past as well"
    for s in found:
        if distance == 0:
            allowed = last_of_life(store, s["target"], within)
            assert set(s["past"]) | set(s["recent"]) <= set(allowed)
            assert s["recent"] == allowed[::-1][: SMALL["recent_length"]]
        else:
            assert any(
                set(s["past"]) | set(s["recent"]) <= set(last_of_life(store, asked, within))
                for asked in line_up_to(store, s["target"], switches)
            )


@pytest.mark.parametrize("switches", [{}, LIFE], ids=["context", "life"])
@pytest.mark.parametrize("within", [1, 7, 20, 10_000])
def test_what_is_near_enough_is_looked_at(untied, within, switches):
    """All of it where each sample has a row; packed, at least the nearer half."""
    for packed in (False, True):
        sampling = Sampling(packed, within=within, **{**SMALL, "context_length": 300}, **switches)
        for s in samples_of(untied, sampling):
            whole, near = (
                [
                    i
                    for i in last_of_life(untied, s["target"], n)
                    if switches or untied.item_category[i] == s["category"]
                ]
                for n in (within, within - max(1, within // 2) + 1)
            )
            if packed:
                assert s["past"] == whole[len(whole) - len(s["past"]) :]
                assert len(s["past"]) >= len(near)
            else:
                assert s["past"] == whole


# -- the same in training and in serving


@pytest.mark.parametrize("within", [None, 12])
@pytest.mark.parametrize(("length", "newest", "older"), [(6, 4, 0), (3, 5, 7), (50, 0, 0)])
def test_a_sample_knows_what_a_request_at_its_moment_knows(once, untied, within, length, newest, older):
    """Of a log without ties all of it; where times tie, a life of the last behaviors may begin earlier."""
    for store in (untied,) if within else (untied, once):
        sampling = Sampling(
            False,
            within=within,
            context_length=length,
            recent_length=newest + older,
            life_sample=older,
            samples=40,
        )
        row_of = np.argsort(store.event_item)
        group_of = np.searchsorted(store.group_start, row_of, side="right") - 1
        for s in samples_of(store, sampling):
            row = row_of[s["target"]]
            user = int(np.searchsorted(store.user_group, group_of[s["target"]], side="right") - 1)
            life = store.life(user, float(store.event_time[row])).lately(within)
            assert s["past"] == life.in_context(s["category"], length).item.tolist()
            assert s["recent"] == life.sampled(newest, older).item[::-1].tolist()


# -- asked some events earlier


def line_up_to(store, target, switches):
    """Items of the line of a sample (its user's category, or life) in its order, the target the last."""
    row = int(np.flatnonzero(store.event_item == target)[0])
    group = np.searchsorted(store.group_start, row, side="right") - 1
    order = order_of_life(store, np.searchsorted(store.user_group, group, side="right") - 1)
    return [
        int(store.event_item[r])
        for r in order[: order.tolist().index(row) + 1]
        if "along" in switches or store.item_category[store.event_item[r]] == store.item_category[target]
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("switches", [{}, LIFE], ids=["context", "life"])
def test_a_sample_asked_earlier_knows_only_what_was_before_that(once, packed, switches):
    time = dict(zip(once.event_item.tolist(), once.event_time.tolist(), strict=True))
    sampling = Sampling(packed, distance=0.6, returns=True, **SMALL, **switches)
    before = Sampling(packed, **SMALL, **switches)
    just_before = {s["target"]: s for s in samples_of(once, before)}
    life_before = {item: last_of_life(once, item, 10_000) for item in time}
    earlier = 0
    for s in samples_of(once, sampling):
        line = line_up_to(once, s["target"], switches)
        moments = []
        for asked in line:  # the events of the line up to the target: just before which may it have been?
            life = life_before[asked]
            known = [i for i in life if i in line]
            recent = life[::-1][: SMALL["recent_length"]]
            since = [
                age_class(np.array(time[asked] - time[past[-1]])) if past else 0
                for past in (known[-1:] if s["past"] else [], life)
            ]
            ages = [age_class(np.array(time[asked] - time[i])) for i in s["returns"]]
            past = known[len(known) - min(len(known), len(s["past"])) :]
            told = s["past"], s["recent"], s["since"], s["return_ages"]
            if told == (past, recent, since, ages):
                moments.append(time[asked])
                assert len(s["past"]) > 0 or not known
        assert moments, s
        earlier += s["target"] in just_before and s["recent"] != just_before[s["target"]]["recent"]
        for seen in s["past"] + s["recent"]:
            assert time[seen] < max(moments) <= time[s["target"]]
    assert 0.25 < earlier / once.n_events < 0.6  # the first of a line cannot be


# -- what a state knows, listed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("switches", [{}, {"mixed": True}, LIFE], ids=["context", "mixed", "life"])
@pytest.mark.parametrize("within", [None, 9])
def test_returns_list_what_the_state_knows_newest_first(once, packed, switches, within):
    time = dict(zip(once.event_item.tolist(), once.event_time.tolist(), strict=True))
    found = 0
    for s in samples_of(once, Sampling(packed, within=within, returns=True, **SMALL, **switches)):
        wanted = s["past"][::-1]
        assert s["returns"] == s["return_tokens"] == wanted
        now = time[s["target"]]
        assert s["return_ages"] == [age_class(np.array(now - time[i])) for i in wanted]
        life = last_of_life(once, s["target"], 1)
        newest = [age_class(np.array(now - time[p[-1]])) if p else 0 for p in (s["past"], life)]
        assert s["since"] == newest
        found += len(wanted)
    assert found > 1.5 * once.n_events


@pytest.mark.parametrize("packed", [False, True])
def test_what_pads_a_list_is_an_item_of_the_step(many, packed):
    """Also where few items compete, so that those of the moment asked are not among them."""
    small = {**SMALL, "samples": 8, "whole_up_to": 5, "sampled_negatives": 1}
    sampling = Sampling(packed, returns=True, distance=0.9, **small)
    batches = Batches(many, sampling, many.last_time)
    batches._position[:] = np.iinfo(np.int32).max  # as memory may be that nobody has written
    for plan in batches.epoch(0, 0):
        (step,) = batches.assemble(plan, np.random.default_rng(0))
        assert ((step.past_item >= 0) & (step.past_item < len(step.numbers))).all()


def test_without_returns_nothing_is_listed(once):
    batches = Batches(once, Sampling(**SMALL), once.last_time)
    for plan in batches.epoch(0, 0):
        (step,) = batches.assemble(plan, np.random.default_rng(0))
        assert step.past.shape == step.past_item.shape == step.past_age.shape == (step.samples, 0)


# -- rivals


def test_rivals_are_the_whole_category_when_it_fits(store):
    for s in samples_of(store, Sampling(**SMALL)):
        assert s["candidates"] == list(range(*store.category_start[s["category"] : s["category"] + 2]))


def test_mixed_rivals_are_all_items_when_they_fit(store):
    for s in samples_of(store, Sampling(**SMALL, mixed=True)):
        assert s["candidates"] == list(range(store.n_items))


@pytest.mark.parametrize("switches", [{}, {"mixed": True}, LIFE], ids=["context", "mixed", "life"])
def test_many_items_compete_by_sample_with_log_q(many, switches):
    store = many
    sampling = Sampling(**SMALL, **switches, whole_up_to=20, sampled_negatives=2)
    until = int(np.quantile(store.event_time, 0.7))
    batches = Batches(store, sampling, until)
    count = np.bincount(store.event_item[store.event_time <= until], minlength=store.n_items)
    for parts in (1, 3):
        for step in batches.assemble(next(batches.epoch(0, 0)), np.random.default_rng(0), parts):
            if sampling.mixed:
                assert len(step.contests) == 1, "all targets of a part compete"
                assert step.contests[0].samples == slice(0, step.samples)
            for c in step.contests:
                candidates = step.numbers[c.candidate]
                assert len(set(candidates)) == len(candidates), "drawn twice, it would be its own rival"
                category = int(step.category[c.samples.start])
                low, high = store.category_start[category : category + 2]
                if sampling.mixed:
                    low, high = 0, store.n_items
                assert ((low <= candidates) & (candidates < high)).all()
                n = c.samples.stop - c.samples.start
                assert set(step.numbers[step.target[c.samples]]) <= set(candidates)
                assert len(candidates) <= n + 2
                expected = n * count[candidates] / count[low:high].sum() + 2 / (high - low)
                np.testing.assert_allclose(c.log_q, np.log(1 - np.exp(-expected)), rtol=1e-4)


@pytest.mark.parametrize("mixed", [False, True])
def test_log_q_is_how_often_an_item_competes(tmp_path, mixed):
    """Counted: over many draws of as many events of the category, or of all, and of negatives."""
    log = random_log(3, events=500, items=80)
    popular = np.minimum(log["item_id"].to_numpy(), np.random.default_rng(1).integers(0, 80, 500))
    log = log.set_column(1, "item_id", [popular]).set_column(2, "category_id", [popular % 4])
    store = stored(log, tmp_path / "store")
    sampling = Sampling(**SMALL, mixed=mixed, whole_up_to=5, sampled_negatives=6)
    batches = Batches(store, sampling, store.last_time)
    (step,) = batches.assemble(next(batches.epoch(0, 0)), np.random.default_rng(0))
    rng = np.random.default_rng(0)
    for c in step.contests:
        category = int(step.category[c.samples.start])
        low, high = (0, store.n_items) if mixed else store.category_start[category : category + 2]
        events = store.event_item[(store.event_item >= low) & (store.event_item < high)]
        n, often = c.samples.stop - c.samples.start, np.zeros(store.n_items)
        for _ in range(4000):
            drawn = rng.choice(events, n), rng.integers(low, high, sampling.sampled_negatives)
            often[np.unique(np.concatenate(drawn))] += 1 / 4000
        # a target or a negative, drawn with replacement: 0.01 of luck, the rest that draws are not one by one
        np.testing.assert_allclose(np.exp(c.log_q), often[step.numbers[c.candidate]], atol=0.04)


# -- the order of an epoch


@pytest.mark.parametrize("switches", [{}, LIFE], ids=["context", "life"])
def test_epochs_differ_and_seeds_repeat(store, switches):
    batches = Batches(store, Sampling(**SMALL, **switches), store.last_time)

    def order(seed, epoch):
        return [rows.first.tolist() for step in batches.epoch(seed, epoch) for rows in step]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "switches",
    [{}, {"mixed": True}, LIFE, {"within": 12}, {**LIFE, "within": 12}],
    ids=["context", "mixed", "life", "within", "life within"],
)
def test_validation_is_later_and_as_large_as_asked(once, packed, switches):
    sampling = Sampling(packed, **SMALL, **switches)
    batches = Batches(once, sampling, once.last_time)
    when = int(np.quantile(once.event_time, 0.7))
    time = dict(zip(once.event_item.tolist(), once.event_time.tolist(), strict=True))
    plans = batches.after(when, 30, np.random.default_rng(0))
    assert 30 <= sum(int(rows.samples.sum()) for plan in plans for rows in plan) <= 30 + 6
    found = []
    for plan in plans:
        for step in batches.assemble(plan, np.random.default_rng(0)):
            found += samples_in(once, sampling, step)
    assert len({s["target"] for s in found}) == len(found) >= 20
    for s in found:
        assert time[s["target"]] > when
        past = [
            i
            for i in last_of_life(once, s["target"], switches.get("within", 10_000))
            if "along" in switches or once.item_category[i] == s["category"]
        ]
        assert s["past"] == past[len(past) - len(s["past"]) :]
        assert len(s["past"]) >= min(len(past), 1) or "within" in switches


@settings(max_examples=60, deadline=None)
@given(
    pushes=st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9)), max_size=8), max_size=10),
    full=st.integers(1, 20),
    wait=st.integers(1, 60),
)
def test_the_cache_loses_nothing_and_starves_no_one(pushes, full, wait):
    cache = CategoryCache(full, wait)
    arrived, seen, released, at = {}, 0, [], 0
    most = max((sum(s for _, s in push) for push in pushes), default=0)  # a push is looked at as a whole
    for push in pushes:
        n = np.array([s for _, s in push], dtype=np.int64)
        first = at + np.cumsum(n) - n
        rows = Rows(np.zeros(len(push), np.int64), first, first, first + n)
        for (c, size), f in zip(push, first, strict=True):
            arrived[int(f)] = (c, size)
        at += int(n.sum())
        released += cache.add(np.array([c for c, _ in push], dtype=np.int64), rows)
        seen += int(n.sum())
        out = {int(f) for _, r in released for f in r.first}
        for f in arrived.keys() - out:
            assert seen - f <= wait + most, "a row has waited too long"
    released += cache.flush()
    assert sorted(int(f) for _, r in released for f in r.first) == sorted(arrived)
    for category, rows in released:
        assert {arrived[int(f)][0] for f in rows.first} == {category}


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=6), st.integers(0, 10))
def test_bisection_of_many_ranges(parts, when):
    time = np.array([t for part in parts for t in sorted(part)] or [0])
    ends = np.cumsum([len(p) for p in parts])
    low = ends - [len(p) for p in parts]
    got = first_not_before(time, low, ends, np.full(len(parts), when))
    assert got.tolist() == [lo + sum(t < when for t in p) for lo, p in zip(low, parts, strict=True)]


@pytest.mark.parametrize("switches", [{}, {"mixed": True}, LIFE], ids=["context", "mixed", "life"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_hold_the_samples_of_the_whole(store, parts, switches):
    sampling = Sampling(**SMALL, **switches, returns=True)
    batches = Batches(store, sampling, store.last_time)
    for plan in batches.epoch(0, 0):
        whole = batches.assemble(plan, np.random.default_rng(0))
        found = batches.assemble(plan, np.random.default_rng(0), parts)
        assert len(found) <= parts
        assert np.array_equal(np.unique(np.concatenate([p.numbers for p in found])), whole[0].numbers)

        def samples(steps):
            plain = (s for step in steps for s in samples_in(store, sampling, step))
            return sorted(str({k: v for k, v in s.items() if k != "candidates"}) for s in plain)

        assert samples(found) == samples(whole)


@pytest.mark.parametrize("kind", [{}, LIFE, {"packed": False}], ids=str)
def test_of_heavy_users_an_epoch_has_some_samples(tmp_path, kind):
    user = [0] * 600 + [1] * 20
    log = table(
        user, [i % 7 for i in range(620)], [i % 2 for i in range(620)], [START + i for i in range(620)]
    )
    store = stored(log, tmp_path / "store")
    batches = Batches(store, Sampling(**SMALL, **kind, most=60), store.last_time)
    assert batches.n_samples == 60 + 20
    drawn = np.zeros(2, int)
    for epoch in range(30):
        for step in batches.epoch(0, epoch):
            for rows in step:
                drawn += np.bincount(
                    batches.lines.user[rows.group], weights=rows.samples, minlength=2
                ).astype(int)
    assert drawn[1] == 20 * 30
    assert 0.7 * 60 < drawn[0] / 30 < 1.3 * 60
    assert list(map(repr, batches.epoch(1, 2))) == list(map(repr, batches.epoch(1, 2)))
    held_out = batches.after(START + 100, 10_000, np.random.default_rng(0))
    assert sum(int(rows.samples.sum()) for step in held_out for rows in step) < 150
