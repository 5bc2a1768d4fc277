"""What the native backends share: programs as raw calls of the C interface, and results waited for in it.

wgpu-native and Dawn have the same functions, each behind a cffi handle of its own, which is passed in here.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from realm_web.errors import DeviceError
from realm_web.runtime.device import Step, View

Call = tuple[Any, Any, int, int, int]  # pipeline or None for the one before, bind group, grid

_BUFFER_TYPES = {"read": "read-only-storage", "read_write": "storage"}


def raw_calls(steps: Sequence[Step], bindings: Sequence[Any]) -> list[Call]:
    """The steps as handles of the library, which whoever keeps them must keep alive."""
    calls, previous = [], None
    for step, binding in zip(steps, bindings, strict=True):
        pipeline = step.kernel.pipeline._internal
        calls.append((None if pipeline == previous else pipeline, binding._internal, *step.grid))
        previous = pipeline
    return calls


def encode_pass(api: Any, encoder: Any, descriptor: Any, calls: Iterable[Call], null: Any) -> None:
    """One compute pass of these calls: three short ones each, and nothing else of Python's."""
    compute = api.wgpuCommandEncoderBeginComputePass(encoder, descriptor)
    set_pipeline = api.wgpuComputePassEncoderSetPipeline
    set_bindings = api.wgpuComputePassEncoderSetBindGroup
    dispatch = api.wgpuComputePassEncoderDispatchWorkgroups
    for pipeline, binding, x, y, z in calls:
        if pipeline is not None:
            set_pipeline(compute, pipeline)
        set_bindings(compute, 0, binding, 0, null)
        dispatch(compute, x, y, z)
    api.wgpuComputePassEncoderEnd(compute)
    api.wgpuComputePassEncoderRelease(compute)


def layout_entries(access: Iterable[str], visibility: int) -> list[dict[str, Any]]:
    """A bind group layout for storage buffers of these accesses, in order."""
    return [
        {"binding": i, "visibility": visibility, "buffer": {"type": _BUFFER_TYPES[mode]}}
        for i, mode in enumerate(access)
    ]


def bind_entries(views: Iterable[View]) -> list[dict[str, Any]]:
    """What a bind group over these views holds."""
    return [
        {"binding": i, "resource": {"buffer": v.buffer.handle, "offset": v.offset, "size": v.nbytes}}
        for i, v in enumerate(views)
    ]


def staging_nbytes(nbytes: int) -> int:
    """The size of a mappable buffer for so many bytes: of few sizes, so that they are used again."""
    return max(256, 1 << (nbytes - 1).bit_length())


class BlockingReadback(ABC):
    """The bytes of a copy already enqueued. To get them blocks the thread in the library."""

    __slots__ = ()

    @abstractmethod
    def _wait(self) -> bytes:
        """Block until they are there. DeviceError."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether they are there; does not block."""

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
