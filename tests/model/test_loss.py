"""The in-category softmax against its definition."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from longretriever.model.batches import Contest, Step
from longretriever.model.loss import log_likelihood

SCALE = torch.tensor(3.0)


def step_of(contests, samples, items):
    """A step of which only the contests matter."""
    none = {name: np.zeros(samples, np.int64) for name in Step._fields}
    return Step(**{**none, "numbers": np.arange(items), "contests": contests})


def unit(*shape):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)), dim=-1
    ).requires_grad_()


def test_whole_categories():
    user, item = unit(5, 4), unit(9, 4)
    contests = [
        Contest(slice(0, 2), slice(1, 4), np.array([0, 2]), None),
        Contest(slice(2, 5), slice(5, 9), np.array([3, 0, 1]), None),
    ]
    wanted = [
        (3 * user[s] @ item[c.candidate].T).log_softmax(0)[c.target[i]]
        for c in contests
        for i, s in enumerate(range(c.samples.start, c.samples.stop))
    ]
    found = log_likelihood(user, item, SCALE, step_of(contests, 5, 9))
    torch.testing.assert_close(found, torch.stack(wanted))
    found.sum().backward()
    assert item.grad[[0, 4]].abs().sum() == 0, "items of no contest must not be pushed"


def test_sampled_categories_are_corrected():
    user, item = unit(2, 4), unit(6, 4)
    log_q = np.log(np.array([0.9, 0.2, 0.5], np.float32))
    sampled = Contest(slice(0, 1), np.array([0, 2, 5]), np.array([1]), log_q)
    whole = Contest(slice(1, 2), slice(3, 5), np.array([0]), None)
    a = (3 * item[[0, 2, 5]] @ user[0] - torch.from_numpy(log_q)).log_softmax(0)[1]
    b = (3 * item[3:5] @ user[1]).log_softmax(0)[0]
    found = log_likelihood(user, item, SCALE, step_of([sampled, whole], 2, 6))
    torch.testing.assert_close(found, torch.stack([a, b]))


def test_log_q_makes_sampling_agree_with_the_whole_on_average():
    """Popular items are drawn more often; corrected, they are not pushed down for it."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    user, item = (
        F.normalize(torch.randn(1, 4, generator=generator)),
        F.normalize(torch.randn(30, 4, generator=generator)),
    )
    q = np.linspace(0.2, 0.9, 30)
    q[7] = 1.0  # the target always competes
    log_q = np.log(q).astype(np.float32)
    found = []
    for correction in (log_q, 0 * log_q):
        total = 0.0
        for _ in range(2000):
            chosen = np.flatnonzero(rng.random(30) < q)
            contest = Contest(slice(0, 1), chosen, np.searchsorted(chosen, [7]), correction[chosen])
            total += log_likelihood(user, item, SCALE, step_of([contest], 1, 30)).item()
        found.append(total / 2000)
    whole = Contest(slice(0, 1), slice(0, 30), np.array([7]), None)
    wanted = log_likelihood(user, item, SCALE, step_of([whole], 1, 30)).item()
    assert abs(found[0] - wanted) < 0.12  # the logarithm of an unbiased sum is a little low
    assert abs(found[1] - wanted) > 0.4
