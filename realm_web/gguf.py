"""The header of a GGUF file: metadata and the table of tensors. Pure: bytes in, `GGUFFile` out.

Knows the container (versions 2 and 3, little-endian). Does no I/O, and does not know which keys and tensors a
model needs. `parse` is resumable: on a prefix of the file it either finishes or raises `NeedMoreBytes`, which
asks for geometrically longer prefixes, so that a header of n bytes costs O(n) to parse however it arrives:

    data = b""
    while True:
        try:
            return parse(data, file_size)
        except NeedMoreBytes as more:
            data = read(0, more.n)

A hostile file is refused in bounded time and memory: every count is checked against the bytes that could hold
it and against the caps below, before anything of that size is made.

Layout: magic "GGUF", u32 version, u64 number of tensors, u64 number of keys; per key: string, u32 type,
value; per tensor: string, u32 number of dimensions, u64 each, u32 type, u64 offset; padding to
`general.alignment` (32); tensor data. A string is u64 length + UTF-8, an array u32 element type + u64 length
+ elements.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from realm_web.errors import FormatError, UnsupportedError
from realm_web.quants import BY_ID, FORMATS, GGML_TYPE_NAMES, QuantFormat

MAX_HEADER = 256 << 20  # bytes before the tensor data; 128k-256k word vocabularies take 4 to 20 MB
MAX_STRING = 16 << 20  # bytes of one string
MAX_NAME = 65535  # bytes of a key or a tensor name, as the GGUF specification says
MAX_COUNT = 1 << 16  # keys, and tensors
MAX_VALUES = 1 << 23  # array elements of all metadata together; a 256k vocabulary has 1.3 million
MAX_NESTING = 4  # arrays in arrays; llama.cpp writes none
MAX_NESTED = 1 << 16  # arrays that are elements of arrays, all together
MAX_DIMS = 4  # as ggml
MAX_FILE = 1 << 50  # bytes: 1 PiB
MAX_ALIGNMENT = 1 << 30
MIN_PREFIX = 1 << 20  # the first NeedMoreBytes asks for at least this many bytes

_MAGIC = b"GGUF"
_FIXED = 24  # magic, version, two counts
_MIN_KEY_BYTES = 13  # empty name, type, one byte
_MIN_TENSOR_BYTES = 32  # empty name, one dimension
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {  # value type: struct format
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    _BOOL: "B",
    10: "Q",
    11: "q",
    12: "d",
}

Value = int | float | bool | str | list
_T = TypeVar("_T")


class _Required:
    """The default of a getter that has none: an absent key is an error."""


_REQUIRED = _Required()


class NeedMoreBytes(Exception):
    """The header goes on after the given prefix: call `parse` again with the first `n` bytes of the file."""

    def __init__(self, n: int) -> None:
        super().__init__(f"the GGUF header needs the first {n} bytes of the file")
        self.n = n


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is. `shape` is in GGUF order: shape[0] is the contiguous dimension (the row length)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int  # of the first byte in the file
    nbytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def format(self) -> QuantFormat:
        return BY_ID[self.ggml_type]

    @property
    def type_name(self) -> str:
        return self.format.name


class Metadata(dict[str, Value]):
    """The key-value pairs, with getters that check type, range and finiteness and name the key when wrong.

    Without a default an absent key is a FormatError. A boolean is not a number here; an integer is a float.

    >>> md = Metadata({"llama.block_count": 30, "llama.rope.freq_base": float("nan")})
    >>> md.get_int("llama.block_count", minimum=1)
    30
    >>> md.get_float("llama.rope.scale", default=1.0)
    1.0
    >>> md.get_float("llama.rope.freq_base")
    Traceback (most recent call last):
    realm_web.errors.FormatError: metadata 'llama.rope.freq_base' is nan; it must be a finite number
    """

    def get_int(
        self,
        key: str,
        default: int | _T | _Required = _REQUIRED,
        *,
        minimum: int | None = None,
        maximum: int | None = None,
    ) -> int | _T:
        if self._absent(key, default):
            return default
        value = self._typed(key, (int,), "an integer")
        _check_range(key, value, minimum, maximum)
        return value

    def get_float(
        self,
        key: str,
        default: float | _T | _Required = _REQUIRED,
        *,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float | _T:
        if self._absent(key, default):
            return default
        value = self._typed(key, (float, int), "a finite number")
        if not math.isfinite(value):
            raise FormatError(f"metadata {show(key)} is {show(value)}; it must be a finite number")
        _check_range(key, value, minimum, maximum)
        return float(value)

    def get_bool(self, key: str, default: bool | _T | _Required = _REQUIRED) -> bool | _T:
        return default if self._absent(key, default) else self._typed(key, (bool,), "true or false")

    def get_str(self, key: str, default: str | _T | _Required = _REQUIRED) -> str | _T:
        return default if self._absent(key, default) else self._typed(key, (str,), "a string")

    def get_list(
        self,
        key: str,
        of: type,
        default: list | _T | _Required = _REQUIRED,
        *,
        length: int | None = None,
    ) -> list | _T:
        """A list whose elements are all of the type `of`: str, int, bool, list, or float (finite numbers)."""
        if self._absent(key, default):
            return default
        value = self._typed(key, (list,), "a list")
        allowed = (float, int) if of is float else (of,)
        for i, element in enumerate(value):
            if type(element) not in allowed or (of is float and not math.isfinite(element)):
                kind = "a finite number" if of is float else f"of type {of.__name__}"
                raise FormatError(f"metadata {show(key)}: element {i} is {show(element)}; it must be {kind}")
        if length is not None and len(value) != length:
            raise FormatError(f"metadata {show(key)} has {len(value)} elements; it must have {length}")
        return value

    def _absent(self, key: str, default: object) -> bool:
        if key not in self and isinstance(default, _Required):
            raise FormatError(f"metadata {show(key)} is missing; is the file complete, and a language model?")
        return key not in self

    def _typed(self, key: str, types: tuple[type, ...], kind: str):
        value = self[key]
        if type(value) not in types:
            raise FormatError(f"metadata {show(key)} is {show(value)}; it must be {kind}")
        return value


@dataclass(frozen=True)
class GGUFFile:
    """A parsed header, checked against the file's size if that was given. Tensors are in file order."""

    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    header_size: int  # bytes up to the padding before the tensor data
    data_offset: int  # of the tensor data in the file
    alignment: int

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """The tensor of this name and, if given, this shape (GGUF order); FormatError otherwise."""
        if name not in self.tensors:
            raise FormatError(f"tensor {show(name)} is missing; is the file complete?")
        info = self.tensors[name]
        if shape is not None and info.shape != tuple(shape):
            raise FormatError(
                f"tensor {show(name)} has shape {info.shape}; the metadata asks for {tuple(shape)}"
            )
        return info


