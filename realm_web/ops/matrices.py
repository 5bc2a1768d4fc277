"""Matrix products: a few rows at a time by `matvec`, many by `matmul`, and how each is tuned."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from realm_web import grids
from realm_web.ops import matmuls
from realm_web.ops.activations import Activations
from realm_web.ops.recorder import Recorder
from realm_web.quants import FORMATS, RUN_FORMATS, QuantFormat
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor, Weight

MATVEC_ROWS = 8  # up to so many rows the matrix-vector kernel reads the weights once for all of them
OWN_BYTES = 24 << 10  # of workgroup memory that a workgroup may use to make its own activations


@dataclass(frozen=True)
class Matvec:
    """Tuning constants of `matvec`: every choice gives the same numbers up to rounding."""

    lanes: int  # threads that share one weight row
    rows: int  # weight rows of each such group
    wg: int
    m_tile: int
    subgroup: int
    unroll: int = 1  # runs of chunks of each row that a thread has under way
    run: int = 1  # neighbouring chunks that it takes together: 1 or 2, for formats that can
    ahead: int = 0  # of several rows of activations: whether the next chunks are under way, too
    stage: int = 0  # and whether the activations of a turn are in workgroup memory

    def grid(self, device: Device, n: int, m: int) -> tuple[tuple[int, int, int], int]:
        """The grid, and how wide its first dimension is folded."""
        blocks = -(-n // (self.wg // self.lanes * self.rows))
        x = min(blocks, device.limits.max_workgroups)
        return (x, -(-m // self.m_tile), -(-blocks // x)), x


@dataclass(frozen=True)
class Shape:
    """What the choice among variants hangs on: m rows of k activations times n rows of weights."""

    fmt: str
    n: int
    k: int
    m: int
    act: bool  # n gate rows, and n that they gate
    own: bool  # each workgroup makes its activations itself
    to_bytes: bool = False  # and what comes out is bytes
    second: str = ""  # the format of the last rows, if those have one of their own

    def __str__(self) -> str:
        made = " from float32" * self.own + " to bytes" * self.to_bytes
        fmt = f"{self.fmt} and {self.second}" if self.second else self.fmt
        return f"{fmt} {'2 x ' * self.act}{self.n} x {self.k}, {self.m_tile} rows{made}"

    def beside(self, second: Weight) -> Shape:
        """With the rows of a second weight after these."""
        return replace(self, second=second.fmt.name, n=self.n + second.n)

    @property
    def has_table(self) -> bool:
        """Whether workgroups hold a table of the format."""
        return FORMATS[self.fmt].has_table

    @property
    def fills_memory(self) -> bool:
        """Whether they hold that, or make activations."""
        return self.own or self.has_table

    @property
    def m_tile(self) -> int:
        return min(MATVEC_ROWS, 1 << (self.m - 1).bit_length())


def choose_matvec(device: Device, shape: Shape, *, ints: bool) -> Matvec:
    """What was measured on this device (`tuning.py`), else a default."""
    tuned = device.tuned.get(str(shape)) if ints else None
    return tuned or default_matvec(device, shape, ints=ints)


def default_matvec(device: Device, shape: Shape, *, ints: bool) -> Matvec:
    """Measured on llvmpipe, SwiftShader and an NVIDIA H200 (bench/NOTES.md)."""
    n, k, m_tile = shape.n, shape.k, shape.m_tile
    size = device.subgroup_size
    if device.info.is_cpu:  # no barriers, no reductions: a thread per row
        return Matvec(lanes=1, rows=1, wg=64, m_tile=m_tile, subgroup=0)
    if ints:
        return _default_ints(device, shape, size or 16)
    if not size:
        return Matvec(lanes=16, rows=1, wg=64, m_tile=m_tile, subgroup=0)
    if n * k < 1 << 22 or m_tile > 2:  # too few rows to fill the GPU, or too many sums for the registers
        return Matvec(lanes=size, rows=1, wg=max(64, size), m_tile=m_tile, subgroup=size)
    if n >= 1 << 15:
        return Matvec(lanes=size, rows=4, wg=64, m_tile=m_tile, subgroup=size)
    return Matvec(lanes=2 * size, rows=4, wg=256, m_tile=m_tile, subgroup=size)


def _default_ints(device: Device, shape: Shape, size: int) -> Matvec:
    """Few rows of weights are spread over more lanes, so that enough loads are under way everywhere.

    Where workgroups fill their memory first, with activations or a table, they are few and large.
    """
    if not device.subgroup_size:  # sums meet in workgroup memory, which is small
        return Matvec(size, 1 if shape.m_tile > 1 else 2, 64 if shape.m_tile > 1 else 128, shape.m_tile, 0)
    most = min(512, device.limits.max_invocations)
    subgroup = device.subgroup_size
    if shape.m_tile > 1:
        return _default_several(device, shape, most)
    n = shape.n * (1 + shape.act)
    lanes = size if n >= 8192 or shape.k < 64 * size else 2 * size
    if shape.to_bytes:
        return Matvec(size, max(1, 32 * size // most), most, 1, subgroup)
    if not shape.fills_memory:
        return Matvec(lanes, 1, most, 1, subgroup, unroll=2 if shape.fmt in RUN_FORMATS else 1)
    if not shape.own:  # copies of a table: room for as many as the workgroup has threads for
        return Matvec(lanes, 2, min(1024, device.limits.max_invocations), 1, subgroup, unroll=2)
    if shape.k < 1024:
        return Matvec(max(size // 2, 1), 1 + shape.act, min(128, most), 1, subgroup)
    if shape.k >= 8192:
        lanes = 4 * size
    return Matvec(lanes, 2, most, 1, subgroup, unroll=1 if shape.act else 2)


def _default_several(device: Device, shape: Shape, most: int) -> Matvec:
    """Of 2 to 8 rows: a thread has 4 rows of weights, so that activations are loaded a quarter as often.

    Where the groups of a workgroup are many, they bring the activations of a turn into its memory together.
    """
    size, m, room = device.subgroup_size, shape.m_tile, memory_for(device, shape.fmt)
    if shape.act:
        lanes, rows, wg, stage = (max(size // 2, 1) if m == 8 else size), 2, 128, True
    elif m < 8:
        lanes, rows, wg, stage = 2 * size, 2, 256, False
    elif shape.n > 4096:
        lanes, rows, wg, stage = size, 4, 128, True
    else:
        lanes, rows, wg, stage = (4 if shape.n <= 2048 and shape.k >= 8192 else 2) * size, 4, 128, False
    while lanes > size and lanes > shape.k // 32:
        lanes //= 2
    stage = stage and staged_bytes(lanes, m) <= room
    return Matvec(lanes, rows, min(most, max(wg, lanes)), m, size, ahead=1, stage=int(stage))


def staged_bytes(lanes: int, m_tile: int) -> int:
    """Of the activations of a turn in workgroup memory."""
    return 48 * m_tile * lanes


def memory_for(device: Device, fmt: str) -> int:
    """Bytes of workgroup memory that are left beside the table of a format, and sums."""
    return min(28 << 10, device.limits.max_shared - 4096 - _table_bytes(FORMATS[fmt]))


def table_room(device: Device, shape: Shape, v: Matvec) -> int:
    """Bytes of workgroup memory for copies of the table: large workgroups are few and can have more."""
    if not shape.has_table or device.info.is_cpu:
        return 0
    taken = _own_bytes(shape.k) if shape.own else staged_bytes(v.lanes, v.m_tile) if v.stage else 0
    return max(0, min(32 * v.wg, device.limits.max_shared - 4096 - taken))


def _own_bytes(k: int) -> int:
    """Of a row of activations that a workgroup makes for itself."""
    return 3 * k // 2 + 1536


def linear(
    r: Recorder,
    x: Tensor | Activations,
    weight: Weight,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    residual: bool = False,
    act: str = "",
    scale: float = 1.0,
    softcap: float = 0.0,
    out_offset: int = 0,
    per_seq: bool = False,
    exact: bool = False,
    to_bytes: bool = False,
    second: Weight | None = None,
    then: Activations | None = None,
) -> None:
    """out[:, out_offset:] = epilogue(x @ weight.T), or += with residual. act: gate rows, then up rows.

    `exact`: all in float32, where choices hang on the result. `to_bytes` (`makes_bytes` says if that can be):
    out is rows of bytes. `second` (if `goes_with`) has the rows after those of weight, in another format.
    `then`: the activations to be made of out; they may be made at once.
    """
    m = r.n_seqs if per_seq else r.n_rows
    x = Activations.of(x)
    for shard in weight.shards:
        n = shard.n_rows // 2 if act else shard.n_rows
        consts = {
            "fmt": weight.fmt.name, "k": weight.k, "n": n, "act": act, "bias": bias is not None,
            "residual": residual, "scale": scale, "softcap": softcap, "out_stride": out.shape[-1],
            "out_offset": out_offset + shard.first_row,
            "st": r.layout,
        }  # fmt: skip
        after = (*shard.parts, *([bias] if bias else []), out)
        if m > _most_rows(r, weight, exact):
            matmuls.record(
                r, x, weight.fmt, shard.parts, bias, out, consts,
                label=weight.label, per_seq=per_seq, exact=exact, then=then,
            )  # fmt: skip
            continue
        ints = r.ints and weight.fmt.is_quantised and not exact
        shape = shape_of(r, x, weight, m, act, ints=ints, to_bytes=to_bytes)
        if second is not None:
            shape = shape.beside(second)
            after = (*shard.parts, *second.shards[0].parts, *after[len(shard.parts) :])
            consts["n"] = n = shape.n
        tuning = choose_matvec(r.device, shape, ints=ints)
        if shape.own:
            x_as, before = ("norm", (x.x, x.norm)) if x.norm else ("quantise", (x.x,))
        else:
            x_as, before = ("ints", (x.bytes(r),)) if ints else ("f32", (x.floats(r),))
        grid, fold = tuning.grid(r.device, n, m)
        kernel = r.device.kernel(
            "matvec", **consts, fmt2=second.fmt.name if second else "", n1=weight.n if second else 0,
            per_seq=per_seq, lanes=tuning.lanes, rows=tuning.rows, wg=tuning.wg, m_tile=tuning.m_tile,
            unroll=tuning.unroll, ahead=tuning.ahead, stage=tuning.stage, subgroup=tuning.subgroup,
            run=tuning.run if ints else 1, sure=m == 1, table=table_room(r.device, shape, tuning),
            grid_x=fold, x_as=x_as,
            eps=x.eps if x_as == "norm" else 0.0, out_as="ints" if to_bytes else "f32",
        )  # fmt: skip
        label = f"{kernel.name} {weight.label}" + (f" and {second.label}" if second else "")
        nbytes = sum(part.nbytes for part in shard.parts) + (second.nbytes if second else 0)
        r.add(
            kernel, (r.step, *before, *after), grid, label, nbytes=nbytes,
            flops=2 * m * n * (2 if act else 1) * weight.k,
        )  # fmt: skip


def _most_rows(r: Recorder, weight: Weight, exact: bool) -> float:
    """The most rows that `matvec` takes, rather than a kernel of tiles."""
    if r.device.info.is_cpu:
        return math.inf
    if not weight.fmt.is_quantised and matmuls.form_of(r, weight.fmt, exact) == "halves":
        return 1  # `matvec` reads float activations from far apart: each row costs as much again
    return MATVEC_ROWS


def shape_of(
    r: Recorder, x: Activations, weight: Weight, m: int, act: str, *,
    ints: bool = True, to_bytes: bool = False,
) -> Shape:  # fmt: skip
    """Of a weight in one piece, or of its first shard."""
    n = weight.shards[0].n_rows // (2 if act else 1)
    own = ints and _makes_own(r, x, weight, m)
    return Shape(weight.fmt.name, n, weight.k, m, bool(act), own, to_bytes)


def makes_bytes(r: Recorder, weight: Weight, act: str) -> bool:
    """Whether the product with this weight can bring what it makes into bytes: whole chunks in a workgroup.

    Of one row only: for more, workgroups that large are slower than a kernel of its own.
    """
    n = weight.shards[0].n_rows // (2 if act else 1)
    return (
        r.ints and r.n_rows == 1 and weight.fmt.is_quantised and len(weight.shards) == 1 and n % 32 == 0
        and 8 <= r.device.subgroup_size <= 32 and r.device.limits.max_invocations >= 256
    )  # fmt: skip


def form_of(r: Recorder, weight: Weight) -> str:
    """As what a product of a pass's rows with this weight takes them: "bytes", "halves", or "" for floats."""
    if r.n_rows <= _most_rows(r, weight, exact=False):
        return "bytes" if r.ints and weight.fmt.is_quantised else ""
    return {"ints": "bytes", "halves": "halves", "f32": ""}[matmuls.form_of(r, weight.fmt, exact=False)]


