"""The wgpu-py backend: Vulkan, Metal and DX12 through wgpu-native.

What happens per token (`webgpu_replay.py`) calls wgpu-native through wgpu-py's own cffi handle: the wrapped
methods cost 3.5 us a dispatch, the library itself about 1 us (wgpu 0.32).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import wgpu
import wgpu.backends.wgpu_native
from wgpu.backends.wgpu_native._api import GPUShaderModule, libf
from wgpu.backends.wgpu_native._ffi import ffi, lib

from realm_web.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from realm_web.runtime.blocking import bind_entries, layout_entries, raw_calls, staging_nbytes
from realm_web.runtime.device import AdapterInfo, Kernel, Limits, Replay, Step, View
from realm_web.runtime.memory import available_memory
from realm_web.runtime.webgpu_replay import Ahead, Queries, Recording, Staging

STORAGE = (
    wgpu.BufferUsage.STORAGE
    | wgpu.BufferUsage.COPY_SRC
    | wgpu.BufferUsage.COPY_DST
    | wgpu.BufferUsage.QUERY_RESOLVE
)
STAGING = wgpu.BufferUsage.MAP_READ | wgpu.BufferUsage.COPY_DST
FEATURES = {"subgroup": "subgroups", "shader-f16": "f16", "timestamp-query": "timestamps"}
PREFERENCE = ("DiscreteGPU", "IntegratedGPU", "Unknown", "CPU")
BACKENDS = ("Vulkan", "Metal", "D3D12")  # OpenGL lacks storage buffers enough for the wider kernels
READ_CHUNK = 64 << 20
BOUNDS_CHECKS = 1  # WGPUShaderRuntimeChecks_BoundsChecks


def adapters() -> list[tuple[AdapterInfo, Any]]:
    """Every usable adapter, best first."""
    os.environ.setdefault("XDG_RUNTIME_DIR", "/tmp")  # wgpu's EGL probe prints an error without it
    found = [(_info(adapter), adapter) for adapter in wgpu.gpu.enumerate_adapters_sync()]
    found = [pair for pair in found if pair[0].backend in BACKENDS]
    return sorted(found, key=lambda pair: PREFERENCE.index(_rank(pair[0].adapter_type)))


def _rank(adapter_type: str) -> str:
    return adapter_type if adapter_type in PREFERENCE else "Unknown"


def _info(adapter: Any) -> AdapterInfo:
    info, limits = adapter.info, adapter.limits
    software = info["adapter_type"] == "CPU"
    smallest, largest = _subgroup_sizes(adapter)
    return AdapterInfo(
        name=info["device"],
        kind="webgpu",
        backend=info["backend_type"],
        adapter_type=info["adapter_type"],
        features=frozenset(ours for theirs, ours in FEATURES.items() if theirs in adapter.features),
        limits=Limits(
            max_buffer=limits["max-buffer-size"],
            max_binding=limits["max-storage-buffer-binding-size"] // 16 * 16,
            max_bindings=limits["max-storage-buffers-per-shader-stage"],
            max_workgroups=limits["max-compute-workgroups-per-dimension"],
            max_invocations=limits["max-compute-invocations-per-workgroup"],
            max_shared=limits["max-compute-workgroup-storage-size"],
            offset_alignment=limits["min-storage-buffer-offset-alignment"],
            memory=available_memory() if software else 0,
        ),
        subgroup_size=smallest if smallest == largest else 0,
        driver=info["description"],
    )


def _subgroup_sizes(adapter: Any) -> tuple[int, int]:
    """wgpu-py 0.32 looks for fields of another name, so the library is asked itself."""
    info = ffi.new("WGPUAdapterInfo *")
    libf.wgpuAdapterGetInfo(adapter._internal, info)
    sizes = int(info.subgroupMinSize), int(info.subgroupMaxSize)
    libf.wgpuAdapterInfoFreeMembers(info[0])
    return sizes


async def open_backend(info: AdapterInfo) -> WebGPUBackend:
    """Open the adapter that `info` describes. DeviceError when it is gone or refuses."""
    for candidate, adapter in adapters():
        if candidate == info:
            return WebGPUBackend(info, adapter)
    raise DeviceError(
        f"the adapter {info.name} ({info.backend}) is gone; run `realm doctor` to see what there is"
    )


class WebGPUBackend:
    def __init__(self, info: AdapterInfo, adapter: Any):
        self.info = info
        features = [theirs for theirs, ours in FEATURES.items() if ours in info.features]
        try:
            self.device = adapter.request_device_sync(required_features=features, required_limits={})
        except (RuntimeError, wgpu.GPUError) as error:
            raise DeviceError(f"{info.name} could not be opened: {error}") from error
        self.name, self.checked = info.name, libf
        self.raw_device, self._queue = self.device._internal, self.device.queue._internal
        self.tick = 1e-9 * lib.wgpuQueueGetTimestampPeriod(self._queue)
        self._probe = self.device.create_buffer(size=16, usage=STORAGE)
        self._submitted = ffi.new("WGPUCommandBuffer[1]")
        self._staging: dict[int, list[Staging]] = {}
        self._ahead = Ahead()
        self._layouts: dict[tuple[str, ...], Any] = {}

    def alloc(self, nbytes: int, label: str) -> Any:
        try:
            return self.device.create_buffer(label=label, size=nbytes, usage=STORAGE)
        except (wgpu.GPUError, RuntimeError, MemoryError) as error:
            self.check()
            raise OutOfDeviceMemory(
                f"{self.info.name} has no room for {label} ({nbytes:,} bytes): {error}; "
                "use a smaller model, a shorter --context, or another device"
            ) from error

    def free(self, handle: Any) -> None:
        self._ahead.drop()  # which may use it
        handle.destroy()

    def write(self, handle: Any, data: Any, offset: int) -> None:
        source = ffi.from_buffer(data)
        with self.told_apart():
            libf.wgpuQueueWriteBuffer(self._queue, handle._internal, offset, source, len(source))

    async def read(self, handle: Any, offset: int, nbytes: int) -> bytes:
        parts = []
        for start in range(offset, offset + nbytes, READ_CHUNK):
            size = min(READ_CHUNK, offset + nbytes - start)
            copy = Recording(self, self._ahead, (), (handle,), (handle._internal, start, size))
            parts.append(await copy())
        return b"".join(parts)

    async def compile(self, kernels: Sequence[Kernel], on_done: Callable[[], None]) -> None:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # the library lets the GIL go
            loop = asyncio.get_running_loop()

            async def one(kernel: Kernel) -> None:
                kernel.pipeline = await loop.run_in_executor(pool, self._pipeline, kernel)
                on_done()

            await asyncio.gather(*map(one, kernels))

    def bind(self, kernel: Kernel, views: Sequence[View]) -> Any:
        with self.told_apart():
            return self.device.create_bind_group(
                layout=self._layout(kernel.source.access), entries=bind_entries(views)
            )

    def record(
        self, steps: Sequence[Step], bindings: Sequence[Any], readback: View | None, times: View | None = None
    ) -> Replay:
        calls = raw_calls(steps, bindings)
        source = queries = None
        if readback is not None:
            source = readback.buffer.handle._internal, readback.offset, readback.nbytes
        if times is not None:
            n = times.nbytes // 16
            queries = Queries(self.raw_device, n, times.buffer.handle._internal, times.offset, libf)
        keep = [view.buffer.handle for view in (readback, times) if view is not None]
        keep += [*bindings, *(step.kernel.pipeline for step in steps)]
        return Recording(self, self._ahead, calls, keep, source, queries)

    def check(self) -> None:
        """Raise DeviceLost if the device is: a submission would end the process. Costs 2 us."""
        with self.told_apart():  # a write of nothing, which does not but look at the device
            libf.wgpuQueueWriteBuffer(self._queue, self._probe._internal, 0, ffi.NULL, 0)

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """Raise the library's errors as ours."""
        try:
            yield
        except wgpu.GPUError as error:
            if "lost" in str(error).lower():
                raise DeviceLost(f"{self.name} is gone: its driver was reset, or it was unplugged") from error
            raise DeviceError(f"{self.name}: {error}") from error

    async def synchronize(self) -> None:
        lib.wgpuDevicePoll(self.raw_device, True, ffi.NULL)

    def close(self) -> None:
        self._ahead.close()
        self.device.destroy()

    def _layout(self, access: tuple[str, ...]) -> Any:
        if access not in self._layouts:
            entries = layout_entries(access, wgpu.ShaderStage.COMPUTE)
            self._layouts[access] = self.device.create_bind_group_layout(entries=entries)
        return self._layouts[access]

    def _pipeline(self, kernel: Kernel) -> Any:
        try:
            module = self._module(kernel)
            layout = self.device.create_pipeline_layout(
                bind_group_layouts=[self._layout(kernel.source.access)]
            )
            return self.device.create_compute_pipeline(
                label=kernel.name, layout=layout, compute={"module": module, "entry_point": "main"}
            )
        except (wgpu.GPUError, RuntimeError) as error:
            self.check()
            problem = DeviceError(f"{kernel} did not compile on {self.info.name}: {error}")
            problem.add_note(kernel.source.numbered())
            raise problem from error

    def _module(self, kernel: Kernel) -> Any:
        """A shader module that keeps its bounds checks but has no counter in every loop.

        Our loops end by construction; naga's guard against endless ones costs two integer operations a turn.
        """
        code = kernel.source.code.replace(
            "enable subgroups;", ""
        ).encode()  # naga has them on, and refuses the word
        text = ffi.new("char[]", code)
        source = ffi.new("WGPUShaderSourceWGSL *")
        source.chain.sType = lib.WGPUSType_ShaderSourceWGSL
        source.code.data, source.code.length = text, len(code)
        descriptor = ffi.new("WGPUShaderModuleDescriptor *")
        descriptor.nextInChain = ffi.cast("WGPUChainedStruct *", source)
        raw = libf.wgpuDeviceCreateShaderModuleTrusted(self.raw_device, descriptor, BOUNDS_CHECKS)
        return GPUShaderModule(kernel.name, raw, self.device)

    def submit(self, commands: Any) -> int:
        """Enqueue and release a command buffer; the number of the submission. DeviceLost."""
        try:
            self.check()
        except DeviceLost:
            lib.wgpuCommandBufferRelease(commands)
            raise
        self._submitted[0] = commands
        index = lib.wgpuQueueSubmitForIndex(self._queue, 1, self._submitted)
        lib.wgpuCommandBufferRelease(commands)
        return index

    def staging(self, nbytes: int) -> Staging:
        size = staging_nbytes(nbytes)
        pool = self._staging.setdefault(size, [])
        if not pool:
            with self.told_apart():
                pool.append(Staging(self.device.create_buffer(size=size, usage=STAGING), size, pool))
        return pool.pop()
