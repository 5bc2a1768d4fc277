"""Floats, and formats whose blocks are at most 128 weights under one scale (NVFP4: one for 16 weights)."""

from collections.abc import Callable

import numpy as np

from realm_web.dequant.bits import (
    Codec,
    Parts,
    as_bytes,
    bits_of,
    crumbs,
    half,
    half_of,
    lanes,
    nibbles,
    pack_crumbs,
    pack_lanes,
    pack_pairs,
    padded_half,
    pairs,
    words,
)
from realm_web.grids import CODEBOOKS
from realm_web.quants import CHUNK

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
    return lambda parts: weights(as_bytes(parts["q"], nbytes))


# -- Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: blocks of one chunk ----------------------------------------------


def _scaled(codes: np.ndarray, d: np.ndarray, centre: int) -> np.ndarray:
    """d * (q - centre), codes `(n, 32)`, d `(n, 1)`."""
    return d * (codes.astype(np.float32) - np.float32(centre))


def _shifted(codes: np.ndarray, d: np.ndarray, m: np.ndarray) -> np.ndarray:
    """d * q + m."""
    return d * codes.astype(np.float32) + m


def with_fifth_bit(low: np.ndarray, bits: np.ndarray) -> np.ndarray:
    return low | (bits << np.uint8(4))


def _q4_0_weights(blocks: np.ndarray) -> np.ndarray:
    return _scaled(nibbles(blocks[:, 2:]), half(blocks[:, :2]), 8)


def _q4_1_weights(blocks: np.ndarray) -> np.ndarray:
    return _shifted(nibbles(blocks[:, 4:]), half(blocks[:, :2]), half(blocks[:, 2:4]))


def _q5_0_weights(blocks: np.ndarray) -> np.ndarray:
    codes = with_fifth_bit(nibbles(blocks[:, 6:]), bits_of(words(blocks[:, 2:6])))
    return _scaled(codes, half(blocks[:, :2]), 16)


def _q5_1_weights(blocks: np.ndarray) -> np.ndarray:
    codes = with_fifth_bit(nibbles(blocks[:, 8:]), bits_of(words(blocks[:, 4:8])))
    return _shifted(codes, half(blocks[:, :2]), half(blocks[:, 2:4]))


def _q8_0_weights(blocks: np.ndarray) -> np.ndarray:
    return _scaled(np.ascontiguousarray(blocks[:, 2:]).view(np.int8), half(blocks[:, :2]), 0)


def _q4_0_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 2:], "s": padded_half(blocks[:, :2])}


def _q4_1_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 4:], "s": blocks[:, :4]}


def _q5_0_repack(blocks: np.ndarray) -> Parts:
    bits = pack_lanes(bits_of(words(blocks[:, 2:6])))
    return {"q": blocks[:, 6:], "s": padded_half(blocks[:, :2]), "h": bits}


def _q5_1_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 8:], "s": blocks[:, :4], "h": pack_lanes(bits_of(words(blocks[:, 4:8])))}


def _q8_0_repack(blocks: np.ndarray) -> Parts:
    return {"q": blocks[:, 2:], "s": padded_half(blocks[:, :2])}


def _q4_0_unpack(parts: Parts) -> np.ndarray:
    return _scaled(nibbles(as_bytes(parts["q"], 16)), half_of(parts["s"], high=False), 8)


def _q4_1_unpack(parts: Parts) -> np.ndarray:
    d, m = half_of(parts["s"], high=False), half_of(parts["s"], high=True)
    return _shifted(nibbles(as_bytes(parts["q"], 16)), d, m)


def _q5_0_unpack(parts: Parts) -> np.ndarray:
    codes = with_fifth_bit(nibbles(as_bytes(parts["q"], 16)), lanes(parts["h"]))
    return _scaled(codes, half_of(parts["s"], high=False), 16)


def _q5_1_unpack(parts: Parts) -> np.ndarray:
    codes = with_fifth_bit(nibbles(as_bytes(parts["q"], 16)), lanes(parts["h"]))
    return _shifted(codes, half_of(parts["s"], high=False), half_of(parts["s"], high=True))


def _q8_0_unpack(parts: Parts) -> np.ndarray:
    return _scaled(as_bytes(parts["q"], 32).view(np.int8), half_of(parts["s"], high=False), 0)


# -- IQ4_NL, MXFP4, NVFP4: nibbles are indices into a codebook --------------------------------------


def codebook(name: str) -> np.ndarray:
    return np.array(CODEBOOKS[name], np.float32)


