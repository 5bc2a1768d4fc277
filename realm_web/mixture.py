"""Which type each tensor of a quantised model gets: the mixtures of llama.cpp's llama-quantize. Pure.

Knows names and shapes of tensors, and the metadata that the rules ask for; nothing of how types are made.
A file type such as Q4_K_M gives most matrices one type (Q4_K), and more bits where errors hurt most: the
output matrix (or a tied embedding), attention values, and the feed-forward output of some layers. Vectors,
norms and routers stay as they are. Rows that are no multiple of a type's block get one with smaller blocks.
Source: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp, without importance matrix
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from realm_web.errors import UnsupportedError
from realm_web.gguf import GGUFFile, Metadata, TensorInfo
from realm_web.quants import FORMATS

UNQUANTISED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class FileType:
    """`id` is what `general.file_type` says; `base` the type of most matrices."""

    name: str
    id: int
    base: str


FILE_TYPES: dict[str, FileType] = {
    file_type.name: file_type
    for file_type in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("Q5_K_M", 17, "Q5_K"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q4_K_M", 15, "Q4_K"),
        FileType("Q4_K_S", 14, "Q4_K"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("IQ4_NL", 25, "IQ4_NL"),
        FileType("IQ4_XS", 30, "IQ4_XS"),
        FileType("MXFP4_MOE", 38, "MXFP4"),
        FileType("MXFP4", 38, "MXFP4"),
        FileType("Q3_K_L", 13, "Q3_K"),
        FileType("Q3_K_M", 12, "Q3_K"),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType("Q2_K", 10, "Q2_K"),
        FileType("TQ2_0", 37, "TQ2_0"),
        FileType("Q2_0", 41, "Q2_0"),
        FileType("TQ1_0", 36, "TQ1_0"),
        FileType("Q1_0", 40, "Q1_0"),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# Types of long blocks, and what stands in for them in rows that are no multiple of a block.
_STAND_INS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q1_0": "Q4_0",
    "Q2_0": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# Matrices that are small and matter: a part of the name.
_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d", "shortconv.conv.weight", "per_layer_model_proj")
_KEPT += ("altup", "laurel", ".position_embd", "token_types.weight")

_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_CATEGORIES = (  # a part of the name, what it is
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_output.weight", "attn_output"),
    ("ffn_down", "ffn_down"),
)


def file_type(name: str) -> FileType:
    """By name or alias, in any case; UnsupportedError names all."""
    wanted = name.upper()
    wanted = ALIASES.get(wanted, wanted)
    if wanted not in FILE_TYPES:
        raise UnsupportedError(f"there is no type {name!r} to quantise to; there are {', '.join(FILE_TYPES)}")
    return FILE_TYPES[wanted]


def choose(gguf: GGUFFile, wanted: FileType, *, pure: bool = False) -> dict[str, str]:
    """The type name for every tensor, in file order. With `pure` all matrices get the base type."""
    rules = _Rules(gguf, wanted)
    quantised = sorted((t for t in gguf.tensors.values() if _is_matrix(t)), key=_layer_and_name)
    types = {t.name: t.type_name for t in gguf.tensors.values()}
    for tensor in quantised:
        mixed = not pure and wanted.base not in UNQUANTISED
        chosen = rules.type_of(tensor) if mixed else wanted.base
        types[tensor.name] = fitting(chosen, tensor.shape[0])
    return types


def fitting(type_name: str, row: int) -> str:
    """The type, or its stand-in where rows are no multiple of its block.

    >>> fitting("Q4_K", 512), fitting("Q4_K", 576), fitting("Q4_K", 40)
    ('Q4_K', 'Q5_0', 'F16')
    """
    if row % _block(type_name):
        type_name = _STAND_INS.get(type_name, "F16")
    return "F16" if row % _block(type_name) else type_name


def _block(type_name: str) -> int:
    return FORMATS[type_name].block_elements


def _is_matrix(tensor: TensorInfo) -> bool:
    """Whether the tensor is quantised at all."""
    if max(tensor.shape[1:], default=1) == 1 or not tensor.name.endswith("weight"):
        return False
    return not any(part in tensor.name for part in _KEPT)


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _layer_and_name(tensor: TensorInfo) -> tuple[int, str]:
    return _layer(tensor.name), tensor.name


def _category(name: str) -> str:
    if name == "output.weight" or name in _EMBEDDINGS:
        return "output" if name == "output.weight" else "token_embd"
    return next((category for part, category in _CATEGORIES if part in name), "")


class _Rules:
    """The choice for one tensor after the other, in the order of layers: some rules count."""

    def __init__(self, gguf: GGUFFile, wanted: FileType) -> None:
        md, names = gguf.metadata, gguf.tensors
        arch = md.get_str("general.architecture", "")
        self.wanted = wanted
        self.tied = "output.weight" not in names
        self.n_layers = md.get_int(f"{arch}.block_count", 0)
        self.n_experts = md.get_int(f"{arch}.expert_count", 0)
        self.heads_per_kv = _heads_per_kv(md, arch)
        self.is_70b = self.n_layers == 80 and self.heads_per_kv > 1
        self.n_values = sum(_category(name) == "attn_v" for name in names)
        self.value_index = self.down_index = 0

    def type_of(self, tensor: TensorInfo) -> str:
        name, base, category = self.wanted.name, self.wanted.base, _category(tensor.name)
        if category == "output" or (category == "token_embd" and self.tied):
            if name in ("Q8_0", "MXFP4", "MXFP4_MOE") or tensor.shape[0] % _block(base):
                return "Q8_0"
            return "Q6_K"
        if name == "MXFP4_MOE":
            return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[2] > 1 else "Q8_0"
        if category == "token_embd":
            return "Q4_K" if name in ("TQ1_0", "TQ2_0", "Q2_0") else base
        if category == "attn_v":
            return self._values(name, base)
        if category == "attn_k":
            return "Q8_0" if self.n_experts == 8 else base
        if category == "ffn_down":
            return self._down(tensor.name, name, base)
        if category == "attn_output":
            return self._attention_output(name, base)
        return base

    def _values(self, name: str, base: str) -> str:
        index, self.value_index = self.value_index, self.value_index + 1
        chosen, grouped = base, self.heads_per_kv >= 4
        if name == "Q2_K":
            chosen = "Q4_K" if grouped else "Q3_K"
        elif name == "Q3_K_M":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        elif name == "Q3_K_L" or (name == "Q4_K_S" and index < 4) or (grouped and name.startswith("IQ4")):
            chosen = "Q5_K"
        elif name in ("Q4_K_M", "Q5_K_M") and _needs_more_bits(index, self.n_values):
            chosen = "Q6_K"
        if self.is_70b and chosen in ("Q3_K", "Q4_K"):
            chosen = "Q5_K"
        return "Q8_0" if self.n_experts == 8 else chosen

    def _down(self, tensor_name: str, name: str, base: str) -> str:
        index, self.down_index = self.down_index, self.down_index + 1
        layer = _layer(tensor_name) if self.n_experts > 1 else index
        n = self.n_layers
        if name == "Q2_K":
            return "Q3_K"
        if name == "Q3_K_M":
            return "Q5_K" if layer < n // 16 else "Q4_K"
        if name in ("Q4_K_M", "Q5_K_M") and _needs_more_bits(layer, n):
            return "Q6_K"
        if name == "Q3_K_L" or (name in ("Q4_K_S", "IQ4_NL", "IQ4_XS") and layer < n // 8):
            return "Q5_K"
        return base

    def _attention_output(self, name: str, base: str) -> str:
        if self.n_experts == 8:
            raised = base in ("Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS") and name != "Q3_K_L"
            return "Q5_K" if raised else base
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, base)


def _needs_more_bits(layer: int, n_layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _heads_per_kv(md: Metadata, arch: str) -> int:
    """Query heads per key-value head; where a file gives numbers by layer, of the first that has any."""
    keys = (f"{arch}.attention.head_count", f"{arch}.attention.head_count_kv")
    heads, kv_heads = (_first(md.get(key, 0)) for key in keys)
    return heads // kv_heads if kv_heads else 1


def _first(value: object) -> int:
    values: Iterable[object] = value if isinstance(value, list) else [value]
    return next((v for v in values if isinstance(v, int) and v > 0), 0)
