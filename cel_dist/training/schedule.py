"""Learning rate and margin as pure functions of the step, so that a resumed run cannot be off by one."""

import math

from cel_dist.config import Config
from cel_dist.config_sections import HeadSection, OptimSection


def num_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    epochs_steps = config.train.epochs * steps_per_epoch
    return min(epochs_steps, config.train.max_steps or epochs_steps)


def learning_rate(config: OptimSection, *, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of a step.

    Args:
        config: peak, kind and bounds of the schedule.
        step: optimizer steps taken before this one, from 0.
        steps_per_epoch: steps of an epoch; the step schedule decays at the ends of epochs.
        total_steps: steps of the whole run; the cosine ends there.

    >>> config = OptimSection(lr=1.0, decay=0.5, decay_epochs=2, warmup_steps=2)
    >>> [learning_rate(config, step=step, steps_per_epoch=3, total_steps=12) for step in (0, 1, 2, 5, 6)]
    [0.5, 1.0, 1.0, 1.0, 0.5]
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "step":
        decays = step // steps_per_epoch // config.decay_epochs
        return config.lr * config.decay**decays * warmup
    progress = (step - config.warmup_steps) / max(1, total_steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return (config.min_lr + (config.lr - config.min_lr) * cosine) * warmup


def margin(config: HeadSection, *, step: int, steps_per_epoch: int) -> float:
    """Margin of a step: 0, then growing linearly, then `config.margin`; all at once where it has no time to grow.

    Args:
        config: margin, and the epochs between which it grows.
        step: optimizer steps taken before this one, from 0.
        steps_per_epoch: steps of an epoch.

    >>> config = HeadSection(margin=0.2, margin_from_epoch=1, margin_until_epoch=3)
    >>> [margin(config, step=step, steps_per_epoch=2) for step in (0, 2, 4, 6)]
    [0.0, 0.0, 0.1, 0.2]
    """
    first, last = config.margin_from_epoch, config.margin_until_epoch
    epoch = step / steps_per_epoch
    if epoch >= last:
        return config.margin
    return config.margin * (epoch - first) / (last - first) if epoch > first else 0.0
