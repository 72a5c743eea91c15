"""How the learning rate moves over a run."""

__all__ = ["learning_rate_share"]


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
