"""Matrix products: a few rows at a time by `matvec`, many by `matmul`, and how each is tuned."""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.ops import matmuls
from realm_web.ops.activations import Activations
from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor, Weight

MATVEC_ROWS = 8  # up to so many rows the matrix-vector kernel reads the weights once for all of them


OWN_BYTES = 16 << 10  # of workgroup memory that a workgroup may use to make its own activations


@dataclass(frozen=True)
class Matvec:
    """Tuning constants of `matvec`: every choice gives the same numbers up to rounding."""

    lanes: int  # threads that share one weight row
    rows: int  # weight rows of each such group
    wg: int
    m_tile: int
    subgroup: int
    unroll: int = 1  # chunks of each row that a thread has under way

    def grid(self, device: Device, n: int, m: int) -> tuple[tuple[int, int, int], int]:
        """The grid, and how wide its first dimension is folded."""
        blocks = -(-n // (self.wg // self.lanes * self.rows))
        x = min(blocks, device.limits.max_workgroups)
        return (x, -(-m // self.m_tile), -(-blocks // x)), x


def product_key(fmt: str, n: int, k: int, m: int, *, act: bool) -> str:
    """What a choice among variants hangs on."""
    return f"{fmt} {'2 x ' * act}{n} x {k}, {_m_tile(m)} rows"


def _m_tile(m: int) -> int:
    return min(MATVEC_ROWS, 1 << (m - 1).bit_length())


def choose_matvec(
    device: Device, fmt: str, n: int, k: int, m: int, *, ints: bool = False, act: bool = False
) -> Matvec:
    """What was measured on this device (`tuning.py`), else a default."""
    tuned = device.tuned.get(product_key(fmt, n, k, m, act=act)) if ints else None
    return tuned or default_matvec(device, n, k, m, ints=ints, act=act)


def default_matvec(device: Device, n: int, k: int, m: int, *, ints: bool, act: bool) -> Matvec:
    """Measured on llvmpipe, SwiftShader and an NVIDIA H200 (bench/NOTES.md)."""
    m_tile = _m_tile(m)
    if device.info.is_cpu:  # no barriers, no reductions: a thread per row
        return Matvec(lanes=1, rows=1, wg=64, m_tile=m_tile, subgroup=0)
    size = device.subgroup_size
    if ints:
        return _choose_ints(size or 16, n * (1 + act), k, m_tile, subgroup=size)
    if not size:
        return Matvec(lanes=16, rows=1, wg=64, m_tile=m_tile, subgroup=0)
    if n * k < 1 << 22 or m_tile > 2:  # too few rows to fill the GPU, or too many sums for the registers
        return Matvec(lanes=size, rows=1, wg=max(64, size), m_tile=m_tile, subgroup=size)
    if n >= 1 << 15:
        return Matvec(lanes=size, rows=4, wg=64, m_tile=m_tile, subgroup=size)
    return Matvec(lanes=2 * size, rows=4, wg=256, m_tile=m_tile, subgroup=size)


def _choose_ints(size: int, n: int, k: int, m_tile: int, *, subgroup: int) -> Matvec:
    """Few rows of weights are spread over more lanes, so that enough loads are under way everywhere."""
    lanes = size if n >= 8192 or k < 64 * size else 2 * size
    turns = k // 32 // lanes
    if m_tile > 1:
        rows = 1 if n >= 8192 else 2
        return Matvec(lanes, rows, wg=max(128, lanes), m_tile=m_tile, subgroup=subgroup)
    return Matvec(lanes, 1, wg=max(256, lanes), m_tile=1, subgroup=subgroup, unroll=2 if turns >= 2 else 1)


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
) -> None:
    """out[:, out_offset:] = epilogue(x @ weight.T), or += with residual. act: gate rows, then up rows.

    `exact`: all in float32, where choices hang on the result.
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
        if m > MATVEC_ROWS and not r.device.info.is_cpu:
            matmuls.record(
                r, x, weight.fmt, shard.parts, bias, out, consts,
                label=weight.label, per_seq=per_seq, exact=exact,
            )  # fmt: skip
            continue
        ints = r.ints and weight.fmt.is_quantised and not exact
        tuning = choose_matvec(r.device, weight.fmt.name, n, weight.k, m, ints=ints, act=bool(act))
        x_as, before = _input(r, x, n, m, ints)
        grid, fold = tuning.grid(r.device, n, m)
        kernel = r.device.kernel(
            "matvec", **consts, per_seq=per_seq, lanes=tuning.lanes, rows=tuning.rows, wg=tuning.wg,
            m_tile=tuning.m_tile, unroll=tuning.unroll, subgroup=tuning.subgroup, grid_x=fold,
            x_as=x_as, eps=x.eps if x_as == "norm" else 0.0,
        )  # fmt: skip
        nbytes = sum(part.nbytes for part in shard.parts)
        r.add(kernel, (r.step, *before, *after), grid, f"{kernel.name} {weight.label}", nbytes=nbytes)


def _input(r: Recorder, x: Activations, n: int, m: int, ints: bool) -> tuple[str, tuple[Tensor, ...]]:
    """How the kernel takes its activations, and what it binds for them.

    One row is brought into bytes by every workgroup anew: that costs less than a dispatch, unless there are
    many workgroups or their memory is small.
    """
    if not ints:
        return "f32", (x.floats(r),)
    own = 5 * x.k // 4 + 512
    if m > 1 or x.gather or own > min(OWN_BYTES, r.device.limits.max_shared - 4096):
        return "ints", (x.bytes(r),)
    return ("norm", (x.x, x.norm)) if x.norm else ("quantise", (x.x,))
