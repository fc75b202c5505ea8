"""The same weights give the same user vector: packed, one sample a row, and in ONNX."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from longretriever.model.batches import Batches
from longretriever.model.checkpoint import export_user_tower
from longretriever.model.config import TrainConfig
from longretriever.model.towers import ItemRows, Towers, drop
from tests.worlds import random_log, stored

CONFIG = TrainConfig(dim=16, context_length=6, recent_length=4, overlap=2, step_samples=60, dropout=0.0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    users = pa.table({"user_id": list(range(8)), "sex": list("fmfmfmfm")})
    return stored(random_log(7), tmp_path_factory.mktemp("towers") / "store", users=users)


def vectors(store, config):
    torch.manual_seed(0)
    towers = Towers(store, config).eval()
    for parameter in towers.parameters():  # far from the start, where all vectors are alike
        torch.nn.init.normal_(parameter, std=0.3)
    items = ItemRows(store.n_items, config.dim, torch.Generator().manual_seed(0), 0.1)
    batches = Batches(store, config.sampling(store.n_events), store.last_time)
    return towers, items, batches


def alone(towers, items, store, step, config):
    """The user vector of each sample, each computed by itself from its own past."""
    category = torch.from_numpy(store.item_category).long()
    feature = torch.from_numpy(np.array(store.item_feature)).long()
    token = towers.item.embed(items.weight, category, feature)
    numbers = torch.from_numpy(step.numbers)
    prefix = towers.user.prefix
    rows = [
        (b, i, t) for b in step.buckets for i in range(len(b.length)) for t in range(prefix + b.item.shape[1])
    ]
    out = []
    for s in range(len(step.state)):
        bucket, row, slot = rows[step.state[s]]
        known = slot - prefix + 1 if config.encoder == "packed" else int(bucket.length[row])
        past = numbers[torch.from_numpy(bucket.item[row, :known]).long()]
        recent = numbers[torch.from_numpy(step.recent[s]).long()]
        out.append(
            towers.user(
                token[past][None],
                torch.from_numpy(bucket.kind[row : row + 1, :known]),
                torch.tensor([known]),
                torch.from_numpy(bucket.profile[row : row + 1]),
                towers.item.category(torch.tensor([step.category[s]])),
                token[recent][None],
                torch.tensor([step.recent_count[s]]),
            )[0]
        )
    return torch.stack(out)


@pytest.mark.parametrize("encoder", ["packed", "cls"])
@torch.no_grad()
def test_a_batch_gives_the_vectors_of_its_samples_alone(store, encoder):
    config = replace(CONFIG, encoder=encoder)
    towers, items, batches = vectors(store, config)
    for plan in batches.epoch(0, 0):
        step = batches.assemble(plan, np.random.default_rng(0))[0]
        together, _ = towers(items.weight[torch.from_numpy(step.numbers)], step, store)
        torch.testing.assert_close(together, alone(towers, items, store, step, config), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(len(together)))


@torch.no_grad()
def test_a_packed_state_does_not_see_the_future(store):
    towers, _, _ = vectors(store, CONFIG)
    behavior, kind = torch.randn(1, 5, 16), torch.zeros(1, 5, dtype=torch.long)
    profile, length = torch.zeros(1, 1, dtype=torch.long), torch.tensor([5])
    before = towers.user.states([towers.user.rows(behavior, kind, profile)], [length])
    behavior[0, 3] = torch.randn(16)
    after = towers.user.states([towers.user.rows(behavior, kind, profile)], [length])
    prefix = towers.user.prefix
    torch.testing.assert_close(before[: prefix + 3], after[: prefix + 3])
    assert (before[prefix + 3 :] - after[prefix + 3 :]).abs().max() > 1e-3


@torch.no_grad()
def test_cls_ignores_padding(store):
    towers, _, _ = vectors(store, replace(CONFIG, encoder="cls"))
    x, kind = torch.randn(1, 3, 16), torch.zeros(1, 3, dtype=torch.long)
    rest = (torch.zeros(1, 1, dtype=torch.long), torch.randn(1, 16), torch.randn(1, 4, 16), torch.tensor([2]))
    padded, more = torch.cat([x, torch.randn(1, 2, 16)], 1), torch.zeros(1, 5, dtype=torch.long)
    n = torch.tensor([3])
    torch.testing.assert_close(towers.user(x, kind, n, *rest), towers.user(padded, more, n, *rest))


@torch.no_grad()
def test_no_recent_behaviors_no_effect_of_padding(store):
    towers, _, _ = vectors(store, CONFIG)
    state, context = torch.randn(2, 16), torch.randn(2, 16)
    none = torch.zeros(2, dtype=torch.long)
    a = towers.user.head(state, context, torch.randn(2, 4, 16), none)
    torch.testing.assert_close(a, towers.user.head(state, context, torch.randn(2, 4, 16), none))


@pytest.mark.parametrize("encoder", ["packed", "cls"])
def test_onnx_gives_the_same_vectors(store, encoder, tmp_path):
    import onnxruntime

    config = replace(CONFIG, encoder=encoder)
    towers, _, _ = vectors(store, config)
    export_user_tower(towers, config.dim, tmp_path / "user.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "user.onnx"))
    for rows, length in ((1, 1), (3, 6), (7, 4)):
        inputs = {
            "behavior": torch.randn(rows, length, 16),
            "kind": torch.randint(0, 2, (rows, length)),
            "length": torch.randint(0, length + 1, (rows,)),
            "profile": torch.randint(0, 3, (rows, 1)),
            "context": torch.randn(rows, 16),
            "recent": torch.randn(rows, 4, 16),
            "recent_count": torch.randint(0, 5, (rows,)),
        }
        with torch.no_grad():
            wanted = towers.user(*inputs.values())
        got = session.run(None, {k: v.numpy() for k, v in inputs.items()})[0]
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-5)


def test_only_named_rows_are_updated(store):
    items = ItemRows(6, 4, torch.Generator().manual_seed(0), lr=0.1)
    before = items.weight.clone()
    rows = items.gather(torch.tensor([1, 4]))
    (given,) = torch.autograd.grad(F.mse_loss(rows, torch.ones(2, 4)), rows)
    items.update(torch.tensor([1, 4]), rows, given)
    changed = (items.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True, False]
    # row-wise Adagrad: the first step is lr times the gradient over its own root mean square
    grad = (before[[1, 4]] - 1) * 2 / 8
    wanted = before[[1, 4]] - 0.1 * grad / grad.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(items.weight[[1, 4]], wanted)


def test_dropout_is_what_it_says_and_repeats():
    x = torch.ones(400, 100)
    a = drop(x, 0.25, torch.Generator().manual_seed(3))
    torch.testing.assert_close(a.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(a.mean().item() - 1) < 0.02
    assert torch.equal(a, drop(x, 0.25, torch.Generator().manual_seed(3)))
    assert torch.equal(x, drop(x, 0.25, None))
