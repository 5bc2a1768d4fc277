"""Every dense architecture against PyTorch and `transformers` on the same random weights, in float32."""

import asyncio
import os
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from probe import greedy, last_logits

from realm_web.engine import Engine
from realm_web.runtime.adapters import open_device

WHY = "torch and transformers are not installed: pip install -e '.[oracle]', or make test-oracle"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be fetched
pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
hf = pytest.importorskip("hf_models")

# Measured: at most 8e-6 of the largest logit, on numpy and llvmpipe alike, most of it at far positions, where
# transformers keeps angles in float32 (150 rad to 1e-5) and we as fractions of a turn (to 1e-7)
TOLERANCE = 1e-4
PROMPT = np.random.default_rng(7).integers(0, 300, 150).tolist()  # 7 windows of 20, 1.5 rings of 96
N_DECODED = 6
DEEP = "gemma2 of the largest size"
LONG_ROPE = "phi3 without a window, with LongRoPE and partial rotation"
DEVICES = pytest.mark.parametrize("device", ["cpu", "webgpu"])


@cache
def model_of(name: str):
    return hf.CASES[name].build()


@cache
def exact(name: str, tokens: tuple[int, ...]) -> np.ndarray:
    return hf.logits_of(model_of(name), list(tokens))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    @cache
    def path(name: str):
        return hf.export(model_of(name), hf.CASES[name], folder / f"{len(list(folder.iterdir()))}.gguf")

    return path


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setenv("REALM_DISABLE", "f16")


async def check(engine: Engine, name: str, prompt: list[int], n: int) -> None:
    """n greedy tokens are the best ones, and the logits of the last are those of transformers."""
    ids = await greedy(engine, prompt, n)
    want = exact(name, (*prompt, *ids[:-1]))[len(prompt) - 1 :]
    assert len(ids) == n
    assert error(await last_logits(engine), want[-1]) < TOLERANCE
    check_best(ids, want)


def check_best(ids: list[int], want: np.ndarray) -> None:
    lost = want.max(-1) - want[np.arange(len(ids)), ids]
    assert lost.max() <= 2 * TOLERANCE * np.abs(want).max()


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def with_engine(path, device: str, body, **sizes):
    async def main():
        options = {"kv_type": "f32", "max_seqs": 1, "prefix_cache": False, **sizes}
        engine = await Engine.open(path, device=device, **options)
        try:
            return await body(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


@DEVICES
@pytest.mark.parametrize("name", [name for name in hf.CASES if name != DEEP])
def test_logits_of_prompts_in_chunks_and_of_decode_steps_equal_those_of_transformers(files, name, device):
    async def body(engine):
        rings = [pages.ring for pages in engine.runner.memory]
        assert rings == [3 if layer.window else 0 for layer in engine.config.layers]
        if name != LONG_ROPE:  # which has other frequencies for short prompts in transformers
            await check(engine, name, PROMPT[:9], 1)
            await check(engine, name, PROMPT[:9], N_DECODED)
        await check(engine, name, PROMPT, 1)
        await check(engine, name, PROMPT, N_DECODED)

    with_engine(files(name), device, body, max_rows=32)


@DEVICES
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "phi3", "olmo3"])
def test_a_window_over_pages_that_keep_everything_gives_the_same(files, name, device):
    async def body(engine):
        assert not any(pages.ring for pages in engine.runner.memory)
        await check(engine, name, PROMPT, N_DECODED)

    with_engine(files(name), device, body, max_rows=256)


@DEVICES
def test_long_rope_takes_the_short_factors_in_a_short_context(files, device):
    async def body(engine):
        await check(engine, LONG_ROPE, PROMPT[:50], N_DECODED)

    with_engine(files(LONG_ROPE), device, body, max_rows=32, context=64)


def test_the_attention_of_gemmas_largest_sizes_is_scaled_by_the_embedding(files):
    async def body(engine):
        await check(engine, DEEP, PROMPT[:40], 2)

    with_engine(files(DEEP), "cpu", body, max_rows=32)


