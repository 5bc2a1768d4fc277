"""From a source of bytes to weights on the device: header first, then tensor by tensor in chunks.

Python sees offsets, never weights: a chunk goes as it came from the source to `Device.write`, and a kernel
repacks it. Knows no file system and no network; `sources.py` and the page provide sources.
"""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from realm_web.errors import FormatError, UnsupportedError
from realm_web.gguf import GGUFFile, NeedMoreBytes, TensorInfo, parse
from realm_web.models.transformer import Transformer
from realm_web.quants import CHUNK, FORMATS
from realm_web.runtime.device import Device, Kernel, Readback
from realm_web.tensor import Shard, Target, Tensor, Weight

STAGING_BYTES = 8 << 20
SPARE_BYTES = 64  # the repack kernels look a word beyond their block
GRANULE = 16  # chunks: 512 weights, whole blocks and whole words in every format
PARAMS = 8  # words of parameters of the repack kernel
IN_QUEUE = 8  # staged chunks that the device may be behind, so that the driver's own copies stay few
READS = 3  # under way at a time


class Source(Protocol):
    """Bytes at offsets: a file, a URL, or what a page holds."""

    name: str
    size: int

    async def read(self, offset: int, nbytes: int) -> Any:
        """What the device's `write` takes. Past the end of the file it may be shorter."""

    async def read_bytes(self, offset: int, nbytes: int) -> bytes: ...

    def close(self) -> None: ...


async def read_header(source: Source) -> GGUFFile:
    """Parse the header, asking for longer prefixes as the parser wants them. Errors name the source."""
    wanted, data = 1 << 20, b""
    while True:
        wanted = min(wanted, source.size)
        data += await source.read_bytes(len(data), wanted - len(data))
        try:
            return parse(data, source.size)
        except NeedMoreBytes as more:
            if len(data) >= source.size or len(data) < wanted:
                raise FormatError(
                    f"{source.name}: the file ends within its header; download it again"
                ) from None
            wanted = more.n
        except (FormatError, UnsupportedError) as error:
            raise type(error)(f"{source.name}: {error}") from None


@dataclass(frozen=True)
class Piece:
    """Consecutive chunks of one tensor that go to one shard in one dispatch."""

    offset: int  # in the file
    nbytes: int
    n_chunks: int
    start: int  # the first of them, among the tensor's chunks in this shard
    first_chunk: int  # of the shard, where the first of those goes
    run: int  # chunks that stay together, and
    every: int  # from where one run begins to where the next does
    shard: Shard

    @property
    def params(self) -> bytes:
        """As the repack kernel takes them."""
        words = (self.n_chunks, self.first_chunk, self.start, self.run, self.every, 0, 0, 0)
        return struct.pack(f"<{PARAMS}I", *words)


