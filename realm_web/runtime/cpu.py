"""The CPU backend: buffers are numpy arrays, kernels are the twins of `cpu_*.py`.

With the feature "dense" weights are dequantised at load, so that every product is one BLAS call: quick, but
four bytes a weight. Without it they stay packed and are decoded a tile at a time. `Engine.open` decides.
"""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from realm_web.errors import DeviceError
from realm_web.runtime import cpu_attention, cpu_kernels, cpu_matmul, cpu_moe, cpu_sampling, cpu_score
from realm_web.runtime.device import AdapterInfo, Kernel, Limits, Replay, Step, View
from realm_web.runtime.memory import available_memory

UNLIMITED = 1 << 62
TWINS = (
    cpu_kernels.TWINS
    | cpu_attention.TWINS
    | cpu_matmul.TWINS
    | cpu_moe.TWINS
    | cpu_sampling.TWINS
    | cpu_score.TWINS
)


@cache
def info() -> AdapterInfo:
    return AdapterInfo(
        name=f"{_processor()} (numpy {np.__version__})",
        kind="cpu",
        backend="numpy",
        adapter_type="CPU",
        features=frozenset({"dense", "timestamps"}),
        limits=Limits(UNLIMITED, UNLIMITED, 64, UNLIMITED, UNLIMITED, UNLIMITED, 4, available_memory()),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class CPUBackend:
    tick = 1e-9

    def __init__(self) -> None:
        self.info = info()

    def alloc(self, nbytes: int, label: str) -> np.ndarray:
        try:
            return np.zeros(nbytes, np.uint8)
        except MemoryError as error:
            raise DeviceError(
                f"this machine has no room for {label} ({nbytes:,} bytes): use a smaller model or --context"
            ) from error

    def free(self, handle: np.ndarray) -> None:
        pass  # the array goes with its last reference

    def write(self, handle: np.ndarray, data: Any, offset: int) -> None:
        source = np.frombuffer(data, np.uint8)
        handle[offset : offset + len(source)] = source

    async def read(self, handle: np.ndarray, offset: int, nbytes: int) -> bytes:
        return handle[offset : offset + nbytes].tobytes()

    async def compile(self, kernels: Sequence[Kernel], on_done: Callable[[], None]) -> None:
        for kernel in kernels:
            if kernel.name not in TWINS:
                raise DeviceError(
                    f"the CPU backend has no kernel {kernel.name!r}; it has {', '.join(sorted(TWINS))}"
                )
            kernel.pipeline = TWINS[kernel.name]
            on_done()

    def bind(self, kernel: Kernel, views: Sequence[View]) -> list[np.ndarray]:
        return [view.buffer.handle[view.offset : view.offset + view.nbytes] for view in views]

    def record(
        self, steps: Sequence[Step], bindings: Sequence[Any], readback: View | None, times: View | None = None
    ) -> Replay:
        clock = times and times.buffer.handle[times.offset :][: times.nbytes].view(np.uint64)
        calls = [
            (step.kernel.pipeline, step.kernel.consts, b) for step, b in zip(steps, bindings, strict=True)
        ]

        def replay():
            # as on a GPU, weights that are no numbers give logits that are none, and the engine says so
            with np.errstate(over="ignore", invalid="ignore"):
                for i, (function, consts, arrays) in enumerate(calls):
                    began = time.perf_counter_ns()
                    function(consts, arrays)
                    if clock is not None:
                        pair = i if len(clock) > 2 else 0
                        clock[2 * pair] = began if pair == i else clock[0]
                        clock[2 * pair + 1] = time.perf_counter_ns()
            if readback is not None:
                handle, start = readback.buffer.handle, readback.offset
                return Ready(handle[start : start + readback.nbytes].tobytes())
            return None

        return replay

    async def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


class Ready:
    """Bytes that are already there."""

    __slots__ = ("_data",)

    def __init__(self, data: bytes):
        self._data = data

    def __await__(self):
        yield
        return self._data

    def then(self, callback: Callable[[bytes | BaseException], None]) -> None:
        asyncio.get_running_loop().call_soon(callback, self._data)

    def ready(self) -> bool:
        return True
