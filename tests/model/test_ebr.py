"""One vector for a user: the same packed, alone and in ONNX, and blind to what the target is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import torch

from longretriever.errors import InputError
from longretriever.model.config import EbrConfig
from longretriever.model.ebr import export_life_tower
from tests.worlds import random_log, stored

CONFIG = EbrConfig(dim=16, length=8, step_samples=60, dropout=0.0, warm_start=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    users = pa.table({"user_id": list(range(8)), "sex": list("fmfmfmfm")})
    return stored(random_log(7), tmp_path_factory.mktemp("ebr") / "store", users=users)


def learned(store, config):
    """A method far from its start, where all vectors are alike, and item rows."""
    torch.manual_seed(0)
    learner = config.learner(store)
    for parameter in learner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return learner, torch.randn(store.n_items, config.dim)


def steps(store, learner):
    for plan in learner.batches(store.last_time).epoch(0, 0):
        yield learner.batches(store.last_time).assemble(plan, np.random.default_rng(0))[0]


def alone(learner, rows, step):
    """The user vector of each sample, each computed by itself from its own past."""
    token = torch.from_numpy(learner.store.item_category).long()
    token = learner.item.embed(rows, token, torch.from_numpy(np.array(learner.store.item_feature)).long())
    prefix = learner.user.prefix
    places = [
        (b, i, t) for b in step.buckets for i in range(len(b.length)) for t in range(prefix + b.item.shape[1])
    ]
    for at in step.state:
        bucket, row, slot = places[at]
        known = slot - prefix + 1 if learner.user.causal else int(bucket.length[row])
        past = step.numbers[bucket.item[row, :known]]
        one = slice(row, row + 1)
        yield learner.user(
            token[torch.from_numpy(past)][None],
            torch.from_numpy(bucket.kind[one, :known]),
            torch.tensor([known]),
            torch.from_numpy(bucket.profile[one]),
        )[0]


@pytest.mark.parametrize("encoder", ["packed", "cls"])
@torch.no_grad()
def test_a_batch_gives_the_vectors_of_its_samples_alone(store, encoder):
    learner, rows = learned(store, replace(CONFIG, encoder=encoder))
    samples = 0
    for step in steps(store, learner):
        together, _ = learner(rows[torch.from_numpy(step.numbers)], step)
        torch.testing.assert_close(
            together, torch.stack(list(alone(learner, rows, step))), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(together.norm(dim=1), torch.ones(len(together)))
        samples += len(together)
    assert samples > 0.7 * store.n_events


@torch.no_grad()
def test_the_target_and_its_category_do_not_enter(store):
    learner, rows = learned(store, CONFIG)
    step = next(steps(store, learner))
    rows = rows[torch.from_numpy(step.numbers)]
    before, _ = learner(rows, step)
    other = step._replace(target=step.target * 0, category=step.category * 0, since=step.since * 0)
    assert torch.equal(before, learner(rows, other)[0])


def test_items_of_all_categories_compete(store):
    for config, wanted in (
        (CONFIG, store.n_items),
        (EbrConfig.paper(dim=16, length=8, step_samples=20), None),
    ):
        learner, _ = learned(store, config)
        for step in steps(store, learner):
            (contest,) = step.contests
            if wanted is None:  # in-batch negatives and no others, each with the chance of being there
                competing = step.numbers[contest.candidate]
                assert competing.tolist() == sorted({*step.numbers[step.target].tolist()})
                assert np.isfinite(contest.log_q).all()
            else:
                assert contest.candidate.stop - contest.candidate.start == wanted


@pytest.mark.parametrize("encoder", ["packed", "cls"])
def test_onnx_gives_the_same_vectors(store, encoder, tmp_path):
    learner, _ = learned(store, replace(CONFIG, encoder=encoder))
    export_life_tower(learner.user, tmp_path / "user.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "user.onnx"))
    for rows, length in ((1, 1), (3, 8), (7, 4)):
        inputs = {
            "behavior": torch.randn(rows, length, 16),
            "kind": torch.randint(0, 2, (rows, length)),
            "length": torch.randint(0, length + 1, (rows,)),
            "profile": torch.randint(0, 3, (rows, 1)),
        }
        with torch.no_grad():
            wanted = learner.user(*inputs.values())
        got = session.run(None, {k: v.numpy() for k, v in inputs.items()})[0]
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"encoder": "gru"}, "packed"), ({"dim": 15}, "multiple"), ({"length": 0}, "length=0")],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **wrong)
