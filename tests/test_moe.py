"""Mixtures of experts against PyTorch and `transformers` on the same weights, in float32 all the way."""

import asyncio
import os
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from probe import greedy, last_logits

from realm_web.engine import Engine
from realm_web.errors import FormatError, RealmError, UnsupportedError
from realm_web.runtime.adapters import open_device

WHY = "torch and transformers are not installed: pip install -e '.[oracle]', or make test-oracle"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be fetched
pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)
hf_models = pytest.importorskip("hf_models")
hf = pytest.importorskip("hf_moe")

TOLERANCE = 1e-4
N_PROMPT, N_DECODED = 70, 5  # three windows of 20
PROMPT = np.random.default_rng(7).integers(0, 300, N_PROMPT).tolist()


@cache
def model_of(name: str):
    return hf.CASES[name].build()


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


def answers(path, device, asks: list[tuple[list[int], int]], **sizes) -> list[tuple[list[int], np.ndarray]]:
    """Per prompt n greedy tokens, and the logits from which the last of them was taken."""

    async def main():
        engine = await Engine.open(
            path, device=device, kv_type="f32", **{"max_seqs": 1, "max_rows": 32, **sizes}
        )
        try:
            return [(await greedy(engine, *ask), await last_logits(engine)) for ask in asks]
        finally:
            await engine.close()

    return asyncio.run(main())


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("device", ["cpu", "webgpu"])
@pytest.mark.parametrize("name", hf.CASES)
def test_logits_of_prompts_and_of_decode_steps_equal_those_of_transformers(files, name, device):
    path = files(name)  # first: it gives the model the weights that are in the file
    asks = [(PROMPT[:7], 1), (PROMPT, 1), (PROMPT, N_DECODED)]
    for (prompt, n), (ids, logits) in zip(asks, answers(path, device, asks), strict=True):
        exact = hf_models.logits_of(model_of(name), prompt + ids[:-1])[-1]
        assert len(ids) == n
        assert error(logits, exact) < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3moe", "gpt-oss"])
def test_packed_weights_on_the_cpu_give_the_same_logits(files, name):
    [(ids, logits)] = answers(files(name), "cpu", [(PROMPT, N_DECODED)], cpu_dequant=False)
    assert error(logits, hf_models.logits_of(model_of(name), PROMPT + ids[:-1])[-1]) < TOLERANCE


@pytest.mark.parametrize("name, device", [("qwen3moe", "cpu"), ("gpt-oss, MXFP4", "webgpu")])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(files, name, device):
    [(_, whole)] = answers(files(name), device, [(PROMPT, 1)], max_rows=128)
    for max_rows in (5, 16):
        [(_, cut)] = answers(files(name), device, [(PROMPT, 1)], max_rows=max_rows)
        assert error(cut, whole) < 1e-5


@pytest.mark.parametrize("name, device", [("gpt-oss", "cpu"), ("qwen3moe", "webgpu")])
def test_requests_in_company_give_the_tokens_that_they_give_alone(files, name, device):
    prompts = [PROMPT[:5], PROMPT[10:40], PROMPT[30:33]]
    alone = [ids for ids, _ in answers(files(name), device, [(p, N_DECODED) for p in prompts])]

    async def main():
        engine = await Engine.open(files(name), device=device, kv_type="f32", max_seqs=3, max_rows=32)
        try:
            return await asyncio.gather(*(greedy(engine, p, N_DECODED) for p in prompts))
        finally:
            await engine.close()

    assert asyncio.run(main()) == alone


@pytest.mark.parametrize(
    "name, max_binding, shards_of_down",
    [
        ("qwen3moe", 1 << 16, 4),
        ("gpt-oss, MXFP4", 1 << 14, 2),
        ("gpt-oss, gate and up of two formats", 1 << 15, 6),
    ],
)
def test_experts_cut_into_shards_give_the_same_logits(files, name, max_binding, shards_of_down):
    async def main(max_binding):
        device = await open_device("webgpu")
        if max_binding:
            device.limits = replace(device.limits, max_binding=max_binding)
        engine = await Engine.open(
            files(name), device=device, kv_type="f32", max_seqs=1, max_rows=16, context=64
        )
        ffn = engine.runner.model.layers[0].ffn
        n_shards = [len(matrices.weight.shards) for matrices in ffn.matrices]
        await greedy(engine, PROMPT[:20], 3)
        logits = await last_logits(engine)
        await engine.close()
        return n_shards, logits

    n_shards, whole = asyncio.run(main(None))
    assert set(n_shards) == {1}
    n_shards, cut = asyncio.run(main(max_binding))
    assert n_shards[0] >= 2 and n_shards[-1] == shards_of_down
    assert error(cut, whole) < 1e-5  # sums of the down product in another order


