"""Tiny random models for tests: whole GGUF files of the llama architecture, written by the `gguf` package.

Every option is a keyword; the same options give the same bytes. The vocabulary is byte-level BPE, so any text
round-trips. Weights have a standard deviation of 1 / sqrt(row length) and norms differ from 1, so that every
tensor matters to the logits.

    from tiny import write_tiny

    model = write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=512, quant={"*ffn_down*": "Q6_K", "*": "Q4_K"})
    model.weights["blk.0.ffn_down.weight"]    # float32 (256, 512), what the file's blocks decode to
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import gguf
import numpy as np
from blocks import random_blocks

from realm_web.dequant import dequantize
from realm_web.quants import FORMATS

MERGES = (
    *("Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "e r", "Ġt he", "Ġ s", "o u", "Ġ w", "l l"),
    *("o r", "l d", "Ġw or", "Ġwor ld", "he ll", "hell o", "Ġ Ġ", "ĠĠ ĠĠ"),
)
BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (BOS, EOS, IM_START, IM_END)  # the last ids of the vocabulary, in this order
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MIN_VOCAB = 256 + len(MERGES) + len(SPECIALS)

_NORMAL, _CONTROL = 1, 3  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class TinyModel:
    """A written file, and what is in it."""

    path: Path
    metadata: dict[str, object]
    weights: dict[str, np.ndarray]  # float32 (rows, row length) or (n,), decoded from the blocks in the file
    types: dict[str, str]  # ggml type name of each tensor


def write_tiny(
    path: str | Path,
    *,
    n_layers: int = 2,
    dim: int = 64,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,  # dim // n_heads
    ffn: int = 128,
    vocab: int = 320,
    context: int = 256,
    quant: str | Mapping[str, str] = "F32",
    tied: bool = False,
    biases: Collection[str] = (),
    rope_base: float = 10000.0,
    rope_freqs: bool = False,
    rope_scaling: Mapping[str, object] | None = None,
    norm_eps: float = 1e-5,
    pre: str = "llama-bpe",
    add_bos: bool = False,
    chat_template: str | None = None,
    architecture: str = "llama",
    metadata: Mapping[str, object] | None = None,
    omit: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    seed: int = 0,
) -> TinyModel:
    """Write a model; every tensor and key is named as llama.cpp names it.

    quant         type of all matrices, or patterns of tensor names to types, the first match counts
                  (`{"token_embd.*": "Q8_0", "*": "Q4_0"}`); norms, biases and rope_freqs are F32
    tied          no `output.weight`: the embedding is used
    biases        matrices of every layer that get a bias, such as `("attn_q", "attn_k", "attn_v")`
    rope_freqs    add `rope_freqs.weight`, the frequency divisors of Llama 3
    rope_scaling  keys under `<architecture>.rope.scaling.`, such as `{"type": "linear", "factor": 2.0}`
    metadata      further or other keys (None takes a key away)
    omit, shapes  tensors to leave out, other shapes as (rows, row length): for tests of broken files
    """
    head_dim = head_dim or dim // n_heads
    values = _metadata(architecture, n_layers, dim, n_heads, n_kv_heads, head_dim, ffn, vocab, context)
    values |= {f"{architecture}.rope.freq_base": rope_base}
    values |= {f"{architecture}.attention.layer_norm_rms_epsilon": norm_eps}
    values |= {f"{architecture}.rope.scaling.{key}": value for key, value in (rope_scaling or {}).items()}
    values |= _vocabulary(vocab, pre, add_bos)
    if chat_template is not None:
        values["tokenizer.chat_template"] = chat_template
    values |= metadata or {}
    values = {key: value for key, value in values.items() if value is not None}

    rng = np.random.default_rng(seed)
    tensors = _tensor_shapes(
        n_layers, dim, n_heads * head_dim, n_kv_heads * head_dim, ffn, vocab, tied, biases
    )
    if rope_freqs:
        tensors["rope_freqs.weight"] = (head_dim // 2,)
    tensors |= shapes or {}

    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        _add_value(writer, key, value)
    weights, types = {}, {}
    for name, shape in tensors.items():
        if name in omit:
            continue
        type_name = _type_of(name, shape, quant)
        data = _data(rng, name, shape, type_name)
        ggml_type = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor(name, data, raw_dtype=ggml_type)
        weights[name] = decoded(data, type_name).reshape(shape)
        types[name] = type_name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return TinyModel(Path(path), {"general.architecture": architecture, **values}, weights, types)


def byte_tokens() -> list[str]:
    """GPT-2's printable character for each of the 256 bytes."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in.get(byte, chr(byte)) for byte in range(256)]


