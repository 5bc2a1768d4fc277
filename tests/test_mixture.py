"""Which type each tensor gets, against files that llama-quantize made and the counts of well-known ones."""

from collections import Counter

import numpy as np
import pytest

from realm_web import mixture
from realm_web.errors import UnsupportedError
from realm_web.gguf import GGUFFile, Metadata, TensorInfo, parse
from realm_web.quantize import quantize
from realm_web.quants import FORMATS


def model(
    n_layers: int = 32,
    dim: int = 4096,
    *,
    kv_heads: int = 8,
    experts: int = 0,
    tied: bool = False,
    extra: dict[str, tuple[int, ...]] | None = None,
) -> GGUFFile:
    """The header of a Llama of 32 heads in F16: by default Llama-3-8B's."""
    ffn = (dim, 256, experts) if experts else (dim, 256)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (dim, 512), "output_norm.weight": (dim,)}
    if not tied:
        shapes["output.weight"] = (dim, 512)
    suffix = "_exps" if experts else ""
    for i in range(n_layers):
        layer = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (dim, 256))
        layer |= {f"ffn_{name}{suffix}": ffn for name in ("gate", "up", "down")}
        layer |= {"attn_norm": (dim,), "ffn_norm": (dim,)}
        layer |= {"ffn_gate_inp": (dim, experts)} if experts else {}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= extra or {}
    tensors = {
        name: TensorInfo(name, shape, 1 if len(shape) > 1 else 0, 0, 0) for name, shape in shapes.items()
    }
    metadata = Metadata({"general.architecture": "llama", "llama.block_count": n_layers})
    metadata |= {"llama.attention.head_count": 32, "llama.attention.head_count_kv": kv_heads}
    metadata |= {"llama.expert_count": experts} if experts else {}
    return GGUFFile(3, metadata, tensors, 0, 0, 32)


def chosen(file: GGUFFile, name: str, **how) -> dict[str, str]:
    return mixture.choose(file, mixture.file_type(name), **how)


def counts(types: dict[str, str]) -> dict[str, int]:
    return dict(Counter(type_name for type_name in types.values() if type_name != "F32"))


@pytest.mark.parametrize(
    ("name", "kv_heads", "want"),
    [
        # as the files of Llama-2-7B (32 key-value heads) and Llama-3-8B (8) on Hugging Face
        ("Q4_K_M", 8, {"Q4_K": 193, "Q6_K": 33}),
        ("Q5_K_M", 8, {"Q5_K": 193, "Q6_K": 33}),
        ("Q4_K_S", 8, {"Q4_K": 217, "Q5_K": 8, "Q6_K": 1}),
        ("Q5_K_S", 8, {"Q5_K": 225, "Q6_K": 1}),
        ("Q3_K_S", 32, {"Q3_K": 225, "Q6_K": 1}),
        ("Q3_K_M", 32, {"Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1}),
        ("Q3_K_L", 32, {"Q3_K": 129, "Q5_K": 96, "Q6_K": 1}),
        ("Q2_K", 8, {"Q2_K": 129, "Q3_K": 64, "Q4_K": 32, "Q6_K": 1}),
        ("Q2_K", 32, {"Q2_K": 129, "Q3_K": 96, "Q6_K": 1}),
        ("IQ4_XS", 8, {"IQ4_XS": 189, "Q5_K": 36, "Q6_K": 1}),
        ("Q6_K", 8, {"Q6_K": 226}),
        ("Q8_0", 8, {"Q8_0": 226}),
        ("Q4_0", 8, {"Q4_0": 225, "Q6_K": 1}),
        ("F16", 8, {"F16": 226}),
    ],
)
def test_the_counts_of_a_7b_model_are_those_of_llama_quantize(name, kv_heads, want):
    assert counts(chosen(model(kv_heads=kv_heads), name)) == want


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("Q4_K_M", {"Q4_K": 113, "Q8_0": 64, "Q5_K": 32, "Q6_K": 17, "F16": 32}),
        ("MXFP4_MOE", {"MXFP4": 96, "Q8_0": 130, "F16": 32}),
    ],
)
def test_a_mixture_of_eight_experts_keeps_its_router_and_favours_attention(name, want):
    types = chosen(model(experts=8), name)
    assert counts(types) == want
    assert types["blk.0.ffn_gate_inp.weight"] == "F16"


@pytest.mark.parametrize(("model_file", "name"), [("smollm2_path", "Q4_1"), ("gemma_path", "Q4_K_M")])
def test_a_file_of_llama_quantize_gets_its_own_types(model_file, name, request):
    with open(request.getfixturevalue(model_file), "rb") as file:
        header = parse(file.read(32 << 20))
    assert chosen(header, name) == {t.name: t.type_name for t in header.tensors.values()}


@pytest.mark.parametrize(
    "name", ["Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K", "Q8_0", "IQ4_NL", "TQ1_0", "MXFP4_MOE", "Q2_0"]
)
def test_a_pure_file_has_the_types_of_llama_quantize(name, shared):
    def header(of: str) -> GGUFFile:
        return parse((shared / "fixtures" / f"tiny256-{of}.gguf").read_bytes())

    want = header(name)
    got = chosen(header("F16"), name, pure=True)
    assert got == {t.name: t.type_name for t in want.tensors.values()}
    assert want.metadata["general.file_type"] == mixture.file_type(name).id


def test_a_tied_embedding_is_the_output_and_gets_its_bits():
    assert chosen(model(tied=True), "Q4_0")["token_embd.weight"] == "Q6_K"
    assert chosen(model(), "Q4_0")["token_embd.weight"] == "Q4_0"
    assert chosen(model(tied=True), "Q4_0", pure=True)["token_embd.weight"] == "Q4_0"
    assert chosen(model(), "TQ2_0")["token_embd.weight"] == "Q4_K"


def test_rows_that_are_no_multiple_of_256_get_smaller_blocks():
    types = chosen(model(dim=576), "Q4_K_M")
    assert set(types.values()) == {"F32", "Q5_0", "Q8_0"}
    assert set(chosen(model(dim=576), "Q3_K_M").values()) == {"F32", "Q4_0", "Q5_0", "Q5_1", "Q8_0"}
    assert set(chosen(model(dim=40), "Q4_0").values()) == {"F32", "F16"}


def test_vectors_norms_biases_and_small_matrices_stay():
    kept = {"blk.0.attn_v.bias": (256,), "rope_freqs.weight": (64,), "blk.0.x_norm.weight": (256, 4)}
    kept |= {"blk.0.shortconv.conv.weight": (256, 3), "blk.0.odd.weight": (256, 1)}
    file = model(2, extra=kept)
    types = chosen(file, "Q4_K_M")
    assert all(types[name] == file.tensors[name].type_name for name in kept)


def test_a_70b_model_gets_five_bits_for_the_attention_values():
    types = chosen(model(80), "Q4_K_S")
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(80)} == {"Q5_K"}


def test_names_are_found_in_any_case_and_an_unknown_one_is_answered_with_all():
    assert mixture.file_type("q4_k").name == "Q4_K_M"
    with pytest.raises(UnsupportedError, match="'Q9' to quantise to; there are F32, F16"):
        mixture.file_type("Q9")


def test_every_type_that_a_mixture_gives_can_be_made():
    for file in (model(), model(dim=576), model(experts=8), model(dim=40)):
        for name in mixture.FILE_TYPES:
            for type_name in set(chosen(file, name).values()):
                quantize(type_name, np.zeros((1, FORMATS[type_name].block_elements), np.float32))
