"""The device interface: buffers, kernels compiled once, programs recorded once and replayed by one call.

`Device` holds every cache and every policy; a backend (`webgpu.py`, `browser.py`, `cpu.py`) is seven
primitives. Nothing here knows a model. Constants of a kernel are part of its name, so a cache key is a plain
value.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from realm_web.errors import DeviceError
from realm_web.runtime import template


class Readback(Protocol):
    """Bytes on their way from the device: await them, or have them passed on. One of the two, once."""

    def __await__(self) -> Generator[Any, None, bytes]: ...

    def then(self, callback: Callable[[bytes | BaseException], None]) -> None:
        """Call back in the order of submission, from the event loop; in a page without asyncio in between."""

    def ready(self) -> bool:
        """Whether they are there, so that nothing would have to wait; asks the device where needed."""


Replay = Callable[[], Readback | None]


@dataclass(frozen=True)
class Limits:
    """What one adapter allows. Bytes, except the counts."""

    max_buffer: int
    max_binding: int
    max_bindings: int  # storage buffers per kernel
    max_workgroups: int  # per grid dimension
    max_invocations: int  # threads per workgroup
    max_shared: int  # workgroup memory
    offset_alignment: int
    # that is still to be had, where the platform tells; 0: unknown
    memory: int = field(default=0, compare=False)


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter as a person would name it, and what it can do."""

    name: str
    kind: str  # "webgpu", "browser", "cpu"
    backend: str  # "Vulkan", "Metal", "D3D12", "OpenGL", "WebGPU", "numpy"
    adapter_type: str  # "DiscreteGPU", "IntegratedGPU", "CPU", ...
    features: frozenset[str]
    limits: Limits
    subgroup_size: int = 0  # the one size of every subgroup, or 0: unknown, or more than one
    driver: str = ""

    @property
    def is_cpu(self) -> bool:
        """A software rasteriser (or numpy): barriers are dear, threads are few."""
        return self.adapter_type == "CPU"


class Buffer:
    """Device memory. `handle` belongs to the backend."""

    __slots__ = ("handle", "label", "nbytes", "uid")

    def __init__(self, handle: Any, nbytes: int, label: str, uid: int):
        self.handle, self.nbytes, self.label, self.uid = handle, nbytes, label, uid

    def __repr__(self) -> str:
        return f"Buffer({self.label!r}, {self.nbytes})"


@dataclass(frozen=True)
class View:
    """A range of a buffer, as a kernel sees it."""

    buffer: Buffer
    offset: int
    nbytes: int

    @property
    def key(self) -> tuple[int, int, int]:
        return self.buffer.uid, self.offset, self.nbytes


@dataclass(eq=False)
class Kernel:
    """A kernel, compiled or still to be. Made by `Device.kernel` only, one per name and constants."""

    name: str
    consts: dict[str, Any]
    uid: int
    source: template.Source | None
    pipeline: Any = None

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.consts.items())})"


@dataclass(frozen=True)
class Step:
    kernel: Kernel
    views: tuple[View, ...]
    grid: tuple[int, int, int]
    label: str
    nbytes: int = 0  # that it must read and write, and
    flops: int = 0  # what it computes, for a person; 0: not known


@dataclass(eq=False)
class Program:
    """A linear list of kernel calls; `Device.submit` records it the first time, then only replays."""

    device: Device
    label: str
    steps: list[Step] = field(default_factory=list)
    readback: View | None = None
    replay: Replay | None = None

    def add(
        self, kernel: Kernel, views: Sequence[View], grid: Sequence[int], label: str = "",
        *, nbytes: int = 0, flops: int = 0,
    ) -> None:  # fmt: skip
        if self.replay is not None:
            raise RuntimeError(f"program {self.label} is already recorded")
        x, y, z = (*grid, 1, 1)[:3]
        self.device.check_step(kernel, views, (x, y, z))
        self.steps.append(Step(kernel, tuple(views), (x, y, z), label or kernel.name, nbytes, flops))


class Trace(Protocol):
    """Watches what runs."""

    def run(self, program: Program) -> Readback | None:
        """Enqueue the recorded program, by its own replay or by a timed one."""


