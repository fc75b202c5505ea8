"""Two encoders: against slow references, in ONNX, blind to what comes later, and right in tiny worlds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from longretriever.errors import InputError
from longretriever.index import CORPUS, ExactIndex
from longretriever.model.baselines.ulim import (
    SelfAttention,
    TargetAttention,
    Ulim,
    UlimConfig,
    _above_even,
    log_meeting,
)
from longretriever.model.exported import Model, Request
from longretriever.model.train import train
from longretriever.retrieve.interests import Top
from longretriever.retrieve.retriever import Retriever
from tests.worlds import DAY, START, parity_log, random_log, stored, table

TINY = UlimConfig(
    dim=16,
    context_length=8,
    recent_length=6,
    step_samples=100,
    epochs=3,
    dropout=0.1,
    interests=None,
    warm_start=False,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    users = pa.table({"user_id": list(range(8)), "sex": list("fmfmfmfm")})
    return stored(random_log(7), tmp_path_factory.mktemp("ulim") / "store", users=users)


def learner(store, config, spread=0.3):
    """Weights far from the start, where all vectors are alike."""
    torch.manual_seed(0)
    made = config.learner(store).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return made


def steps(made, store, parts=1):
    batches = made.batches(store.last_time)
    for plan in batches.epoch(0, 0):
        yield from batches.assemble(plan, np.random.default_rng(0), parts)


# -- the encoders against the formula


@torch.no_grad()
def test_self_attention_and_mean_are_the_formula_token_by_token():
    torch.manual_seed(1)
    dim, heads, width = 8, 2, 4
    fast = SelfAttention(dim, heads, 6)
    token = torch.randn(3, 5, dim)
    count = torch.tensor([5, 2, 0])
    found = fast(token, fast.query_key(token), count)
    for row, n in enumerate(count.tolist()):
        x = token[row, :n] + fast.position[:n]
        out = []
        for i in range(n):
            heard = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                q = (x[i] @ fast.query_key.weight[:dim].T)[part]
                k = (x @ fast.query_key.weight[dim:].T)[:, part]
                v = (x @ fast.value.weight.T)[:, part]
                heard.append((k @ q / width**0.5).softmax(0) @ v)
            out.append(x[i] + fast.out(torch.cat(heard)))
        expected = torch.stack(out).mean(0) if n else torch.zeros(dim)
        torch.testing.assert_close(found[row], expected)


@torch.no_grad()
def test_target_attention_is_the_formula_head_by_head():
    torch.manual_seed(2)
    dim, heads, width = 8, 2, 4
    fast = TargetAttention(dim, heads, 6)
    query, token, count = torch.randn(3, dim), torch.randn(3, 5, dim), torch.tensor([5, 1, 0])
    found = fast(query, token, count)
    for row, n in enumerate(count.tolist()):
        x = token[row, :n] + fast.position[:n]
        heard = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            q, k, v = fast.query(query[row])[part], fast.key(x)[:, part], fast.value(x)[:, part]
            heard.append((k @ q / width**0.5).softmax(0) @ v)
        expected = fast.out(torch.cat(heard)) if n else torch.zeros(dim)
        torch.testing.assert_close(found[row], expected)


def alone(made: Ulim, token_Id: torch.Tensor, store, event: int, whole: bool) -> torch.Tensor:
    """The vector of one sample, from the log: what the user did strictly before the event."""
    group = np.searchsorted(store.group_start, event, side="right") - 1
    user = np.searchsorted(store.user_group, group, side="right") - 1
    now, c = store.event_time[event], made.config
    rows = np.arange(store.group_start[store.user_group[user]], store.group_start[store.user_group[user + 1]])
    rows = rows[store.event_time[rows] < now]
    life = rows[np.argsort(store.time_position[rows])]
    category = store.item_category[store.event_item[event]]
    met = life[store.item_category[store.event_item[life]] == category][-c.context_length :]
    recent = life[-c.recent_length :][::-1]
    R, N = len(recent), len(met)
    padded = np.r_[met, np.zeros(c.context_length - N, int)]
    return made.user(
        token_Id[store.event_item[padded]][None],
        torch.from_numpy(store.event_behavior[padded].astype(np.int64))[None],
        torch.tensor([N]),
        torch.from_numpy(store.profile[user].astype(np.int64))[None],
        F.pad(token_Id[store.event_item[recent]], (0, 0, 0, c.recent_length - R))[None],
        torch.tensor([R]),
        torch.tensor([whole]),
    )[0]


@pytest.mark.parametrize("attention", ["target", "self"])
@torch.no_grad()
def test_a_batch_gives_the_vectors_of_its_samples_alone(store, attention):
    """So nothing at or after the time of an event enters its vectors: the slow path reads what is earlier."""
    made = learner(store, replace(TINY, attention=attention))
    row_Id = torch.randn(store.n_items, TINY.dim, generator=torch.Generator().manual_seed(3))
    category = torch.from_numpy(store.item_category).long()
    token_Id = made.item.embed(row_Id, category, torch.from_numpy(np.array(store.item_feature)).long())
    batches = made.batches(store.last_time)
    plan = next(batches.epoch(0, 0))
    (step,) = batches.assemble(plan, np.random.default_rng(0))
    events = _events(batches, plan)
    long_Sd, short_Sd, _ = made(row_Id[torch.from_numpy(step.numbers)], step)
    assert len(events) == step.samples > 90
    for s in range(0, step.samples, 3):
        for found, whole in ((long_Sd, False), (short_Sd, True)):
            expected = alone(made, token_Id, store, events[s], whole)
            torch.testing.assert_close(found[s], expected, atol=1e-5, rtol=1e-4)


def _events(batches, plan):
    """Event rows of a step's samples, in their order."""
    from longretriever.model.batches import concatenate

    return batches._draft(concatenate(plan), np.random.default_rng(0)).events


