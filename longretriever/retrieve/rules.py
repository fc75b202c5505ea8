"""What a request may demand beyond the user's taste: what to leave out, ask in any case, limit or push."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longretriever.errors import InputError, UnknownCategory
from longretriever.index import CORPUS
from longretriever.model.exported import Model
from longretriever.retrieve.interests import Contexts
from longretriever.retrieve.merge import Ranked, boosted, capped


@dataclass(frozen=True)
class Rules:
    """What a request may demand beyond the user's taste; ids are the log's own.

    A category that is both included and excluded is left out. Items that the model does not know are nothing
    to exclude; a category that it does not know is an error, `UnknownCategory`, when the rules are used.
    """

    exclude_seen: bool = False  # items that the user met before `now`
    exclude_items: Collection[int | str] = ()
    exclude_categories: Collection[int | str] = ()
    include_categories: Collection[int | str] = ()  # asked about in any case, after those chosen
    quotas: Mapping[int | str, int] | None = None  # at most so many candidates of a category
    boosts: Mapping[int | str, float] | None = None  # factor on a category's share, see `merge`
    returns: float | None = None  # share of a context for items met in it, 0 to 1; None: as the model judges

    def __post_init__(self) -> None:
        if self.returns is not None and not 0 <= self.returns <= 1:
            raise InputError(f"returns={self.returns}: expected a share from 0 to 1, or None.")
        for category, most in (self.quotas or {}).items():
            if most < 0:
                raise InputError(f"the quota of category {category!r} is {most}, expected 0 or more items.")
        for category, boost in (self.boosts or {}).items():
            if not 0 < boost < np.inf:
                raise InputError(
                    f"the boost of category {category!r} is {boost}, expected more than 0. "
                    "To leave a category out, exclude it."
                )


class Ruled:
    """`Rules` in the model's numbers."""

    def __init__(self, rules: Rules, model: Model) -> None:
        self.rules, self._category_of = rules, model.category_of
        self.items = np.unique(
            np.array(
                [n for n in map(model.item_ids.number_of, rules.exclude_items) if n is not None], np.int64
            )
        )
        self.excluded = {_category(model, c) for c in rules.exclude_categories}
        self.included = dict.fromkeys(_category(model, c) for c in rules.include_categories)
        self.quotas = {_category(model, c): n for c, n in (rules.quotas or {}).items()}
        self.boosts = {_category(model, c): x for c, x in (rules.boosts or {}).items()}

    def contexts(self, chosen: Contexts) -> list[tuple[int, float]]:
        """Category and share of each context to ask about."""
        out = [
            (int(c), float(s))
            for c, s in zip(chosen.category, chosen.share, strict=True)
            if c not in self.excluded
        ]
        present = {c for c, _ in out} | self.excluded
        # One that was not chosen is wanted no more than the last that was.
        least = min((s for _, s in out), default=1.0)
        return out + [(c, least) for c in self.included if c not in present]

    def lists(self, lists: Sequence[Ranked]) -> Sequence[Ranked]:
        """Lists with boosts and quotas applied; in those of all items, to the items of each category."""
        if not (self.boosts or self.quotas):
            return lists
        named = {ranked.category for ranked in lists}
        ruled = capped(boosted(lists, self.boosts), self.quotas)
        return [self._of_all(ranked, named) if ranked.category == CORPUS else ranked for ranked in ruled]

    def _of_all(self, ranked: Ranked, named: set[int]) -> Ranked:
        """A list of all items; of a category with a quota it keeps those that the category's own cannot."""
        category = self._category_of(ranked.item)
        log_prob, keep = ranked.log_prob.copy(), np.ones(len(category), bool)
        for c, boost in self.boosts.items():
            log_prob[category == c] += np.log(boost)
        order = np.argsort(-log_prob, kind="stable")
        for c, most in self.quotas.items():
            mine = order[category[order] == c]
            keep[mine[0 if c in named else most :]] = False
        order = order[keep[order]]
        return replace(ranked, item=ranked.item[order], cosine=ranked.cosine[order], log_prob=log_prob[order])


def _category(model: Model, category_id: int | str) -> int:
    number = model.category_ids.number_of(category_id)
    if number is None:
        raise UnknownCategory(
            f"category {category_id!r} is not among the {len(model.category_ids):,} categories of "
            f"{model.path} (such as {model.category_ids.take([0])[0]!r})."
        )
    return number
