"""The numpy twin of every kernel in `shaders/`: same name, constants and order of tensors.

The oracle of the GPU kernels in tests, and what the CPU backend runs. A twin gets its constants and one uint8
array per binding, and writes where the kernel writes. It may read more than the kernel, never less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from realm_web import dequant
from realm_web.quants import CHUNK, FORMATS, activation_words

Twin = Callable[[dict[str, Any], list[np.ndarray]], None]
TWINS: dict[str, Twin] = {}
NONE = 0xFFFFFFFF
TILE_WEIGHTS = 1 << 18  # decoded at a time: 1 MiB of float32, which stays in the cache


def twin(function: Twin) -> Twin:
    TWINS[function.__name__] = function
    return function


class Matrix:
    """A packed weight (n, k): float32 is used as it is, others are decoded a tile of rows at a time."""

    def __init__(self, fmt: str, n: int, k: int, parts: dict[str, np.ndarray]):
        self.fmt, self.n, self.k, self._parts = fmt, n, k, parts

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop as float32; no copy for F32."""
        here = {
            name: words[len(words) // self.n * start : len(words) // self.n * stop]
            for name, words in self._parts.items()
        }
        weights = here["q"].view(np.float32) if self.fmt == "F32" else dequant.unpack(self.fmt, here)
        return weights.reshape(stop - start, self.k)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Single rows: (len(indices), k)."""
        return np.concatenate([self.rows(i, i + 1) for i in indices])

    def product(self, x: np.ndarray) -> np.ndarray:
        """x (m, k) times the transpose: (m, n)."""
        if self.fmt == "F32":
            return x @ self.rows(0, self.n).T
        if not len(x):  # decode nothing for nothing
            return np.empty((0, self.n), np.float32)
        tile = max(1, TILE_WEIGHTS // self.k)
        y = np.empty((len(x), self.n), np.float32)
        for start in range(0, self.n, tile):
            stop = min(start + tile, self.n)
            np.matmul(x, self.rows(start, stop).T, out=y[:, start:stop])
        return y


class Views:
    """The bindings of one call, taken in order and seen as typed arrays."""

    def __init__(self, views: list[np.ndarray]):
        self._next: Iterator[np.ndarray] = iter(views)

    def f32(self, *shape: int) -> np.ndarray:
        return self._typed(np.float32, shape)

    def u32(self, *shape: int) -> np.ndarray:
        return self._typed(np.uint32, shape)

    def f16(self, *shape: int) -> np.ndarray:
        return self._typed(np.float16, shape)

    def bytes(self) -> np.ndarray:
        return next(self._next)

    def weight(self, fmt: str, n: int, k: int) -> Matrix:
        """The packed weight (n, k)."""
        sizes = FORMATS[fmt].packed_nbytes(n * k)
        parts = {name: next(self._next)[:size].view(np.uint32) for name, size in sizes.items()}
        if FORMATS[fmt].grid:
            next(self._next)  # the table, which `dequant` has too
        return Matrix(fmt, n, k, parts)

    def _typed(self, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        data = next(self._next).view(dtype)
        if not shape or shape == (-1,):
            return data
        count = int(np.prod([d for d in shape if d != -1]))
        rows = len(data) // count if shape[0] == -1 else 1
        return data[: count * rows].reshape(shape)


@twin
def repack(c: dict, views: list[np.ndarray]) -> None:
    v = Views(views)
    raw, params = v.bytes(), v.u32()
    fmt = FORMATS[c["fmt"]]
    n_blocks = fmt.n_blocks(int(params[0]) * 32)
    blocks = raw[: n_blocks * fmt.block_bytes].reshape(n_blocks, fmt.block_bytes)
    if c.get("dense"):
        sources, sizes = [dequant.dequantize(fmt.name, blocks)], [4 * fmt.block_elements]
    else:
        sources = list(dequant.repack(fmt.name, blocks).values())
        sizes = [part.block_bytes for part in fmt.parts]
    for data, size in zip(sources, sizes, strict=True):
        source, out = np.ascontiguousarray(data).view(np.uint8).reshape(-1), v.bytes()
        for start, to, n in _runs(params):
            start, to, n = (fmt.n_blocks(chunks * 32) * size for chunks in (start, to, n))
            out[to : to + n] = source[start : start + n]


def _runs(params: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Chunks that stay together: where they begin in the source and in the destination, and how many."""
    n_chunks, first, start, run, every = (int(p) for p in params[:5])
    c = start
    while c < start + n_chunks:
        n = min(run - c % run, start + n_chunks - c)
        yield c - start, first + c // run * every + c % run, n
        c += n


@twin
def embed(c: dict, views: list[np.ndarray]) -> None:
    v, st = Views(views), c["st"]
    step, slots = v.u32(), v.u32()
    weight = v.weight(c["fmt"], c["n_shard_rows"], c["dim"])
    out = v.f32(-1, c["dim"])
    n = int(step[st.N_ROWS])
    tokens = step[st.tokens : st.tokens + n].astype(np.int64)
    seqs = step[st.row_seqs : st.row_seqs + n].astype(np.int64)
    slot = step[st.seqs + seqs * st.SEQ_WORDS + st.SLOT]
    tokens = np.where(tokens == NONE, slots[np.minimum(slot, len(slots) - 1)], tokens) - c["first_row"]
    here = np.flatnonzero((tokens >= 0) & (tokens < c["n_shard_rows"]))
    if len(here):
        out[here] = weight.take(tokens[here]) * np.float32(c["scale"])


@twin
def rmsnorm(c: dict, views: list[np.ndarray]) -> None:
    v, st, dim = Views(views), c["st"], c["dim"]
    step, x, weight = v.u32(), v.f32(-1, dim), v.f32(dim)
    out = v.u32(-1, activation_words(dim)) if c["ints"] else v.f32(-1, dim)
    if c["gather"]:
        rows = records_of(step, st, st.LOGITS_ROW).astype(np.int64)
        to = np.flatnonzero(rows != NONE)
        rows = rows[to]
    else:
        to = rows = np.arange(int(step[st.N_ROWS]))
    x = x[rows]
    if c["ints"]:
        put_bytes(out, to, *to_bytes(x * weight), rms_factor(x, c["eps"]))
        return
    normed = x * rms_factor(x, c["eps"]) * weight
    out[to] = out[to] + normed if c["residual"] else normed
    if c["then"]:
        weight, rows, x = v.f32(dim), v.u32(-1, activation_words(dim)), out[to]
        put_bytes(rows, to, *to_bytes(x * weight), rms_factor(x, c["eps"]))


@twin
def quantise(c: dict, views: list[np.ndarray]) -> None:
    v, st, k = Views(views), c["st"], c["k"]
    step, x, out = v.u32(), v.f32(-1, k), v.u32(-1, activation_words(k))
    n = int(step[st.N_SEQS if c["per_seq"] else st.N_ROWS]) * c["times"]
    put_bytes(out, slice(n), *to_bytes(x[:n]))


def rms_factor(x: np.ndarray, eps: float) -> np.ndarray:
    return 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True, dtype=np.float32) + np.float32(eps))


