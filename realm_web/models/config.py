"""What the metadata of a GGUF file says about the shape of its model; every value is checked.

`Architecture` says what the metadata does not: how decoders of one name differ from others. The table of them
is in `models/__init__.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from realm_web.errors import FormatError, UnsupportedError
from realm_web.gguf import Metadata
from realm_web.models.rope import RopeScaling, read_scaling

BIG = 1 << 24  # more layers, heads or rows than this is a broken file
MAX_EXPERTS = 1024  # whose logits the router's kernel keeps in workgroup memory, with room to spare
SOFTMAX, SOFTMAX_OF_CHOSEN = 1, 3  # expert_gating_func as llama.cpp numbers them


@dataclass(frozen=True)
class Architecture:
    """What differs between decoders and is not in the metadata. The defaults are Llama's."""

    rope_neox: bool = False  # pairs are (i, i + dim / 2) rather than (2i, 2i + 1)
    qk_norm: Literal["", "head", "all"] = ""  # of q and k: each head by itself, or all together
    norms: Literal["pre", "post", "both"] = (
        "pre"  # before attention and ffn, after them (on what they add), or both
    )
    ffn_norm: str = "ffn_norm"  # what llama.cpp calls the norm before the ffn
    act: Literal["silu_mul", "gelu_mul", "swiglu_oai"] = "silu_mul"
    experts: bool = False  # a mixture of experts in every layer
    sinks: bool = False  # a logit per head that takes its share of attention and gives nothing
    yarn_whole_pairs: bool = True  # as most; else the ends of YaRN's ramp may lie between two pairs
    yarn_whole_factor: bool = False  # attn_factor, where the file has it, is all of YaRN's and no further one
    fused: bool = False  # attn_qkv and a gate-and-up ffn_up in the file
    embed_by_dim: bool = False  # embeddings times the square root of their length
    scales: bool = False  # Granite's embedding_scale, residual_scale and logit_scale
    # where there is a sliding window, each so many-th layer sees everything; 1: all have it; 0: no windows
    global_every: int = 0
    window: int = 0  # where the metadata does not say
    # of the layers with a window, where they have their own, never scaled; 0: the base of the others
    local_rope_base: float | None = None
    short_conv: bool = False  # layers without key-value heads are gated short convolutions
    final_norm: str = "output_norm"  # what llama.cpp calls it
    nope_every: int = 0  # each so many-th layer has no rotation
    big_layers: int = 0  # of the size whose attention scale follows the embedding, not the head (Gemma's 27B)