class Backend(Protocol):
    """Seven primitives. A backend keeps no cache and takes no decision."""

    info: AdapterInfo
    tick: float  # seconds, of the feature "timestamps"

    def alloc(self, nbytes: int, label: str) -> Any:
        """Zeroed device memory. DeviceError when there is not enough (at the next await at the latest)."""

    def free(self, handle: Any) -> None: ...

    def write(self, handle: Any, data: Any, offset: int) -> None:
        """Copy bytes in queue order. `data` is bytes-like, or what the backend's own sources return."""

    async def read(self, handle: Any, offset: int, nbytes: int) -> bytes: ...

    async def compile(self, kernels: Sequence[Kernel], on_done: Callable[[], None]) -> None:
        """Set `pipeline` of every kernel, in parallel where the platform can."""

    def bind(self, kernel: Kernel, views: Sequence[View]) -> Any: ...

    def record(
        self, steps: Sequence[Step], bindings: Sequence[Any], readback: View | None, times: View | None = None
    ) -> Replay:
        """One callable that enqueues every step, and the copy of `readback` if there is one.

        With a readback it returns those bytes as a `Readback`, under way when it is returned. With `times`,
        every run leaves there when it began and ended: u64 (n_steps, 2) of each step or (1, 2) of all
        together, in units of `tick`.
        """

    async def synchronize(self) -> None:
        """Wait until everything submitted has run."""

    def close(self) -> None: ...


