"""numpy oracles of the weight formats: decode ggml blocks, repack them, decode the packed layout.

The layouts are described in `quants.py`. `dequantize` is bit-equal to ggml's reference (`gguf.quants` in
Python), `repack` is the twin of the GPU's repack kernels, and `unpack(repack(raw))` equals `dequantize(raw)`
bit for bit. The CPU device decodes with these functions; nothing that a page loads imports this file.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from realm_web.quants import CHUNK, FORMATS, QuantFormat

Parts = dict[str, np.ndarray]


class _Codec(NamedTuple):
    """The three functions of one format; `dequantize` and `unpack` may return any shape of the right size."""

    dequantize: Callable[[np.ndarray], np.ndarray]
    repack: Callable[[np.ndarray], Parts]
    unpack: Callable[[Parts], np.ndarray]


def dequantize(format_name: str, raw: np.ndarray) -> np.ndarray:
    """ggml blocks uint8 `(n_blocks, block_bytes)` to weights float32 `(n_blocks, block_elements)`."""
    fmt = FORMATS[format_name]
    weights = _CODECS[format_name].dequantize(_blocks(fmt, raw))
    return weights.reshape(-1, fmt.block_elements)


def repack(format_name: str, raw: np.ndarray) -> Parts:
    """ggml blocks uint8 `(n_blocks, block_bytes)` to the packed layout: flat uint32 arrays by part name.

    The blocks must be whole chunks (a multiple of 32 blocks for F32, F16 and BF16); ValueError otherwise.
    """
    fmt = FORMATS[format_name]
    blocks = _blocks(fmt, raw)
    if blocks.shape[0] * fmt.block_elements % CHUNK:
        raise ValueError(f"{blocks.shape[0]} {fmt.name} blocks are not whole chunks of {CHUNK} weights")
    parts = _CODECS[format_name].repack(blocks)
    return {part.name: _words(parts[part.name]) for part in fmt.parts}


def unpack(format_name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The packed layout (as `repack` returns it) to weights float32 `(n_blocks, block_elements)`."""
    fmt = FORMATS[format_name]
    if set(parts) != {part.name for part in fmt.parts}:
        raise ValueError(f"{fmt.name} has parts {[part.name for part in fmt.parts]}, not {sorted(parts)}")
    weights = _CODECS[format_name].unpack({name: _words(words) for name, words in parts.items()})
    return weights.reshape(-1, fmt.block_elements)


def _blocks(fmt: QuantFormat, raw: np.ndarray) -> np.ndarray:
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] != fmt.block_bytes:
        raise ValueError(f"{fmt.name} blocks are uint8 (n, {fmt.block_bytes}), not {raw.dtype} {raw.shape}")
    return np.ascontiguousarray(raw)


# -- views of bytes and bits ------------------------------------------------------------------------


def _words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


def _bytes(words: np.ndarray, per_row: int) -> np.ndarray:
    return words.view(np.uint8).reshape(-1, per_row)


def _half(two_bytes: np.ndarray) -> np.ndarray:
    """uint8 `(n, 2)` to float32 `(n, 1)`."""
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def _half_of(words: np.ndarray, *, high: bool) -> np.ndarray:
    """One f16 of each word to float32 `(n, 1)`."""
    bits = (words >> np.uint32(16)) if high else words
    return bits.astype(np.uint16).view(np.float16).astype(np.float32).reshape(-1, 1)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Bytes `(n, m)` to their low nibbles followed by their high nibbles, `(n, 2 * m)`."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes below 16, `(n_chunks, 32)`, to bytes `(n_chunks, 16)`: weight i low, weight i + 16 high."""
    return codes[:, :16] | (codes[:, 16:] << np.uint8(4))


