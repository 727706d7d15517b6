"""The learning rate as a pure function of the step."""

import math


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, warmup_lr: float = 1e-6, min_lr: float = 1e-5
) -> float:
    """Linear warm-up from `warmup_lr` to `peak`, then half a cosine down to `min_lr`.

    Step 0 runs at `warmup_lr` (at `peak` without warm-up) and step `total_steps` would run at `min_lr`. As in timm's
    cosine scheduler without `warmup_prefix`, the cosine's clock starts at step 0, so the rate after the warm-up is a
    little below `peak`. Unlike facebookresearch/deit, where epochs 0 and 1 both train at `warmup_lr` and the schedule
    lags by one epoch, the rate moves at every step.
    """
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    progress = min(step / max(total_steps, 1), 1.0)
    return min_lr + (peak - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def scaled_peak(lr: float, global_batch: int, *, scale: bool = True) -> float:
    """lr * global_batch / 512: the linear rule of facebookresearch/deit main.py (`--unscale-lr` turns it off)."""
    return lr * global_batch / 512 if scale else lr
