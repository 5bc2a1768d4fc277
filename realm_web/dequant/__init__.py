"""numpy oracles of the weight formats: decode ggml blocks, repack them, decode the packed layout.

The layouts are described in `quants.py`. `dequantize` is bit-equal to ggml's reference (`gguf.quants` in
Python), `repack` is the twin of the GPU's repack kernels, and `unpack(repack(raw))` equals `dequantize(raw)`
bit for bit. The CPU device decodes with these functions; nothing that a page loads imports this package.
"""

from collections.abc import Mapping

import numpy as np

from realm_web.dequant import blocks, gridblocks, kblocks
from realm_web.dequant.bits import Codec, Parts, words
from realm_web.quants import CHUNK, FORMATS, QuantFormat

CODECS: dict[str, Codec] = {**blocks.CODECS, **kblocks.CODECS, **gridblocks.CODECS}


def dequantize(format_name: str, raw: np.ndarray) -> np.ndarray:
    """ggml blocks uint8 `(n_blocks, block_bytes)` to weights float32 `(n_blocks, block_elements)`."""
    fmt = FORMATS[format_name]
    codec, checked = CODECS[format_name], _blocks(fmt, raw)
    if codec.dequantize:
        weights = codec.dequantize(checked)
    else:
        weights = codec.unpack({name: words(part) for name, part in codec.repack(checked).items()})
    return weights.reshape(-1, fmt.block_elements)


def repack(format_name: str, raw: np.ndarray) -> Parts:
    """ggml blocks uint8 `(n_blocks, block_bytes)` to the packed layout: flat uint32 arrays by part name.

    The blocks must be whole chunks (a multiple of 32 blocks for F32, F16 and BF16); ValueError otherwise.
    """
    fmt = FORMATS[format_name]
    checked = _blocks(fmt, raw)
    if checked.shape[0] * fmt.block_elements % CHUNK:
        raise ValueError(f"{checked.shape[0]} {fmt.name} blocks are not whole chunks of {CHUNK} weights")
    parts = CODECS[format_name].repack(checked)
    return {part.name: words(parts[part.name]) for part in fmt.parts}


def unpack(format_name: str, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The packed layout (as `repack` returns it) to weights float32 `(n_blocks, block_elements)`."""
    fmt = FORMATS[format_name]
    if set(parts) != {part.name for part in fmt.parts}:
        raise ValueError(f"{fmt.name} has parts {[part.name for part in fmt.parts]}, not {sorted(parts)}")
    weights = CODECS[format_name].unpack({name: words(part) for name, part in parts.items()})
    return weights.reshape(-1, fmt.block_elements)


def _blocks(fmt: QuantFormat, raw: np.ndarray) -> np.ndarray:
    if raw.dtype != np.uint8 or raw.ndim != 2 or raw.shape[1] != fmt.block_bytes:
        raise ValueError(f"{fmt.name} blocks are uint8 (n, {fmt.block_bytes}), not {raw.dtype} {raw.shape}")
    return np.ascontiguousarray(raw)
