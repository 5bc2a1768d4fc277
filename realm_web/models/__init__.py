"""Architectures: each says only how it differs from the shared block in `transformer.py`."""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.errors import UnsupportedError
from realm_web.gguf import GGUFFile
from realm_web.models.config import ModelConfig
from realm_web.models.transformer import Transformer, check_tensors
from realm_web.runtime.device import Device


@dataclass(frozen=True)
class Architecture:
    """What differs between decoders."""

    rope_neox: bool  # pairs are (i, i + dim / 2) rather than (2i, 2i + 1)


ARCHITECTURES = {
    "llama": Architecture(rope_neox=False),
}


def read_config(gguf: GGUFFile) -> ModelConfig:
    """The model's configuration; UnsupportedError names an architecture that is not in the table."""
    name = gguf.metadata.get_str("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {name!r} is not supported; supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    config = ModelConfig.from_metadata(gguf.metadata, rope_neox=ARCHITECTURES[name].rope_neox)
    check_tensors(config, gguf)
    return config


def build(gguf: GGUFFile, device: Device) -> Transformer:
    """Allocate the model on the device; its weights are still to be loaded."""
    return Transformer(read_config(gguf), gguf, device)
