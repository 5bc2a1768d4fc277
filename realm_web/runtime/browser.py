"""The page's backend: `navigator.gpu` from Pyodide, in a Web Worker.

A recorded program is one JavaScript closure, so a token costs one call from Python. Weights come as
JavaScript `Uint8Array`s and go to `queue.writeBuffer` as they are; they never enter Python's memory.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import js
from pyodide.code import run_js
from pyodide.ffi import JsException, JsProxy, create_proxy, to_js

from realm_web.errors import DeviceError, DeviceLost, OutOfDeviceMemory
from realm_web.runtime.device import AdapterInfo, Kernel, Limits, Replay, Step, View

MATRIX_UNITS = "chromium-experimental-subgroup-matrix"
FEATURES = {
    "subgroups": "subgroups",
    "shader-f16": "f16",
    "timestamp-query": "timestamps",
    MATRIX_UNITS: "subgroup_matrix",
}
LIMITS = (
    "maxBufferSize",
    "maxStorageBufferBindingSize",
    "maxStorageBuffersPerShaderStage",
    "maxComputeWorkgroupsPerDimension",
    "maxComputeInvocationsPerWorkgroup",
    "maxComputeWorkgroupSizeX",
    "maxComputeWorkgroupStorageSize",
)
NO_WEBGPU = (
    "this browser offers no WebGPU adapter: use a current Chrome, Edge, Firefox or Safari, "
    "and turn hardware acceleration on in its settings"
)

HELPERS = """
(device, onResult) => {
  const { STORAGE, COPY_SRC, COPY_DST, MAP_READ, QUERY_RESOLVE } = GPUBufferUsage;
  const usage = STORAGE | COPY_SRC | COPY_DST | QUERY_RESOLVE;
  const staging = new Map();  // size -> unused mappable buffers
  const errors = [];  // of error scopes and of the device, reported at the next read
  device.addEventListener("uncapturederror", (event) => errors.push(event.error.message));
  let lost;  // why, once it is
  device.lost.then((info) => errors.unshift((lost = `lost: ${info.message || info.reason}`)));
  // A lost device first breaks off what is mapped and tells of its loss afterwards.
  const lostOrNot = () => Promise.race([device.lost, new Promise((resolve) => setTimeout(resolve, 200))]);

  // Python hears of it by one call: a short result as a text of its bytes, which needs no proxy.
  const readBack = (number, encoder, source, offset, nbytes) => {
    const size = Math.max(256, 2 ** Math.ceil(Math.log2(nbytes)));
    const unused = staging.get(size) ?? [];
    staging.set(size, unused);
    const buffer = unused.pop() ?? device.createBuffer({ size, usage: MAP_READ | COPY_DST });
    encoder.copyBufferToBuffer(source, offset, buffer, 0, nbytes);
    device.queue.submit([encoder.finish()]);
    buffer.mapAsync(GPUMapMode.READ).then(() => {
      const bytes = new Uint8Array(buffer.getMappedRange(0, size), 0, nbytes);
      const data = nbytes <= 4096 ? String.fromCharCode(...bytes) : bytes.slice();
      buffer.unmap();
      unused.push(buffer);
      return [data, undefined];  // undefined is None in Python; null is a value of its own there
    }, (error) => lostOrNot().then(() => [undefined, error.message])).then(([data, problem]) => {
      onResult(number, data, problem, errors.length ? errors.splice(0)[0] : lost);
    });
  };

  // Chromium takes 8 MiB at 1.0 GB/s by writeBuffer and at 3.0 GB/s through memory that both processes see.
  const UPLOAD_BYTES = 1 << 20, MOST_UPLOADS = 8, UPLOAD_USAGE = GPUBufferUsage.MAP_WRITE | COPY_SRC;
  const uploads = { size: 0, made: [], free: [] };
  const dropUploads = () => {
    uploads.made.forEach((stage) => stage.destroy());
    Object.assign(uploads, { size: 0, made: [], free: [] });
  };
  const upload = (buffer, offset, bytes) => {
    const nbytes = Math.ceil(bytes.length / 4) * 4;
    if (uploads.size < nbytes) {
      dropUploads();
      uploads.size = nbytes;
    }
    const { size, made, free } = uploads;
    if (!free.length && made.length === MOST_UPLOADS) return false;
    let stage = free.pop();
    if (!stage) {
      stage = device.createBuffer({ size, usage: UPLOAD_USAGE, mappedAtCreation: true });
      made.push(stage);
    }
    const memory = new Uint8Array(stage.getMappedRange(0, nbytes));
    memory.set(bytes);
    memory.fill(0, bytes.length);
    stage.unmap();
    const encoder = device.createCommandEncoder();
    encoder.copyBufferToBuffer(stage, 0, buffer, offset, nbytes);
    device.queue.submit([encoder.finish()]);
    stage.mapAsync(GPUMapMode.WRITE).then(() => free.push(stage), () => {});  // unless it was dropped
    return true;
  };

  return {
    errors,
    alloc(size, label) {
      device.pushErrorScope("out-of-memory");
      const buffer = device.createBuffer({ size, label, usage });
      device.popErrorScope().then((error) => error && errors.push(`no room: ${label}: ${error.message}`));
      return buffer;
    },
    write(buffer, offset, data) {
      const bytes = data instanceof Uint8Array ? data : new Uint8Array(data);
      if (bytes.length >= UPLOAD_BYTES && upload(buffer, offset, bytes)) return;
      if (bytes.length % 4 === 0) return device.queue.writeBuffer(buffer, offset, bytes);
      const padded = new Uint8Array(bytes.length + 4 - (bytes.length % 4));
      padded.set(bytes);
      device.queue.writeBuffer(buffer, offset, padded);
    },
    read(number, buffer, offset, nbytes) {
      readBack(number, device.createCommandEncoder(), buffer, offset, nbytes);
    },
    async compile(code, access, label) {
      device.pushErrorScope("validation");
      const layout = device.createBindGroupLayout({
        entries: access.map((mode, binding) => ({
          binding, visibility: GPUShaderStage.COMPUTE,
          buffer: { type: mode === "read" ? "read-only-storage" : "storage" },
        })),
      });
      const module = device.createShaderModule({ code, label });
      const made = device.createComputePipelineAsync({
        label, layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
        compute: { module, entryPoint: "main" },
      });
      made.catch(() => {});
      const problem = await device.popErrorScope();
      if (problem) throw new Error(problem.message);
      return { pipeline: await made, layout };
    },
    bind: (kernel, buffers, offsets, sizes) => device.createBindGroup({
      layout: kernel.layout,
      entries: buffers.map((buffer, binding) => ({
        binding, resource: { buffer, offset: offsets[binding], size: sizes[binding] },
      })),
    }),
    record(kernels, groups, grids, source, offset, nbytes, times, timesOffset, nPasses) {
      const n = groups.length;
      const pipelines = kernels.map((kernel) => kernel.pipeline);
      const querySet = times && device.createQuerySet({ type: "timestamp", count: 2 * nPasses });
      const perPass = n / nPasses;  // only a pass tells its times
      return (number) => {
        const encoder = device.createCommandEncoder();
        for (let first = 0; first < n; first += perPass) {
          const query = 2 * first / perPass;
          const pass = encoder.beginComputePass(times ? { timestampWrites: {
            querySet, beginningOfPassWriteIndex: query, endOfPassWriteIndex: query + 1,
          } } : undefined);
          for (let i = first; i < first + perPass; i++) {
            if (i === first || pipelines[i] !== pipelines[i - 1]) pass.setPipeline(pipelines[i]);
            pass.setBindGroup(0, groups[i]);
            pass.dispatchWorkgroups(grids[3 * i], grids[3 * i + 1], grids[3 * i + 2]);
          }
          pass.end();
        }
        if (times) encoder.resolveQuerySet(querySet, 0, 2 * nPasses, times, timesOffset);
        if (nbytes) readBack(number, encoder, source, offset, nbytes);
        else device.queue.submit([encoder.finish()]);
      };
    },
    done: () => device.queue.onSubmittedWorkDone().then(dropUploads),
  };
}
"""


async def open_backend() -> BrowserBackend:
    """Open the browser's fastest adapter with every limit it has. DeviceError says what to do."""
    gpu = getattr(js.navigator, "gpu", None)
    adapter = await gpu.requestAdapter(_object(powerPreference="high-performance")) if gpu else None
    if not adapter:
        raise DeviceError(NO_WEBGPU)
    features = [name for name in FEATURES if adapter.features.has(name)]
    if MATRIX_UNITS in features and not _has_our_shape(adapter.info):
        features.remove(MATRIX_UNITS)
    limits = {name: getattr(adapter.limits, name) for name in LIMITS}
    try:
        device = await adapter.requestDevice(_object(requiredFeatures=features, requiredLimits=limits))
    except JsException as error:
        raise DeviceError(f"the browser's GPU device could not be opened: {error.message}") from error
    return BrowserBackend(device, _info(adapter.info, features, limits))


