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
FEW, MANY = 8, 192  # workgroups from which on heads share their keys, of split contexts and of whole ones
SHARING = 8  # rows from which on long contexts are read eight keys at a time: fewer threads, more in flight
BUSY = 16  # workgroups from which on splits take more than the least
LEAST_SHARE, MOST_SHARE = 64, 1024  # tokens of a split
TILE_SHARE = 128  # and of one of tiles
TILE_WORKGROUPS = 256  # that tiles are split into, if there are fewer
LONG = 2048  # values of a row that attention brings into bytes even if it is alone
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
    to_bytes: bool = False,
) -> None:
    """Rotate q and k, put k and v into the pages, and attend to what each row's sequence has there.

    Causal, to all positions or the last `window`. qkv (n_rows, (n_heads + 2 n_kv) * head_dim),
    out (n_rows, n_heads * head_dim), or with `to_bytes` (if `attends_to_bytes`) rows of bytes. One call where
    no sequence has two rows and contexts are short.
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
        consts = {**shape, **shown, **rotation, "fused": True, "rows": "all", "to_bytes": to_bytes}
        _rows(r, given, pages, out, sinks, consts)
        return
    q = r.scratch("q", r.n_rows, n_heads * head_dim)
    kernel = r.device.kernel("rope_store", **shape, **rotation, subgroup=r.device.subgroup_size)
    r.add(kernel, (*given, q, pages.k, pages.v), (n_heads + 2 * n_kv, r.n_rows))
    consts = {**shape, **shown}
    if r.qt == 1:
        consts |= {"fused": False, "rows": "all", "to_bytes": to_bytes}
        _rows(r, (r.step, q), pages, out, sinks, consts)
        return
    # rows of sequences that decode among prompts: a tile of one row would be slow where its context is long
    apart = r.n_seqs > 1 and not r.device.info.is_cpu
    _tiles(r, q, pages, out, sinks, {**consts, "skip": apart})
    if apart:
        consts |= {"fused": False, "rows": "single", "to_bytes": False}
        _rows(r, (r.step, q), pages, out, sinks, consts)


def attends_to_bytes(device: Device, n_rows: int, k: int, head_dim: int) -> bool:
    """Whether rows of k values, not tiles, come as bytes, which neighbours in a subgroup make together.

    One row that is short is left to the output product.
    """
    return (n_rows > 1 or k >= LONG) and head_dim % 32 == 0 and 8 <= device.subgroup_size <= 64


def _rows(
    r: Recorder, given: tuple, pages: Pages, out: Tensor, sinks: Tensor | None, consts: dict[str, Any]
) -> None:
    """Attention by rows, their contexts split where they may be long."""
    n_heads, single = consts["n_heads"], consts["rows"] == "single"
    n, grid_rows = (r.n_seqs, _max_tiles(r)) if single else (r.n_rows, r.n_rows)
    span = _span(r, consts)
    whole = span <= UNSPLIT
    few = 0 if r.device.info.is_cpu or span > CONTEXTS[1] else MANY if whole else FEW
    most = n * n_heads // few if few else n_heads
    batch = 4 if whole or n < SHARING else 8
    shape = row_shape(r.device, n_heads // consts["n_kv"], consts["head_dim"], most, batch)
    chunk = shape["batch"] * shape["wg"] // shape["lanes"]
    share = max(LEAST_SHARE, min(chunk, shape["wg"] // 2) // consts["block_size"] * consts["block_size"])
    while share < MOST_SHARE and share * BUSY < LEAST_SHARE * n * n_heads // shape["nq"]:
        share *= 2
    splits = min(MAX_SPLITS, -(-span // share))
    grid = (grid_rows, n_heads // shape["nq"])
    consts["sure"] = r.n_rows == 1
    _whole(r, "attention", (*given, pages.k, pages.v), out, sinks, consts | shape, grid, splits, share, n, 1)


def _tiles(
    r: Recorder, q: Tensor, pages: Pages, out: Tensor, sinks: Tensor | None, consts: dict[str, Any]
) -> None:
    """Attention by tiles; the contexts of few tiles are split."""
    n_heads, tile = consts["n_heads"], tile_shape(r.device, consts["head_dim"])
    nq = divisor(n_heads // consts["n_kv"], tile["tm"] * tile["mr"] // r.qt)
    grid = (_max_tiles(r), n_heads // nq)
    splits = max(1, min(TILE_WORKGROUPS // (grid[0] * grid[1]), -(-_span(r, consts) // TILE_SHARE)))
    consts = {**consts, **tile, "qt": r.qt, "nq": nq, "subgroup": r.device.subgroup_size}
    views = (r.step, q, pages.k, pages.v)
    _whole(r, "attention_tiles", views, out, sinks, consts, grid, splits, TILE_SHARE, r.n_rows, r.qt)


def _whole(
    r: Recorder, name: str, views: tuple, out: Tensor, sinks: Tensor | None, consts: dict[str, Any],
    grid: tuple[int, int], splits: int, share: int, n: int, qt: int,
) -> None:  # fmt: skip
    """Record the kernel `name`, and where contexts are split what makes its parts (n, ...) whole."""
    extra = () if sinks is None else (sinks,)
    if splits == 1:
        kernel = r.device.kernel(name, **consts, sinks=bool(extra), splits=1, share=share)
        r.add(kernel, (*views, *extra, out), grid)
        return
    n_heads, head_dim = consts["n_heads"], consts["head_dim"]
    parts = r.scratch("attention parts", n, n_heads, splits, head_dim + 4)
    kernel = r.device.kernel(name, **consts, sinks=False, splits=splits, share=share)
    r.add(kernel, (*views, parts), (*grid, splits))
    merge = r.device.kernel(
        "attention_merge", n_heads=n_heads, head_dim=head_dim, block_size=consts["block_size"],
        window=consts["window"], rows=consts.get("rows", "tiles"), qt=qt, skip=consts.get("skip", False),
        splits=splits, share=share, sinks=bool(extra), sure=consts.get("sure", False), wg=256,
        to_bytes=consts.get("to_bytes", False), st=r.layout,
    )  # fmt: skip
    r.add(merge, (r.step, parts, *extra, out), (n_heads, grid[0] * qt))


def _span(r: Recorder, consts: dict[str, Any]) -> int:
    """Tokens that a row may attend to; 1 where contexts are not to be split."""
    span = min(r.context, consts["window"] + consts["block_size"]) if consts["window"] else r.context
    return 1 if span <= UNSPLIT or r.device.info.is_cpu else span


def row_shape(device: Device, group: int, head_dim: int, most: int = 8, batch: int = 8) -> dict[str, int]:
    """The variant of `attention`: query heads, threads and keys at a time, by registers and memory.

    At most `most` query heads: fewer than share their keys where there are few workgroups otherwise; with few
    heads a thread has registers for 8 keys, else for `batch`.
    """
    subgroup = device.subgroup_size
    lanes = min(1 << (head_dim // 8).bit_length() - 1, 32)
    if subgroup < lanes:
        lanes = min(lanes, subgroup if subgroup >= 4 else max(4, head_dim // 32))
    soft = device.info.is_cpu or not subgroup
    batch, wg = (2, 64) if soft else (batch, 128)
    nq = min(8, max(1, 64 * lanes // head_dim))
    if most < min(nq, group):
        nq = max(1, most)
        batch, wg = (2, 64) if soft else (8, 256 if head_dim >= 128 else 128)
    while True:
        nq = divisor(group, nq)
        places = wg // lanes
        room = device.limits.max_shared // 4 - nq * (head_dim + batch * places + 43) - 2 * head_dim - 8
        room -= 0 if subgroup >= lanes else batch * nq * lanes * (places + 1)
        if room >= nq * head_dim:
            return {
                "nq": nq, "wg": wg, "lanes": lanes, "batch": batch, "room": min(ROOM, room),
                "subgroup": subgroup,
            }  # fmt: skip
        nq -= 1


def tile_shape(device: Device, head_dim: int) -> dict[str, int]:
    """The variant of `attention_tiles`: tm * mr queries, tn * nr keys, values of `keys` keys at a time."""
    keys = 16 if head_dim <= 128 else 8 if head_dim <= 256 else 4
    if device.limits.max_shared < 32768 or device.info.is_cpu:
        mr = 4 if head_dim <= 128 else 2 if head_dim <= 256 else 1
        return {"tm": 8, "tn": 8, "mr": mr, "nr": 4, "keys": max(4, keys // 2)}
    tm, mr = (8, 4) if head_dim <= 128 else (16, 1)
    return {"tm": tm, "tn": 16, "mr": mr, "nr": 4, "keys": keys}


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _max_tiles(r: Recorder) -> int:
    """The most tiles that the rows can be cut into."""
    return min(r.n_rows, -(-r.n_rows // r.qt) + r.n_seqs - 1)
