"""Tiny random models of `transformers`, and GGUF files of them as llama.cpp's converter from HF writes them.

Names come from the `gguf` package's own table; what the converter does to weights (the permutation of rows
for interleaved rotation, Gemma's norms that count from 1, LongRoPE's factors as tensors) and which keys it
writes is repeated here. Every feature of a family is on: windows shorter than the prompt, layers of every
kind, caps and scales that matter.

    case = CASES["gemma2"]
    model = case.build()                              # a transformers model in float32, eager attention
    path = export(model, case, tmp_path / "tiny.gguf")
    logits_of(model, tokens)                          # (n_tokens, n_vocab) float32
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import tiny
import torch
import transformers

VOCAB = 320
CONTEXT = 256
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "attn_implementation": "eager",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Case:
    """A model to compare: its family, and the settings that differ from SHAPE."""

    arch: str  # as general.architecture names it
    family: str  # as classes of transformers begin
    settings: Mapping[str, object] = field(default_factory=dict)
    permuted: bool = False  # the file's rotation turns pairs (2i, 2i + 1): rows of q and k change places
    norm_shift: float = 0.0  # Gemma's norms are 1 + weight
    metadata: Mapping[str, object] = field(default_factory=dict)  # what this family's converter adds
    post_gain: float = (
        1.0  # of the norms after attention and ffn: small where many layers would amplify rounding
    )

    def build(self, seed: int = 0) -> torch.nn.Module:
        config_class = getattr(transformers, f"{self.family}TextConfig", None)
        config_class = config_class or getattr(transformers, f"{self.family}Config")
        config = config_class(**deepcopy({**SHAPE, **self.settings}))
        model = getattr(transformers, f"{self.family}ForCausalLM")(config).float().eval()
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            weight.data = self._weights(name, weight.shape, generator)
        return model

    def _weights(self, name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """Such that every tensor matters and attention is far from even."""
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            is_norm = name.endswith("norm.weight") or "layernorm" in name
            gain = self.post_gain if "post_" in name else 1.0
            return gain * (1 + 0.2 * noise) - self.norm_shift if is_norm else 0.2 * noise
        gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "qkv_proj")) else 1.0
        return gain * noise / math.sqrt(shape[-1])


def _mixed(n: int, every: int) -> dict:
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    return {"num_hidden_layers": n, "head_dim": 24, "sliding_window": 20, "query_pre_attn_scalar": 24,
            "layer_types": kinds}  # fmt: skip


def _gemma3(**full: object) -> dict:
    """Rotation of the layers that see everything, and of those with a window."""
    return {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default", **full},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


def _olmo3_yarn() -> dict:
    return {
        "full_attention": {**YARN, "attention_factor": 1.3},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
         "short_factor": [1.0 + 0.1 * i for i in range(6)], "long_factor": [1.5 + 0.7 * i for i in range(6)],
         "partial_rotary_factor": 0.75}  # fmt: skip
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_GRANITE = {"embedding_multiplier": 6.0, "residual_multiplier": 0.3, "logits_scaling": 4.0,
            "attention_multiplier": 0.11, "num_hidden_layers": 2}  # fmt: skip

CASES = {
    "llama": Case("llama", "Llama", {"num_hidden_layers": 2, **_UNTIED}, permuted=True),
    "llama 3 rotation, tied": Case(
        "llama", "Llama", {"num_hidden_layers": 2, "rope_parameters": LLAMA3, **_TIED}, permuted=True
    ),
    "llama with biases": Case(
        "llama", "Llama", {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}, permuted=True
    ),
    "mistral": Case(
        "llama", "Mistral", {"num_hidden_layers": 2, "head_dim": 40, "sliding_window": None}, permuted=True
    ),
    "qwen2": Case("qwen2", "Qwen2", {"num_hidden_layers": 2, **_TIED}),
    "qwen2 with YaRN": Case("qwen2", "Qwen2", {"num_hidden_layers": 2, "rope_parameters": YARN, **_UNTIED}),
    "qwen3": Case("qwen3", "Qwen3", {"num_hidden_layers": 2, "head_dim": 32, **_UNTIED}),
    "gemma2": Case(
        "gemma2",
        "Gemma2",
        {**_mixed(4, 2), "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
        norm_shift=1.0,
        metadata={"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    ),
    "gemma2 of the largest size": Case(
        "gemma2",
        "Gemma2",
        {**_mixed(46, 2), "query_pre_attn_scalar": 16, "intermediate_size": 32},
        norm_shift=1.0,
        post_gain=0.02,
        metadata={"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": Case(
        "gemma3", "Gemma3", {**_mixed(7, 6), "rope_parameters": _gemma3()}, norm_shift=1.0
    ),
    "gemma3 with linear scaling": Case(
        "gemma3",
        "Gemma3",
        {**_mixed(7, 6), "rope_parameters": _gemma3(rope_type="linear", factor=8.0)},
        norm_shift=1.0,
    ),
    "phi3": Case(
        "phi3",
        "Phi3",
        {"num_hidden_layers": 2, "sliding_window": 20},
        metadata={"attention.sliding_window": 20},
    ),
    "phi3 without a window, with LongRoPE and partial rotation": Case(
        "phi3",
        "Phi3",
        {"num_hidden_layers": 2, "rope_parameters": _LONG, "original_max_position_embeddings": 64, **_TIED},
        metadata={"attention.sliding_window": 0},  # as for Phi-4
    ),
    "smollm3": Case("smollm3", "SmolLM3", {"num_hidden_layers": 5, **_TIED}, permuted=True),
    "granite": Case("granite", "Granite", {**_GRANITE, **_TIED}, permuted=True),
    "olmo2": Case("olmo2", "Olmo2", {"num_hidden_layers": 2, **_UNTIED}),
    "olmo3": Case(
        "olmo2",
        "Olmo3",
        {"num_hidden_layers": 5, "sliding_window": 20, **_UNTIED},
        metadata={
            "attention.sliding_window": 20,
            "attention.sliding_window_pattern": [True, True, True, False, True],
        },
    ),
    "olmo3 with YaRN": Case(
        "olmo2",
        "Olmo3",
        {"num_hidden_layers": 4, "sliding_window": 20, "rope_parameters": _olmo3_yarn(), **_UNTIED},
        metadata={"attention.sliding_window": 20, "rope.scaling.attn_factor": 1.3},
    ),
}  # fmt: skip


def logits_of(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits after every token: (n_tokens, n_vocab)."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def real_gemma3(path: Path) -> torch.nn.Module:
    """Gemma 3 with the weights of a GGUF file, decoded by `gguf`; its shape is read from the file too."""
    reader = gguf.GGUFReader(path)
    weights = {}
    for t in reader.tensors:
        data = gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        weights[t.name] = torch.from_numpy(np.require(data, requirements="W"))

    def key(name: str):
        return reader.fields[f"gemma3.{name}"].contents()

    n_vocab, dim = weights["token_embd.weight"].shape
    config = transformers.Gemma3TextConfig(
        vocab_size=n_vocab,
        hidden_size=dim,
        intermediate_size=key("feed_forward_length"),
        num_hidden_layers=key("block_count"),
        num_attention_heads=key("attention.head_count"),
        num_key_value_heads=key("attention.head_count_kv"),
        head_dim=key("attention.key_length"),
        query_pre_attn_scalar=key("attention.key_length"),
        sliding_window=key("attention.sliding_window"),
        rms_norm_eps=key("attention.layer_norm_rms_epsilon"),
        rope_parameters=_gemma3(rope_theta=key("rope.freq_base")),
        attn_implementation="eager",
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    model = transformers.Gemma3ForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        weight = weights[names.get_name(name, try_suffixes=(".weight",))]
        parameter.data = weight - CASES["gemma3"].norm_shift if name.endswith("norm.weight") else weight
    return model


def export(
    model: torch.nn.Module, case: Case, path: Path, *, other: Mapping[str, object] | None = None
) -> Path:
    """Write the model. `other` are keys (without the architecture's name) to change; None takes one away."""
    config = model.config
    values = {
        f"{case.arch}.{key}": value for key, value in {**_metadata(config, case), **(other or {})}.items()
    }
    values |= tiny._vocabulary(VOCAB, "llama-bpe", False)
    writer = gguf.GGUFWriter(path, case.arch)
    for key, value in values.items():
        if value is not None:
            tiny._add_value(writer, key, value)
    for name, data in _tensors(model, case):
        writer.add_tensor(name, np.ascontiguousarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: torch.nn.Module, case: Case):
    config = model.config
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch),
        config.num_hidden_layers,
    )
    for name, parameter in model.named_parameters():  # a tied head is not among them
        data = parameter.detach().numpy()
        if name.endswith("norm.weight"):
            data = data + np.float32(case.norm_shift)
        if case.permuted and ".q_proj." in name:
            data = _interleave(data, config.num_attention_heads)
        if case.permuted and ".k_proj." in name:
            data = _interleave(data, config.num_key_value_heads)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), data
    for name, factors in _rope_factors(config).items():
        yield name, np.array(factors)


