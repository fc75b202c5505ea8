"""What a router and a shard say to each other: msgpack whose long fields are bare arrays, little-endian.

A request names the model whose user vectors it holds, so that a shard with another one refuses it. The path
has the version of all this: servers of different versions answer each other 404, not nonsense.

Axes: N user vectors, each of one context; D dimensions; S items of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np

from longretriever.errors import InputError
from longretriever.index import CORPUS, Nearest, Part

SEARCH = "/internal/v1/search"
FACTS = "/internal/v1/shard"
MEDIA_TYPE = "application/msgpack"
MOST_ITEMS = (1 << 31) - 1  # item numbers go as 4 bytes
MOST_ROWS = 1 << 16  # of a request

Range = tuple[int, int]  # of categories: the first, and the one after the last

T = TypeVar("T")


class Search(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """N searches, and for those of all items the categories that this shard is to answer for."""

    model: str  # fingerprint
    k: int  # 0, of all items alone: what `index.summed` needs
    head: int  # see `Searchable.nearest`
    user: bytes  # [N, D] float32
    context: bytes  # [N] int32: a category number, or -1
    scale: bytes  # [N] float64
    ranges: list[Range]
    without: list[int]
    look_at_all: bool


class Found(msgspec.Struct, array_like=True):
    """The answers: first those of single categories, then those of all items, in the order of the request."""

    count: bytes  # [N] int32: how many items each row has; the rest would be padding
    item: bytes  # [sum of count] int32
    cosine: bytes  # [sum of count] float32
    normaliser: bytes  # [N] float64; NaN where it is to be estimated from the sample
    sample_item: bytes  # [S] int32
    sample_cosine: bytes  # [whole rows, S] float32
    size: int
    all_seen: bool


class Holding(msgspec.Struct):
    """One model that a shard can be asked about."""

    model: str  # fingerprint
    ranges: list[Range]
    categories: int  # of the whole model
    items: int  # of these ranges
    dimension: int


class Facts(msgspec.Struct):
    """What a shard has, the newest models first."""

    holds: list[Holding]


def encoded(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def decoded(body: bytes, kind: type[T]) -> T:
    """Raises `InputError` for what is not a value of this kind."""
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except msgspec.MsgspecError as error:
        raise InputError(f"the body is no {kind.__name__} in msgpack: {error}.") from error


def search_of(
    model: str,
    user_ND: np.ndarray,
    context_N: np.ndarray,
    scale_N: np.ndarray,
    *,
    k: int,
    head: int,
    ranges: Sequence[Range] = (),
    without: Sequence[int] = (),
    look_at_all: bool = False,
) -> Search:
    arrays = _bytes(user_ND, "<f4"), _bytes(context_N, "<i4"), _bytes(scale_N, "<f8")
    return Search(model, k, head, *arrays, list(ranges), list(map(int, without)), look_at_all)


def rows_of(asked: Search, dimension: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User vectors [N, D], contexts [N], scales [N]. Raises `InputError` where they do not fit together."""
    context_N, scale_N = _array(asked.context, "<i4", "context"), _array(asked.scale, "<f8", "scale")
    flat = _array(asked.user, "<f4", "user")
    n = len(context_N)
    if n > MOST_ROWS or len(scale_N) != n or len(flat) != n * dimension:
        raise InputError(
            f"{n:,} contexts, {len(scale_N):,} scales and {len(flat):,} numbers of user vectors, expected "
            f"{dimension} of these for each context, and at most {MOST_ROWS:,}."
        )
    if not np.isfinite(scale_N).all():
        raise InputError("A scale is NaN or infinite, expected finite numbers.")
    return flat.reshape(n, dimension), context_N.astype(np.int64), scale_N


def found_of(near: Nearest | None, part: Part | None) -> Found:
    """`near` are the rows of single categories, `part` those of all items."""
    items, cosines, normalisers = [np.empty((0, 0), np.int64)], [np.empty((0, 0), np.float32)], []
    if near is not None:
        items.append(near.item)
        cosines.append(near.cosine)
        normalisers.append(near.normaliser)
    if part is not None:
        items.append(part.item)
        cosines.append(part.cosine)
        normalisers.append(np.full(len(part.item), np.nan) if part.log_sum is None else part.log_sum)
    there = [item >= 0 for item in items]
    return Found(
        _bytes(np.concatenate([one.sum(axis=1) for one in there]), "<i4"),
        _bytes(np.concatenate([item[one] for item, one in zip(items, there, strict=True)]), "<i4"),
        _bytes(np.concatenate([cosine[one] for cosine, one in zip(cosines, there, strict=True)]), "<f4"),
        _bytes(np.concatenate(normalisers) if normalisers else np.empty(0), "<f8"),
        _bytes(part.sample_item, "<i4") if part is not None else b"",
        _bytes(part.sample_cosine, "<f4") if part is not None else b"",
        part.size if part is not None else 0,
        part is None or part.all_seen,
    )


def answers_of(found: Found, context_N: np.ndarray, k: int) -> tuple[Nearest, Part]:
    """What a shard said to the rows of single categories, and to those of all items.

    Raises `InputError` for an answer that does not fit the request.
    """
    n, whole = len(context_N), int((context_N == CORPUS).sum())
    count_N, normaliser_N = _array(found.count, "<i4", "count"), _array(found.normaliser, "<f8", "normaliser")
    item, cosine = _array(found.item, "<i4", "item"), _array(found.cosine, "<f4", "cosine")
    sample_item = _array(found.sample_item, "<i4", "sample_item").astype(np.int64)
    sample = _array(found.sample_cosine, "<f4", "sample_cosine")
    fits = len(count_N) == len(normaliser_N) == n and not ((count_N < 0) | (count_N > k)).any()
    if not fits or not len(item) == len(cosine) == count_N.sum() or len(sample) != whole * len(sample_item):
        raise InputError(f"an answer of {len(count_N)} rows and {len(item):,} items to {n} rows of {k} each.")
    there = np.arange(k) < count_N[:, None]
    item_Nk, cosine_Nk = np.full((n, k), -1, np.int64), np.full((n, k), -np.inf, np.float32)
    item_Nk[there], cosine_Nk[there] = item, cosine
    split = n - whole
    near = Nearest(item_Nk[:split], cosine_Nk[:split], normaliser_N[:split], np.zeros(split))
    log_sum = None if np.isnan(normaliser_N[split:]).any() else normaliser_N[split:]
    samples = sample_item, sample.reshape(whole, len(sample_item))
    part = Part(item_Nk[split:], cosine_Nk[split:], log_sum, *samples, found.size, found.all_seen)
    return near, part


def _bytes(array: np.ndarray, dtype: str) -> bytes:
    return np.ascontiguousarray(array, dtype).tobytes()


def _array(raw: bytes, dtype: str, field: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    if len(raw) % size:
        raise InputError(f"{field}: {len(raw):,} bytes, expected a multiple of {size}.")
    return np.frombuffer(raw, dtype)
