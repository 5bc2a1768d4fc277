"""Bytes and bits of blocks and of the packed layout, as numpy arrays."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Parts = dict[str, np.ndarray]


class Codec(NamedTuple):
    """The functions of one format; `unpack` and `dequantize` may return any shape of the right size.

    Without `dequantize`, blocks are repacked and unpacked.
    """

    repack: Callable[[np.ndarray], Parts]
    unpack: Callable[[Parts], np.ndarray]
    dequantize: Callable[[np.ndarray], np.ndarray] | None = None


def words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint32)


def as_bytes(words: np.ndarray, per_row: int) -> np.ndarray:
    return words.view(np.uint8).reshape(-1, per_row)


def half(two_bytes: np.ndarray) -> np.ndarray:
    """uint8 `(n, 2)` to float32 `(n, 1)`."""
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def half_of(words: np.ndarray, *, high: bool) -> np.ndarray:
    """One f16 of each word to float32 `(n, 1)`."""
    bits = (words >> np.uint32(16)) if high else words
    return bits.astype(np.uint16).view(np.float16).astype(np.float32).reshape(-1, 1)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Bytes `(n, m)` to their low nibbles followed by their high nibbles, `(n, 2 * m)`."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes below 16, `(n_chunks, 32)`, to bytes `(n_chunks, 16)`: weight i low, weight i + 16 high."""
    return codes[:, :16] | (codes[:, 16:] << np.uint8(4))


def pack_pairs(codes: np.ndarray) -> np.ndarray:
    """Codes below 16, `(n_chunks, 32)`, to bytes `(n_chunks, 16)`: two neighbours each, the first low."""
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def pairs(packed: np.ndarray) -> np.ndarray:
    """What `pack_pairs` packed, `(n_chunks, 16)`, to codes `(n_chunks, 32)`."""
    return np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=2).reshape(len(packed), 32)


def bits_of(words: np.ndarray) -> np.ndarray:
    """Words `(n,)` to bits uint8 `(n, 32)`, lowest first."""
    return np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little")


def crumbs(packed: np.ndarray) -> np.ndarray:
    """Words to codes below 4, uint8 `(n_chunks, 32)`: weight 16w + 4k + b at bit 2k of byte b of word w."""
    shift = np.arange(0, 8, 2, dtype=np.uint8).reshape(1, 1, 4, 1)
    return (packed.view(np.uint8).reshape(-1, 2, 1, 4) >> shift & np.uint8(3)).reshape(-1, 32)


def pack_crumbs(codes: np.ndarray) -> np.ndarray:
    """Codes below 4, `(n_chunks, 32)`, to bytes `(n_chunks, 2, 4)`."""
    c = codes.reshape(-1, 2, 4, 4)
    return c[:, :, 0] | (c[:, :, 1] << 2) | (c[:, :, 2] << 4) | (c[:, :, 3] << 6)


def lanes(packed: np.ndarray) -> np.ndarray:
    """Words to bits, uint8 `(n_chunks, 32)`: weight 4i + b at bit i of byte b."""
    shift = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    return (np.ascontiguousarray(packed).view(np.uint8).reshape(-1, 1, 4) >> shift & np.uint8(1)).reshape(
        -1, 32
    )


def pack_lanes(bits: np.ndarray) -> np.ndarray:
    """Bits `(n_chunks, 32)` to bytes `(n_chunks, 4)`."""
    return np.packbits(bits.reshape(-1, 8, 4), axis=1, bitorder="little").reshape(-1, 4)


def padded_half(two_bytes: np.ndarray) -> np.ndarray:
    """An f16 `(n, 2)` followed by two zero bytes, `(n, 4)`."""
    return np.pad(two_bytes, ((0, 0), (0, 2)))
