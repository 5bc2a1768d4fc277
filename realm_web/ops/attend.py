"""Attention over the paged KV cache, and what goes into the pages."""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor


@dataclass(frozen=True)
class Rope:
    """How a layer rotates its queries and keys; dim 0 is not at all."""

    turns: Tensor  # (dim / 2,) u32: turns per position as fractions of 2**32
    magnitude: float
    dim: int
    neox: bool  # pairs are (i, i + dim / 2) rather than (2i, 2i + 1)


@dataclass(frozen=True)
class Pages:
    """Keys and values of one layer: (n_blocks, n_kv, block_size, head_dim) each, f16 or f32.

    With a ring, each slot has `ring` blocks of its own and writes them round and round; the block tables do
    not count.
    """

    k: Tensor
    v: Tensor
    ring: int


def query_tile(device: Device, group: int, head_dim: int) -> int:
    """Query rows of `group` heads that an attention workgroup keeps: what fits 16 queries and its memory."""
    per_query = 4 * (2 * head_dim + 64 + 8)
    return max(1, min(16, device.limits.max_shared // per_query) // group)


def rope_store(r: Recorder, qkv: Tensor, rope: Rope, q: Tensor, pages: Pages, *, n_heads: int) -> None:
    """Rotate q and k; q goes to its own tensor, k and v into the pages."""
    n_kv, block_size, head_dim = pages.k.shape[1:]
    kernel = r.device.kernel(
        "rope_store", n_heads=n_heads, n_kv=n_kv, head_dim=head_dim, rot_dim=rope.dim, neox=rope.neox,
        magnitude=rope.magnitude, block_size=block_size, kv=pages.k.dtype, ring=pages.ring,
        st=r.layout,
    )  # fmt: skip
    threads = (n_heads + 2 * n_kv) * head_dim // 2
    r.add(kernel, (r.step, qkv, rope.turns, q, pages.k, pages.v), (-(-threads // 64), r.n_rows))


def attention(
    r: Recorder,
    q: Tensor,
    pages: Pages,
    out: Tensor,
    *,
    n_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Causal attention of every row over what its sequence has in the pages, or its last `window`."""
    n_kv, block_size, head_dim = pages.k.shape[1:]
    parts, extra = out, () if sinks is None else (sinks,)
    if r.splits > 1:
        parts = r.scratch("attention parts", r.n_rows, n_heads, r.splits, head_dim + 2)
    kernel = r.device.kernel(
        "attention", n_heads=n_heads, n_kv=n_kv, head_dim=head_dim, block_size=block_size, scale=scale,
        softcap=softcap, window=window, kv=pages.k.dtype, ring=pages.ring,
        sinks=bool(extra) and r.splits == 1, qt=r.qt,
        splits=r.splits, wg=64, subgroup=r.device.subgroup_size, st=r.layout,
    )  # fmt: skip
    tiles = max_tiles(r.n_rows, r.n_seqs, r.qt)
    views = (r.step, q, pages.k, pages.v, *(extra if r.splits == 1 else ()), parts)
    r.add(kernel, views, (tiles, n_kv, r.splits))
    if r.splits > 1:
        merge = r.device.kernel(
            "attention_merge", n_heads=n_heads, head_dim=head_dim, splits=r.splits, sinks=bool(extra),
            st=r.layout,
        )  # fmt: skip
        r.add(merge, (r.step, parts, *extra, out), (n_heads, r.n_rows))


def max_tiles(n_rows: int, n_seqs: int, qt: int) -> int:
    """The most attention tiles that n_rows rows of n_seqs sequences can be cut into."""
    return n_rows if qt == 1 else min(n_rows, -(-n_rows // qt) + n_seqs - 1)
