"""How fast a run goes and when it will end, and the lines of the log that say so."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

_INTERVALS = 10


class Pace:
    """The speed of a run, in this process.

    A step takes what it took over the last ten intervals. What comes between steps, evaluations and checkpoints, comes
    too seldom for that, and is spread over all steps of the process.

    Args:
        step: steps that were taken before.
        clock: seconds since any moment.
    """

    def __init__(self, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self._step = step
        self._steps = 0
        self._seconds = 0.0
        self._recent: deque[tuple[int, float]] = deque(maxlen=_INTERVALS)

    def add(self, step: int, num_steps: int, seconds: float) -> None:
        """Count an interval that ends at `step`: `num_steps` of this process, which took so many seconds themselves."""
        self._step = step
        self._steps += num_steps
        self._seconds += seconds
        self._recent.append((num_steps, seconds))

    def seconds_left(self, total_steps: int | None) -> float | None:
        """Time until `total_steps` are taken; None while that cannot be told."""
        recent_steps = sum(steps for steps, _ in self._recent)
        if total_steps is None or not recent_steps:
            return None
        between = max(0.0, self._clock() - self._begin - self._seconds)
        seconds_a_step = sum(seconds for _, seconds in self._recent) / recent_steps + between / self._steps
        return max(0, total_steps - self._step) * seconds_a_step


def interval_line(
    step: int, total_steps: int | None, epoch: int, values: Mapping[str, float], eer: float | None, now: datetime
) -> str:
    """The line of the log for an interval, aligned with the lines before and after it.

    Args:
        step: last step of the interval.
        total_steps: of the run, if that is known.
        epoch: of the step.
        values: as in `metrics.jsonl`.
        eer: of the last evaluation, a fraction; None if there was none.
        now: local time.
    """
    parts = [f"{_position(step, total_steps, epoch)}  loss {values['loss']:.4f}"]
    if "w" in values:
        parts.append(f"w {values['w']:4.1f}")
    elif "accuracy" in values:
        # Of a head its loss says little: that moves with margin and scale, too.
        parts.append(f"acc {100 * values['accuracy']:3.0f}%")
    parts.append("EER   -   " if eer is None else f"EER {100 * eer:5.2f}%")
    speed = values["utterances_per_second"]
    parts.append(f"{speed:{'4.0f' if speed >= 100 else '4.1f'}} utt/s")
    parts.append(f"wait {100 * values['data_wait']:2.0f}%")
    parts.append(f"{values['step_seconds']:.3f} s/step")
    parts.append(f"{values['memory_gib']:.1f} GiB")
    if values.get("faults"):
        parts.append(f"{values['faults']:.0f} unreadable")
    if values.get("skipped"):
        parts.append(f"{values['skipped']:.0f} skipped")
    if "eta_seconds" in values:
        parts.append(_end(values["eta_seconds"], now))
    return "  ".join(parts)


def evaluation_line(step: int, total_steps: int | None, epoch: int, eer: float, min_dcf: float) -> str:
    """The line of the log for an evaluation; `eer` is a fraction."""
    return f"{_position(step, total_steps, epoch)}  validation EER {100 * eer:.2f} %  minDCF {min_dcf:.4f}"


def _position(step: int, total_steps: int | None, epoch: int) -> str:
    if total_steps is None:
        return f"step {step}  epoch {epoch}"
    return f"step {step:{len(str(total_steps))}}/{total_steps}  epoch {epoch}"


def _end(seconds: float, now: datetime) -> str:
    end = now + timedelta(seconds=seconds)
    # The day says nothing that the clock does not say while it is the same one.
    clock = end.strftime("%H:%M" if end.date() == now.date() else "%m-%d %H:%M")
    return f"ETA {_duration(round(seconds))}, {clock}"


def _duration(seconds: int) -> str:
    """The two largest units.

    >>> _duration(59), _duration(725), _duration(4325), _duration(400_000)
    ('0m59s', '12m05s', '1h12m', '4d15h')
    """
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days}d{hours % 24:02}h"
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{seconds % 60:02}s"
