"""How fast a device is, and where a program's time goes: wall-clock over many repeats, to work everywhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from realm_web.runtime.device import Device, Program, Step

PROBE_BYTES = 1 << 30  # far beyond any cache
CPU_PROBE_BYTES = 1 << 26
SHARE = 4096  # vec4 loads per thread of the probe


@dataclass(frozen=True)
class KernelTime:
    """One kind of step of a program: how often it occurs, and the time and bytes bound of one call."""

    label: str
    count: int
    seconds: float
    nbytes: int  # of all its bindings: an upper bound of what it reads


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
    seconds = await timed(device, program, 4)
    device.free(buffer)
    device.free(out)
    return size / seconds


async def profile(device: Device, program: Program, repeats: int = 64) -> list[KernelTime]:
    """The time of each distinct kernel of a recorded program, each repeated alone, in order of first use."""
    kinds: dict[int, list[Step]] = {}
    for step in program.steps:
        kinds.setdefault(step.kernel.uid, []).append(step)
    result = []
    for steps in kinds.values():
        # cycle through the layers' own buffers, so that caches are as cold as in a real pass
        alone = replace(program, label="profile", steps=[], readback=None, replay=None)
        for i in range(repeats):
            step = steps[i % len(steps)]
            alone.add(step.kernel, step.views, step.grid, step.label)
        seconds = await timed(device, alone, 1) / repeats
        nbytes = max(sum(view.nbytes for view in step.views) for step in steps)
        result.append(KernelTime(steps[0].label, len(steps), seconds, nbytes))
    return result