def _bits(words: np.ndarray) -> np.ndarray:
    """Words `(n,)` to bits uint8 `(n, 32)`, lowest first."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")


def _pack_bits(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=1, bitorder="little")


# -- F32, F16, BF16 ---------------------------------------------------------------------------------


def _f32_weights(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float32).copy()


def _f16_weights(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float16).astype(np.float32)


def _bf16_weights(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _as_they_are(blocks: np.ndarray) -> Parts:
    return {"q": blocks}


def _float_unpack(weights: Callable[[np.ndarray], np.ndarray], nbytes: int) -> Callable[[Parts], np.ndarray]:
    return lambda parts: weights(_bytes(parts["q"], nbytes))


# -- Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of one chunk ----------------------------------------------


def _scaled(codes: np.ndarray, d: np.ndarray, centre: int) -> np.ndarray:
    """d * (q - centre), codes `(n, 32)`, d `(n, 1)`."""
    return d * (codes.astype(np.float32) - np.float32(centre))


def _shifted(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """d * q + m."""
    return d * codes.astype(np.float32) + m


def _with_fifth_bit(low: np.ndarray, words: np.ndarray) -> np.ndarray:
    return low | (_bits(words) << np.uint8(4))


def _q4_0_weights(blocks: np.ndarray) -> np.ndarray:
    return _scaled(_nibbles(blocks[:, 2:]), _half(blocks[:, :2]), 8)


def _q4_1_weights(blocks: np.ndarray) -> np.ndarray:
    return _shifted(_nibbles(blocks[:, 4:]), _half(blocks[:, :2]), _half(blocks[:, 2:4]))


def _q5_0_weights(blocks: np.ndarray) -> np.ndarray:
    codes = _with_fifth_bit(_nibbles(blocks[:, 6:]), _words(blocks[:, 2:6]))
    return _scaled(codes, _half(blocks[:, :2]), 16)


def _q5_1_weights(blocks: np.ndarray) -> np.ndarray:
    codes = _with_fifth_bit(_nibbles(blocks[:, 8:]), _words(blocks[:, 4:8]))
    return _shifted(codes, _half(blocks[:, :2]), _half(blocks[:, 2:4]))


def _q8_0_weights(blocks: np.ndarray) -> np.ndarray:
    return _scaled(np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _half(blocks[:, :2]), 0)


def _padded_d(blocks: np.ndarray) -> np.ndarray:
    """The f16 d of each block followed by two zero bytes, `(n_blocks, 4)`."""
    return np.pad(blocks[:, :2], ((0, 0), (0, 2)))


def _q4_0_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 2:], "s": _padded_d(blocks)}


def _q4_1_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 4:], "s": blocks[:, :4]}


def _q5_0_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 6:], "s": _padded_d(blocks), "h": blocks[:, 2:6]}


def _q5_1_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 8:], "s": blocks[:, :4], "h": blocks[:, 4:8]}


def _q8_0_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 2:], "s": _padded_d(blocks)}


def _q4_0_unpack(parts: Parts) -> np.ndarray:
    return _scaled(_nibbles(_bytes(parts["q"], 16)), _half_of(parts["s"], high=False), 8)


def _q4_1_unpack(parts: Parts) -> np.ndarray:
    d, m = _half_of(parts["s"], high=False), _half_of(parts["s"], high=True)
    return _shifted(_nibbles(_bytes(parts["q"], 16)), d, m)


def _q5_0_unpack(parts: Parts) -> np.ndarray:
    codes = _with_fifth_bit(_nibbles(_bytes(parts["q"], 16)), parts["h"])
    return _scaled(codes, _half_of(parts["s"], high=False), 16)


def _q5_1_unpack(parts: Parts) -> np.ndarray:
    codes = _with_fifth_bit(_nibbles(_bytes(parts["q"], 16)), parts["h"])
    return _shifted(codes, _half_of(parts["s"], high=False), _half_of(parts["s"], high=True))


def _q8_0_unpack(parts: Parts) -> np.ndarray:
    return _scaled(_bytes(parts["q"], 32).view(np.int8), _half_of(parts["s"], high=False), 0)


# -- Q4_K, Q5_K: d (f16), dmin (f16), eight 6-bit scales and minima, [fifth bits,] nibbles ----------
# Chunks 2j and 2j + 1 of a block are the low and the high nibbles of the same 32 bytes.


def _k_scales(header: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 16-byte header `(n_blocks, 16)` to d * scale and dmin * minimum of each chunk, `(n_chunks, 1)`.

    Of the 12 bytes after d and dmin, byte j < 4 holds scale j in its low six bits and byte 4 + j minimum j;
    byte 8 + j holds the low nibbles of scale 4 + j and minimum 4 + j, whose high two bits are the top bits of
    bytes j and 4 + j.
    """
    low, mid, high = header[:, 4:8], header[:, 8:12], header[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1).astype(np.float32)
    minimum = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1).astype(np.float32)
    d, dmin = _half(header[:, :2]), _half(header[:, 2:4])
    return (d * scale).reshape(-1, 1), (dmin * minimum).reshape(-1, 1)


def _k_codes(nibbles: np.ndarray) -> np.ndarray:
    """The 128 bytes `(n_blocks, 128)` to codes `(n_chunks, 32)`."""
    return _nibbles(nibbles.reshape(-1, 32)).reshape(-1, CHUNK)


def _k_fifth_bits(qh: np.ndarray) -> np.ndarray:
    """Q5_K's 32 bytes `(n_blocks, 32)`, bit c of byte i for weight i of chunk c, to `(n_chunks, 32)`."""
    bits = np.unpackbits(np.ascontiguousarray(qh), axis=1, bitorder="little").reshape(-1, 32, 8)
    return bits.transpose(0, 2, 1).reshape(-1, CHUNK)


def _k_weights(codes: np.ndarray, header: np.ndarray) -> np.ndarray:
    scale, minimum = _k_scales(header)
    return scale * codes.astype(np.float32) - minimum  # (n_chunks, 32)


def _q4_k_weights(blocks: np.ndarray) -> np.ndarray:
    return _k_weights(_k_codes(blocks[:, 16:]), blocks[:, :16])


