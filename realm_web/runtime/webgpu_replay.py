"""Recorded programs of the wgpu-py backend: raw calls, encoded ahead by threads, submitted in order.

wgpu-native has no command buffer that could be submitted twice, and encoding one takes 3.5 us a step, most of
it in `wgpuCommandEncoderFinish`: more than the GPU needs for a small model. But all command buffers of a
program are equal, so those of the coming steps can be encoded before anybody asks. cffi lets the GIL go in
every call, so threads do it while the main one waits for a result. Only the main thread submits.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, Protocol

from wgpu.backends.wgpu_native._ffi import ffi, lib

from realm_web.errors import DeviceError
from realm_web.runtime.blocking import BlockingReadback, Call, encode_pass

AHEAD = 3  # command buffers that a program in use has ready
HOT = 4  # programs that may have some
THREADS = max(1, min(2, (os.cpu_count() or 2) - 1))


class Submitter(Protocol):
    """What a recording needs of the backend."""

    name: str
    raw_device: Any
    checked: Any  # the library's functions, raising on an error

    def submit(self, commands: Any) -> int: ...

    def check(self) -> None: ...

    def told_apart(self) -> AbstractContextManager[None]: ...

    def staging(self, nbytes: int) -> Staging: ...


class Recording:
    """A program as raw calls. Calling it enqueues one run and, with a readback, returns its bytes to come.

    The first run goes through the checked functions, so that a validation error raises where it is made. With
    `queries`, every step is a compute pass of its own that writes the time of its begin and end.
    """

    def __init__(
        self,
        backend: Submitter,
        ahead: Ahead,
        calls: Sequence[Call],
        keep: Sequence[Any],
        readback: tuple[Any, int, int] | None,
        queries: Queries | None = None,
    ):
        self._backend, self._ahead = backend, ahead
        self._passes = [(calls, ffi.NULL)] if queries is None else queries.passes(calls)
        self._keep = keep  # what the calls hold raw handles of
        self._readback, self._queries = readback, queries
        self._checked = False
        self.ready: SimpleQueue[Encoded | Exception] = SimpleQueue()
        self.n_ordered = 0  # command buffers that are in `ready`, or will be

    def __call__(self) -> Readback | None:
        if not self._checked:
            with self._backend.told_apart():
                encoded = self.encode(self.new_staging(), self._backend.checked)
            self._checked = True
        elif self._queries is None:
            encoded = self._ahead.take(self)
        else:
            encoded = self.encode(self.new_staging(), lib)
        index = self._backend.submit(encoded.commands)
        if encoded.staging is None:
            return None
        encoded.staging.start_mapping()
        return Readback(self._backend, encoded.staging, index, self._readback[2])

    def new_staging(self) -> Staging | None:
        return self._backend.staging(self._readback[2]) if self._readback else None

    def encode(self, staging: Staging | None, api: Any) -> Encoded:
        """One command buffer. Called by any thread once the first run was checked."""
        with self._ahead.recording:
            encoder = self.record(staging, api)
        commands = api.wgpuCommandEncoderFinish(encoder, ffi.NULL)
        api.wgpuCommandEncoderRelease(encoder)
        return Encoded(commands, staging)

    def record(self, staging: Staging | None, api: Any) -> Any:
        """An encoder that has heard of every step: three short calls each, where `finish` is one long one."""
        encoder = api.wgpuDeviceCreateCommandEncoder(self._backend.raw_device, ffi.NULL)
        for calls, descriptor in self._passes:
            encode_pass(api, encoder, descriptor, calls, ffi.NULL)
        if self._queries is not None:
            self._queries.resolve(encoder, api)
        if staging is not None:
            source, offset, nbytes = self._readback
            api.wgpuCommandEncoderCopyBufferToBuffer(encoder, source, offset, staging.raw, 0, nbytes)
        return encoder


class Encoded:
    """A command buffer, and where its readback goes."""

    __slots__ = ("commands", "staging")

    def __init__(self, commands: Any, staging: Staging | None):
        self.commands, self.staging = commands, staging


class Ahead:
    """Encodes ahead for programs that run again and again.

    A program that runs for the second time among the last three gets a stock (answers with a grammar take two
    programs in turn); the stock of the least recently used is dropped.
    """

    def __init__(self) -> None:
        # One thread records at a time: two make so many short calls that they fight for the GIL, and the main
        # thread pays: 690 us a submission instead of 70 on the H200's host.
        self.recording = threading.Lock()
        self._last: deque[Recording] = deque(maxlen=2)
        self._hot: OrderedDict[Recording, None] = OrderedDict()
        self._jobs: SimpleQueue[tuple[Recording, Staging | None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def take(self, recording: Recording) -> Encoded:
        """A command buffer of the program: from its stock, which is then filled up, or encoded now."""
        encoded = _taken(recording) if recording.n_ordered else None
        if encoded is None:
            encoded = recording.encode(recording.new_staging(), lib)
        if recording in self._last or recording in self._hot:
            self._order(recording)
        self._last.append(recording)
        return encoded

    def drop(self) -> None:
        """Forget what was encoded for nothing."""
        for recording in self._hot:
            _drop(recording)
        self._hot.clear()
        self._last.clear()

    def close(self) -> None:
        """Forget all, and end the threads."""
        self.drop()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _order(self, recording: Recording) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=_work, args=(self._jobs,), name="realm_web encoder", daemon=True)
                for _ in range(THREADS)
            ]
            for thread in self._threads:
                thread.start()
        self._hot[recording] = None
        self._hot.move_to_end(recording)
        if len(self._hot) > HOT:
            _drop(self._hot.popitem(last=False)[0])
        while recording.n_ordered < AHEAD:
            self._jobs.put((recording, recording.new_staging()))
            recording.n_ordered += 1


def _taken(recording: Recording) -> Encoded:
    recording.n_ordered -= 1
    encoded = recording.ready.get()  # waits for a thread that is still at it
    if isinstance(encoded, Exception):
        raise encoded
    return encoded


def _drop(recording: Recording) -> None:
    while recording.n_ordered:
        encoded = _taken(recording)
        lib.wgpuCommandBufferRelease(encoded.commands)
        if encoded.staging is not None:
            encoded.staging.give_back()


def _work(jobs: SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        recording, staging = job
        try:
            recording.ready.put(recording.encode(staging, lib))
        except Exception as error:  # for the one who takes it
            recording.ready.put(error)


class Queries:
    """Two timestamps for each of `n` passes, resolved into a buffer: u64 ticks (n, 2), begin and end."""

    def __init__(self, raw_device: Any, n: int, target: Any, offset: int, api: Any):
        descriptor = ffi.new("WGPUQuerySetDescriptor *")
        descriptor.type, descriptor.count = lib.WGPUQueryType_Timestamp, 2 * n
        self._set = api.wgpuDeviceCreateQuerySet(raw_device, descriptor)
        self._n, self._target, self._offset = n, target, offset
        self._descriptors: list[Any] = []  # with the writes that each points to

    def passes(self, calls: Sequence[Call]) -> list[tuple[Sequence[Call], Any]]:
        """Each call in a pass of its own, where it must name its pipeline; or all in one."""
        if self._n == 1:
            groups = [calls]
        else:
            groups, last = [], None
            for pipeline, *rest in calls:
                last = pipeline if pipeline is not None else last
                groups.append([(last, *rest)])
        result = []
        for i, group in enumerate(groups):
            writes = ffi.new("WGPUPassTimestampWrites *")
            writes.querySet = self._set
            writes.beginningOfPassWriteIndex, writes.endOfPassWriteIndex = 2 * i, 2 * i + 1
            descriptor = ffi.new("WGPUComputePassDescriptor *")
            descriptor.timestampWrites = writes
            self._descriptors.append((descriptor, writes))
            result.append((group, descriptor))
        return result

    def resolve(self, encoder: Any, api: Any) -> None:
        api.wgpuCommandEncoderResolveQuerySet(encoder, self._set, 0, 2 * self._n, self._target, self._offset)

    def __del__(self) -> None:
        lib.wgpuQuerySetRelease(self._set)


@ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")
def _mapped(status, message, userdata, _):
    flag = ffi.cast("int32_t *", userdata)
    flag[0] = 1 if status == lib.WGPUMapAsyncStatus_Success else -1


class Staging:
    """A mappable buffer, used again and again. `flag` becomes 1 when mapped, -1 on failure."""

    def __init__(self, buffer: Any, nbytes: int, pool: list[Staging]):
        self.buffer, self.raw = buffer, buffer._internal
        self._nbytes, self._pool = nbytes, pool
        self.flag = ffi.new("int32_t *")
        self.callback = ffi.new("WGPUBufferMapCallbackInfo *")
        self.callback.mode = lib.WGPUCallbackMode_AllowProcessEvents
        self.callback.callback = _mapped
        self.callback.userdata1 = self.flag

    def start_mapping(self) -> None:
        self.flag[0] = 0
        lib.wgpuBufferMapAsync(self.raw, lib.WGPUMapMode_Read, 0, self._nbytes, self.callback[0])

    def take(self, nbytes: int) -> bytes:
        data = bytes(ffi.buffer(lib.wgpuBufferGetConstMappedRange(self.raw, 0, nbytes), nbytes))
        lib.wgpuBufferUnmap(self.raw)
        self.give_back()
        return data

    def give_back(self) -> None:
        self._pool.append(self)


class Readback(BlockingReadback):
    """Blocks in the driver until its submission is done."""

    __slots__ = ("_backend", "_index", "_nbytes", "_staging")

    def __init__(self, backend: Submitter, staging: Staging, index: int, nbytes: int):
        self._backend, self._staging, self._index, self._nbytes = backend, staging, index, nbytes

    def ready(self) -> bool:
        if not self._staging.flag[0]:
            lib.wgpuDevicePoll(self._backend.raw_device, False, ffi.NULL)
        return self._staging.flag[0] != 0

    def _wait(self) -> bytes:
        flag, backend = self._staging.flag, self._backend
        index = ffi.new("uint64_t *", self._index)
        while not flag[0]:
            lib.wgpuDevicePoll(backend.raw_device, True, index)
            if not flag[0]:
                backend.check()
        backend.check()  # of a lost device nothing can be taken: that would end the process
        if flag[0] < 0:
            raise DeviceError(f"{backend.name} stopped answering (its memory could not be read back)")
        return self._staging.take(self._nbytes)
