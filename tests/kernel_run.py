"""Run one kernel once. Pure Python on the device interface: used natively and, as it is, in the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realm_web.runtime.device import Device


async def run_kernel(
    device: Device,
    kernel: str,
    consts: dict[str, Any],
    tensors: Sequence[bytes],
    outputs: Sequence[int],
    grid: Sequence[int],
) -> list[bytes]:
    """The bytes of the tensors named by `outputs`, after one run on fresh buffers."""
    buffers = []
    for i, data in enumerate(tensors):
        buffer = device.alloc(len(data), f"{kernel} {i}")
        device.write(buffer, data + bytes(-len(data) % 4))
        buffers.append(buffer)
    compiled = device.kernel(kernel, **consts)
    await device.compile()
    program = device.program(kernel)
    program.add(compiled, [device.view(buffer) for buffer in buffers], grid)
    device.submit(program)
    result = [await device.read(buffers[i]) for i in outputs]
    for buffer in buffers:
        device.free(buffer)
    return result
