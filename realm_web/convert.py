"""Write a model's file again with other weight types: what `realm quantize` does. Not for the page.

Knows files, threads and how weights stream through them; which type a tensor gets is `mixture.py`'s
business, how it is made `quantize.py`'s. A tensor is read, decoded, encoded and written in pieces of a
million weights, a few at a time in flight, so that memory does not grow with the model.
"""

import asyncio
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from realm_web import ggufwriter, mixture
from realm_web.dequant import dequantize
from realm_web.errors import FormatError, RequestError
from realm_web.gguf import GGUFFile, TensorInfo
from realm_web.ggufwriter import NewTensor
from realm_web.loader import Source, read_header
from realm_web.mixture import FileType
from realm_web.quantize import quantize
from realm_web.quants import FORMATS

PIECE = 1 << 20  # weights; a multiple of every block length
MAX_WORKERS = 8  # numpy's short calls do not keep more threads busy
QUANTIZATION_VERSION = 2  # of ggml's block layouts


@dataclass(frozen=True)
class Plan:
    """A file to write: its header and, in the order of the file, its tensors beside those they come from."""

    gguf: GGUFFile
    header: bytes
    tensors: tuple[NewTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(
            t.nbytes + ggufwriter.padding(t.nbytes, self.gguf.alignment) for t in self.tensors
        )


@dataclass(frozen=True)
class Converted:
    """One written tensor, and by how much its weights changed: sums of squares."""

    old: TensorInfo
    new: NewTensor
    squared_error: float
    squared_weights: float


async def make_plan(
    source: Source, wanted: FileType, *, pure: bool = False, allow_requantize: bool = False
) -> Plan:
    """Read the header and choose the types. RequestError for a tensor that is quantised already."""
    gguf = await read_header(source)
    if gguf.metadata.get_int("split.count", 0) > 1:
        raise RequestError(f"{source.name} is one of several parts; join them with llama-gguf-split --merge")
    types = mixture.choose(gguf, wanted, pure=pure)
    for info in gguf.tensors.values():
        again = info.type_name not in mixture.UNQUANTISED and types[info.name] != info.type_name
        if again and not allow_requantize:
            raise RequestError(
                f"{source.name}: tensor {info.name!r} is quantised already, as {info.type_name}; "
                "give a file in F16, BF16 or F32, or accept a greater error by --allow-requantize"
            )
    entries = ggufwriter.entries(await source.read_bytes(0, gguf.header_size))
    entries = {key: entry for key, entry in entries.items() if not key.startswith("split.")}
    says = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": wanted.id}
    entries |= {key: ggufwriter.u32_entry(key, value) for key, value in says.items()}
    tensors = tuple(NewTensor(t.name, t.shape, types[t.name]) for t in gguf.tensors.values())
    return Plan(gguf, ggufwriter.header(entries.values(), tensors, gguf.alignment), tensors)


async def write(
    plan: Plan,
    source: Source,
    file: BinaryIO,
    *,
    workers: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> list[Converted]:
    """Write the whole file. `on_progress(bytes read, bytes to read, tensor)` is called after every piece."""
    workers = workers or min(os.cpu_count() or 1, MAX_WORKERS)
    total = sum(t.nbytes for t in plan.gguf.tensors.values())
    done = 0
    converted = []
    file.write(plan.header)
    with ThreadPoolExecutor(workers, "quantize") as pool:
        for new in plan.tensors:
            old = plan.gguf.tensors[new.name]
            error = squares = 0.0

            def finish(piece: _Piece, name: str = new.name) -> None:
                nonlocal done, error, squares
                file.write(piece.blocks)
                done, error, squares = done + piece.nbytes, error + piece.error, squares + piece.squares
                if on_progress:
                    on_progress(done, total, name)

            await _convert(source, old, new, pool, 2 * workers, finish)
            file.write(bytes(ggufwriter.padding(new.nbytes, plan.gguf.alignment)))
            converted.append(Converted(old, new, error, squares))
    return converted


@dataclass(frozen=True)
class _Piece:
    """A converted piece: its new bytes, how many it was read from, squared error and squared weights."""

    blocks: memoryview | bytes
    nbytes: int
    error: float
    squares: float


async def _convert(
    source: Source,
    old: TensorInfo,
    new: NewTensor,
    pool: ThreadPoolExecutor,
    in_flight: int,
    finish: Callable[[_Piece], None],
) -> None:
    """Send one tensor through the pool; `finish` gets its pieces in order."""
    pending: deque[asyncio.Future[_Piece]] = deque()
    loop = asyncio.get_running_loop()
    try:
        for first in range(0, old.n_elements, PIECE):
            offset = old.offset + old.format.nbytes(first)
            nbytes = old.format.nbytes(min(PIECE, old.n_elements - first))
            data = await source.read_bytes(offset, nbytes)
            if len(data) != nbytes:
                raise FormatError(
                    f"{source.name}: the file ends within tensor {old.name!r}; download it again"
                )
            pending.append(loop.run_in_executor(pool, _encode, data, old, new))
            if len(pending) == in_flight:
                finish(await pending.popleft())
        while pending:
            finish(await pending.popleft())
    except FormatError as error:
        raise FormatError(f"tensor {old.name!r}: {error}") from None
    finally:
        for future in pending:
            future.cancel()


def _encode(data: bytes, old: TensorInfo, new: NewTensor) -> _Piece:
    if old.type_name == new.type_name:
        return _Piece(data, len(data), 0.0, 0.0)
    raw = np.frombuffer(data, np.uint8).reshape(-1, old.format.block_bytes)
    weights = dequantize(old.type_name, raw).reshape(-1, FORMATS[new.type_name].block_elements)
    blocks = quantize(new.type_name, weights)
    error = dequantize(new.type_name, blocks) - weights
    return _Piece(blocks.data, len(data), _sum_of_squares(error), _sum_of_squares(weights))


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.square(values).sum(dtype=np.float64))


# -- the file -------------------------------------------------------------------------------------------


def check_target(target: Path, source: Source, *, force: bool) -> None:
    """RequestError when `target` is the source, no place for a file, or exists without `force`."""
    if target.exists():
        if os.path.exists(source.name) and os.path.samefile(source.name, target):
            raise RequestError(f"{target} is the model itself; give the new file another name")
        if not target.is_file():
            raise RequestError(f"{target} is no plain file; give the path of a new .gguf file")
        if not force:
            raise RequestError(f"{target} exists; give another name, or --force to replace it")
    if not target.parent.is_dir():
        raise RequestError(f"{target.parent} is no folder; make it, or give another path")


@contextmanager
def new_file(target: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file that appears as `target` when the block ends without an error; nothing is left otherwise."""
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise RequestError(
            f"{target} needs {nbytes / 1e6:.0f} MB, its disk has {free / 1e6:.0f} MB; "
            "free some space or write elsewhere"
        )
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
