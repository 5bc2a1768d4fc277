"""The numpy twins of the kernels of attention, as in `cpu_kernels.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from realm_web.runtime.cpu_kernels import Twin, Views, softcapped


def rope_store(c: dict, views: list[np.ndarray]) -> None:
    v, st = Views(views), c["st"]
    n_heads, n_kv, hd, rot = c["n_heads"], c["n_kv"], c["head_dim"], c["rot_dim"]
    step, qkv = v.u32(), v.f32(-1, n_heads + 2 * n_kv, hd)
    turns, q = v.u32()[: rot // 2], v.f32(-1, n_heads, hd)
    k, values = (v.kv(c["kv"], -1, n_kv, c["block_size"], hd) for _ in range(2))
    n = int(step[st.N_ROWS])
    positions = step[st.positions : st.positions + n]
    phase = (positions[:, None] * turns[None, :]).view(np.int32)  # wraps at whole turns
    angle = phase.astype(np.float32) * np.float32(1.4629180792671596e-9)  # (n, rot / 2)
    cos, sin = (f(angle)[:, None, :] * np.float32(c["magnitude"]) for f in (np.cos, np.sin))
    heads = qkv[:n, : n_heads + n_kv].copy()
    if rot == 0:
        pass
    elif c["neox"]:
        a, b = heads[..., : rot // 2].copy(), heads[..., rot // 2 : rot].copy()
        heads[..., : rot // 2], heads[..., rot // 2 : rot] = a * cos - b * sin, b * cos + a * sin
    else:
        a, b = heads[..., 0:rot:2].copy(), heads[..., 1:rot:2].copy()
        heads[..., 0:rot:2], heads[..., 1:rot:2] = a * cos - b * sin, b * cos + a * sin
    q[:n] = heads[:, :n_heads]
    seqs = step[st.row_seqs : st.row_seqs + n]
    blocks = _blocks_of(c, step, seqs, positions // c["block_size"])
    places = positions % c["block_size"]
    k[blocks, :, places] = heads[:, n_heads:]
    values[blocks, :, places] = qkv[:n, n_heads + n_kv :]


def attention(c: dict, views: list[np.ndarray]) -> None:
    v, st = Views(views), c["st"]
    n_heads, n_kv, hd, size = c["n_heads"], c["n_kv"], c["head_dim"], c["block_size"]
    splits, group = c["splits"], n_heads // n_kv
    step, q = v.u32(), v.f32(-1, n_heads, hd)
    k, values = (v.kv(c["kv"], -1, n_kv, size, hd) for _ in range(2))
    sinks = v.f32(n_heads).reshape(n_kv, group) if c["sinks"] else None
    out = v.f32(-1, n_heads, hd) if splits == 1 else v.f32(-1, n_heads, splits, hd + 2)
    n = int(step[st.N_ROWS])
    row_seqs = step[st.row_seqs : st.row_seqs + n]
    positions = step[st.positions : st.positions + n].astype(np.int64)
    for seq in np.unique(row_seqs):
        rows = np.flatnonzero(row_seqs == seq)
        length = int(positions[rows].max()) + 1
        table = _blocks_of(c, step, seq, np.arange(-(-length // size)))
        # (n_kv, length, head_dim)
        keys, vals = (
            pages[table].transpose(1, 0, 2, 3).reshape(n_kv, -1, hd)[:, :length].astype(np.float32)
            for pages in (k, values)
        )
        queries = q[rows].reshape(len(rows), n_kv, group, hd).transpose(1, 0, 2, 3)  # (n_kv, rows, group, hd)
        scores = np.einsum("krgd,kpd->krgp", queries, keys, optimize=True) * np.float32(c["scale"])
        if c["softcap"]:
            scores = softcapped(scores, c["softcap"])
        visible = np.arange(length)[None, :] <= positions[rows][:, None]
        if c["window"]:
            visible &= np.arange(length)[None, :] > positions[rows][:, None] - c["window"]
        scores = np.where(visible[None, :, None, :], scores, -np.inf)
        if splits == 1:
            top = scores.max(axis=-1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, sinks[:, None, :, None])
            probs = np.exp(scores - top)
            total = probs.sum(axis=-1, keepdims=True)
            probs /= total if sinks is None else total + np.exp(sinks[:, None, :, None] - top)
            result = np.einsum("krgp,kpd->krgd", probs, vals, optimize=True)
            out[rows] = result.transpose(1, 0, 2, 3).reshape(len(rows), n_heads, hd)
            continue
        for i, row in enumerate(rows):
            end, wg = int(positions[row]) + 1, c["wg"]
            start = max(end - c["window"], 0) // size * size if c["window"] else 0
            share = -(-(end - start) // (splits * wg)) * wg
            for s in range(splits):
                here = slice(start + s * share, min(start + (s + 1) * share, end))
                part = scores[:, i, :, here]  # (n_kv, group, here)
                top = part.max(axis=-1, initial=-1e30)
                probs = np.exp(part - top[..., None])
                sums = np.einsum("kgp,kpd->kgd", probs, vals[:, here])
                out[row, :, s, :hd] = sums.reshape(n_heads, hd)
                out[row, :, s, hd] = top.reshape(-1)
                out[row, :, s, hd + 1] = probs.sum(axis=-1).reshape(-1)


def attention_merge(c: dict, views: list[np.ndarray]) -> None:
    v, st, hd = Views(views), c["st"], c["head_dim"]
    step, parts = v.u32(), v.f32(-1, c["n_heads"], c["splits"], hd + 2)
    sinks = v.f32(c["n_heads"]) if c["sinks"] else None
    out = v.f32(-1, c["n_heads"], hd)
    n = int(step[st.N_ROWS])
    top = parts[:n, :, :, hd].max(axis=2, keepdims=True)
    if c["sinks"]:
        top = np.maximum(top, sinks[None, :, None])
    weight = np.exp(parts[:n, :, :, hd] - top)
    sums = (weight * parts[:n, :, :, hd + 1]).sum(axis=2)
    if c["sinks"]:
        sums = sums + np.exp(sinks[None, :] - top[..., 0])
    out[:n] = np.einsum("rhs,rhsd->rhd", weight, parts[:n, :, :, :hd]) / sums[..., None]


def _blocks_of(c: dict, step: np.ndarray, seqs: Any, index: np.ndarray) -> np.ndarray:
    """The pages that hold blocks `index` of sequences: by their tables, or in the ring of their slots."""
    st = c["st"]
    if c["ring"]:
        return step[st.seqs + seqs * st.SEQ_WORDS + st.SLOT] * c["ring"] + index % c["ring"]
    return step[st.tables + seqs * st.max_blocks + index]


TWINS: dict[str, Twin] = {
    "rope_store": rope_store,
    "attention": attention,
    "attention_merge": attention_merge,
}