def kv_head_bytes(kv_type: str, head_dim: int) -> int:
    """One head's key or value of one token. q8_0 has a float16 scale for 32 values, in whole words."""
    if kv_type == "q8_0":
        return head_dim + 4 * -(-head_dim // 64)
    return {"f16": 2, "f32": 4}[kv_type] * head_dim


@dataclass(frozen=True)
class LayerKind:
    """What differs between the layers of one model."""

    window: int  # tokens that attention sees, up to its own; 0: all
    rope: int  # index in ModelConfig.ropes, or -1: no rotation
    n_heads: int
    n_kv_heads: int  # 0: no attention, but a short convolution


@dataclass(frozen=True)
class RopeConfig:
    base: float
    scaling: RopeScaling


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts of a layer."""

    n_experts: int
    n_used: int  # for each token
    ffn_dim: int  # of one expert
    renormalise: bool  # the weights of the chosen add up to 1, rather than those of all
    scale: float  # of the weights


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder, in the field's words. Lengths are in elements."""

    architecture: str
    name: str
    arch: Architecture
    dim: int
    ffn_dim: int  # of an expert, where there are experts
    experts: ExpertsConfig | None
    n_heads: int  # the most that a layer has, as with n_kv_heads
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context_length: int
    norm_eps: float
    rope_dim: int
    ropes: tuple[RopeConfig, ...]
    layers: tuple[LayerKind, ...]
    l_cache: int  # values that a short convolution sees, with its own; 0 where there is none
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float  # logits are multiplied by it

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in every layer, in float16."""
        return sum(self.kv_bytes_by_layer("f16"))

    def kv_bytes_by_layer(self, kv_type: str) -> list[int]:
        """Keys and values of one token in each layer that has attention."""
        nbytes = kv_head_bytes(kv_type, self.head_dim)
        return [2 * layer.n_kv_heads * nbytes for layer in self.layers if layer.n_kv_heads]

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state rather than keys and values."""
        return any(not layer.n_kv_heads for layer in self.layers)

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share a key-value head, in the layer where they are most."""
        return max(layer.n_heads // layer.n_kv_heads for layer in self.layers if layer.n_kv_heads)

    @classmethod
    def from_metadata(cls, md: Metadata, arch: Architecture) -> ModelConfig:
        """FormatError for what is missing or contradictory, UnsupportedError for what we lack."""
        name = md.get_str("general.architecture")
        n_layers = _count(md, f"{name}.block_count", maximum=4096)
        heads = _read_heads(md, name, arch, n_layers)
        experts = _read_experts(md, name, arch)
        shape = _read_shape(md, name, heads, experts)
        dim, head_dim = shape["dim"], shape["head_dim"]
        rope_dim = md.get_int(f"{name}.rope.dimension_count", head_dim, minimum=2, maximum=head_dim)
        if rope_dim % 2:
            raise FormatError(f"{name}.rope.dimension_count is {rope_dim}; it must be even")
        context = _count(md, f"{name}.context_length", maximum=1 << 30)
        base = md.get_float(f"{name}.rope.freq_base", 10000.0, minimum=2.0)
        yarn = {"whole_pairs": arch.yarn_whole_pairs, "whole_factor": arch.yarn_whole_factor}
        ropes = [RopeConfig(base, read_scaling(md, name, context, **yarn))]
        if arch.local_rope_base is not None:
            local = md.get_float(f"{name}.rope.freq_base_swa", arch.local_rope_base or base, minimum=2.0)
            ropes.append(RopeConfig(local, RopeScaling()))
        scale = dim // shape["n_heads"] if n_layers == arch.big_layers else head_dim
        scales = dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), 1.0)
        if arch.scales:
            scales = {key: md.get_float(f"{name}.{key}", 1.0, minimum=1e-6, maximum=1e6) for key in scales}
        return cls(
            architecture=name,
            name=md.get_str("general.name", name),
            arch=arch,
            **shape,
            experts=experts,
            n_vocab=_n_vocab(md, name),
            context_length=context,
            norm_eps=md.get_float(f"{name}.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0),
            rope_dim=rope_dim,
            ropes=tuple(ropes),
            layers=_layer_kinds(md, name, arch, heads, context),
            l_cache=md.get_int(f"{name}.shortconv.l_cache", minimum=2, maximum=8) if arch.short_conv else 0,
            attention_scale=_factor(md, f"{name}.attention.scale") or scale**-0.5,
            attention_softcap=_factor(md, f"{name}.attn_logit_softcapping"),
            logit_softcap=_factor(md, f"{name}.final_logit_softcapping"),
            embedding_scale=math.sqrt(dim) if arch.embed_by_dim else scales["embedding_scale"],
            residual_scale=scales["residual_scale"],
            logit_scale=1 / scales["logit_scale"],
        )


def _count(md: Metadata, key: str, default: int | None = None, maximum: int = BIG) -> int:
    bounds = {"minimum": 1, "maximum": maximum}
    return md.get_int(key, **bounds) if default is None else md.get_int(key, default, **bounds)


def _factor(md: Metadata, key: str) -> float:
    """A number that float32 holds with room to spare; 0 where there is none."""
    value = md.get_float(key, 0.0, minimum=0.0, maximum=1e6)
    if 0 < value < 1e-6:
        raise FormatError(f"metadata {key} is {value}; it must be 0 or at least 1e-06")
    return value


def _read_heads(md: Metadata, name: str, arch: Architecture, n_layers: int) -> list[tuple[int, int]]:
    """Attention heads and key-value heads of each layer; (.., 0) is a layer without attention."""
    key = f"{name}.attention.head_count"
    n_heads = _by_layer(md, key, n_layers, 1)
    n_kv_heads = _by_layer(md, key + "_kv", n_layers, 0 if arch.short_conv else 1, n_heads)
    heads = list(zip(n_heads, n_kv_heads, strict=True))
    if not any(n_kv_heads):
        raise UnsupportedError(f"metadata {key}_kv is 0 for all layers; supported are models with attention")
    for n, n_kv in heads:
        if n_kv and n % n_kv:
            raise FormatError(f"{n} attention heads cannot share {n_kv} key-value heads evenly")
    return heads


def _by_layer(
    md: Metadata, key: str, n_layers: int, minimum: int, default: list[int] | None = None
) -> list[int]:
    """A number for each layer, from one for all of them or from a list."""
    if key not in md and default is not None:
        return default
    if not isinstance(md.get(key), list):
        return [md.get_int(key, minimum=minimum, maximum=BIG)] * n_layers
    values = md.get_list(key, int, length=n_layers)
    for i, value in enumerate(values):
        if not minimum <= value <= BIG:
            raise FormatError(f"metadata {key}: element {i} is {value}; it must be {minimum} to {BIG}")
    return values


def _read_experts(md: Metadata, name: str, arch: Architecture) -> ExpertsConfig | None:
    if not arch.experts:
        if md.get_int(f"{name}.expert_count", 0):
            raise UnsupportedError(f"{name} models with experts (expert_count) are not supported")
        return None
    n_experts = _count(md, f"{name}.expert_count", maximum=MAX_EXPERTS)
    n_used = _count(md, f"{name}.expert_used_count")
    if n_used > n_experts:
        raise FormatError(f"{name}.expert_used_count is {n_used}, but expert_count is {n_experts}")
    gating = md.get_int(f"{name}.expert_gating_func", SOFTMAX, minimum=0)
    if gating not in (SOFTMAX, SOFTMAX_OF_CHOSEN):
        raise UnsupportedError(
            f"{name}.expert_gating_func is {gating}; "
            f"supported are {SOFTMAX} and {SOFTMAX_OF_CHOSEN} (softmax)"
        )
    return ExpertsConfig(
        n_experts=n_experts,
        n_used=n_used,
        ffn_dim=_count(md, f"{name}.expert_feed_forward_length"),
        # the softmax of the chosen is that of all, renormalised
        renormalise=gating == SOFTMAX_OF_CHOSEN or md.get_bool(f"{name}.expert_weights_norm", True),
        scale=md.get_float(f"{name}.expert_weights_scale", 0.0, minimum=0.0, maximum=1e6) or 1.0,
    )


def _read_shape(
    md: Metadata, name: str, heads: list[tuple[int, int]], experts: ExpertsConfig | None
) -> dict[str, int]:
    ffn_key = "expert_feed_forward_length" if experts else "feed_forward_length"
    dim, ffn_dim = _count(md, f"{name}.embedding_length"), _count(md, f"{name}.{ffn_key}")
    n_heads, n_kv_heads = (max(counts) for counts in zip(*heads, strict=True))
    if f"{name}.attention.key_length" not in md and dim % n_heads:
        raise FormatError(f"embedding_length {dim} is not a multiple of head_count {n_heads}")
    head_dim = _count(md, f"{name}.attention.key_length", max(1, dim // n_heads))
    if _count(md, f"{name}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(f"{name}: value_length differs from key_length {head_dim}; they must be equal")
    if head_dim % 8 or head_dim > 512:
        raise UnsupportedError(f"heads of {head_dim} elements: supported are multiples of 8 up to 512")
    group = max(n // n_kv for n, n_kv in heads if n_kv)
    if group * head_dim > 4096:
        raise UnsupportedError(
            f"{group} query heads of {head_dim} on one key-value head: supported are {4096 // head_dim}"
        )
    for key, value in (("embedding_length", dim), (ffn_key, ffn_dim)):
        if value % 32:
            raise UnsupportedError(f"{name}.{key} is {value}; supported are multiples of 32")
    for n in {n for n, n_kv in heads if n_kv}:
        if n * head_dim % 32:
            raise UnsupportedError(
                f"{n} heads of {head_dim}: supported are products that are multiples of 32"
            )
    return {
        "dim": dim,
        "ffn_dim": ffn_dim,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
    }


def _n_vocab(md: Metadata, name: str) -> int:
    tokens = md.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        return md.get_int(f"{name}.vocab_size", minimum=1)
    stated = md.get_int(f"{name}.vocab_size", len(tokens), minimum=1)
    if stated < len(tokens):
        raise FormatError(
            f"{name}.vocab_size is {stated}, but tokenizer.ggml.tokens has {len(tokens)} entries"
        )
    return stated


def _layer_kinds(
    md: Metadata, name: str, arch: Architecture, heads: list[tuple[int, int]], context: int
) -> tuple[LayerKind, ...]:
    windows = _read_windows(md, name, arch, len(heads))
    # Granite's models without positions say so by this key, as llama.cpp reads it
    rotates = not arch.scales or md.get_bool(f"{name}.rope.scaling.finetuned", True)
    kinds = []
    for i, (n_heads, n_kv_heads) in enumerate(heads):
        rope = 1 if arch.local_rope_base is not None and windows[i] else 0
        if not rotates or (arch.nope_every and (i + 1) % arch.nope_every == 0):
            rope = -1
        window = windows[i] if windows[i] < context else 0
        kinds.append(LayerKind(window, rope, n_heads, n_kv_heads))
    return tuple(kinds)


def _read_windows(md: Metadata, name: str, arch: Architecture, n_layers: int) -> list[int]:
    """How many tokens each layer sees, as the file says; 0: all."""
    if not arch.global_every:
        return [0] * n_layers
    key = f"{name}.attention.sliding_window"
    least = 0 if arch.global_every == 1 else 1  # by 0 Phi-4 says that it has none, where other Phi-3 have one
    window = md.get_int(key, arch.window, minimum=least, maximum=BIG)
    pattern = f"{key}_pattern"
    if isinstance(md.get(pattern), list):
        local = md.get_list(pattern, bool, length=n_layers)
    else:
        every = md.get_int(pattern, arch.global_every if arch.global_every > 1 else 0, minimum=0, maximum=BIG)
        local = [not every or (i + 1) % every != 0 for i in range(n_layers)]
    return [window if here else 0 for here in local]
