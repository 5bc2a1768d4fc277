"""Whose turn it is on a thread that the device keeps while it is waited for: steps of wgpu-native and Dawn.

To wait for a result there is to give the thread away, and nothing else happens until the step is done: no
token reaches who reads it, no new request is heard. So before each wait everybody else has a turn, and a long
step is left alone until shortly before its end. Only then does the next one go to the device: whoever asked
meanwhile is in it, and waits for the rest of one step rather than for a whole one more (8B, 32 sequences:
11.6 ms a step).

In a page results are events, which take nobody's turn; there a long step only keeps others out by standing in
front of them.

Knows times and callbacks; neither what a step is nor what is asked of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable

from realm_web.runtime.device import Readback

Heard = Callable[[bytes | BaseException], None]

ENOUGH = 10e-3  # seconds of work in flight, of which results that come late hide the first ones
SHORT = 1e-3  # seconds of work in flight up to which more is given at once
MARGIN = 3e-3  # before the end of a step: timers come late, and to encode the next takes up to 1.6 ms
LOOK = 1e-3  # a step may be done long before: the first one of its kind was slow, say
TURNS = 3  # of the event loop: a request on a socket is read, parsed and asked
REMEMBERED = 4  # durations of each kind of step


class Foresight:
    """When the steps in flight will be done, by how long others of their kind took. In seconds.

    The least of the last few counts: one that is thought too short costs nothing but a turn.

    >>> ahead = Foresight()
    >>> ahead.arrive(ahead.submit("decode", 0.0), 2.0)
    >>> steps = [ahead.submit("decode", 2.0) for _ in range(2)]
    >>> ahead.until_next(2.5), ahead.until_all(2.5)
    (1.5, 3.5)
    """

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Durations] = {}
        self._steps: deque[Step] = deque()  # in flight
        self._last = 0.0  # when the one before them was done

    def submit(self, kind: Hashable, now: float) -> Step:
        known = self._kinds.get(kind)
        if known is None:
            known = self._kinds[kind] = _Durations()
        step = known, now
        self._steps.append(step)
        return step

    def arrive(self, step: Step, now: float) -> None:
        """The oldest is done, unless it was forgotten."""
        if self._steps and self._steps[0] is step:
            known, submitted = self._steps.popleft()
            known.add(now - max(submitted, self._last))
            self._last = now

    def until_next(self, now: float) -> float:
        """0 where nothing is known."""
        if not self._steps:
            return 0.0
        known, submitted = self._steps[0]
        return max(0.0, max(submitted, self._last) + known.least - now)

    def until_all(self, now: float) -> float:
        end = self._last
        for known, submitted in self._steps:
            end = max(end, submitted) + known.least
        return max(0.0, end - now)

    def forget(self) -> None:
        """None of those in flight will arrive."""
        self._steps.clear()


class _Durations:
    """The last of one kind of step, and the least of them, 0 before the first."""

    __slots__ = ("_last", "least")

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=REMEMBERED)
        self.least = 0.0

    def add(self, seconds: float) -> None:
        self._last.append(seconds)
        self.least = min(self._last)


Step = tuple[_Durations, float]  # and when it was submitted


class Events:
    """The steps in flight of a device whose results come by themselves, in a page some 4 ms late."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._foresight = Foresight()

    def may_submit(self, n_in_flight: int, depth: int) -> bool:
        """Whether one more step may be in flight now, of at most `depth`."""
        if n_in_flight < 2:
            return n_in_flight < depth
        return n_in_flight < depth and self._foresight.until_all(self._clock()) <= ENOUGH

    def expect(self, readback: Readback, kind: Hashable, heard: Heard) -> None:
        """A step was submitted; `heard` is called with its results, in the order of submission."""
        step = self._foresight.submit(kind, self._clock())

        def arrive(data: bytes | BaseException) -> None:
            self._foresight.arrive(step, self._clock())
            heard(data)

        readback.then(arrive)

    def forget(self) -> None:
        """The steps in flight will tell nothing."""
        self._foresight.forget()


class Turns:
    """The steps in flight of a device that blocks, waited for one by one. `fill` submits what can run.

    `fill` asks `may_submit` and is called again before every wait.
    """

    def __init__(
        self,
        fill: Callable[[], None],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._fill, self._clock, self._sleep = fill, clock, sleep
        self._foresight = Foresight()
        self._line: deque[tuple[Readback, Step, Heard]] = deque()
        self._due = False  # the wait for the oldest is about to begin
        self._task: asyncio.Task[None] | None = None

    def may_submit(self, n_in_flight: int, depth: int) -> bool:
        """Whether one more step may be in flight now, of at most `depth`."""
        if not n_in_flight or n_in_flight >= depth:
            return not n_in_flight
        left = self._foresight.until_all(self._clock())
        if left <= SHORT:
            return True
        return self._due and (n_in_flight == 1 or left <= n_in_flight * SHORT)

    def expect(self, readback: Readback, kind: Hashable, heard: Heard) -> None:
        """A step was submitted; `heard` is called with its results, in the order of submission."""
        step = self._foresight.submit(kind, self._clock())
        self._line.append((readback, step, heard))
        if self._task is None:
            self._task = asyncio.ensure_future(self._wait())

    def forget(self) -> None:
        """Nobody waits for the steps in flight any more."""
        self._line.clear()
        self._foresight.forget()

    async def _wait(self) -> None:
        try:
            while self._line:
                await self._give_turns()
                self._due = True
                self._fill()
                self._due = False
                if self._line:
                    await self._hear(*self._line.popleft())
        finally:
            self._task = None

    async def _give_turns(self) -> None:
        """Those who were handed a result have had theirs when this is called, the step after it."""
        if self._foresight.until_next(self._clock()) <= SHORT:
            return
        for _ in range(TURNS):
            await self._sleep(0)
        while self._line and self._foresight.until_next(self._clock()) > MARGIN + LOOK:
            if self._line[0][0].ready():
                break
            await self._sleep(LOOK)

    async def _hear(self, readback: Readback, step: Step, heard: Heard) -> None:
        done = asyncio.get_running_loop().create_future()

        def arrive(data: bytes | BaseException) -> None:
            self._foresight.arrive(step, self._clock())
            heard(data)
            if not done.cancelled():
                done.set_result(None)

        readback.then(arrive)
        await done
