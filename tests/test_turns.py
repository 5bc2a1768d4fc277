"""The order of a host whose device keeps its thread, on a device and a clock of the test's own."""

import asyncio
from itertools import pairwise

import pytest

from realm_web.turns import LOOK, MARGIN, Events, Foresight, Turns

HOST = 0.0002  # seconds that the host needs to submit, and to hand out
LATE = 0.0005  # a timer may come so much later than asked for


class World:
    """A device that runs what is submitted in order, and a clock that only waiting moves."""

    def __init__(self, seconds: float, n_steps: int, depth: int = 2, first: float | None = None):
        self.now, self.depth = 0.0, depth
        self.first = first or seconds
        self.seconds, self.n_left, self.n_in_flight = seconds, n_steps, 0
        self.submitted: list[tuple[float, float, float]] = []  # when, begin and end on the device
        self.log: list[str] = []
        self.later: list[float] = []  # when requests will be asked
        self.asked: list[float] = []  # requests that no step has taken yet
        self.taken: list[tuple[float, int]] = []  # when a request was asked, and the step that takes it
        self.turns = Turns(self.fill, clock=lambda: self.now, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        until = self.now + seconds + (LATE if seconds else 0)
        for request in [r for r in self.later if r <= until]:
            self.later.remove(request)
            self.now = max(self.now, request)
            self.ask(request)
        self.now = until
        await asyncio.sleep(0)

    def ask(self, request: float) -> None:
        self.asked.append(request)
        self.fill()

    def fill(self) -> None:
        while self.n_left and self.turns.may_submit(self.n_in_flight, self.depth):
            self.n_left -= 1
            self.n_in_flight += 1
            self.now += HOST
            step = len(self.submitted)
            begin = max(self.now, self.submitted[-1][2]) if self.submitted else self.now
            seconds = self.first if step == 0 else self.seconds
            self.submitted.append((self.now, begin, begin + seconds))
            self.taken += [(request, step) for request in self.asked]
            self.asked.clear()
            self.turns.expect(_Later(self, step), "step", lambda data, step=step: self.arrive(step))

    def arrive(self, step: int) -> None:
        self.log.append(f"done {step}")
        self.n_in_flight -= 1
        self.now += HOST
        asyncio.get_running_loop().call_soon(self.log.append, f"read {step}")
        self.fill()

    def run(self) -> None:
        async def main() -> None:
            self.fill()
            while self.n_in_flight:
                await asyncio.sleep(0)
            await asyncio.sleep(0)

        asyncio.run(main())


class _Later:
    """A readback that takes the thread until its step is done."""

    def __init__(self, world: World, step: int):
        self.world, self.step = world, step

    def then(self, callback) -> None:
        asyncio.get_running_loop().call_soon(self.wait, callback)

    def ready(self) -> bool:
        return self.world.now >= self.world.submitted[self.step][2]

    def wait(self, callback) -> None:
        world = self.world
        world.log.append(f"wait {self.step}")
        world.now = max(world.now, world.submitted[self.step][2])
        callback(b"")


@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("seconds", [0.0002, 0.0006, 0.0027, 0.0116, 0.04])
def test_whoever_reads_a_result_does_so_before_the_next_wait(seconds, depth):
    world = World(seconds, 20, depth)
    world.run()
    waits = [f"{what} {step}" for step in range(20) for what in ("wait", "done", "read")]
    assert world.log == waits


@pytest.mark.parametrize("depth", [2, 8])
@pytest.mark.parametrize("seconds", [0.0006, 0.0011, 0.0022, 0.0027, 0.0031, 0.0042, 0.0116, 0.04])
def test_the_device_never_waits_for_the_host(seconds, depth):
    world = World(seconds, 40, depth)
    world.run()
    for before, after in pairwise(world.submitted):
        assert after[1] == before[2]


def test_short_steps_are_as_many_in_flight_as_they_may_and_long_ones_two():
    for seconds, most in ((0.0006, 8), (0.0027, 2)):
        world = World(seconds, 60, depth=8)
        world.run()
        in_front = [
            sum(end > at for _, _, end in world.submitted[:i]) for i, (at, _, _) in enumerate(world.submitted)
        ]
        assert max(in_front[20:]) == most - 1


def test_a_request_that_comes_during_a_long_step_is_in_the_next_one():
    world = World(0.0116, 20)
    world.later = [0.0116 * n + 0.004 for n in range(8, 12)]
    world.run()
    assert len(world.taken) == 4
    for asked, step in world.taken:
        assert world.submitted[step][1] - asked < 0.0116


def test_a_long_step_is_left_alone_until_shortly_before_its_end():
    world = World(0.0116, 20)
    world.run()
    for submitted, begin, _ in world.submitted[8:]:
        assert HOST <= begin - submitted <= MARGIN + LOOK


@pytest.mark.parametrize("seconds", [0.0006, 0.0027, 0.0116, 0.038])
def test_a_first_step_that_was_slow_does_not_make_the_host_late(seconds):
    world = World(seconds, 20, first=0.1)
    world.run()
    begins = [begin for _, begin, _ in world.submitted]
    ends = [end for _, _, end in world.submitted]
    idle = [begin - end for begin, end in zip(begins[1:], ends, strict=False)]
    assert sum(idle) < 2 * (LOOK + LATE)
    assert idle[2:] == [0.0] * 17


def test_steps_that_are_forgotten_are_not_waited_for():
    world = World(0.01, 2)

    async def main() -> None:
        world.fill()
        world.turns.forget()
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.log == []
        world.n_in_flight, world.n_left = 0, 1
        world.fill()
        while world.n_in_flight:
            await asyncio.sleep(0)

    asyncio.run(main())
    assert world.log[0].startswith("wait")


@pytest.mark.parametrize(("seconds", "most"), [(0.0006, 16), (0.004, 3), (0.0116, 2)])
def test_in_a_page_long_steps_are_two_in_flight_and_short_ones_as_many_as_they_may(seconds, most):
    now, late = 0.0, []
    events = Events(clock=lambda: now)

    class Late:
        def then(self, callback):
            late.append(callback)

    for _ in range(20):
        while events.may_submit(len(late), 16):
            events.expect(Late(), "step", lambda data: None)
        now += seconds
        late.pop(0)(b"")
    assert len(late) == most - 1


def test_nothing_is_foreseen_of_what_never_ran():
    ahead = Foresight()
    assert ahead.until_all(5.0) == ahead.until_next(5.0) == 0.0
    lost = ahead.submit("new", 4.0)
    ahead.forget()
    step = ahead.submit("new", 5.0)
    assert ahead.until_all(5.0) == 0.0
    ahead.arrive(lost, 8.0)
    ahead.arrive(step, 9.0)
    ahead.submit("new", 10.0)
    assert ahead.until_all(11.0) == 3.0


def test_the_shortest_of_the_last_durations_is_foreseen():
    ahead, now = Foresight(), 0.0
    for took in (1.0, 5.0, 4.0, 6.0, 7.0):
        step = ahead.submit("step", now)
        now += took
        ahead.arrive(step, now)
    ahead.submit("step", now)
    assert ahead.until_all(now) == 4.0
