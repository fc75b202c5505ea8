"""Which category comes next? A pointer to those that the user met, a generator of all, a gate between them.

PGIN, the selection of interests in ULIM (arXiv 2507.10097): `P(c | u) = g * pointer(c) + (1 - g) *
generator(c)`, trained by cross-entropy on the category of the next behavior. Equation 3 of LongRetriever
cannot reach a category that the user never met; the generator can.

The pointer gives each distinct category of the whole life a logit by how often and how lately it was met
(`history.py`) and by the state of the user. The generator sees the raw sequence of recent behaviors by
self-attention, the long history pooled, and the profile.

B requests, P categories met, R recent behaviors, F features, C categories, d width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longretriever.model.age import AGES
from longretriever.model.batches import of_heavy
from longretriever.model.config import PginConfig
from longretriever.model.fading import weight
from longretriever.model.history import FEATURES, GENERAL, Histories, histories
from longretriever.model.learner import ItemRows, code_tables, drop, write_onnx
from longretriever.saved import Folder
from longretriever.store.behaviors import Store

_NEVER = -1e4
_WIDTHS = np.array([2, 4, 8, 16, 32, 64])  # categories met, of requests that are computed together
_LEAST = 1e-9  # a probability: where neither part reaches the target, the loss stays finite


class Pgin(nn.Module):
    """Probabilities of the next category."""

    def __init__(self, config: PginConfig, categories: int, profile_sizes: list[int]) -> None:
        super().__init__()
        d, self.config = config.dim, config
        self.category = nn.Embedding(categories, d)
        self.age = nn.Embedding(AGES, d)
        self.position = nn.Parameter(torch.randn(config.recent_length, d) * 0.02)
        self.profile = code_tables(profile_sizes, d)
        self.general = nn.Linear(GENERAL, d)
        self.norm = nn.LayerNorm(d)
        self.query, self.read, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.long_weight = nn.Linear(FEATURES, 1)
        self.state = nn.Sequential(nn.Linear(3 * d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.by_feature, self.by_state = nn.Linear(FEATURES, d), nn.Linear(d, d)
        self.by_category, self.point = nn.Linear(d, d), nn.Linear(d, 1)
        self.generate, self.gate = nn.Linear(d, d), nn.Linear(d, 1)
        self.bias = nn.Parameter(torch.zeros(categories))
        for table in (self.category, self.age):
            nn.init.normal_(table.weight, std=0.1)

    def forward(
        self,
        category_BP: Tensor,
        feature_BPF: Tensor,
        recent_BR: Tensor,
        age_BR: Tensor,
        general_BG: Tensor,
        profile_BK: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """[B, C] probabilities; -1 in `category_BP` and `recent_BR` pads."""
        met_BP = category_BP >= 0
        token_BPd = self.category(category_BP.clamp(min=0))
        short_Bd, newest_Bd = self._short(recent_BR, age_BR, general_BG, profile_BK, generator)
        weight_BP = self.long_weight(feature_BPF)[..., 0].masked_fill(~met_BP, _NEVER).softmax(-1)
        long_Bd = (weight_BP[:, None] @ token_BPd)[:, 0]
        state_Bd = drop(
            self.state(torch.cat([short_Bd, newest_Bd, long_Bd], dim=-1)), self.config.dropout, generator
        )
        generated_BC = self.generate(state_Bd) @ self.category.weight.T + self.bias
        if not self.config.pointer:
            return generated_BC.softmax(-1)
        hidden_BPd = self.by_feature(feature_BPF) + self.by_category(token_BPd)
        hidden_BPd = nn.functional.gelu(hidden_BPd + self.by_state(state_Bd)[:, None])
        logit_BP = self.point(hidden_BPd)[..., 0].masked_fill(~met_BP, _NEVER)
        pointed_BP = logit_BP.softmax(-1) * met_BP
        pointed_BC = torch.zeros_like(generated_BC).scatter_add(1, category_BP.clamp(min=0), pointed_BP)
        if not self.config.generator:
            return pointed_BC
        gate_B1 = self.gate(state_Bd).sigmoid() * met_BP.any(1, keepdim=True)
        return gate_B1 * pointed_BC + (1 - gate_B1) * generated_BC.softmax(-1)

    def _short(
        self,
        recent_BR: Tensor,
        age_BR: Tensor,
        general_BG: Tensor,
        profile_BK: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """[B, d] the user as a token that has attended to the recent behaviors; and the newest of them."""
        user_Bd = self.general(general_BG)
        for i, table in enumerate(self.profile):
            user_Bd = user_Bd + table(profile_BK[:, i])
        there_BR = recent_BR >= 0
        token_BRd = (
            self.category(recent_BR.clamp(min=0)) + self.age(age_BR) + self.position[: recent_BR.shape[1]]
        )
        x_BMd = self.norm(torch.cat([user_Bd[:, None], token_BRd], dim=1))
        B, _, d = x_BMd.shape
        # Of one layer's self-attention only the user's token is read, so only that is computed; and keys and
        # values are projected on its side, once instead of M times (a bias of keys would change nothing).
        H, k = self.config.heads, d // self.config.heads
        key_Hkd, value_Hkd = self.read.weight.view(2, H, k, d)
        query_BHk = self.query(x_BMd[:, 0]).view(B, H, k)
        query_BHd = torch.einsum("bhk,hkd->bhd", query_BHk, key_Hkd)
        absent_BM = torch.cat([torch.zeros_like(there_BR[:, :1]), ~there_BR], dim=1)
        score_BHM = query_BHd @ x_BMd.transpose(1, 2) / math.sqrt(k)
        weight_BHM = score_BHM.masked_fill(absent_BM[:, None], _NEVER).softmax(-1)
        read_BHk = torch.einsum("bhd,hkd->bhk", weight_BHM @ x_BMd, value_Hkd) + self.read.bias[d:].view(H, k)
        read_Bd = read_BHk.reshape(B, d)
        short_Bd = user_Bd + drop(self.out(read_Bd), self.config.dropout, generator)
        return short_Bd, token_BRd[:, 0] * there_BR[:, :1]


class Requests(NamedTuple):
    """A step of samples as arrays, or a part of one."""

    numbers: np.ndarray  # [0]: no item rows are needed
    histories: Histories
    profile: np.ndarray  # [S, K]
    target: np.ndarray  # [S] category numbers
    n_categories: int

    @property
    def samples(self) -> int:
        return len(self.target)

    @property
    def chance(self) -> float:
        """Summed loss of guessing evenly."""
        return self.samples * math.log(self.n_categories)

    @property
    def tokens(self) -> int:
        return int((self.histories.recent >= 0).sum())

    @property
    def padded(self) -> int:
        return self.histories.recent.size


class Lessons:
    """The samples of a store: events at or before `until`, of heavy users only some.

    A user of n events has about `min(n, most)` samples, so that a few do not outweigh all others. Everything
    is asked just before the event, or some events earlier (see `PginConfig.distance`).
    """

    def __init__(self, store: Store, config: PginConfig, until: int, held_out: bool) -> None:
        self.store, self.config, self.until, self.held_out = store, config, until, held_out
        self.user_start = store.group_start[store.user_group].astype(np.int64)
        self.users = slice(0, store.n_users)
        self.key: tuple[int, ...] = ()
        self.step_samples = config.samples_of_step(self.n_samples)

    @cached_property
    def n_samples(self) -> int:
        """Of one epoch, about."""
        return round(sum(float(share.sum()) for _, share in self._kept()))

    def _kept(self) -> Iterator[tuple[int, np.ndarray]]:
        """The share of events like each that an epoch draws, in parts, since the log may exceed memory.

        With the position of the first of each part.
        """
        c, size = self.config, np.diff(self.user_start[: self.users.stop + 1])
        for at in range(self.users.start, self.users.stop, 1 << 16):
            part = size[at : at + (1 << 16)]
            share = np.repeat(of_heavy(part, c.most), part)
            first = int(self.user_start[at])
            if c.half_life:
                row = np.asarray(self.store.time_order[first : first + len(share)], np.int64)
                share *= weight(self.store.event_time[row], self.until, c.half_life)
            yield first, share

    def expected_of_users(self) -> np.ndarray:
        """[U] how many samples of each user an epoch draws, on average."""
        parts, start = [np.zeros(0)], self.user_start
        for first, share in self._kept():
            a, b = np.searchsorted(start, [first, first + len(share)])
            parts.append(np.diff(np.r_[0, np.cumsum(share)][start[a : b + 1] - first]))
        return np.concatenate(parts)

    def shard(self, nth: int, users: slice, step_samples: int) -> Lessons:
        """The samples of a range of users, in steps of so many."""
        part = copy(self)
        part.__dict__.pop("n_samples", None)
        part.key, part.users, part.step_samples = (nth,), users, step_samples
        return part

    def epoch(self, seed: int, epoch: int) -> Iterator[np.ndarray]:
        """Steps of positions in `Store.time_order`; the order depends on (seed, epoch, shard) alone."""
        rng = np.random.default_rng([seed, epoch, *self.key])
        chosen = [first + np.flatnonzero(rng.random(len(share)) < share) for first, share in self._kept()]
        return self._steps(rng.permutation(np.concatenate([np.zeros(0, np.int64), *chosen])))

    def after(self, when: int, limit: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Steps of about `limit` samples later than `when`, evenly over the events there."""
        first, last = self.user_start[self.users.start], self.user_start[self.users.stop]
        late = first + np.flatnonzero(self.store.event_time[first:last] > when)
        late = self.store.time_position[late[self.store.event_time[late] <= self.until]]
        return list(self._steps(rng.permutation(late)[:limit].astype(np.int64)))

    def _steps(self, positions: np.ndarray) -> Iterator[np.ndarray]:
        for at in range(0, len(positions), self.step_samples):
            yield positions[at : at + self.step_samples]

    def assemble(self, positions: np.ndarray, rng: np.random.Generator, parts: int = 1) -> list[Requests]:
        """Read from the store all that a step needs."""
        store = self.store
        event = store.time_order[positions]
        positions = positions[store.event_time[event] <= self.until]
        user = np.searchsorted(self.user_start, positions, side="right") - 1
        asked = self._asked(positions, self.user_start[user], rng)
        target = store.item_category[store.event_item[store.time_order[positions]]].astype(np.int64)
        now = store.event_time[store.time_order[asked]].astype(np.int64)
        return [
            self._requests(user[at], now[at], target[at])
            for at in np.array_split(np.arange(len(positions)), min(parts, max(1, len(positions))))
            if len(at)
        ]

    def _asked(self, positions: np.ndarray, begin: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        c = self.config
        if self.held_out or c.distance == 0:
            return positions
        room = np.minimum(positions - begin, c.horizon)
        back = np.exp(rng.random(len(positions)) * np.log1p(room)).astype(np.int64)
        far = rng.random(len(positions)) < c.distance
        return np.where(far, positions - np.minimum(back, room), positions)

    def _requests(self, user: np.ndarray, now: np.ndarray, target: np.ndarray) -> Requests:
        c = self.config
        past = histories(self.store, user, now, categories=c.categories, recent=c.recent_length)
        profile = self.store.profile[user].astype(np.int64)
        return Requests(np.empty(0, np.int64), past, profile, target, self.store.n_categories)


class PginLearner(nn.Module):
    """PGIN as the training loop sees it."""

    kind = "interests"

    def __init__(self, store: Store, config: PginConfig) -> None:
        super().__init__()
        self.store, self.config = store, config
        self.pgin = Pgin(config, store.n_categories, [field.size for field in store.profile_fields])

    def batches(self, until: int, held_out: bool = False) -> Lessons:
        return Lessons(self.store, self.config, until, held_out)

    def first_rows(
        self,
        until: int,
        generator: torch.Generator,
        work: Path | None = None,
        items: Sequence[slice] | None = None,
    ) -> Tensor:
        return torch.empty(0, self.config.dim)

    def loss(self, rows_Ud: Tensor, step: Requests, generator: torch.Generator | None = None) -> Tensor:
        """Summed cross-entropy of the next category, in nats.

        Requests of about as many categories together: most users met few, and padded to those who met many
        they would take ten times as long.
        """
        past = step.histories
        met_S, recent_S = (past.category >= 0).sum(1), (past.recent >= 0).sum(1)
        order = np.argsort(met_S, kind="stable")
        total = torch.zeros(())
        for part in np.split(order, np.searchsorted(met_S[order], _WIDTHS, side="right")):
            if len(part):
                P, R = max(1, met_S[part].max()), max(1, recent_S[part].max())
                category, feature = past.category[part, :P], past.feature[part, :P]
                recent, age = past.recent[part, :R], past.age[part, :R]
                inputs = (category, feature, recent, age, past.general[part], step.profile[part])
                probability_BC = self.pgin(*map(torch.from_numpy, inputs), generator)
                target_B = torch.from_numpy(step.target[part])
                total = total - (probability_BC.gather(1, target_B[:, None]) + _LEAST).log().sum()
        return total

    def write(self, folder: Folder, rows: ItemRows) -> dict[str, Any]:
        """Write what `retrieve.interests.Pgin` opens; returns facts for its manifest."""
        c, K = self.config, len(self.pgin.profile)
        example = {
            "category": torch.zeros(2, 3, dtype=torch.long),
            "feature": torch.zeros(2, 3, FEATURES),
            "recent": torch.zeros(2, c.recent_length, dtype=torch.long),
            "age": torch.zeros(2, c.recent_length, dtype=torch.long),
            "general": torch.zeros(2, GENERAL),
            "profile": torch.zeros(2, K, dtype=torch.long),
        }
        axes = {name: {0: "request"} for name in example}
        axes["category"][1] = axes["feature"][1] = "category"
        write_onnx(self.pgin, example, ["probability"], axes, folder.path / "pgin.onnx")
        return {"categories": c.categories, "recent_length": c.recent_length}
