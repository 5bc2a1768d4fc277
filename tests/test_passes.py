"""Passes between products: those that another does along the way change nothing but their number."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import tiny
from probe import greedy, last_logits

from realm_web import ops
from realm_web.engine import Engine
from realm_web.ops import attend, matmuls
from realm_web.runner import Bucket

PROMPT = list(range(5, 45))


async def run(path, prompt=PROMPT) -> tuple[np.ndarray, list[str]]:
    """The logits after the prompt, and the labels of the passes that made them."""
    engine = await Engine.open(path, device="webgpu", context=256, max_seqs=1, exact=False)
    try:
        engine.device.info = replace(engine.device.info, adapter_type="DiscreteGPU")
        engine.runner._programs.clear()  # made for a software device, which has no products by tiles
        await greedy(engine, prompt)
        [program] = [p for b, p in engine.runner._programs.items() if b.n_rows >= len(prompt)]
        return await last_logits(engine), [step.label or step.kernel.name for step in program.steps]
    finally:
        await engine.close()


def test_sums_of_shares_make_the_next_products_bytes(tmp_path, monkeypatch):
    model = tiny.write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=512, quant="Q4_K")
    monkeypatch.setattr(matmuls, "LEAST_TURNS", 1)  # a tiny model's products are worth few shares
    together, labels = asyncio.run(run(model.path))
    normed = [label for label in labels if label.endswith("and norm to bytes")]
    assert len(normed) == 3  # two layers, and no norm after the last
    assert "quantise hidden" not in labels
    monkeypatch.setattr(ops.Activations, "may_be_made", lambda x, device: False)
    apart, others = asyncio.run(run(model.path))
    assert len(others) == len(labels) + len(normed) + 2
    assert np.abs(together - apart).max() < 1e-2 * np.abs(apart).max()  # a byte may be rounded the other way


@pytest.mark.parametrize("n_rows", [1, 6])
def test_attention_of_a_few_rows_makes_the_output_products_bytes(tmp_path, monkeypatch, n_rows):
    model = tiny.write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=256, quant="Q4_K")
    monkeypatch.setattr(attend, "LONG", 256)
    together, labels = asyncio.run(run(model.path, PROMPT[:n_rows]))
    assert "quantise attended" not in labels
    monkeypatch.setattr(ops, "attends_to_bytes", lambda *given: False)
    apart, others = asyncio.run(run(model.path, PROMPT[:n_rows]))
    assert others.count("quantise attended") == (2 if n_rows > 1 else 0)  # one row: by the product
    assert len(others) == len(labels) + others.count("quantise attended")
    assert np.abs(together - apart).max() < 1e-2 * np.abs(apart).max()


def test_a_norm_behind_a_norm_is_made_with_it(tmp_path, monkeypatch):
    norms = {f"blk.{i}.post_{part}_norm.weight": (256,) for i in range(2) for part in ("attention", "ffw")}
    norms |= {f"blk.{i}.attn_{x}_norm.weight": (64,) for i in range(2) for x in "qk"}
    options = {"architecture": "gemma3", "shapes": norms, "tied": True, "quant": "Q4_K"}
    model = tiny.write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=512, **options).path
    together, labels = asyncio.run(run(model, PROMPT[:6]))
    monkeypatch.setattr(ops.Activations, "may_be_made", lambda x, device: False)
    apart, others = asyncio.run(run(model, PROMPT[:6]))
    assert labels.count("rmsnorm") == others.count("rmsnorm") - 3
    assert np.abs(together - apart).max() < 1e-2 * np.abs(apart).max()


def test_on_matrix_units_sums_make_halves(tmp_path, monkeypatch):
    """Recorded only: the software device has no such units."""
    model = tiny.write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=512, quant="Q4_K")
    monkeypatch.setattr(matmuls, "LEAST_TURNS", 1)

    async def record() -> list[str]:
        engine = await Engine.open(model.path, device="webgpu", context=256, max_seqs=1, exact=False)
        try:
            device = engine.device
            device.limits = replace(device.limits, max_shared=48 << 10)
            device.info = replace(device.info, adapter_type="DiscreteGPU", subgroup_size=32)
            device.features = device.features | {"subgroup_matrix", "f16", "subgroups"}
            bucket = Bucket(32, 1, 256, decode=False)
            engine.runner._record(bucket)
            return [step.label for step in engine.runner._programs[bucket].steps]
        finally:
            await engine.close()

    labels = asyncio.run(record())
    assert sum(label.endswith("and norm to halves") for label in labels) == 3
    assert sum("ffn_gate+ffn_up to halves" in label for label in labels) == 2
    assert "half_rows hidden" not in labels