def _interleave(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows i and i + dim / 2 of every head next to each other."""
    return rows.reshape(n_heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rope(config: object) -> dict:
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def _rope_factors(config: object) -> dict[str, list[float]]:
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {
            "rope_factors_long.weight": rope["long_factor"],
            "rope_factors_short.weight": rope["short_factor"],
        }
    if rope["rope_type"] != "llama3":
        return {}
    dim = config.hidden_size // config.num_attention_heads
    divisors = []
    for i in range(0, dim, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (i / dim))
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": divisors}


def _metadata(config: object, case: Case) -> dict[str, object]:
    """What the converter writes, without the architecture's name."""
    rope = _rope(config)
    head_dim = getattr(config, "head_dim", None)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if head_dim:
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if case.permuted:
        values["rope.dimension_count"] = head_dim or config.hidden_size // config.num_attention_heads
    if rope["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": float(rope["factor"])}
    if rope["rope_type"] == "yarn":
        values["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if case.arch.startswith("gemma"):
        values["attention.sliding_window"] = config.sliding_window
    if case.arch == "gemma2":
        del values["rope.freq_base"]
    if case.arch == "granite":
        values |= {
            "attention.scale": config.attention_multiplier,
            "embedding_scale": config.embedding_multiplier,
            "residual_scale": config.residual_multiplier,
            "logit_scale": config.logits_scaling,
        }
    if case.arch == "phi3":
        original = rope.get("original_max_position_embeddings", config.original_max_position_embeddings)
        values["rope.scaling.original_context_length"] = original
        partial = rope.get("partial_rotary_factor", 1.0)
        values["rope.dimension_count"] = int(partial * config.hidden_size) // config.num_attention_heads
        if rope["rope_type"] == "longrope":
            scale = config.max_position_embeddings / original
            values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return {**values, **case.metadata}
