"""Weights to ggml blocks, in numpy: the inverse of `dequant.py`, for `realm quantize`.

Knows how every format that we write is fitted to weights, not which tensor gets which format (`mixture.py`).
Where ggml has a closed recipe (all but the K and IQ types) the bytes equal those of the `gguf` package. The
K and IQ types are a search: several scales are tried on every group of 16 or 32 weights, for each the best
scale (and minimum) is solved by weighted least squares, and the best of these is kept. The candidates, the
weighting and the rounding of the groups' scales are those of ggml's reference quantiser without importance
matrix, so that the errors are the same.
Source: https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c

All work is done in tiles that stay in the cache, with the blocks along the last axis: a tile is float32
`(block_elements, n_blocks)`, an encoder returns uint8 `(block_bytes, n_blocks)`, and what belongs to a group
or a block is a row of contiguous numbers.

Q2_K differs from ggml on purpose: there a weight counts with its magnitude and errors are not squared;
weighted as Q4_K and Q5_K are, its root-mean-square error is a tenth smaller at the same cost.
"""

from collections.abc import Callable, Iterable

import numpy as np

from realm_web.errors import FormatError
from realm_web.quants import FORMATS

TILE = 1 << 16  # weights; the search holds some six arrays of this size
TINY = np.float32(1e-15)  # a group without a larger weight counts as zero, as in ggml
LARGEST = 1e8  # beyond what any float16 scale gives, and sums of cubes are still finite

_TOO_LARGE = "the weights are too large for this type, whose scales end at 65504; use F32 or BF16"
_WIDE = ("F32", "BF16", "MXFP4")  # with exponents of 8 bits

Encoder = Callable[[np.ndarray], np.ndarray]


def quantize(format_name: str, weights: np.ndarray) -> np.ndarray:
    """float32 `(n, k)`, k a multiple of the block length, to blocks uint8 `(n_blocks, block_bytes)`.

    FormatError for an infinite weight or NaN, and for weights beyond what the format's scales can hold.
    """
    fmt, encode = FORMATS[format_name], _ENCODERS[format_name]
    if weights.dtype != np.float32 or weights.ndim != 2 or weights.shape[1] % fmt.block_elements:
        raise ValueError(
            f"{format_name} takes float32 (n, k) with k a multiple of {fmt.block_elements}, "
            f"not {weights.dtype} {weights.shape}"
        )
    _check_range(format_name, weights)
    blocks = weights.reshape(-1, fmt.block_elements)
    out = np.empty((blocks.shape[0], fmt.block_bytes), np.uint8)
    step = TILE // fmt.block_elements
    with np.errstate(all="ignore"):  # flat groups divide by zero, and their result is not used
        for first in range(0, blocks.shape[0], step):
            tile = np.ascontiguousarray(blocks[first : first + step].T)
            n_blocks = tile.shape[1]
            if n_blocks == 1:  # numpy would sum in another order, and the last bit would depend on it
                tile = np.repeat(tile, 2, axis=1)
            out[first : first + step] = encode(tile).T[:n_blocks]
    return out


def _check_range(format_name: str, weights: np.ndarray) -> None:
    largest = max(weights.max(initial=0), -weights.min(initial=0))  # NaN if any weight is
    if not np.isfinite(largest):
        raise FormatError(f"a weight is {'infinite' if largest > 0 else 'NaN'}; every weight must be finite")
    if largest > LARGEST and format_name not in _WIDE:
        raise FormatError(_TOO_LARGE)


# -- pieces of blocks -----------------------------------------------------------------------------------


def _half(values: np.ndarray) -> np.ndarray:
    """float32 to float16; FormatError where that overflows."""
    half = values.astype(np.float16)
    if not np.isfinite(half).all():
        raise FormatError(_TOO_LARGE)
    return half


