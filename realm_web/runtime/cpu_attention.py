"""The numpy twins of the kernels of attention, as in `cpu_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from realm_web.quants import activation_words
from realm_web.runtime.cpu_kernels import Twin, Views, put_bytes, softcapped, to_bytes

GROUP = 32  # values that share a scale in q8_0


class Pages:
    """Keys or values of a layer, as float32: (n_blocks, n_kv, block_size, head_dim)."""

    def __init__(self, c: dict, data: np.ndarray):
        size, hd = c["block_size"], c["head_dim"]
        self._scales, dtype, nbytes = None, np.float32, 4 * size * hd
        if c["kv"] == "f16":
            dtype, nbytes = np.float16, 2 * size * hd
        elif c["kv"] == "q8_0":
            dtype, nbytes = np.int8, size * hd + 4 * size * -(-hd // (2 * GROUP))
        count = len(data) // (nbytes * c["n_kv"])
        pages = data[: count * nbytes * c["n_kv"]].reshape(count, c["n_kv"], nbytes)
        used = size * hd * np.dtype(dtype).itemsize
        self._values = pages[..., :used].view(dtype).reshape(count, c["n_kv"], size, hd)
        if c["kv"] == "q8_0":
            self._scales = pages[..., used:].view(np.float16).reshape(count, c["n_kv"], size, -1)

    def read(self, blocks: np.ndarray) -> np.ndarray:
        values = self._values[blocks].astype(np.float32)
        if self._scales is None:
            return values
        scales = np.repeat(self._scales[blocks].astype(np.float32), GROUP, axis=-1)
        return values * scales[..., : values.shape[-1]]

    def write(self, blocks: np.ndarray, places: np.ndarray, values: np.ndarray) -> None:
        """The values (n, n_kv, head_dim) of tokens at `places` of `blocks`."""
        if self._scales is None:
            self._values[blocks, :, places] = values
            return
        n_scales, hd = self._scales.shape[-1], values.shape[-1]
        padded = np.pad(values, ((0, 0), (0, 0), (0, n_scales * GROUP - hd)))
        top = np.abs(padded).reshape(*padded.shape[:2], n_scales, GROUP).max(axis=-1)
        inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 1e-30)
        self._values[blocks, :, places] = np.rint(values * np.repeat(inverse, GROUP, axis=-1)[..., :hd])
        self._scales[blocks, :, places] = top / np.float32(127)


def rope_store(c: dict, views: list[np.ndarray]) -> None:
    v, n_heads = Views(views), c["n_heads"]
    step, qkv, rotation = v.u32(), v.f32(-1, n_heads + 2 * c["n_kv"], c["head_dim"]), _rotation(c, v)
    q = v.f32(-1, n_heads, c["head_dim"])
    rotated = _rotate_and_store(c, step, qkv, rotation, Pages(c, v.bytes()), Pages(c, v.bytes()))
    q[: len(rotated)] = rotated


def _rotation(c: dict, v: Views) -> tuple[np.ndarray, ...]:
    """Turns per position, and with `norm` the weights of q and k."""
    turns = v.u32()[: c["rot_dim"] // 2]
    return (turns, v.f32(c["head_dim"]), v.f32(c["head_dim"])) if c["norm"] else (turns,)


def _rotate_and_store(
    c: dict, step: np.ndarray, qkv: np.ndarray, rotation: tuple[np.ndarray, ...], k: Pages, values: Pages
) -> np.ndarray:
    """Put the keys and values of all rows into the pages; returns the queries (n, n_heads, head_dim)."""
    st, n_heads, n_kv, rot = c["st"], c["n_heads"], c["n_kv"], c["rot_dim"]
    n, (turns, *weights) = int(step[c["st"].N_ROWS]), rotation
    positions = step[st.positions : st.positions + n]
    heads = qkv[:n, : n_heads + n_kv].copy()
    if weights:
        mean = np.mean(heads * heads, axis=-1, keepdims=True, dtype=np.float32)
        heads *= 1 / np.sqrt(mean + np.float32(c["eps"]))
        heads[:, :n_heads] *= weights[0]
        heads[:, n_heads:] *= weights[1]
    phase = (positions[:, None] * turns[None, :]).view(np.int32)  # wraps at whole turns
    angle = phase.astype(np.float32) * np.float32(1.4629180792671596e-9)  # (n, rot / 2)
    cos, sin = (f(angle)[:, None, :] * np.float32(c["magnitude"]) for f in (np.cos, np.sin))
    first, second = slice(0, rot, 2), slice(1, rot, 2)
    if c["neox"]:
        first, second = slice(0, rot // 2), slice(rot // 2, rot)
    if rot:
        a, b = heads[..., first].copy(), heads[..., second].copy()
        heads[..., first], heads[..., second] = a * cos - b * sin, b * cos + a * sin
    seqs = step[st.row_seqs : st.row_seqs + n]
    blocks, places = _blocks_of(c, step, seqs, positions // c["block_size"]), positions % c["block_size"]
    k.write(blocks, places, heads[:, n_heads:])
    values.write(blocks, places, qkv[:n, n_heads + n_kv :])
    return heads[:, :n_heads]


def attention(c: dict, views: list[np.ndarray]) -> None:
    v, n_heads, hd = Views(views), c["n_heads"], c["head_dim"]
    step = v.u32()
    if c["fused"]:
        qkv, rotation = v.f32(-1, n_heads + 2 * c["n_kv"], hd), _rotation(c, v)
    else:
        q = v.f32(-1, n_heads, hd)
    k, values = Pages(c, v.bytes()), Pages(c, v.bytes())
    if c["fused"]:
        q = _rotate_and_store(c, step, qkv, rotation, k, values)
    sinks = v.f32(n_heads) if c["sinks"] else None
    out = _output(c, v) if c["splits"] == 1 else v.f32(-1, n_heads, c["splits"], hd + 4)
    wanted = np.ones(int(step[c["st"].N_ROWS]), bool) if c["rows"] == "all" else _single_rows(c, step)
    for rows, scores, vals in _scores(c, step, q, k, values, wanted):
        if c["splits"] > 1:
            _write_parts(c, step, rows, scores, vals, out)
        else:
            _put(c, out, rows, _attended(scores, vals, sinks))


def _output(c: dict, v: Views) -> np.ndarray:
    k = c["n_heads"] * c["head_dim"]
    return v.u32(-1, activation_words(k)) if c["to_bytes"] else v.f32(-1, c["n_heads"], c["head_dim"])


def _put(c: dict, out: np.ndarray, rows: Any, values: np.ndarray) -> None:
    """What rows attend to, (rows, n_heads, head_dim), into the output."""
    if c["to_bytes"]:
        put_bytes(out, rows, *to_bytes(values.reshape(len(rows), -1)))
    else:
        out[rows] = values


def attention_tiles(c: dict, views: list[np.ndarray]) -> None:
    v, n_heads, hd = Views(views), c["n_heads"], c["head_dim"]
    step, q, k, values = v.u32(), v.f32(-1, n_heads, hd), Pages(c, v.bytes()), Pages(c, v.bytes())
    sinks = v.f32(n_heads) if c["sinks"] else None
    out = v.f32(-1, n_heads, hd) if c["splits"] == 1 else v.f32(-1, n_heads, c["splits"], hd + 4)
    single = _single_rows(c, step)
    wanted = ~single if c["skip"] else np.ones_like(single)
    for rows, scores, vals in _scores(c, step, q, k, values, wanted):
        if c["splits"] == 1:
            out[rows] = _attended(scores, vals, sinks)
        else:
            _write_parts(c | {"rows": "tiles"}, step, rows, scores, vals, out)


def _single_rows(c: dict, step: np.ndarray) -> np.ndarray:
    """Which rows of the step are tiles of their own."""
    st = c["st"]
    tiles = step[st.tiles : st.tiles + int(step[st.N_TILES])]
    single = np.zeros(int(step[st.N_ROWS]), bool)
    single[tiles[tiles >> 16 == 1] & 0xFFFF] = True
    return single


def _scores(
    c: dict, step: np.ndarray, q: np.ndarray, k: Pages, values: Pages, wanted: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each sequence its wanted rows, their scores (n_kv, rows, group, length) and values."""
    st, n_kv, hd, size = c["st"], c["n_kv"], c["head_dim"], c["block_size"]
    group = c["n_heads"] // n_kv
    row_seqs = step[st.row_seqs : st.row_seqs + len(wanted)]
    positions = step[st.positions : st.positions + len(wanted)].astype(np.int64)
    for seq in np.unique(row_seqs[wanted]):
        rows = np.flatnonzero((row_seqs == seq) & wanted)
        length = int(positions[rows].max()) + 1
        table = _blocks_of(c, step, seq, np.arange(-(-length // size)))
        # (n_kv, length, head_dim)
        keys, vals = (
            pages.read(table).transpose(1, 0, 2, 3).reshape(n_kv, -1, hd)[:, :length] for pages in (k, values)
        )
        queries = q[rows].reshape(len(rows), n_kv, group, hd).transpose(1, 0, 2, 3)  # (n_kv, rows, group, hd)
        scores = np.einsum("krgd,kpd->krgp", queries, keys, optimize=True) * np.float32(c["scale"])
        if c["softcap"]:
            scores = softcapped(scores, c["softcap"])
        visible = np.arange(length)[None, :] <= positions[rows][:, None]
        if c["window"]:
            visible &= np.arange(length)[None, :] > positions[rows][:, None] - c["window"]
        yield rows, np.where(visible[None, :, None, :], scores, -np.inf), vals


def _attended(scores: np.ndarray, vals: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """The softmax of the scores times the values: (rows, n_heads, head_dim)."""
    n_kv, n_rows, group, _ = scores.shape
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = sinks.reshape(n_kv, 1, group, 1)
        top = np.maximum(top, sinks)
    probs = np.exp(scores - top)
    total = probs.sum(axis=-1, keepdims=True)
    probs /= total if sinks is None else total + np.exp(sinks - top)
    result = np.einsum("krgp,kpd->krgd", probs, vals, optimize=True)
    return result.transpose(1, 0, 2, 3).reshape(n_rows, n_kv * group, -1)


def _write_parts(
    c: dict, step: np.ndarray, rows: np.ndarray, scores: np.ndarray, vals: np.ndarray, out: np.ndarray
) -> None:
    hd, n_heads = c["head_dim"], c["n_heads"]
    for i, row in enumerate(rows):
        place = step[c["st"].row_seqs + row] if c["rows"] == "single" else row
        start, end, share, used = _split(c, step, row)
        for s in range(used):
            here = slice(start + s * share, min(start + (s + 1) * share, end))
            part = scores[:, i, :, here]  # (n_kv, group, here)
            top = part.max(axis=-1, initial=-1e30)
            probs = np.exp(part - top[..., None])
            sums = np.einsum("kgp,kpd->kgd", probs, vals[:, here])
            out[place, :, s, :hd] = sums.reshape(n_heads, hd)
            out[place, :, s, hd] = top.reshape(-1)
            out[place, :, s, hd + 1] = probs.sum(axis=-1).reshape(-1)


def _split(c: dict, step: np.ndarray, row: int) -> tuple[int, int, int, int]:
    """Where the context of a row or its tile begins and ends, what a split of it takes, and how many do."""
    st, size, splits = c["st"], c["block_size"], c["splits"]
    first, count = row, 1
    if c["rows"] == "tiles":
        tiles = step[st.tiles : st.tiles + int(step[st.N_TILES])]
        tile = int(tiles[np.searchsorted(tiles & 0xFFFF, row, side="right") - 1])
        first, count = tile & 0xFFFF, tile >> 16
    position = int(step[st.positions + first])
    start, end = max(position + 1 - c["window"], 0) // size * size if c["window"] else 0, position + count
    share = max(c["share"], -(-(end - start) // (splits * size)) * size)
    return start, end, share, -(-(end - start) // share)


def attention_merge(c: dict, views: list[np.ndarray]) -> None:
    v, n_heads, hd = Views(views), c["n_heads"], c["head_dim"]
    step, parts = v.u32(), v.f32(-1, n_heads, c["splits"], hd + 4)
    sinks = v.f32(n_heads) if c["sinks"] else None
    out = _output(c, v)
    wanted = _single_rows(c, step)
    if c["rows"] != "single":
        wanted = ~wanted if c["rows"] == "tiles" and c["skip"] else np.ones_like(wanted)
    for row in np.flatnonzero(wanted):
        *_, used = _split(c, step, row)
        place = step[c["st"].row_seqs + row] if c["rows"] == "single" else row
        sums, tops, totals = (parts[place, :, :used, part] for part in (slice(hd), hd, hd + 1))
        top = tops.max(axis=1) if sinks is None else np.maximum(tops.max(axis=1), sinks)  # (n_heads,)
        weight = np.exp(tops - top[:, None])
        total = (weight * totals).sum(axis=1)
        if sinks is not None:
            total = total + np.exp(sinks - top)
        _put(c, out, [row], np.einsum("hs,hsd->hd", weight, sums)[None] / total[:, None])


def _blocks_of(c: dict, step: np.ndarray, seqs: Any, index: np.ndarray) -> np.ndarray:
    """The pages that hold blocks `index` of sequences: by their tables, or in the ring of their slots."""
    st = c["st"]
    if c["ring"]:
        return step[st.seqs + seqs * st.SEQ_WORDS + st.SLOT] * c["ring"] + index % c["ring"]
    return step[st.tables + seqs * st.max_blocks + index]


TWINS: dict[str, Twin] = {
    "rope_store": rope_store,
    "attention": attention,
    "attention_tiles": attention_tiles,
    "attention_merge": attention_merge,
}
