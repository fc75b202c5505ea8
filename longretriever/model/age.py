"""How old is a behavior? In 32 classes on a logarithmic scale, the same in training and in serving."""

from __future__ import annotations

import numpy as np

AGES = 32
"""Classes: 0 is "there is none", 1 is under 45 seconds, and five classes more are 16 times as old."""


def age_class(seconds: np.ndarray) -> np.ndarray:
    """[...] the class of each age, from 1 to `AGES` - 1, which begins at some 30 years."""
    steps = 1.25 * np.log2(1 + np.maximum(seconds, 0) / 60)
    return 1 + np.minimum(steps.astype(np.int64), AGES - 2)
