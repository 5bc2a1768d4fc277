"""Tiny random mixtures of experts of `transformers`, and GGUF files of them as llama.cpp's converter does it.

The converter parts the fused gate and up matrices (Qwen3: one after the other; gpt-oss: row by row, turned)
and keeps the experts of a layer in one 3-D tensor. What the dense families need too is in `hf_models.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import gguf
import hf_models
import numpy as np
import tiny
import torch
from hf_models import VOCAB

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
        "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}  # fmt: skip
QWEN = {"num_hidden_layers": 2, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 96, "norm_topk_prob": True, "tie_word_embeddings": False}  # fmt: skip
GPT_OSS = {"num_hidden_layers": 3, "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
           "intermediate_size": 96, "sliding_window": 20, "rope_parameters": YARN}  # fmt: skip


@dataclass(frozen=True)
class Case(hf_models.Case):
    """`types` says in which type of ggml the tensors of a name are written; others are F32."""

    types: Mapping[str, str] | None = None

    def build(self, seed: int = 0) -> torch.nn.Module:
        model = super().build(seed)
        for name, weight in model.named_parameters():
            if name.endswith("gate_up_proj"):
                weight.data *= 5  # so that the clamps of gpt-oss are reached
            if name.endswith("sinks"):
                weight.data = weight.data * 5 + 1
        return model


def qwen(
    name: str = "qwen3moe", norm: bool = True, metadata: Mapping[str, object] | None = None, **settings
) -> Case:
    types = settings.pop("types", None)
    keys = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 96} | (metadata or {})
    settings = QWEN | {"norm_topk_prob": norm} | settings
    return Case(name, "Qwen3Moe", settings, metadata=keys, types=types)


def gpt_oss(types: Mapping[str, str] | None = None, **settings) -> Case:
    keys = {
        "expert_count": 6,
        "expert_used_count": 2,
        "expert_feed_forward_length": 96,
        "attention.sliding_window": 20,
    }
    return Case("gpt-oss", "GptOss", GPT_OSS | settings, metadata=keys, types=types)


CASES = {
    "qwen3moe": qwen(),
    "qwen3moe, weights as of all": qwen(norm=False, metadata={"expert_weights_norm": False}),
    "qwen3moe, gate and up of two formats": qwen(
        types={"*gate_exps*": "Q8_0", "*up_exps*": "F16", "*down_exps*": "Q4_1"}
    ),
    "gpt-oss": gpt_oss(),
    "gpt-oss, MXFP4": gpt_oss({"*_exps.weight": "MXFP4", "*attn_?.weight": "Q8_0"}),
    "gpt-oss, gate and up of two formats": gpt_oss({"*gate_exps.weight": "Q8_0", "*up_exps.weight": "Q4_0"}),
}  # fmt: skip


def tensors(model: torch.nn.Module, case: Case) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the file, and views of the parameters as they go there."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        data, (head, _, last) = parameter.detach(), name.rpartition(".")
        if not head.endswith("experts"):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            yield known + ".weight" * name.endswith("sinks"), data
            continue
        at = f"blk.{name.split('.')[2]}.ffn_"
        kind = "bias" if last.endswith("_bias") else "weight"
        if case.family == "GptOss" and kind == "weight":
            data = data.transpose(1, 2)
        if last.startswith("down"):
            yield f"{at}down_exps.{kind}", data
        elif case.family == "GptOss":
            yield f"{at}gate_exps.{kind}", data[:, ::2]
            yield f"{at}up_exps.{kind}", data[:, 1::2]
        else:
            n = data.shape[1] // 2
            yield f"{at}gate_exps.{kind}", data[:, :n]
            yield f"{at}up_exps.{kind}", data[:, n:]


def export(
    model: torch.nn.Module, case: Case, path: Path, *, other: Mapping[str, object] | None = None,
    without: str = "", reshaped: Mapping[str, tuple[int, ...]] | None = None,
) -> Path:  # fmt: skip
    """Write the model, whose weights become what the blocks in the file decode to.

    `other`: keys to change (None takes one away). `without`: a tensor to leave out. `reshaped`: tensors to
    replace by zeros of another shape.
    """
    values = {
        f"{case.arch}.{key}": v
        for key, v in {**hf_models._metadata(model.config, case), **(other or {})}.items()
    }
    values |= tiny._vocabulary(VOCAB, "llama-bpe", False)
    writer = gguf.GGUFWriter(path, case.arch)
    for key, value in values.items():
        if value is not None:
            tiny._add_value(writer, key, value)
    for name, view in tensors(model, case):
        if name == without:
            continue
        type_name = next((t for p, t in (case.types or {}).items() if fnmatchcase(name, p)), "F32")
        ggml_type = gguf.GGMLQuantizationType[type_name]
        data = gguf.quants.quantize(np.ascontiguousarray(view.numpy()), ggml_type)
        view.copy_(torch.from_numpy(gguf.quants.dequantize(data, ggml_type).reshape(view.shape).copy()))
        if name in (reshaped or {}):
            data, ggml_type = np.zeros(reshaped[name], np.float32), gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, data, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