def _q5_k_weights(blocks: np.ndarray) -> np.ndarray:
    codes = _k_codes(blocks[:, 48:]) | (_k_fifth_bits(blocks[:, 16:48]) << np.uint8(4))
    return _k_weights(codes, blocks[:, :16])


def _q4_k_repack(blocks: np.ndarray) -> Parts:
    return {"h": blocks[:, :16], "q": _pack_nibbles(_k_codes(blocks[:, 16:]))}


def _q5_k_repack(blocks: np.ndarray) -> Parts:
    return {
        "h": blocks[:, :16],
        "q": _pack_nibbles(_k_codes(blocks[:, 48:])),
        "b": _pack_bits(_k_fifth_bits(blocks[:, 16:48])),
    }


def _q4_k_unpack(parts: Parts) -> np.ndarray:
    return _k_weights(_nibbles(_bytes(parts["q"], 16)), _bytes(parts["h"], 16))


def _q5_k_unpack(parts: Parts) -> np.ndarray:
    codes = _with_fifth_bit(_nibbles(_bytes(parts["q"], 16)), parts["b"])
    return _k_weights(codes, _bytes(parts["h"], 16))


# -- Q6_K: low nibbles (128 bytes), high bit pairs (64), int8 scales (16), d (f16) ------------------
# Each half of a block is four chunks: 64 bytes of nibbles (chunks 0 and 1 low, 2 and 3 high) and 32 bytes
# of pairs (chunk c at bits 2c).


def _q6_k_low(blocks: np.ndarray) -> np.ndarray:
    """`(n_chunks, 32)`, codes below 16."""
    return _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, CHUNK)


def _q6_k_high(blocks: np.ndarray) -> np.ndarray:
    """`(n_chunks, 32)`, codes below 4."""
    pairs = blocks[:, 128:192].reshape(-1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)
    return (pairs & np.uint8(3)).reshape(-1, CHUNK)


def _q6_k_value(low: np.ndarray, high: np.ndarray, d: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes `(n_chunks, 32)`, d `(n_chunks, 1)`, int8 scales `(n_chunks, 2)` to weights `(n_chunks, 32)`."""
    codes = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    return ((d * scales.astype(np.float32))[:, :, None] * codes.reshape(-1, 2, 16)).reshape(-1, CHUNK)


def _q6_k_weights(blocks: np.ndarray) -> np.ndarray:
    d = np.repeat(_half(blocks[:, 208:]), 8, axis=0)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).reshape(-1, 2)
    return _q6_k_value(_q6_k_low(blocks), _q6_k_high(blocks), d, scales)


def _q6_k_repack(blocks: np.ndarray) -> Parts:
    quads = _q6_k_high(blocks).reshape(-1, 8, 4)  # four pairs make a byte
    d = np.repeat(blocks[:, 208:], 8, axis=0)  # (n_chunks, 2)
    return {
        "q": _pack_nibbles(_q6_k_low(blocks)),
        "b": quads[..., 0] | (quads[..., 1] << 2) | (quads[..., 2] << 4) | (quads[..., 3] << 6),
        "s": np.concatenate([blocks[:, 192:208].reshape(-1, 2), d], axis=1),
    }


def _q6_k_unpack(parts: Parts) -> np.ndarray:
    pairs = parts["b"].reshape(-1, 1) >> np.arange(0, 32, 2, dtype=np.uint32)  # (2 * n_chunks, 16)
    high = (pairs & np.uint32(3)).astype(np.uint8).reshape(-1, CHUNK)
    scales = _bytes(parts["s"], 4)[:, :2].astype(np.int8)
    return _q6_k_value(_nibbles(_bytes(parts["q"], 16)), high, _half_of(parts["s"], high=True), scales)


_CODECS: dict[str, _Codec] = {
    "F32": _Codec(_f32_weights, _as_they_are, _float_unpack(_f32_weights, 4)),
    "F16": _Codec(_f16_weights, _as_they_are, _float_unpack(_f16_weights, 2)),
    "BF16": _Codec(_bf16_weights, _as_they_are, _float_unpack(_bf16_weights, 2)),
    "Q4_0": _Codec(_q4_0_weights, _q4_0_repack, _q4_0_unpack),
    "Q4_1": _Codec(_q4_1_weights, _q4_1_repack, _q4_1_unpack),
    "Q5_0": _Codec(_q5_0_weights, _q5_0_repack, _q5_0_unpack),
    "Q5_1": _Codec(_q5_1_weights, _q5_1_repack, _q5_1_unpack),
    "Q8_0": _Codec(_q8_0_weights, _q8_0_repack, _q8_0_unpack),
    "Q4_K": _Codec(_q4_k_weights, _q4_k_repack, _q4_k_unpack),
    "Q5_K": _Codec(_q5_k_weights, _q5_k_repack, _q5_k_unpack),
    "Q6_K": _Codec(_q6_k_weights, _q6_k_repack, _q6_k_unpack),
}
