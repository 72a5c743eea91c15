"""How the learning rate and k move over a run."""

__all__ = ["annealed_k", "learning_rate_share"]


def learning_rate_share(step: int, steps: int, warmup: float, decay: float) -> float:
    """The share of the peak learning rate that holds at a step: a linear rise, a plateau, a linear fall to 0.

    Args:
        step: from 0 to `steps` - 1.
        steps: steps in the run.
        warmup: share of the run over which it rises.
        decay: share of the run, at its end, over which it falls.
    """
    rising = (step + 1) / (warmup * steps) if warmup else 1.0
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return max(0.0, min(1.0, rising, falling))


def annealed_k(step: int, steps: int, k: int, k_start: int, share: float) -> int:
    """Features a row at a step: a linear fall from `k_start` to `k` over a share of the run, then `k`."""
    if not share or step >= share * steps:
        return k
    return round(k_start + (k - k_start) * step / (share * steps))
