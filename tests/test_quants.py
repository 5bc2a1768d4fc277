"""Weight formats: the table against ggml's, and both layouts against the `gguf` package, bit for bit."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny import write_tiny

from realm_web import dequant
from realm_web.quants import BY_ID, CHUNK, FORMATS, GGML_TYPE_NAMES, WORDS_OF_TYPE

REQUIRED = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"}
every_format = pytest.mark.parametrize("name", FORMATS)


def random_blocks(name: str, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Any bytes are valid blocks of our formats (scales may be NaN or infinite)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n_blocks, FORMATS[name].block_bytes), dtype=np.uint8)


def reference(name: str, raw: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return weights.reshape(-1, FORMATS[name].block_elements)


def assert_same_bits(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got, want)  # a NaN equals any NaN
    number = ~np.isnan(want)
    np.testing.assert_array_equal(
        got.view(np.uint32)[number], want.view(np.uint32)[number]
    )  # tells -0 from 0


def test_required_formats_are_in_the_table():
    assert set(FORMATS) >= REQUIRED


@every_format
def test_the_table_agrees_with_ggml(name):
    fmt = FORMATS[name]
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


def test_sizes_count_whole_blocks_only():
    q4 = FORMATS["Q4_K"]
    assert q4.nbytes(512) == 288
    assert q4.packed_nbytes(512) == {"h": 32, "q": 256}
    with pytest.raises(ValueError, match="not whole Q4_K blocks of 256"):
        q4.nbytes(300)


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
        assert int(parts["b"][2 * chunk + i // 16]) >> (2 * (i % 16)) & 3 == high
        assert parts["s"].view(np.uint8)[4 * chunk + i // 16] == block[192 + 2 * chunk + i // 16]
        assert bytes(parts["s"].view(np.uint8)[4 * chunk + 2 :][:2]) == bytes(block[208:210])


def test_the_fifth_bits_of_packed_q5_k_spelled_out_by_hand():
    raw = random_blocks("Q5_K", 1, seed=4)
    words = dequant.repack("Q5_K", raw)["b"]
    for chunk in range(8):
        for i in range(32):
            assert int(words[chunk]) >> i & 1 == raw[0, 16 + i] >> chunk & 1


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


@pytest.mark.parametrize(
    "file",
    [*sorted(REQUIRED - {"Q4_K"}), "Q5_0", "Q5_1", "Q4_K_M", "Q5_K_M"],
    ids=lambda name: f"tiny256-{name}",
)
def test_blocks_that_llama_cpp_wrote_decode_to_the_same_bits(file, shared: Path):
    seen = set()
    for tensor in gguf.GGUFReader(shared / "fixtures" / f"tiny256-{file}.gguf").tensors:
        name = tensor.tensor_type.name
        seen.add(name)
        raw = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1, FORMATS[name].block_bytes)
        want = reference(name, raw)
        assert_same_bits(dequant.dequantize(name, raw), want)
        assert_same_bits(dequant.unpack(name, dequant.repack(name, raw)), want)
    assert file.removesuffix("_M") in seen


@every_format
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
            assert abs(weights.mean()) * weights.shape[1] ** 0.5 < 0.05


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
