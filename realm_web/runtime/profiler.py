"""How fast a device is, and where a program's time goes.

Timestamps tell it to the step where the device writes them; otherwise the clock, over many repeats.
"""

from __future__ import annotations

import re
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from realm_web.errors import DeviceError
from realm_web.runtime.device import Device, Program, Readback, Step

PROBE_BYTES = 1 << 30  # far beyond any cache
AWAKE = 0.3  # seconds until a GPU that idled is at its clocks: before, an H200 read at 0.4 to 0.8 of its rate
CPU_PROBE_BYTES = 1 << 26
SHARE = 4096  # vec4 loads per thread of the probe
MAX_TIMED = 2048  # steps of one program: WebGPU allows 4096 queries in a set
WARM_UP = 2  # runs of a program before the trace times it
TIMED_RUNS = 32  # Chromium rounds to 100 us: the mean of many is still right


@dataclass(frozen=True)
class KernelTime:
    """One kind of step of a program: how often it occurs, and of one call the time and the work.

    >>> kind = KernelTime("matvec blk.*.ffn_down", 30, (36, 1, 1), 2e-6, 1_000_000, 4_000_000)
    >>> kind.gb_per_second, kind.tflops
    (500.0, 2.0)
    """

    label: str
    count: int
    grid: tuple[int, int, int]
    seconds: float
    nbytes: int  # that it must read and write; 0: not known
    flops: int

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12 if self.seconds else 0.0


async def timed(device: Device, program: Program, times: int) -> float:
    """Seconds per run of a program, warm: the median of five goes."""
    device.submit(program)
    await device.synchronize()
    goes = []
    for _ in range(5):
        start = time.perf_counter()
        device.submit(program, times)
        await device.synchronize()
        goes.append((time.perf_counter() - start) / times)
    return sorted(goes)[2]


