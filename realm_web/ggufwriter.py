"""The header of a GGUF file to write: metadata entries as bytes, the table of tensors. Pure, as `gguf.py`.

Knows the container, and does no I/O. Metadata is copied entry by entry as bytes, so that nothing is lost that
parsed values do not show: the width of a number, the order of keys.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from realm_web.quants import FORMATS

VERSION = 3
_U32, _STRING, _ARRAY = 4, 8, 9  # value types
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write. `shape` is in GGUF order, the row length first."""

    name: str
    shape: tuple[int, ...]
    type_name: str

    @property
    def nbytes(self) -> int:
        return FORMATS[self.type_name].nbytes(math.prod(self.shape))


def entries(header: bytes) -> dict[str, bytes]:
    """The metadata of a header that `gguf.parse` has accepted: key to entry, with key and type."""
    (n_keys,) = struct.unpack_from("<Q", header, 16)
    found, pos = {}, 24
    for _ in range(n_keys):
        start = pos
        pos = _string_end(header, pos)
        key = header[start + 8 : pos].decode()
        (value_type,) = struct.unpack_from("<I", header, pos)
        pos = _value_end(header, pos + 4, value_type)
        found[key] = header[start:pos]
    return found


def u32_entry(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", _U32, value)


def header(metadata: Iterable[bytes], tensors: Sequence[NewTensor], alignment: int) -> bytes:
    """All bytes before the data of the first tensor, for tensors that follow one another, each padded."""
    entries = list(metadata)
    out = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(entries)), *entries]
    offset = 0
    for tensor in tensors:
        shape, type_id = tensor.shape, FORMATS[tensor.type_name].ggml_id
        out.append(_string(tensor.name))
        out.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_id, offset))
        offset += tensor.nbytes + padding(tensor.nbytes, alignment)
    data = b"".join(out)
    return data + bytes(padding(len(data), alignment))


def padding(nbytes: int, alignment: int) -> int:
    """Zero bytes after `nbytes` up to the next multiple.

    >>> padding(33, 32), padding(64, 32)
    (31, 0)
    """
    return -nbytes % alignment


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _string_end(data: bytes, pos: int) -> int:
    return pos + 8 + struct.unpack_from("<Q", data, pos)[0]


def _value_end(data: bytes, pos: int, value_type: int) -> int:
    if value_type == _STRING:
        return _string_end(data, pos)
    if value_type != _ARRAY:
        return pos + _SIZES[value_type]
    element_type, count = struct.unpack_from("<IQ", data, pos)
    pos += 12
    if element_type in _SIZES:
        return pos + count * _SIZES[element_type]
    for _ in range(count):
        pos = _value_end(data, pos, element_type)
    return pos
