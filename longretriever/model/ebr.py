"""What does one vector for a whole user retrieve? EBR: the dual tower that LongRetriever is compared with.

The user tower reads [CLS, profile, the last 200 behaviors of any category], its normalised output is the one
user vector, and that searches all items. Batches mix categories, and items of any category compete: those of
the batch itself and evenly drawn ones, corrected by the log probability of competing, or the whole corpus
where it is small. No category of the target enters.

As with LongRetriever there are two encoders: `packed` is causal along the user's life, so that one pass
over 200 behaviors yields 151 samples, each of which sees at least the 50 behaviors before it; `cls` reads
one sample a row, in both directions. `EbrConfig()` is this method as good as we can make it;
`EbrConfig.paper()` is what LongRetriever's section 3.1 describes.

U items of a step, S samples, B rows, N behaviors of a row, P profile fields, d width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longretriever.model.batches import Sampling, Step
from longretriever.model.config import EbrConfig
from longretriever.model.learner import Learner, write_onnx
from longretriever.model.loss import log_likelihood
from longretriever.model.towers import Encoder
from longretriever.model.warm import need_implicit
from longretriever.store.behaviors import Store

_OVERLAP = 4
"""A packed row repeats a 4th of its length from the row before it, so that few samples see a short past."""


class LifeTower(Encoder):
    """The last behaviors of any category and the profile in; the user's one vector, of length 1, out."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        dim = len(self.cls)
        read = 1 + (self.bag_norm is not None)
        self.mix = nn.Sequential(nn.Linear(read * dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def head(self, state_Sd: Tensor, bag_Sd: Tensor | None) -> Tensor:
        """[S, d] user vectors of states, and of the means of the behaviors that they know."""
        if bag_Sd is None:
            return F.normalize(state_Sd + self.mix(state_Sd), dim=-1)
        return F.normalize(state_Sd + bag_Sd + self.mix(torch.cat([state_Sd, bag_Sd], dim=-1)), dim=-1)

    def forward(self, behavior_BNd: Tensor, kind_BN: Tensor, length_B: Tensor, profile_BP: Tensor) -> Tensor:
        """[B, d] one user vector for each row: what serving asks, and the reference for `packed`."""
        state_Bd = self.last(behavior_BNd, kind_BN, length_B, profile_BP)[1]
        return self.head(state_Bd, self.bag(behavior_BNd, length_B))


class Ebr(Learner):
    """Both towers for one store, trained on batches of all categories."""

    method = "ebr"
    config: EbrConfig

    def __init__(self, store: Store, config: EbrConfig) -> None:
        super().__init__(store, config)
        if config.factors != 0:
            need_implicit()  # now, and not after training
        self.user = LifeTower(
            dim=config.dim,
            layers=config.layers,
            heads=config.heads,
            context_length=config.length,
            kinds=max(1, len(store.behaviors)),
            profile_sizes=[field.size for field in store.profile_fields],
            causal=config.encoder == "packed",
            dropout=config.dropout,
            bag=config.bag,
        )

    def sampling(self) -> Sampling:
        c = self.config
        return Sampling(
            packed=c.encoder == "packed",
            along="life",
            mixed=True,
            context_length=c.length,
            recent_length=0,
            overlap=c.length // _OVERLAP,
            samples=c.samples_of_step(self.store.n_events),
            most=c.most,
            half_life=c.half_life,
            whole_up_to=c.whole_up_to,
            sampled_negatives=c.sampled_negatives,
        )

    def forward(
        self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """[S, d] user vectors of a step's samples and [U, d] item vectors of its items."""
        token_Ud = self.tokens(rows_Ud, step, generator)
        behavior_Td, _ = self.looked_up(token_Ud, step)
        states_Td = self.user.of_step(behavior_Td, step, generator)
        state_Sd, bag_Sd = states_Td[torch.from_numpy(step.state)], self.user.bags_of_step(behavior_Td, step)
        return self.user.head(state_Sd, bag_Sd), F.normalize(token_Ud, dim=-1)

    def loss(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        user_Sd, item_Ud = self(rows_Ud, step, generator)
        return -log_likelihood(user_Sd, item_Ud, self.item.scale, step).sum()

    def export(self, folder: Path) -> dict[str, Any]:
        export_life_tower(self.user, folder / "user_tower.onnx")
        return {
            "contexts": False,
            "corpus": True,
            "context_length": self.config.length,
            "recent_length": 0,
            "within": None,
        }


def export_life_tower(user: LifeTower, file: Path) -> None:
    """Write the user tower as ONNX: any number of rows, any length up to that of the tower."""
    rows, N, dim = 2, min(3, user.position.shape[0] - user.prefix), len(user.cls)
    example = {
        "behavior": torch.zeros(rows, N, dim),
        "kind": torch.zeros(rows, N, dtype=torch.long),
        "length": torch.full((rows,), N),
        "profile": torch.zeros(rows, len(user.profile), dtype=torch.long),
    }
    axes = {name: {0: "row"} for name in example}
    for name in ("behavior", "kind"):
        axes[name][1] = "behavior"
    write_onnx(user, example, ["user"], axes, file)
