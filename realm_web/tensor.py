"""Typed views of device memory: tensors, and quantised weights cut into shards that fit a binding."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from realm_web.errors import DeviceError
from realm_web.grids import table as grid_table
from realm_web.quants import QuantFormat
from realm_web.runtime.device import Buffer, Device, View

ITEM_BYTES = {"f32": 4, "u32": 4, "f16": 2}
PART_ALIGNMENT = 256  # the largest offset alignment that WebGPU allows an adapter to ask for


@dataclass(frozen=True)
class Tensor(View):
    """A contiguous row-major array on the device."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def alloc(cls, device: Device, shape: tuple[int, ...], dtype: str, label: str) -> Tensor:
        nbytes = prod(shape) * ITEM_BYTES[dtype]
        return cls(device.alloc(nbytes, label), 0, -(-nbytes // 16) * 16, shape, dtype)


@dataclass(frozen=True)
class Shard:
    """Rows `first_row` to `first_row + n_rows` of a weight: a view per part of its format, then its grid."""

    first_row: int
    n_rows: int
    parts: tuple[View, ...]


@dataclass(frozen=True)
class Weight:
    """A matrix (n, k) in the packed layout of its format, row-major, in one shard or several."""

    fmt: QuantFormat
    n: int
    k: int
    label: str
    shards: tuple[Shard, ...]
    unit: int = 1  # rows that are never parted: those of an expert

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for shard in self.shards for view in shard.parts)

    @classmethod
    def alloc(cls, device: Device, fmt: QuantFormat, n: int, k: int, label: str, unit: int = 1) -> Weight:
        """Memory for the packed weight; DeviceError where even one unit of rows does not fit a binding."""
        rows = rows_per_shard(device, fmt, k) // unit * unit
        if rows < 1:
            what = f"{unit} rows" if unit > 1 else "a row"
            raise DeviceError(f"{label}: {what} of {k} weights: too much for one binding of {device.name}")
        shards = [
            _alloc_shard(device, fmt, first, min(rows, n - first), k, label) for first in range(0, n, rows)
        ]
        return cls(fmt, n, k, label, tuple(shards), unit)


@dataclass(frozen=True)
class Target:
    """Where a tensor of the file goes: rows of a weight from `first` on, or elements of a vector.

    With `run` it goes in runs of so many rows or elements, each `every` after the one before: the rows of an
    expert, with those of another tensor in between. `every` is then the unit of the weight.
    """

    to: Weight | Tensor
    first: int
    run: int = 0
    every: int = 0


def rows_per_shard(device: Device, fmt: QuantFormat, k: int) -> int:
    """How many rows of k weights fit one binding per part, and one buffer in all."""
    blocks = fmt.n_blocks(k)
    largest = max(part.block_bytes for part in fmt.parts) * blocks
    room = device.limits.max_buffer - PART_ALIGNMENT * len(fmt.parts) - len(_table(fmt))
    return min(device.limits.max_binding // largest, room // (fmt.packed_block_bytes * blocks))


def _alloc_shard(device: Device, fmt: QuantFormat, first: int, n_rows: int, k: int, label: str) -> Shard:
    sizes = [fmt.n_blocks(n_rows * k) * part.block_bytes for part in fmt.parts]
    table = _table(fmt)
    if table:
        sizes.append(len(table))
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // PART_ALIGNMENT) * PART_ALIGNMENT
    buffer: Buffer = device.alloc(end, label)
    if table:
        device.write(buffer, table, offsets[-1])
    views = tuple(
        View(buffer, offset, -(-size // 16) * 16) for offset, size in zip(offsets, sizes, strict=True)
    )
    return Shard(first, n_rows, views)


def _table(fmt: QuantFormat) -> bytes:
    """What is stored after the parts: the rows of the format's grid, if it has one."""
    return grid_table(fmt.grid) if fmt.grid else b""