def goes_with(r: Recorder, x: Activations, weight: Weight, second: Weight) -> bool:
    """Whether one call can multiply x with both: a few rows, in workgroups that have rows of one weight each.

    A single row has to be one that the workgroups make themselves: so they are as large as that wants.
    """
    weights = weight, second
    if not r.ints or r.n_rows > MATVEC_ROWS or not all(
        w.fmt.is_quantised and not w.fmt.has_table and len(w.shards) == 1 for w in weights
    ):  # fmt: skip
        return False
    shape = shape_of(r, x, weight, r.n_rows, "").beside(second)
    if r.n_rows == 1 and not shape.own:
        return False
    tuning = choose_matvec(r.device, shape, ints=True)
    bindings = 5 + weight.fmt.n_bindings + second.fmt.n_bindings
    return (
        bindings <= r.device.limits.max_bindings
        and weight.n % (tuning.wg // tuning.lanes * tuning.rows) == 0
    )  # fmt: skip


def _makes_own(r: Recorder, x: Activations, weight: Weight, m: int) -> bool:
    """One row is brought into bytes by every workgroup anew: that costs less than a dispatch."""
    room = min(OWN_BYTES, r.device.limits.max_shared - 4096 - _table_bytes(weight.fmt))
    return m == 1 and not x.gather and not x.are_made and _own_bytes(x.k) <= room


def _table_bytes(fmt: QuantFormat) -> int:
    """What the format's table takes of workgroup memory: a grid, that of IQ1 in half, or pairs of bytes."""
    if not fmt.has_table:
        return 0
    return len(grids.rows(fmt.grid)) // (2 if fmt.grid == "iq1" else 1) if fmt.grid else 1024