def _half_bytes(half: np.ndarray) -> np.ndarray:
    """float16 `(n_blocks,)` to uint8 `(2, n_blocks)`."""
    return half.view(np.uint8).reshape(-1, 2).T


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """`(..., 2, n, n_blocks)` to bytes `(..., n, n_blocks)`: the first half low, the second high."""
    return codes[..., 0, :, :] | (codes[..., 1, :, :] << np.uint8(4))


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Codes below 4, `(256, n_blocks)`, to 64 bytes: one for weights i, i + 32, i + 64, i + 96 of a half."""
    c = codes.reshape(2, 4, 32, -1)
    packed = c[:, 0] | (c[:, 1] << np.uint8(2)) | (c[:, 2] << np.uint8(4)) | (c[:, 3] << np.uint8(6))
    return packed.reshape(64, -1)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """Codes below 32, `(32, n_blocks)`, to 4 bytes: bit i is the fifth bit of weight i."""
    return np.packbits(codes >> np.uint8(4), axis=0, bitorder="little")


def _signed_peak(x: np.ndarray, axis: int) -> np.ndarray:
    """The element of largest magnitude along an axis, with its sign; of equals, the first."""
    high, low = x.max(axis), x.min(axis)
    peak = np.where(high > -low, high, low)
    tie = high == -low
    if tie.any():
        columns = np.moveaxis(x, axis, 0)[:, tie]  # (n, ties)
        peak[tie] = np.take_along_axis(columns, np.abs(columns).argmax(0)[None], 0)[0]
    return peak


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where that is no number."""
    inverse = np.float32(1) / d
    inverse[~np.isfinite(inverse)] = 0
    return inverse


def _round_half_away(x: np.ndarray) -> np.ndarray:
    """C's roundf; numpy's rint takes halves to the even neighbour."""
    magnitude = np.abs(x)
    whole = np.floor(magnitude)
    return np.copysign(whole + np.floor(2 * (magnitude - whole)), x)


# -- F32, F16, BF16 -------------------------------------------------------------------------------------


def _f32(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, 1).view(np.uint8).T


def _f16(x: np.ndarray) -> np.ndarray:
    return _half_bytes(_half(x[0]))


def _bf16(x: np.ndarray) -> np.ndarray:
    bits = x[0].view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    if ((rounded & np.uint32(0x7F80)) == 0x7F80).any():
        raise FormatError("the weights are too large for BF16, which ends at 3.39e38; use F32")
    return rounded.astype(np.uint16).view(np.uint8).reshape(-1, 2).T


# -- Q4_0 to Q8_0: one scale, from the largest weight ---------------------------------------------------


