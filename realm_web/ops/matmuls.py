"""Matrix products of many rows: which kernel computes one on this device, with which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from realm_web.ops.activations import Activations
from realm_web.ops.recorder import Recorder
from realm_web.ops.rows import row_threads
from realm_web.quants import QuantFormat
from realm_web.runtime.device import Device, View
from realm_web.tensor import Tensor

ENOUGH = 512  # workgroups that fill a large GPU
MOST_SHARES = 8
LEAST_TURNS = 4  # of its loop that a share must be worth


@dataclass(frozen=True)
class Tiles:
    """Tuning of `matmul` or `matmul_units`: every choice gives the same numbers up to rounding."""

    kernel: str
    bm: int  # rows of activations, and rows of weights, of a workgroup
    bn: int
    tuning: tuple[tuple[str, Any], ...]  # the kernel's other constants
    group: int  # with a gate: rows of it that stand together in a tile
    splits: int = 1  # shares of k, summed by a second kernel

    def constants(self) -> dict[str, Any]:
        return {"bm": self.bm, "bn": self.bn, **dict(self.tuning), "splits": self.splits}

    def grid(self, n: int, m: int) -> tuple[int, int, int]:
        return -(-n // self.bn), -(-m // self.bm), self.splits

    def shares_nbytes(self, n: int, m: int) -> int:
        """What the sums of all shares take, in whole tiles."""
        return 4 * prod(self.grid(n, m)) * self.bn * self.bm


def choose(device: Device, x_as: str, fmt: str, act: str, n: int, k: int, m: int) -> Tiles:
    """Tiles for m rows times n rows of k weights: measured ones (`tiling.py`), or those of an NVIDIA H200."""
    tuned = device.tiles.get(tiles_key(x_as, fmt, act, n, k, m))
    tiles = tuned or candidates(device, x_as, n, k, m)[0]
    while tiles.splits > 1 and tiles.shares_nbytes(n, m) > device.limits.max_binding:
        tiles = replace(tiles, splits=tiles.splits // 2)
    return tiles


def rows_class(m: int) -> int:
    """Rows that share a choice are named by the largest of them; 128 stands for all above 64."""
    return next((rows for rows in (16, 32, 64) if m <= rows), 128)


def tiles_key(x_as: str, fmt: str, act: str, n: int, k: int, m: int) -> str:
    """The name of a product whose tiles were measured."""
    return f"{x_as} {fmt} {n}x{k} {act or 'plain'} {rows_class(m)} rows"


def candidates(device: Device, x_as: str, n: int, k: int, m: int) -> tuple[Tiles, ...]:
    """The likely best first; for matrix units more, also with twice the shares of k, which are summed apart.

    Of variants for those that differ in one constant some run five times slower than others, and not the same
    ones on the next shape (bench/NOTES.md): what a driver's compiler makes of them has to be measured.
    """
    bm = rows_class(m)
    if x_as == "f32":
        return (_cut(_tiles(x_as, min(max(bm, 32), 64), 64, 8 if bm > 32 else 4, 4, 1), n, k, m),)
    if x_as == "ints":
        chunks = 4 if device.limits.max_shared >= 24 << 10 else 2
        found = [_cut(_tiles(x_as, min(bm, 64), 64, 8 if bm > 32 else 4, 4, chunks), n, k, m)]
    elif bm == 128:
        shapes = ((128, 128, 64, 64, 1), (128, 64, 64, 32, 1), (64, 128, 64, 32, 1), (64, 128, 32, 64, 1),
                  (64, 128, 64, 32, 2))  # fmt: skip
        found = [_cut(_units(*shape), n, k, m) for shape in shapes]
        found += [_cut(_units(*shape, turned=1), n, k, m) for shape in shapes[:3]]
    else:
        sm = min(bm, 32)
        shapes = ((bm, 128, sm, 32, 2), (bm, 64, sm, 32, 1), (bm, 128, sm, 32, 1), (bm, 64, sm, 32, 2))
        found = [_cut(_units(*shape), n, k, m) for shape in shapes]
        found += [_cut(_units(*shape, turned=1), n, k, m) for shape in shapes[:3]]
    twice = [replace(t, splits=2 * t.splits) for t in found[:2]]
    return (
        *found,
        *(
            t
            for t in twice
            if _share(t, k) >= LEAST_TURNS and t.splits <= MOST_SHARES and prod(t.grid(n, m)) <= 4 * ENOUGH
        ),
    )


def _tiles(x_as: str, bm: int, bn: int, tm: int, tn: int, chunks: int) -> Tiles:
    tuning = (("x_as", x_as), ("tm", tm), ("tn", tn), ("chunks", chunks), ("stages", 1))
    return Tiles("matmul", bm, bn, tuning, group=bn // tn)


def _units(bm: int, bn: int, sm: int, sn: int, chunks: int, turned: int = 0) -> Tiles:
    tuning = (("sm", sm), ("sn", sn), ("chunks", chunks), ("stages", 1), ("turned", turned))
    return Tiles("matmul_units", bm, bn, tuning, group=16)


def _share(tiles: Tiles, k: int) -> int:
    """Turns of a share of k; 0 where the shares are not whole turns."""
    turns, rest = divmod(k // 32, tiles.splits * dict(tiles.tuning)["chunks"])
    return 0 if rest else turns


def _cut(tiles: Tiles, n: int, k: int, m: int) -> Tiles:
    """Cut k into shares where the tiles are too few to fill a large GPU.

    Of a bucket of rows only a little more than half may be there, and the other tiles end at once.
    """
    m = m * 5 // 8 if m > 64 else m
    chunks, splits = dict(tiles.tuning)["chunks"], 1
    while k // 32 % chunks:  # rows of an odd number of chunks are taken one by one
        chunks //= 2
    share, count = k // 32 // chunks, -(-n // tiles.bn) * -(-m // tiles.bm)
    while count * splits < ENOUGH and splits < MOST_SHARES and share % (2 * splits) == 0:
        if share // (2 * splits) < LEAST_TURNS:
            break
        splits *= 2
    return replace(tiles, tuning=tuple(dict(tiles.tuning, chunks=chunks).items()), splits=splits)


def record(
    r: Recorder, x: Activations, weight: QuantFormat, parts: Sequence[View], bias: Tensor | None, out: Tensor,
    consts: dict[str, Any], *, label: str, per_seq: bool, exact: bool,
    then: Activations | None = None,
) -> None:  # fmt: skip
    """Record the product of many rows. `consts` as the epilogue and the weight have them.

    `then`: the activations to be made of out, which are if that takes no pass of its own.
    """
    m = r.n_seqs if per_seq else r.n_rows
    n = consts["n"] * (2 if consts["act"] else 1)
    x_as = form_of(r, weight, exact)
    tiles = choose(r.device, x_as, weight.name, consts["act"], n, consts["k"], m)
    consts = {**consts, "per_seq": per_seq}
    rows: tuple[View, ...] = (
        x.halves(r) if x_as == "halves" else (x.bytes(r) if x_as == "ints" else x.floats(r),)
    )
    scale = rows[1:]
    if x_as == "halves":
        consts["rows"] = m
    kernel = r.device.kernel(tiles.kernel, **consts, **tiles.constants())
    grid = tiles.grid(n, m)
    after = (*([bias] if bias else []), out)
    work = {"nbytes": sum(part.nbytes for part in parts), "flops": 2 * m * n * consts["k"]}
    if tiles.splits == 1:
        r.add(kernel, (r.step, *rows, *parts, *after), grid, f"{kernel.name} {label}", **work)
        return
    m_pad, stride = grid[1] * tiles.bm, grid[0] * tiles.bn
    shares = r.scratch("shares", tiles.splits, m_pad, stride)
    r.add(kernel, (r.step, *rows, *parts, shares), grid, f"{kernel.name} {label}", **work)
    for of_weight in ("fmt", "k", "rows"):
        consts.pop(of_weight, None)
    consts |= {"splits": tiles.splits, "m_pad": m_pad, "stride": stride, "group": tiles.group}
    consts["scaled"] = bool(scale)
    _sum(r, consts, (r.step, shares, *scale), bias, out, m, label, then)


def _sum(
    r: Recorder, consts: dict[str, Any], views: tuple[View, ...], bias: Tensor | None, out: Tensor, m: int,
    label: str, then: Activations | None,
) -> None:  # fmt: skip
    """Record the pass that sums the shares, and makes `then` of what comes out if it can."""
    n, width = consts["n"], 4
    if n % 4 or consts["out_stride"] % 4 or consts["out_offset"] % 4:
        width = 1
    if then is not None and not (n == consts["out_stride"] and then.may_be_made(r.device)):
        then = None
    made = then.form if then else ""
    normed, kept = then is not None and then.norm is not None, then is None or not then.only
    by_rows = normed or made == "halves"
    wg = row_threads(r.device, n) if by_rows else 128
    kernel = r.device.kernel(
        "matmul_sum", **consts, made=made, norm=normed, eps=then.eps if normed else 0.0, kept=kept, rows=m,
        width=width, wg=wg, subgroup=r.device.subgroup_size if made else 0,
    )  # fmt: skip
    given = [*views, *([bias] if bias else []), *([out] if kept else []), *([then.norm] if normed else [])]
    grid = (1 if by_rows else -(-n // (width * wg)), m)
    name = f"{kernel.name} {label}{' and norm' * normed}{f' to {made}' if made else ''}"
    r.add(kernel, [*given, *(then.to_fill(r) if then else ())], grid, name)


def has_units(device: Device) -> bool:
    """Whether `matmul_units` runs there: it takes subgroups of 32 and some room."""
    has = {"subgroup_matrix", "f16"} <= device.features
    return has and device.subgroup_size == 32 and device.limits.max_shared >= 48 << 10


def form_of(r: Recorder, weight: QuantFormat, exact: bool) -> str:
    """How the product takes its activations: "halves" on matrix units, "ints", or "f32"."""
    if exact or not r.ints:
        return "f32"
    if has_units(r.device):
        return "halves"
    return "ints" if weight.is_quantised else "f32"
