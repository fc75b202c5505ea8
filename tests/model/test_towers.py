"""The same weights give the same user vector and shares: packed, one sample a row, and in ONNX."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from longretriever.model.age import AGES
from longretriever.model.config import TrainConfig
from longretriever.model.learner import ItemRows, drop
from longretriever.model.loss import log_likelihood
from longretriever.model.towers import LongRetriever, export_user_tower, mixture
from tests.worlds import random_log, stored

CONFIG = TrainConfig(
    dim=16,
    context_length=6,
    recent_length=4,
    overlap=2,
    step_samples=60,
    dropout=0.0,
    distance=0.0,
    warm_start=False,
    whole=None,
)
OPTIONS = {
    "all": {},
    "no returns": {"returns": False},
    "no ages": {"ages": False},
    "no recent": {"recent_length": 0},
    "returns alone": {"ages": False, "recent_length": 0},
    "none": {"ages": False, "recent_length": 0, "returns": False},
    "mixed": {"mixed": True},
    "within": {"within": 9},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
each_encoder = pytest.mark.parametrize("encoder", ["packed", "cls"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    users = pa.table({"user_id": list(range(8)), "sex": list("fmfmfmfm")})
    return stored(random_log(7), tmp_path_factory.mktemp("towers") / "store", users=users)


@pytest.fixture(scope="module")
def featured(tmp_path_factory):
    items = pa.table({"item_id": list(range(20)), "brand": [f"b{(i * 7) % 5}" for i in range(20)]})
    return stored(random_log(7), tmp_path_factory.mktemp("featured") / "store", items=items)


def learner_of(store, config):
    """A method with random weights, its item rows, and the first steps of an epoch."""
    torch.manual_seed(0)
    learner = LongRetriever(store, config).eval()
    for parameter in learner.parameters():  # far from the start, where all vectors are alike
        torch.nn.init.normal_(parameter, std=0.3)
    rows = ItemRows(torch.randn(store.n_items, config.dim) * 0.05, 0.1)
    batches = learner.batches(store.last_time)
    plans = islice(batches.epoch(0, 0), 2)
    steps = [batches.assemble(plan, np.random.default_rng(0))[0] for plan in plans]
    assert sum(step.samples for step in steps) > 100
    return learner, rows, steps


def alone(learner, rows, step):
    """What the user tower says to each sample, each computed by itself from its own past."""
    store, config, user = learner.store, learner.config, learner.user
    category = torch.from_numpy(store.item_category).long()
    feature = torch.from_numpy(np.array(store.item_feature)).long()
    token = learner.item.embed(rows.weight, category, feature)
    numbers = torch.from_numpy(step.numbers)
    places = [
        (b, i, t)
        for b in step.buckets
        for i in range(len(b.length))
        for t in range(user.prefix + b.item.shape[1])
    ]
    out = []
    for s in range(step.samples):
        bucket, row, slot = places[step.state[s]]
        known = slot - user.prefix + 1 if config.encoder == "packed" else int(bucket.length[row])
        past = numbers[torch.from_numpy(bucket.item[row, :known]).long()]
        age = step.past_age[s, :known][::-1].copy() if config.returns else np.zeros(known, np.int64)
        out.append(
            user(
                token[past][None],
                torch.from_numpy(bucket.kind[row : row + 1, :known]),
                torch.from_numpy(age)[None],
                torch.tensor([known]),
                torch.from_numpy(bucket.profile[row : row + 1]),
                learner.item.category(torch.tensor([step.category[s]])),
                torch.from_numpy(step.since[s : s + 1]),
                token[numbers[torch.from_numpy(step.recent[s]).long()]][None],
                torch.tensor([step.recent_count[s]]),
            )
        )
    return out


@each_encoder
@every_option
@torch.no_grad()
def test_a_batch_says_of_each_sample_what_it_says_of_it_alone(store, encoder, options):
    learner, rows, steps = learner_of(store, replace(CONFIG, encoder=encoder, **options))
    for step in steps:
        together = learner(rows.weight[torch.from_numpy(step.numbers)], step)
        by_itself = alone(learner, rows, step)
        wanted = torch.cat([one[0] for one in by_itself])
        torch.testing.assert_close(together.user, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.user.norm(dim=1), torch.ones(step.samples))
        torch.testing.assert_close(together.item.norm(dim=1), torch.ones(len(step.numbers)))
        if not learner.config.returns:
            assert together.shares is None
            assert all(len(one) == 1 for one in by_itself)
            continue
        torch.testing.assert_close(together.shares.exp().sum(1), torch.ones(step.samples))
        for s, (_, shares) in enumerate(by_itself):
            n = int(step.past_count[s])
            assert shares.shape == (1, 1 + n)
            torch.testing.assert_close(shares.exp().sum(), torch.tensor(1.0))
            newest_first = torch.cat([shares[0, :1], shares[0, 1:].flip(0)])
            torch.testing.assert_close(together.shares[s, : 1 + n], newest_first, atol=1e-4, rtol=1e-4)
            assert (together.shares[s, 1 + n :] < -1000).all(), "nothing for what it does not know"


@torch.no_grad()
def test_shares_depend_on_what_it_is_how_many_and_how_long_ago(store):
    learner, _, _ = learner_of(store, CONFIG)
    pointer, hidden, key = learner.user.pointer, torch.randn(1, 16), torch.randn(1, 3, 16)
    known, back, age = torch.tensor([[True] * 3]), torch.tensor([[0, 1, 2]]), torch.tensor([[1, 2, 3]])

    def shares(key=key, back=back, age=age, known=known, hidden=hidden):
        return pointer(hidden, key, back, age, known)[0].exp()

    usual = shares()
    for other in (
        shares(key=key.flip(1)),
        shares(back=back + 1),
        shares(age=age + 1),
        shares(hidden=-hidden),
    ):
        assert (usual - other).abs().max() > 1e-3
    unknown = shares(known=torch.tensor([[True, False, True]]))
    assert unknown[2] == 0
    torch.testing.assert_close(unknown[[0, 1, 3]], usual[[0, 1, 3]] / usual[[0, 1, 3]].sum())
    assert shares(known=~known).tolist() == [1, 0, 0, 0], "whoever met nothing is found by vectors"


def test_a_mixture_is_a_sum_of_probabilities():
    generator = torch.Generator().manual_seed(0)
    explored = torch.randn(30, generator=generator) - 5
    shares = torch.randn(30, 5, generator=generator).log_softmax(-1).requires_grad_()
    same = torch.rand(30, 4, generator=generator) < 0.3
    same[:3] = False
    p = shares.exp()
    plain = p[:, 0] * explored.exp() + (p[:, 1:] * same).sum(1)
    found = mixture(explored, shares, same)
    torch.testing.assert_close(found, plain.log())
    torch.testing.assert_close(found[:3], shares[:3, 0] + explored[:3])
    found.sum().backward()
    assert shares.grad.isfinite().all()
    assert (shares.grad[:, 1:][~same] == 0).all()


@each_encoder
@torch.no_grad()
def test_the_loss_is_that_of_the_mixture_and_in_training_of_the_vectors_too(store, encoder):
    learner, rows, (step, _) = learner_of(store, replace(CONFIG, encoder=encoder, explore_weight=0.3))
    weight = rows.weight[torch.from_numpy(step.numbers)]
    user, item, shares = learner(weight, step)
    explored = log_likelihood(user, item, learner.item.scale, step)
    place = [  # item numbers of the behaviors that each sample knows
        step.numbers[step.past_item[s, : step.past_count[s]]].tolist() for s in range(step.samples)
    ]
    probability = shares.exp()
    mixed, again = [], 0
    for s, past in enumerate(place):
        p = probability[s, 0] * explored[s].exp()
        for back, met in enumerate(past):
            if met == step.numbers[step.target[s]]:
                p, again = p + probability[s, 1 + back], again + 1
        mixed.append(p.log())
    assert again > 10
    mixed = torch.stack(mixed)
    torch.testing.assert_close(learner.loss(weight, step), -mixed.sum())
    training = learner.loss(weight, step, torch.Generator())
    torch.testing.assert_close(training, -(mixed.sum() + 0.3 * explored.sum()) / 1.3)


def test_held_out_samples_are_asked_just_before(store):
    learner = LongRetriever(store, replace(CONFIG, distance=0.4, within=9))
    asked, held_out = (learner.batches(store.last_time, h).sampling for h in (False, True))
    assert asked == learner.config.sampling(store.n_events)
    assert held_out == replace(asked, distance=0.0) != asked


def test_without_returns_the_loss_is_that_of_the_vectors(store):
    learner, rows, (step, _) = learner_of(store, replace(CONFIG, returns=False))
    weight = rows.weight[torch.from_numpy(step.numbers)]
    user, item, _ = learner(weight, step)
    wanted = -log_likelihood(user, item, learner.item.scale, step).sum()
    torch.testing.assert_close(learner.loss(weight, step), wanted)
    torch.testing.assert_close(learner.loss(weight, step, torch.Generator()), wanted)


@every_option
def test_gradients_are_finite_also_where_nothing_is_known(store, options):
    learner, rows, (step, _) = learner_of(store, replace(CONFIG, **options))
    if not options:
        assert (step.past_count == 0).any()
        assert (step.recent_count == 0).any()
    leaf = rows.gather(torch.from_numpy(step.numbers))
    learner.loss(leaf, step, torch.Generator()).backward()
    grads = {name: p.grad for name, p in learner.named_parameters()} | {"rows": leaf.grad}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert {name for name, g in grads.items() if g.abs().max() == 0} <= {"item.log_scale"}


@torch.no_grad()
def test_item_rows_are_left_out_only_where_there_are_features(store, featured):
    for world, share in ((store, 0.0), (featured, 0.5)):
        learner, rows, (step, _) = learner_of(world, replace(CONFIG, id_dropout=0.5))
        weight = rows.weight[torch.from_numpy(step.numbers)]
        whole, bare = learner.tokens(weight, step), learner.tokens(0 * weight, step)
        torch.testing.assert_close(whole, bare + weight)
        drawn = [learner.tokens(weight, step, torch.Generator().manual_seed(i)) for i in range(40)]
        absent = torch.stack([(one == bare).all(1) for one in drawn])
        present = torch.stack([(one == whole).all(1) for one in drawn])
        assert (absent ^ present).all()
        assert abs(absent.float().mean() - share) < 0.1
        assert torch.equal(learner.tokens(weight, step, torch.Generator().manual_seed(0)), drawn[0])


@torch.no_grad()
def test_a_packed_state_does_not_see_the_future(store):
    user = learner_of(store, CONFIG)[0].user
    behavior, kind = torch.randn(1, 5, 16), torch.zeros(1, 5, dtype=torch.long)
    profile, length = torch.zeros(1, 1, dtype=torch.long), torch.tensor([5])
    before = user.last(behavior, kind, length, profile)[0][0]
    behavior[0, 3] = torch.randn(16)
    after = user.last(behavior, kind, length, profile)[0][0]
    torch.testing.assert_close(before[: user.prefix + 3], after[: user.prefix + 3])
    assert (before[user.prefix + 3 :] - after[user.prefix + 3 :]).abs().max() > 1e-3


def inputs(rows, length, recent=4, seed=0):
    """Random arguments of `UserTower.forward`, by the names that ONNX knows."""
    g = torch.Generator().manual_seed(seed)
    return {
        "behavior": torch.randn(rows, length, 16, generator=g),
        "kind": torch.randint(0, 2, (rows, length), generator=g),
        "age": torch.randint(0, AGES, (rows, length), generator=g),
        "length": torch.randint(0, length + 1, (rows,), generator=g),
        "profile": torch.randint(0, 3, (rows, 1), generator=g),
        "context": torch.randn(rows, 16, generator=g),
        "since": torch.randint(0, AGES, (rows, 2), generator=g),
        "recent": torch.randn(rows, recent, 16, generator=g),
        "recent_count": torch.randint(0, recent + 1, (rows,), generator=g),
    }


@each_encoder
@torch.no_grad()
def test_padding_says_nothing(store, encoder):
    user = learner_of(store, replace(CONFIG, encoder=encoder))[0].user
    short = inputs(3, 3)
    long = short | {
        "behavior": torch.cat([short["behavior"], torch.randn(3, 2, 16)], 1),
        "kind": torch.cat([short["kind"], torch.ones(3, 2, dtype=torch.long)], 1),
        "age": torch.cat([short["age"], torch.ones(3, 2, dtype=torch.long)], 1),
    }
    (a, shares), (b, more) = user(*short.values()), user(*long.values())
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(shares.exp(), more[:, :4].exp())
    assert (more[:, 4:].exp() == 0).all()


@torch.no_grad()
def test_no_recent_behaviors_no_effect_of_padding(store):
    user = learner_of(store, CONFIG)[0].user
    state, bag, context = torch.randn(2, 16), torch.randn(2, 16), torch.randn(2, 16)
    since, none = torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    a = user.head(state, bag, context, since, torch.randn(2, 4, 16), none)
    torch.testing.assert_close(a, user.head(state, bag, context, since, torch.randn(2, 4, 16), none))


@torch.no_grad()
def test_the_last_behaviors_ages_count_unless_switched_off(store):
    """That of the context and that of any category, apart."""
    for ages in (True, False):
        user = learner_of(store, replace(CONFIG, ages=ages, returns=False))[0].user
        usual = inputs(1, 3)
        (known,) = user(*usual.values())
        for place in (0, 1):
            other = usual["since"].clone()
            other[0, place] = (other[0, place] + 5) % AGES
            (found,) = user(*(usual | {"since": other}).values())
            assert ((found - known).abs().max() > 1e-3) == ages


@each_encoder
@every_option
def test_onnx_gives_the_same_vectors_and_shares(store, encoder, options, tmp_path):
    import onnxruntime

    config = replace(CONFIG, encoder=encoder, **options)
    user = learner_of(store, config)[0].user
    export_user_tower(user, config.dim, tmp_path / "user.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "user.onnx"))
    named = {i.name for i in session.get_inputs()}
    assert {"behavior", "kind", "length", "profile"} <= named
    assert ("recent" in named) == (config.recent_length > 0)
    for rows, length in ((1, 1), (3, 6), (7, 4)):
        given = inputs(rows, length, config.recent_length, seed=rows)
        with torch.no_grad():
            wanted = user(*given.values())
        got = session.run(None, {k: v.numpy() for k, v in given.items() if k in named})
        assert len(got) == len(wanted) == 1 + config.returns
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(np.maximum(a, -50), np.maximum(b.numpy(), -50), atol=2e-5)


def test_only_named_rows_are_updated():
    items = ItemRows(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), lr=0.1)
    before = items.weight.clone()
    rows = items.gather(torch.tensor([1, 4]))
    (given,) = torch.autograd.grad(F.mse_loss(rows, torch.ones(2, 4)), rows)
    items.update([(torch.tensor([1, 4]), given)])
    changed = (items.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True, False]
    # row-wise Adagrad: the first step is lr times the gradient over its own root mean square
    grad = (before[[1, 4]] - 1) * 2 / 8
    wanted = before[[1, 4]] - 0.1 * grad / grad.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(items.weight[[1, 4]], wanted)


def test_parts_that_name_the_same_rows_add_up():
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole, parts = ItemRows(start.clone(), lr=0.1), ItemRows(start.clone(), lr=0.1)
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    whole.update([(torch.tensor([1, 3, 4]), grad)])
    one, other = grad.clone(), torch.zeros(2, 4)
    one[1], other[0] = 0.25 * grad[1], 0.75 * grad[1]
    parts.update([(torch.tensor([1, 3, 4]), one), (torch.tensor([3, 5]), other)])
    torch.testing.assert_close(parts.weight, whole.weight)
    torch.testing.assert_close(parts.sum_of_squares, whole.sum_of_squares)


def test_dropout_is_what_it_says_and_repeats():
    x = torch.ones(400, 100)
    a = drop(x, 0.25, torch.Generator().manual_seed(3))
    torch.testing.assert_close(a.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(a.mean().item() - 1) < 0.02
    assert torch.equal(a, drop(x, 0.25, torch.Generator().manual_seed(3)))
    assert torch.equal(x, drop(x, 0.25, None))
