"""Attention over the paged KV cache, and what goes into the pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor

CONTEXTS = (256, 2048, 16384)  # a program is made for contexts of so many tokens at most, or of all
UNSPLIT = 256  # tokens of context that one workgroup takes rather than have parts merged
MAX_SPLITS = 64
BUSY = 32  # workgroups from which on splits take more than the least
LEAST_SHARE, MOST_SHARE = 64, 1024  # tokens of a split
ROOM = 4096  # values of workgroup memory that the last sums of a row may take


@dataclass(frozen=True)
class Rope:
    """How a layer rotates its queries and keys; dim 0 is not at all."""

    turns: Tensor  # (dim / 2,) u32: turns per position as fractions of 2**32
    magnitude: float
    dim: int
    neox: bool  # pairs are (i, i + dim / 2) rather than (2i, 2i + 1)


@dataclass(frozen=True)
class HeadNorm:
    """RMS norm of each head of q and k before they rotate."""

    q_weight: Tensor  # (head_dim,)
    k_weight: Tensor
    eps: float


@dataclass(frozen=True)
class Pages:
    """Keys and values of one layer: (n_blocks, n_kv, block_size, head_dim) each, f16, f32 or q8_0.

    With a ring, each slot has `ring` blocks of its own and writes them round and round; the block tables do
    not count.
    """

    k: Tensor
    v: Tensor
    ring: int


def contexts(device: Device, longest: int) -> list[int]:
    """The contexts that programs are made for: few, as each is compiled. Software devices never split."""
    if device.info.is_cpu:
        return [longest]
    return [n for n in CONTEXTS if n < longest] + [longest]


def query_tile(device: Device, group: int, head_dim: int) -> int:
    """Rows of a tile in `attention_tiles`, where `group` query heads share a kv head."""
    queries = tile_shape(device, head_dim)["tm"] * tile_shape(device, head_dim)["mr"]
    return queries // divisor(group, queries)


def attention(
    r: Recorder,
    qkv: Tensor,
    rope: Rope,
    pages: Pages,
    out: Tensor,
    *,
    n_heads: int,
    scale: float,
    norm: HeadNorm | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Rotate q and k, put k and v into the pages, and attend to what each row's sequence has there.

    Causal, to all positions or the last `window`. qkv (n_rows, (n_heads + 2 n_kv) * head_dim),
    out (n_rows, n_heads * head_dim). One call where no sequence has two rows and contexts are short.
    """
    n_kv, block_size, head_dim = pages.k.shape[1:]
    shape: dict[str, Any] = {
        "n_heads": n_heads, "n_kv": n_kv, "head_dim": head_dim, "block_size": block_size,
        "kv": pages.k.dtype, "ring": pages.ring, "st": r.layout,
    }  # fmt: skip
    shown = {"scale": scale, "window": window, "softcap": softcap}
    rotation = {
        "rot_dim": rope.dim, "neox": rope.neox, "magnitude": rope.magnitude,
        "norm": norm is not None, "eps": norm.eps if norm else 0.0,
    }  # fmt: skip
    given = (r.step, qkv, rope.turns, *((norm.q_weight, norm.k_weight) if norm else ()))
    if r.alone and len(given) + 3 + (sinks is not None) <= r.device.limits.max_bindings:
        _rows(r, given, pages, out, sinks, {**shape, **shown, **rotation, "fused": True, "rows": "all"})
        return
    q = r.scratch("q", r.n_rows, n_heads * head_dim)
    kernel = r.device.kernel("rope_store", **shape, **rotation, subgroup=r.device.subgroup_size)
    r.add(kernel, (*given, q, pages.k, pages.v), (n_heads + 2 * n_kv, r.n_rows))
    consts = {**shape, **shown, "fused": False}
    if r.qt == 1:
        _rows(r, (r.step, q), pages, out, sinks, {**consts, "rows": "all"})
        return
    # rows of sequences that decode among prompts: a tile of one row would be slow where its context is long
    apart = r.n_seqs > 1 and not r.device.info.is_cpu
    tile = tile_shape(r.device, head_dim)
    nq = divisor(n_heads // n_kv, tile["tm"] * tile["mr"] // r.qt)
    kernel = r.device.kernel(
        "attention_tiles", **shape, **shown, **tile, sinks=sinks is not None, skip=apart, qt=r.qt, nq=nq,
        subgroup=r.device.subgroup_size,
    )  # fmt: skip
    extra = () if sinks is None else (sinks,)
    grid = (_max_tiles(r), n_heads // nq)
    r.add(kernel, (r.step, q, pages.k, pages.v, *extra, out), grid)
    if apart:
        _rows(r, (r.step, q), pages, out, sinks, {**consts, "rows": "single"})


def _rows(
    r: Recorder, given: tuple, pages: Pages, out: Tensor, sinks: Tensor | None, consts: dict[str, Any]
) -> None:
    """Attention by rows, their contexts split where they may be long."""
    n_heads, head_dim, single = consts["n_heads"], consts["head_dim"], consts["rows"] == "single"
    shape = row_shape(r.device, n_heads // consts["n_kv"], head_dim)
    n, grid_rows = (r.n_seqs, _max_tiles(r)) if single else (r.n_rows, r.n_rows)
    splits, share = _splits(r, n * n_heads // shape["nq"], consts["window"], consts["block_size"])
    extra = () if sinks is None else (sinks,)
    parts = out if splits == 1 else r.scratch("attention parts", n, n_heads, splits, head_dim + 4)
    kernel = r.device.kernel(
        "attention", **consts, **shape, splits=splits, share=share, sinks=bool(extra) and splits == 1,
    )  # fmt: skip
    views = (*given, pages.k, pages.v, *(extra if splits == 1 else ()), parts)
    r.add(kernel, views, (grid_rows, n_heads // shape["nq"], splits))
    if splits > 1:
        names = ("n_heads", "head_dim", "block_size", "window", "rows", "st")
        kernel = r.device.kernel(
            "attention_merge", **{name: consts[name] for name in names}, splits=splits, share=share,
            sinks=bool(extra), wg=256,
        )  # fmt: skip
        r.add(kernel, (r.step, parts, *extra, out), (n_heads, grid_rows))


def _splits(r: Recorder, workgroups: int, window: int, block_size: int) -> tuple[int, int]:
    """Into how many parts contexts are cut at most, and how many tokens a part has at least.

    `workgroups` is how many there are without splits: the fewer, the smaller the parts.
    """
    span = min(r.context, window + block_size) if window else r.context
    if span <= UNSPLIT or r.device.info.is_cpu:
        return 1, LEAST_SHARE
    share = LEAST_SHARE
    while share < MOST_SHARE and share * BUSY < LEAST_SHARE * workgroups:
        share *= 2
    return min(MAX_SPLITS, -(-span // share)), share


def row_shape(device: Device, group: int, head_dim: int) -> dict[str, int]:
    """The variant of `attention`: query heads, threads and keys at a time, by registers and memory."""
    subgroup = device.subgroup_size
    lanes = min(1 << (head_dim // 8).bit_length() - 1, 32)
    if subgroup < lanes:
        lanes = min(lanes, subgroup if subgroup >= 4 else max(4, head_dim // 32))
    batch, wg = (2, 64) if device.info.is_cpu or not subgroup else (8, 256)
    nq = min(8, max(1, 64 * lanes // head_dim))
    while True:
        nq = divisor(group, nq)
        places = wg // lanes
        room = device.limits.max_shared // 4 - nq * (head_dim + batch * places + 43) - 2 * head_dim - 8
        sums = 0 if subgroup >= lanes else batch * nq * lanes * (places + 1)
        if room >= max(sums, nq * head_dim):
            return {
                "nq": nq, "wg": wg, "lanes": lanes, "batch": batch, "room": min(ROOM, room),
                "subgroup": subgroup,
            }  # fmt: skip
        nq -= 1


def tile_shape(device: Device, head_dim: int) -> dict[str, int]:
    """The variant of `attention_tiles`: tm * mr queries, tn * nr keys, values of `keys` keys at a time."""
    mr = 4 if head_dim <= 128 else 2 if head_dim <= 256 else 1
    keys = 16 if head_dim <= 128 else 8 if head_dim <= 256 else 4
    if device.limits.max_shared < 32768 or device.info.is_cpu:
        return {"tm": 8, "tn": 8, "mr": mr, "nr": 4, "keys": max(4, keys // 2)}
    return {"tm": 16, "tn": 8, "mr": mr, "nr": 8 if device.limits.max_shared >= 40960 else 4, "keys": keys}


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _max_tiles(r: Recorder) -> int:
    """The most tiles that the rows can be cut into."""
    return min(r.n_rows, -(-r.n_rows // r.qt) + r.n_seqs - 1)
