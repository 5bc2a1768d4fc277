"""The table of weight formats: how ggml stores a tensor, and how we store it on the device.

Knows sizes, names and the packed layout of every format. Knows no device, no numpy, and does not decode:
`shaders/quant/<format>.wgsl` decodes on the GPU, `dequant/` is the numpy oracle of both layouts.

**Packed layout.** ggml blocks are 18, 20, 34, 144 or 210 bytes long, so on the GPU nearly every load of a
raw block is unaligned. Loading repacks each tensor once, block by block, into a few arrays ("parts") of
aligned words. All parts are flat over the tensor in row-major order. A *chunk* is 32 consecutive weights of a
row; rows are a multiple of 32 long, so chunk `row * (K / 32) + k / 32` holds weight `(row, k)`.

The codes of a chunk come in five shapes:
- nibbles, 16 bytes (one `vec4<u32>`): byte i holds weight i low and weight i + 16 high;
- pairs, 16 bytes: nibbles too, but byte i holds weight 2i low and weight 2i + 1 high, so that a byte is an
  index into a table of the bytes of two neighbours;
- crumbs (two bits), 8 bytes (one `vec2<u32>`): byte b of word w holds weight 16w + 4k + b at bit 2k;
- lanes (one bit), one word: byte b holds weight 4i + b at bit i;
- rows of a grid (`grids.py`): an index names 4 or 8 weights. Formats with a grid have one more binding after
  their parts: the table of its rows, the same for all tensors.

From nibbles, crumbs and lanes a shift and a mask of a word take four weights, one in each byte.

| format | part | per | content |
|---|---|---|---|
| F32 | q | chunk, 8 vec4 | the 32 floats |
| F16, BF16 | q | chunk, 4 vec4 | two values per word, the first in the low half |
| Q4_0, Q4_1 | q | chunk, 1 vec4 | nibbles |
| | s | chunk, 1 word | f16 d low, f16 m high (Q4_0: m = 0, and a weight is d * (q - 8)) |
| Q5_0, Q5_1 | q, s | | as Q4_0, Q4_1 (Q5_0: a weight is d * (q - 16)) |
| | h | chunk, 1 word | lanes: the fifth bit |
| Q8_0 | q | chunk, 2 vec4 | 32 int8 |
| | s | chunk, 1 word | f16 d low |
| Q4_K | h | 256-block, 1 vec4 | f16 d, f16 dmin; by nibbles of the 8 chunks: low bits of scales; of minima; |
| | | | high two bits of the scale and of the minimum |
| | q | chunk, 1 vec4 | nibbles |
| Q5_K | h, q | | as Q4_K |
| | b | chunk, 1 word | lanes: the fifth bit |
| Q6_K | q | chunk, 1 vec4 | nibbles |
| | b | chunk, 1 vec2 | crumbs: the high two bits |
| | s | chunk, 1 word | int8 scale of weights 0-15, int8 scale of weights 16-31, f16 d in the high half |
| Q2_K | q | chunk, 1 vec2 | crumbs |
| | s | 256-block, 5 words | f16 d, f16 dmin; 16 bytes, for 16 weights each: scale low, minimum high nibble |
| Q3_K | q | chunk, 1 vec2 | crumbs: the low two bits |
| | b | chunk, 1 word | lanes: the third bit |
| | s | 256-block, 5 words | f16 d; 16 bytes, for 16 weights each: scale + 32 |
| IQ4_NL | q | chunk, 1 vec4 | pairs |
| | s | chunk, 1 word | f16 d low; a weight is d * codebook[q] |
| IQ4_XS | h | 256-block, 1 vec2 | the raw header: f16 d, high pairs and low nibbles of the scales |
| | q | chunk, 1 vec4 | pairs |
| TQ1_0, TQ2_0 | q | chunk, 1 vec2 | crumbs: weight / d + 1 |
| | s | 256-block, 1 word | f16 d |
| MXFP4 | q | chunk, 1 vec4 | pairs |
| | s | chunk, 1 word | the scale as f32 (half of it, as the codebook is doubled) |
| NVFP4 | q | chunk, 1 vec4 | pairs |
| | s | chunk, 1 word | the halved scales as f16: of weights 0-15 low, of weights 16-31 high |
| Q1_0 | q | chunk, 1 word | lanes: 1 for d, 0 for -d |
| | s | 128-block, 1 word | f16 d |
| Q2_0 | q | chunk, 1 vec2 | crumbs: weight / d + 1 |
| | s | 64-block, 1 word | f16 d |
| IQ2_XXS | q | chunk, 1 vec2 | x: 4 row indices; y: lanes of signs |
| | s | 256-block, 2 words | f16 d; a nibble per chunk: scale |
| IQ2_XS | q | chunk, 1 vec2 | x: low 8 bits of 4 row indices; y: lanes of signs |
| | s | 256-block, 4 words | f16 d; a nibble per chunk: ninth bits of the indices; a byte per chunk: scale |
| | | | of weights 0-15 low, of weights 16-31 high |
| IQ2_S | q | chunk, 1 vec2 | as IQ2_XS |
| | s | 256-block, 5 words | f16 d; a half per chunk: high 2 bits of the indices, then scales as IQ2_XS |
| IQ3_XXS | q | chunk, 1 vec2 | 8 row indices of 8 bits, 4 weights each |
| | s | 256-block, 10 words | f16 d; a nibble per chunk: scale; a word per chunk: lanes of signs |
| IQ3_S | q | chunk, 1 vec2 | low 8 bits of 8 row indices |
| | s | 256-block, 12 words | f16 d; a nibble per chunk: scale; a byte: high bits of indices; a word: signs |
| IQ1_S | q | chunk, 1 word | rows 0 and 1, 11 bits each; the low 10 bits of row 2 |
| | s | 256-block, 5 words | f16 d; a half per chunk: the high bit of row 2, row 3 (11 bits), scale (3 |
| | | | bits), 1 where delta is up |
| IQ1_M | q | chunk, 1 word | as IQ1_S |
| | s | 256-block, 6 words | f16 d; for each chunk 2 bits: the high ones of its scales; a nibble: the |
| | | | low pairs; a half: the high bit of row 2, row 3, for each row 1 where delta is up |
"""

