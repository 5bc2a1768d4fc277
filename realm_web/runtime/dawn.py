"""The Dawn backend: Chromium's WebGPU natively, through the package wgpudawn, asked for by `--device dawn`.

It is here for the matrix units: wgpu-native 29 names them and then refuses them, Dawn hands them out when its
unsafe APIs are allowed. Calls that happen per token go to the library itself, as in `webgpu_replay.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import wgpudawn
from wgpudawn.backends.dawn import extras
from wgpudawn.backends.dawn._ffi import c_callback, callbacks, ffi, lib
from wgpudawn.backends.dawn._helpers import get_wgpu_instance

from realm_web.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from realm_web.runtime.blocking import (
    BlockingReadback,
    bind_entries,
    encode_pass,
    layout_entries,
    raw_calls,
    staging_nbytes,
)
from realm_web.runtime.device import AdapterInfo, Kernel, Limits, Replay, Step, View

STORAGE = wgpudawn.BufferUsage.STORAGE | wgpudawn.BufferUsage.COPY_SRC | wgpudawn.BufferUsage.COPY_DST
STAGING = wgpudawn.BufferUsage.MAP_READ | wgpudawn.BufferUsage.COPY_DST
# Dawn keeps float16 from NVIDIA for a bug of old drivers; the kernel cases hold on driver 580.
TOGGLES = ("allow_unsafe_apis", "vulkan_enable_f16_on_nvidia")
MATRIX_UNITS = "chromium-experimental-subgroup-matrix"
FEATURES = {"subgroups": "subgroups", "shader-f16": "f16", MATRIX_UNITS: "subgroup_matrix"}
LIMITS = {
    "max-buffer-size": "max_buffer",
    "max-storage-buffer-binding-size": "max_binding",
    "max-storage-buffers-per-shader-stage": "max_bindings",
    "max-compute-workgroups-per-dimension": "max_workgroups",
    "max-compute-invocations-per-workgroup": "max_invocations",
    "max-compute-workgroup-storage-size": "max_shared",
    "min-storage-buffer-offset-alignment": "offset_alignment",
}
READ_CHUNK = 64 << 20
WAIT_NS = 100_000_000  # between two looks at what Python has to do
TESTED = ("Vulkan", "Metal", "D3D12")

_allowed: list[bool] = []


def adapters() -> list[tuple[AdapterInfo, Any]]:
    """Every hardware adapter that Dawn offers; it has no wish for software ones."""
    if not _allowed:
        extras.set_instance_extras(enable_toggles=TOGGLES)
        _allowed.append(True)
    found = [(_info(adapter), adapter) for adapter in wgpudawn.gpu.enumerate_adapters_sync()]
    return [pair for pair in found if pair[0].backend in TESTED and not pair[0].is_cpu]


def _info(adapter: Any) -> AdapterInfo:
    info = adapter.info
    features = {theirs for theirs in FEATURES if theirs in adapter.features}
    if MATRIX_UNITS in features and not _has_our_shape(adapter):
        features.remove(MATRIX_UNITS)
    limits = {ours: int(adapter.limits[theirs]) for theirs, ours in LIMITS.items()}
    limits["max_binding"] = limits["max_binding"] // 16 * 16
    return AdapterInfo(
        name=info["device"],
        kind="dawn",
        backend=info["backend_type"],
        adapter_type=info["adapter_type"],
        features=frozenset(FEATURES[theirs] for theirs in features),
        limits=Limits(**limits),
        driver=info["description"],
    )


def _has_our_shape(adapter: Any) -> bool:
    """Whether matrix units take f16 fragments of 16 x 16 and sum in f32 (`shaders/lib/units.wgsl`)."""
    configs = extras.get_adapter_properties(adapter).get("subgroup_matrix_configs", ())
    wanted = {"component_type": "f16", "result_component_type": "f32", "m": 16, "n": 16, "k": 16}
    return any(wanted.items() <= config.items() for config in configs)


async def open_backend(info: AdapterInfo) -> DawnBackend:
    """Open the adapter that `info` describes. DeviceError when it is gone or refuses."""
    for candidate, adapter in adapters():
        if candidate == info:
            return DawnBackend(info, adapter)
    raise DeviceError(f"the adapter {info.name} ({info.backend}) is gone")


class DawnBackend:
    tick = 1e-9

    def __init__(self, info: AdapterInfo, adapter: Any):
        self.info = info
        features = [theirs for theirs, ours in FEATURES.items() if ours in info.features]
        limits = {theirs: adapter.limits[theirs] for theirs in LIMITS}
        try:
            self.device = adapter.request_device_sync(required_features=features, required_limits=limits)
        except (RuntimeError, wgpudawn.GPUError) as error:
            raise DeviceError(f"{info.name} could not be opened: {error}") from error
        self._device, self._queue = self.device._internal, self.device.queue._internal
        self._staging: dict[int, list[Any]] = {}
        self._layouts: dict[tuple[str, ...], Any] = {}

    def alloc(self, nbytes: int, label: str) -> Any:
        try:
            return self.device.create_buffer(label=label, size=nbytes, usage=STORAGE)
        except (wgpudawn.GPUError, RuntimeError, MemoryError) as error:
            raise OutOfDeviceMemory(
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
            encoder = lib.wgpuDeviceCreateCommandEncoder(self._device, ffi.NULL)
            parts.append(await self._copy_and_submit(encoder, handle._internal, start, size))
        return b"".join(parts)

    async def compile(self, kernels: Sequence[Kernel], on_done: Callable[[], None]) -> None:
        async def one(kernel: Kernel) -> None:
            try:
                layout = self.device.create_pipeline_layout(
                    bind_group_layouts=[self._layout(kernel.source.access)]
                )
                module = self.device.create_shader_module(label=kernel.name, code=kernel.source.code)
                kernel.pipeline = await self.device.create_compute_pipeline_async(
                    label=kernel.name, layout=layout, compute={"module": module, "entry_point": "main"}
                )
            except (wgpudawn.GPUError, RuntimeError) as error:
                problem = DeviceError(f"{kernel} did not compile on {self.info.name}: {error}")
                problem.add_note(kernel.source.numbered())
                raise problem from error
            on_done()

        await asyncio.gather(*map(one, kernels))

    def bind(self, kernel: Kernel, views: Sequence[View]) -> Any:
        return self.device.create_bind_group(
            layout=self._layout(kernel.source.access), entries=bind_entries(views)
        )

    def record(
        self, steps: Sequence[Step], bindings: Sequence[Any], readback: View | None, times: View | None = None
    ) -> Replay:
        if times is not None:
            raise DeviceError("the dawn backend has no timestamps")
        calls = raw_calls(steps, bindings)
        keep = (tuple(bindings), [step.kernel.pipeline for step in steps])  # the calls hold raw handles only

        def replay(keep: Any = keep) -> Readback | None:
            encoder = lib.wgpuDeviceCreateCommandEncoder(self._device, ffi.NULL)
            encode_pass(lib, encoder, ffi.NULL, calls, ffi.NULL)
            if readback is None:
                self._submit(encoder)
                return None
            source = readback.buffer.handle._internal
            return self._copy_and_submit(encoder, source, readback.offset, readback.nbytes)

        return replay

    async def synchronize(self) -> None:
        probe = self.device.create_buffer(size=16, usage=STORAGE)
        await self.read(probe, 0, 16)
        probe.destroy()

    def close(self) -> None:
        self.device.destroy()

    def _layout(self, access: tuple[str, ...]) -> Any:
        if access not in self._layouts:
            entries = layout_entries(access, wgpudawn.ShaderStage.COMPUTE)
            self._layouts[access] = self.device.create_bind_group_layout(entries=entries)
        return self._layouts[access]

    def _submit(self, encoder: Any) -> None:
        commands = lib.wgpuCommandEncoderFinish(encoder, ffi.NULL)
        lib.wgpuQueueSubmit(self._queue, 1, ffi.new("WGPUCommandBuffer[1]", [commands]))
        lib.wgpuCommandBufferRelease(commands)
        lib.wgpuCommandEncoderRelease(encoder)

    def _copy_and_submit(self, encoder: Any, source: Any, offset: int, nbytes: int) -> Readback:
        size = staging_nbytes(nbytes)
        pool = self._staging.setdefault(size, [])
        staging = pool.pop() if pool else self.device.create_buffer(size=size, usage=STAGING)
        lib.wgpuCommandEncoderCopyBufferToBuffer(encoder, source, offset, staging._internal, 0, nbytes)
        self._submit(encoder)
        return Readback(self, staging, nbytes, pool)


class Readback(BlockingReadback):
    """Blocks in the library until the staging buffer is mapped."""

    def __init__(self, backend: DawnBackend, staging: Any, nbytes: int, pool: list[Any]):
        self._backend, self._staging, self._nbytes, self._pool = backend, staging, nbytes, pool
        self._status: int | None = None
        info = ffi.new("WGPUBufferMapCallbackInfo *")
        info.mode = lib.WGPUCallbackMode_AllowProcessEvents
        info.callback = c_callback("WGPUBufferMapCallback")
        info.userdata1 = callbacks.register(self._mapped)
        self._future = lib.wgpuBufferMapAsync(
            staging._internal, lib.WGPUMapMode_Read, 0, _whole_words(nbytes), info[0]
        )

    def _mapped(self, status: int, *_: Any) -> None:
        self._status = status

    def ready(self) -> bool:
        if self._status is None:
            self._look(0)
        return self._status is not None

    def _look(self, nanoseconds: int) -> None:
        wait = ffi.new("WGPUFutureWaitInfo *")
        wait.future = self._future
        lib.wgpuInstanceWaitAny(get_wgpu_instance(), 1, wait, nanoseconds)

    def _wait(self) -> bytes:
        while self._status is None:
            self._look(WAIT_NS)
        if self._status != lib.WGPUMapAsyncStatus_Success:
            raise DeviceLost(
                f"{self._backend.info.name} stopped answering (its memory could not be read back)"
            )
        raw = self._staging._internal
        mapped = lib.wgpuBufferGetConstMappedRange(raw, 0, _whole_words(self._nbytes))
        data = bytes(ffi.buffer(mapped, self._nbytes))
        lib.wgpuBufferUnmap(raw)
        self._pool.append(self._staging)
        return data


def _whole_words(nbytes: int) -> int:
    return -(-nbytes // 4) * 4