class Device:
    """An open adapter. Not thread-safe: one thread (or one event loop) drives it."""

    def __init__(self, backend: Backend, *, disabled: frozenset[str] = frozenset(), reason: str = ""):
        self.backend = backend
        self.info = backend.info
        self.features = self.info.features - disabled
        self.limits = self.info.limits
        self.reason = reason  # why this device was chosen, for a person
        self.n_created = (
            0  # buffers, kernels and bind groups made so far: constant while tokens are generated
        )
        self.allocated = 0  # bytes
        self.tuned: dict[str, Any] = {}  # variants of kernels that were measured: see `tuning.py`
        self.tiles: dict[str, Any] = {}  # of products of many rows, measured: see `tiling.py`
        self.trace: Trace | None = None  # runs programs in the place of their own replay
        self._kernels: dict[tuple, Kernel] = {}
        self._new: list[Kernel] = []
        self._bindings: dict[tuple, Any] = {}

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def kind(self) -> str:
        return self.info.kind

    @property
    def subgroup_size(self) -> int:
        """The size of every subgroup, 0 where subgroups are absent, disabled or of several sizes."""
        return self.info.subgroup_size if "subgroups" in self.features else 0

    def alloc(self, nbytes: int, label: str) -> Buffer:
        """Zeroed memory of `nbytes`, rounded up to 16. DeviceError says what was needed and allowed."""
        size = -(-max(nbytes, 16) // 16) * 16
        if size > self.limits.max_buffer:
            raise DeviceError(
                f"{label} needs one buffer of {size:,} bytes, "
                f"but {self.name} allows {self.limits.max_buffer:,}; "
                "use a smaller model or context, or another device"
            )
        buffer = Buffer(self.backend.alloc(size, label), size, label, self._count())
        self.allocated += size
        return buffer

    def free(self, buffer: Buffer) -> None:
        """Give memory back. Bind groups over it are dropped."""
        self._bindings = {k: v for k, v in self._bindings.items() if all(u != buffer.uid for u, _, _ in k[1])}
        self.allocated -= buffer.nbytes
        self.backend.free(buffer.handle)
        buffer.handle = None

    def view(self, buffer: Buffer, offset: int = 0, nbytes: int | None = None) -> View:
        return View(buffer, offset, buffer.nbytes - offset if nbytes is None else nbytes)

    def write(self, buffer: Buffer, data: Any, offset: int = 0) -> None:
        """Copy bytes to the device, ordered with submissions. Offset and length are multiples of 4."""
        self.backend.write(buffer.handle, data, offset)

    async def read(self, buffer: Buffer, offset: int = 0, nbytes: int | None = None) -> bytes:
        nbytes = buffer.nbytes - offset if nbytes is None else nbytes
        return await self.backend.read(buffer.handle, offset, nbytes)

    def kernel(self, name: str, **consts: Any) -> Kernel:
        """The kernel `shaders/<name>.wgsl` with these (hashable) constants; the same object every time."""
        key = (name, tuple(sorted(consts.items())))
        kernel = self._kernels.get(key)
        if kernel is None:
            source = None if self.kind == "cpu" else template.render(name, consts)
            kernel = self._kernels[key] = Kernel(name, consts, self._count(), source)
            self._new.append(kernel)
        return kernel

    async def compile(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Compile every kernel asked for since the last call. DeviceError shows the numbered source."""
        new, self._new = self._new, []
        if not new:
            return
        done = 0

        def one_done() -> None:
            nonlocal done
            done += 1
            if on_progress:
                on_progress(done, len(new))

        await self.backend.compile(new, one_done)

    def program(self, label: str) -> Program:
        return Program(self, label)

    def submit(self, program: Program, times: int = 1) -> Readback | None:
        """Enqueue the program; with a readback, that of its last run."""
        replay = program.replay or self._record(program)
        result = None
        for _ in range(times):
            result = replay() if self.trace is None else self.trace.run(program)
        return result

    def record_timed(self, program: Program, times: View) -> Replay:
        """A second recording of the program, that leaves each step's begin and end (see Backend.record)."""
        if "timestamps" not in self.features:
            raise DeviceError(f"{self.name} cannot write timestamps")
        bindings = [self._binding(step) for step in program.steps]
        return self.backend.record(program.steps, bindings, program.readback, times)

    async def time_program(self, program: Program, runs: int = 16, *, whole: bool = False) -> list[float]:
        """Seconds that each step of a program takes on the device, the mean of some runs of the whole.

        `whole`: all steps together, as one number.
        """
        from realm_web.runtime import profiler

        return await profiler.time_program(self, program, runs, whole=whole)

    async def synchronize(self) -> None:
        await self.backend.synchronize()

    async def measure_bandwidth(self) -> float:
        """Bytes per second that a plain kernel reads from device memory."""
        from realm_web.runtime import profiler

        return await profiler.measure_bandwidth(self)

    def close(self) -> None:
        self.backend.close()

    def check_step(self, kernel: Kernel, views: Sequence[View], grid: tuple[int, int, int]) -> None:
        """Raise DeviceError where a call would break a limit of this adapter."""
        if kernel.source and len(views) != len(kernel.source.access):
            raise DeviceError(
                f"{kernel}: {len(views)} tensors given, {len(kernel.source.access)} bindings declared"
            )
        if len(views) > self.limits.max_bindings:
            raise DeviceError(
                f"{kernel}: {len(views)} bindings, {self.name} allows {self.limits.max_bindings}"
            )
        if max(grid) > self.limits.max_workgroups or min(grid) < 1:
            raise DeviceError(
                f"{kernel}: grid {grid}, {self.name} allows 1..{self.limits.max_workgroups} each way"
            )
        for view in views:
            if view.nbytes > self.limits.max_binding:
                raise DeviceError(
                    f"{kernel}: a binding of {view.nbytes:,} bytes ({view.buffer.label}), {self.name} allows "
                    f"{self.limits.max_binding:,}"
                )
            if view.offset % self.limits.offset_alignment:
                raise DeviceError(f"{kernel}: offset {view.offset} of {view.buffer.label} is not aligned")

    def _record(self, program: Program) -> Replay:
        bindings = [self._binding(step) for step in program.steps]
        program.replay = self.backend.record(program.steps, bindings, program.readback)
        return program.replay

    def _binding(self, step: Step) -> Any:
        key = (step.kernel.uid, tuple(view.key for view in step.views))
        if key not in self._bindings:
            if step.kernel.pipeline is None:
                raise RuntimeError(f"{step.kernel} is not compiled: await device.compile() first")
            self._bindings[key] = self.backend.bind(step.kernel, step.views)
            self._count()
        return self._bindings[key]

    def _count(self) -> int:
        self.n_created += 1
        return self.n_created
