"""Weight formats: the table against ggml's, and both layouts against the `gguf` package, bit for bit."""

import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from blocks import SCALES, edge_blocks
from tiny import write_tiny

from realm_web import dequant, grids
from realm_web.gguf import parse
from realm_web.quants import BY_ID, CHUNK, FORMATS, GGML_TYPE_NAMES, WORDS_OF_TYPE

GRID_OF = {
    "iq2xxs": gguf.quants.IQ2_XXS,
    "iq2xs": gguf.quants.IQ2_XS,
    "iq2s": gguf.quants.IQ2_S,
    "iq3xxs": gguf.quants.IQ3_XXS,
    "iq3s": gguf.quants.IQ3_S,
    "iq1": gguf.quants.IQ1_S,
}
every_format = pytest.mark.parametrize("name", FORMATS)


def random_blocks(name: str, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Any bytes are valid blocks of our formats (scales may be NaN or infinite)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_blocks, FORMATS[name].block_bytes), dtype=np.uint8)


def reference(name: str, raw: np.ndarray) -> np.ndarray:
    if name in BY_HAND:
        return np.array([BY_HAND[name](block) for block in raw], np.float32)
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return weights.reshape(-1, FORMATS[name].block_elements)


def q1_0_by_hand(block: np.ndarray) -> list[np.float32]:
    d = np.float32(block[:2].view(np.float16)[0])
    return [d if block[2 + i // 8] >> (i % 8) & 1 else -d for i in range(128)]


def q2_0_by_hand(block: np.ndarray) -> list[np.float32]:
    d = np.float32(block[:2].view(np.float16)[0])
    return [d * np.float32(int(block[2 + i // 4] >> (2 * (i % 4)) & 3) - 1) for i in range(64)]


BY_HAND = {"Q1_0": q1_0_by_hand, "Q2_0": q2_0_by_hand}  # the gguf package cannot decode these


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got, want)  # a NaN equals any NaN
    number = ~np.isnan(want)
    np.testing.assert_array_equal(
        got.view(np.uint32)[number], want.view(np.uint32)[number]
    )  # tells -0 from 0


def test_every_type_that_ggml_writes_is_in_the_table():
    gone = {"Q4_2", "Q4_3", *(name for name in GGML_TYPE_NAMES.values() if re.search(r"_\d_[48]$", name))}
    activations = {"Q8_1", "Q8_K"}  # what products round their other operand to
    integers = {"I8", "I16", "I32", "I64"}
    assert set(GGML_TYPE_NAMES.values()) - gone - activations - integers - {"F64"} == set(FORMATS)


@every_format
def test_the_table_agrees_with_ggml(name):
    fmt = FORMATS[name]
    if name == "Q2_0":  # which the package does not know
        assert (fmt.ggml_id, fmt.block_elements, fmt.block_bytes) == (42, 64, 18) and BY_ID[42] is fmt
        return
    ggml_type = gguf.GGMLQuantizationType[name]
    assert fmt.ggml_id == ggml_type.value and BY_ID[fmt.ggml_id] is fmt
    assert (fmt.block_elements, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[ggml_type]


def test_every_ggml_type_has_its_name():
    known = {t.value: t.name for t in gguf.GGMLQuantizationType}
    assert known.items() <= GGML_TYPE_NAMES.items()
    assert len(set(GGML_TYPE_NAMES.values())) == len(GGML_TYPE_NAMES)


@every_format
def test_parts_of_a_chunk_are_whole_words(name):
    fmt = FORMATS[name]
    assert len({part.name for part in fmt.parts}) == len(fmt.parts)
    n = max(CHUNK, fmt.block_elements)
    for part in fmt.parts:
        assert part.wgsl_type in WORDS_OF_TYPE
        assert fmt.packed_nbytes(n)[part.name] % part.item_bytes == 0
    assert sum(fmt.packed_nbytes(n).values()) == fmt.n_blocks(n) * fmt.packed_block_bytes


def test_a_kernel_binds_no_weight_in_more_than_four_buffers():
    """Eight are sure on every adapter, and a product binds four others."""
    assert max(fmt.n_bindings for fmt in FORMATS.values()) <= 4


def test_sizes_count_whole_blocks_only():
    q4 = FORMATS["Q4_K"]
    assert q4.nbytes(512) == 288
    assert q4.packed_nbytes(512) == {"h": 32, "q": 256}
    with pytest.raises(ValueError, match="not whole Q4_K blocks of 256"):
        q4.nbytes(300)


def both_ways(name: str, raw: np.ndarray) -> None:
    with np.errstate(all="ignore"):
        want = reference(name, raw)
        assert_same_bits(dequant.dequantize(name, raw), want)
        assert_same_bits(dequant.unpack(name, dequant.repack(name, raw)), want)


@every_format
def test_dequantize_is_bit_equal_to_the_gguf_package_on_any_bytes(name):
    raw = random_blocks(name, 512)
    with np.errstate(all="ignore"):
        assert_same_bits(dequant.dequantize(name, raw), reference(name, raw))


@every_format
def test_unpacking_the_packed_layout_gives_the_same_bits(name):
    raw = random_blocks(name, 512, seed=1)
    with np.errstate(all="ignore"):
        assert_same_bits(dequant.unpack(name, dequant.repack(name, raw)), reference(name, raw))


@every_format
def test_packed_parts_have_the_sizes_the_table_says(name):
    n_blocks = 64
    fmt = FORMATS[name]
    parts = dequant.repack(name, random_blocks(name, n_blocks))
    assert list(parts) == [part.name for part in fmt.parts]
    for part in fmt.parts:
        assert parts[part.name].dtype == np.uint32 and parts[part.name].ndim == 1
        assert parts[part.name].nbytes == n_blocks * part.block_bytes
    assert {k: v.nbytes for k, v in parts.items()} == fmt.packed_nbytes(n_blocks * fmt.block_elements)


def test_a_tensor_is_repacked_block_by_block():
    """The GPU repacks in pieces: a range of blocks gives the same range of every part."""
    for name, fmt in FORMATS.items():
        raw = random_blocks(name, 96)
        whole, piece = dequant.repack(name, raw), dequant.repack(name, raw[32:64])
        for part in fmt.parts:
            per_block = part.block_bytes / 4
            want = whole[part.name][int(32 * per_block) : int(64 * per_block)]
            np.testing.assert_array_equal(piece[part.name], want)


def test_empty_tensors_are_allowed():
    for name, fmt in FORMATS.items():
        raw = np.zeros((0, fmt.block_bytes), np.uint8)
        assert dequant.dequantize(name, raw).shape == (0, fmt.block_elements)
        assert dequant.unpack(name, dequant.repack(name, raw)).shape == (0, fmt.block_elements)


def test_the_nibble_convention_of_packed_q4_k_is_that_of_q4_0():
    """Weight i of a chunk is the low nibble of byte i, weight i + 16 the high one (spelled out by hand)."""
    raw = random_blocks("Q4_K", 1, seed=2)
    ggml = raw[0, 16:]
    packed = dequant.repack("Q4_K", raw)["q"].view(np.uint8).reshape(8, 16)
    for chunk in range(8):
        source = ggml[32 * (chunk // 2) : 32 * (chunk // 2) + 32] >> (4 * (chunk % 2)) & 15
        for i in range(16):
            assert packed[chunk, i] == source[i] | source[i + 16] << 4


def test_the_words_of_packed_q6_k_spelled_out_by_hand():
    raw = random_blocks("Q6_K", 1, seed=3)
    block = raw[0]
    parts = dequant.repack("Q6_K", raw)
    for weight in range(256):
        half, chunk, i = weight // 128, weight // 32, weight % 32
        quarter = weight % 128 // 32
        low = block[64 * half + 32 * (quarter % 2) + i] >> (4 * (quarter // 2)) & 15
        high = block[128 + 32 * half + i] >> (2 * quarter) & 3
        assert parts["q"].view(np.uint8)[16 * chunk + i % 16] >> (4 * (i // 16)) & 15 == low
        assert parts["b"].view(np.uint8)[8 * chunk + i // 16 * 4 + i % 4] >> (2 * (i % 16 // 4)) & 3 == high
        assert parts["s"].view(np.uint8)[4 * chunk + i // 16] == block[192 + 2 * chunk + i // 16]
        assert bytes(parts["s"].view(np.uint8)[4 * chunk + 2 :][:2]) == bytes(block[208:210])


def test_the_fifth_bits_of_packed_q5_k_spelled_out_by_hand():
    raw = random_blocks("Q5_K", 1, seed=4)
    words = dequant.repack("Q5_K", raw)["b"]
    for chunk in range(8):
        for i in range(32):
            assert int(words[chunk]) >> (8 * (i % 4) + i // 4) & 1 == raw[0, 16 + i] >> chunk & 1


def test_the_header_of_packed_q4_k_holds_scales_and_minima_by_nibbles():
    raw = random_blocks("Q4_K", 1, seed=6)
    header = raw[0, :16]
    d, dmin = header[:4].view(np.float16)
    words = dequant.repack("Q4_K", raw)["h"]
    assert words[0] == header[:4].view(np.uint32)[0]
    codes = raw[0, 16:]
    weights = dequant.dequantize("Q4_K", raw).reshape(8, 32)
    for chunk in range(8):
        low, minimum, high = (int(word) >> (4 * chunk) & 15 for word in words[1:])
        scale = np.float32(d) * np.float32(low | (high & 3) << 4)
        least = np.float32(dmin) * np.float32(minimum | high >> 2 << 4)
        code = codes[32 * (chunk // 2)] >> (4 * (chunk % 2)) & 15
        assert weights[chunk, 0] == scale * np.float32(code) - least


def test_scales_of_the_simple_formats_share_a_word():
    d, m = struct.pack("<e", 1.5), struct.pack("<e", -0.25)
    q4_1 = np.frombuffer(d + m + bytes(16), np.uint8).reshape(1, -1)
    q8_0 = np.frombuffer(d + bytes(32), np.uint8).reshape(1, -1)
    assert dequant.repack("Q4_1", q4_1)["s"].tobytes() == d + m
    assert dequant.repack("Q8_0", q8_0)["s"].tobytes() == d + b"\0\0"


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"Q4_0 blocks are uint8 \(n, 18\)"):
        dequant.dequantize("Q4_0", np.zeros((2, 20), np.uint8))
    with pytest.raises(ValueError, match=r"F32 blocks are uint8 \(n, 4\)"):
        dequant.repack("F32", np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match="31 F16 blocks are not whole chunks of 32"):
        dequant.repack("F16", np.zeros((31, 2), np.uint8))
    with pytest.raises(ValueError, match=r"Q8_0 has parts \['q', 's'\], not \['q'\]"):
        dequant.unpack("Q8_0", {"q": np.zeros(8, np.uint32)})


@every_format
def test_every_byte_value_decodes_to_the_same_bits(name):
    """Constant bytes, so every code and every small scale; then with the scale of ordinary blocks."""
    fmt = FORMATS[name]
    raw = np.repeat(np.arange(256, dtype=np.uint8)[:, None], fmt.block_bytes, axis=1)
    both_ways(name, raw)
    for offset, _ in SCALES.get(name, ()):
        raw[:, offset : offset + 2] = np.array([1.5], np.float16).view(np.uint8)
    both_ways(name, raw)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("F32", "F16", "BF16")])
def test_extreme_scales_decode_to_the_same_bits(name):
    both_ways(name, edge_blocks(name, 64, np.random.default_rng(5)))


def test_every_mxfp4_scale_is_a_power_of_two():
    raw = np.zeros((255, 17), np.uint8)
    raw[:, 0] = np.arange(255)
    raw[:, 1:] = 0x12  # the codes of 1 (low) and 1/2 (high), before doubling
    want = np.ldexp(1.0, np.arange(255) - 127)
    got = dequant.dequantize("MXFP4", raw)
    assert (got[:, :16] == want[:, None]).all() and (got[:, 16:] == want[:, None] / 2).all()


def test_an_nvfp4_block_spelled_out_by_hand():
    """Four E4M3 scales, each for 16 weights in 8 bytes: weight i low, weight i + 8 in the high nibble."""
    e2m1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    scales = {
        0x00: 0.0,
        0x01: 2**-9,
        0x07: 7 * 2**-9,
        0x08: 2**-6,
        0x38: 1.0,
        0x3C: 1.5,
        0x7E: 448.0,
        0x7F: 0.0,
    }
    rng = np.random.default_rng(6)
    for first in (0, 4):
        codes = list(scales)[first : first + 4]
        raw = np.concatenate([np.array(codes, np.uint8), rng.integers(0, 256, 32, dtype=np.uint8)])
        got = dequant.dequantize("NVFP4", raw[None])[0]
        for i, weight in enumerate(got):
            nibble = raw[4 + i // 16 * 8 + i % 8] >> (4 * (i % 16 // 8)) & 15
            assert weight == scales[codes[i // 16]] * e2m1[nibble]


@pytest.mark.parametrize(("ours", "theirs"), GRID_OF.items())
def test_a_grid_has_the_rows_of_the_gguf_package(ours, theirs):
    theirs.init_grid()
    rows = np.frombuffer(grids.rows(ours), np.int8).reshape(-1, grids.GRIDS[ours].length)
    np.testing.assert_array_equal(rows, theirs.grid.reshape(theirs.grid_shape))


def test_every_grid_and_codebook_is_used_and_known():
    assert {fmt.grid for fmt in FORMATS.values()} - {""} == set(grids.GRIDS) == set(GRID_OF)
    assert grids.CODEBOOKS["iq4"] == gguf.quants.IQ4_NL.kvalues
    assert grids.CODEBOOKS["fp4"] == gguf.quants.MXFP4.kvalues


def test_crumbs_and_lanes_spelled_out_by_hand():
    """Weight 16w + 4k + b of a chunk is at bit 2k of byte b of word w; weight 4i + b at bit i of byte b."""
    q3_k = random_blocks("Q3_K", 1, seed=7)
    parts = dequant.repack("Q3_K", q3_k)
    low, high = (parts[name].view(np.uint8).reshape(8, -1) for name in "qb")
    for i in range(256):
        chunk, j = i // 32, i % 32
        code = q3_k[0, 32 + 32 * (i // 128) + j] >> (2 * (chunk % 4)) & 3
        assert low[chunk, 4 * (j // 16) + j % 4] >> (2 * (j % 16 // 4)) & 3 == code
        assert high[chunk, j % 4] >> (j // 4) & 1 == q3_k[0, j] >> chunk & 1


def test_blocks_that_llama_cpp_wrote_decode_to_the_same_bits(shared: Path):
    seen = set()
    for path in sorted((shared / "fixtures").glob("*.gguf")):
        data = path.read_bytes()
        for tensor in parse(data, len(data)).tensors.values():
            fmt = tensor.format
            seen.add(fmt.name)
            raw = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset).reshape(-1, fmt.block_bytes)
            both_ways(fmt.name, raw[:512])
    assert seen == FORMATS.keys() - {"NVFP4"}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "Q2_0"])  # the gguf package has no such
def test_a_tiny_model_has_matrices_of_every_format_with_sane_weights(name, tmp_path):
    model = write_tiny(tmp_path / "tiny.gguf", n_layers=1, dim=256, ffn=512, quant=name)
    for tensor in gguf.GGUFReader(model.path).tensors:
        weights = model.weights[tensor.name]
        assert tuple(tensor.shape) == weights.shape[::-1]
        assert tensor.tensor_type.name == model.types[tensor.name] == (name if weights.ndim == 2 else "F32")
        fmt = FORMATS[model.types[tensor.name]]
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1, fmt.block_bytes)
        assert_same_bits(dequant.dequantize(fmt.name, raw).reshape(weights.shape), weights)
        if weights.ndim == 2:
            assert 0.9 < weights.std() * weights.shape[1] ** 0.5 < 1.15
            assert abs(weights.mean()) * weights.shape[1] ** 0.5 < 0.1


def test_the_same_options_write_the_same_tiny_model(tmp_path):
    options = {
        "tied": True,
        "biases": ("attn_q",),
        "rope_freqs": True,
        "quant": {"*embd*": "Q8_0", "*": "Q4_0"},
    }
    one = write_tiny(tmp_path / "one.gguf", **options)
    two = write_tiny(tmp_path / "two.gguf", **options)
    other = write_tiny(tmp_path / "other.gguf", **options, seed=1)
    assert one.path.read_bytes() == two.path.read_bytes() != other.path.read_bytes()
    assert one.types["token_embd.weight"] == "Q8_0" and one.types["blk.1.ffn_down.weight"] == "Q4_0"
    assert "output.weight" not in one.weights
    assert one.weights["blk.1.attn_q.bias"].shape == (64,) and one.weights["rope_freqs.weight"].shape == (8,)
