"""The wgpu-py backend: Vulkan, Metal and DX12 through wgpu-native.

The replay loop and the readback call wgpu-native through wgpu-py's own cffi handle: the wrapped methods cost
3.5 us a dispatch, the library itself about 1 us (wgpu 0.32). The first replay of every program goes through
the checked functions, so that a validation error raises where it is made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import wgpu
import wgpu.backends.wgpu_native
from wgpu.backends.wgpu_native._api import GPUShaderModule, libf
from wgpu.backends.wgpu_native._ffi import ffi, lib

from realm_web.errors import DeviceError
from realm_web.runtime.device import AdapterInfo, Kernel, Limits, Replay, Step, View

STORAGE = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
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
        self._device, self._queue = self.device._internal, self.device.queue._internal
        self._staging: dict[int, list[Any]] = {}
        self._wait_index = ffi.new("uint64_t *")
        self._layouts: dict[tuple[str, ...], Any] = {}

    def alloc(self, nbytes: int, label: str) -> Any:
        try:
            return self.device.create_buffer(label=label, size=nbytes, usage=STORAGE)
        except (wgpu.GPUError, RuntimeError, MemoryError) as error:
            raise DeviceError(
                f"{self.info.name} has no room for {label} ({nbytes:,} bytes): {error}; "
                "use a smaller model, a shorter --context, or another device"
            ) from error

    def free(self, handle: Any) -> None:
        handle.destroy()

    def write(self, handle: Any, data: Any, offset: int) -> None:
        source = ffi.from_buffer(data)
        lib.wgpuQueueWriteBuffer(self._queue, handle._internal, offset, source, len(source))

    async def read(self, handle: Any, offset: int, nbytes: int) -> bytes:
        parts = []
        for start in range(offset, offset + nbytes, READ_CHUNK):
            size = min(READ_CHUNK, offset + nbytes - start)
            encoder = libf.wgpuDeviceCreateCommandEncoder(self._device, ffi.NULL)
            parts.append(await self._submit_copy(encoder, handle._internal, start, size, libf))
        return b"".join(parts)

    async def compile(self, kernels: Sequence[Kernel], on_done: Callable[[], None]) -> None:
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:  # the library lets the GIL go
            loop = asyncio.get_running_loop()

            async def one(kernel: Kernel) -> None:
                kernel.pipeline = await loop.run_in_executor(pool, self._pipeline, kernel)
                on_done()

            await asyncio.gather(*map(one, kernels))

    def bind(self, kernel: Kernel, views: Sequence[View]) -> Any:
        entries = [
            {"binding": i, "resource": {"buffer": v.buffer.handle, "offset": v.offset, "size": v.nbytes}}
            for i, v in enumerate(views)
        ]
        return self.device.create_bind_group(layout=self._layout(kernel.source.access), entries=entries)

    def record(self, steps: Sequence[Step], bindings: Sequence[Any], readback: View | None) -> Replay:
        calls, previous = [], None
        for step, binding in zip(steps, bindings, strict=True):
            pipeline = step.kernel.pipeline._internal
            calls.append((None if pipeline == previous else pipeline, binding._internal, *step.grid))
            previous = pipeline
        keep = tuple(bindings)  # the calls hold raw handles only
        checked = False

        def replay():
            nonlocal checked
            api = lib if checked else libf
            encoder = api.wgpuDeviceCreateCommandEncoder(self._device, ffi.NULL)
            compute = api.wgpuCommandEncoderBeginComputePass(encoder, ffi.NULL)
            set_pipeline = api.wgpuComputePassEncoderSetPipeline
            set_bindings = api.wgpuComputePassEncoderSetBindGroup
            dispatch = api.wgpuComputePassEncoderDispatchWorkgroups
            null = ffi.NULL
            for pipeline, binding, x, y, z in calls:
                if pipeline is not None:
                    set_pipeline(compute, pipeline)
                set_bindings(compute, 0, binding, 0, null)
                dispatch(compute, x, y, z)
            api.wgpuComputePassEncoderEnd(compute)
            api.wgpuComputePassEncoderRelease(compute)
            checked = bool(keep) or not calls
            if readback is None:
                self._finish(encoder, api)
                return None
            return self._submit_copy(
                encoder, readback.buffer.handle._internal, readback.offset, readback.nbytes, api
            )

        return replay

    async def synchronize(self) -> None:
        lib.wgpuDevicePoll(self._device, True, ffi.NULL)

    def close(self) -> None:
        self.device.destroy()

    def _layout(self, access: tuple[str, ...]) -> Any:
        if access not in self._layouts:
            kinds = {"read": "read-only-storage", "read_write": "storage"}
            entries = [
                {"binding": i, "visibility": wgpu.ShaderStage.COMPUTE, "buffer": {"type": kinds[mode]}}
                for i, mode in enumerate(access)
            ]
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
        raw = libf.wgpuDeviceCreateShaderModuleTrusted(self._device, descriptor, BOUNDS_CHECKS)
        return GPUShaderModule(kernel.name, raw, self.device)

    def _finish(self, encoder: Any, api: Any) -> int:
        commands = api.wgpuCommandEncoderFinish(encoder, ffi.NULL)
        index = api.wgpuQueueSubmitForIndex(self._queue, 1, ffi.new("WGPUCommandBuffer[1]", [commands]))
        api.wgpuCommandBufferRelease(commands)
        api.wgpuCommandEncoderRelease(encoder)
        return index

    def _submit_copy(self, encoder: Any, source: Any, offset: int, nbytes: int, api: Any) -> Readback:
        size = max(256, 1 << (nbytes - 1).bit_length())
        pool = self._staging.setdefault(size, [])
        staging = pool.pop() if pool else Staging(self.device.create_buffer(size=size, usage=STAGING))
        api.wgpuCommandEncoderCopyBufferToBuffer(encoder, source, offset, staging.raw, 0, nbytes)
        index = self._finish(encoder, api)
        staging.start_mapping(size)
        return Readback(self, staging, index, nbytes, pool)


@ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")
def _mapped(status, message, userdata, _):
    flag = ffi.cast("int32_t *", userdata)
    flag[0] = 1 if status == lib.WGPUMapAsyncStatus_Success else -1


class Staging:
    """A mappable buffer, used again and again. `flag` becomes 1 when mapped, -1 on failure."""

    def __init__(self, buffer: Any):
        self.buffer, self.raw = buffer, buffer._internal
        self.flag = ffi.new("int32_t *")
        self.callback = ffi.new("WGPUBufferMapCallbackInfo *")
        self.callback.mode = lib.WGPUCallbackMode_AllowProcessEvents
        self.callback.callback = _mapped
        self.callback.userdata1 = self.flag

    def start_mapping(self, nbytes: int) -> None:
        self.flag[0] = 0
        lib.wgpuBufferMapAsync(self.raw, lib.WGPUMapMode_Read, 0, nbytes, self.callback[0])

    def take(self, nbytes: int) -> bytes:
        data = bytes(ffi.buffer(lib.wgpuBufferGetConstMappedRange(self.raw, 0, nbytes), nbytes))
        lib.wgpuBufferUnmap(self.raw)
        return data


class Readback:
    """The bytes of a copy already enqueued. Awaiting it blocks in the driver until its submission is done."""

    __slots__ = ("_backend", "_index", "_nbytes", "_pool", "_staging")

    def __init__(self, backend: WebGPUBackend, staging: Staging, index: int, nbytes: int, pool: list):
        self._backend, self._staging, self._index = backend, staging, index
        self._nbytes, self._pool = nbytes, pool

    def __await__(self):
        yield from asyncio.sleep(0).__await__()  # let others run before the thread blocks
        return self._wait()

    def then(self, callback: Callable[[bytes | BaseException], None]) -> None:
        asyncio.get_running_loop().call_soon(self._pass_on, callback)

    def _pass_on(self, callback: Callable[[bytes | BaseException], None]) -> None:
        try:
            data = self._wait()
        except DeviceError as error:
            callback(error)
        else:
            callback(data)

    def _wait(self) -> bytes:
        flag, backend = self._staging.flag, self._backend
        backend._wait_index[0] = self._index
        while not flag[0]:
            lib.wgpuDevicePoll(backend._device, True, backend._wait_index)
        if flag[0] < 0:
            raise DeviceError(f"{backend.info.name} stopped answering (its memory could not be read back)")
        data = self._staging.take(self._nbytes)
        self._pool.append(self._staging)
        return data
