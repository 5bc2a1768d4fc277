"""Formats whose blocks are 256 weights: 8 chunks under one f16 scale and small scales of their own."""

import numpy as np

from realm_web.dequant.bits import (
    Codec,
    Parts,
    as_bytes,
    crumbs,
    half,
    half_of,
    lanes,
    nibbles,
    pack_crumbs,
    pack_lanes,
    pack_nibbles,
    pack_pairs,
    padded_half,
    pairs,
)
from realm_web.dequant.blocks import codebook, with_fifth_bit
from realm_web.quants import CHUNK


def _planes(packed: np.ndarray) -> np.ndarray:
    """Two-bit codes of a block: 32 bytes for each half, chunk c of the half at bits 2c. `(n_chunks, 32)`."""
    shift = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 4, 1)
    return (packed.reshape(-1, 1, 32) >> shift & np.uint8(3)).reshape(-1, CHUNK)


# -- Q4_K, Q5_K: d (f16), dmin (f16), eight 6-bit scales and minima, [fifth bits,] nibbles ----------
# Chunks 2j and 2j + 1 of a block are the low and the high nibbles of the same 32 bytes.


def _k_scales(header: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima of the 8 chunks, below 64, of a 16-byte header: `(n_blocks, 8)` each.

    Of the 12 bytes after d and dmin, byte j < 4 holds scale j in its low six bits and byte 4 + j minimum j;
    byte 8 + j holds the low nibbles of scale 4 + j and minimum 4 + j, whose high two bits are the top bits of
    bytes j and 4 + j.
    """
    low, mid, high = header[:, 4:8], header[:, 8:12], header[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=1)
    return scale, np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=1)


def _k_header(header: np.ndarray) -> np.ndarray:
    """The header as it is packed: for chunk j nibble j of three words: low bits, low bits, high pairs."""
    scale, minimum = _k_scales(header)
    rows = (scale & 15, minimum & 15, (scale >> 4) | (minimum >> 4 << 2))
    return np.concatenate([header[:, :4], *(row[:, ::2] | (row[:, 1::2] << 4) for row in rows)], axis=1)


def _packed_scales(header: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `_k_scales` gives, of a packed header."""
    low, mid, high = (
        np.stack([header[:, at : at + 4] & 15, header[:, at : at + 4] >> 4], axis=2).reshape(-1, 8)
        for at in (4, 8, 12)
    )
    return low | ((high & 3) << 4), mid | (high >> 2 << 4)


def _k_codes(packed: np.ndarray) -> np.ndarray:
    """The 128 bytes `(n_blocks, 128)` to codes `(n_chunks, 32)`."""
    return nibbles(packed.reshape(-1, 32)).reshape(-1, CHUNK)


def _k_fifth_bits(qh: np.ndarray) -> np.ndarray:
    """Q5_K's 32 bytes `(n_blocks, 32)`, bit c of byte i for weight i of chunk c, to `(n_chunks, 32)`."""
    bits = np.unpackbits(np.ascontiguousarray(qh), axis=1, bitorder="little").reshape(-1, 32, 8)
    return bits.transpose(0, 2, 1).reshape(-1, CHUNK)


def _k_weights(
    codes: np.ndarray, header: np.ndarray, scales: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:  # fmt: skip
    d, dmin = half(header[:, :2]), half(header[:, 2:4])
    scale, minimum = (v.astype(np.float32) for v in scales)
    return (d * scale).reshape(-1, 1) * codes.astype(np.float32) - (dmin * minimum).reshape(-1, 1)


def _q4_k_weights(blocks: np.ndarray) -> np.ndarray:
    return _k_weights(_k_codes(blocks[:, 16:]), blocks[:, :16], _k_scales(blocks[:, :16]))


def _q5_k_weights(blocks: np.ndarray) -> np.ndarray:
    codes = _k_codes(blocks[:, 48:]) | (_k_fifth_bits(blocks[:, 16:48]) << np.uint8(4))
    return _k_weights(codes, blocks[:, :16], _k_scales(blocks[:, :16]))


def _q4_k_repack(blocks: np.ndarray) -> Parts:
    return {"h": _k_header(blocks[:, :16]), "q": pack_nibbles(_k_codes(blocks[:, 16:]))}


def _q5_k_repack(blocks: np.ndarray) -> Parts:
    return {
        "h": _k_header(blocks[:, :16]),
        "q": pack_nibbles(_k_codes(blocks[:, 48:])),
        "b": pack_lanes(_k_fifth_bits(blocks[:, 16:48])),
    }


def _q4_k_unpack(parts: Parts) -> np.ndarray:
    header = as_bytes(parts["h"], 16)
    return _k_weights(nibbles(as_bytes(parts["q"], 16)), header, _packed_scales(header))


def _q5_k_unpack(parts: Parts) -> np.ndarray:
    header = as_bytes(parts["h"], 16)
    codes = with_fifth_bit(nibbles(as_bytes(parts["q"], 16)), lanes(parts["b"]))
    return _k_weights(codes, header, _packed_scales(header))


# -- Q6_K: low nibbles (128 bytes), high bit pairs (64), int8 scales (16), d (f16) ------------------
# Each half of a block is four chunks: 64 bytes of nibbles (chunks 0 and 1 low, 2 and 3 high) and 32 bytes
# of pairs (chunk c at bits 2c).


def _q6_k_low(blocks: np.ndarray) -> np.ndarray:
    """`(n_chunks, 32)`, codes below 16."""
    return nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, CHUNK)


def _q6_k_value(low: np.ndarray, high: np.ndarray, d: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes `(n_chunks, 32)`, d `(n_chunks, 1)`, int8 scales `(n_chunks, 2)` to weights `(n_chunks, 32)`."""
    codes = (low | (high << np.uint8(4))).astype(np.float32) - np.float32(32)
    return ((d * scales.astype(np.float32))[:, :, None] * codes.reshape(-1, 2, 16)).reshape(-1, CHUNK)


def _q6_k_weights(blocks: np.ndarray) -> np.ndarray:
    d = np.repeat(half(blocks[:, 208:]), 8, axis=0)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).reshape(-1, 2)
    return _q6_k_value(_q6_k_low(blocks), _planes(blocks[:, 128:192]), d, scales)


def _q6_k_repack(blocks: np.ndarray) -> Parts:
    d = np.repeat(blocks[:, 208:], 8, axis=0)  # (n_chunks, 2)
    return {
        "q": pack_nibbles(_q6_k_low(blocks)),
        "b": pack_crumbs(_planes(blocks[:, 128:192])),
        "s": np.concatenate([blocks[:, 192:208].reshape(-1, 2), d], axis=1),
    }


def _q6_k_unpack(parts: Parts) -> np.ndarray:
    scales = as_bytes(parts["s"], 4)[:, :2].astype(np.int8)
    low, high = nibbles(as_bytes(parts["q"], 16)), crumbs(parts["b"])
    return _q6_k_value(low, high, half_of(parts["s"], high=True), scales)


# -- Q2_K: 16 bytes of scales (low) and minima (high nibble), pairs of bits (64), d, dmin (f16) -----


def _q2_k_repack(blocks: np.ndarray) -> Parts:
    scales = np.concatenate([blocks[:, 80:84], blocks[:, :16]], axis=1)
    return {"q": pack_crumbs(_planes(blocks[:, 16:80])), "s": scales}


def _q2_k_unpack(parts: Parts) -> np.ndarray:
    s = as_bytes(parts["s"], 20)
    scale = half(s[:, :2]) * (s[:, 4:] & 15).astype(np.float32)
    minimum = half(s[:, 2:4]) * (s[:, 4:] >> 4).astype(np.float32)
    codes = crumbs(parts["q"]).astype(np.float32).reshape(-1, 16)
    return scale.reshape(-1, 1) * codes - minimum.reshape(-1, 1)


# -- Q3_K: third bits (32), pairs of bits (64), sixteen 6-bit scales (12), d (f16) ------------------


def _q3_k_scales(packed: np.ndarray) -> np.ndarray:
    """Bytes `(n_blocks, 12)` to scales + 32, `(n_blocks, 16)`.

    Bytes 0-7 hold the low nibbles of scales 0-7 and, in their high nibbles, those of scales 8-15; byte 8 + i
    the high pairs of scales i, i + 4, i + 8 and i + 12.
    """
    high = packed[:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 4, 1) & np.uint8(3)
    return nibbles(packed[:, :8]) | (high.reshape(-1, 16) << np.uint8(4))


def _q3_k_repack(blocks: np.ndarray) -> Parts:
    d, scales = padded_half(blocks[:, 108:]), _q3_k_scales(blocks[:, 96:108])
    return {
        "q": pack_crumbs(_planes(blocks[:, 32:96])),
        "b": pack_lanes(_k_fifth_bits(blocks[:, :32])),
        "s": np.concatenate([d, scales], axis=1),
    }


def _q3_k_unpack(parts: Parts) -> np.ndarray:
    s = as_bytes(parts["s"], 20)
    scale = half(s[:, :2]) * (s[:, 4:].astype(np.float32) - 32)
    codes = (crumbs(parts["q"]) | (lanes(parts["b"]) << 2)).astype(np.float32) - 4
    return scale.reshape(-1, 1) * codes.reshape(-1, 16)


# -- IQ4_XS: d (f16), high pairs (2 bytes) and low nibbles (4) of eight 6-bit scales, nibbles -------


def _iq4_xs_repack(blocks: np.ndarray) -> Parts:
    return {"h": blocks[:, :8], "q": pack_pairs(nibbles(blocks[:, 8:].reshape(-1, 16)))}


def _iq4_xs_unpack(parts: Parts) -> np.ndarray:
    h = as_bytes(parts["h"], 8)
    high = h[:, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
    low = np.stack([h[:, 4:] & 15, h[:, 4:] >> 4], axis=2)
    scales = (low.reshape(-1, 8) | (high.reshape(-1, 8) << np.uint8(4))).astype(np.float32) - 32
    return (half(h[:, :2]) * scales).reshape(-1, 1) * codebook("iq4")[pairs(as_bytes(parts["q"], 16))]


# -- TQ1_0: 5 base-3 digits to a byte; TQ2_0: pairs of bits; d (f16) at the end ---------------------


def _trits(packed: np.ndarray, n: int) -> np.ndarray:
    """The n leading digits of each byte, all first digits before all second ones: `(n_blocks, n * bytes)`.

    A byte is a fraction of 256: times 3, its whole part is the first digit.
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:n].reshape(1, n, 1)
    left = (packed[:, None, :] * powers).astype(np.uint16)  # modulo 256
    return (left * np.uint16(3) >> np.uint16(8)).astype(np.uint8).reshape(-1, n * packed.shape[1])


def _tq1_0_repack(blocks: np.ndarray) -> Parts:
    runs = [_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)]
    return {"q": pack_crumbs(np.concatenate(runs, axis=1)), "s": padded_half(blocks[:, 52:])}


def _tq2_0_repack(blocks: np.ndarray) -> Parts:
    return {"q": pack_crumbs(_planes(blocks[:, :64])), "s": padded_half(blocks[:, 64:])}


def _tq_unpack(parts: Parts) -> np.ndarray:
    codes = crumbs(parts["q"]).astype(np.float32) - 1
    return half_of(parts["s"], high=False) * codes.reshape(-1, 256)


CODECS: dict[str, Codec] = {
    "Q2_K": Codec(_q2_k_repack, _q2_k_unpack),
    "Q3_K": Codec(_q3_k_repack, _q3_k_unpack),
    "Q4_K": Codec(_q4_k_repack, _q4_k_unpack, _q4_k_weights),
    "Q5_K": Codec(_q5_k_repack, _q5_k_unpack, _q5_k_weights),
    "Q6_K": Codec(_q6_k_repack, _q6_k_unpack, _q6_k_weights),
    "IQ4_XS": Codec(_iq4_xs_repack, _iq4_xs_unpack),
    "TQ1_0": Codec(_tq1_0_repack, _tq_unpack),
    "TQ2_0": Codec(_tq2_0_repack, _tq_unpack),
}
