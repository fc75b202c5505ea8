"""The settings of a training: all that decides the weights, beside the store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longretriever.errors import InputError, MissingExtra
from longretriever.model.batches import Sampling

if TYPE_CHECKING:
    from longretriever.model.learner import Learner, Trainable
    from longretriever.model.pgin import PginLearner
    from longretriever.store.behaviors import Store


@dataclass(frozen=True)
class Learning:
    """What every method has to be told: how wide, how fast, how long. A method's own class adds to it."""

    dim: int = 64
    dropout: float = 0.25
    epochs: int | None = None  # at most; None: about 4,000 steps, at least 5 epochs and at most 30
    minutes: float | None = None  # wall time at most; the rate falls to its end within it
    samples: int | None = None  # to learn from at most
    most: int | None = 200  # samples of a user in an epoch, about, so that a few do not outweigh all others
    half_life: float | None = None  # days in which an event's weight halves; 0: none fades; None: by the log
    patience: int = 2  # epochs without a better validation loss before training stops
    validation: float = 0.02  # newest part of the events, held out
    lr: float = 2e-3
    row_lr: float = 0.05
    weight_decay: float = 0.01
    step_samples: int | None = None  # None: some 700 steps an epoch, of 256 to 4096 samples
    parts: int = 2  # of a step, computed side by side where there are processors; changes the last digits
    shards: int | None = None  # of a training by several processes; None: as many as there are processes
    seed: int = 0

    def __post_init__(self) -> None:
        self._positive("dim", "parts", "patience")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"minutes={self.minutes}: expected more than 0, or None for no bound.")
        for name, otherwise in (
            ("epochs", "to suit the log"),
            ("step_samples", "to suit the log"),
            ("samples", "for no bound"),
            ("most", "for all"),
            ("shards", "for as many as there are processes"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: expected 1 or more, or None {otherwise}.")
        if self.half_life is not None and not 0 <= self.half_life < float("inf"):
            raise InputError(
                f"half_life={self.half_life}: expected days, 0 where nothing fades, or None to suit the log."
            )
        if not 0 <= self.validation < 0.5:
            raise InputError(f"validation={self.validation}: expected a share in [0, 0.5).")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout}: expected a share in [0, 1).")

    def _positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected at least 1.")

    def learner(self, store: Store) -> Trainable:
        """The method with its first weights, for this store."""
        raise NotImplementedError(f"{type(self).__name__} is not the configuration of a method.")

    @property
    def parts_of_shard(self) -> int:
        """Of a step, so that its `parts` are as many in all as without shards, where those are few."""
        return -(-self.parts // (self.shards or 1))

    def samples_of_step(self, events: int) -> int:
        """Small logs need small steps: with 4,096 samples a step, 90,000 events make 22 updates an epoch, too
        few to learn from; a 16 times smaller step raised Recall@200 on them from .28 to .52 (docs/log.md)."""
        return self.step_samples or min(4096, max(256, events // 700))

    def epochs_for(self, samples: int, step_samples: int) -> int:
        """How many passes over so many samples: the first logs to learn from are small, and need more."""
        return self.epochs or max(5, min(30, 4_000 * step_samples // max(samples, 1)))


@dataclass(frozen=True)
class VectorLearning(Learning):
    """What every method that retrieves by vectors has to be told beside."""

    warm_start: bool = True  # item rows start from a factorization of who met what
    id_dropout: float = 0.1  # share of item rows left out, where items have features to fall back on

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.id_dropout < 1:
            raise InputError(f"id_dropout={self.id_dropout}: expected a share in [0, 1).")


@dataclass(frozen=True)
class PginConfig(Learning):
    """Which category comes next: how the contexts of a request are chosen (`model/pgin.py`)."""

    dropout: float = 0.1
    heads: int = 2
    recent_length: int = 50  # R: behaviors that the generator reads one by one
    categories: int = 128  # P: categories met, the lately met first, that the pointer may point to
    pointer: bool = True  # to categories of the user's history
    generator: bool = True  # of any category
    most: int | None = 100
    distance: float = 0.0  # share of samples asked for some events ahead, not just before
    horizon: int = 500  # events ahead at most

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("heads", "recent_length", "categories", "horizon")
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} cannot be divided among heads={self.heads}: choose a multiple.")
        if not (self.pointer or self.generator):
            raise InputError(
                "PginConfig without pointer and without generator: expected one of them at least."
            )
        if not 0 <= self.distance < 1:
            raise InputError(f"distance={self.distance}: expected a share in [0, 1).")

    def learner(self, store: Store) -> PginLearner:
        from longretriever.model.pgin import PginLearner

        return PginLearner(store, self)


@dataclass(frozen=True)
class EbrConfig(VectorLearning):
    """The dual tower with one user vector. The defaults are the tuned form; `paper()` is the paper's."""

    encoder: str = "packed"  # or "cls": the paper's, one sample a row
    layers: int = 2
    heads: int = 2
    length: int = 200  # behaviors of any category that the user tower reads
    bag: bool = True  # their mean is read beside the transformer's state
    whole_up_to: int = 8192  # items: a larger corpus competes by sample
    sampled_negatives: int = 2048  # evenly drawn, beside the targets of the batch
    factors: float | None = 0.0  # weight of factors of who met what beside; None: by what is held out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factors is not None and not 0 <= self.factors < float("inf"):
            raise InputError(f"factors={self.factors}: expected a weight of 0 or more, or None to fit it.")
        if self.encoder not in ("packed", "cls"):
            raise InputError(f"encoder={self.encoder!r}: expected 'packed' or 'cls'.")
        self._positive("layers", "heads", "length")
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} cannot be divided among heads={self.heads}: choose a multiple.")

    @classmethod
    def paper(cls, **changes: object) -> EbrConfig:
        """The dual tower of LongRetriever's section 3.1: in-batch negatives alone, item rows from noise."""
        plain = {"encoder": "cls", "whole_up_to": 0, "sampled_negatives": 0, "warm_start": False}
        plain |= {"id_dropout": 0.0, "bag": False, "most": None, "half_life": 0.0}
        return cls(**{**plain, **changes})  # type: ignore[arg-type]

    def learner(self, store: Store) -> Learner:
        from longretriever.model.ebr import Ebr

        return Ebr(store, self)


@dataclass(frozen=True)
class TrainConfig(VectorLearning):
    """LongRetriever. The defaults need no tuning to start with; `paper()` is what the paper describes."""

    encoder: str = "packed"  # or "cls": the paper's, one sample a row
    layers: int = 2
    heads: int = 2
    context_length: int = 50  # L: behaviors of a context that the user tower reads
    bag: bool = True  # their mean is read beside the transformer's state
    recent_length: int = 0  # last behaviors of any category that it also looks at
    life_sample: int = 0  # and so many of what is older, spread evenly over the life
    within: int | None = None  # only the user's last so many behaviors are looked at; None: the whole life
    ages: bool = True  # how long ago the last behaviors were is a feature
    returns: bool = True  # items met before compete by when they were met, the others by their vectors
    explore_weight: float = 0.5  # of the loss by vectors alone, beside that of the mixture with returns
    distance: float = 0.0  # share of samples asked for some events ahead, not just before
    whole: EbrConfig | None = EbrConfig(factors=None)  # one more vector, searches all items; None: none does
    whole_share: float = 0.4  # of an answer's probability: for what that vector finds
    interests: PginConfig | None = PginConfig()  # the choice of contexts; None: by Equation 3
    mixed: bool = False  # batches of all categories: what the paper's Table 5 compares with
    overlap: int = 8
    whole_category_up_to: int = 8192
    sampled_negatives: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("packed", "cls"):
            raise InputError(f"encoder={self.encoder!r}: expected 'packed' or 'cls'.")
        self._positive("layers", "heads", "context_length", "overlap")
        if self.dim % self.heads:
            raise InputError(f"dim={self.dim} cannot be divided among heads={self.heads}: choose a multiple.")
        if self.recent_length < 0 or (self.within is not None and self.within < 1):
            raise InputError(
                f"recent_length={self.recent_length}, within={self.within}: expected at least 0, at least 1."
            )
        for name in ("distance", "whole_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: expected a share in [0, 1).")
        if self.life_sample < 0 or (self.life_sample and not (self.recent_length and self.within is None)):
            raise InputError(
                f"life_sample={self.life_sample}: expected 0, or more with recent_length above 0 and the "
                "whole life looked at (within=None)."
            )

    @classmethod
    def paper(cls, **changes: object) -> TrainConfig:
        """The user tower and the objective of LongRetriever's sections 2.2 and 2.3, and nothing beside."""
        plain = {"encoder": "cls", "recent_length": 0, "ages": False, "returns": False, "warm_start": False}
        plain |= {"id_dropout": 0.0, "bag": False, "distance": 0.0, "whole": None, "most": None}
        plain |= {"half_life": 0.0, "interests": None}
        return cls(**{**plain, **changes})  # type: ignore[arg-type]

    def learner(self, store: Store) -> Learner:
        from longretriever.model.towers import LongRetriever

        return LongRetriever(store, self)

    def sampling(self, events: int) -> Sampling:
        """How samples are cut and grouped for a log of so many events."""
        return Sampling(
            packed=self.encoder == "packed",
            mixed=self.mixed,
            context_length=self.context_length,
            recent_length=self.recent_length + self.life_sample,
            life_sample=self.life_sample,
            within=self.within,
            most=self.most,
            half_life=self.half_life,
            distance=self.distance,
            returns=self.returns,
            overlap=min(self.overlap, self.context_length),
            samples=self.samples_of_step(events),
            whole_up_to=self.whole_category_up_to,
            sampled_negatives=self.sampled_negatives,
        )


LEARNED = ("longretriever", "ebr", "mind", "ulim")
"""The methods that are trained, by the names that commands use."""


def configuration(name: str) -> Learning:
    """The default configuration of a model of `LEARNED`. Raises `MissingExtra` without PyTorch."""
    need_torch()
    from longretriever.model.baselines.mind import MindConfig
    from longretriever.model.baselines.ulim import UlimConfig

    kinds: dict[str, Callable[[], Learning]] = {
        "longretriever": TrainConfig,
        "ebr": EbrConfig,
        "mind": MindConfig,
        "ulim": UlimConfig,
    }
    return kinds[name]()


def need_torch() -> None:
    """Raises `MissingExtra` unless PyTorch is installed."""
    try:
        import longretriever.model.train  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            f"training needs PyTorch ({error}). Install it with `pip install 'longretriever[train]'`."
        ) from error
