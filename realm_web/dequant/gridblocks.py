"""The IQ1, IQ2 and IQ3 formats: 256 weights a block, 4 or 8 at a time named by an index into a grid."""

from functools import cache

import numpy as np

from realm_web.dequant.bits import Codec, Parts, as_bytes, half, lanes, pack_lanes, padded_half
from realm_web.grids import GRIDS, rows

DELTA = np.float32(0.125)  # by which IQ1 weights are off the grid


@cache
def _table(name: str) -> np.ndarray:
    """Rows of the grid as float32."""
    return np.frombuffer(rows(name), np.int8).reshape(-1, GRIDS[name].length).astype(np.float32)


def _sign_lanes(packed: np.ndarray) -> np.ndarray:
    """Sign bytes `(n_chunks, 4)`, a bit for each weight, to bytes of lanes `(n_chunks, 4)`."""
    return pack_lanes(np.unpackbits(np.ascontiguousarray(packed), axis=1, bitorder="little"))


def _signs(words: np.ndarray) -> np.ndarray:
    """Words of lanes `(n_chunks,)` to 1 or -1, `(n_chunks, 4, 8)`."""
    return np.float32(1) - np.float32(2) * lanes(words).astype(np.float32).reshape(-1, 4, 8)


def _even(seven: np.ndarray) -> np.ndarray:
    """Seven sign bits each, `(n_chunks, 4)`, to eight: an even number is negative."""
    odd = np.unpackbits(seven.astype(np.uint8)[..., None], axis=2).sum(axis=2, dtype=np.uint8) & np.uint8(1)
    return seven.astype(np.uint8) | (odd << np.uint8(7))


def _nibble_pairs(packed: np.ndarray) -> np.ndarray:
    """Bytes `(n, m)` to float32 nibbles, low then high: `(n, m, 2)`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).astype(np.float32)


def _of_sevens(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes `(n_blocks, 32)`, 8 words of four times seven signs and a scale.

    Gives lanes of signs `(n_blocks, 32)` and nibbles of scales `(n_blocks, 4)`.
    """
    words = np.ascontiguousarray(packed).view(np.uint32)  # (n_blocks, 8)
    sevens = words.reshape(-1, 1) >> np.arange(0, 28, 7, dtype=np.uint32) & np.uint32(127)
    scales = (words >> np.uint32(28)).astype(np.uint8)
    return _sign_lanes(_even(sevens)).reshape(-1, 32), scales[:, ::2] | scales[:, 1::2] << 4


def _nibble_scale(packed: np.ndarray) -> np.ndarray:
    """Bytes `(n_blocks, 4)` to the scales of 8 chunks: float32 `(n_chunks, 1, 1)`."""
    return _nibble_pairs(packed).reshape(-1, 1, 1)


def _block_scale(s: np.ndarray) -> np.ndarray:
    """d at the head of the bytes `s` `(n_blocks, m)`, for each chunk: `(n_chunks, 1)`."""
    return np.repeat(half(s[:, :2]), 8, axis=0)


