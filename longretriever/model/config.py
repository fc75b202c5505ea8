"""The settings of a training: all that decides the weights, beside the store."""

from __future__ import annotations

from dataclasses import dataclass

from longretriever.errors import InputError
from longretriever.model.batches import Sampling


@dataclass(frozen=True)
class TrainConfig:
    """All that decides the weights, beside the store. The defaults need no tuning to start with."""

    encoder: str = "packed"  # or "cls": the paper's, one sample a row
    dim: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.1
    context_length: int = 50  # L: behaviors of a context that the user tower reads
    recent_length: int = 20  # behaviors of any category that it also looks at
    epochs: int = 6  # at most
    minutes: float | None = None  # wall time at most; the rate falls to its end within it
    patience: int = 2  # epochs without a better validation loss before training stops
    validation: float = 0.02  # newest part of the events, held out
    lr: float = 2e-3
    row_lr: float = 0.05
    weight_decay: float = 0.01
    step_samples: int = 4096
    overlap: int = 8
    whole_category_up_to: int = 8192
    sampled_negatives: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.encoder not in ("packed", "cls"):
            raise InputError(f"encoder={self.encoder!r}: expected 'packed' or 'cls'.")
        for name in (
            "dim",
            "layers",
            "heads",
            "context_length",
            "recent_length",
            "epochs",
            "step_samples",
            "overlap",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} cannot be divided among heads={self.heads}: choose a multiple.")
        if not 0 <= self.validation < 0.5:
            raise InputError(f"validation={self.validation}: expected a share in [0, 0.5).")

    def sampling(self) -> Sampling:
        return Sampling(
            packed=self.encoder == "packed",
            context_length=self.context_length,
            recent_length=self.recent_length,
            overlap=min(self.overlap, self.context_length),
            samples=self.step_samples,
            whole_category_up_to=self.whole_category_up_to,
            sampled_negatives=self.sampled_negatives,
        )