def parse(data: bytes | bytearray | memoryview, file_size: int | None = None) -> GGUFFile:
    """Parse the header at the start of `data`, a prefix of a file of `file_size` bytes (None: not known).

    Raises NeedMoreBytes while the prefix is too short, FormatError when the file is broken or too short for
    its header or its tensors, UnsupportedError for a tensor type that we cannot compute with.
    """
    reader = _Reader(data, file_size)
    version = _read_version(reader)
    n_tensors = reader.unpack("Q", "the number of tensors")
    n_keys = reader.unpack("Q", "the number of metadata keys")
    for count, what in ((n_tensors, "tensors"), (n_keys, "metadata keys")):
        if count > MAX_COUNT:
            raise _broken(f"it claims {count} {what}; at most {MAX_COUNT} are accepted")
    reader.check_room(
        n_keys * _MIN_KEY_BYTES + n_tensors * _MIN_TENSOR_BYTES, f"{n_keys} keys and {n_tensors} tensors"
    )

    metadata = _read_metadata(reader, n_keys)
    alignment = metadata.get_int("general.alignment", default=32, minimum=1, maximum=MAX_ALIGNMENT)
    if alignment & (alignment - 1):
        raise FormatError(f"metadata 'general.alignment' is {alignment}; it must be a power of two")
    headers = [_read_tensor(reader) for _ in range(n_tensors)]
    data_offset = -(-reader.pos // alignment) * alignment
    tensors = _place_tensors(headers, data_offset, alignment, file_size)
    return GGUFFile(version, metadata, tensors, reader.pos, data_offset, alignment)


# -- reading ------------------------------------------------------------------------------------------


class _Reader:
    """A cursor over the prefix. Reads past its end raise NeedMoreBytes, or FormatError if they never can."""

    def __init__(self, data: bytes | bytearray | memoryview, file_size: int | None) -> None:
        end = MAX_HEADER if file_size is None else min(MAX_HEADER, file_size)
        self.data = memoryview(data).cast("B")[:end]
        self.file_size = file_size
        self.pos = 0
        self.n_values = 0  # array elements so far
        self.n_nested = 0  # of them arrays

    def check_room(self, n: int, what: str) -> None:
        """FormatError if the file cannot hold `n` more bytes."""
        end = self.pos + n
        if self.file_size is not None and end > self.file_size:
            raise FormatError(
                f"truncated or broken GGUF file: {what} at byte {self.pos} would end at byte {end}, "
                f"the file ends at byte {self.file_size}; download it again"
            )
        if end > MAX_HEADER:
            raise _broken(
                f"{what} at byte {self.pos} would end at byte {end}; "
                f"a header of at most {MAX_HEADER} bytes is accepted"
            )

    def need(self, n: int, what: str) -> None:
        """Make sure that the next `n` bytes are here."""
        end = self.pos + n
        if end <= len(self.data):
            return
        self.check_room(n, what)
        longer = max(end, 2 * len(self.data), MIN_PREFIX)
        raise NeedMoreBytes(min(longer, MAX_HEADER, self.file_size if self.file_size is not None else longer))

    def unpack(self, code: str, what: str):
        """One little-endian number."""
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.data, self.pos)
        self.pos += size
        return value

    def string(self, what: str, limit: int = MAX_STRING) -> str:
        start = self.pos
        length = self.unpack("Q", f"the length of {what}")
        if length > limit:
            raise _broken(f"{what} at byte {start} claims {length} bytes; the limit is {limit}")
        self.need(length, what)
        raw = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise _broken(f"{what} at byte {start} is not UTF-8 ({error.reason})") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. The loop is inlined: vocabularies have hundreds of thousands."""
        self.need(8 * count, what)
        data, size, length_at = self.data, len(self.data), struct.Struct("<Q").unpack_from
        pos, out = self.pos, []
        for _ in range(count):
            start = pos + 8
            if start > size:
                break
            end = start + length_at(data, pos)[0]
            if end > size or end - start > MAX_STRING:
                break
            try:
                out.append(str(data[start:end], "utf-8"))
            except UnicodeDecodeError:
                break
            pos = end
        self.pos = pos
        while len(out) < count:  # string() raises: it says what is wrong with the element that stopped us
            out.append(self.string(f"element {len(out)} of {what}"))
        return out


def _read_version(reader: _Reader) -> int:
    start = bytes(reader.data[: len(_MAGIC)])
    if not _MAGIC.startswith(start):
        raise FormatError(_not_gguf(start))
    reader.need(_FIXED, "the fixed part of the header")
    reader.pos = len(_MAGIC)
    version = reader.unpack("I", "the version")
    if version in (2, 3):
        return version
    if version == 1:
        raise FormatError(
            "GGUF version 1 is not supported, only 2 and 3; convert the model again with llama.cpp"
        )
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
        raise FormatError("big-endian GGUF file; only little-endian files are supported: get that variant")
    raise FormatError(f"GGUF version {version} is not supported, only 2 and 3; is the file damaged?")


def _not_gguf(start: bytes) -> str:
    """What the file seems to be instead, from its first four bytes."""
    if start == _MAGIC[::-1]:
        return "big-endian GGUF file; only little-endian files are supported: get that variant"
    guesses = {
        b"vers": "it looks like a Git LFS pointer: fetch the real file with `git lfs pull`",
        b"<!do": "it looks like a web page: use the download link of the .gguf file",
        b"<!DO": "it looks like a web page: use the download link of the .gguf file",
        b"<htm": "it looks like a web page: use the download link of the .gguf file",
        b"PK\x03\x04": "it looks like a ZIP or PyTorch file: convert the model with llama.cpp",
        b"lmgg": "it looks like a GGML file from before GGUF: convert the model again with llama.cpp",
        b"tjgg": "it looks like a GGML file from before GGUF: convert the model again with llama.cpp",
    }
    hint = guesses.get(start, "give a .gguf file")
    return f"not a GGUF file: it starts with {start!r}, not {_MAGIC!r}; {hint}"


def _read_metadata(reader: _Reader, n_keys: int) -> Metadata:
    metadata = Metadata()
    for i in range(n_keys):
        key = reader.string(f"the name of metadata key {i}", MAX_NAME)
        if key in metadata:
            raise _broken(f"metadata key {show(key)} occurs twice")
        what = f"metadata {show(key)}"
        metadata[key] = _read_value(reader, reader.unpack("I", f"the type of {what}"), what, 0)
    return metadata


def _read_value(reader: _Reader, value_type: int, what: str, depth: int) -> Value:
    if value_type == _STRING:
        return reader.string(what)
    if value_type == _ARRAY:
        return _read_array(reader, what, depth + 1)
    if value_type not in _SCALARS:
        raise _broken(f"{what} has the unknown value type {value_type}")
    value = reader.unpack(_SCALARS[value_type], what)
    return _boolean(value, what) if value_type == _BOOL else value


def _read_array(reader: _Reader, what: str, depth: int) -> list:
    if depth > MAX_NESTING:
        raise _broken(f"{what} nests arrays deeper than {MAX_NESTING}")
    element_type = reader.unpack("I", f"the element type of {what}")
    count = reader.unpack("Q", f"the length of {what}")
    reader.n_values += count
    if reader.n_values > MAX_VALUES:
        raise _broken(
            f"{what} claims {count} elements; at most {MAX_VALUES} of all arrays together are accepted"
        )
    if element_type == _STRING:
        return reader.strings(count, what)
    if element_type == _ARRAY:
        reader.n_nested += count
        if reader.n_nested > MAX_NESTED:
            raise _broken(f"{what} claims {count} nested arrays; at most {MAX_NESTED} are accepted")
        reader.check_room(12 * count, what)  # element type and length of each
        return [_read_array(reader, f"element {i} of {what}", depth + 1) for i in range(count)]
    if element_type not in _SCALARS:
        raise _broken(f"{what} has the unknown element type {element_type}")
    packed = struct.Struct(f"<{count}{_SCALARS[element_type]}")
    reader.need(packed.size, what)
    values = list(packed.unpack_from(reader.data, reader.pos))
    reader.pos += packed.size
    return [_boolean(value, what) for value in values] if element_type == _BOOL else values


def _boolean(value: int, what: str) -> bool:
    if value > 1:
        raise _broken(f"{what} is the boolean {value}; it must be 0 or 1")
    return value == 1


# -- tensors ------------------------------------------------------------------------------------------


def _read_tensor(reader: _Reader) -> TensorInfo:
    """One entry of the tensor table; its `offset` is still relative to the tensor data."""
    name = reader.string("the name of a tensor", MAX_NAME)
    what = f"tensor {show(name)}"
    n_dims = reader.unpack("I", f"the number of dimensions of {what}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise _broken(f"{what} has {n_dims} dimensions; it must have 1 to {MAX_DIMS}")
    shape = tuple(reader.unpack("Q", f"the shape of {what}") for _ in range(n_dims))
    ggml_type = reader.unpack("I", f"the type of {what}")
    offset = reader.unpack("Q", f"the offset of {what}")
    fmt = _format_of(ggml_type, what)
    if 0 in shape:
        raise _broken(f"{what} has shape {shape}; every dimension must be at least 1")
    if shape[0] % fmt.block_elements:
        raise _broken(f"{what} has rows of {shape[0]}; {fmt.name} needs multiples of {fmt.block_elements}")
    nbytes = fmt.nbytes(math.prod(shape))
    if offset + nbytes > MAX_FILE:
        raise _broken(f"{what} has shape {shape} at offset {offset}; no file is that large")
    return TensorInfo(name, shape, ggml_type, offset, nbytes)


def _format_of(ggml_type: int, what: str) -> QuantFormat:
    if ggml_type in BY_ID:
        return BY_ID[ggml_type]
    supported = ", ".join(FORMATS)
    if ggml_type in GGML_TYPE_NAMES:
        raise UnsupportedError(
            f"{what} is of type {GGML_TYPE_NAMES[ggml_type]}, not supported; supported are {supported}"
        )
    raise UnsupportedError(f"{what} is of the unknown type {ggml_type}; supported are {supported}")


def _place_tensors(
    headers: list[TensorInfo], data_offset: int, alignment: int, file_size: int | None
) -> dict[str, TensorInfo]:
    """Absolute offsets; checks that the tensors are distinct, aligned, apart and inside the file."""
    tensors: dict[str, TensorInfo] = {}
    for t in headers:
        if t.name in tensors:
            raise _broken(f"tensor {show(t.name)} occurs twice")
        if t.offset % alignment:
            raise _broken(f"tensor {show(t.name)} has offset {t.offset}, not a multiple of {alignment}")
        tensors[t.name] = TensorInfo(t.name, t.shape, t.ggml_type, data_offset + t.offset, t.nbytes)
    by_offset = sorted(tensors.values(), key=lambda t: t.offset)
    for one, other in pairwise(by_offset):
        if one.offset + one.nbytes > other.offset:
            raise _broken(
                f"tensors {show(one.name)} (to byte {one.offset + one.nbytes}) "
                f"and {show(other.name)} (from {other.offset}) overlap"
            )
    end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
    if file_size is not None and end > file_size:
        raise FormatError(
            f"truncated GGUF file: tensor {show(by_offset[-1].name)} ends at byte {end}, "
            f"the file at byte {file_size}; download it again"
        )
    return tensors


# -- messages and checks ------------------------------------------------------------------------------


def _broken(message: str) -> FormatError:
    return FormatError(f"broken GGUF file: {message}")


def show(value: object) -> str:
    """A value of the file for an error message: one line, no control characters, short."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value[:64] if isinstance(value, str) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_range(key: str, value: float, minimum: float | None, maximum: float | None) -> None:
    if minimum is not None and value < minimum:
        raise FormatError(f"metadata {show(key)} is {value}; it must be at least {minimum}")
    if maximum is not None and value > maximum:
        raise FormatError(f"metadata {show(key)} is {value}; it must be at most {maximum}")
