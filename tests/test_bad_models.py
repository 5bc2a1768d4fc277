"""Files whose metadata or tensors make no model: each is refused by name, when inspected and when loaded."""

import asyncio
import math
import re
import struct
from types import MappingProxyType

import pytest
from tiny import write_tiny

from realm_web.cli.inspect import judge
from realm_web.engine import Engine
from realm_web.errors import FormatError, RealmError, UnsupportedError
from realm_web.gguf import parse

GEMMA_NORMS = {f"blk.{i}.post_{name}_norm.weight": (64,) for i in range(2) for name in ("attention", "ffw")}
FUSED = {f"blk.{i}.attn_qkv.weight": (128, 64) for i in range(2)} | {
    f"blk.{i}.ffn_up.weight": (256, 64) for i in range(2)
}
PARTS = ("attn_q", "attn_k", "attn_v", "ffn_gate")
UNFUSED = [f"blk.{i}.{name}.weight" for i in range(2) for name in PARTS]
MODELS = {
    "llama": {},
    "gemma2": {"shapes": GEMMA_NORMS, "tied": True},
    "phi3": {"shapes": FUSED, "omit": UNFUSED},
    "smollm3": {"n_layers": 4},
    "granite": {},
    "olmo2": {
        "shapes": GEMMA_NORMS
        | {f"blk.{i}.attn_q_norm.weight": (64,) for i in range(2)}
        | {f"blk.{i}.attn_k_norm.weight": (32,) for i in range(2)},
        "omit": [f"blk.{i}.{name}_norm.weight" for i in range(2) for name in ("attn", "ffn")],
    },
}


def problem_of(path) -> RealmError:
    """What loading says, which inspecting says too."""
    data = path.read_bytes()
    verdict = judge(parse(data, len(data)))
    with pytest.raises(RealmError) as caught:
        asyncio.run(Engine.open(path, device="cpu"))
    assert any(problem in str(caught.value) for problem in verdict.problems), verdict.problems
    assert "\n" not in str(caught.value)
    return caught.value


def refused(
    tmp_path, model: str, kind: type, message: str, *, shapes=MappingProxyType({}), omit=(), **options
) -> None:  # fmt: skip
    base = MODELS[model]
    options["shapes"] = {**base.get("shapes", {}), **shapes}
    options["omit"] = {*base.get("omit", ()), *omit} - {*shapes}
    path = write_tiny(tmp_path / "bad.gguf", architecture=model, **{**base, **options}).path
    error = problem_of(path)
    assert isinstance(error, kind)
    assert re.search(message, str(error)), error


@pytest.mark.parametrize("model", MODELS)
def test_these_models_are_right_before_something_is_wrong(tmp_path, model):
    data = write_tiny(tmp_path / "good.gguf", architecture=model, **MODELS[model]).path.read_bytes()
    assert not judge(parse(data, len(data))).problems


COUNTS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.key_length", "rope.dimension_count", "vocab_size"),
)


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", True], ids=repr)
@pytest.mark.parametrize("key", COUNTS)
def test_a_count_that_is_none_is_named(tmp_path, key, value):
    refused(
        tmp_path, "llama", FormatError, rf"llama\.{re.escape(key)}'? is ", metadata={f"llama.{key}": value}
    )


REQUIRED = (*COUNTS[:5], "attention.layer_norm_rms_epsilon")


@pytest.mark.parametrize("key", REQUIRED)
def test_a_key_that_is_missing_is_named(tmp_path, key):
    refused(tmp_path, "llama", FormatError, rf"'llama\.{re.escape(key)}'", metadata={f"llama.{key}": None})


