"""The two towers: a user vector for each context, an item vector for each item, compared by cosine.

User tower (LongRetriever section 2.2): `[CLS, profile tokens, behaviors of one context]` with position and
token-type embeddings through a pre-LayerNorm transformer. Two encoders share every weight and differ in
the mask and in where the state is read:

- `cls`: attention in both directions, the state is the CLS output; one row gives one user vector.
- `packed`: causal attention, the state after each token is the user vector of that prefix; one row of n
  behaviors gives n + 1 user vectors, so one pass trains every prefix.

The state then looks at the user's most recent behaviors of any category (attention whose query is the
state), because a context that was last visited months ago knows nothing of this week (ULIM's short term).
No feature of the candidate enters. The item tower is a sum of embeddings: item, category, features.

B rows, M tokens of a row, T tokens of all rows, S user vectors, R recent behaviors, P profile fields,
d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longretriever.model.batches import Step
from longretriever.model.config import TrainConfig
from longretriever.store.behaviors import Store

FIRST_TEMPERATURE = 0.2
"""Random vectors must not be sharply wrong: from 0.07, small logs spend their training on unlearning."""

MAX_SCALE = 50.0
"""Bound on the inverse temperature, without which a category of few items drives it up for ever."""


def drop(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Dropout whose randomness is an argument, so that parts of a step can run side by side and repeat.

    One byte decides for each number, so the rate is rounded to 1/256. Without a generator nothing is dropped.
    """
    if generator is None or rate == 0:
        return x
    least = round(256 * rate)
    byte = torch.empty(x.shape, dtype=torch.uint8, device=x.device).random_(0, 256, generator=generator)
    return x * (byte >= least) * (256 / (256 - least))


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


def _code_tables(sizes: Sequence[int], dim: int) -> nn.ModuleList:
    tables = [nn.Embedding(size, dim) for size in sizes]
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(table.weight[0])  # code 0, missing or unknown, starts as no information
    return nn.ModuleList(tables)


