"""What a GGUF file's metadata says about its model's shape. Every value is checked and named when wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass

from realm_web.errors import FormatError, UnsupportedError
from realm_web.gguf import Metadata

BIG = 1 << 24  # more layers, heads or rows than this is a broken file


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the training length are squeezed: "none", "linear" or "yarn"."""

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder, in the field's words. Lengths are in elements."""

    architecture: str
    name: str
    n_layers: int
    dim: int
    ffn_dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_vocab: int
    context_length: int
    norm_eps: float
    rope_dim: int
    rope_base: float
    rope_scaling: RopeScaling
    rope_neox: bool
    logit_scale: float = 1.0

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token in every layer, in float16."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * 2

    @classmethod
    def from_metadata(cls, md: Metadata, *, rope_neox: bool) -> ModelConfig:
        """FormatError for values that are missing or contradictory, UnsupportedError for what we lack."""
        arch = md.get_str("general.architecture")

        def count(key: str, default: int | None = None, maximum: int = BIG) -> int:
            bounds = {"minimum": 1, "maximum": maximum}
            if default is None:
                return md.get_int(f"{arch}.{key}", **bounds)
            return md.get_int(f"{arch}.{key}", default, **bounds)

        if md.get_int(f"{arch}.expert_count", 0):
            raise UnsupportedError(f"{arch} models with experts (expert_count) are not supported yet")
        dim, n_heads = count("embedding_length"), count("attention.head_count")
        n_kv_heads = count("attention.head_count_kv", n_heads)
        if n_heads % n_kv_heads:
            raise FormatError(f"{n_heads} attention heads cannot share {n_kv_heads} key-value heads evenly")
        if f"{arch}.attention.key_length" not in md and dim % n_heads:
            raise FormatError(f"embedding_length {dim} is not a multiple of head_count {n_heads}")
        head_dim = count("attention.key_length", dim // n_heads)
        if count("attention.value_length", head_dim) != head_dim:
            raise UnsupportedError(
                f"{arch}: value_length differs from key_length {head_dim}; they must be equal"
            )
        if head_dim % 8 or head_dim > 512:
            raise UnsupportedError(f"heads of {head_dim} elements: supported are multiples of 8 up to 512")
        if n_heads // n_kv_heads * head_dim > 4096:
            raise UnsupportedError(
                f"{n_heads // n_kv_heads} query heads of {head_dim} on one key-value head: too many"
            )
        for key, value in (("embedding_length", dim), ("feed_forward_length", count("feed_forward_length"))):
            if value % 32:
                raise UnsupportedError(f"{arch}.{key} is {value}; supported are multiples of 32")
        rope_dim = md.get_int(f"{arch}.rope.dimension_count", head_dim, minimum=2, maximum=head_dim)
        if rope_dim % 2:
            raise FormatError(f"{arch}.rope.dimension_count is {rope_dim}; it must be even")
        context = count("context_length", maximum=1 << 30)
        return cls(
            architecture=arch,
            name=md.get_str("general.name", arch),
            n_layers=count("block_count", maximum=4096),
            dim=dim,
            ffn_dim=count("feed_forward_length"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            n_vocab=_n_vocab(md, arch),
            context_length=context,
            norm_eps=md.get_float(f"{arch}.attention.layer_norm_rms_epsilon", minimum=0.0, maximum=1.0),
            rope_dim=rope_dim,
            rope_base=md.get_float(f"{arch}.rope.freq_base", 10000.0, minimum=1.0),
            rope_scaling=_rope_scaling(md, arch, context),
            rope_neox=rope_neox,
            logit_scale=md.get_float(f"{arch}.logit_scale", 1.0) or 1.0,
        )


def _n_vocab(md: Metadata, arch: str) -> int:
    tokens = md.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and tokens:
        n_tokens = len(tokens)
        stated = md.get_int(f"{arch}.vocab_size", n_tokens, minimum=1)
        if stated < n_tokens:
            raise FormatError(
                f"{arch}.vocab_size is {stated}, but tokenizer.ggml.tokens has {n_tokens} entries"
            )
        return stated
    return md.get_int(f"{arch}.vocab_size", minimum=1)


def _rope_scaling(md: Metadata, arch: str, context: int) -> RopeScaling:
    prefix = f"{arch}.rope.scaling."
    kind = md.get_str(prefix + "type", "")
    if not kind:  # the key of older files
        factor = md.get_float(f"{arch}.rope.scale_linear", 1.0, minimum=1e-6)
        return RopeScaling("linear" if factor != 1.0 else "none", factor)
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"{prefix}type is {kind!r}; supported are none, linear and yarn")
    return RopeScaling(
        kind=kind,
        factor=1.0 if kind == "none" else md.get_float(prefix + "factor", 1.0, minimum=1e-6, maximum=1e6),
        original_context=md.get_int(prefix + "original_context_length", context, minimum=1),
        attn_factor=md.get_float(prefix + "attn_factor", 1.0, minimum=1e-6, maximum=1e6),
        beta_fast=md.get_float(prefix + "yarn_beta_fast", 32.0, minimum=1e-6),
        beta_slow=md.get_float(prefix + "yarn_beta_slow", 1.0, minimum=1e-6),
    )


def rope_turns(config: ModelConfig, divisors: list[float] | None = None) -> tuple[list[int], float]:
    """Turns per position of each rotated pair as fractions of 2**32, and the factor on cos and sin.

    `divisors` is `rope_freqs.weight` (Llama 3): each frequency is divided by its entry. YaRN as in Peng et
    al., "YaRN: Efficient Context Window Extension of Large Language Models", with llama.cpp's ramp.
    """
    scaling, dim, base = config.rope_scaling, config.rope_dim, config.rope_base
    low = high = 0.0
    magnitude = scaling.attn_factor
    if scaling.kind == "yarn":
        low, high = (
            dim * math.log(scaling.original_context / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        low, high = max(0, math.floor(low)), min(dim - 1, math.ceil(high))
        if scaling.factor > 1:
            magnitude *= 1 + 0.1 * math.log(scaling.factor)
    turns = []
    for i in range(dim // 2):
        full = base ** (-2 * i / dim) / (divisors[i] if divisors else 1.0)
        frequency = full / scaling.factor
        if scaling.kind == "yarn":
            keep = 1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))  # 1: fast pairs stay as trained
            frequency = frequency * (1 - keep) + full * keep
        turns.append(round(frequency / (2 * math.pi) * 2**32) & 0xFFFFFFFF)
    return turns, magnitude
