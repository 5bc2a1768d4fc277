"""The numpy twins of the kernels for products of many rows, as in `cpu_kernels.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

from realm_web.quants import activation_words
from realm_web.runtime.cpu_kernels import (
    ACTIVATIONS,
    NONE,
    Twin,
    Views,
    from_bytes,
    put_bytes,
    records_of,
    rms_factor,
    softcapped,
    to_bytes,
)

WEIGHTS_TIMES = np.float32(64)  # what matmul_units multiplies its weights with


def matmul(c: dict[str, Any], views: list[np.ndarray]) -> None:
    v, k = Views(views), c["k"]
    step = v.u32()
    m = _n_rows(c, step)
    x = v.f32(-1, k)[:m] if c["x_as"] == "f32" else from_bytes(v.u32(-1, activation_words(k))[:m], k)
    weight = v.weight(c["fmt"], _n_weights(c), k)
    if c["splits"] == 1:
        _store(c, v, weight.product(x))
    else:
        _store_shares(c, v, x, weight.rows(0, weight.n), c["bn"] // c["tn"])


def half_rows(c: dict[str, Any], views: list[np.ndarray]) -> None:
    v, st, k = Views(views), c["st"], c["k"]
    step, x = v.u32(), v.f32(-1, k)
    weight = v.f32(k) if c["norm"] else None
    y, scale = v.f16(k // 8, c["rows"], 8), v.f32()
    if c["gather"]:
        rows = records_of(step, st, st.LOGITS_ROW).astype(np.int64)
        to = np.flatnonzero(rows != NONE)
        x = x[rows[to]]
    else:
        to = np.arange(_n_rows(c, step))
        x = x[to]
    if weight is not None:
        x = x * rms_factor(x, c["eps"]) * weight
    _put_halves(y, scale, to, x)


def _put_halves(y: np.ndarray, scale: np.ndarray, to: np.ndarray, x: np.ndarray) -> None:
    """Rows x into rows `to` of y (k / 8, rows, 8) and scale (rows,)."""
    top = np.abs(x).max(axis=1).view(np.uint32) & 0x7F800000
    power = np.clip(top, 0x08000000, 0x7E000000).astype(np.uint32).view(np.float32)
    scale[to] = power / WEIGHTS_TIMES
    y[:, to] = _swapped(x / power[:, None]).reshape(len(to), -1, 8).transpose(1, 0, 2)


def matmul_units(c: dict[str, Any], views: list[np.ndarray]) -> None:
    """With the weights as they are: the kernel rounds them to float16."""
    v, k = Views(views), c["k"]
    step, x, scale = v.u32(), v.f16(k // 8, c["rows"], 8), v.f32()
    weight = v.weight(c["fmt"], _n_weights(c), k)
    m = _n_rows(c, step)
    x = WEIGHTS_TIMES * _swapped(x[:, :m].transpose(1, 0, 2).reshape(m, k).astype(np.float32))
    if c["splits"] == 1:
        _store(c, v, weight.product(x) * scale[:m, None])
    else:
        _store_shares(c, v, x, weight.rows(0, weight.n), 16)


def matmul_sum(c: dict[str, Any], views: list[np.ndarray]) -> None:
    v = Views(views)
    step, parts = v.u32(), v.f32(c["splits"], c["m_pad"], c["stride"])
    m = _n_rows(c, step)
    columns = _columns(c, c["group"])
    y = parts[:, :m].sum(axis=0)[:, columns]
    if c["scaled"]:
        y = y * v.f32()[:m, None]
    y = _store(c, v, y) if c["kept"] else _epilogue(c, v, y)
    factor, n = np.float32(1), c["n"]
    if c["norm"]:
        factor, y = rms_factor(y, c["eps"]), y * v.f32(n)
    if c["made"] == "bytes":
        put_bytes(v.u32(-1, activation_words(n)), slice(m), *to_bytes(y), factor)
    elif c["made"] == "halves":
        _put_halves(v.f16(n // 8, c["rows"], 8), v.f32(), np.arange(m), y * factor)


TWINS: dict[str, Twin] = {twin.__name__: twin for twin in (matmul, half_rows, matmul_units, matmul_sum)}


def _swapped(x: np.ndarray) -> np.ndarray:
    """Of every four values of a row the second and the third change places."""
    return x.reshape(len(x), -1, 4)[:, :, [0, 2, 1, 3]].reshape(x.shape)


def _n_rows(c: dict[str, Any], step: np.ndarray) -> int:
    return int(step[c["st"].N_SEQS if c.get("per_seq") else c["st"].N_ROWS])


def _n_weights(c: dict[str, Any]) -> int:
    return c["n"] * (2 if c["act"] else 1)


def _columns(c: dict[str, Any], group: int) -> np.ndarray:
    """Where the product with row i of the weights stands among the columns of the shares."""
    n = np.arange(c["n"])
    if not c["act"]:
        return n
    gates = n // group * 2 * group + n % group
    return np.concatenate([gates, gates + group])


def _store_shares(c: dict[str, Any], v: Views, x: np.ndarray, weight: np.ndarray, group: int) -> None:
    """The sums over each share of k; rows and columns are padded to whole tiles."""
    splits, share = c["splits"], c["k"] // c["splits"]
    n_pad = -(-_n_weights(c) // c["bn"]) * c["bn"]
    m_pad = -(-len(x) // c["bm"]) * c["bm"]
    out = v.f32(splits, m_pad, n_pad)
    for s in range(splits):
        here = slice(s * share, (s + 1) * share)
        out[s, : len(x), _columns(c, group)] = (x[:, here] @ weight[:, here].T).T


def _store(c: dict[str, Any], v: Views, y: np.ndarray) -> np.ndarray:
    """The epilogue of y (m, n) or (m, 2n), and its place in the output, which is returned."""
    y = _epilogue(c, v, y)
    out = v.f32(-1, c["out_stride"])[: len(y), c["out_offset"] : c["out_offset"] + c["n"]]
    out[...] = out + y if c["residual"] else y
    return out


def _epilogue(c: dict[str, Any], v: Views, y: np.ndarray) -> np.ndarray:
    n = c["n"]
    if c["act"]:
        y = ACTIVATIONS[c["act"]](y[:, :n], y[:, n:])
    if c["bias"]:
        y = y + v.f32()[c["out_offset"] : c["out_offset"] + n]
    y = y * np.float32(c["scale"])
    return softcapped(y, c["softcap"]) if c["softcap"] else y