class UserTower(nn.Module):
    """Behaviors of one context, profile and recent behaviors in; a unit vector out.

    `kinds` is the number of kinds of behavior, `profile_sizes` the number of codes of each profile field.
    Behaviors come as item vectors (`ItemTower.embed`), so the tower itself is small: it is what goes to ONNX.
    """

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
    ) -> None:
        super().__init__()
        self.causal, self.prefix = causal, 1 + len(profile_sizes)
        self.cls = nn.Parameter(torch.zeros(dim))
        self.profile = _code_tables(profile_sizes, dim)
        self.position = nn.Parameter(torch.zeros(self.prefix + context_length, dim))
        self.token_type = nn.Embedding(self.prefix + kinds, dim)  # CLS, each profile field, each kind
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.norm, self.dropout = nn.LayerNorm(dim), dropout
        self.recent_position = nn.Parameter(torch.zeros(recent_length, dim))
        self.context_query = nn.Linear(dim, dim)
        self.recent_key = nn.Linear(dim, dim, bias=False)
        self.recent_value = nn.Linear(dim, dim)
        self.mix = nn.Sequential(nn.Linear(3 * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        for table in (self.cls, self.position, self.recent_position, self.token_type.weight):
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
        self, rows: Sequence[Tensor], lengths: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> Tensor:
        """Run the transformer over rows of several shapes: [T, d], row after row, shape after shape.

        `lengths[i]` [B] counts the behaviors of each row; what follows them is padding. The causal mask
        hides padding by itself since it stands at the end. `generator` draws what is dropped out.
        """
        shapes = [(x.shape[0], x.shape[1]) for x in rows]
        masks = None
        if not self.causal:
            masks = [
                (torch.arange(x.shape[1], device=x.device) < self.prefix + n[:, None])[:, None, None, :]
                for x, n in zip(rows, lengths, strict=True)
            ]
        flat = [x.reshape(-1, x.shape[-1]) for x in rows]
        x_Td = drop(flat[0] if len(flat) == 1 else torch.cat(flat), self.dropout, generator)
        for block in self.blocks:
            x_Td = block(x_Td, shapes, masks, generator)
        return self.norm(x_Td)

    def slot(self, n_before: Tensor) -> Tensor:
        """Where in a row the state stands that knows exactly the first `n_before` behaviors."""
        return n_before + (self.prefix - 1) if self.causal else torch.zeros_like(n_before)

    def head(
        self, state_Sd: Tensor, context_Sd: Tensor, recent_SRd: Tensor, recent_count_S: Tensor
    ) -> Tensor:
        """From states to user vectors [S, d] of length 1.

        `recent_SRd` holds the recent behaviors newest first, padded behind; no recent behavior, no effect.
        Keys and values are projected on the query's side, S times instead of S * R times.
        """
        query_Sd = state_Sd + self.context_query(context_Sd)
        query_Sd = query_Sd @ self.recent_key.weight / math.sqrt(state_Sd.shape[1])
        score_SR = torch.bmm(recent_SRd, query_Sd[:, :, None])[..., 0] + query_Sd @ self.recent_position.T
        absent_SR = torch.arange(recent_SRd.shape[1], device=state_Sd.device) >= recent_count_S[:, None]
        weight_SR = score_SR.masked_fill(absent_SR, -1e4).softmax(-1).masked_fill(absent_SR, 0.0)
        pooled_Sd = torch.bmm(weight_SR[:, None], recent_SRd)[:, 0] + weight_SR @ self.recent_position
        pooled_Sd = self.recent_value(pooled_Sd) * (recent_count_S > 0)[:, None]
        mixed_Sd = self.mix(torch.cat([state_Sd, pooled_Sd, context_Sd], dim=-1))
        return F.normalize(state_Sd + mixed_Sd, dim=-1)

    def forward(
        self,
        behavior_BNd: Tensor,
        kind_BN: Tensor,
        length_B: Tensor,
        profile_BP: Tensor,
        context_Bd: Tensor,
        recent_BRd: Tensor,
        recent_count_B: Tensor,
    ) -> Tensor:
        """[B, d] one user vector for each row: what serving asks, and the reference for `packed`."""
        x_BMd = self.rows(behavior_BNd, kind_BN, profile_BP)
        B, M, d = x_BMd.shape
        state_BMd = self.states([x_BMd], [length_B]).view(B, M, d)
        state_Bd = state_BMd.gather(1, self.slot(length_B)[:, None, None].expand(B, 1, d))[:, 0]
        return self.head(state_Bd, context_Bd, recent_BRd, recent_count_B)


class ItemTower(nn.Module):
    """An item is the sum of its own row, its category's and its features'; its vector is that, normalised.

    The item rows are not a parameter here: a step gathers the few that it needs and updates only those
    (see `ItemRows`). The sum, unnormalised, is also what the user tower reads as a behavior.
    """

    def __init__(self, *, dim: int, categories: int, feature_sizes: Sequence[int]) -> None:
        super().__init__()
        self.category = nn.Embedding(categories, dim)
        self.features = _code_tables(feature_sizes, dim)
        nn.init.normal_(self.category.weight, std=0.05)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def embed(self, row_Id: Tensor, category_I: Tensor, feature_IF: Tensor) -> Tensor:
        x_Id = row_Id + self.category(category_I)
        for i, table in enumerate(self.features):
            x_Id = x_Id + table(feature_IF[:, i])
        return x_Id

    @property
    def scale(self) -> Tensor:
        """The inverse of the learnable temperature, at most `MAX_SCALE`."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)


class ItemRows:
    """The embedding rows of all items, of which a step reads and writes only those it names.

    Row-wise Adagrad: one number of state for each row, so 4M items of width 64 take 1 GB, not 3.
    """

    def __init__(self, items: int, dim: int, generator: torch.Generator, lr: float) -> None:
        self.weight = torch.randn(items, dim, generator=generator) * 0.05
        self.sum_of_squares = torch.zeros(items)
        self.lr = lr

    def gather(self, numbers: Tensor) -> Tensor:
        """The named rows, as a leaf to take the gradient of."""
        return self.weight[numbers].requires_grad_()

    def update(self, numbers: Tensor, rows: Tensor, grad: Tensor, factor: float = 1.0) -> None:
        """Apply the gradient of the named rows; `factor` is the schedule's part of the rate."""
        self.sum_of_squares[numbers] += grad.square().mean(dim=1)
        step = self.lr * factor / (self.sum_of_squares[numbers].sqrt() + 1e-10)
        self.weight[numbers] = rows.detach() - grad * step[:, None]


class Towers(nn.Module):
    """Both towers for one store; the dense part of a model."""

    def __init__(self, store: Store, config: TrainConfig) -> None:
        super().__init__()
        self.user = UserTower(
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            context_length=config.context_length,
            recent_length=config.recent_length,
            kinds=max(1, len(store.behaviors)),
            profile_sizes=[field.size for field in store.profile_fields],
            causal=config.encoder == "packed",
            dropout=config.dropout,
        )
        self.item = ItemTower(
            dim=config.dim,
            categories=store.n_categories,
            feature_sizes=[field.size for field in store.item_fields],
        )

    def forward(
        self, rows_Ud: Tensor, step: Step, store: Store, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """User vectors [S, d] of a step's samples and item vectors [U, d] of its items."""
        category_U = torch.from_numpy(store.item_category[step.numbers]).long()
        feature_UF = torch.from_numpy(store.item_feature[step.numbers]).long()
        token_Ud = self.item.embed(rows_Ud, category_U, feature_UF)
        rows = [
            self.user.rows(
                F.embedding(torch.from_numpy(b.item).long(), token_Ud),
                torch.from_numpy(b.kind),
                torch.from_numpy(b.profile),
            )
            for b in step.buckets
        ]
        states = self.user.states(rows, [torch.from_numpy(b.length) for b in step.buckets], generator)
        user_Sd = self.user.head(
            states[torch.from_numpy(step.state)],
            self.item.category(torch.from_numpy(step.category)),
            F.embedding(torch.from_numpy(step.recent).long(), token_Ud),
            torch.from_numpy(step.recent_count),
        )
        return user_Sd, F.normalize(token_Ud, dim=-1)