def to_bytes(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows x (m, k) as int8 (m, k / 32, 32), and d (m, k / 32): x is about d * byte."""
    chunks = x.reshape(len(x), x.shape[1] // CHUNK, CHUNK)
    top = np.abs(chunks).max(axis=2)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        per_d = np.where(top > np.float32(1e-30), np.float32(127) / top, np.float32(0))
        values = np.rint(chunks * per_d[..., None])
        return np.nan_to_num(values).astype(np.int8), top / np.float32(127)


def put_bytes(out: np.ndarray, rows: Any, q: np.ndarray, d: np.ndarray, factor: Any = 1) -> None:
    """Into rows of `out` (., activation_words) u32, the scales times `factor` (m, 1)."""
    m, chunks, _ = q.shape
    words = np.zeros((m, activation_words(chunks * CHUNK)), np.uint32)
    planes = np.ascontiguousarray(q.reshape(m, chunks, 2, 16).transpose(0, 2, 1, 3))
    words[:, : 8 * chunks] = planes.reshape(m, CHUNK * chunks).view(np.uint32)
    sums = q.reshape(m, chunks, 2, 16).sum(axis=3, dtype=np.int32).astype(np.float32)
    d = (d * factor).astype(np.float32)[..., None]  # (m, chunks, 1)
    scales = np.concatenate([d, d * sums.sum(axis=2, keepdims=True), d * sums], axis=2)
    words[:, 8 * chunks :] = scales.reshape(m, 4 * chunks).view(np.uint32)
    out[rows] = words


def from_bytes(words: np.ndarray, k: int) -> np.ndarray:
    """Rows (m, activation_words) u32 as float32 (m, k)."""
    m, chunks = len(words), k // CHUNK
    planes = np.ascontiguousarray(words[:, : 8 * chunks]).view(np.int8).reshape(m, 2, chunks, 16)
    d = np.ascontiguousarray(words[:, 8 * chunks :: 4]).view(np.float32)
    return (planes.transpose(0, 2, 1, 3).reshape(m, chunks, CHUNK) * d[..., None]).reshape(m, k)


def activations(c: dict, v: Views, rows: int) -> np.ndarray:
    """The first rows of x as a product takes them: (rows, k) float32, of 8 bits where the kernel has that."""
    k, kind = c["k"], c.get("x_as", "f32")
    if kind == "ints":
        return from_bytes(v.u32(-1, activation_words(k))[:rows], k)
    x = v.f32(-1, k)[:rows]
    if kind == "f32":
        return x
    q, d = to_bytes(x * v.f32(k) if kind == "norm" else x)
    d = d * rms_factor(x, c["eps"]) if kind == "norm" else d
    return (q * d[..., None]).reshape(rows, k)


@twin
def qk_norm(c: dict, views: list[np.ndarray]) -> None:
    v, st = Views(views), c["st"]
    step, qkv, weights = v.u32(), v.f32(-1, c["stride"]), (v.f32(c["len_q"]), v.f32(c["len_k"]))
    n = int(step[st.N_ROWS])
    start = 0
    for weight in weights:
        x = qkv[:n, start : start + len(weight)]
        scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(c["eps"]))
        x[...] = x * scale * weight
        start += len(weight)


@twin
def matvec(c: dict, views: list[np.ndarray]) -> None:
    v, st, n, k = Views(views), c["st"], c["n"], c["k"]
    step = v.u32()
    m = int(step[st.N_SEQS if c.get("per_seq") else st.N_ROWS])
    x = activations(c, v, m)
    if fmt2 := c.get("fmt2"):
        weights = v.weight(c["fmt"], c["n1"], k), v.weight(fmt2, n - c["n1"], k)
        y = np.concatenate([weight.product(x) for weight in weights], axis=1)
    else:
        y = v.weight(c["fmt"], n * (2 if c["act"] else 1), k).product(x)  # (m, n)
    if c["act"]:
        y = ACTIVATIONS[c["act"]](y[:, :n], y[:, n:])
    columns = slice(c["out_offset"], c["out_offset"] + n)
    if c["bias"]:
        y = y + v.f32()[columns]
    y = y * np.float32(c["scale"])
    if c["softcap"]:
        y = softcapped(y, c["softcap"])
    if c.get("out_as") == "ints":
        put_bytes(v.u32(-1, activation_words(n)), slice(m), *to_bytes(y))
        return
    out = v.f32(-1, c["out_stride"])[:m, columns]
    out[...] = out + y if c["residual"] else y


@twin
def gated(c: dict, views: list[np.ndarray]) -> None:
    v, st, dim = Views(views), c["st"], c["dim"]
    step, x, out = v.u32(), v.f32(-1, 2 * dim), v.f32(-1, dim)
    n = int(step[st.N_ROWS]) * c["times"]
    out[:n] = ACTIVATIONS[c["act"]](x[:n, :dim], x[:n, dim:])


@twin
def short_conv(c: dict, views: list[np.ndarray]) -> None:
    v, st, dim, l_cache = Views(views), c["st"], c["dim"], c["l_cache"]
    step, bcx, weight = v.u32(), v.f32(-1, 3, dim), v.f32(dim, l_cache)
    state, out = v.f32(), v.f32(-1, dim)
    n = int(step[st.N_ROWS])
    row_seqs = step[st.row_seqs : st.row_seqs + n]
    slots = records_of(step, st, st.SLOT).astype(np.int64)
    for seq in np.unique(row_seqs):
        rows = np.flatnonzero(row_seqs == seq)
        start = int(slots[seq]) * c["stride"]
        kept = state[start : start + (l_cache - 1) * dim].reshape(l_cache - 1, dim)
        before = kept if step[st.positions + rows[0]] else np.zeros_like(kept)
        values = np.concatenate([before, bcx[rows, 0] * bcx[rows, 2]])  # (l_cache - 1 + rows, dim)
        sums = sum(values[j : j + len(rows)] * weight[:, j] for j in range(l_cache))
        out[rows] = bcx[rows, 1] * sums
        kept[...] = values[len(rows) :]


@twin
def stream_read(c: dict, views: list[np.ndarray]) -> None:
    v = Views(views)
    words, out = v.u32()[: 4 * c["n"]], v.u32()
    if words.max(initial=0) == NONE and words.min() == NONE:  # reads all; the kernel writes by chance too
        out[0] = 0


def _silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, -0
        return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return (
        np.float32(0.5) * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)))
    )


def _swiglu_oai(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate, up = np.minimum(gate, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(np.float32(-1.702) * gate)) * (up + 1)


ACTIVATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "silu_mul": lambda gate, up: _silu(gate) * up,
    "gelu_mul": lambda gate, up: _gelu(gate) * up,
    "swiglu_oai": _swiglu_oai,
}


def softcapped(x: np.ndarray, cap: float) -> np.ndarray:
    return np.tanh(x / np.float32(cap)) * np.float32(cap)


def records_of(step: np.ndarray, st: Any, word: int) -> np.ndarray:
    """One word of every sequence record of this step: (n_seqs,)."""
    return step[st.seqs + word : st.seqs + int(step[st.N_SEQS]) * st.SEQ_WORDS : st.SEQ_WORDS]


def record_float(step: np.ndarray, st: Any, seq: int, word: int) -> np.float32:
    return step[st.seqs + seq * st.SEQ_WORDS + word :][:1].view(np.float32)[0]