from dataclasses import dataclass

CHUNK = 32  # weights per chunk of the packed layout


def activation_words(k: int) -> int:
    """u32 of a row of k activations in 8 bits (`shaders/lib/ints.wgsl`): bytes, then d and sums by chunk."""
    return 12 * (k // CHUNK)


CODEBOOK_FORMATS = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")
# Of these a thread may load two neighbouring chunks at once, with the scales that they share.
RUN_FORMATS = ("Q1_0", "TQ1_0", "TQ2_0", "Q2_0", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")

WORDS_OF_TYPE = {"u32": 1, "vec2<u32>": 2, "vec4<u32>": 4}  # what a part's binding may be an array of


@dataclass(frozen=True)
class Part:
    """One array of the packed layout: `array<wgsl_type>` on the device, `block_bytes` per ggml block."""

    name: str
    wgsl_type: str
    block_bytes: int

    @property
    def item_bytes(self) -> int:
        """Bytes of one array element."""
        return 4 * WORDS_OF_TYPE[self.wgsl_type]


@dataclass(frozen=True)
class QuantFormat:
    """A ggml tensor type that we can compute with."""

    name: str
    ggml_id: int
    block_elements: int  # weights per ggml block
    block_bytes: int  # bytes per ggml block in the file
    parts: tuple[Part, ...]
    grid: str = ""  # the table that its kernels bind after the parts, if any: a key of `grids.GRIDS`

    @property
    def is_quantised(self) -> bool:
        """Not plain floats: weights are small integers with scales, or rows of a table."""
        return self.block_elements > 1

    @property
    def has_table(self) -> bool:
        """Whether codes are looked up: in a grid, or in a codebook of 16 values."""
        return bool(self.grid) or self.name in CODEBOOK_FORMATS

    @property
    def n_bindings(self) -> int:
        """Storage bindings that a kernel needs to decode a weight."""
        return len(self.parts) + bool(self.grid)

    @property
    def packed_block_bytes(self) -> int:
        """Bytes per ggml block in the packed layout, all parts together."""
        return sum(part.block_bytes for part in self.parts)

    def n_blocks(self, n_elements: int) -> int:
        """ggml blocks that hold `n_elements` weights; ValueError unless they are whole."""
        blocks, rest = divmod(n_elements, self.block_elements)
        if rest:
            raise ValueError(
                f"{n_elements} weights are not whole {self.name} blocks of {self.block_elements}"
            )
        return blocks

    def nbytes(self, n_elements: int) -> int:
        """Bytes of `n_elements` weights in the file."""
        return self.n_blocks(n_elements) * self.block_bytes

    def packed_nbytes(self, n_elements: int) -> dict[str, int]:
        """Bytes of `n_elements` weights in the packed layout, by part name."""
        blocks = self.n_blocks(n_elements)
        return {part.name: blocks * part.block_bytes for part in self.parts}


def _vec4(name: str, block_bytes: int) -> Part:
    return Part(name, "vec4<u32>", block_bytes)


def _vec2(name: str, block_bytes: int) -> Part:
    return Part(name, "vec2<u32>", block_bytes)


def _words(name: str, block_bytes: int) -> Part:
    return Part(name, "u32", block_bytes)


FORMATS: dict[str, QuantFormat] = {
    fmt.name: fmt
    for fmt in (
        QuantFormat("F32", 0, 1, 4, (_vec4("q", 4),)),
        QuantFormat("F16", 1, 1, 2, (_vec4("q", 2),)),
        QuantFormat("BF16", 30, 1, 2, (_vec4("q", 2),)),
        QuantFormat("Q4_0", 2, 32, 18, (_vec4("q", 16), _words("s", 4))),
        QuantFormat("Q4_1", 3, 32, 20, (_vec4("q", 16), _words("s", 4))),
        QuantFormat("Q5_0", 6, 32, 22, (_vec4("q", 16), _words("s", 4), _words("h", 4))),
        QuantFormat("Q5_1", 7, 32, 24, (_vec4("q", 16), _words("s", 4), _words("h", 4))),
        QuantFormat("Q8_0", 8, 32, 34, (_vec4("q", 32), _words("s", 4))),
        QuantFormat("Q4_K", 12, 256, 144, (_vec4("h", 16), _vec4("q", 128))),
        QuantFormat("Q5_K", 13, 256, 176, (_vec4("h", 16), _vec4("q", 128), _words("b", 32))),
        QuantFormat("Q6_K", 14, 256, 210, (_vec4("q", 128), _vec2("b", 64), _words("s", 32))),
        QuantFormat("Q2_K", 10, 256, 84, (_vec2("q", 64), _words("s", 20))),
        QuantFormat("Q3_K", 11, 256, 110, (_vec2("q", 64), _words("b", 32), _words("s", 20))),
        QuantFormat("IQ4_NL", 20, 32, 18, (_vec4("q", 16), _words("s", 4))),
        QuantFormat("IQ4_XS", 23, 256, 136, (_vec2("h", 8), _vec4("q", 128))),
        QuantFormat("TQ1_0", 34, 256, 54, (_vec2("q", 64), _words("s", 4))),
        QuantFormat("TQ2_0", 35, 256, 66, (_vec2("q", 64), _words("s", 4))),
        QuantFormat("MXFP4", 39, 32, 17, (_vec4("q", 16), _words("s", 4))),
        QuantFormat("NVFP4", 40, 64, 36, (_vec4("q", 32), _words("s", 8))),
        QuantFormat("Q1_0", 41, 128, 18, (_words("q", 16), _words("s", 4))),
        QuantFormat("Q2_0", 42, 64, 18, (_vec2("q", 16), _words("s", 4))),
        QuantFormat("IQ2_XXS", 16, 256, 66, (_vec2("q", 64), _words("s", 8)), "iq2xxs"),
        QuantFormat("IQ2_XS", 17, 256, 74, (_vec2("q", 64), _words("s", 16)), "iq2xs"),
        QuantFormat("IQ2_S", 22, 256, 82, (_vec2("q", 64), _words("s", 20)), "iq2s"),
        QuantFormat("IQ3_XXS", 18, 256, 98, (_vec2("q", 64), _words("s", 40)), "iq3xxs"),
        QuantFormat("IQ3_S", 21, 256, 110, (_vec2("q", 64), _words("s", 48)), "iq3s"),
        QuantFormat("IQ1_S", 19, 256, 50, (_words("q", 32), _words("s", 20)), "iq1"),
        QuantFormat("IQ1_M", 29, 256, 56, (_words("q", 32), _words("s", 24)), "iq1"),
    )
}
BY_ID: dict[int, QuantFormat] = {fmt.ggml_id: fmt for fmt in FORMATS.values()}

# Every id that ggml has ever given out, so that a file we cannot run is told apart from a broken one.
GGML_TYPE_NAMES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    4: "Q4_2",
    5: "Q4_3",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}
