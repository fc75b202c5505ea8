"""What do K + 1 vectors of a user retrieve? ULIM (arXiv 2507.10097): one a category, one for all items.

The short-term encoder pools a self-attention over the last behaviors of any category; its vector searches all
items. In the long-term encoder that pooled state (never the target item) asks the category's own behaviors by
attention; its vector searches the category. What is learned is alpha * L_long + beta * L_short: L_long among
items of the target's category, as everywhere here; L_short among all items that compete in any contest of the
step, since it has to rank items of different categories. So steps mingle many one-category batches, and each
logit of L_short is corrected by how likely its category is in a step.

S samples, B rows of one length, R recent behaviors, N behaviors of a context, U distinct items of a step,
h heads, k width of a head, d width, n items that compete.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longretriever.errors import InputError
from longretriever.model.batches import Batches, Rows, Sampling, Step
from longretriever.model.config import PginConfig, VectorLearning
from longretriever.model.learner import FIRST_TEMPERATURE, MAX_SCALE, Learner, code_tables, drop, write_onnx
from longretriever.model.loss import log_likelihood
from longretriever.store.behaviors import Store

_NEVER = -1e4  # a logit for what must not be chosen; finite, so that its gradient is 0 and not NaN
_CHUNK = 64  # samples whose self-attention is computed at once: 512 leave the cache, at 0.4 of the speed


@dataclass(frozen=True)
class UlimConfig(VectorLearning):
    """ULIM. Half the sequence, an ablation of the paper: `context_length=25, recent_length=50`."""

    heads: int = 2
    context_length: int = 50  # behaviors of a category that the long-term encoder reads
    recent_length: int = 100  # behaviors of any category that the short-term encoder reads
    within: int | None = None  # only the user's last so many behaviors are looked at; None: the whole life
    attention: str = "target"  # "self", an ablation: self-attention, mean pooling in the category too
    long_weight: float = 1.0  # alpha
    short_weight: float = 1.0  # beta
    whole_category_up_to: int = 8192
    sampled_negatives: int = 2048
    corpus_negatives: int = 8192  # of all that compete in a step, at most so many do in L_short
    interests: PginConfig | None = PginConfig()  # the choice of contexts; None: by Equation 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("heads", "context_length", "recent_length", "corpus_negatives")
        if self.attention not in ("target", "self"):
            raise InputError(f"attention={self.attention!r}: expected 'target' or 'self'.")
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} cannot be divided among heads={self.heads}: choose a multiple.")
        if self.within is not None and self.within < 1:
            raise InputError(f"within={self.within}: expected at least 1, or None for the whole life.")
        if min(self.long_weight, self.short_weight) < 0 or self.long_weight + self.short_weight == 0:
            raise InputError(
                f"long_weight={self.long_weight}, short_weight={self.short_weight}: expected 0 or more, "
                "and one of them above 0."
            )

    def learner(self, store: Store) -> Learner:
        return Ulim(store, self)


class SelfAttention(nn.Module):
    """Multi-head self-attention whose outputs are averaged at once.

    What an average of outputs needs of the values is how much attention each token gets in all; so values and
    output are projected once for a row, not for each of its tokens. Queries and keys are linear in
    token + position, so they are projected once for each distinct item of a step and each position.
    """

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)  # by how many behaviors ago
        self.query_key = nn.Linear(dim, 2 * dim, bias=False)
        self.value, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)

    def forward(self, token_BRd: Tensor, query_key_BRe: Tensor, count_B: Tensor) -> Tensor:
        """[B, d] mean of tokens and of what they attend to, of the first `count_B` of each row; 0 of none.

        Tokens stand newest first, padded behind; `query_key_BRe` is their projection by `query_key`.
        """
        B, R, d = token_BRd.shape
        known_BR = torch.arange(R, device=token_BRd.device) < count_B[:, None]
        share_BR = known_BR / count_B.clamp(min=1)[:, None]
        position_Rd = self.position[:R]
        qk_BRe = query_key_BRe + self.query_key(position_Rd)
        q, k = qk_BRe.view(B, R, 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        score_BhRR = (q / math.sqrt(d // self.heads)) @ k.transpose(2, 3)
        score_BhRR += torch.where(known_BR, 0.0, _NEVER)[:, None, None]
        weight_BhR = (share_BR[:, None, None] @ score_BhRR.softmax(-1))[:, :, 0]
        every_BhR = torch.cat([weight_BhR, share_BR[:, None]], dim=1)
        pooled_Bhd = every_BhR @ token_BRd + every_BhR @ position_Rd
        attended_Bd = _by_head(pooled_Bhd[:, :-1], self.value)
        return (pooled_Bhd[:, -1] + self.out(attended_Bd)) * (count_B > 0)[:, None]


class TargetAttention(nn.Module):
    """Multi-head attention of one query over a row; keys are projected on the query's side, as it is one."""

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(length, dim) * 0.02)  # by how many behaviors ago
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.value, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)

    def forward(self, query_Bd: Tensor, token_BNd: Tensor, count_B: Tensor) -> Tensor:
        """[B, d] what the query attends to of a row's first `count_B` tokens, newest first; 0 of none."""
        B, N, d = token_BNd.shape
        known_BN = torch.arange(N, device=token_BNd.device) < count_B[:, None]
        token_BNd = token_BNd + self.position[:N]
        query_Bhk = self.query(query_Bd).view(B, self.heads, d // self.heads) / math.sqrt(d // self.heads)
        key_hkd = self.key.weight.view(self.heads, d // self.heads, d)
        score_BhN = torch.einsum("bhk,hkd->bhd", query_Bhk, key_hkd) @ token_BNd.transpose(1, 2)
        weight_BhN = score_BhN.masked_fill(~known_BN[:, None], _NEVER).softmax(-1)
        attended_Bd = _by_head(weight_BhN @ token_BNd, self.value)
        return self.out(attended_Bd) * (count_B > 0)[:, None]


def _by_head(pooled_Bhd: Tensor, value: nn.Linear) -> Tensor:
    """[B, d] each head's pooled tokens through its own rows of the value projection."""
    B, h, d = pooled_Bhd.shape
    weight_hkd = value.weight.view(h, d // h, d)
    return torch.einsum("bhd,hkd->bhk", pooled_Bhd, weight_hkd).reshape(B, d)


class Head(nn.Module):
    """The DNN on top of an encoder, beside what it reads: [S, read * d] to [S, d]."""

    def __init__(self, dim: int, read: int) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(read * dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, read: list[Tensor], rate: float, generator: torch.Generator | None) -> Tensor:
        x_Sd = drop(torch.cat(read, dim=-1), rate, generator)
        return sum(read[1:], start=read[0]) + self.narrow(drop(F.gelu(self.widen(x_Sd)), rate, generator))


class UlimTower(nn.Module):
    """Recent behaviors, those of a category, and profile in; a unit vector out."""

    def __init__(self, config: UlimConfig, kinds: int, profile_sizes: list[int]) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.dropout = config.dropout
        self.norm, self.kind = nn.LayerNorm(dim), nn.Embedding(kinds, dim)
        nn.init.normal_(self.kind.weight, std=0.02)
        self.profile = code_tables(profile_sizes, dim)
        self.short = SelfAttention(dim, heads, config.recent_length)
        attention = SelfAttention if config.attention == "self" else TargetAttention
        self.long: SelfAttention | TargetAttention = attention(dim, heads, config.context_length)
        self.short_head, self.long_head = Head(dim, 1), Head(dim, 2)

    def described(self, pooled_Sd: Tensor, profile_SP: Tensor) -> Tensor:
        """The pooled recent behaviors, and what else is known of the user."""
        for i, table in enumerate(self.profile):
            pooled_Sd = pooled_Sd + table(profile_SP[:, i])
        return pooled_Sd

    def attended(self, state_Bd: Tensor, token_BNd: Tensor, kind_BN: Tensor, count_B: Tensor) -> Tensor:
        """[B, d] what the long-term encoder reads of behaviors of a category, newest first.

        `token_BNd` is already through `norm`, as an item's is the same wherever it stands.
        """
        token_BNd = token_BNd + self.kind(kind_BN)
        if isinstance(self.long, SelfAttention):
            return self.long(token_BNd, self.long.query_key(token_BNd), count_B)
        return self.long(state_Bd, token_BNd, count_B)

    def whole_vector(self, state_Sd: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return F.normalize(self.short_head([state_Sd], self.dropout, generator), dim=-1)

    def context_vector(
        self, state_Sd: Tensor, attended_Sd: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return F.normalize(self.long_head([state_Sd, attended_Sd], self.dropout, generator), dim=-1)

    def forward(
        self,
        behavior_BNd: Tensor,
        kind_BN: Tensor,
        length_B: Tensor,
        profile_BP: Tensor,
        recent_BRd: Tensor,
        recent_count_B: Tensor,
        whole_B: Tensor,
    ) -> Tensor:
        """[B, d] one user vector for each row: of the user as a whole where `whole_B`, else of the category.

        Behaviors stand oldest first, padded behind; the recent ones newest first. This is what serving asks.
        """
        recent_BRd = self.norm(recent_BRd)
        pooled_Bd = self.short(recent_BRd, self.short.query_key(recent_BRd), recent_count_B)
        state_Bd = self.described(pooled_Bd, profile_BP)
        back_BN = newest_first(length_B, behavior_BNd.shape[1])
        behavior_BNd = behavior_BNd.gather(1, back_BN[:, :, None].expand_as(behavior_BNd))
        attended_Bd = self.attended(state_Bd, self.norm(behavior_BNd), kind_BN.gather(1, back_BN), length_B)
        user_Bd = self.context_vector(state_Bd, attended_Bd)
        return torch.where(whole_B[:, None], self.whole_vector(state_Bd), user_Bd)


def newest_first(length_B: Tensor, width: int) -> Tensor:
    """[B, N] places of the behaviors of rows that stand oldest first, from the newest on, then padding."""
    return (length_B[:, None] - 1 - torch.arange(width, device=length_B.device)).clamp(min=0)


class Ulim(Learner):
    """Both encoders for one store, trained on one-category batches."""

    method = "ulim"
    config: UlimConfig

    def __init__(self, store: Store, config: UlimConfig) -> None:
        super().__init__(store, config)
        self.user = UlimTower(
            config, max(1, len(store.behaviors)), [field.size for field in store.profile_fields]
        )
        self.log_corpus_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))
        self.log_meets = torch.zeros(store.n_categories)

    @property
    def corpus_scale(self) -> Tensor:
        """The inverse temperature of L_short: the whole corpus needs another than a category."""
        return self.log_corpus_scale.exp().clamp(max=MAX_SCALE)

    def sampling(self) -> Sampling:
        c = self.config
        return Sampling(
            packed=False,
            along="context",
            context_length=c.context_length,
            recent_length=c.recent_length,
            within=c.within,
            most=c.most,
            half_life=c.half_life,
            samples=c.samples_of_step(self.store.n_events),
            whole_up_to=c.whole_category_up_to,
            sampled_negatives=c.sampled_negatives,
        )

    def batches(self, until: int, held_out: bool = False) -> Batches:
        batches = Mingled(self.store, self.sampling(), until)
        if not held_out:
            parts = self.config.parts_of_shard * (self.config.shards or 1)
            self.log_meets = torch.from_numpy(log_meeting(batches, parts)).float()
        return batches

    def forward(
        self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """User vectors of a step's samples, in the category and as a whole, and vectors of its items."""
        token_Ud = self.tokens(rows_Ud, step, generator)
        normed_Ud = drop(self.user.norm(token_Ud), self.config.dropout, generator)
        row_S = torch.from_numpy(
            np.argsort(np.argsort(step.state))
        )  # one sample a row, in the buckets' order
        profile_SP = torch.cat([torch.from_numpy(b.profile) for b in step.buckets])[row_S]
        state_Sd = self.user.described(self._pooled(normed_Ud, step), profile_SP)
        back = [newest_first(torch.from_numpy(b.length), max(1, b.item.shape[1])) for b in step.buckets]
        item = [_column(b.item).gather(1, back_BN) for b, back_BN in zip(step.buckets, back, strict=True)]
        # looked up all at once: the gradient of each look-up is as large as all items of the step
        tokens = F.embedding(torch.cat([x.flatten() for x in item]), normed_Ud).split(
            [x.numel() for x in item]
        )
        of_bucket = torch.argsort(row_S).split([len(x) for x in item])
        attended = [
            self.user.attended(
                state_Sd[sample_B],
                token_Td.view(*back_BN.shape, -1),
                _column(bucket.kind).gather(1, back_BN),
                torch.from_numpy(bucket.length),
            )
            for bucket, sample_B, back_BN, token_Td in zip(step.buckets, of_bucket, back, tokens, strict=True)
        ]
        long_Sd = self.user.context_vector(state_Sd, torch.cat(attended)[row_S], generator)
        return long_Sd, self.user.whole_vector(state_Sd, generator), F.normalize(token_Ud, dim=-1)

    def _pooled(self, normed_Ud: Tensor, step: Step) -> Tensor:
        """[S, d] the short-term encoder, over samples of about as many recent behaviors at a time."""
        order = np.argsort(step.recent_count, kind="stable")
        recent_SR = torch.from_numpy(step.recent[order]).long()
        token_SRd = F.embedding(recent_SR, normed_Ud)
        query_key_SRe = F.embedding(recent_SR, self.user.short.query_key(normed_Ud))
        chunks = (
            x.split(_CHUNK) for x in (token_SRd, query_key_SRe, torch.from_numpy(step.recent_count[order]))
        )
        pooled = []
        for token_BRd, query_key_BRe, count_B in zip(*chunks, strict=True):
            width = max(1, int(count_B.max()))
            pooled.append(self.user.short(token_BRd[:, :width], query_key_BRe[:, :width], count_B))
        return torch.cat(pooled)[torch.from_numpy(np.argsort(order))]

    def loss(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        """`(alpha * L_long + beta * L_short) / (alpha + beta)`.

        L_short is given as if it had as many competitors as L_long, so that guessing evenly is `step.chance`.
        """
        c = self.config
        long_Sd, short_Sd, item_Ud = self(rows_Ud, step, generator)
        long_S = log_likelihood(long_Sd, item_Ud, self.item.scale, step)
        gain_S = self._gain(short_Sd, item_Ud, step, generator)
        total = c.long_weight * long_S.sum() + c.short_weight * (gain_S.sum() - step.chance)
        return -total / (c.long_weight + c.short_weight)

    def _gain(
        self, user_Sd: Tensor, item_Ud: Tensor, step: Step, generator: torch.Generator | None
    ) -> Tensor:
        """[S] log probability of the target among what competes in the step, above that of guessing evenly.

        A sampled softmax: the target against at most `corpus_negatives`, evenly drawn, of the items that
        compete in any contest of the step, each logit less the log probability of competing at all:
        `log_meets` of its category plus `Contest.log_q` within it. The even draw is the same for all.
        """
        place_n, log_q_n = self._competing(step)
        target_S = torch.from_numpy(step.target)
        log_q_S = log_q_n[torch.searchsorted(place_n, target_S)]
        if len(place_n) > self.config.corpus_negatives:
            drawn = torch.randperm(len(place_n), generator=generator or torch.Generator().manual_seed(0))
            drawn = drawn[: self.config.corpus_negatives]
            place_n, log_q_n = place_n[drawn], log_q_n[drawn]
        user_Sd = user_Sd * self.corpus_scale
        rival_Sn = user_Sd @ F.embedding(place_n, item_Ud).T
        own_S = (user_Sd * F.embedding(target_S, item_Ud)).sum(-1)
        return _above_even(own_S, rival_Sn, log_q_S, log_q_n, place_n == target_S[:, None])

    def _competing(self, step: Step) -> tuple[Tensor, Tensor]:
        """[n] places in `step.numbers` of the items that compete, ascending, and their log probability to."""
        place, log_q = [], []
        for contest in step.contests:
            candidate = contest.candidate
            at = np.arange(candidate.start, candidate.stop) if isinstance(candidate, slice) else candidate
            place.append(torch.from_numpy(at).long())
            within = torch.zeros(len(at)) if contest.log_q is None else torch.from_numpy(contest.log_q)
            log_q.append(within + self.log_meets[step.category[contest.samples.start]])
        return torch.cat(place), torch.cat(log_q)

    def export(self, folder: Path) -> dict[str, Any]:
        c, rows, N = self.config, 2, min(2, self.config.context_length)
        example = {
            "behavior": torch.zeros(rows, N, c.dim),
            "kind": torch.zeros(rows, N, dtype=torch.long),
            "length": torch.full((rows,), N),
            "profile": torch.zeros(rows, len(self.user.profile), dtype=torch.long),
            "recent": torch.zeros(rows, c.recent_length, c.dim),
            "recent_count": torch.full((rows,), c.recent_length),
            "whole": torch.zeros(rows, dtype=torch.bool),
        }
        axes = {name: {0: "row"} for name in example}
        for name in ("behavior", "kind"):
            axes[name][1] = "behavior"
        write_onnx(self.user, example, ["user"], axes, folder / "user_tower.onnx")
        return {
            "contexts": True,
            "corpus": True,
            "context_length": c.context_length,
            "recent_length": c.recent_length,
            "within": c.within,
            "corpus_scale": self.corpus_scale.item(),
        }


def _above_even(own_S: Tensor, rival_Sn: Tensor, log_q_S: Tensor, log_q_n: Tensor, same_Sn: Tensor) -> Tensor:
    """[S] log softmax of the target's corrected logit, above its value were all logits equal.

    `same_Sn`: where a rival is the target itself, which takes part only once.
    """
    rival_Sn = (rival_Sn - log_q_n).masked_fill(same_Sn, 2 * _NEVER)
    total_S = rival_Sn.logsumexp(-1).logaddexp(own_S - log_q_S)
    every = (-log_q_n).exp().sum()
    even_S = torch.where(same_Sn.any(-1), every, every + (-log_q_S).exp()).log()
    return own_S - total_S + even_S


def _column(x_BN: np.ndarray) -> Tensor:
    """Rows of no behavior get one of padding."""
    return torch.from_numpy(x_BN if x_BN.shape[1] else np.zeros((len(x_BN), 1), np.int64)).long()


class Mingled(Batches):
    """Steps of many small one-category batches, not of few large ones: all rows share a buffer.

    Contests are within categories all the same, but items of more categories meet in a step.
    """

    by_category = False

    def _buffer(self, rows: Rows) -> np.ndarray:
        return np.zeros(len(rows.group), np.int64)


def log_meeting(batches: Batches, parts: int) -> np.ndarray:
    """[C] log probability that a part of a step has samples of each category, by their shares of all samples.

    A category without samples counts as if it had one.
    """
    store = batches.store
    samples = np.zeros(store.n_categories)
    n_lines = len(batches.lines.start) - 1
    for at in range(0, n_lines, 1 << 20):
        rows = batches.rows(np.arange(at, min(at + (1 << 20), n_lines)), None)
        category = store.group_category[rows.group]
        samples += np.bincount(category, weights=batches.expected(rows), minlength=store.n_categories)
    of_part = batches.sampling.samples / parts
    return np.log(-np.expm1(-of_part * np.maximum(samples, 1) / max(1, samples.sum())))
