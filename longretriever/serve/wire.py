"""What goes over the wire: requests as pydantic models, which check; answers as fast msgspec structs.

Ids are the log's own, integers or strings; times are seconds since 1970, UTC. As keys of an object (`quotas`,
`boosts`) integer ids are written as strings, since JSON has no others.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from longretriever.events import LATEST

MOST_INTEGER = (1 << 63) - 1
TEXT = 1_000  # characters of an id or a kind of behavior

Id = (
    Annotated[StrictInt, Field(ge=-MOST_INTEGER, le=MOST_INTEGER)]
    | Annotated[StrictStr, Field(min_length=1, max_length=TEXT)]
)
Time = Annotated[float, Field(ge=0, lt=LATEST, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a misspelt field must not be ignored


class InterestsAsked(_Strict):
    """Which contexts are asked about, and what else is demanded of them."""

    select: Literal["model", "pgin", "top", "random"] = Field(
        "model", description="model: as it was made for. pgin, top: the n likeliest. random: n of the top m."
    )
    n: int | None = Field(None, ge=1, le=1_000, description="Contexts; by default 5 of random, 20 of others.")
    m: int | None = Field(None, ge=1, le=1_000, description="Of random: how many are drawn from; default 20.")
    include: list[Id] = Field([], max_length=1_000, description="Categories asked about in any case.")
    exclude: list[Id] = Field([], max_length=1_000, description="Categories that must not come back.")
    quotas: dict[str, Annotated[int, Field(ge=0)]] = Field(
        {}, description="At most so many candidates of a category."
    )
    boosts: dict[str, Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]] = Field(
        {}, description="Factor on a category's share."
    )


class Asking(_Strict):
    """What one request and a batch of them have in common."""

    k: int = Field(200, ge=1, description="Candidates at most.")
    now: Time | None = Field(
        None, description="Only behaviors strictly before this second count; default: now."
    )
    seed: int | None = Field(
        None, ge=0, lt=1 << 53, description="Draws contexts; default: another each time."
    )
    interests: InterestsAsked = Field(default_factory=lambda: InterestsAsked())
    exclude_items: list[Id] = Field([], max_length=10_000)
    exclude_seen: bool = Field(False, description="Leave out items that the user met before `now`.")
    returns: float | None = Field(
        None, ge=0, le=1, description="Share of a context for items met in it; default: as the model judges."
    )
    merge: Literal["probability", "quota", "round-robin", "score"] | None = Field(
        None, description="How the lists of contexts become one; default: the model's."
    )
    explain: bool = Field(False, description="Titles, probabilities and the behaviors that spoke for each.")


class RetrieveAsked(Asking):
    user_id: Id | None = Field(None, description="Without one, what is popular is answered.")
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": 7, "k": 100},
                {
                    "user_id": 7,
                    "k": 50,
                    "seed": 1,
                    "interests": {"select": "random", "n": 5, "m": 20, "quotas": {"3": 10}},
                    "exclude_seen": True,
                    "explain": True,
                },
            ]
        }
    )


class BatchAsked(Asking):
    user_ids: list[Id] = Field(min_length=1)
    model_config = ConfigDict(json_schema_extra={"examples": [{"user_ids": [7, 8], "k": 100}]})


class EventSent(_Strict):
    """A behavior. Of an item that the store does not know, the category must be said."""

    user_id: Id
    item_id: Id
    category_id: Id | None = None
    timestamp: Time | None = Field(None, description="Default: when it arrives. Any order is welcome.")
    behavior: str = Field("", max_length=TEXT, description="Its kind, such as click.")
    event_id: str | None = Field(
        None, min_length=1, max_length=TEXT, description="Sent twice with the same, it is written once."
    )
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"user_id": 7, "item_id": 42, "behavior": "click", "event_id": "a1"}]}
    )


class EventsSent(_Strict):
    events: list[EventSent] = Field(min_length=1)


class ReasonSaid(msgspec.Struct):
    item_id: int | str
    title: str | None
    timestamp: int
    behavior: str
    similarity: float


class CandidateFound(msgspec.Struct, omit_defaults=True):
    item_id: int | str
    category_id: int | str
    score: float  # what the merge ordered by
    rank: int  # from 1
    context: int  # which of `contexts`, from 0
    # with explain
    title: str | None = None
    cosine: float | None = None
    log_prob: float | None = None
    reasons: list[ReasonSaid] | None = None


class ContextAsked(msgspec.Struct):
    category_id: int | str | None  # null: items of any category
    score: float  # P(category | user) as it was foreseen, or of Equation 3
    share: float  # of the answer's probability; those of all contexts sum to 1
    behaviors: int  # that its user vector was made from
    candidates: int  # of the list
    unsearched: float  # share of its items that could not be asked: 0, but while a shard is away


class Answer(msgspec.Struct):
    user_id: int | str | None
    now: float
    seed: int
    model: str  # which model answered
    fallback: Literal["popular"] | None  # set where nothing is known of the user
    partial: bool  # whether some context could not be searched, or not all of it; `contexts` say which
    live: bool  # false: live events cannot be had now, and this is of the store alone
    contexts: list[ContextAsked]
    candidates: list[CandidateFound]
    timings: dict[str, float]  # milliseconds by stage


class BatchAnswer(msgspec.Struct):
    answers: list[Answer]  # in the order of user_ids; timings are of the whole batch


class EventsWritten(msgspec.Struct):
    accepted: int
    duplicates: int  # known by event_id, or equal in user, item, time and behavior


class UserFound(msgspec.Struct):
    user_id: int | str
    behaviors: int
    last: int | None


class UsersFound(msgspec.Struct):
    total: int
    users: list[UserFound]


class BehaviorSaid(msgspec.Struct):
    item_id: int | str
    title: str | None
    category_id: int | str
    timestamp: int
    behavior: str


class CategoryOfLife(msgspec.Struct):
    category_id: int | str
    behaviors: int
    first: int
    last: int
    score: float  # Equation 3
    share: float  # of all scores
    foreseen: float | None  # P(next category), where the model foresees them
    counts: list[int]  # behaviors in each span of `edges`


class Life(msgspec.Struct):
    user_id: int | str
    now: float
    behaviors: int
    live: int | None  # of them, newer than the store; null: cannot be had now
    first: int | None
    last: int | None
    profile: dict[str, Any]
    edges: list[int]  # [spans + 1] of the timeline
    categories: list[CategoryOfLife]  # highest score first
    recent: list[BehaviorSaid]  # newest first


class Forgotten(msgspec.Struct):
    user_id: int | str
    deleted: int  # live events


class ItemFound(msgspec.Struct):
    item_id: int | str
    title: str | None
    category_id: int | str


class SimilarItem(msgspec.Struct):
    item_id: int | str
    title: str | None
    similarity: float  # cosine


class Similar(msgspec.Struct):
    item: ItemFound
    similar: list[SimilarItem]  # of the same category


class ItemsFound(msgspec.Struct):
    items: list[ItemFound]


class CategoryFound(msgspec.Struct):
    category_id: int | str
    items: int
    behaviors: int  # in the newest 30 days of the store


class CategoriesFound(msgspec.Struct):
    total: int
    categories: list[CategoryFound]


class ModelFacts(msgspec.Struct):
    model: str
    method: str
    package: str
    loaded: float  # when
    made: float
    clock: Literal["wall", "log"]
    items: int
    categories: int
    users: int
    behaviors: int
    first_time: int
    last_time: int
    live_events: int | None  # null: cannot be had now
    dimension: int
    selects: list[str]  # what `interests.select` may be
    merge: str
    merges: list[str]
    kinds: list[str]  # of behavior
    ids: dict[str, str]  # "user_id": "integer" or "string"
    limits: dict[str, float]


class Reloaded(msgspec.Struct):
    model: str
    changed: bool


class Wrong(msgspec.Struct, omit_defaults=True):
    """Why a request is not answered."""

    detail: str
    errors: list[dict[str, Any]] | None = None  # where in the request, and what is wrong there


class Ready(msgspec.Struct):
    status: str
    model: str
    live: Literal["ok", "unavailable"]  # unavailable: some or all live events cannot be had now


ANSWERS = (
    Answer,
    BatchAnswer,
    EventsWritten,
    UsersFound,
    Life,
    Forgotten,
    Similar,
    ItemsFound,
    CategoriesFound,
    ModelFacts,
    Reloaded,
    Ready,
    Wrong,
)
