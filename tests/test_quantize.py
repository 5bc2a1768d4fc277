"""Quantising: equal bytes where ggml has a closed recipe, llama.cpp's error where it searches."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from realm_web.dequant import dequantize
from realm_web.errors import FormatError
from realm_web.gguf import parse
from realm_web.quantize import quantize
from realm_web.quants import FORMATS

CLOSED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
SEARCHED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
ALL = (*CLOSED, *SEARCHED, "Q1_0", "Q2_0")

# Bytes of a block that hold codes and nothing else: all zero they are the lowest code, all ones the highest.
CODE_BYTES = {
    "Q4_0": (2, 18),
    "Q4_1": (4, 20),
    "Q5_0": (2, 22),
    "Q5_1": (4, 24),
    "Q2_K": (16, 80),
    "Q3_K": (0, 96),
    "Q4_K": (16, 144),
    "Q5_K": (16, 176),
    "Q6_K": (0, 192),
}
N_MAX = {
    "Q4_0": 15,
    "Q4_1": 15,
    "Q5_0": 31,
    "Q5_1": 31,
    "Q2_K": 3,
    "Q3_K": 7,
    "Q4_K": 15,
    "Q5_K": 31,
    "Q6_K": 63,
}


def by_gguf(name: str, weights: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    return np.ascontiguousarray(blocks).view(np.uint8).reshape(-1, FORMATS[name].block_bytes)


def decoded(name: str, blocks: np.ndarray, like: np.ndarray) -> np.ndarray:
    return dequantize(name, blocks).reshape(like.shape)


def gaussian(rows: int, row: int, std: float = 0.02, seed: int = 0) -> np.ndarray:
    return (std * np.random.default_rng(seed).standard_normal((rows, row))).astype(np.float32)


def edge_rows() -> np.ndarray:
    """Rows of 256: flat, sparse, tied, on rounding borders, very small and large."""
    ramp = np.arange(-128, 128, dtype=np.float32)
    spike = np.zeros(256, np.float32)
    spike[77] = -3
    rows = [0 * ramp, -0.0 * ramp, 0 * ramp + 1, 0 * ramp - 2.5, spike, -spike, ramp, -ramp, abs(ramp)]
    rows += [ramp / 2, ramp / 16 + 0.5, np.sign(ramp), np.where(ramp % 2, 7, -7), 2.0 ** (ramp // 16)]
    rows += [ramp * 300, ramp * 2e-6, ramp * 1e-8, ramp / 127 * np.where(ramp % 3, 1, -1), np.sqrt(abs(ramp))]
    return np.array(rows, np.float32)


@pytest.mark.parametrize("name", CLOSED)
def test_the_bytes_equal_those_of_the_gguf_package(name):
    for weights in (gaussian(61, 512), gaussian(7, 2560, 30), edge_rows()):
        np.testing.assert_array_equal(quantize(name, weights), by_gguf(name, weights))
    f16 = gaussian(64, 256).astype(np.float16).astype(np.float32)  # with many ties
    np.testing.assert_array_equal(quantize(name, f16), by_gguf(name, f16))


def test_mxfp4_exponents_from_the_smallest_to_the_largest():
    weights = gaussian(4, 256, 1) * np.exp2(np.array([-120, -64, 64, 124], np.float32))[:, None]
    np.testing.assert_array_equal(quantize("MXFP4", weights), by_gguf("MXFP4", weights))


def test_an_mxfp4_block_below_the_smallest_exponent_is_zero():
    # The gguf package lets the exponent run below zero and around to 2 ** 120.
    weights = np.full((1, 32), 1e-39, np.float32)
    assert not decoded("MXFP4", quantize("MXFP4", weights), weights).any()


# ---- llama.cpp's results


def fixture(shared, name: str) -> dict[str, tuple[str, np.ndarray]]:
    """Type, and weights (rows, row length), of each matrix of a fixture."""
    path = shared / "fixtures" / f"tiny256-{name}.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    data = path.read_bytes()
    found = {}
    for t in parse(data, len(data)).tensors.values():
        raw = np.frombuffer(data, np.uint8, t.nbytes, t.offset).reshape(-1, t.format.block_bytes)
        if len(t.shape) > 1:
            found[t.name] = (t.type_name, dequantize(t.type_name, raw).reshape(-1, t.shape[0]))
    return found


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


@pytest.mark.parametrize(
    "file", [*CLOSED[1:-1], "MXFP4_MOE", "Q1_0", "Q2_0", "IQ4_NL", "IQ4_XS", "Q2_K", "Q3_K_M"]
)
def test_errors_are_those_of_llama_cpp(file, shared):
    compare_with_llama_cpp(file, shared)


@pytest.mark.parametrize("file", ["Q4_K_M", "Q5_K_M", "Q6_K"])
def test_errors_of_the_k_types_are_those_of_llama_cpp(file, shared):
    compare_with_llama_cpp(file, shared)


def compare_with_llama_cpp(file: str, shared) -> None:
    """Tensor by tensor, at most 2 % more; Q2_K's fixture was even made with an importance matrix."""
    original, theirs = fixture(shared, "F16"), fixture(shared, file)
    for name, (type_name, their_weights) in theirs.items():
        weights = original[name][1]
        ours = rms(decoded(type_name, quantize(type_name, weights), weights) - weights)
        assert ours <= 1.02 * rms(their_weights - weights), name


