"""The in-category softmax: a target against the other items of its own category, and no others.

Where a category fits, all its items compete: exactly the objective of LongRetriever section 2.3. Larger
ones compete by sample (the batch's own targets and evenly drawn items), corrected by the log probability
of being in the sample, so that popular items, which are drawn more often, are not punished for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longretriever.model.batches import Step


def log_likelihood(user_Sd: Tensor, item_Ud: Tensor, scale: Tensor, step: Step) -> Tensor:
    """[S] log probability of each sample's target among the items of its contest, in nats.

    `user_Sd` and `item_Ud` have length 1; samples stand in the order of `step.contests`.
    """
    found = []
    users = user_Sd.split([c.samples.stop - c.samples.start for c in step.contests])
    whole = _whole_ranges(item_Ud, step)
    for contest, user_sd, item_cd in zip(step.contests, users, whole, strict=True):
        if item_cd is None:
            item_cd = item_Ud[torch.from_numpy(contest.candidate)]
        logits_sc = (user_sd @ item_cd.T) * scale
        if contest.log_q is not None:
            logits_sc = logits_sc - torch.from_numpy(contest.log_q)
        found.append(-F.cross_entropy(logits_sc, torch.from_numpy(contest.target), reduction="none"))
    return torch.cat(found)


def _whole_ranges(item_Ud: Tensor, step: Step) -> list[Tensor | None]:
    """The item vectors of each contest in which all items of a range compete, None for the others.

    One split for all of them: a slice each would, in the backward pass, cost a full-size buffer each.
    """
    ranges = [c.candidate for c in step.contests if isinstance(c.candidate, slice)]
    sizes, at = [], 0
    for r in ranges:  # ascending and disjoint, since samples are sorted by category
        sizes += [r.start - at, r.stop - r.start]
        at = r.stop
    pieces = iter(item_Ud.split([*sizes, len(item_Ud) - at])[1::2])
    return [next(pieces) if isinstance(c.candidate, slice) else None for c in step.contests]