def pieces(info: TensorInfo, target: Target, staging_bytes: int) -> Iterator[Piece]:
    """Cut a tensor at shard borders and into at most staging_bytes each."""
    weight, fmt = target.to, info.format
    per_row = weight.k // CHUNK
    n_rows = info.n_elements // weight.k
    step = staging_bytes // fmt.nbytes(GRANULE * CHUNK) * GRANULE
    for shard in weight.shards:
        end = shard.first_row + shard.n_rows
        if target.run:
            low, high = (row // target.every * target.run for row in (shard.first_row, end))
            first, run, every = target.first, target.run, target.every
        else:
            low, high = max(0, shard.first_row - target.first), min(n_rows, end - target.first)
            first, run, every = target.first + low - shard.first_row, n_rows, 0
        n_here = (high - low) * per_row
        for start in range(0, n_here, step):
            n = min(step, n_here - start)
            offset = info.offset + fmt.nbytes((low * per_row + start) * CHUNK)
            yield Piece(
                offset=offset,
                nbytes=fmt.nbytes(n * CHUNK),
                n_chunks=n,
                start=start,
                first_chunk=first * per_row,
                run=run * per_row,
                every=every * per_row,
                shard=shard,
            )


class Loader:
    """Fills a model's weights: one staging buffer, a kernel per format, a program per shard and format."""

    def __init__(self, device: Device, model: Transformer, gguf: GGUFFile, source: Source):
        self._device, self._model, self._gguf, self._source = device, model, gguf, source
        self._kernels: dict[str, Kernel] = {}
        self._staging_bytes = min(STAGING_BYTES, device.limits.max_binding - SPARE_BYTES)
        self._staging = device.alloc(self._staging_bytes + SPARE_BYTES, "staging")
        self._params = device.alloc(4 * PARAMS, "repack parameters")
        dense = {"dense": True} if "dense" in device.features else {}
        for name, target in model.targets.items():
            fmt = gguf.tensors[name].format
            if isinstance(target.to, Weight) and fmt.name not in self._kernels:
                self._kernels[fmt.name] = device.kernel("repack", fmt=fmt.name, **dense)

    async def load(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Read every tensor in file order. The repack kernels must be compiled before."""
        names = sorted(self._model.targets, key=lambda name: self._gguf.tensors[name].offset)
        total = sum(self._gguf.tensors[name].nbytes for name in names)
        done = 0
        queued: deque[Readback] = deque()  # one for each chunk that the device may still be at
        async with aclosing(_read_ahead(self._parts(names), READS)) as parts:
            async for part, data in parts:
                if part.piece is None:
                    self._write_vector(data, part.target)
                else:
                    queued.append(self._place(part.piece, data, part.info.format.name))
                    if len(queued) > IN_QUEUE:
                        await queued.popleft()
                done += part.nbytes
                if on_progress:
                    on_progress(done, total)
        await self._device.synchronize()
        self._device.free(self._staging)
        self._device.free(self._params)

    def _parts(self, names: Iterable[str]) -> Iterator[_Part]:
        """What is read in one go: a vector, or a piece of a matrix."""
        for name in names:
            info, target = self._gguf.tensors[name], self._model.targets[name]
            if isinstance(target.to, Tensor):
                yield _Part(info, target, None, partial(read_vector, self._source, info))
                continue
            for piece in pieces(info, target, self._staging_bytes):
                nbytes = -(-piece.nbytes // 4) * 4
                yield _Part(info, target, piece, partial(self._source.read, piece.offset, nbytes))

    def _place(self, piece: Piece, data: Any, fmt: str) -> Readback:
        """Enqueue one piece; what is returned arrives when the staging buffer was repacked."""
        device = self._device
        device.write(self._staging, data)
        device.write(self._params, piece.params)
        program = device.program("repack")
        parts = piece.shard.parts[: len(FORMATS[fmt].parts)]  # not the grid, which is there already
        views = (device.view(self._staging), device.view(self._params), *parts)
        program.add(self._kernels[fmt], views, (-(-piece.n_chunks // 64),))
        program.readback = device.view(self._params, 0, 16)
        return device.submit(program)

    def _write_vector(self, values: array, target: Target) -> None:
        run = target.run or len(values)
        for i, start in enumerate(range(0, len(values), run)):
            at = target.first + i * target.every
            self._device.write(target.to.buffer, values[start : start + run].tobytes(), 4 * at)


@dataclass(frozen=True)
class _Part:
    """One read, and where its bytes go."""

    info: TensorInfo
    target: Target
    piece: Piece | None  # of a matrix, or None: a whole vector
    read: Callable[[], Awaitable[Any]]

    @property
    def nbytes(self) -> int:
        return self.piece.nbytes if self.piece else self.info.nbytes


async def _read_ahead(parts: Iterable[_Part], n: int) -> AsyncIterator[tuple[_Part, Any]]:
    """Each part with what was read, in order, while the next ones are on their way."""
    waiting: deque[tuple[_Part, asyncio.Future]] = deque()
    try:
        for part in parts:
            waiting.append((part, asyncio.ensure_future(part.read())))
            if len(waiting) == n:
                part, read = waiting.popleft()
                yield part, await read
        while waiting:
            part, read = waiting.popleft()
            yield part, await read
    finally:
        for _, read in waiting:
            read.cancel()


async def read_vector(source: Source, info: TensorInfo) -> array:
    """A small tensor as float32 on the host. UnsupportedError for a quantised one."""
    data = await source.read_bytes(info.offset, info.nbytes)
    if len(data) < info.nbytes:
        raise FormatError(f"{source.name}: the file ends within tensor {info.name!r}; download it again")
    name = info.type_name
    if name == "F32":
        return array("f", data)
    if name == "F16":
        return array("f", struct.unpack(f"<{info.n_elements}e", data))
    if name == "BF16":
        halves = struct.unpack(f"<{info.n_elements}H", data)
        return array("f", struct.pack(f"<{info.n_elements}I", *(half << 16 for half in halves)))
    raise UnsupportedError(
        f"tensor {info.name!r} is a vector of type {name}; supported are F32, F16 and BF16"
    )
