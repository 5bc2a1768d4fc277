"""Architectures: each says only how it differs from Llama in the shared block of `transformer.py`."""

from __future__ import annotations

from realm_web.errors import UnsupportedError
from realm_web.gguf import GGUFFile, show
from realm_web.models.config import Architecture, ModelConfig
from realm_web.models.transformer import Transformer, check_tensors
from realm_web.runtime.device import Device

GEMMA = {"rope_neox": True, "norms": "both", "act": "gelu_mul", "embed_by_dim": True}

ARCHITECTURES = {
    "llama": Architecture(),  # and Mistral, SmolLM 2
    "qwen2": Architecture(rope_neox=True),
    "qwen3": Architecture(rope_neox=True, qk_norm="head"),
    "qwen3moe": Architecture(rope_neox=True, qk_norm="head", experts=True),
    "gemma2": Architecture(**GEMMA, global_every=2, window=4096, big_layers=46),
    "gemma3": Architecture(**GEMMA, qk_norm="head", global_every=6, local_rope_base=10000.0, big_layers=62),
    "phi3": Architecture(rope_neox=True, fused=True, global_every=1),
    "smollm3": Architecture(nope_every=4),
    "granite": Architecture(scales=True),
    "lfm2": Architecture(
        rope_neox=True, qk_norm="head", short_conv=True, global_every=1, final_norm="token_embd_norm"
    ),
    "gpt-oss": Architecture(
        rope_neox=True,
        experts=True,
        act="swiglu_oai",
        sinks=True,
        global_every=2,
        ffn_norm="post_attention_norm",
        yarn_whole_pairs=False,
    ),
    "olmo2": Architecture(  # and OLMo 3, which has windows
        rope_neox=True,
        qk_norm="all",
        norms="post",
        global_every=4,
        local_rope_base=0.0,
        yarn_whole_factor=True,
    ),
}


def read_config(gguf: GGUFFile) -> ModelConfig:
    """The model's configuration; UnsupportedError names an architecture that is not in the table."""
    name = gguf.metadata.get_str("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {show(name)} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    config = ModelConfig.from_metadata(gguf.metadata, ARCHITECTURES[name])
    check_tensors(config, gguf)
    return config


def build(gguf: GGUFFile, device: Device) -> Transformer:
    """Allocate the model on the device; its weights are still to be loaded."""
    return Transformer(read_config(gguf), gguf, device)
