"""How far a long piece of work is: for a bar by a callback, for a log in a line now and then."""

import logging
import time
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Told the number of files done and the number of files in all."""

INTERVAL_SECONDS = 30.0
"""Lines in the log are at least this far apart."""

logger = logging.getLogger(__name__)


class Reporter:
    """Passes on how many files are done, to a callback or, where there is none, to the log.

    Speed and time left are those of this run: files that an earlier one did are counted, but took no time.

    Args:
        progress: told of every step; nothing is logged then.
        total: number of files in all.
        done: number of files that an earlier run did.
        audio_seconds: length of the audio in those.
        clock: seconds since any moment.
    """

    def __init__(
        self,
        progress: Progress | None,
        total: int,
        *,
        done: int = 0,
        audio_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress = progress
        self._clock = clock
        self._total = total
        self._done = self._done_before = done
        self._audio_seconds = audio_seconds
        self._begin = self._last_line = clock()
        if progress is not None:
            progress(done, total)

    def add(self, files: int, audio_seconds: float) -> None:
        """Count some files more as done, and the length of the audio that they gave."""
        self._done += files
        self._audio_seconds += audio_seconds
        if self._progress is not None:
            self._progress(self._done, self._total)
            return
        now = self._clock()
        if now - self._last_line >= INTERVAL_SECONDS and self._done < self._total:
            self._last_line = now
            logger.info("%s", self._line(now - self._begin))

    def _line(self, elapsed_seconds: float) -> str:
        speed = (self._done - self._done_before) / elapsed_seconds if elapsed_seconds else 0.0
        left = f"{duration((self._total - self._done) / speed)} left" if speed else "time left unknown"
        return (
            f"{self._done} of {self._total} files ({self._done / self._total:.1%}), {speed:.3g} files/s, "
            f"{self._audio_seconds / 3600:.1f} h of audio, {left}"
        )


def duration(seconds: float) -> str:
    """A length of time in its two largest units.

    >>> [duration(seconds) for seconds in (7.4, 95, 3 * 3600 + 725, 200_000)]
    ['7 s', '1 min 35 s', '3 h 12 min', '2 d 7 h']
    """
    minutes, rest_seconds = divmod(round(seconds), 60)
    hours, rest_minutes = divmod(minutes, 60)
    days, rest_hours = divmod(hours, 24)
    if days:
        return f"{days} d {rest_hours} h"
    if hours:
        return f"{hours} h {rest_minutes} min"
    return f"{minutes} min {rest_seconds} s" if minutes else f"{rest_seconds} s"