@DEVICES
def test_sequences_side_by_side_have_rings_of_their_own(files, device):
    prompts = [PROMPT[:100], PROMPT[40:145]]

    async def body(engine):
        assert engine.runner.memory[0].ring
        return await asyncio.gather(*(greedy(engine, prompt, N_DECODED) for prompt in prompts))

    answers = with_engine(files("gemma3"), device, body, max_rows=32, max_seqs=2)
    for prompt, ids in zip(prompts, answers, strict=True):
        check_best(ids, exact("gemma3", (*prompt, *ids[:-1]))[len(prompt) - 1 :])


def test_the_kernels_that_hardware_runs_give_the_same(tmp_path):
    """Here is only a software rasteriser, which has products and attention of its own unless told otherwise.

    Beyond 256 tokens attention is split, also that of a window over a ring.
    """
    case = hf.CASES["gemma2"]
    case = replace(case, settings={**case.settings, "max_position_embeddings": 512})
    model = case.build()
    path = hf.export(model, case, tmp_path / "gemma2.gguf")
    prompt = [*PROMPT, *PROMPT]

    async def main():
        device = await open_device("webgpu")
        device.info = replace(device.info, adapter_type="DiscreteGPU")
        assert not device.info.is_cpu
        engine = await Engine.open(
            path, device=device, kv_type="f32", exact=True, prefix_cache=False, max_seqs=1, max_rows=64
        )
        assert [bool(pages.ring) for pages in engine.runner.memory] == [True, False, True, False]
        ids = await greedy(engine, prompt, N_DECODED)
        logits = await last_logits(engine)
        await engine.close()
        return ids, logits

    ids, logits = asyncio.run(main())
    want = hf.logits_of(model, [*prompt, *ids[:-1]])[len(prompt) - 1 :]
    assert error(logits, want[-1]) < TOLERANCE
    check_best(ids, want)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gemma2", {"attention.sliding_window": 21}),
        ("gemma2", {"attn_logit_softcapping": 6.0}),
        ("gemma2", {"final_logit_softcapping": 4.0}),
        ("gemma3", {"attention.sliding_window": 21}),
        ("gemma3", {"rope.freq_base": 5e5}),
        ("gemma3", {"rope.freq_base_swa": 2e4}),
        ("gemma3 with linear scaling", {"rope.scaling.factor": 4.0}),
        ("qwen2 with YaRN", {"rope.scaling.factor": 2.0}),
        ("phi3", {"attention.sliding_window": 0}),
        (LONG_ROPE, {"rope.scaling.attn_factor": 1.0}),
        ("granite", {"attention.scale": 0.25}),
        ("granite", {"embedding_scale": 5.0}),
        ("granite", {"residual_scale": 0.4}),
        ("granite", {"logit_scale": 5.0}),
        ("granite", {"rope.scaling.finetuned": False}),
        ("olmo3", {"attention.sliding_window_pattern": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_each_key_of_the_metadata_matters(tmp_path, name, other):
    """Which shows that the models above would notice if one were read wrongly."""
    path = hf.export(model_of(name), hf.CASES[name], tmp_path / "other.gguf", other=other)

    async def body(engine):
        await greedy(engine, PROMPT, 1)
        return await last_logits(engine)

    got = with_engine(path, "cpu", body, max_rows=256)
    assert error(got, exact(name, tuple(PROMPT))[-1]) > 30 * TOLERANCE


def test_smollm3_is_not_llama(tmp_path):
    """Its layers without rotation are known by its name alone."""
    case = replace(hf.CASES["smollm3"], arch="llama")
    path = hf.export(model_of("smollm3"), case, tmp_path / "other.gguf")

    async def body(engine):
        await greedy(engine, PROMPT, 1)
        return await last_logits(engine)

    got = with_engine(path, "cpu", body, max_rows=256)
    assert error(got, exact("smollm3", tuple(PROMPT))[-1]) > 30 * TOLERANCE
