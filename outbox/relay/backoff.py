"""How long to wait before the next try: exponential with full jitter, so that a fleet does not return in step."""

import random

EXPONENT_MAX = 32  # 2³² times any base exceeds every ceiling


def full_jitter_s(tries: int, *, base_s: float, max_s: float, uniform: float | None = None) -> float:
    """Seconds until try number `tries` + 1; 0 ≤ s ≤ min(max_s, base_s · 2^(tries-1)), for tries ≥ 1.

    `uniform` in [0, 1) takes the place of the dice.
    """
    ceiling_s = min(max_s, base_s * 2.0 ** min(tries - 1, EXPONENT_MAX))
    return ceiling_s * (random.random() if uniform is None else uniform)  # noqa: S311 - jitter, not a secret