HEADS = {"attention.key_length": None, "attention.value_length": None, "rope.dimension_count": None}
WRONG = {
    "heads that share unevenly": (
        "llama",
        FormatError,
        "4 attention heads cannot share 3 key-value heads",
        {"attention.head_count_kv": 3},
    ),
    "more key-value heads than heads": (
        "llama",
        FormatError,
        "4 attention heads cannot share 8",
        {"attention.head_count_kv": 8},
    ),
    "heads that do not divide the embedding": (
        "llama",
        FormatError,
        "embedding_length 64 is not a multiple of head_count 3",
        {"attention.head_count": 3, "attention.head_count_kv": 3, **HEADS},
    ),
    "heads of an odd length": (
        "llama",
        UnsupportedError,
        "heads of 12 elements",
        {"attention.key_length": 12, "attention.value_length": 12, "rope.dimension_count": 12},
    ),
    "values of another length": (
        "llama",
        UnsupportedError,
        "value_length differs",
        {"attention.value_length": 32},
    ),
    "heads by layer, too few": (
        "llama",
        FormatError,
        r"head_count_kv'? .*2",
        {"attention.head_count_kv": [2]},
    ),
    "an odd rotation": (
        "llama",
        FormatError,
        "dimension_count is 7; it must be even",
        {"rope.dimension_count": 7},
    ),
    "a rotation beyond the head": (
        "llama",
        FormatError,
        "dimension_count' is 18",
        {"rope.dimension_count": 18},
    ),
    "an unknown rotation": (
        "llama",
        UnsupportedError,
        "rope.scaling.type is 'ntk'; supported are none, linear, yarn, longrope",
        {"rope.scaling.type": "ntk"},
    ),
    "a rotation of no type": ("llama", FormatError, "rope.scaling.type' is 3", {"rope.scaling.type": 3}),
    "a rotation base of 0": ("llama", FormatError, "freq_base' is 0.0", {"rope.freq_base": 0.0}),
    "a rotation base of 1": ("llama", FormatError, "freq_base' is 1.0", {"rope.freq_base": 1.0}),
    "a rotation base that is no number": (
        "llama",
        FormatError,
        "freq_base' is nan",
        {"rope.freq_base": math.nan},
    ),
    "a scaling factor of 0": (
        "llama",
        FormatError,
        "factor' is 0.0",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0},
    ),
    "YaRN of no context": (
        "llama",
        FormatError,
        "original_context_length' is 0",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 0},
    ),
    "LongRoPE without factors": (
        "phi3",
        FormatError,
        "tensor 'rope_factors_long.weight' is missing",
        {"rope.scaling.type": "longrope"},
    ),
    "a window of 0": ("gemma2", FormatError, "sliding_window' is 0", {"attention.sliding_window": 0}),
    "a window below 0": ("phi3", FormatError, "sliding_window' is -1", {"attention.sliding_window": -1}),
    "windows by layer, too few": (
        "gemma2",
        FormatError,
        "sliding_window_pattern' has 1",
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [True]},
    ),
    "windows by layer, of another type": (
        "olmo2",
        FormatError,
        "sliding_window_pattern': element 0 is 8",
        {"attention.sliding_window": 8, "attention.sliding_window_pattern": [8, 8]},
    ),
    "a cap below 0": (
        "gemma2",
        FormatError,
        "attn_logit_softcapping' is -1",
        {"attn_logit_softcapping": -1.0},
    ),
    "a cap that is no number": (
        "gemma2",
        FormatError,
        "final_logit_softcapping' is inf",
        {"final_logit_softcapping": math.inf},
    ),
    "a scale of 0": ("granite", FormatError, "logit_scale' is 0.0", {"logit_scale": 0.0}),
    "a scale that is no number": (
        "granite",
        FormatError,
        "residual_scale' is nan",
        {"residual_scale": math.nan},
    ),
    "an epsilon below 0": (
        "llama",
        FormatError,
        "epsilon' is -1.0",
        {"attention.layer_norm_rms_epsilon": -1.0},
    ),
    "fewer rows than tokens": (
        "llama",
        FormatError,
        "vocab_size is 100, but .* has 320",
        {"vocab_size": 100},
    ),
    "experts": ("llama", UnsupportedError, "with experts", {"expert_count": 4}),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_contradicts_itself_is_named(tmp_path, what):
    model, kind, message, keys = WRONG[what]
    metadata = {f"{model}.{key}": value for key, value in keys.items()}
    refused(tmp_path, model, kind, message, metadata=metadata)


def tensors_of(model: str) -> list[str]:
    """Those of the first layer and of the model."""
    shapes = write_tiny("/dev/null", architecture=model, **MODELS[model]).weights
    return [name for name in shapes if not re.match(r"blk\.[1-9]", name) and name != "output.weight"]


EVERY = [(model, name) for model in MODELS for name in tensors_of(model)]


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_a_tensor_that_is_missing_is_named(tmp_path, model, name):
    refused(tmp_path, model, FormatError, f"tensor '{re.escape(name)}' is missing", omit=[name])


@pytest.mark.parametrize(("model", "name"), EVERY)
def test_a_tensor_of_another_shape_is_named_with_both(tmp_path, model, name):
    shape = (96, 32) if not name.endswith("norm.weight") else (96,)
    message = rf"tensor '{re.escape(name)}' has shape \({shape[-1]},.*\); the metadata asks for "
    refused(tmp_path, model, FormatError, message, shapes={name: shape})


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        ("llama", "blk.2.attn_q.weight", "is of a layer beyond block_count 2"),
        ("llama", "blk.0.attn_norm.bias", "is not one that the llama architecture has here"),
        ("llama", "blk.0.attn_qkv.weight", "is not one that"),
        ("llama", "blk.0.attn_q_norm.weight", "is not one that"),
        ("llama", "output.bias", "is not one that"),
        ("phi3", "blk.0.attn_q.weight", "is not one that"),
        ("olmo2", "blk.0.attn_norm.weight", "is not one that"),
        ("gemma2", "blk.0.attn_q_norm.weight", "is not one that"),
    ],
)
def test_a_tensor_that_nothing_would_read_is_named(tmp_path, model, name, message):
    kind = FormatError if "beyond" in message else UnsupportedError
    refused(tmp_path, model, kind, f"tensor '{re.escape(name)}' {message}", shapes={name: (64,)})


def test_rotation_factors_of_another_length_are_named(tmp_path):
    refused(
        tmp_path, "llama", FormatError, r"'rope_freqs.weight' has shape \(7,\); the metadata asks for \(8,\)",
        rope_freqs=True, shapes={"rope_freqs.weight": (7,)},
    )  # fmt: skip


def test_one_set_of_long_rope_is_not_enough(tmp_path):
    refused(
        tmp_path, "phi3", FormatError, "'rope_factors_short.weight' is missing",
        shapes={"rope_factors_long.weight": (8,)},
    )  # fmt: skip


def test_a_quantised_norm_is_named(tmp_path):
    path = write_tiny(tmp_path / "bad.gguf").path
    entry = b"output_norm.weight" + struct.pack("<IQ", 1, 64)
    data = path.read_bytes()
    assert data.count(entry + struct.pack("<I", 0)) == 1
    path.write_bytes(data.replace(entry + struct.pack("<I", 0), entry + struct.pack("<I", 8)))
    message = "'output_norm.weight' is a vector of type Q8_0; supported are F32, F16 and BF16"
    assert message in str(problem_of(path))