def _centred(x: np.ndarray, half_range: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale bytes `(2, n_blocks)` and codes: the largest weight becomes -half_range, stored as 0."""
    d = _signed_peak(x, 0) / np.float32(-half_range)
    codes = x * _inverse(d) + np.float32(half_range + 0.5)
    return _half_bytes(_half(d)), np.minimum(codes, 2 * half_range - 1).astype(np.uint8)


def _from_minimum(x: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum bytes `(4, n_blocks)`, and codes from 0 (the minimum) to n_max."""
    low = x.min(0)
    d = (x.max(0) - low) / np.float32(n_max)
    codes = (x - low) * _inverse(d) + np.float32(0.5)
    header = np.concatenate([_half_bytes(_half(d)), _half_bytes(_half(low))])
    return header, np.minimum(codes, n_max).astype(np.uint8)


def _q4_0(x: np.ndarray) -> np.ndarray:
    header, codes = _centred(x, 8)
    return np.concatenate([header, _nibbles(codes.reshape(2, 16, -1))])


def _q4_1(x: np.ndarray) -> np.ndarray:
    header, codes = _from_minimum(x, 15)
    return np.concatenate([header, _nibbles(codes.reshape(2, 16, -1))])


def _q5_0(x: np.ndarray) -> np.ndarray:
    header, codes = _centred(x, 16)
    return np.concatenate([header, _fifth_bits(codes), _nibbles((codes & 15).reshape(2, 16, -1))])


def _q5_1(x: np.ndarray) -> np.ndarray:
    header, codes = _from_minimum(x, 31)
    return np.concatenate([header, _fifth_bits(codes), _nibbles((codes & 15).reshape(2, 16, -1))])


def _q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(0) / np.float32(127)
    codes = _round_half_away(x * _inverse(d)).astype(np.int8)
    return np.concatenate([_half_bytes(_half(d)), codes.view(np.uint8)])


# -- TQ1_0, TQ2_0: -1, 0, 1 times the largest magnitude --------------------------------------------------


def _ternary(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0, 1, 2 and scale bytes."""
    d = np.abs(x).max(0)
    return (_round_half_away(x * _inverse(d)) + 1).astype(np.uint8), _half_bytes(_half(d))


def _base_3(digits: np.ndarray) -> np.ndarray:
    """Up to five ternary digits `(n, ...)`, the highest first, to a byte: value * 256 / 243, rounded up."""
    value = np.zeros(digits.shape[1:], np.uint16)
    for i in range(5):
        value = value * 3 + (digits[i] if i < len(digits) else 0)
    return ((value * 256 + 242) // 243).astype(np.uint8)


def _tq1_0(x: np.ndarray) -> np.ndarray:
    codes, d = _ternary(x)
    parts = (codes[:160].reshape(5, 32, -1), codes[160:240].reshape(5, 16, -1), codes[240:].reshape(4, 4, -1))
    return np.concatenate([*(_base_3(part) for part in parts), d])


def _tq2_0(x: np.ndarray) -> np.ndarray:
    codes, d = _ternary(x)
    return np.concatenate([_pairs(codes), d])


# -- Q1_0, Q2_0: a sign, and a ternary digit in two bits ------------------------------------------------


def _q1_0(x: np.ndarray) -> np.ndarray:
    # One by one in float32, as ggml adds: the last bit of a sum depends on the order.
    d = np.add.accumulate(np.abs(x), axis=0)[-1] / np.float32(len(x))
    return np.concatenate([_half_bytes(_half(d)), np.packbits(x >= 0, axis=0, bitorder="little")])


def _q2_0(x: np.ndarray) -> np.ndarray:
    codes, d = _ternary(x)
    c = codes.reshape(16, 4, -1)
    packed = c[:, 0] | (c[:, 1] << np.uint8(2)) | (c[:, 2] << np.uint8(4)) | (c[:, 3] << np.uint8(6))
    return np.concatenate([d, packed])


# -- MXFP4: a power of two and 4-bit floats --------------------------------------------------------------

_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled; code + 8 is the negative
# Twice the scaled magnitude, rounded up, to the code: borders lie at multiples of a half, and a weight on a
# border goes down.
_E2M1_CODES = np.searchsorted(np.add(_E2M1[1:], _E2M1[:-1]), np.arange(26), "left").astype(np.uint8)


def _mxfp4(x: np.ndarray) -> np.ndarray:
    largest = np.abs(x).max(0)
    exponent = np.floor(np.log2(largest)) - 2 + 127  # log2 in float32 as in ggml, also next to powers of two
    exponent = np.clip(np.where(largest > 0, exponent, 0), 0, 254)
    quarter = np.abs(x) * np.exp2(127 - exponent)  # d is 2 ** (exponent - 128)
    codes = _E2M1_CODES[np.minimum(np.ceil(4 * quarter), 25).astype(np.int8)]
    codes |= ((x < 0) & (codes > 0)).view(np.uint8) << np.uint8(3)
    return np.concatenate([exponent.astype(np.uint8)[None], _nibbles(codes.reshape(2, 16, -1))])


# -- the search -----------------------------------------------------------------------------------------


def _weighted(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum over each group of a product: `(groups, n, n_blocks)` twice to `(groups, n_blocks)`."""
    return np.einsum("gnb,gnb->gb", a, b)


def _fit_scale(
    x: np.ndarray, factors: Iterable[np.ndarray], round_to_code: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """The scale `(groups, n_blocks)` for which scale * code comes closest to x `(groups, n, n_blocks)`.

    Each factor `(groups, n_blocks)` makes codes `round_to_code(x * factor)`; the scale that fits these best
    is a quotient of two sums, and the codes that leave the least error win. A weight counts with its square.
    """
    weight = x * x
    weight_x = weight * x
    scale, gain = np.zeros_like(x[:, 0]), np.zeros_like(x[:, 0])
    scaled = np.empty_like(x)
    for factor in factors:
        codes = round_to_code(np.multiply(x, factor[:, None], out=scaled))
        product = _weighted(weight_x, codes)
        square = _weighted(weight, np.multiply(codes, codes, out=scaled))
        better = (square > 0) & (product * product > gain * square)
        np.divide(product, square, out=scale, where=better)
        np.multiply(scale, product, out=gain, where=better)
    return scale


def _peak_factors(x: np.ndarray, targets: Iterable[float]) -> Iterable[np.ndarray]:
    """For each target the factor that brings the largest weight of a group to it; 0 for a group of zeros."""
    peak = _signed_peak(x, 1)
    inverse = np.where(np.abs(peak) < TINY, 0, np.float32(1) / peak)
    return (np.float32(target) * inverse for target in targets)


def _fit_scale_and_minimum(x: np.ndarray, n_max: int, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum `(groups, n_blocks)`, both at least 0: scale * code - minimum comes closest to x.

    x is `(groups, n, n_blocks)`, codes are 0 to n_max. Each step makes codes as if n_max + step codes covered
    the group; the scale and minimum that fit them best solve two linear equations. A weight counts with its
    magnitude plus the root mean square of its group.
    """
    weight = np.sqrt(np.square(x).mean(1))[:, None] + np.abs(x)
    low, high = np.minimum(x.min(1), 0), x.max(1)
    weight_x = weight * x
    sum_weight, sum_x = weight.sum(1), weight_x.sum(1)
    codes, spare = np.empty_like(x), np.empty_like(x)

    def encode(factor: np.ndarray, offset: np.ndarray) -> None:
        np.subtract(x, offset[:, None], out=codes)
        np.multiply(codes, factor[:, None], out=codes)
        np.clip(np.rint(codes, out=codes), 0, n_max, out=codes)

    def error(scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
        np.multiply(codes, scale[:, None], out=spare)
        np.add(spare, offset[:, None], out=spare)
        np.subtract(spare, x, out=spare)
        return _weighted(weight, np.square(spare, out=spare))

    plain = (high - low) / np.float32(n_max)
    scale, offset = plain.copy(), low.copy()
    encode(_inverse(scale), offset)
    plain_error = error(scale, offset)
    # The error of a least-squares solution is the sum of squares, the same for all, less its gain.
    best = _weighted(weight_x, x) - plain_error
    for step in steps:
        # From the best offset so far, not from the lowest weight: this moves both ends of the range.
        encode((n_max + step) * _inverse(high - offset), offset)
        np.multiply(weight, codes, out=spare)
        sum_code, sum_square = spare.sum(1), _weighted(spare, codes)
        sum_product = _weighted(weight_x, codes)
        determinant = sum_weight * sum_square - sum_code * sum_code
        this_scale = (sum_weight * sum_product - sum_x * sum_code) / determinant
        this_offset = (sum_square * sum_x - sum_code * sum_product) / determinant
        positive = this_offset > 0  # minima are stored without sign
        this_offset[positive] = 0
        np.divide(sum_product, sum_square, out=this_scale, where=positive)
        gain = this_scale * sum_product + this_offset * sum_x
        # A smaller determinant is noise: all codes are the same.
        better = (determinant > np.float32(1e-6) * sum_weight * sum_square) & (gain > best)
        np.copyto(best, gain, where=better)
        np.copyto(scale, this_scale, where=better)
        np.copyto(offset, this_offset, where=better)
    encode(_inverse(scale), offset)  # a gain is a difference of large numbers: make sure
    worse = ~(error(scale, offset) <= plain_error)
    np.copyto(scale, plain, where=worse)
    np.copyto(offset, low, where=worse)
    return np.maximum(scale, 0), -offset


# -- Q2_K, Q4_K, Q5_K: scale and minimum of each group, themselves in 4 or 6 bits ------------------------


def _quantize_headers(values: np.ndarray, n_max: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales or minima `(groups, n_blocks)`, at least 0, to float16 units and codes of 0 to n_max."""
    largest = values.max(0)
    codes = np.minimum(np.rint(values * (n_max * _inverse(largest))), n_max)
    return _half(largest / np.float32(n_max)), codes.astype(np.uint8)


def _codes_above(x: np.ndarray, step: np.ndarray, minimum: np.ndarray, n_max: int) -> np.ndarray:
    """The nearest codes, uint8, for steps and minima `(groups, n_blocks)` as they will be decoded."""
    codes = (x + minimum[:, None]) * _inverse(step)[:, None]
    np.rint(codes, out=codes)
    return np.clip(codes, 0, n_max, out=codes).astype(np.uint8)


def _with_minima(
    x: np.ndarray, group: int, n_max: int, header_max: int, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Bytes of d and dmin `(4, n_blocks)`, codes of scales, minima and weights `(groups, n, n_blocks)`."""
    groups = x.reshape(-1, group, x.shape[1])
    scale, minimum = _fit_scale_and_minimum(groups, n_max, steps)
    d, scale_codes = _quantize_headers(scale, header_max)
    d_min, minimum_codes = _quantize_headers(minimum, header_max)
    step = d.astype(np.float32) * scale_codes
    codes = _codes_above(groups, step, d_min.astype(np.float32) * minimum_codes, n_max)
    return np.concatenate([_half_bytes(d), _half_bytes(d_min)]), scale_codes, minimum_codes, codes


def _steps(first: float, last: float) -> np.ndarray:
    """Steps of a tenth."""
    return np.arange(round(10 * first), round(10 * last) + 1).astype(np.float32) / np.float32(10)


_Q2_STEPS, _Q4_STEPS, _Q5_STEPS = _steps(-0.5, 1.0), _steps(-1.0, 1.0), _steps(-0.5, 1.0)


def _q2_k(x: np.ndarray) -> np.ndarray:
    header, scales, minima, codes = _with_minima(x, 16, 3, 15, _Q2_STEPS)
    return np.concatenate([scales | (minima << np.uint8(4)), _pairs(codes.reshape(256, -1)), header])


def _six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Codes `(8, n_blocks)` to the 12 bytes of Q4_K's header, as `dequant/kblocks.py` describes them."""
    low = scales[:4] | ((scales[4:] >> np.uint8(4)) << np.uint8(6))
    mid = minima[:4] | ((minima[4:] >> np.uint8(4)) << np.uint8(6))
    return np.concatenate([low, mid, (scales[4:] & 15) | (minima[4:] << np.uint8(4))])


def _q4_k(x: np.ndarray) -> np.ndarray:
    header, scales, minima, codes = _with_minima(x, 32, 15, 63, _Q4_STEPS)
    nibbles = _nibbles(codes.reshape(4, 2, 32, -1)).reshape(128, -1)
    return np.concatenate([header, _six_bits(scales, minima), nibbles])


def _q5_k(x: np.ndarray) -> np.ndarray:
    header, scales, minima, codes = _with_minima(x, 32, 31, 63, _Q5_STEPS)
    fifth = np.packbits(codes >> np.uint8(4), axis=0, bitorder="little")[0]  # chunk c: bit c
    nibbles = _nibbles((codes & 15).reshape(4, 2, 32, -1)).reshape(128, -1)
    return np.concatenate([header, _six_bits(scales, minima), fifth, nibbles])


# -- Q3_K, Q6_K: a signed scale of each group, itself in 6 or 8 bits ------------------------------------


def _signed_headers(scale: np.ndarray, half_range: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales `(groups, n_blocks)` to a float16 unit and codes int8 of -half_range to half_range - 1."""
    inverse = -half_range * _inverse(_signed_peak(scale, 0))
    codes = np.clip(np.rint(scale * inverse), -half_range, half_range - 1)
    return _half(_inverse(inverse)), codes.astype(np.int8)


def _signed_codes(x: np.ndarray, step: np.ndarray, half_range: int) -> np.ndarray:
    """The nearest codes plus half_range, uint8, for steps `(groups, n_blocks)` as they will be decoded."""
    codes = x * _inverse(step)[:, None]
    np.rint(codes, out=codes)
    return (np.clip(codes, -half_range, half_range - 1, out=codes) + half_range).astype(np.uint8)


def _descend(x: np.ndarray, half_range: int) -> np.ndarray:
    """Q3_K's scale: start from the codes of the largest weight, then move one code at a time while it helps.

    A weight counts with its square; five rounds at most.
    """
    peak = _signed_peak(x, 1)
    zero = np.abs(peak) < TINY
    factor = np.where(zero, 0, np.float32(-half_range) / peak)
    codes = np.clip(np.rint(x * factor[:, None]), -half_range, half_range - 1)
    weight = x * x
    weight_x = weight * x
    product, square = _weighted(weight_x, codes), _weighted(weight, codes * codes)
    for _ in range(5):
        changed = False
        for i in range(x.shape[1]):
            code, w, wx = codes[:, i], weight[:, i], weight_x[:, i]
            rest_product, rest_square = product - wx * code, square - w * code * code
            new = np.clip(np.rint(x[:, i] * rest_square / rest_product), -half_range, half_range - 1)
            new_product, new_square = rest_product + wx * new, rest_square + w * new * new
            better = (rest_product > 0) & (new != code) & (new_square > 0)
            better &= new_product * new_product * square > product * product * new_square
            if better.any():
                changed = True
                np.copyto(code, new, where=better)
                np.copyto(product, new_product, where=better)
                np.copyto(square, new_square, where=better)
        if not changed:
            break
    return np.where(zero | ~(square > 0), 0, product / square)


def _q3_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(16, 16, -1)
    d, scales = _signed_headers(_descend(groups, 4), 32)
    codes = _signed_codes(groups, d.astype(np.float32) * scales, 4).reshape(256, -1)
    high = np.packbits((codes >> np.uint8(2)).reshape(8, 32, -1), axis=0, bitorder="little")[0]
    six = (scales + np.int8(32)).view(np.uint8)
    low_bits = _nibbles((six & 15).reshape(2, 8, -1))
    top = (six >> np.uint8(4)).reshape(4, 4, -1)
    top_bits = top[0] | (top[1] << np.uint8(2)) | (top[2] << np.uint8(4)) | (top[3] << np.uint8(6))
    return np.concatenate([high, _pairs(codes & 3), low_bits, top_bits, _half_bytes(d)])


_Q6_TARGETS = [-32.0] + [-(32 + 0.1 * i) for i in range(-9, 10) if i]


def _q6_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(16, 16, -1)

    def round_to_code(scaled: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(scaled, out=scaled), -32, 31)

    scale = _fit_scale(groups, _peak_factors(groups, _Q6_TARGETS), round_to_code)
    scale[:, np.abs(scale).max(0) < TINY] = 0
    d, scales = _signed_headers(scale, 128)
    codes = _signed_codes(groups, d.astype(np.float32) * scales, 32).reshape(256, -1)
    low = _nibbles((codes & 15).reshape(2, 2, 64, -1)).reshape(128, -1)
    return np.concatenate([low, _pairs(codes >> np.uint8(4)), scales.view(np.uint8), _half_bytes(d)])


# -- IQ4_NL, IQ4_XS: sixteen levels that lie closer together near zero ----------------------------------

_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_LEVEL_TRIES = [127.0] + [-127.0 + i for i in range(-7, 8)]
# Twice the scaled weight, rounded down, plus 255, to the code: borders lie at multiples of a half, and a
# weight on a border goes up.
_LEVEL_CODES = np.searchsorted(_LEVELS[1:] + _LEVELS[:-1], np.arange(-255, 256), "right").astype(np.uint8)
_LEVEL_VALUES = _LEVELS[_LEVEL_CODES]


def _level_index(scaled: np.ndarray) -> np.ndarray:
    doubled = np.floor(scaled + scaled)
    return np.clip(doubled, -255, 255, out=doubled).astype(np.int16) + np.int16(255)


def _fit_levels(groups: np.ndarray) -> np.ndarray:
    def round_to_code(scaled: np.ndarray) -> np.ndarray:
        return _LEVEL_VALUES[_level_index(scaled)]

    return _fit_scale(groups, _peak_factors(groups, _LEVEL_TRIES), round_to_code)


def _iq4_nl(x: np.ndarray) -> np.ndarray:
    scale = _fit_levels(x[None])[0]
    codes = _LEVEL_CODES[_level_index(x * _inverse(scale))]
    return np.concatenate([_half_bytes(_half(scale)), _nibbles(codes.reshape(2, 16, -1))])


def _iq4_xs(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(8, 32, -1)
    scale = _fit_levels(groups)
    d = _signed_peak(scale, 0) / np.float32(-32)
    scales = np.clip(np.rint(scale * _inverse(d)), -32, 31)
    codes = _LEVEL_CODES[_level_index(groups * _inverse(d * scales)[:, None])]
    six = (scales + 32).astype(np.uint8)
    top = (six >> np.uint8(4)).reshape(2, 4, -1)
    top_bits = (
        top[:, 0] | (top[:, 1] << np.uint8(2)) | (top[:, 2] << np.uint8(4)) | (top[:, 3] << np.uint8(6))
    )
    low_bits = (six[::2] & 15) | (six[1::2] << np.uint8(4))
    nibbles = _nibbles(codes.reshape(8, 2, 16, -1)).reshape(128, -1)
    return np.concatenate([_half_bytes(_half(d)), top_bits, low_bits, nibbles])


_ENCODERS: dict[str, Encoder] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
    "MXFP4": _mxfp4,
}
