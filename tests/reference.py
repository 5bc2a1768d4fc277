"""An independent forward pass of the llama architecture in float64 numpy, on weights decoded by `gguf`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def rope_frequencies(md: dict, arch: str, dim: int, divisors: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Radians per position, and the factor on cos and sin; YaRN as transformers computes it."""
    base = md.get(f"{arch}.rope.freq_base", 10000.0)
    frequency = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if divisors is not None:
        frequency = frequency / divisors
    kind = md.get(f"{arch}.rope.scaling.type", "none")
    factor = md.get(f"{arch}.rope.scaling.factor", 1.0)
    if kind == "linear":
        return frequency / factor, 1.0
    if kind != "yarn":
        return frequency, 1.0
    original = md[f"{arch}.rope.scaling.original_context_length"]

    def correction(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(correction(32)), 0), min(math.ceil(correction(1)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return frequency / factor * ramp + frequency * (1 - ramp), 0.1 * math.log(factor) + 1


def logits(weights: dict[str, np.ndarray], md: dict, tokens: Sequence[int]) -> np.ndarray:
    """Logits after every token: (n_tokens, n_vocab)."""
    output = weights.get("output.weight", weights["token_embd.weight"])
    return hidden(weights, md, tokens) @ np.asarray(output, np.float64).T


def hidden(weights: dict[str, np.ndarray], md: dict, tokens: Sequence[int]) -> np.ndarray:
    """Final hidden states, normed: (n_tokens, dim)."""
    arch = md["general.architecture"]

    def key(name: str):
        return md[f"{arch}.{name}"]

    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    hd = key("attention.key_length")
    frequency, magnitude = rope_frequencies(md, arch, hd, w.get("rope_freqs.weight"))
    eps = key("attention.layer_norm_rms_epsilon")
    n = len(tokens)
    angle = np.arange(n)[:, None] * frequency[None, :]
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude  # (n, hd / 2)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def rotate(x):  # (n, heads, hd), pairs (2i, 2i + 1)
        even, odd = x[..., 0::2], x[..., 1::2]
        out = np.empty_like(x)
        out[..., 0::2] = even * cos[:, None] - odd * sin[:, None]
        out[..., 1::2] = odd * cos[:, None] + even * sin[:, None]
        return out

    x = w["token_embd.weight"][list(tokens)]
    causal = np.where(np.tril(np.ones((n, n), bool)), 0.0, -np.inf)
    for i in range(key("block_count")):
        at = f"blk.{i}."
        n_heads, n_kv = (
            n[i] if isinstance(n, list) else n
            for n in (key("attention.head_count"), key("attention.head_count_kv"))
        )
        h = norm(x, at + "attn_norm.weight")
        q = rotate(linear(h, at + "attn_q").reshape(n, n_heads, hd))
        k = rotate(linear(h, at + "attn_k").reshape(n, n_kv, hd)).repeat(n_heads // n_kv, axis=1)
        v = linear(h, at + "attn_v").reshape(n, n_kv, hd).repeat(n_heads // n_kv, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(hd) + causal
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", probs, v).reshape(n, -1), at + "attn_output")
        h = norm(x, at + "ffn_norm.weight")
        gate = linear(h, at + "ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, at + "ffn_up"), at + "ffn_down")
    return norm(x, "output_norm.weight")