async def measure_bandwidth(device: Device) -> float:
    """Bytes per second that a plain kernel reads from device memory."""
    size = CPU_PROBE_BYTES if device.info.is_cpu else PROBE_BYTES
    size = min(size, device.limits.max_binding, device.limits.max_buffer) // (64 * SHARE) * 64 * SHARE
    threads = size // 16
    groups = min(threads // 256, device.limits.max_workgroups)
    buffer = device.alloc(size, "bandwidth probe")
    out = device.alloc(16, "bandwidth probe result")
    kernel = device.kernel("stream_read", n=threads, stride=groups * 256)
    await device.compile()
    program = device.program("bandwidth probe")
    program.add(kernel, (device.view(buffer), device.view(out)), (groups,))
    warm = time.perf_counter() + (0 if device.info.is_cpu else AWAKE)
    seconds = await timed(device, program, 4)
    while time.perf_counter() < warm:
        seconds = min(seconds, await timed(device, program, 16))
    device.free(buffer)
    device.free(out)
    return size / seconds


async def time_program(device: Device, program: Program, runs: int, *, whole: bool = False) -> list[float]:
    """Seconds of each step, the mean over runs of the whole program. DeviceError without timestamps.

    `whole`: one number for all of it, without the 2.7 us a step that timing each by itself adds (H200).
    """
    clock = Clock(device, program, whole=whole)
    try:
        for _ in range(runs):
            clock.run()
            clock.add(await clock.read())
        return clock.seconds()
    finally:
        clock.close()


async def profile(device: Device, program: Program, runs: int = 16) -> list[KernelTime]:
    """The time of each distinct kernel of a recorded program, in order of first use."""
    if "timestamps" in device.features and len(program.steps) <= MAX_TIMED:
        return kinds(program.steps, await time_program(device, program, runs))
    seconds: dict[tuple, float] = {}
    for key, steps in _by_kind(program.steps).items():
        # cycle through the layers' own buffers, so that caches are as cold as in a real pass
        alone = replace(program, label="profile", steps=[], readback=None, replay=None)
        for i in range(4 * runs):
            step = steps[i % len(steps)]
            alone.add(step.kernel, step.views, step.grid, step.label)
        seconds[key] = await timed(device, alone, 1) / (4 * runs)
    return kinds(program.steps, [seconds[_kind(step)] for step in program.steps])


def kinds(steps: Sequence[Step], seconds: Sequence[float]) -> list[KernelTime]:
    """Steps of one kernel, grid and amount of work taken together: their mean time."""
    totals: dict[tuple, float] = {}
    for step, spent in zip(steps, seconds, strict=True):
        totals[_kind(step)] = totals.get(_kind(step), 0.0) + spent
    return [
        KernelTime(
            _common_label(group), len(group), group[0].grid, totals[key] / len(group), group[0].nbytes,
            group[0].flops,
        )
        for key, group in _by_kind(steps).items()
    ]  # fmt: skip


def lines(program: str, times: Iterable[KernelTime]) -> list[str]:
    """A table for people: a line per kernel, and the sum."""
    rows = [(f"{program}: kernel", "calls", "grid", "us each", "us", "GB/s", "TFLOP/s")]
    total = calls = 0
    for kind in times:
        total, calls = total + kind.count * kind.seconds, calls + kind.count
        rows.append(
            (
                kind.label,
                str(kind.count),
                "x".join(map(str, kind.grid)),
                f"{1e6 * kind.seconds:.1f}",
                f"{1e6 * kind.count * kind.seconds:.0f}",
                f"{kind.gb_per_second:.0f}" if kind.nbytes else "",
                f"{kind.tflops:.2f}" if kind.flops else "",
            )
        )
    rows.append(("sum", str(calls), "", "", f"{1e6 * total:.0f}", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_aligned(row, widths) for row in rows]


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = row
    return "  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])])


class Clock:
    """A timed recording of a program, and the sum of what its runs took: each step, or all together."""

    def __init__(self, device: Device, program: Program, *, whole: bool = False):
        if len(program.steps) > MAX_TIMED and not whole:
            raise DeviceError(
                f"{program.label}: {len(program.steps)} steps, {MAX_TIMED} can be timed at once"
            )
        self._device, self._n = device, 1 if whole else len(program.steps)
        self._times = device.alloc(16 * self._n, "timestamps")
        self.run = device.record_timed(program, device.view(self._times, 0, 16 * self._n))
        self._reader = device.program("timestamps")
        self._reader.readback = device.view(self._times, 0, 16 * self._n)
        self._ticks = [0] * self._n
        self._runs = 0

    def read(self) -> Readback:
        """The timestamps of the run just enqueued, on their way."""
        return self._device.submit(self._reader)

    def add(self, data: bytes) -> int:
        """Count one run's timestamps in; how many runs are in."""
        ticks = array("Q", data)
        for i in range(self._n):
            self._ticks[i] += max(0, ticks[2 * i + 1] - ticks[2 * i])
        self._runs += 1
        return self._runs

    def seconds(self) -> list[float]:
        return [ticks * self._device.backend.tick / self._runs for ticks in self._ticks]

    def close(self) -> None:
        self._device.free(self._times)


class HostTime:
    """What the host does for each step: seconds spent submitting, and in Python when a result arrives.

    A trace: what runs is what would run without, and may be awaited or passed on as ever.
    """

    def __init__(self) -> None:
        self.last: Program | None = None
        self.reset()

    def reset(self) -> None:
        self.n_steps = 0
        self.submitting = 0.0
        self.handing_on = 0.0  # less what was submitted meanwhile

    def run(self, program: Program) -> Readback | None:
        start = time.perf_counter()
        result = program.replay()
        self.submitting += time.perf_counter() - start
        self.n_steps, self.last = self.n_steps + 1, program
        return result and _Watched(result, self)


class _Watched:
    """A readback whose callback is timed."""

    __slots__ = ("_inner", "_times")

    def __init__(self, inner: Readback, times: HostTime):
        self._inner, self._times = inner, times

    def __await__(self):
        return self._inner.__await__()

    def then(self, callback: Callable[[bytes | BaseException], None]) -> None:
        def watched(data: bytes | BaseException) -> None:
            times = self._times
            start, submitting = time.perf_counter(), times.submitting
            callback(data)
            times.handing_on += time.perf_counter() - start - (times.submitting - submitting)

        self._inner.then(watched)

    def ready(self) -> bool:
        return self._inner.ready()


class Tracer:
    """Times some of the first runs of every program, in the place of plain ones, and writes a table of each.

    The timed runs are those that were asked for: nothing runs twice, and answers stay what they are.
    """

    def __init__(self, device: Device, write: Callable[[str], None]):
        self._device, self._write = device, write
        self._n_runs: dict[Program, int] = {}
        self._clocks: dict[Program, Clock] = {}

    def run(self, program: Program) -> Readback | None:
        if not 1 < len(program.steps) <= MAX_TIMED:
            return program.replay()
        n = self._n_runs[program] = self._n_runs.get(program, 0) + 1
        if not WARM_UP < n <= WARM_UP + TIMED_RUNS:
            return program.replay()
        if program not in self._clocks:
            self._clocks[program] = Clock(self._device, program)
        clock = self._clocks[program]
        result = clock.run()
        clock.read().then(lambda data: self._arrive(program, data))
        return result

    def _arrive(self, program: Program, data: bytes | BaseException) -> None:
        if isinstance(data, BaseException):
            self._write(f"{program.label}: no timestamps: {data}")
        elif self._clocks[program].add(data) == TIMED_RUNS:
            clock = self._clocks.pop(program)
            times = kinds(program.steps, clock.seconds())
            self._write("\n".join(lines(program.label, times)))
            clock.close()


def _kind(step: Step) -> tuple:
    return step.kernel.uid, step.grid, step.nbytes


def _by_kind(steps: Iterable[Step]) -> dict[tuple, list[Step]]:
    groups: dict[tuple, list[Step]] = {}
    for step in steps:
        groups.setdefault(_kind(step), []).append(step)
    return groups


def _common_label(steps: Sequence[Step]) -> str:
    """What the layers' labels have in common: `matvec blk.*.ffn_down`."""
    label = steps[0].label
    return label if len(steps) == 1 else re.sub(r"\.\d+\.", ".*.", label)
