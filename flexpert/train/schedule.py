"""The learning rate as a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor on the peak learning rate for step 0..total-1: linear warm-up, then a cosine to 0.

    Args:
        step: steps already done.
        total: steps in the run.
        warmup: share of the steps in which the factor rises to 1.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(total - rising, 1)))