def _iq2_scale(d: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """d `(n_chunks, 1)` and a byte per chunk, each nibble of which is for two rows: `(n_chunks, 4, 1)`."""
    scale = d * (np.float32(0.5) + _nibble_pairs(scales.reshape(-1))) * np.float32(0.25)
    return np.repeat(scale, 2, axis=1)[..., None]


# -- IQ2_XXS: d, then per chunk 4 indices (bytes) and a word of signs and scale ---------------------


def _iq2_xxs_repack(blocks: np.ndarray) -> Parts:
    n = len(blocks)
    both = blocks[:, 2:].reshape(n, 8, 2, 4)
    signs, scales = _of_sevens(both[:, :, 1].reshape(n, 32))
    return {
        "q": np.stack([both[:, :, 0], signs.reshape(n, 8, 4)], axis=2),
        "s": np.concatenate([padded_half(blocks[:, :2]), scales], axis=1),
    }


def _iq2_xxs_unpack(parts: Parts) -> np.ndarray:
    index, s = as_bytes(parts["q"], 8)[:, :4], as_bytes(parts["s"], 8)
    signs = _signs(parts["q"].reshape(-1, 2)[:, 1])
    scale = _block_scale(s)[..., None] * (np.float32(0.5) + _nibble_scale(s[:, 4:])) * np.float32(0.25)
    return scale * _table("iq2xxs")[index] * signs


# -- IQ2_XS: d, then per 8 weights an index of 9 bits and 7 signs (64 bytes), scales (8) ------------


def _iq2_xs_repack(blocks: np.ndarray) -> Parts:
    n = len(blocks)
    both = np.ascontiguousarray(blocks[:, 2:66]).view(np.uint16).reshape(-1, 4)
    ninth = np.packbits((both >> 8 & 1).astype(np.uint8).reshape(n, 32), axis=1, bitorder="little")
    return {
        "q": np.concatenate([both.astype(np.uint8), _sign_lanes(_even(both >> 9))], axis=1),
        "s": np.concatenate([padded_half(blocks[:, :2]), ninth, blocks[:, 66:]], axis=1),
    }


def _iq2_xs_unpack(parts: Parts) -> np.ndarray:
    q, s = as_bytes(parts["q"], 8), as_bytes(parts["s"], 16)
    ninth = np.unpackbits(np.ascontiguousarray(s[:, 4:8]), axis=1, bitorder="little").reshape(-1, 4)
    index = q[:, :4] | ninth.astype(np.uint16) << np.uint16(8)
    scale = _iq2_scale(_block_scale(s), s[:, 8:])
    return scale * _table("iq2xs")[index] * _signs(parts["q"].reshape(-1, 2)[:, 1])


# -- IQ2_S: d, low bytes of indices (32), signs (32), high pairs of indices (8), scales (8) ---------


def _iq2_s_repack(blocks: np.ndarray) -> Parts:
    n = len(blocks)
    index, signs = (blocks[:, at : at + 32].reshape(n, 8, 4) for at in (2, 34))
    of_chunks = np.stack([blocks[:, 66:74], blocks[:, 74:]], axis=2).reshape(n, 16)
    return {
        "q": np.concatenate([index, _sign_lanes(signs.reshape(-1, 4)).reshape(n, 8, 4)], axis=2),
        "s": np.concatenate([padded_half(blocks[:, :2]), of_chunks], axis=1),
    }


def _iq2_s_unpack(parts: Parts) -> np.ndarray:
    q, s = as_bytes(parts["q"], 8), as_bytes(parts["s"], 20)
    of_chunks = s[:, 4:].reshape(-1, 2)
    high = of_chunks[:, :1] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
    index = q[:, :4] | high.astype(np.uint16) << np.uint16(8)
    return (
        _iq2_scale(_block_scale(s), of_chunks[:, 1])
        * _table("iq2s")[index]
        * _signs(parts["q"].reshape(-1, 2)[:, 1])
    )


# -- IQ3_XXS: d, indices (64 bytes), per chunk a word of signs and scale ----------------------------


def _iq3_xxs_repack(blocks: np.ndarray) -> Parts:
    signs, scales = _of_sevens(blocks[:, 66:])
    return {
        "q": blocks[:, 2:66],
        "s": np.concatenate([padded_half(blocks[:, :2]), scales, signs], axis=1),
    }


def _iq3_xxs_unpack(parts: Parts) -> np.ndarray:
    index, s = as_bytes(parts["q"], 8), as_bytes(parts["s"], 40)
    scale = _block_scale(s)[..., None] * (np.float32(0.5) + _nibble_scale(s[:, 4:8])) * np.float32(0.5)
    weights = _table("iq3xxs")[index].reshape(-1, 4, 8)
    return scale * weights * _signs(parts["s"].reshape(-1, 10)[:, 2:].reshape(-1))


# -- IQ3_S: d, low bytes of indices (64), their high bits (8), signs (32), scales (4) ---------------


def _iq3_s_repack(blocks: np.ndarray) -> Parts:
    signs = _sign_lanes(blocks[:, 74:106].reshape(-1, 4)).reshape(-1, 32)
    order = (padded_half(blocks[:, :2]), blocks[:, 106:], blocks[:, 66:74], signs)
    return {"q": blocks[:, 2:66], "s": np.concatenate(order, axis=1)}


def _iq3_s_unpack(parts: Parts) -> np.ndarray:
    s = as_bytes(parts["s"], 48)
    high = np.unpackbits(s[:, 8:16].reshape(-1, 1), axis=1, bitorder="little")
    index = as_bytes(parts["q"], 8) | high.astype(np.uint16) << np.uint16(8)
    scale = half(s[:, :2]) * (1 + 2 * _nibble_pairs(s[:, 4:8]).reshape(-1, 8))
    return (
        scale.reshape(-1, 1, 1)
        * _table("iq3s")[index].reshape(-1, 4, 8)
        * _signs(parts["s"].reshape(-1, 12)[:, 4:].reshape(-1))
    )


# -- IQ1_S: d, low bytes of indices (32), per chunk 16 bits ------------------------------------------


def _iq1_pack(index: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of 11 bits `(n_chunks, 4)` and four other bits `(n_chunks,)` to a word and a half per chunk."""
    i = index.astype(np.uint32)
    word = i[:, 0] | i[:, 1] << np.uint32(11) | (i[:, 2] & np.uint32(1023)) << np.uint32(22)
    half = i[:, 2] >> np.uint32(10) | i[:, 3] << np.uint32(1) | rest.astype(np.uint32) << np.uint32(12)
    return word, half.astype(np.uint16)


def _iq1_index(words: np.ndarray, halves: np.ndarray) -> np.ndarray:
    """The indices that `_iq1_pack` packed, `(n_chunks, 4)`."""
    low = words[:, None] >> np.array([0, 11, 22], np.uint32)
    low[:, 2] |= (halves.astype(np.uint32) & np.uint32(1)) << np.uint32(10)
    last = halves.astype(np.uint32)[:, None] >> np.uint32(1)
    return np.concatenate([low, last], axis=1) & np.uint32(2047)


def _iq1_weights(index: np.ndarray, up: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rows `(n_chunks, 4)`, whether delta is added to them, scales `(n_chunks, 4 or 1)`."""
    delta = np.where(up, DELTA, -DELTA)[..., None]
    return scale[..., None] * (_table("iq1")[index] + delta)


def _iq1_s_repack(blocks: np.ndarray) -> Parts:
    n = len(blocks)
    h = np.ascontiguousarray(blocks[:, 34:]).view(np.uint16).reshape(-1, 1)
    high = h >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
    index = blocks[:, 2:34].reshape(-1, 4) | high << np.uint16(8)
    word, half = _iq1_pack(index, h[:, 0] >> np.uint16(12) ^ np.uint16(8))  # delta is down where ggml has a 1
    half_bytes = half.view(np.uint8).reshape(n, 16)
    return {"q": word, "s": np.concatenate([padded_half(blocks[:, :2]), half_bytes], axis=1)}


def _iq1_s_unpack(parts: Parts) -> np.ndarray:
    s = as_bytes(parts["s"], 20)
    of_chunks = np.ascontiguousarray(s[:, 4:]).view(np.uint16).reshape(-1)
    scale = _block_scale(s) * (2 * (of_chunks >> 12 & 7) + 1).astype(np.float32)[:, None]
    up = np.repeat(of_chunks[:, None] >= 0x8000, 4, axis=1)
    return _iq1_weights(_iq1_index(parts["q"], of_chunks), up, scale)


# -- IQ1_M: low bytes of indices (32), their high bits and signs of delta (16), scales and d (8) ----


def _iq1_m_repack(blocks: np.ndarray) -> Parts:
    n = len(blocks)
    rest = blocks[:, 32:48, None] >> np.array([0, 4], np.uint8) & np.uint8(15)
    rest = rest.reshape(-1, 4)  # a nibble per row
    index = blocks[:, :32].reshape(-1, 4) | (rest & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    word, half = _iq1_pack(index, (rest < 8) @ np.array([1, 2, 4, 8], np.uint16))
    halves = np.ascontiguousarray(blocks[:, 48:]).view(np.uint16)  # (n_blocks, 4)
    d = np.bitwise_or.reduce((halves >> np.uint16(12)) << np.arange(0, 16, 4, dtype=np.uint16), axis=1)
    scales = halves[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & np.uint16(7)
    scales = scales.reshape(n, 16)  # for 16 weights each
    high = np.packbits(scales >= 4, axis=1, bitorder="little")
    low = (scales & 3).astype(np.uint8).reshape(n, 4, 4)
    low = low[..., 0] | low[..., 1] << 2 | low[..., 2] << 4 | low[..., 3] << 6
    order = (d.view(np.uint8).reshape(n, 2), high, low, half.view(np.uint8).reshape(n, 16))
    return {"q": word, "s": np.concatenate(order, axis=1)}


def _iq1_m_unpack(parts: Parts) -> np.ndarray:
    s = as_bytes(parts["s"], 24)
    of_chunks = np.ascontiguousarray(s[:, 8:]).view(np.uint16).reshape(-1)
    high = np.unpackbits(np.ascontiguousarray(s[:, 2:4]), axis=1, bitorder="little")  # (n_blocks, 16)
    low = (s[:, 4:8, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)).reshape(-1, 16)
    scale = half(s[:, :2]) * (2 * (low | high << np.uint8(2)) + 1).astype(np.float32)
    scale = np.repeat(scale.reshape(-1, 2), 2, axis=1)  # of 16 weights, so of two rows
    up = of_chunks[:, None] >> np.arange(12, 16, dtype=np.uint16) & np.uint16(1)
    return _iq1_weights(_iq1_index(parts["q"], of_chunks), up != 0, scale)


CODECS: dict[str, Codec] = {
    "IQ2_XXS": Codec(_iq2_xxs_repack, _iq2_xxs_unpack),
    "IQ2_XS": Codec(_iq2_xs_repack, _iq2_xs_unpack),
    "IQ2_S": Codec(_iq2_s_repack, _iq2_s_unpack),
    "IQ3_XXS": Codec(_iq3_xxs_repack, _iq3_xxs_unpack),
    "IQ3_S": Codec(_iq3_s_repack, _iq3_s_unpack),
    "IQ1_S": Codec(_iq1_s_repack, _iq1_s_unpack),
    "IQ1_M": Codec(_iq1_m_repack, _iq1_m_unpack),
}
