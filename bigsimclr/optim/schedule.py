"""The course of the learning rate: linear warm-up, then half a cosine."""

import math


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the factor on the learning rate before update number `step`, counted from 0.

    The first update of a warm-up has rate 0, the last update a rate just above 0.

    Args:
        step: Updates made so far.
        warmup_steps: Updates of linear warm-up.
        total_steps: Updates of the whole run, warm-up included.

    Returns:
        A factor between 0 and 1.

    Source: google-research/simclr model_util.py (`learning_rate_schedule`).
    """
    if step < warmup_steps:
        return step / warmup_steps
    span = max(total_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(step - warmup_steps, span) / span))
