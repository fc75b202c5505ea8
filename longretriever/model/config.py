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
    dropout: float = 0.25
    context_length: int = 50  # L: behaviors of a context that the user tower reads
    recent_length: int = 20  # behaviors of any category that it also looks at
    epochs: int | None = None  # at most; None: about 4,000 steps, at least 5 epochs and at most 30
    minutes: float | None = None  # wall time at most; the rate falls to its end within it
    patience: int = 2  # epochs without a better validation loss before training stops
    validation: float = 0.02  # newest part of the events, held out
    lr: float = 2e-3
    row_lr: float = 0.05
    weight_decay: float = 0.01
    step_samples: int | None = None  # None: some 700 steps an epoch, of 256 to 4096 samples
    overlap: int = 8
    whole_category_up_to: int = 8192
    sampled_negatives: int = 2048
    parts: int = 2  # of a step, computed side by side where there are processors; changes the last digits
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
            "overlap",
            "parts",
        ):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1.")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes={self.minutes}: expected more than 0, or None for no bound.")
        if self.epochs is not None and self.epochs < 1:
            raise InputError(f"epochs={self.epochs}: expected 1 or more, or None to suit the log.")
        if self.step_samples is not None and self.step_samples < 1:
            raise InputError(
                f"step_samples={self.step_samples}: expected at least 1, or None to suit the log."
            )
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} cannot be divided among heads={self.heads}: choose a multiple.")
        if not 0 <= self.validation < 0.5:
            raise InputError(f"validation={self.validation}: expected a share in [0, 0.5).")

    def sampling(self, events: int) -> Sampling:
        """How samples are cut and grouped for a log of so many events.

        Small logs need small steps: with 4,096 samples a step, 90,000 events make 22 updates an epoch, too
        few to learn from; a 16 times smaller step raised Recall@200 on them from .28 to .52 (docs/log.md).
        """
        return Sampling(
            packed=self.encoder == "packed",
            context_length=self.context_length,
            recent_length=self.recent_length,
            overlap=min(self.overlap, self.context_length),
            samples=self.step_samples or min(4096, max(256, events // 700)),
            whole_category_up_to=self.whole_category_up_to,
            sampled_negatives=self.sampled_negatives,
        )

    def epochs_for(self, samples: int, step_samples: int) -> int:
        """How many passes over so many samples: the first logs to learn from are small, and need more."""
        return self.epochs or max(5, min(30, 4_000 * step_samples // max(samples, 1)))