def _metadata(
    architecture: str,
    n_layers: int,
    dim: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    context: int,
) -> dict[str, object]:
    keys = {
        "block_count": n_layers,
        "context_length": context,
        "embedding_length": dim,
        "feed_forward_length": ffn,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": vocab,
    }
    named = {f"{architecture}.{key}": value for key, value in keys.items()}
    return {"general.name": "tiny random", "general.quantization_version": 2, **named}


def _vocabulary(vocab: int, pre: str, add_bos: bool) -> dict[str, object]:
    if vocab < MIN_VOCAB:
        raise ValueError(f"a tiny vocabulary has at least {MIN_VOCAB} tokens, not {vocab}")
    tokens = byte_tokens() + [merge.replace(" ", "") for merge in MERGES]
    tokens += [f"unused{i}" for i in range(vocab - len(tokens) - len(SPECIALS))]
    types = [_NORMAL] * len(tokens) + [_CONTROL] * len(SPECIALS)
    tokens += SPECIALS
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": tokens.index(BOS),
        "tokenizer.ggml.eos_token_id": tokens.index(EOS),
        "tokenizer.ggml.add_bos_token": add_bos,
    }


def _tensor_shapes(
    n_layers: int,
    dim: int,
    q_dim: int,
    kv_dim: int,
    ffn: int,
    vocab: int,
    tied: bool,
    biases: Collection[str],
) -> dict[str, tuple[int, ...]]:
    """Names to numpy shapes: (rows = outputs, row length = inputs)."""
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (dim,),
        "attn_q": (q_dim, dim),
        "attn_k": (kv_dim, dim),
        "attn_v": (kv_dim, dim),
        "attn_output": (dim, q_dim),
        "ffn_norm": (dim,),
        "ffn_gate": (ffn, dim),
        "ffn_up": (ffn, dim),
        "ffn_down": (dim, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, dim)}
    for i in range(n_layers):
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"blk.{i}.{name}.bias": layer[name][:1] for name in biases}
    shapes["output_norm.weight"] = (dim,)
    if not tied:
        shapes["output.weight"] = (vocab, dim)
    return shapes


def _type_of(name: str, shape: tuple[int, ...], quant: str | Mapping[str, str]) -> str:
    if len(shape) == 1:
        return "F32"
    if isinstance(quant, str):
        return quant
    for pattern, type_name in quant.items():
        if fnmatchcase(name, pattern):
            return type_name
    raise ValueError(f"no pattern of {list(quant)} matches {name}")


def _data(rng: np.random.Generator, name: str, shape: tuple[int, ...], type_name: str) -> np.ndarray:
    if name == "rope_freqs.weight":
        return np.geomspace(1, 8, shape[0]).astype(np.float32)
    if name.endswith("norm.weight"):
        return (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith(".bias"):
        return (0.1 * rng.standard_normal(shape)).astype(np.float32)
    return random_matrix(rng, shape, type_name)


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...], type_name: str) -> np.ndarray:
    """A (rows, row length) matrix of std 1 / sqrt(row length) as files hold it (floats or block bytes)."""
    std = shape[-1] ** -0.5
    block_elements, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    if shape[-1] % block_elements:
        raise ValueError(f"rows of {shape[-1]} are not whole {type_name} blocks of {block_elements}")
    if type_name in _QUANTISED:
        weights = (std * rng.standard_normal(shape)).astype(np.float32)
        return gguf.quants.quantize(weights, gguf.GGMLQuantizationType[type_name])
    n_blocks = int(np.prod(shape)) // block_elements
    return random_blocks(type_name, n_blocks, rng, std).reshape(*shape[:-1], -1)


def decoded(data: np.ndarray, type_name: str) -> np.ndarray:
    """What the blocks of a matrix decode to, by the `gguf` package; by our oracle where it cannot."""
    if type_name == "Q1_0":
        return dequantize(type_name, data.reshape(-1, FORMATS[type_name].block_bytes))
    return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name])


# The gguf package quantises to these; blocks of the others are random.
_QUANTISED = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


def _add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list() | tuple():
            writer.add_array(key, value)
        case _:
            raise TypeError(f"{key}: cannot write a {type(value).__name__}")