def test_only_the_chosen_experts_count_as_read(files):
    async def main():
        engine = await Engine.open(files("gpt-oss"), device="cpu", max_seqs=1, max_rows=32)
        model = engine.runner.model
        await engine.close()
        return model

    model = asyncio.run(main())
    experts = sum(m.weight.nbytes for layer in model.layers for m in layer.ffn.matrices)
    not_read = experts * 4 // 6 + model.token_embd.nbytes
    assert model.bytes_per_token == model.weight_bytes - not_read


FILES = {
    "more used than there are": ({"expert_used_count": 9}, "expert_used_count is 9, but expert_count is 8"),
    "none used": ({"expert_used_count": 0}, "'qwen3moe.expert_used_count' is 0"),
    "none": ({"expert_count": 0}, "'qwen3moe.expert_count' is 0"),
    "no count": ({"expert_count": None}, "'qwen3moe.expert_count' is missing"),
    "no used count": ({"expert_used_count": None}, "'qwen3moe.expert_used_count' is missing"),
    "absurdly many": ({"expert_count": 1 << 20}, "'qwen3moe.expert_count' is 1048576"),
    "negative": ({"expert_used_count": -1}, "'qwen3moe.expert_used_count' is -1"),
    "a text": ({"expert_count": "8"}, "'qwen3moe.expert_count' is '8'"),
    "fewer than the tensors have": ({"expert_count": 7}, r"tensor .*_exps.* has shape \(64, 96, 8\)"),
    "more than the tensors have": ({"expert_count": 16}, r"tensor .*_exps.* has shape \(64, 96, 8\)"),
    "another length": ({"expert_feed_forward_length": 64}, r"tensor .*_exps.* has shape \(64, 96, 8\)"),
    "no length": ({"expert_feed_forward_length": None}, "'qwen3moe.expert_feed_forward_length' is missing"),
    "length 0": ({"expert_feed_forward_length": 0}, "'qwen3moe.expert_feed_forward_length' is 0"),
    "a length of part of a chunk": ({"expert_feed_forward_length": 40}, "expert_feed_forward_length is 40"),
    "an unknown gate": ({"expert_gating_func": 2}, "expert_gating_func is 2; supported are 1 and 3"),
}  # fmt: skip


def refuse(path) -> str:
    async def main():
        device = await open_device("cpu")
        await Engine.open(path, device=device)

    with pytest.raises(RealmError) as caught:
        asyncio.run(main())
    assert isinstance(caught.value, FormatError | UnsupportedError) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("fault", FILES)
def test_malformed_counts_of_experts_give_one_clear_error(tmp_path, fault):
    other, message = FILES[fault]
    path = hf.export(model_of("qwen3moe"), hf.CASES["qwen3moe"], tmp_path / "broken.gguf", other=other)
    assert re.search(message, refuse(path))


@pytest.mark.parametrize(
    "tensor, shape",
    [
        ("blk.1.ffn_down_exps.weight", (5, 64, 96)),
        ("blk.0.ffn_gate_inp.weight", (7, 64)),
        ("blk.1.ffn_up_exps.bias", (5, 96)),
        ("blk.0.ffn_up_exps.weight", (96, 64)),
        ("blk.2.attn_sinks.weight", (5,)),
    ],
)
def test_tensors_of_another_number_of_experts_give_one_clear_error(tmp_path, tensor, shape):
    case = hf.CASES["gpt-oss"]
    path = hf.export(case.build(), case, tmp_path / "broken.gguf", reshaped={tensor: shape})
    message = refuse(path)
    assert tensor in message and str(shape[::-1]) in message


@pytest.mark.parametrize(
    "tensor", ["blk.1.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight", "blk.2.attn_sinks.weight"]
)
def test_a_missing_tensor_of_the_mixture_is_named(tmp_path, tensor):
    case = hf.CASES["gpt-oss"]
    path = hf.export(case.build(), case, tmp_path / "broken.gguf", without=tensor)
    assert tensor in refuse(path)
