"""What do several vectors for one user retrieve? MIND (arXiv 1904.08030): interests by dynamic routing.

Behavior-to-interest routing clusters the last behaviors of any category into at most K capsules, each of
which, with the profile through a ReLU layer, becomes a user vector that searches all items. The routing is a
soft k-means in three rounds: behaviors i are shared out among interests j by `w_ij = softmax_j(b_ij)`, an
interest is `u_j = squash(sum_i w_ij S e_i)`, and `b_ij` grows by the agreement `u_j . S e_i`. A user has
`K' = max(1, min(K, log2 n))` interests, rounded down, n the number of behaviors read.

Decisions where the paper leaves room, or where implementations go wrong:

- `e_i` is the item vector, of length 1, and S starts as a multiple of the identity (`sharpness`), so that
  agreement is large. With small vectors routing changes nothing, each interest is the same mean, and K
  searches find one list K times; `collapse.py` measures that.
- The first `b_ij` are normal at random, but alike for behaviors that are alike: `b_ij = q_j . S e_i` for
  a random capsule `q_j`, drawn anew for each sample in training and a constant of the model in serving.
  Drawn for each `b_ij` by itself they part a user's behaviors by lot, so that all interests begin near
  one mean, and three rounds do not get them apart: on a log of 0.7M events, factors of `warm.py` as
  items, the mean cosine of two of five interests is .27 with random capsules and .78 with random `b_ij`,
  and the next item is likelier by .4 nats.
- No gradient flows through the `b_ij`: the rounds before the last run without, and in the last one the
  weights are constants. Gradient reaches S and the items through the weighted sum alone.
- The output layer adds to the capsule, so a vector can point anywhere and not only where ReLU leaves it,
  and vectors are normalised after it: the length that squash takes away does not matter.
- Label-aware attention weighs the interests by `softmax_j(p * s * cos(v_j, target))`, s the inverse
  temperature: a power of a negative cosine is nothing, a factor of the logit has the same limits (p = 0
  all alike, p = inf the nearest alone).
- Held-out loss must not let the target choose: it is `log mean_j P(target | v_j)`, as the lists are
  merged.

U items of a step, S samples, R recent behaviors, K interests, P profile fields, d width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longretriever.errors import InputError
from longretriever.model.batches import Sampling, Step
from longretriever.model.config import VectorLearning
from longretriever.model.learner import Learner, code_tables, drop, write_onnx
from longretriever.model.loss import log_likelihood
from longretriever.store.behaviors import Store

_NEVER = -1e4  # a logit for what must not be chosen; finite, so that its gradient is 0 and not NaN
_SPREAD = 0.5  # standard deviation of the random first capsules; later ones are about 1 long


@dataclass(frozen=True)
class MindConfig(VectorLearning):
    """Several vectors for one user, each for one interest."""

    capsules: int = 4  # K: interests of a user at most
    length: int = 50  # behaviors of any category that are shared out among them
    rounds: int = 3  # of routing
    sharpness: float = 16.0  # of routing at the start: behaviors are capsules of this length
    power: float = math.inf  # p of the label-aware attention; inf: the nearest interest alone learns
    whole_up_to: int = 8192  # items: a larger corpus competes by sample
    sampled_negatives: int = 2048  # evenly drawn, beside the targets of the batch

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("capsules", "length", "rounds")
        if not self.sharpness > 0:
            raise InputError(f"sharpness={self.sharpness}: expected more than 0.")
        if not self.power >= 0:
            raise InputError(f"power={self.power}: expected 0 or more; inf for the nearest interest alone.")

    def learner(self, store: Store) -> Learner:
        return Mind(store, self)


def interest_count(behaviors_S: Tensor, most: int) -> Tensor:
    """[S] `max(1, min(most, log2 n))`, rounded down, of users with n behaviors; exact, in whole numbers."""
    powers = 2 ** torch.arange(1, most + 1, device=behaviors_S.device)
    return (behaviors_S[:, None] >= powers).sum(1).clamp(min=1)


def squash(z: Tensor) -> Tensor:
    """The same directions, lengths n as `n^2 / (1 + n^2)`; 0 stays 0, with a gradient."""
    square = z.square().sum(-1, keepdim=True)
    return z * torch.rsqrt(square + 1e-9) * square / (1 + square)


def route(
    low_SRd: Tensor, first_SKd: Tensor, behaviors_S: Tensor, interests_S: Tensor, rounds: int
) -> Tensor:
    """[S, K, d] interest capsules of behavior capsules `S e_i`, of which the first `behaviors_S` are there.

    `first_SKd` are the random capsules with which the first logits agree; interests from `interests_S` on get
    no behavior, and are 0.
    """
    K, R = first_SKd.shape[1], low_SRd.shape[1]
    there_SR = torch.arange(R, device=low_SRd.device) < behaviors_S[:, None]
    some_SK = torch.arange(K, device=low_SRd.device) < interests_S[:, None]
    still_SRd = low_SRd.detach()
    logit_SKR = torch.bmm(first_SKd, still_SRd.transpose(1, 2))
    for nth in range(rounds):
        weight_SKR = logit_SKR.masked_fill(~some_SK[:, :, None], _NEVER).softmax(1) * there_SR[:, None]
        if nth == rounds - 1:
            break
        capsule_SKd = squash(torch.bmm(weight_SKR, still_SRd))
        logit_SKR = logit_SKR + torch.bmm(capsule_SKd, still_SRd.transpose(1, 2))
    return squash(torch.bmm(weight_SKR, low_SRd))


class InterestTower(nn.Module):
    """Recent behaviors and profile in; K unit vectors, of which some count, out."""

    first_Kd: Tensor  # noqa: N815

    def __init__(
        self,
        *,
        dim: int,
        interests: int,
        rounds: int,
        sharpness: float,
        profile_sizes: list[int],
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__()
        self.rounds, self.dropout = rounds, dropout
        self.bilinear = nn.Parameter(torch.eye(dim) * sharpness)  # S
        self.profile = code_tables(profile_sizes, dim)
        self.widen = nn.Linear((1 + len(profile_sizes)) * dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("first_Kd", _SPREAD * torch.randn(interests, dim, generator=generator))

    def low(self, behavior: Tensor) -> Tensor:
        """[..., d] behavior capsules `S e_i` of behaviors, which come as item tokens."""
        return F.normalize(behavior, dim=-1) @ self.bilinear.T

    def interests(
        self,
        low_SRd: Tensor,
        count_S: Tensor,
        profile_SP: Tensor,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[S, K, d] vectors and [S] how many of them count. `generator` draws the first capsules of routing
        and what is dropped out; without one they are the model's constant, and nothing.
        """
        S, K = low_SRd.shape[0], self.first_Kd.shape[0]
        first_SKd = self.first_Kd.expand(S, -1, -1)
        if generator is not None:
            first_SKd = _SPREAD * torch.randn(first_SKd.shape, generator=generator)
        interests_S = interest_count(count_S, K)
        capsule_SKd = route(low_SRd, first_SKd, count_S, interests_S, self.rounds)
        fields = [table(profile_SP[:, i])[:, None].expand(-1, K, -1) for i, table in enumerate(self.profile)]
        hidden = self.widen(torch.cat([capsule_SKd, *fields], dim=-1)).relu()
        vector_SKd = capsule_SKd + self.narrow(drop(hidden, self.dropout, generator))
        return F.normalize(vector_SKd, dim=-1), interests_S

    def forward(
        self, recent_BRd: Tensor, recent_count_B: Tensor, profile_BP: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[B, K, d] and [B]: what serving asks. Behaviors come newest first."""
        return self.interests(self.low(recent_BRd), recent_count_B, profile_BP)


class Encoded(NamedTuple):
    """What a step's samples became."""

    user: Tensor  # [S, K, d] of length 1
    interests: Tensor  # [S] how many of the K count
    item: Tensor  # [U, d] of length 1


class Mind(Learner):
    """Both towers for one store, trained on batches of all categories."""

    method = "mind"
    config: MindConfig

    def __init__(self, store: Store, config: MindConfig) -> None:
        super().__init__(store, config)
        self.user = InterestTower(
            dim=config.dim,
            interests=config.capsules,
            rounds=config.rounds,
            sharpness=config.sharpness,
            profile_sizes=[field.size for field in store.profile_fields],
            dropout=config.dropout,
            seed=config.seed,
        )

    def sampling(self) -> Sampling:
        c = self.config
        return Sampling(
            packed=False,
            along="life",
            mixed=True,
            context_length=0,
            recent_length=c.length,
            samples=c.samples_of_step(self.store.n_events),
            most=c.most,
            half_life=c.half_life,
            whole_up_to=c.whole_up_to,
            sampled_negatives=c.sampled_negatives,
        )

    def forward(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Encoded:
        token_Ud = self.tokens(rows_Ud, step, generator)
        low_SRd = self.recent(self.user.low(token_Ud), step)  # mapped before each is named many times
        count_S, profile_SP = torch.from_numpy(step.recent_count), torch.from_numpy(self._profile(step))
        user_SKd, interests_S = self.user.interests(low_SRd, count_S, profile_SP, generator)
        return Encoded(user_SKd, interests_S, F.normalize(token_Ud, dim=-1))

    def loss(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        user_SKd, interests_S, item_Ud = self(rows_Ud, step, generator)
        scale, K = self.item.scale, user_SKd.shape[1]
        some_SK = torch.arange(K) < interests_S[:, None]
        if generator is None:
            each_SK = torch.stack(
                [log_likelihood(user_SKd[:, j], item_Ud, scale, step) for j in range(K)], dim=1
            )
            return -(each_SK.masked_fill(~some_SK, _NEVER).logsumexp(1) - interests_S.log()).sum()
        target_Sd = item_Ud[torch.from_numpy(step.target)]
        user_Sd = label_aware(user_SKd, target_Sd, some_SK, scale, self.config.power)
        return -log_likelihood(user_Sd, item_Ud, scale, step).sum()

    def _profile(self, step: Step) -> Any:
        """[S, P] profile codes: one sample a row, without behaviors, so all rows are of one bucket."""
        (bucket,) = step.buckets
        return bucket.profile[step.state // (1 + bucket.profile.shape[1])]

    def export(self, folder: Path) -> dict[str, Any]:
        export_interest_tower(self.user, self.config.length, folder / "user_tower.onnx")
        return {
            "contexts": False,
            "corpus": True,
            "context_length": 0,
            "recent_length": self.config.length,
            "within": None,
            "merge": "score",  # the paper's: each interest's nearest items, the nearest of all first
        }


def label_aware(user_SKd: Tensor, target_Sd: Tensor, some_SK: Tensor, scale: Tensor, power: float) -> Tensor:
    """[S, d] of length 1: the interests that count, each as far as it agrees with the target."""
    logit_SK = torch.bmm(user_SKd, target_Sd[:, :, None])[..., 0] * scale
    if math.isinf(power):
        nearest_S = logit_SK.masked_fill(~some_SK, _NEVER).argmax(1)
        return user_SKd[torch.arange(len(user_SKd)), nearest_S]
    weight_SK = (power * logit_SK).masked_fill(~some_SK, _NEVER).softmax(1)
    return F.normalize(torch.bmm(weight_SK[:, None], user_SKd)[:, 0], dim=-1)


def export_interest_tower(user: InterestTower, length: int, file: Path) -> None:
    """Write the user tower as ONNX, for any number of rows of `length` behaviors, padded behind."""
    rows, R, dim = 2, length, len(user.bilinear)
    example = {
        "recent": torch.zeros(rows, R, dim),
        "recent_count": torch.full((rows,), R),
        "profile": torch.zeros(rows, len(user.profile), dtype=torch.long),
    }
    write_onnx(user, example, ["user", "interests"], {name: {0: "row"} for name in example}, file)