# -- the objective


def test_a_step_mingles_contests_of_one_category_each(store):
    made = learner(store, TINY)
    step = next(steps(made, store))
    assert len(step.contests) == store.n_categories
    place, log_q = made._competing(step)
    category = store.item_category[step.numbers[place]]
    assert (np.diff(place) > 0).all()
    np.testing.assert_allclose(log_q, made.log_meets[category])
    for contest in step.contests:
        (c,) = set(step.category[contest.samples].tolist())
        assert (store.item_category[step.numbers[contest.candidate]] == c).all()


@torch.no_grad()
def test_the_loss_is_both_softmaxes_by_hand(store):
    config = replace(TINY, long_weight=0.3, short_weight=0.9)
    made = learner(store, config)
    step = next(steps(made, store))
    rows_Ud = torch.randn(len(step.numbers), config.dim, generator=torch.Generator().manual_seed(3))
    long_Sd, short_Sd, item_Ud = made(rows_Ud, step)
    place, log_q = made._competing(step)
    expected = 0.0
    for contest in step.contests:
        for s in range(contest.samples.start, contest.samples.stop):
            target = int(step.target[s])
            mine = torch.arange(len(item_Ud))[contest.candidate]
            logit = made.item.scale * item_Ud[mine] @ long_Sd[s]
            expected += 0.3 * F.cross_entropy(logit[None], (mine == target).nonzero()[0])
            at = (place == target).nonzero()[0]
            logit = made.corpus_scale * item_Ud[place] @ short_Sd[s] - log_q
            above_even = F.cross_entropy(logit[None], at) - F.cross_entropy(-log_q[None], at)
            expected += 0.9 * (above_even + np.log(len(mine)))
    torch.testing.assert_close(made.loss(rows_Ud, step), expected / 1.2, atol=1e-3, rtol=1e-4)


def test_a_drawn_target_competes_once():
    own, q = torch.tensor([2.0]), torch.tensor([-1.0])
    rival, log_q = torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([-1.0, -2.0, -0.5])
    drawn = _above_even(own, rival, q, log_q, torch.tensor([[True, False, False]]))
    beside = _above_even(own, rival[:, 1:], q, log_q[1:], torch.zeros(1, 2, dtype=torch.bool))
    torch.testing.assert_close(drawn, beside)
    even = torch.zeros(1, 3)
    none = _above_even(torch.zeros(1), even, q, log_q, torch.tensor([[True, False, False]]))
    torch.testing.assert_close(none, torch.zeros(1))


@torch.no_grad()
def test_fewer_negatives_are_an_even_draw_of_all(store):
    """Log-q included: drawn often enough, exp(-gain) agrees in the mean with that of all."""
    step = next(steps(learner(store, TINY), store))
    rows_Ud = torch.randn(len(step.numbers), TINY.dim, generator=torch.Generator().manual_seed(3))
    few = learner(store, replace(TINY, corpus_negatives=6), spread=0.2)
    few.batches(store.last_time)
    _, short_Sd, item_Ud = few(rows_Ud, step)
    gains = torch.stack(
        [few._gain(short_Sd, item_Ud, step, torch.Generator().manual_seed(n)) for n in range(300)]
    )
    few.config = TINY
    exact = few._gain(short_Sd, item_Ud, step, None)
    assert gains.std(0).min() > 0.01
    assert np.corrcoef(gains.mean(0), exact)[0, 1] > 0.98


def test_how_likely_a_category_is_in_a_step(tmp_path):
    """Against how often it is, in categories of very different size."""
    rng = np.random.default_rng(0)
    category = np.minimum(rng.geometric(0.35, 6000) - 1, 11)
    log = table(
        rng.integers(0, 300, 6000), category * 5 + rng.integers(0, 5, 6000), category, START + np.arange(6000)
    )
    store = stored(log, tmp_path / "store")
    config = replace(TINY, step_samples=60, parts=2)
    made = config.learner(store)
    batches = made.batches(store.last_time)
    found = np.zeros(store.n_categories)
    parts = 0
    for epoch in range(3):
        for plan in batches.epoch(0, epoch):
            for step in batches.assemble(plan, np.random.default_rng(0), 2):
                found[np.unique(step.category)] += 1
                parts += 1
    expected = np.exp(log_meeting(batches, 2))
    assert found.min() > 5
    assert expected.min() < 0.15 < 0.99 < expected.max()
    np.testing.assert_allclose(found / parts, expected, rtol=0.25)