def _has_our_shape(info: Any) -> bool:
    """Whether matrix units take f16 fragments of 16 x 16 and sum in f32 (`shaders/lib/units.wgsl`)."""
    shapes = [
        (config.componentType, config.resultComponentType, config.M, config.N, config.K)
        for config in getattr(info, "subgroupMatrixConfigs", None) or ()
    ]
    return ("f16", "f32", 16, 16, 16) in shapes


def _object(**fields: Any) -> Any:
    return to_js(fields, dict_converter=js.Object.fromEntries)


def _info(info: Any, features: list[str], limits: dict[str, int]) -> AdapterInfo:
    def text(name: str) -> str:
        return str(getattr(info, name, "") or "")

    software = (
        bool(getattr(info, "isFallbackAdapter", False)) or "swiftshader" in text("architecture").lower()
    )
    smallest, largest = (int(getattr(info, name, 0) or 0) for name in ("subgroupMinSize", "subgroupMaxSize"))
    words = [text("description") or text("device"), text("vendor"), text("architecture")]
    return AdapterInfo(
        name=words[0] or " ".join(word for word in words[1:] if word) or "unnamed adapter",
        kind="browser",
        backend="WebGPU",
        adapter_type="CPU" if software else "Unknown",
        features=frozenset(FEATURES[name] for name in features),
        limits=Limits(
            max_buffer=int(limits["maxBufferSize"])
            - 4096,  # SwiftShader refuses a buffer of exactly its limit
            max_binding=int(limits["maxStorageBufferBindingSize"]) // 16 * 16,
            max_bindings=int(limits["maxStorageBuffersPerShaderStage"]),
            max_workgroups=int(limits["maxComputeWorkgroupsPerDimension"]),
            max_invocations=int(limits["maxComputeInvocationsPerWorkgroup"]),
            max_shared=int(limits["maxComputeWorkgroupStorageSize"]),
            offset_alignment=256,
        ),
        subgroup_size=smallest if smallest == largest else 0,
        driver=" ".join(word for word in words[1:] if word),
    )


