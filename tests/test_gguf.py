"""The GGUF parser: against files that the `gguf` package and llama.cpp wrote, and against broken ones."""

import doctest
import math
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tiny

from realm_web import gguf
from realm_web.errors import FormatError, RealmError, UnsupportedError
from realm_web.gguf import GGUFFile, Metadata, NeedMoreBytes, parse
from realm_web.quants import FORMATS

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)

# -- a writer of headers that can also write wrong ones -----------------------------------------------


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", value_type) + payload


def array(element_type: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IQ", element_type, count) + payload


def tensor(
    name: str = "t",
    shape: tuple[int, ...] = (8,),
    ggml_type: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    n_dims = len(shape) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", n_dims, *shape, ggml_type, offset)


def header(
    *,
    keys: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
) -> bytes:
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(keys) if n_keys is None else n_keys
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join((*keys, *tensors))


def with_data(head: bytes, nbytes: int, alignment: int = 32) -> bytes:
    return head + bytes(-len(head) % alignment) + bytes(nbytes)


ALL_TYPES = (
    key("u8", U8, b"\xff"),
    key("i8", I8, b"\xff"),
    key("u16", U16, struct.pack("<H", 65535)),
    key("i16", I16, struct.pack("<h", -2)),
    key("u32", U32, struct.pack("<I", 2**32 - 1)),
    key("i32", I32, struct.pack("<i", -3)),
    key("u64", U64, struct.pack("<Q", 2**64 - 1)),
    key("i64", I64, struct.pack("<q", -(2**63))),
    key("f32", F32, struct.pack("<f", 0.5)),
    key("f64", F64, struct.pack("<d", 0.1)),
    key("bool", BOOL, b"\x01"),
    key("string", STRING, text("Grüße\n")),
    key("strings", ARRAY, array(STRING, 3, text("a") + text("") + text("ü"))),
    key("numbers", ARRAY, array(I16, 2, struct.pack("<2h", -1, 2))),
    key("bools", ARRAY, array(BOOL, 2, b"\x00\x01")),
    key("nested", ARRAY, array(ARRAY, 2, array(U8, 2, b"\x01\x02") + array(STRING, 1, text("x")))),
    key("nothing", ARRAY, array(F32, 0)),
)
ALL_VALUES = {
    "u8": 255,
    "i8": -1,
    "u16": 65535,
    "i16": -2,
    "u32": 2**32 - 1,
    "i32": -3,
    "u64": 2**64 - 1,
    "i64": -(2**63),
    "f32": 0.5,
    "f64": 0.1,
    "bool": True,
    "string": "Grüße\n",
    "strings": ["a", "", "ü"],
    "numbers": [-1, 2],
    "bools": [False, True],
    "nested": [[1, 2], ["x"]],
    "nothing": [],
}
SMALL_HEAD = header(keys=ALL_TYPES, tensors=(tensor("a", (8, 2)), tensor("b", (32,), ggml_type=2, offset=64)))
SMALL = with_data(SMALL_HEAD, 64 + 18)


def parse_resumed(data: bytes, file_size: int | None = None, first: int = 0) -> tuple[GGUFFile, int]:
    """Feed longer prefixes as they are asked for; returns also how many were needed."""
    prefix, rounds = data[:first], 0
    while True:
        try:
            return parse(prefix, file_size), rounds
        except NeedMoreBytes as more:
            assert len(prefix) < more.n <= (len(data) if file_size else more.n)
            assert len(prefix) < len(data), "it must not ask for more than there is"
            prefix, rounds = data[: more.n], rounds + 1


# -- good files ---------------------------------------------------------------------------------------


def test_every_value_type_is_read():
    file = parse(SMALL, len(SMALL))
    assert file.version == 3
    assert file.metadata == ALL_VALUES
    assert file.metadata["bool"] is True and file.metadata["bools"] == [False, True]


def test_tensors_have_absolute_offsets_and_sizes():
    file = parse(SMALL, len(SMALL))
    a, b = file.tensors["a"], file.tensors["b"]
    assert (a.shape, a.n_elements, a.nbytes, a.type_name) == ((8, 2), 16, 64, "F32")
    assert (b.shape, b.n_elements, b.nbytes, b.type_name) == ((32,), 32, 18, "Q4_0")
    assert file.header_size == len(SMALL_HEAD)
    assert file.data_offset == a.offset == len(SMALL) - 82 and b.offset == a.offset + 64
    assert b.format is FORMATS["Q4_0"]


def test_version_2_and_3_are_the_same_format():
    data = header(keys=ALL_TYPES, version=2)
    file = parse(data)
    assert file.version == 2
    assert file.metadata == ALL_VALUES


def test_any_bytes_like_prefix_will_do():
    for data in (bytearray(SMALL), memoryview(SMALL), memoryview(np.frombuffer(SMALL, np.uint8))):
        assert parse(data, len(SMALL)) == parse(SMALL, len(SMALL))


def test_the_alignment_key_moves_the_data():
    keys = (key("general.alignment", U32, struct.pack("<I", 256)),)
    data = with_data(header(keys=keys, tensors=(tensor(offset=256),)), 256 + 32, alignment=256)
    file = parse(data, len(data))
    assert file.alignment == 256 and file.data_offset == 256 and file.tensors["t"].offset == 512


def test_tensors_may_lie_in_any_order_with_gaps():
    data = with_data(header(tensors=(tensor("late", offset=96), tensor("early", offset=0))), 96 + 32)
    file = parse(data, len(data))
    assert list(file.tensors) == ["late", "early"]
    assert file.tensors["late"].offset - file.tensors["early"].offset == 96


def test_a_file_of_metadata_only_is_fine():
    file = parse(header(keys=ALL_TYPES))
    assert file.tensors == {} and file.data_offset >= file.header_size


def test_a_tiny_model_reads_as_it_was_written(tmp_path):
    options = {"quant": {"*embd*": "Q8_0", "*": "Q4_1"}, "biases": ("attn_q",), "add_bos": True}
    model = write_tiny(tmp_path / "tiny.gguf", rope_scaling={"type": "linear", "factor": 2.0}, **options)
    data = model.path.read_bytes()
    file = parse(data, len(data))
    assert file.metadata.keys() == model.metadata.keys()
    for name, value in model.metadata.items():
        as_float32 = float(np.float32(value)) if isinstance(value, float) else value
        assert file.metadata[name] == as_float32, name
    assert {t.name: t.type_name for t in file.tensors.values()} == model.types
    for info in file.tensors.values():
        assert info.shape == model.weights[info.name].shape[::-1]
        raw = np.frombuffer(data, np.uint8, info.nbytes, info.offset)
        weights = reference.quants.dequantize(raw, reference.GGMLQuantizationType(info.ggml_type))
        np.testing.assert_array_equal(weights.reshape(info.shape[::-1]), model.weights[info.name])


def assert_agrees_with_the_gguf_package(path: Path, file: GGUFFile) -> None:
    want = reference.GGUFReader(path)
    assert [t.name for t in want.tensors] == list(file.tensors)
    for theirs in want.tensors:
        ours = file.tensors[theirs.name]
        got = (ours.shape, ours.ggml_type, ours.offset, ours.nbytes)
        assert got == (tuple(theirs.shape), theirs.tensor_type, theirs.data_offset, theirs.n_bytes)
    fields = {name: field for name, field in want.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(file.metadata)
    for name, field in fields.items():
        np.testing.assert_equal(file.metadata[name], field.contents())  # a NaN equals a NaN


def test_files_that_llama_cpp_wrote_agree_with_the_gguf_package(shared: Path):
    unknown = set()
    for path in sorted((shared / "fixtures").glob("*.gguf")):
        with path.open("rb") as f:
            file = parse(f.read(64 << 10), path.stat().st_size)
        names = {tensor.type_name for tensor in file.tensors.values()}
        if names <= KNOWN:
            assert_agrees_with_the_gguf_package(path, file)
        else:
            unknown.add(path.stem)
    assert unknown == {"tiny256-Q2_0"}


def test_the_real_model_is_parsed_from_few_reads(smollm2_path: Path):
    size = smollm2_path.stat().st_size
    with smollm2_path.open("rb") as f:
        file, rounds = parse_resumed(f.read(8 << 20), size)
    assert rounds <= 4
    assert file.metadata.get_str("general.architecture") == "llama"
    assert len(file.metadata.get_list("tokenizer.ggml.tokens", str)) == 49152
    assert len(file.tensors) == 272
    assert max(t.offset + t.nbytes for t in file.tensors.values()) <= size


# Keys and values as the writer of the gguf package takes them.
_names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
_numbers = {
    U8: st.integers(0, 255),
    I8: st.integers(-128, 127),
    U16: st.integers(0, 2**16 - 1),
    I16: st.integers(-(2**15), 2**15 - 1),
    U32: st.integers(0, 2**32 - 1),
    I32: st.integers(-(2**31), 2**31 - 1),
    U64: st.integers(0, 2**64 - 1),
    I64: st.integers(-(2**63), 2**63 - 1),
    BOOL: st.booleans(),
    F32: st.floats(width=32),
    F64: st.floats(),
    STRING: st.text(st.characters(codec="utf-8"), max_size=20),
}
_scalars = st.sampled_from(sorted(_numbers)).flatmap(lambda t: st.tuples(st.just(t), st.none(), _numbers[t]))
_arrays = st.sampled_from(sorted(_numbers)).flatmap(
    lambda t: st.tuples(st.just(ARRAY), st.just(t), st.lists(_numbers[t], min_size=1, max_size=8))
)
KNOWN = {t.name for t in reference.GGMLQuantizationType}  # to the gguf package: not Q2_0
_tensors = st.tuples(
    st.sampled_from(sorted(FORMATS.keys() & KNOWN)),
    st.integers(1, 3),
    st.lists(st.integers(1, 4), max_size=3).map(tuple),
)


def write_reference(path: str, alignment: int, metadata: dict, tensors: dict) -> None:
    writer = reference.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name, (value_type, element_type, value) in metadata.items():
        element = None if element_type is None else reference.GGUFValueType(element_type)
        writer.add_key_value(name, value, reference.GGUFValueType(value_type), element)
    for name, (type_name, n_blocks, rest) in tensors.items():
        ggml_type = reference.GGMLQuantizationType[type_name]
        raw = np.zeros((*rest, n_blocks * FORMATS[type_name].block_bytes), np.uint8)
        writer.add_tensor(name, raw, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@settings(max_examples=60, deadline=None)
@given(
    metadata=st.dictionaries(_names, _scalars | _arrays, max_size=8),
    tensors=st.dictionaries(_names, _tensors, max_size=5),
    alignment=st.sampled_from([8, 32, 64, 4096]),
    first=st.integers(0, 400),
)
def test_what_the_gguf_package_writes_is_read_back(metadata, tensors, alignment, first):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.gguf"
        write_reference(str(path), alignment, metadata, tensors)
        data = path.read_bytes()
        file, _ = parse_resumed(data, len(data), first)
        assert_agrees_with_the_gguf_package(path, file)
    for name, (_, _, value) in metadata.items():
        np.testing.assert_equal(file.metadata[name], value)
    for name, (type_name, n_blocks, rest) in tensors.items():
        row = n_blocks * FORMATS[type_name].block_elements
        assert (file.tensors[name].type_name, file.tensors[name].shape) == (type_name, (row, *rest[::-1]))
    assert file.alignment == alignment


# -- prefixes -----------------------------------------------------------------------------------------


def test_every_prefix_of_a_header_asks_for_more():
    for n in range(len(SMALL_HEAD)):
        with pytest.raises(NeedMoreBytes) as known:
            parse(SMALL[:n], len(SMALL))
        assert n < known.value.n <= len(SMALL)
        with pytest.raises(NeedMoreBytes) as unknown:
            parse(SMALL[:n])
        assert unknown.value.n > n
    for n in range(len(SMALL_HEAD), len(SMALL)):
        assert parse(SMALL[:n], len(SMALL)) == parse(SMALL[:n]) == parse(SMALL, len(SMALL))


def test_every_truncated_file_is_a_format_error():
    for n in range(len(SMALL)):
        with pytest.raises(FormatError, match="truncated") as error:
            parse(SMALL[:n], n)
        assert "download it again" in str(error.value)


def test_a_truncated_tiny_model_is_a_format_error(tmp_path):
    data = write_tiny(tmp_path / "tiny.gguf", n_layers=1).path.read_bytes()
    for n in [*range(0, 12_000, 61), *range(12_000, len(data), 5003), len(data) - 1]:
        with pytest.raises(FormatError, match="truncated"):
            parse(data[:n], n)


def test_prefixes_grow_geometrically(monkeypatch):
    monkeypatch.setattr(gguf, "MIN_PREFIX", 64)
    tokens = b"".join(text(f"token {i}") for i in range(20_000))
    data = header(keys=(key("tokens", ARRAY, array(STRING, 20_000, tokens)),))
    for size in (None, len(data)):
        file, rounds = parse_resumed(data, size)
        assert file.metadata["tokens"][-1] == "token 19999"
        assert rounds <= 1 + math.log2(len(data) / 64)


def test_need_more_bytes_says_how_many():
    with pytest.raises(NeedMoreBytes, match="the first 1048576 bytes") as more:
        parse(b"")
    assert more.value.n == gguf.MIN_PREFIX


def test_a_vocabulary_of_128k_words_is_parsed_quickly():
    """It takes 0.15 s on a 2020s core; the limit is for a busy machine."""
    tokens = b"".join(text(f"token{i}") for i in range(128_256))
    merges = b"".join(text(f"to {i}") for i in range(280_147))
    keys = (
        key("tokens", ARRAY, array(STRING, 128_256, tokens)),
        key("merges", ARRAY, array(STRING, 280_147, merges)),
        key("types", ARRAY, array(I32, 128_256, bytes(4 * 128_256))),
    )
    data = header(keys=keys)
    start = time.process_time()
    parse(data, len(data))
    assert time.process_time() - start < 1.5


# -- broken files: each has one clear line ------------------------------------------------------------


def nested_arrays(depth: int) -> bytes:
    payload = array(U8, 1, b"\x01")
    for _ in range(depth - 1):
        payload = array(ARRAY, 1, payload)
    return payload


HUGE = 2**63
ONE_TENSOR = with_data(header(tensors=(tensor(),)), 32)

BROKEN: dict[str, tuple[bytes, str]] = {
    "random bytes": (b"\x93NUMPY data", r"not a GGUF file: it starts with b'\\x93NUM'.*give a \.gguf file"),
    "one wrong byte": (b"X", "not a GGUF file: it starts with b'X'"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer.*git lfs pull"),
    "web page": (b"<!DOCTYPE html>", "looks like a web page: use the download link"),
    "zip": (b"PK\x03\x04" + bytes(60), "ZIP or PyTorch file: convert"),
    "ggml": (b"lmgg" + bytes(60), "from before GGUF: convert the model again"),
    "version 1": (header(version=1), "version 1 is not supported, only 2 and 3; convert"),
    "version 0": (header(version=0), "version 0 is not supported"),
    "version 4": (header(version=4), "version 4 is not supported, only 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF file; only little-endian"),
    "big-endian version 2": (b"GGUF" + struct.pack(">IQQ", 2, 0, 0), "big-endian"),
    "big-endian magic": (b"FUGG" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2**63 keys": (header(n_keys=HUGE), f"claims {HUGE} metadata keys; at most 65536"),
    "2**63 tensors": (header(n_tensors=HUGE), f"claims {HUGE} tensors; at most 65536"),
    "length of a key": (
        header(keys=(text("k", HUGE) + bytes(9),)),
        "metadata key 0 at byte 24 claims .* bytes",
    ),
    "length of a value": (
        header(keys=(key("k", STRING, text("v", HUGE)),)),
        f"'k' at byte .* claims {HUGE} bytes",
    ),
    "length of an element": (
        header(keys=(key("k", ARRAY, array(STRING, 2, text("v") + text("w", HUGE))),)),
        "element 1 of metadata 'k' at byte .* claims",
    ),
    "length of a tensor name": (
        header(tensors=(text("t", HUGE) + bytes(99),)),
        "name of a tensor at byte 24 claims",
    ),
    "elements of an array": (header(keys=(key("k", ARRAY, array(U8, HUGE)),)), f"'k' claims {HUGE} elements"),
    "elements of a string array": (
        header(keys=(key("k", ARRAY, array(STRING, HUGE)),)),
        "claims .* elements",
    ),
    "elements of a nested array": (header(keys=(key("k", ARRAY, array(ARRAY, HUGE)),)), "claims .* elements"),
    "nested arrays": (header(keys=(key("k", ARRAY, array(ARRAY, 10**6)),)), "claims 1000000 nested arrays"),
    "depth of arrays": (header(keys=(key("k", ARRAY, nested_arrays(5)),)), "'k' nests arrays deeper than 4"),
    "value type": (header(keys=(key("k", 13, b"\0"),)), "metadata 'k' has the unknown value type 13"),
    "element type": (
        header(keys=(key("k", ARRAY, array(99, 1)),)),
        "metadata 'k' has the unknown element type 99",
    ),
    "boolean": (header(keys=(key("k", BOOL, b"\x02"),)), "metadata 'k' is the boolean 2"),
    "boolean in a list": (header(keys=(key("k", ARRAY, array(BOOL, 2, b"\1\3")),)), "'k' is the boolean 3"),
    "key not UTF-8": (header(keys=(key(b"\xff", U8, b"\0"),)), "name of metadata key 0 .* is not UTF-8"),
    "value not UTF-8": (
        header(keys=(key("k", STRING, text(b"\xc3")),)),
        "metadata 'k' at byte .* is not UTF-8",
    ),
    "element not UTF-8": (
        header(keys=(key("k", ARRAY, array(STRING, 2, text("v") + text(b"\xed\xa0\x80"))),)),
        "element 1 of metadata 'k' at byte .* is not UTF-8",
    ),
    "duplicate key": (
        header(keys=(key("k", U8, b"\0"), key("k", U8, b"\0"))),
        "metadata key 'k' occurs twice",
    ),
    "duplicate tensor": (
        with_data(header(tensors=(tensor(), tensor(offset=32))), 64),
        "tensor 't' occurs twice",
    ),
    "alignment 0": (
        header(keys=(key("general.alignment", U32, bytes(4)),)),
        "'general.alignment' is 0; it must be at least 1",
    ),
    "alignment 48": (
        header(keys=(key("general.alignment", U32, struct.pack("<I", 48)),)),
        "'general.alignment' is 48; it must be a power of two",
    ),
    "alignment 2**63": (
        header(keys=(key("general.alignment", U64, struct.pack("<Q", HUGE)),)),
        "'general.alignment' is .*; it must be at most",
    ),
    "alignment of text": (
        header(keys=(key("general.alignment", STRING, text("32")),)),
        "'general.alignment' is '32'; it must be an integer",
    ),
    "no dimensions": (
        header(tensors=(tensor(shape=()) + bytes(8),)),
        "tensor 't' has 0 dimensions; it must have 1 to 4",
    ),
    "five dimensions": (header(tensors=(tensor(shape=(1,) * 5),)), "tensor 't' has 5 dimensions"),
    "2**31 dimensions": (header(tensors=(tensor(n_dims=2**31),)), "has 2147483648 dimensions"),
    "zero dimension": (
        header(tensors=(tensor(shape=(8, 0)),)),
        r"shape \(8, 0\); every dimension must be at least",
    ),
    "dimensions overflow": (
        header(tensors=(tensor(shape=(2**62, 2**62)),)),
        "tensor 't' .* no file is that large",
    ),
    "dimensions overflow 64 bits to 0": (
        header(tensors=(tensor(shape=(2**32, 2**32)),)),
        "no file is that large",
    ),
    "rows of broken blocks": (
        header(tensors=(tensor(shape=(33,), ggml_type=2),)),
        "rows of 33; Q4_0 needs multiples",
    ),
    "offset overflow": (header(tensors=(tensor(offset=2**64 - 32),)), "tensor 't' .* no file is that large"),
    "misaligned": (
        with_data(header(tensors=(tensor(offset=16),)), 64),
        "tensor 't' has offset 16, not a multiple of 32",
    ),
    "overlap": (
        with_data(header(tensors=(tensor("a", (9,)), tensor("b", offset=32))), 64),
        r"tensors 'a' \(to byte 132\) and 'b' \(from 128\) overlap",
    ),
    "same place": (with_data(header(tensors=(tensor("a"), tensor("b"))), 64), "'a' .* and 'b' .* overlap"),
}
BROKEN_FOR_ITS_SIZE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated .*: the fixed part of the header at byte 0 would end at byte 24"),
    "offset outside": (
        with_data(header(tensors=(tensor(offset=64),)), 64),
        "'t' ends at byte .* the file at byte",
    ),
    "shape outside": (
        with_data(header(tensors=(tensor(shape=(2**40,)),)), 64),
        "truncated GGUF file: tensor 't'",
    ),
    "data truncated": (ONE_TENSOR[:-1], "'t' ends at byte 96, the file at byte 95; download it again"),
    "data missing": (header(tensors=(tensor(),)), "truncated GGUF file: tensor 't'"),
    "more keys than bytes": (
        header(n_keys=80) + bytes(1000),
        "80 keys and 0 tensors at byte 24 would end at byte",
    ),
    "more tensors than bytes": (
        header(n_tensors=32) + bytes(1000),
        "0 keys and 32 tensors at byte 24 would end",
    ),
    "key past the end": (
        header(keys=(text("k", 999),), n_keys=1) + bytes(99),
        "metadata key 0 at byte 32 would end",
    ),
    "value past the end": (
        header(keys=(key("k", STRING, text("v", 9999)),)) + bytes(99),
        "metadata 'k' at byte .* would end at byte .* the file ends at byte",
    ),
    "element past the end": (
        header(keys=(key("k", ARRAY, array(STRING, 2, text("v") + text("w", 9999))),)),
        "element 1 of metadata 'k' at byte",
    ),
    "numbers past the end": (
        header(keys=(key("k", ARRAY, array(F64, 10**6)),)) + bytes(99),
        "metadata 'k' at byte .* would end at byte 8000049",
    ),
    "strings past the end": (
        header(keys=(key("k", ARRAY, array(STRING, 10**6)),)),
        "metadata 'k' .* would end",
    ),
    "arrays past the end": (
        header(keys=(key("k", ARRAY, array(ARRAY, 60_000)),)),
        "metadata 'k' .* would end",
    ),
}


def assert_one_clear_line(error: RealmError) -> None:
    line = str(error)
    assert line and len(line) < 400 and line.isprintable()  # with the names of all formats


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_one_clear_error(case):
    data, message = BROKEN[case]
    for size in (len(data), None):
        if size is None and len(data) < 24:
            continue  # not known yet to be broken
        with pytest.raises(FormatError, match=message) as error:
            parse(data, size)
        assert_one_clear_line(error.value)


@pytest.mark.parametrize("case", BROKEN_FOR_ITS_SIZE)
def test_a_header_that_does_not_fit_its_file_is_one_clear_error(case):
    data, message = BROKEN_FOR_ITS_SIZE[case]
    with pytest.raises(FormatError, match=message) as error:
        parse(data, len(data))
    assert_one_clear_line(error.value)


def test_wrong_magic_is_known_at_the_first_byte():
    with pytest.raises(FormatError, match="not a GGUF file"):
        parse(b"<")


@pytest.mark.parametrize(
    ("ggml_type", "named"), [(24, "of type I8"), (4, "of type Q4_2"), (999, "unknown type 999")]
)
def test_an_unsupported_tensor_type_is_named_with_what_is_supported(ggml_type, named):
    with pytest.raises(UnsupportedError, match=f"tensor 'x' is of .*{named.removeprefix('of ')}") as error:
        parse(header(tensors=(tensor("x", (256,), ggml_type),)))
    assert all(name in str(error.value) for name in FORMATS)
    assert_one_clear_line(error.value)


def test_names_from_the_file_cannot_break_the_line_or_the_terminal():
    for name in ("a\nb\x1b[2J", "long" * 9999):
        with pytest.raises(FormatError, match="occurs twice") as error:
            parse(header(keys=(key(name, U8, b"\0"),) * 2))
        assert_one_clear_line(error.value)


def test_a_header_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(gguf, "MAX_HEADER", 200)
    data = header(keys=tuple(key(f"key {i}", U64, bytes(8)) for i in range(20)))
    for size in (None, len(data)):
        with pytest.raises(FormatError, match="a header of at most 200 bytes is accepted"):
            parse(data, size)


def test_hostile_counts_cost_neither_time_nor_memory():
    """Counts just below each cap, with no bytes behind them."""
    heads = [
        header(n_keys=gguf.MAX_COUNT, n_tensors=gguf.MAX_COUNT),
        header(keys=(key("k", ARRAY, array(STRING, gguf.MAX_VALUES)),)),
        header(keys=(key("k", ARRAY, array(F64, gguf.MAX_VALUES)),)),
        header(keys=(key("k", ARRAY, array(ARRAY, gguf.MAX_NESTED)),)),
        header(keys=(key("k", STRING, text("", gguf.MAX_STRING)),)),
        header(tensors=(tensor(shape=(2**16,) * 4),)),
    ]
    tracemalloc.start()
    try:
        for head in heads:
            with pytest.raises(FormatError):
                parse(head, len(head))
            with pytest.raises((FormatError, NeedMoreBytes)):
                parse(head)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_array_elements_are_limited_for_the_whole_file(monkeypatch):
    monkeypatch.setattr(gguf, "MAX_VALUES", 10)
    six = array(U8, 6, bytes(6))
    assert len(parse(header(keys=(key("a", ARRAY, six),))).metadata["a"]) == 6
    with pytest.raises(FormatError, match="'b' claims 6 elements; at most 10 of all arrays together"):
        parse(header(keys=(key("a", ARRAY, six), key("b", ARRAY, six))))


# -- any bytes ----------------------------------------------------------------------------------------


def parses_or_refuses(data: bytes) -> None:
    """A whole file gives a GGUFFile or a RealmError, never a wish for more and never another exception."""
    try:
        file = parse(data, len(data))
    except RealmError as error:
        assert_one_clear_line(error)
    else:
        assert all(t.offset + t.nbytes <= len(data) for t in file.tensors.values())


@pytest.mark.parametrize("value", [0x00, 0x01, 0x7F, 0x80, 0xFF])
def test_every_byte_of_a_file_may_be_wrong(value):
    for i in range(len(SMALL)):
        parses_or_refuses(SMALL[:i] + bytes([value]) + SMALL[i + 1 :])


def test_every_bit_of_a_file_may_be_wrong():
    for i in range(8 * len(SMALL_HEAD)):
        data = bytearray(SMALL)
        data[i // 8] ^= 1 << i % 8
        parses_or_refuses(bytes(data))


@settings(max_examples=200, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(SMALL_HEAD) - 1), st.integers(0, 255)), min_size=1, max_size=8
    ),
    cut=st.integers(0, len(SMALL)),
)
def test_several_wrong_bytes_and_a_cut(flips, cut):
    data = bytearray(SMALL)
    for i, value in flips:
        data[i] = value
    parses_or_refuses(bytes(data))
    parses_or_refuses(bytes(data[:cut]))


@settings(max_examples=200, deadline=None)
@given(
    version=st.sampled_from([2, 3]), n_tensors=st.integers(0, 3), n_keys=st.integers(0, 3), rest=st.binary()
)
def test_random_bytes_after_the_counts(version, n_tensors, n_keys, rest):
    parses_or_refuses(header(version=version, n_tensors=n_tensors, n_keys=n_keys) + rest)


# -- getters ------------------------------------------------------------------------------------------

VALUES = Metadata(
    int=7,
    zero=0,
    float=1.5,
    nan=math.nan,
    inf=math.inf,
    true=True,
    text="x",
    **{
        "ints": [1, 2],
        "floats": [0.5, 1],
        "bad floats": [0.5, math.nan],
        "words": ["a", "b"],
        "mixed": ["a", 1],
    },
)


def test_getters_return_values_of_their_type():
    assert VALUES.get_int("int", minimum=7, maximum=7) == 7
    assert VALUES.get_float("float") == 1.5
    as_float = VALUES.get_float("int")
    assert as_float == 7.0 and type(as_float) is float
    assert VALUES.get_bool("true") is True
    assert VALUES.get_str("text") == "x"
    assert VALUES.get_list("ints", int, length=2) == [1, 2]
    assert VALUES.get_list("floats", float) == [0.5, 1]
    assert VALUES.get_list("words", str) == ["a", "b"]


def test_getters_return_the_default_of_an_absent_key_as_it_is():
    assert VALUES.get_int("absent", default=None) is None
    assert VALUES.get_int("absent", default=3, minimum=5) == 3
    assert VALUES.get_float("absent", default=0.5) == 0.5
    assert VALUES.get_bool("absent", default=False) is False
    assert VALUES.get_str("absent", default=None) is None
    assert VALUES.get_list("absent", str, default=None) is None
    assert VALUES.get_int("zero", default=1) == 0


GETTER_ERRORS = {
    "absent integer": (lambda: VALUES.get_int("absent"), "metadata 'absent' is missing"),
    "absent list": (lambda: VALUES.get_list("absent", int), "metadata 'absent' is missing"),
    "float for an integer": (lambda: VALUES.get_int("float"), "'float' is 1.5; it must be an integer"),
    "boolean for an integer": (lambda: VALUES.get_int("true"), "'true' is True; it must be an integer"),
    "list for an integer": (lambda: VALUES.get_int("ints"), "'ints' is a list of 2; it must be an integer"),
    "too small": (lambda: VALUES.get_int("int", minimum=8), "'int' is 7; it must be at least 8"),
    "too large": (lambda: VALUES.get_int("int", maximum=6), "'int' is 7; it must be at most 6"),
    "small with the same default": (
        lambda: VALUES.get_int("int", default=7, minimum=8),
        "must be at least 8",
    ),
    "nan": (lambda: VALUES.get_float("nan"), "'nan' is nan; it must be a finite number"),
    "infinity": (lambda: VALUES.get_float("inf", default=1.0), "'inf' is inf; it must be a finite number"),
    "text for a float": (lambda: VALUES.get_float("text"), "'text' is 'x'; it must be a finite number"),
    "float too small": (
        lambda: VALUES.get_float("float", minimum=2),
        "'float' is 1.5; it must be at least 2",
    ),
    "integer for a boolean": (lambda: VALUES.get_bool("zero"), "'zero' is 0; it must be true or false"),
    "integer for a string": (lambda: VALUES.get_str("int"), "'int' is 7; it must be a string"),
    "string for a list": (lambda: VALUES.get_list("text", str), "'text' is 'x'; it must be a list"),
    "element type": (
        lambda: VALUES.get_list("mixed", str),
        "'mixed': element 1 is 1; it must be of type str",
    ),
    "nan element": (
        lambda: VALUES.get_list("bad floats", float),
        "element 1 is nan; it must be a finite number",
    ),
    "list length": (lambda: VALUES.get_list("ints", int, length=3), "'ints' has 2 elements; it must have 3"),
}


@pytest.mark.parametrize("case", GETTER_ERRORS)
def test_getters_name_the_key_and_what_it_must_be(case):
    get, message = GETTER_ERRORS[case]
    with pytest.raises(FormatError, match=message) as error:
        get()
    assert_one_clear_line(error.value)


def test_a_tensor_is_asked_for_by_name_and_shape():
    file = parse(SMALL, len(SMALL))
    assert file.tensor("a", (8, 2)) is file.tensor("a") is file.tensors["a"]
    with pytest.raises(FormatError, match="tensor 'c' is missing"):
        file.tensor("c")
    with pytest.raises(FormatError, match=r"tensor 'a' has shape \(8, 2\); the metadata asks for \(2, 8\)"):
        file.tensor("a", (2, 8))


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(gguf).failed == 0
