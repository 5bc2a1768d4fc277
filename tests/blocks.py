"""Random ggml blocks of every quantised format, with a chosen size of the weights.

Any bytes are valid blocks; only the scales are set. `SCALES` says where they are and which value makes the
weights of random blocks about unit size.
"""

import numpy as np

from realm_web.quants import FORMATS

# byte offset of an f16, value for weights of standard deviation 1
SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1 / 4.6),),
    "Q4_1": ((0, 1 / 4.6), (2, -7.5 / 4.6)),
    "Q5_0": ((0, 1 / 9.2),),
    "Q5_1": ((0, 1 / 9.2), (2, -15.5 / 9.2)),
    "Q8_0": ((0, 1 / 74),),
    "Q2_K": ((80, 1 / 13.9), (82, 1.5 / 13.9)),
    "Q3_K": ((108, 1 / 42),),
    "Q4_K": ((0, 1 / 246), (2, 7.5 / 246)),
    "Q5_K": ((0, 1 / 500), (2, 15.5 / 500)),
    "Q6_K": ((208, 1 / 1370),),
    "IQ4_NL": ((0, 1 / 71),),
    "IQ4_XS": ((0, 1 / 1310),),
    "TQ1_0": ((52, 1 / 0.816),),
    "TQ2_0": ((64, 1 / 1.225),),
    "Q1_0": ((0, 1.0),),
    "Q2_0": ((0, 1 / 1.225),),
    "IQ2_XXS": ((0, 1 / 52),),
    "IQ2_XS": ((0, 1 / 56),),
    "IQ2_S": ((0, 1 / 57),),
    "IQ3_XXS": ((0, 1 / 144),),
    "IQ3_S": ((0, 1 / 142),),
    "IQ1_S": ((0, 1 / 7.5),),
}


EDGES = (0.0, -0.0, 65504.0, -65504.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 2.0**-14)  # f16 scales


def random_blocks(fmt: str, n_blocks: int, rng: np.random.Generator, std: float = 1.0) -> np.ndarray:
    """uint8 (n_blocks, block_bytes): scales vary by a quarter around the value for `std`, in either sign."""
    raw = rng.integers(0, 256, (n_blocks, FORMATS[fmt].block_bytes), dtype=np.uint8)
    size = rng.uniform(0.75, 1.25, n_blocks) * std
    if fmt == "MXFP4":  # E8M0
        raw[:, 0] = np.floor(np.log2(size / 3.2)) + 127 + rng.integers(0, 2, n_blocks)
    elif fmt == "NVFP4":  # four UE4M3
        raw[:, :4] = np.clip(
            8 * (np.log2(size / 3.1) + 7)[:, None] + rng.integers(-4, 5, (n_blocks, 4)), 1, 126
        )
    elif fmt == "IQ1_M":
        _set_iq1_m(raw, size * rng.choice([-1, 1], n_blocks) / 7.5)
    else:
        signed = size * rng.choice([-1, 1], n_blocks)
        for offset, scale in SCALES[fmt]:
            raw[:, offset : offset + 2] = _half(signed * scale).view(np.uint8).reshape(n_blocks, 2)
    return raw


def edge_blocks(fmt: str, n_blocks: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks under extreme scales: zeros, the largest, subnormal ones, the smallest normal one."""
    raw = random_blocks(fmt, n_blocks, rng)
    if (
        fmt == "MXFP4"
    ):  # a scale below 2 is a subnormal f32, which a GPU may flush; above 252 weights overflow
        raw[:, 0] = np.resize(np.array([2, 127, 252], np.uint8), n_blocks)
    elif fmt == "NVFP4":  # zero, a subnormal one, the smallest normal one, the largest, NaN (decodes to 0)
        raw[:, :4] = np.resize(np.array([0, 1, 7, 8, 0x7E, 0x7F, 0x80, 0xFF, 0x41], np.uint8), (n_blocks, 4))
    elif fmt == "IQ1_M":
        _set_iq1_m(raw, np.resize(EDGES, n_blocks))
    else:
        for i, (offset, _) in enumerate(SCALES[fmt]):
            edges = np.roll(np.resize(EDGES, n_blocks), i)  # each minimum with another scale
            raw[:, offset : offset + 2] = _half(edges).view(np.uint8).reshape(n_blocks, 2)
    return raw


def _set_iq1_m(raw: np.ndarray, scales: np.ndarray) -> None:
    """The top nibbles of four halves make an f16."""
    bits = _half(scales).view(np.uint16)[:, None]
    halves = raw[:, 48:].view(np.uint16)
    halves[...] = halves & 0xFFF | (bits >> np.array([0, 4, 8, 12], np.uint16) & 15) << 12


def _half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16)