class BrowserBackend:
    # But Chromium rounds to 100 us, unless started with --enable-unsafe-webgpu.
    tick = 1e-9

    def __init__(self, device: Any, info: AdapterInfo):
        self.info, self._device = info, device
        self._readbacks: dict[int, Readback] = {}  # under way, by number
        self._numbers = itertools.count()
        self._on_result_proxy = create_proxy(self._on_result)
        self._js = run_js(HELPERS)(device, self._on_result_proxy)

    def alloc(self, nbytes: int, label: str) -> Any:
        return self._js.alloc(nbytes, label)

    def free(self, handle: Any) -> None:
        handle.destroy()

    def write(self, handle: Any, data: Any, offset: int) -> None:
        if isinstance(data, JsProxy):
            self._js.write(handle, offset, data)
            return
        proxy = create_proxy(data)
        view = proxy.getBuffer("u8")
        try:
            self._js.write(handle, offset, view.data)
        finally:
            view.release()
            proxy.destroy()

    async def read(self, handle: Any, offset: int, nbytes: int) -> bytes:
        readback = Readback()
        number = next(self._numbers)
        self._readbacks[number] = readback
        self._js.read(number, handle, offset, nbytes)
        return await readback

    async def compile(self, kernels: Sequence[Kernel], on_done: Callable[[], None]) -> None:
        async def one(kernel: Kernel) -> None:
            try:
                access = to_js(list(kernel.source.access))
                kernel.pipeline = await self._js.compile(kernel.source.code, access, kernel.name)
            except JsException as error:
                problem = DeviceError(f"{kernel} did not compile on {self.info.name}: {error.message}")
                problem.add_note(kernel.source.numbered())
                raise problem from error
            on_done()

        await asyncio.gather(*map(one, kernels))

    def bind(self, kernel: Kernel, views: Sequence[View]) -> Any:
        buffers = to_js([view.buffer.handle for view in views])
        offsets, sizes = to_js([view.offset for view in views]), to_js([view.nbytes for view in views])
        return self._js.bind(kernel.pipeline, buffers, offsets, sizes)

    def record(
        self, steps: Sequence[Step], bindings: Sequence[Any], readback: View | None, times: View | None = None
    ) -> Replay:
        kernels = to_js([step.kernel.pipeline for step in steps])
        grids = to_js([n for step in steps for n in step.grid])
        source = (readback.buffer.handle, readback.offset, readback.nbytes) if readback else (None, 0, 0)
        target = (times.buffer.handle, times.offset, times.nbytes // 16) if times else (None, 0, 1)
        replay = self._js.record(kernels, to_js(list(bindings)), grids, *source, *target)
        if readback is None:
            return replay
        numbers, readbacks = self._numbers, self._readbacks

        def enqueue() -> Readback:
            number = next(numbers)
            readback = readbacks[number] = Readback()
            replay(number)
            return readback

        return enqueue

    async def synchronize(self) -> None:
        await self._js.done()
        self.check()

    def close(self) -> None:
        self._device.destroy()

    def _on_result(self, number: int, data: Any, problem: str | None, reported: str | None) -> None:
        """A readback's bytes, or why there are none, and what the device reported meanwhile."""
        arrive = self._readbacks.pop(number).arrive
        if reported is not None:
            arrive(self._error(reported))
        elif problem is not None:
            arrive(DeviceError(f"{self.info.name} stopped answering: {problem}"))
        else:
            arrive(data.encode("latin-1") if isinstance(data, str) else data.to_bytes())

    def check(self) -> None:
        """Raise what the device reported since the last call: WebGPU tells of errors only afterwards."""
        if self._js.errors.length:
            message = str(self._js.errors[0])
            self._js.errors.splice(0)
            raise self._error(message)

    def _error(self, message: str) -> DeviceError:
        """What JavaScript noted, told apart by how it begins."""
        kind, _, rest = message.partition(": ")
        if kind == "lost":
            return DeviceLost(f"{self.info.name} was lost: {rest}; reload the page")
        if kind == "no room":
            return OutOfDeviceMemory(
                f"{self.info.name} has no room for {rest}; use a smaller model or context"
            )
        return DeviceError(f"{self.info.name}: {message}; reload the page")


class Readback:
    """The bytes of a copy under way. JavaScript hands them over by number: one call of Python, no promise."""

    __slots__ = ("_callback", "_data")

    def __init__(self) -> None:
        self._callback: Callable[[bytes | BaseException], None] | None = None
        self._data: bytes | BaseException | None = None

    def __await__(self):
        future = asyncio.get_running_loop().create_future()

        def pass_on(data: bytes | BaseException) -> None:
            if future.cancelled():
                return
            if isinstance(data, BaseException):
                future.set_exception(data)
            else:
                future.set_result(data)

        self.then(pass_on)
        return (yield from future)

    def then(self, callback: Callable[[bytes | BaseException], None]) -> None:
        if self._data is None:
            self._callback = callback
        else:  # it came before anybody asked
            asyncio.get_running_loop().call_soon(callback, self._data)

    def ready(self) -> bool:
        return self._data is not None

    def arrive(self, data: bytes | BaseException) -> None:
        if self._callback is None:
            self._data = data
        else:
            self._callback(data)
