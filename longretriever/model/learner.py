"""What is trained? A method: from a step of samples to a loss, and from its weights to what serving opens.

Every method that retrieves by vectors is a `Learner`: it shares the loop, the item tower, the checkpoints and
the saved form, and brings its own user tower and the batches that it learns from. LongRetriever is one
(`towers.py`), the systems that it is compared with are others (`baselines/`).
"""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longretriever.model.batches import Batches, Sampling, Step
from longretriever.model.config import VectorLearning
from longretriever.saved import Folder
from longretriever.store.behaviors import Store

_CHUNK = 1 << 16  # items whose vectors are computed at once

FIRST_TEMPERATURE = 0.2
"""Random vectors must not be sharply wrong: from 0.07, small logs spend their training on unlearning."""

MAX_SCALE = 50.0
"""Bound on the inverse temperature, without which a category of few items drives it up for ever."""


def code_tables(sizes: Sequence[int], dim: int) -> nn.ModuleList:
    """An embedding for each categorical field; code 0, missing or unknown, starts as no information."""
    tables = [nn.Embedding(size, dim) for size in sizes]
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(table.weight[0])
    return nn.ModuleList(tables)


def drop(x: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Dropout whose randomness is an argument, so that parts of a step can run side by side and repeat.

    One byte decides for each number, so the rate is rounded to 1/256. Without a generator nothing is dropped.
    """
    if generator is None or rate == 0:
        return x
    least = round(256 * rate)
    # Eight bytes at a draw, and a mask of floats, which needs no conversion on the way back.
    eight = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    byte = eight.random_(-(1 << 63), None, generator=generator).view(torch.uint8)[: x.numel()]
    return x * (byte >= least).to(x.dtype).mul_(256 / (256 - least)).view(x.shape)


class ItemTower(nn.Module):
    """An item is the sum of its own row, its category's and its features'; its vector is that, normalised.

    The item rows are not a parameter here: a step gathers the few that it needs and updates only those
    (see `ItemRows`). The sum, unnormalised, is also what the user tower reads as a behavior.
    """

    def __init__(self, *, dim: int, categories: int, feature_sizes: Sequence[int]) -> None:
        super().__init__()
        self.category = nn.Embedding(categories, dim)
        self.features = code_tables(feature_sizes, dim)
        nn.init.normal_(self.category.weight, std=0.05)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def embed(self, row_Id: Tensor, category_I: Tensor, feature_IF: Tensor) -> Tensor:
        x_Id = row_Id + self.category(category_I)
        for i, table in enumerate(self.features):
            x_Id = x_Id + table(feature_IF[:, i])
        return x_Id

    def feature_rows(self) -> Tensor:
        """[V, d] the rows of all codes of all fields, field after field."""
        none = self.category.weight.new_empty(0, self.category.embedding_dim)
        return torch.cat([none, *self.features.parameters()])

    @property
    def scale(self) -> Tensor:
        """The inverse of the learnable temperature, at most `MAX_SCALE`."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)


class ItemRows:
    """The embedding rows of all items, of which a step reads and writes only those it names.

    Row-wise Adagrad: one number of state for each row, so 4M items of width 64 take 1 GB, not 3.
    """

    def __init__(self, weight: Tensor, lr: float) -> None:
        self.weight = weight
        self.sum_of_squares = torch.zeros(len(weight))
        self.lr = lr

    def gather(self, numbers: Tensor) -> Tensor:
        """The named rows, as a leaf to take the gradient of."""
        return self.weight[numbers].requires_grad_()

    def update(self, parts: Sequence[tuple[Tensor, Tensor]], factor: float = 1.0) -> None:
        """Apply the gradients of the rows that parts of a step name, (numbers, gradient) of each.

        Where two name the same row, their gradients are added in the order of the parts. `factor` is the
        schedule's part of the rate.
        """
        numbers, grad = _together(parts)
        sum_of_squares = self.sum_of_squares[numbers] + grad.square().mean(dim=1)
        self.sum_of_squares[numbers] = sum_of_squares
        step = self.lr * factor / (sum_of_squares.sqrt() + 1e-10)
        self.weight[numbers] = self.weight[numbers] - grad * step[:, None]


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Distinct numbers, ascending, and the sum of each one's gradients."""
    if len(parts) == 1:
        return parts[0]
    numbers = torch.cat([named for named, _ in parts]).unique()
    total = parts[0][1].new_zeros(len(numbers), parts[0][1].shape[1])
    for named, grad in parts:
        place = torch.searchsorted(numbers, named)
        total[place] = total[place] + grad
    return numbers, total


class Lesson(Protocol):
    """A step, or a part of one, as the loop sees it."""

    @property
    def numbers(self) -> np.ndarray:
        """[U] which item rows it needs."""

    @property
    def samples(self) -> int: ...

    @property
    def chance(self) -> float:
        """Summed loss of guessing evenly."""

    @property
    def tokens(self) -> int:
        """Behaviors that are no padding."""

    @property
    def padded(self) -> int:
        """Behaviors with padding."""


class Lessons(Protocol):
    """The samples of a store, as the loop sees them; see `Batches`."""

    @property
    def n_samples(self) -> int: ...

    @property
    def step_samples(self) -> int: ...

    @property
    def key(self) -> tuple[int, ...]:
        """What random numbers depend on beside seed, epoch and step: the number of a shard."""

    def epoch(self, seed: int, epoch: int) -> Iterator[Any]: ...

    def after(self, when: int, limit: int, rng: np.random.Generator) -> list[Any]: ...

    def assemble(self, plan: Any, rng: np.random.Generator, parts: int = 1) -> Sequence[Lesson]: ...


class Trainable(Protocol):
    """What the loop trains: a module with samples, a loss, and a saved form."""

    kind: str  # of the saved folder

    def batches(self, until: int, held_out: bool = False) -> Lessons: ...

    def first_rows(
        self,
        until: int,
        generator: torch.Generator,
        work: Path | None = None,
        items: Sequence[slice] | None = None,
    ) -> Tensor: ...

    def loss(self, rows_Ud: Tensor, step: Any, generator: torch.Generator | None = None) -> Tensor: ...

    def write(self, folder: Folder, rows: ItemRows) -> dict[str, Any]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any: ...


class Learner(nn.Module):
    """A method for one store. A subclass sets `user`, its user tower, and defines what raises here."""

    kind = "model"
    method = ""
    """What a saved model says it is; `exported.py` knows how each is asked."""

    def __init__(self, store: Store, config: VectorLearning) -> None:
        super().__init__()
        self.store, self.config = store, config
        self.item = ItemTower(
            dim=config.dim,
            categories=store.n_categories,
            feature_sizes=[field.size for field in store.item_fields],
        )

    def sampling(self) -> Sampling:
        """What the samples are."""
        raise NotImplementedError

    def loss(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        """Summed loss of a step's samples, in nats. `rows_Ud` are the item rows that the step names.

        `generator` draws what is dropped out; without one nothing is.
        """
        raise NotImplementedError

    def export(self, folder: Path) -> dict[str, Any]:
        """Write what makes user vectors to a model folder; returns what `exported.Model` must know of it."""
        raise NotImplementedError

    def batches(self, until: int, held_out: bool = False) -> Batches:
        """Samples of the events at or before `until`; those held out ask just before each event."""
        sampling = self.sampling()
        if held_out:
            sampling = Sampling(**{**vars(sampling), "distance": 0.0})
        return Batches(self.store, sampling, until)

    def first_rows(
        self,
        until: int,
        generator: torch.Generator,
        work: Path | None = None,
        items: Sequence[slice] | None = None,
    ) -> Tensor:
        """[I, d] the item rows before training: noise, or with a warm start factors of who met what.

        Factors are kept in the folder `work`, and found there. `items`: only the rows of these, in order.
        """
        if self.config.warm_start:
            from longretriever.model.warm import kept_item_factors

            dim, seed = self.config.dim, self.config.seed
            return torch.from_numpy(kept_item_factors(work, self.store, until, dim, seed, items))
        n = self.store.n_items if items is None else sum(part.stop - part.start for part in items)
        return torch.randn(n, self.config.dim, generator=generator) * 0.05

    def tokens(self, rows_Ud: Tensor, step: Step, generator: torch.Generator | None = None) -> Tensor:
        """[U, d] what the user tower reads as a behavior of each item that the step names.

        Where items have features to fall back on, `generator` draws whose row is left out.
        """
        if generator is not None and self.item.features and self.config.id_dropout:
            absent = torch.rand(len(rows_Ud), generator=generator) < self.config.id_dropout
            rows_Ud = rows_Ud.masked_fill(absent[:, None], 0.0)
        category_U = torch.from_numpy(self.store.item_category[step.numbers]).long()
        feature_UF = torch.from_numpy(self.store.item_feature[step.numbers]).long()
        return self.item.embed(rows_Ud, category_U, feature_UF)

    def looked_up(self, token_Ud: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """[T, d] the behaviors of all rows, padding included; [S, R, d] the recent ones, newest first.

        Looked up together: the gradient of each look-up is as large as all items of the step.
        """
        rows = [b.item.ravel() for b in step.buckets]
        item = np.concatenate([*rows, step.recent.ravel()]).astype(np.int64)
        found_nd = F.embedding(torch.from_numpy(item), token_Ud)
        behavior_Td, recent_nd = found_nd.split([len(item) - step.recent.size, step.recent.size])
        return behavior_Td, recent_nd.view(*step.recent.shape, token_Ud.shape[1])

    def recent(self, token_Ud: Tensor, step: Step) -> Tensor:
        """[S, R, d] the recent behaviors of each sample alone."""
        return F.embedding(torch.from_numpy(step.recent).long(), token_Ud)

    def write(self, folder: Folder, rows: ItemRows) -> dict[str, Any]:
        """Write what `exported.Model` opens (it names the files); returns facts for the manifest."""
        store = self.store
        shutil.copy(store.path / "items.arrow", folder.path)
        folder.save_array("category_start", np.asarray(store.category_start))
        folder.save_array("item_feature", np.asarray(store.item_feature))
        tokens = np.lib.format.open_memmap(
            folder.path / "item_token.npy",
            mode="w+",
            dtype=np.float32,
            shape=(store.n_items, self.config.dim),
        )
        for at in range(0, store.n_items, _CHUNK):
            part = slice(at, at + _CHUNK)
            tokens[part] = self.item_tokens(rows, part)
        tokens.flush()
        folder.save_array("category_token", self.item.category.weight.detach().numpy())
        folder.save_array("feature_token", self.item.feature_rows().detach().numpy())
        folder.save_array("category_row", self.category_rows(rows).numpy())
        return {
            "method": self.method,
            "scale": self.item.scale.item(),
            "item_fields": [asdict(field) for field in store.item_fields],
            **self.export(folder.path),
        }

    @torch.no_grad()
    def item_tokens(self, rows: ItemRows, part: slice) -> np.ndarray:
        """[n, d] tokens of a range of item numbers."""
        return self.item.embed(
            rows.weight[part],
            torch.from_numpy(self.store.item_category[part]).long(),
            torch.from_numpy(np.array(self.store.item_feature[part])).long(),
        ).numpy()

    def category_rows(self, rows: ItemRows) -> Tensor:
        """[C, d] the mean of the item rows of each category; 0 of one without items."""
        category, n = torch.from_numpy(self.store.item_category).long(), self.store.n_categories
        sum_Cd = torch.zeros(n, self.config.dim).index_add_(0, category, rows.weight)
        return sum_Cd / category.bincount(minlength=n).clamp(min=1)[:, None]


def write_onnx(
    tower: nn.Module,
    example: dict[str, Tensor],
    outputs: Sequence[str],
    axes: dict[str, dict[int, str]],
    file: Path,
) -> None:
    """Write a tower as ONNX. `example` has an argument of `forward` for each input, in its order; `axes`
    names those that may have any length."""
    with warnings.catch_warnings():
        # The tracing exporter is called old, but writes this graph in 0.7 s where the new one takes 8.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            tower,
            tuple(example.values()),
            file,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_axes=axes,
            dynamo=False,
        )