# ---- properties


@st.composite
def matrices(draw) -> np.ndarray:
    """1 to 3 rows of 1 or 2 blocks, in groups of very different size."""
    shape = (draw(st.integers(1, 3)), 256 * draw(st.integers(1, 2)))
    unit = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    noise = np.random.default_rng(draw(st.integers(0, 99))).standard_normal(shape)
    sizes = draw(
        hnp.arrays(np.float32, (shape[0], shape[1] // 16), elements=st.sampled_from((0, 0.01, 1, 30)))
    )
    mixed = draw(st.sampled_from((0, 0.5, 1))) * noise + unit
    return (mixed * np.repeat(sizes, 16, axis=1) + draw(st.sampled_from((0, 0.1, -5)))).astype(np.float32)


@pytest.mark.parametrize("name", CODE_BYTES)
@settings(max_examples=25, deadline=None)
@given(weights=matrices())
def test_every_weight_gets_the_nearest_code_of_its_group(name, weights):
    blocks = quantize(name, weights)
    error = np.abs(decoded(name, blocks, weights) - weights)
    first, last = CODE_BYTES[name]
    ends = []
    for fill in (0, 255):
        blocks[:, first:last] = fill
        ends.append(decoded(name, blocks, weights))
    low, high = np.minimum(*ends), np.maximum(*ends)
    step = (high - low) / N_MAX[name]
    # Scales and minima are float16, whose subnormals are multiples of 2 ** -24.
    rounding = (np.abs(low) + np.abs(high)) * 2.0**-11 + (N_MAX[name] + 1) * 2.0**-25
    between = (weights >= low) & (weights <= high)
    assert (error <= step / 2 + rounding)[between].all()
    beyond = np.maximum(low - weights, weights - high)
    assert (error <= beyond + rounding)[~between].all()


@pytest.mark.parametrize("name", CODE_BYTES)
@settings(max_examples=25, deadline=None)
@given(weights=matrices())
def test_the_error_stays_below_a_step_of_the_whole_block(name, weights):
    error = decoded(name, quantize(name, weights), weights) - weights
    spread = weights.max() - weights.min() if name in ("Q4_1", "Q5_1") else 2 * np.abs(weights).max()
    rounding = np.abs(weights).max() * 2.0**-11 + (N_MAX[name] + 1) * 2.0**-25
    assert rms(error) <= spread / N_MAX[name] + rounding


@pytest.mark.parametrize("name", ALL)
def test_zeros_stay_zeros(name):
    weights = np.zeros((3, 512), np.float32)
    np.testing.assert_array_equal(decoded(name, quantize(name, weights), weights), weights)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-5, 1000.0])
def test_a_result_is_finite_and_not_larger_than_the_weights(name, size):
    weights = np.concatenate([gaussian(2, 256, size), np.full((1, 256), size, np.float32)])
    result = decoded(name, quantize(name, weights), weights)
    assert np.isfinite(result).all()
    assert np.abs(result).max() <= 1.5 * np.abs(weights).max() + 2.0**-24


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_no_number_is_refused(name, bad):
    weights = gaussian(2, 256)
    weights[1, 3] = bad
    with pytest.raises(FormatError, match="must be finite"):
        quantize(name, weights)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"F32", "BF16", "MXFP4"}))
@pytest.mark.parametrize("size", [3e38, 1e12, 2e8])
def test_weights_beyond_the_scales_are_refused(name, size):
    with pytest.raises(FormatError, match="too large"):
        quantize(name, np.full((1, 256), size, np.float32))


def test_bf16_does_not_round_up_to_infinity():
    with pytest.raises(FormatError, match="BF16"):
        quantize("BF16", np.full((1, 1), 3.4e38, np.float32))


@pytest.mark.parametrize("name", ALL)
def test_blocks_do_not_depend_on_their_neighbours(name):
    weights = gaussian(700, 256)  # several tiles
    whole = quantize(name, weights)
    per_row = len(whole) // len(weights)
    for first, n in ((0, 300), (101, 2), *((i, 1) for i in range(60, 160))):
        rows = slice(first * per_row, (first + n) * per_row)
        np.testing.assert_array_equal(quantize(name, weights[first : first + n]), whole[rows])


@pytest.mark.parametrize("name", ALL)
def test_odd_shapes(name):
    block = FORMATS[name].block_elements
    for shape in ((1, block), (7, 3 * block), (0, block)):
        blocks = quantize(name, np.ones(shape, np.float32))
        assert blocks.shape == (shape[0] * shape[1] // block, FORMATS[name].block_bytes)
    wrong = [np.ones((2, block)), np.ones(block, np.float32)]
    wrong += [np.ones((2, block + 1), np.float32)] if block > 1 else []
    for weights in wrong:
        with pytest.raises(ValueError, match="takes float32"):
            quantize(name, weights)