# -- saved and served


def requests(model, store):
    out = []
    for user in range(store.n_users):
        life = store.life(user)
        recent, profile = life.recent(model.recent_length), life.profile()
        for category in range(store.n_categories):
            met = life.in_context(category, model.context_length)
            out.append(Request(category, met, recent, profile, life.now))
        out.append(Request(CORPUS, recent, recent, profile, life.now))
        nothing = recent.pick(np.zeros(0, int))
        out += [Request(c, nothing, recent, profile, life.now) for c in (0, CORPUS)]
    return out


@pytest.mark.parametrize("attention", ["target", "self"])
def test_onnx_says_what_torch_says(store, tmp_path, attention):
    config = replace(TINY, attention=attention, epochs=1)
    train(store, tmp_path / "model", config, threads=1)
    model = Model.open(tmp_path / "model")
    assert (model.asks_contexts, model.asks_corpus, model.method) == (True, True, "ulim")
    assert (model.context_length, model.recent_length) == (8, 6)
    assert model.manifest.facts["corpus_scale"] > 0
    asked = requests(model, store)
    found = model.user_vectors(asked)
    assert found.user.shape == (len(asked), 1, 16)
    assert (found.interests == 1).all()
    made = config.learner(store).eval()
    made.load_state_dict(load_file(tmp_path / "model" / "weights.safetensors"))
    feed = model._feed(asked)
    names = ("behavior", "kind", "length", "profile", "recent", "recent_count", "whole")
    with torch.no_grad():
        expected = made.user(*(torch.from_numpy(feed[name]) for name in names))
    np.testing.assert_allclose(found.user[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found.user[:, 0], axis=1), 1, atol=1e-5)
    n = len(asked) // store.n_users  # of one user: the whole twice, whatever its behaviors of a context
    np.testing.assert_allclose(found.user[n - 3], found.user[n - 1], atol=1e-6)
    assert not np.allclose(found.user[n - 3], found.user[n - 2], atol=1e-3)


# -- worlds with a known answer


def right(answer, store, life):
    """How many of the first 6 items of each context are of the parity that the user likes there."""
    shares = []
    for nth, category in enumerate(answer.asked_categories):
        if category != CORPUS:
            found = answer._asked[nth].answer.item[:6]
            liked = store.event_item[store.in_context(life.user, int(category), limit=1)][0] % 2
            shares.append((found % 2 == liked).mean())
    return shares


def answers(path, store, users):
    model = Model.open(path)
    index = ExactIndex(model.item_vectors(slice(None)), model.category_start)
    retriever = Retriever(model, index, store, interests=Top(3))
    for user in users:
        life = store.life(user)
        yield life, retriever.answer([life], k=36)[0]


@pytest.mark.parametrize("attention", ["target", "self"])
def test_long_vectors_tell_what_only_the_context_tells(tmp_path, attention):
    store = stored(parity_log(users=40), tmp_path / "store")
    config = replace(TINY, epochs=8, row_lr=0.2, attention=attention)
    train(store, tmp_path / "model", config, threads=1)
    found = answers(tmp_path / "model", store, range(0, 40, 2))
    assert np.mean([share for life, answer in found for share in right(answer, store, life)]) > 0.95


def visits_log(users=80, items=10, visits=16):
    """Each user visits one of four families of three categories, any item of them."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(users), visits)
    category = 3 * (user % 4) + rng.integers(0, 3, len(user))
    item = category * items + rng.integers(0, items, len(user))
    time = START + np.tile(np.arange(visits), users) * DAY + user
    return table(user, item, category, time)


def test_the_short_vector_ranks_across_categories(tmp_path):
    """Of all items, those of the user's three categories come first: 30 of 120."""
    store = stored(visits_log(), tmp_path / "store")
    train(store, tmp_path / "model", replace(TINY, epochs=10, row_lr=0.1), threads=1)
    mine = []
    for life, answer in answers(tmp_path / "model", store, range(0, 80, 5)):
        (whole,) = [a.answer for a in answer._asked if a.request.category == CORPUS]
        mine.append((store.item_category[whole.item[:20]] // 3 == life.user % 4).mean())
    assert np.mean(mine) > 0.97  # chance is 0.25


def test_wrong_settings_are_refused():
    for wrong, match in (
        ({"attention": "none"}, "attention='none'"),
        ({"heads": 3}, "heads=3"),
        ({"recent_length": 0}, "recent_length=0"),
        ({"within": 0}, "within=0"),
        ({"long_weight": 0.0, "short_weight": 0.0}, "one of them above 0"),
    ):
        with pytest.raises(InputError, match=match):
            replace(TINY, **wrong)
