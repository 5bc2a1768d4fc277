"""Logits of tiny random models on every device against an independent float64 forward pass."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import reference
from probe import greedy, last_logits
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.errors import DeviceError
from realm_web.runtime.adapters import open_device

TOKENS = [256, 5, 17, 200, 3, 99, 256, 31, 8, 64, 77, 12, 250, 1, 0, 45, 45, 45, 100, 7]

VARIANTS = {
    "plain": {},
    "tied": {"tied": True},
    "one kv head, wide heads": {"n_kv_heads": 1, "head_dim": 40},
    "no grouping": {"n_heads": 2, "n_kv_heads": 2},
    "biases": {"biases": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
    "a bias on v only": {"biases": ("attn_v",)},
    "rope_freqs": {"rope_freqs": True, "rope_base": 500000.0},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context_length": 64}},
    "formats side by side": {
        "dim": 256,
        "ffn": 256,
        "quant": {"*attn_v*": "Q6_K", "*ffn_up*": "Q8_0", "*": "Q4_K"},
    },
    "three layers": {"n_layers": 3, "ffn": 96},
    "heads by layer": {
        "metadata": {"llama.attention.head_count": [4, 2], "llama.attention.head_count_kv": [1, 2]},
        "shapes": {
            **{f"blk.0.attn_{name}.weight": (16, 64) for name in "kv"},
            "blk.1.attn_q.weight": (32, 64),
            "blk.1.attn_output.weight": (64, 32),
        },
    },
}
for name in ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
    VARIANTS[name] = {"quant": name}
for name in ("Q4_K", "Q5_K", "Q6_K"):
    VARIANTS[name] = {"quant": name, "dim": 256, "ffn": 256}


async def logits_of(engine: Engine, tokens: list[int]) -> np.ndarray:
    """The logits after the last token."""
    await greedy(engine, tokens)
    return await last_logits(engine)


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("device", ["cpu", "webgpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_float64_forward_pass(tmp_path, device, variant):
    model = write_tiny(tmp_path / "tiny.gguf", **VARIANTS[variant])
    want = reference.logits(model.weights, model.metadata, TOKENS)[-1]

    async def main():
        engine = await Engine.open(model.path, device=device, max_seqs=2, max_rows=32)
        got = await logits_of(engine, TOKENS)
        await engine.close()
        return got

    # keys and values are kept in float16 (11 bits), and the matmul's tiles too where the device has f16
    assert error(asyncio.run(main()), want) < 4e-3


def test_weights_cut_into_shards_give_the_same_logits(tmp_path):
    model = write_tiny(tmp_path / "tiny.gguf", quant="Q4_0", vocab=3000)

    async def main(max_binding):
        device = await open_device("webgpu")
        if max_binding:
            device.limits = replace(device.limits, max_binding=max_binding)
        engine = await Engine.open(model.path, device=device, max_seqs=1, max_rows=32, context=64)
        n_shards = len(engine.runner.model.token_embd.shards), len(engine.runner.model.output.shards)
        got = await logits_of(engine, TOKENS)
        await engine.close()
        return got, n_shards

    whole, n_shards = asyncio.run(main(None))
    assert n_shards == (1, 1)
    cut, n_shards = asyncio.run(main(1 << 15))
    assert n_shards == (3, 3)
    assert (cut == whole).all()


def test_a_device_without_enough_memory_says_how_much_is_needed_and_was_had(tmp_path, monkeypatch):
    model = write_tiny(tmp_path / "tiny.gguf")

    async def main():
        device = await open_device("cpu")
        alloc = device.backend.alloc

        def scarce(nbytes, label):
            if device.allocated + nbytes > 200_000:
                raise DeviceError(f"no room for {label}")
            return alloc(nbytes, label)

        monkeypatch.setattr(device.backend, "alloc", scarce)
        await Engine.open(model.path, device=device)

    with pytest.raises(
        DeviceError, match=r"no room for .* \(the model needs about .* GB on .*; .* GB were had"
    ):
        asyncio.run(main())
