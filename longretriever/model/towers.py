"""The two towers of LongRetriever: behaviors of one context to a user vector, an item to an item vector.

The user tower of section 2.2: a pre-LayerNorm transformer over [CLS, profile tokens, behaviors of the
context, oldest first], with learnable positions and token types, its output normalised. No feature of the
candidate enters it. Two encoders: `packed` is causal, so that one pass over n behaviors yields n user
vectors, each knowing only what came before it; `cls` is the paper's, one sample a row and attention in both
directions.

Beyond the paper, each to be switched off: an attention over the user's most recent behaviors of any category,
so that a context without history still gets a good vector; how long ago the last behaviors were; and a
pointer that divides the next item's probability between those that the user met in this context and all.

B rows, M tokens of a row, T tokens of all rows, S user vectors, R recent behaviors, N behaviors of a context,
P profile fields, d width, k width of the pointer's keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longretriever.model.age import AGES
from longretriever.model.batches import Sampling, Step
from longretriever.model.config import TrainConfig
from longretriever.model.learner import ItemTower as ItemTower
from longretriever.model.learner import Learner, code_tables, drop, write_onnx
from longretriever.model.loss import log_likelihood
from longretriever.store.behaviors import Store

_POINTER = 16  # width of the pointer's keys
_NEVER = -1e4  # a logit for what must not be chosen; finite, so that its gradient is 0 and not NaN


class Block(nn.Module):
    """One pre-LayerNorm transformer layer over rows of several lengths at once.

    Linear maps run over all T tokens together; only attention sees the rows, one call for each shape.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = dropout

    def forward(
        self,
        x_Td: Tensor,
        shapes: Sequence[tuple[int, int]],
        masks: Sequence[Tensor] | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        dim = x_Td.shape[1]
        qkv_T3d = self.qkv(self.attention_norm(x_Td))
        attended = []
        one = len(shapes) == 1  # no split then: its sizes would be constants in the ONNX graph
        for i, part in enumerate([qkv_T3d] if one else qkv_T3d.split([B * M for B, M in shapes])):
            B, M = shapes[i]
            q, k, v = part.view(B, M, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
            mask = None if masks is None else masks[i]
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            attended.append(a.transpose(1, 2).reshape(B * M, dim))
        a_Td = attended[0] if one else torch.cat(attended)
        x_Td = x_Td + drop(self.out(a_Td), self.dropout, generator)
        fed_Td = self.narrow(F.gelu(self.widen(self.feed_norm(x_Td))))
        return x_Td + drop(fed_Td, self.dropout, generator)


class Encoder(nn.Module):
    """A pre-LayerNorm transformer over rows of [CLS, profile tokens, behaviors, oldest first].

    `kinds` is the number of kinds of behavior, `profile_sizes` the number of codes of each profile field.
    Behaviors come as item vectors (`ItemTower.embed`), so a tower itself is small: it is what goes to ONNX.
    """

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        context_length: int,
        kinds: int,
        profile_sizes: Sequence[int],
        causal: bool,
        dropout: float,
        bag: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.prefix = causal, 1 + len(profile_sizes)
        self.cls = nn.Parameter(torch.zeros(dim))
        self.profile = code_tables(profile_sizes, dim)
        self.position = nn.Parameter(torch.zeros(self.prefix + context_length, dim))
        self.token_type = nn.Embedding(self.prefix + kinds, dim)  # CLS, each profile field, each kind
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.norm, self.dropout = nn.LayerNorm(dim), dropout
        self.bag_norm = nn.LayerNorm(dim) if bag else None
        for table in (self.cls, self.position, self.token_type.weight):
            nn.init.normal_(table, std=0.02)

    def rows(self, behavior_BNd: Tensor, kind_BN: Tensor, profile_BP: Tensor) -> Tensor:
        """Tokens of one shape [B, prefix + N, d]: CLS, profile, then behaviors oldest first."""
        B, N, _ = behavior_BNd.shape
        types = self.token_type.weight
        prefix = [(self.cls + types[0]).expand(B, 1, -1)]
        prefix += [(field(profile_BP[:, i]) + types[1 + i])[:, None] for i, field in enumerate(self.profile)]
        behaviors = behavior_BNd + self.token_type(kind_BN + self.prefix)
        x_BMd = torch.cat([*prefix, behaviors], dim=1)
        return x_BMd + self.position[: self.prefix + N]

    def states(
        self,
        x_Td: Tensor,
        shapes: Sequence[tuple[int, int]],
        lengths: Sequence[Tensor],
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Run the transformer over tokens of rows of several shapes [B, M]: [T, d], row after row.

        `lengths[i]` [B] counts the behaviors of each row; what follows them is padding. The causal mask
        hides padding by itself since it stands at the end. `generator` draws what is dropped out.
        """
        masks = None
        if not self.causal:
            masks = [
                (torch.arange(M, device=x_Td.device) < self.prefix + n[:, None])[:, None, None, :]
                for (_, M), n in zip(shapes, lengths, strict=True)
            ]
        x_Td = drop(x_Td, self.dropout, generator)
        for block in self.blocks:
            x_Td = block(x_Td, shapes, masks, generator)
        return self.norm(x_Td)

    def of_step(self, behavior_Td: Tensor, step: Step, generator: torch.Generator | None) -> Tensor:
        """[T, d] states of all rows of a step, as `Step.state` numbers them.

        `behavior_Td` are the tokens of all behaviors, row after row, padding included.
        """
        first = np.cumsum([1, *(table.num_embeddings for table in self.profile)])  # CLS, fields, behaviors
        what, mark, shapes, kinds = [], [], [], len(self.token_type.weight)
        done = int(first[-1])
        for b in step.buckets:
            B, N = b.item.shape
            behavior = np.arange(done, done + B * N).reshape(B, N)
            what.append(np.c_[np.zeros(B, np.int64), b.profile + first[:-1], behavior].ravel())
            kind = np.c_[np.tile(np.arange(self.prefix), (B, 1)), b.kind + self.prefix]
            mark.append((np.arange(self.prefix + N) * kinds + kind).ravel())
            shapes.append((B, self.prefix + N))
            done += B * N
        table_Vd = torch.cat([self.cls[None], *self.profile.parameters(), behavior_Td])
        marks = self.position[:, None] + self.token_type.weight  # one look-up for both
        x_Td = F.embedding(_joined(what), table_Vd) + F.embedding(_joined(mark), marks.flatten(0, 1))
        return self.states(x_Td, shapes, [torch.from_numpy(b.length) for b in step.buckets], generator)

    def bags_of_step(self, behavior_Td: Tensor, step: Step) -> Tensor | None:
        """[S, d] the mean of the behaviors that each sample's state knows; None for a tower without bags.

        A difference of two running sums over all behaviors, in 64 bits, for they grow with the step.
        """
        if self.bag_norm is None:
            return None
        sum_Td = F.pad(self.bag_norm(behavior_Td).double().cumsum(0), (0, 0, 1, 0))
        is_behavior = [
            np.tile(np.arange(self.prefix + b.item.shape[1]) >= self.prefix, len(b.length))
            for b in step.buckets
        ]
        known_S = torch.from_numpy(step.past_count)
        state_S = torch.from_numpy(step.state) + (0 if self.causal else known_S + self.prefix - 1)
        last_S = _joined(is_behavior).cumsum(0)[state_S]  # of the behaviors of all rows
        mean_Sd = (sum_Td[last_S] - sum_Td[last_S - known_S]) / known_S.clamp(min=1)[:, None]
        return mean_Sd.to(behavior_Td.dtype)

    def bag(self, behavior_BNd: Tensor, length_B: Tensor) -> Tensor | None:
        """[B, d] the same of rows of one shape."""
        return None if self.bag_norm is None else _mean(self.bag_norm(behavior_BNd), length_B)

    def last(
        self, behavior_BNd: Tensor, kind_BN: Tensor, length_B: Tensor, profile_BP: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of rows of one shape, all states [B, M, d] and of each the one that knows the whole row [B, d]."""
        x_BMd = self.rows(behavior_BNd, kind_BN, profile_BP)
        B, M, d = x_BMd.shape
        state_BMd = self.states(x_BMd.flatten(0, 1), [(B, M)], [length_B]).view(B, M, d)
        slot_B = length_B + (self.prefix - 1) if self.causal else torch.zeros_like(length_B)
        return state_BMd, state_BMd.gather(1, slot_B[:, None, None].expand(B, 1, d))[:, 0]


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _mean(x_BNd: Tensor, length_B: Tensor) -> Tensor:
    """[B, d] of the first `length_B` of each row; 0 of none."""
    known_BN = torch.arange(x_BNd.shape[1], device=length_B.device) < length_B[:, None]
    return (x_BNd * known_BN[:, :, None]).sum(1) / length_B.clamp(min=1)[:, None]


class UserTower(Encoder):
    """Behaviors of one context, profile and recent behaviors in; a unit vector out."""

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        context_length: int,
        recent_length: int,
        kinds: int,
        profile_sizes: Sequence[int],
        causal: bool,
        dropout: float,
        bag: bool = False,
        ages: bool = False,
        returns: bool = False,
    ) -> None:
        super().__init__(
            dim=dim,
            layers=layers,
            heads=heads,
            context_length=context_length,
            kinds=kinds,
            profile_sizes=profile_sizes,
            causal=causal,
            dropout=dropout,
            bag=bag,
        )
        self.recent_length = recent_length
        if recent_length:
            self.recent_position = nn.Parameter(torch.randn(recent_length, dim) * 0.02)
            self.context_query = nn.Linear(dim, dim)
            self.recent_key = nn.Linear(dim, dim, bias=False)
            self.recent_value = nn.Linear(dim, dim)
        read = 1 + bag + bool(recent_length) + (bool(recent_length) or ages)
        self.mix = nn.Sequential(nn.Linear(read * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.since = nn.ModuleList([nn.Embedding(AGES, dim) for _ in range(2)]) if ages else None
        self.pointer = Pointer(dim, context_length) if returns else None

    def head(
        self,
        state_Sd: Tensor,
        bag_Sd: Tensor | None,
        context_Sd: Tensor,
        since_S2: Tensor,
        recent_SRd: Tensor,
        recent_count_S: Tensor,
    ) -> Tensor:
        """From states to [S, d], of which the user vectors are the direction.

        `recent_SRd` holds the recent behaviors newest first, padded behind; no recent behavior, no effect.
        """
        if self.since is not None:
            last, newest = self.since
            context_Sd = context_Sd + last(since_S2[:, 0]) + newest(since_S2[:, 1])
        read = [state_Sd]
        if self.recent_length:
            read.append(self._pooled(state_Sd + self.context_query(context_Sd), recent_SRd, recent_count_S))
        if self.recent_length or self.since is not None:
            read.append(context_Sd)
        if bag_Sd is not None:
            read.append(bag_Sd)
            state_Sd = state_Sd + bag_Sd
        return state_Sd + self.mix(torch.cat(read, dim=-1))

    def _pooled(self, query_Sd: Tensor, recent_SRd: Tensor, recent_count_S: Tensor) -> Tensor:
        """[S, d] the recent behaviors, each as far as the query wants it.

        Keys and values are projected on the query's side, S times instead of S * R times.
        """
        query_Sd = query_Sd @ self.recent_key.weight / math.sqrt(query_Sd.shape[1])
        score_SR = torch.bmm(recent_SRd, query_Sd[:, :, None])[..., 0] + query_Sd @ self.recent_position.T
        absent_SR = torch.arange(recent_SRd.shape[1], device=query_Sd.device) >= recent_count_S[:, None]
        weight_SR = score_SR.masked_fill(absent_SR, _NEVER).softmax(-1).masked_fill(absent_SR, 0.0)
        pooled_Sd = torch.bmm(weight_SR[:, None], recent_SRd)[:, 0] + weight_SR @ self.recent_position
        return self.recent_value(pooled_Sd) * (recent_count_S > 0)[:, None]

    def forward(
        self,
        behavior_BNd: Tensor,
        kind_BN: Tensor,
        age_BN: Tensor,
        length_B: Tensor,
        profile_BP: Tensor,
        context_Bd: Tensor,
        since_B2: Tensor,
        recent_BRd: Tensor,
        recent_count_B: Tensor,
    ) -> tuple[Tensor, ...]:
        """[B, d] one user vector for each row: what serving asks, and the reference for `packed`.

        With a pointer, also [B, 1 + N] log shares of probability: of all items by their vectors, then of
        each behavior's item (see `Pointer`).
        """
        state_BMd, state_Bd = self.last(behavior_BNd, kind_BN, length_B, profile_BP)
        bag_Bd = self.bag(behavior_BNd, length_B)
        hidden_Bd = self.head(state_Bd, bag_Bd, context_Bd, since_B2, recent_BRd, recent_count_B)
        user_Bd = F.normalize(hidden_Bd, dim=-1)
        if self.pointer is None:
            return (user_Bd,)
        N = state_BMd.shape[1] - self.prefix
        back_BN = length_B[:, None] - 1 - torch.arange(N, device=length_B.device)  # from the newest, 0
        key_BNk = self.pointer.key(state_BMd[:, self.prefix :])
        return user_Bd, self.pointer(hidden_Bd, key_BNk, back_BN, age_BN, back_BN >= 0)


class Pointer(nn.Module):
    """How probability is divided between items met in this context, behavior by behavior, and all items.

    Each behavior that the state knows gets a logit by what it is, how many behaviors and how long ago it was;
    one more stands for all items of the category, which their vectors then share out. An item's part is that
    of all its behaviors together (the sentinel mixture of pointer networks).
    """

    def __init__(self, dim: int, context_length: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(dim, _POINTER), nn.Linear(dim, _POINTER)
        self.explore = nn.Linear(dim, 1)
        self.by_rank = nn.Parameter(torch.zeros(context_length))
        self.by_age = nn.Parameter(torch.zeros(AGES))

    def forward(
        self, hidden_Sd: Tensor, key_SNk: Tensor, back_SN: Tensor, age_SN: Tensor, known_SN: Tensor
    ) -> Tensor:
        """[S, 1 + N] log shares, which sum to 1 as probabilities: of all items, then of each behavior.

        `back_SN` may be [N], if it is the same for all.
        """
        query_Sk = self.query(hidden_Sd) / math.sqrt(_POINTER)
        logit_SN = torch.bmm(key_SNk, query_Sk[:, :, None])[..., 0]
        logit_SN = logit_SN + self.by_rank[back_SN.clamp(min=0)] + self.by_age[age_SN]
        logit_SN = logit_SN.masked_fill(~known_SN, _NEVER)
        return torch.cat([self.explore(hidden_Sd), logit_SN], dim=1).log_softmax(-1)


class Encoded(NamedTuple):
    """What a step's samples became."""

    user: Tensor  # [S, d] of length 1
    item: Tensor  # [U, d] of length 1
    shares: Tensor | None  # [S, 1 + N] see `Pointer`


class LongRetriever(Learner):
    """Both towers for one store, trained on one-category batches."""

    method = "longretriever"
    config: TrainConfig

    def __init__(self, store: Store, config: TrainConfig) -> None:
        super().__init__(store, config)
        self.user = UserTower(
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            context_length=config.context_length,
            recent_length=config.recent_length + config.life_sample,
            kinds=max(1, len(store.behaviors)),
            profile_sizes=[field.size for field in store.profile_fields],
            causal=config.encoder == "packed",
            dropout=config.dropout,
            bag=config.bag,
            ages=config.ages,
            returns=config.returns,
        )

    def sampling(self) -> Sampling:
        return self.config.sampling(self.store.n_events)

    def forward(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Encoded:
        """User vectors of a step's samples and item vectors of its items."""
        token_Ud = self.tokens(rows_Ud, step, generator)
        behavior_Td, recent_SRd = self.looked_up(token_Ud, step)
        states = self.user.of_step(behavior_Td, step, generator)
        hidden_Sd = self.user.head(
            states[torch.from_numpy(step.state)],
            self.user.bags_of_step(behavior_Td, step),
            self.item.category(torch.from_numpy(step.category)),
            torch.from_numpy(step.since),
            recent_SRd,
            torch.from_numpy(step.recent_count),
        )
        shares = None if self.user.pointer is None else self._shares(hidden_Sd, states, step)
        return Encoded(F.normalize(hidden_Sd, dim=-1), F.normalize(token_Ud, dim=-1), shares)

    def _shares(self, hidden_Sd: Tensor, states_Td: Tensor, step: Step) -> Tensor:
        assert self.user.pointer is not None
        key_Tk = self.user.pointer.key(states_Td)
        back_N = torch.arange(step.past.shape[1])
        return self.user.pointer(
            hidden_Sd,
            F.embedding(torch.from_numpy(step.past), key_Tk),
            back_N,
            torch.from_numpy(step.past_age),
            back_N < torch.from_numpy(step.past_count)[:, None],
        )

    def loss(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy of the target in its contest; with a pointer, of the mixture with returns.

        `p = share(all) * softmax(v | u, c) + sum of share(b) over behaviors b of the target`. The vectors
        also learn from the softmax alone, by `explore_weight`: targets that the pointer explains would teach
        them little otherwise.
        """
        user_Sd, item_Ud, shares = self(rows_Ud, step, generator)
        explored_S = log_likelihood(user_Sd, item_Ud, self.item.scale, step)
        if shares is None:
            return -explored_S.sum()
        mixed_S = mixture(explored_S, shares, torch.from_numpy(step.past_item == step.target[:, None]))
        weight = self.config.explore_weight if generator is not None else 0.0
        return -(mixed_S.sum() + weight * explored_S.sum()) / (1 + weight)

    def export(self, folder: Path) -> dict[str, Any]:
        export_user_tower(self.user, self.config.dim, folder / "user_tower.onnx")
        c = self.config
        return {
            "contexts": True,
            "corpus": False,
            "context_length": c.context_length,
            "recent_length": c.recent_length,
            "life_sample": c.life_sample,
            "within": c.within,
            "whole_share": c.whole_share,
        }


def mixture(explored_S: Tensor, shares_S: Tensor, same_SN: Tensor) -> Tensor:
    """[S] log probability of the target: found by vectors, or by pointing at a behavior of the same item."""
    returned_S = shares_S[:, 1:].masked_fill(~same_SN, 4 * _NEVER)
    every = torch.cat([(shares_S[:, 0] + explored_S)[:, None], returned_S], dim=1)
    return every.logsumexp(-1)


def export_user_tower(user: UserTower, dim: int, file: Path) -> None:
    """Write the user tower as ONNX, any number of rows, any length up to the context length."""
    rows, N, R = 2, min(3, user.position.shape[0] - user.prefix), user.recent_length
    example = {
        "behavior": torch.zeros(rows, N, dim),
        "kind": torch.zeros(rows, N, dtype=torch.long),
        "age": torch.zeros(rows, N, dtype=torch.long),
        "length": torch.full((rows,), N),
        "profile": torch.zeros(rows, len(user.profile), dtype=torch.long),
        "context": torch.zeros(rows, dim),
        "since": torch.zeros(rows, 2, dtype=torch.long),
        "recent": torch.zeros(rows, R, dim),
        "recent_count": torch.full((rows,), R),
    }
    axes = {name: {0: "row"} for name in example}
    for name in ("behavior", "kind", "age"):
        axes[name][1] = "behavior"
    outputs = ["user"] if user.pointer is None else ["user", "shares"]
    write_onnx(user, example, outputs, axes, file)