def _iq4_nl_repack(blocks: np.ndarray) -> Parts:
    return {"q": pack_pairs(nibbles(blocks[:, 2:])), "s": padded_half(blocks[:, :2])}


def _iq4_nl_unpack(parts: Parts) -> np.ndarray:
    return half_of(parts["s"], high=False) * codebook("iq4")[pairs(as_bytes(parts["q"], 16))]


def _mxfp4_repack(blocks: np.ndarray) -> Parts:
    e = blocks[:, 0].astype(np.uint32)  # the scale is 2^(e - 127), halved because the codebook is doubled
    scale = np.where(e < 2, np.uint32(0x00200000) << e, (e - np.uint32(1)) << np.uint32(23))
    return {"q": pack_pairs(nibbles(blocks[:, 1:])), "s": scale}


def _mxfp4_unpack(parts: Parts) -> np.ndarray:
    return parts["s"].view(np.float32).reshape(-1, 1) * codebook("fp4")[pairs(as_bytes(parts["q"], 16))]


def _ue4m3_halved(codes: np.ndarray) -> np.ndarray:
    """Unsigned E4M3 (the top bit means nothing, 0x7f is zero) times a half, exact as f16."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    normal = np.ldexp(1 + mantissa / 8, exponent - 8)
    value = np.where(exponent == 0, np.ldexp(mantissa, -10), normal)
    return np.where(codes == 0x7F, 0, value).astype(np.float16)


def _nvfp4_repack(blocks: np.ndarray) -> Parts:
    """Of 16 weights ggml keeps weight i in the low and weight i + 8 in the high nibble of byte i."""
    codes = nibbles(blocks[:, 4:].reshape(-1, 8)).reshape(-1, CHUNK)
    return {"q": pack_pairs(codes), "s": _ue4m3_halved(blocks[:, :4])}


def _nvfp4_unpack(parts: Parts) -> np.ndarray:
    scales = parts["s"].view(np.float16).astype(np.float32).reshape(-1, 2, 1)
    return scales * codebook("fp4")[pairs(as_bytes(parts["q"], 16))].reshape(-1, 2, 16)


# -- Q1_0: 128 signs; Q2_0: 64 pairs of bits, in order ----------------------------------------------


def _q1_0_repack(blocks: np.ndarray) -> Parts:
    signs = np.unpackbits(blocks[:, 2:].reshape(-1, 4), axis=1, bitorder="little")
    return {"q": pack_lanes(signs), "s": padded_half(blocks[:, :2])}


def _q1_0_unpack(parts: Parts) -> np.ndarray:
    signs = lanes(parts["q"]).astype(np.float32) * 2 - 1
    return half_of(parts["s"], high=False) * signs.reshape(-1, 128)


def _q2_0_repack(blocks: np.ndarray) -> Parts:
    codes = blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
    return {"q": pack_crumbs(codes), "s": padded_half(blocks[:, :2])}


def _q2_0_unpack(parts: Parts) -> np.ndarray:
    return _scaled(crumbs(parts["q"]).reshape(-1, 64), half_of(parts["s"], high=False), 1)


CODECS: dict[str, Codec] = {
    "F32": Codec(_as_they_are, _float_unpack(_f32_weights, 4), _f32_weights),
    "F16": Codec(_as_they_are, _float_unpack(_f16_weights, 2), _f16_weights),
    "BF16": Codec(_as_they_are, _float_unpack(_bf16_weights, 2), _bf16_weights),
    "Q4_0": Codec(_q4_0_repack, _q4_0_unpack, _q4_0_weights),
    "Q4_1": Codec(_q4_1_repack, _q4_1_unpack, _q4_1_weights),
    "Q5_0": Codec(_q5_0_repack, _q5_0_unpack, _q5_0_weights),
    "Q5_1": Codec(_q5_1_repack, _q5_1_unpack, _q5_1_weights),
    "Q8_0": Codec(_q8_0_repack, _q8_0_unpack, _q8_0_weights),
    "IQ4_NL": Codec(_iq4_nl_repack, _iq4_nl_unpack),
    "MXFP4": Codec(_mxfp4_repack, _mxfp4_unpack),
    "NVFP4": Codec(_nvfp4_repack, _nvfp4_unpack),
    "Q1_0": Codec(_q1_0_repack, _q1_0_unpack),
    "Q2_0": Codec(_q2_0_repack, _q2_0_unpack),
}
