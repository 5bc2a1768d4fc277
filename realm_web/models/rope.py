"""Rotary position embedding (Su et al., RoFormer): how far each pair turns per position, in every scaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from realm_web.errors import UnsupportedError
from realm_web.gguf import Metadata, show

KINDS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the training length are squeezed."""

    kind: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    whole_pairs: bool = True  # YaRN's ramp begins and ends at whole pairs
    whole_factor: bool = False  # attn_factor is all of YaRN's factor on cos and sin, not one more


@dataclass(frozen=True)
class RopeTable:
    """Turns of each pair per position, in parts of 2**32, and the factor on cos and sin. Empty: none."""

    turns: tuple[int, ...]
    magnitude: float


def read_scaling(
    md: Metadata, name: str, context: int, *, whole_pairs: bool = True, whole_factor: bool = False
) -> RopeScaling:
    prefix = f"{name}.rope.scaling."
    original = md.get_int(prefix + "original_context_length", context, minimum=1)
    attn_factor = md.get_float(prefix + "attn_factor", 1.0, minimum=1e-6, maximum=1e6)
    kind = md.get_str(prefix + "type", "")
    if not kind:  # the key of older files
        factor = md.get_float(f"{name}.rope.scale_linear", 1.0, minimum=1e-6, maximum=1e6)
        return RopeScaling("linear" if factor != 1.0 else "none", factor, original, attn_factor)
    if kind not in KINDS:
        raise UnsupportedError(f"{prefix}type is {show(kind)}; supported are {', '.join(KINDS)}")
    scaled = kind in ("linear", "yarn")
    return RopeScaling(
        kind=kind,
        factor=md.get_float(prefix + "factor", 1.0, minimum=1e-6, maximum=1e6) if scaled else 1.0,
        original_context=original,
        attn_factor=attn_factor,
        beta_fast=md.get_float(prefix + "yarn_beta_fast", 32.0, minimum=1e-6, maximum=1e6),
        beta_slow=md.get_float(prefix + "yarn_beta_slow", 1.0, minimum=1e-6, maximum=1e6),
        whole_pairs=whole_pairs,
        whole_factor=whole_factor and prefix + "attn_factor" in md,
    )


def rope_table(base: float, dim: int, scaling: RopeScaling, divisors: Sequence[float] = ()) -> RopeTable:
    """The table of one kind of layer.

    `divisors` is `rope_freqs.weight` (Llama 3) or `rope_factors_*.weight` (LongRoPE, Ding et al.): each
    frequency is divided by its entry. YaRN as in Peng et al., "YaRN: Efficient Context Window Extension of
    Large Language Models", with llama.cpp's ramp.
    """
    low = high = 0.0
    magnitude = scaling.attn_factor
    if scaling.kind == "yarn":
        low, high = (
            dim * math.log(scaling.original_context / (beta * 2 * math.pi)) / (2 * math.log(base))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        )
        if scaling.whole_pairs:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(0, low), min(dim - 1, high)
        if scaling.factor > 1 and not scaling.whole_factor:
            magnitude *= 1 + 0.1 * math.log(scaling.factor)
    turns = []
    for i in range(dim // 2):
        full = base ** (-2 * i / dim) / (divisors[i] if divisors else 1.0)
        frequency = full / scaling.factor
        if scaling.kind == "yarn":
            keep = 1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))  # 1: fast pairs stay as trained
            frequency = frequency * (1 - keep) + full * keep
        turns.append(round(frequency / (2 * math.pi) * 2**32) & 0xFFFFFFFF)
    return RopeTable(tuple(turns), magnitude)
