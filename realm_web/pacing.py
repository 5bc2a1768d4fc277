"""How many steps to keep in flight: found by trying, as no measurement of an idle device tells it.

With too few the device waits for the host: in Chromium a result takes about 4 ms to come back from a busy
GPU, 0.2 ms from an idle one. With too many, only the steps behind an answer's end are wasted. Knows times,
nothing else.
"""

from __future__ import annotations

WINDOW = 12  # arrivals that one depth is judged by
GAIN = 0.04  # a doubled depth must save this share of the time between arrivals
PATIENCE = 1024  # arrivals until the next try, after one that did not pay


class Pacing:
    """The depth that makes arrivals most frequent. Tell it of every arrival while a sequence decodes.

    >>> pacing, now = Pacing(16), 0.0
    >>> for _ in range(200):
    ...     now += max(1.0, 4.2 / pacing.depth)  # ms: a step takes 1 and its result 4.2 to come back
    ...     pacing.arrive(now)
    >>> pacing.depth
    8
    """

    def __init__(self, maximum: int, depth: int = 2):
        self.maximum = maximum
        self.depth = min(depth, maximum)
        self._before: tuple[int, float] | None = (
            None  # the depth before this trial, and the time between arrivals
        )
        self._last: float | None = None
        self._settling = self.depth
        self._seconds: list[float] = []
        self._waiting = 0

    def pause(self) -> None:
        """The next arrival follows on something else than a decode step: its distance tells nothing."""
        self._last = None
        self._seconds.clear()
        self._settling = self.depth

    def arrive(self, now: float) -> None:
        """One more result, at this time in any unit."""
        last, self._last = self._last, now
        if self._waiting > 0:
            self._waiting -= 1
        elif last is None:
            pass
        elif self._settling > 0:  # submitted at the depth before
            self._settling -= 1
        else:
            self._seconds.append(now - last)
            if len(self._seconds) == WINDOW:
                self._judge(sum(self._seconds) / WINDOW)

    def _judge(self, seconds: float) -> None:
        if self._before is not None and seconds > self._before[1] * (1 - GAIN):
            self._set(self._before[0])
            self._before, self._waiting = None, PATIENCE
        elif self.depth < self.maximum:
            self._before = self.depth, seconds
            self._set(min(2 * self.depth, self.maximum))
        else:
            self._before, self._waiting = None, PATIENCE
        self._seconds.clear()

    def _set(self, depth: int) -> None:
        self.depth = self._settling = depth
