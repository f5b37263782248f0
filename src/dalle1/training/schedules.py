"""Quantities that change over training, as pure functions of the step, so that resuming needs no state."""

import math


def cosine(step: int, *, start: float, end: float, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `steps`, constant afterwards.

    end + (start - end) * (1 + cos(pi * step / steps)) / 2. The paper names cosine schedules without a formula
    (app. A.2); this is the usual one. `steps` 0 means `end` from the beginning."""
    if steps <= 0:
        return end
    progress = min(max(step / steps, 0.0), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(step: int, *, peak: float, final: float, warmup_steps: int, steps: int) -> float:
    """A linear ramp to `peak` over `warmup_steps` updates, then a cosine to `final` at update `steps`.

    Update 0 already uses peak / warmup_steps: a rate of 0 would waste it."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return cosine(step - warmup_steps, start=peak, end=final, steps=steps - warmup_steps)
