"""What is compared in an experiment? Arms, each a system; and a name for every run that says what decides it.

The name of a run ends in a hash of the log, the configuration, how the model is asked and how requests are
drawn: equal names, equal results, so what is finished need not be done again and arms can share a training.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from os import PathLike
from typing import Any

from longretriever.errors import InputError
from longretriever.evaluate.rivals import Recommender
from longretriever.retrieve.interests import Interests
from longretriever.retrieve.merge import Merge
from longretriever.saved import package_version
from longretriever.store.behaviors import Store


class Asked:
    """What arms of an experiment and routes of a test have alike: a training, and how its model is asked."""

    name: str
    learn: Any
    interests: Interests | None
    merge: Merge | None
    asking: Mapping[str, Any]

    @property
    def load(self) -> dict[str, Any]:
        """Keyword arguments of `Retriever.load`: those that are not left to the model."""
        own = {"interests": self.interests, "merge": self.merge}
        return {**{name: value for name, value in own.items() if value is not None}, **self.asking}

    def config(self, seed: int, minutes: float | None, samples: int | None) -> Any:
        """The configuration of a training; bounds that are None stay as in `learn`. None for a rival."""
        if self.learn is None:
            return None
        given = {"seed": seed, "minutes": minutes, "samples": samples}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        strange = changes.keys() - {field.name for field in fields(self.learn)}
        if strange:
            raise InputError(
                f"arm {self.name!r}: {type(self.learn).__name__} has no field {strange.pop()!r}, which the "
                "plan sets. Leave that bound out, or the arm."
            )
        return replace(self.learn, **changes)


@dataclass(frozen=True)
class Arm(Asked):
    """One system of an experiment: what it learns, and how it is asked.

    name       as it stands in the report
    about      one sentence that says what is special about it
    learn      a training configuration; arms with equal ones share their trainings
    rival      instead of `learn`: what makes a `Recommender` of (store of the whole log, T), such as `Recent`
    interests  which contexts are asked; None: the model's own
    merge      how their lists become one; None: the model's own
    asking     further keyword arguments of `Retriever.load`
    against    name of the arm that it is compared with; None: the first of the plan
    """

    name: str
    about: str = ""
    learn: Any = None
    rival: Callable[[Store, int], Recommender] | None = None
    interests: Interests | None = None
    merge: Merge | None = None
    asking: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None

    def __post_init__(self) -> None:
        if (self.learn is None) == (self.rival is None):
            raise InputError(f"arm {self.name!r}: expected either learn= or rival=.")
        if self.learn is not None and (isinstance(self.learn, type) or not is_dataclass(self.learn)):
            raise InputError(f"arm {self.name!r}: learn={self.learn!r}, expected a training configuration.")


@dataclass(frozen=True)
class Run:
    """An arm with one seed. Runs that are alike, whatever their arms are called, have the same name.

    config  of the training, with seed and bounds; None for a rival
    model   name of the folder of what is learned
    name    of the files of what was found
    """

    arm: Arm
    seed: int
    config: Any
    model: str
    name: str

    @property
    def title(self) -> str:
        return self.arm.name if self.config is None else f"{self.arm.name}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """All that decides what an experiment finds, beside the log.

    seeds            of the trainings: each is repeated with every one
    minutes, samples bounds of each training, the same for all; None: as its configuration has it
    k                lengths of list
    request_seed     draws requests, resamples users, flips signs
    threads          of training; None: all processors
    """

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    minutes: float | None = None
    samples: int | None = None
    k: tuple[int, ...] = (50, 200, 500)
    request_seed: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names) or not all(names):
            raise InputError(f"arms {names}: expected at least one, each with a name of its own.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds {list(self.seeds)}: expected at least one, none of them twice.")
        if min(self.k, default=0) < 1:
            raise InputError(
                f"k is {list(self.k)}, expected at least one list length of 1 or more, such as 50."
            )
        for arm in self.arms:
            if arm.against is not None and (arm.against not in names or arm.against == arm.name):
                raise InputError(
                    f"arm {arm.name!r} is to be compared with {arm.against!r}, expected another of {names}."
                )
            for seed in self.seeds:  # whatever is wrong with a configuration is said before the first hour
                described([arm.config(seed, self.minutes, self.samples), arm.rival, arm.load])

    def against(self, arm: Arm) -> str | None:
        """The name of the arm that this one is compared with; None for the first, unless it has one."""
        return arm.against or (None if arm == self.arms[0] else self.arms[0].name)

    def seeds_of(self, arm: Arm) -> tuple[int, ...]:
        """A rival is the same with every seed, and runs once."""
        return self.seeds if arm.learn is not None else self.seeds[:1]

    def runs(self, log: Mapping[str, str]) -> list[Run]:
        """Rivals first, then all learned arms with the first seed, with the second, and so on.

        `log` names what the runs are made from: the store that is learned from as "train", and the rest.
        """
        rivals = [(arm, self.seeds[0]) for arm in self.arms if arm.learn is None]
        learned = [(arm, seed) for seed in self.seeds for arm in self.arms if arm.learn is not None]
        return [self._run(arm, seed, log) for arm, seed in rivals + learned]

    def _run(self, arm: Arm, seed: int, log: Mapping[str, str]) -> Run:
        config = arm.config(seed, self.minutes, self.samples)
        what, made_by = (arm.rival, "rival") if config is None else (config, f"seed{seed}")
        named = getattr(what, "func", what)  # of a partial
        start = f"{getattr(named, '__name__', type(named).__name__)}-{made_by}"
        model = f"{start}-{_hash([package_version(), log['train'], described(what), self.threads])}"
        found = [model, dict(log), described(arm.load), self.k, self.request_seed]
        return Run(arm, seed, config, model, f"{start}-{_hash(found)}")


def described(value: Any) -> Any:
    """A value as JSON that says what it is, equal for equal values only.

    Raises `InputError` for what cannot be told from another by its description, such as a lambda.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no number for it
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, Sequence):
        return [described(one) for one in value]
    if isinstance(value, functools.partial):
        given = {"args": described(value.args), "keywords": described(value.keywords)}
        return {"is": described(value.func), **given}
    if is_dataclass(value) and not isinstance(value, type):
        own = {field.name: described(getattr(value, field.name)) for field in fields(value)}
        return {"is": described(type(value)), **own}
    name = getattr(value, "__qualname__", "<")
    if "<" not in name:  # of a class or function that is not made inside another
        return f"{value.__module__}.{name}"
    raise InputError(
        f"{value!r} cannot be told from another of its kind, so runs with it could not be kept apart. "
        "Use a function or class on the top level of a module, or an instance of a dataclass."
    )


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
