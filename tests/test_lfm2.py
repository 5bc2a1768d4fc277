"""LFM2 against `transformers`: logits, chunks, batches, decoding, slots used again, the state of a slot."""

import asyncio
from contextlib import asynccontextmanager

import gguf
import numpy as np
import pytest
import tiny
from probe import greedy, last_logits

from realm_web.engine import Engine
from realm_web.errors import FormatError, UnsupportedError
from realm_web.gguf import parse
from realm_web.models import read_config
from realm_web.scheduler import Request

torch = pytest.importorskip("torch", reason="torch is not installed: pip install torch transformers")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCAB = 320
TOKENS = [256, 5, 17, 200, 3, 99, 256, 31, 8, 64, 77, 12, 250, 1, 0, 45, 45, 45, 100, 7]
CASES = {
    "three taps": {"layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"]},
    "attention first, two taps, an output matrix": {
        "layer_types": ["full_attention", "conv"], "conv_L_cache": 2, "tie_word_embeddings": False,
    },
    "five taps, biases of the projections": {
        "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 5, "conv_bias": True,
    },
}  # fmt: skip


def build(settings: dict) -> "torch.nn.Module":
    """A random model in which every weight matters."""
    config = transformers.Lfm2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=120, block_multiple_of=32, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_hidden_layers=len(settings["layer_types"]),
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, attn_implementation="eager", **settings,
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data = 1 + 0.2 * noise
        elif name.endswith("conv.conv.bias"):
            weight.data = 0 * noise  # llama.cpp has no such tensor
        else:
            weight.data = 0.2 * noise if weight.ndim == 1 else noise * weight.shape[-1] ** -0.5
    return model


def export(
    model: "torch.nn.Module",
    path,
    other: dict | None = None,
    *,
    conv_bias: bool = False,
    final_norm: str = "token_embd_norm",
) -> None:
    """The file that llama.cpp's convert_hf_to_gguf.py makes of the model. `other`: metadata that differs."""
    config = model.config
    kinds = config.layer_types
    values = {
        "block_count": len(kinds),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": model.model.layers[0].feed_forward.w1.out_features,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [config.num_key_value_heads * (kind != "conv") for kind in kinds],
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "rope.freq_base": config.rope_parameters["rope_theta"],
        "shortconv.l_cache": config.conv_L_cache,
        "vocab_size": VOCAB,
    } | (other or {})
    values = {f"lfm2.{key}": value for key, value in values.items()} | tiny._vocabulary(VOCAB, "lfm2", False)
    writer = gguf.GGUFWriter(path, "lfm2")
    for key, value in values.items():
        tiny._add_value(writer, key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, len(kinds))
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy()
        if name.endswith("conv.conv.bias") and not conv_bias:
            continue
        if name.endswith("conv.conv.weight"):
            data = data.squeeze(1)
        name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name.replace("token_embd_norm", final_norm), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference(model: "torch.nn.Module", tokens: list[int]) -> np.ndarray:
    """Logits after every token."""
    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


@pytest.fixture(scope="module", params=CASES)
def lfm2(request, tmp_path_factory):
    model = build(CASES[request.param])
    path = tmp_path_factory.mktemp("lfm2") / "tiny.gguf"
    export(model, path)
    return model, path


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The first case alone."""
    model = build(CASES["three taps"])
    path = tmp_path_factory.mktemp("lfm2") / "tiny.gguf"
    export(model, path)
    return model, path


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    monkeypatch.setenv("REALM_DISABLE", "f16")


@asynccontextmanager
async def opened(path, device: str, **sizes):
    sizes = {"max_seqs": 1, "max_rows": 32} | sizes
    engine = await Engine.open(path, device=device, kv_type="f32", **sizes)
    try:
        yield engine
    finally:
        await engine.close()


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


on_every_device = pytest.mark.parametrize("device", ["cpu", "webgpu"])


@on_every_device
def test_logits_of_a_prompt_and_of_decode_steps_equal_those_of_transformers(lfm2, device):
    model, path = lfm2

    async def main():
        async with opened(path, device) as engine:
            await greedy(engine, TOKENS)
            prompt = await last_logits(engine)
            return prompt, await greedy(engine, TOKENS, 12), await last_logits(engine)

    prompt, ids, decoded = asyncio.run(main())
    want = reference(model, TOKENS + ids[:-1])
    assert ids == want[len(TOKENS) - 1 :].argmax(-1).tolist()
    assert error(prompt, want[len(TOKENS) - 1]) < 1e-4
    assert error(decoded, want[-1]) < 1e-4


@on_every_device
@pytest.mark.parametrize("max_rows", [1, 3])
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(lfm2, device, max_rows):
    model, path = lfm2

    async def main():
        async with opened(path, device, max_rows=max_rows) as engine:
            await greedy(engine, TOKENS)
            return await last_logits(engine)

    assert error(asyncio.run(main()), reference(model, TOKENS)[-1]) < 1e-4


@on_every_device
def test_requests_in_one_batch_are_answered_as_each_alone(first, device):
    model, path = first
    prompts = [TOKENS, TOKENS[:1], TOKENS[3:14], TOKENS[::-1], TOKENS[5:7]]  # more than there are slots

    async def main():
        async with opened(path, device, max_seqs=3, max_rows=8) as engine:
            return await asyncio.gather(*(greedy(engine, p, 5 + i) for i, p in enumerate(prompts)))

    for prompt, ids in zip(prompts, asyncio.run(main()), strict=True):
        assert ids == reference(model, prompt + ids[:-1])[len(prompt) - 1 :].argmax(-1).tolist()


@on_every_device
def test_a_slot_that_is_used_again_remembers_nothing(first, device):
    _, path = first

    async def main(before):
        async with opened(path, device) as engine:
            for prompt in before:
                await greedy(engine, prompt, 4)
            await greedy(engine, TOKENS)
            return await last_logits(engine)

    assert (asyncio.run(main([])) == asyncio.run(main([TOKENS[::-1], [9]]))).all()


async def continued(engine: Engine, tokens: list[int], n_done: int) -> np.ndarray:
    """Logits after the tokens, of which the first n_done are in the pages and in the state already."""
    add = engine.scheduler.add

    def add_in_part(request: Request) -> None:
        add(request)
        request.n_scheduled = n_done

    engine.scheduler.add = add_in_part
    await greedy(engine, tokens)
    engine.scheduler.add = add
    return await last_logits(engine)


@on_every_device
@pytest.mark.parametrize("slot", [0, 1])
def test_a_state_that_is_saved_and_restored_gives_the_same_continuation(first, device, slot):
    model, path = first

    async def main():
        async with opened(path, device, max_seqs=2) as engine:
            await greedy(engine, TOKENS[:11])
            state = await engine.runner.read_state(0)
            await greedy(
                engine, TOKENS
            )  # moves the state on, and leaves the pages of TOKENS in the same block
            moved = await engine.runner.read_state(0)
            if slot:
                engine.scheduler._free_slots.remove(0)
            without = await continued(engine, TOKENS, 11)
            engine.runner.write_state(slot, state)
            assert await engine.runner.read_state(slot) == state != moved
            restored = await continued(engine, TOKENS, 11)
            again = await engine.runner.read_state(slot)
            return without, restored, *(np.frombuffer(data, np.float32) for data in (moved, again))

    without, restored, moved, again = asyncio.run(main())
    want = reference(model, TOKENS)[-1]
    assert error(without, want) > 1e-2  # the state does matter
    assert error(restored, want) < 1e-4
    assert error(again, moved) < 1e-5


def test_a_state_of_another_length_or_slot_is_refused(first, tmp_path):
    _, path = first
    dense = tiny.write_tiny(tmp_path / "dense.gguf").path

    async def main():
        async with opened(path, "cpu") as engine:
            state = await engine.runner.read_state(0)
            assert len(state) == 3 * 2 * 64 * 4  # layers, values, channels, bytes
            with pytest.raises(ValueError, match="a state of 4 bytes; this model's are of 1536"):
                engine.runner.write_state(0, state[:4])
            with pytest.raises(ValueError, match="slot 1 is not one of 0 to 0"):
                engine.runner.write_state(1, state)
        async with opened(dense, "cpu") as engine:
            assert await engine.runner.read_state(0) == b""
            engine.runner.write_state(0, b"")
            with pytest.raises(ValueError, match="a state of 1536 bytes for a model that has none"):
                engine.runner.write_state(0, state)

    asyncio.run(main())


def config_of(path):
    data = path.read_bytes()
    return read_config(parse(data, len(data)))


def test_the_cache_is_counted_by_layer(first):
    config = config_of(first[1])
    assert [layer.n_kv_heads for layer in config.layers] == [0, 0, 2, 0, 2]
    assert config.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2  # layers, k and v, heads, head_dim, bytes
    assert (config.n_heads, config.n_kv_heads, config.heads_per_kv, config.l_cache) == (4, 2, 2, 3)


KV = "attention.head_count_kv"
BROKEN = {
    "too few": ({KV: [0, 2]}, FormatError, "has 2 elements; it must have 5"),
    "negative": ({KV: [0, 0, -1, 0, 2]}, FormatError, "element 2 is -1; it must be 0 to"),
    "no number": ({KV: ["a"] * 5}, FormatError, "element 0 is 'a'; it must be of type int"),
    "uneven": ({KV: [0, 0, 3, 0, 2]}, FormatError, "4 attention heads cannot share 3"),
    "no attention": ({KV: [0] * 5}, UnsupportedError, "head_count_kv is 0 for all layers"),
    "tensors of another kind": ({KV: [0, 2, 2, 0, 2]}, UnsupportedError, "blk.1.shortconv.* is not one"),
    "one tap": ({"shortconv.l_cache": 1}, FormatError, "shortconv.l_cache' is 1; it must be at least 2"),
    "taps that the weights lack": ({"shortconv.l_cache": 4}, FormatError, "blk.0.shortconv.conv.weight"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named(first, tmp_path, what):
    other, kind, message = BROKEN[what]
    export(first[0], tmp_path / "broken.gguf", other)

    async def main():
        async with opened(tmp_path / "broken.gguf", "cpu"):
            pass

    with pytest.raises(kind, match=message):
        asyncio.run(main())


def test_a_layer_without_key_value_heads_is_refused_where_there_are_no_short_convolutions(tmp_path):
    path = tiny.write_tiny(tmp_path / "tiny.gguf", metadata={"llama.attention.head_count_kv": [2, 0]}).path
    with pytest.raises(FormatError, match="element 1 is 0; it must be 1 to"):
        config_of(path)


def test_a_bias_that_nothing_would_add_is_refused(tmp_path):
    norm = tiny.write_tiny(tmp_path / "norm.gguf", shapes={"blk.0.attn_norm.bias": (64,)}).path
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_norm\.bias' is not one"):
        config_of(norm)
    convolution = tmp_path / "convolution.gguf"
    export(build(CASES["five taps, biases of the projections"]), convolution, conv_bias=True)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.shortconv\.conv\.bias' is not one"):
        config_of(convolution)


def test_the_final_norm_may_have_the_usual_name(first, tmp_path):
    model, _ = first
    export(model, tmp_path / "usual.gguf", final_norm="output_norm")

    async def main():
        async with opened(tmp_path / "usual.gguf", "cpu") as engine:
            await greedy(engine, TOKENS)
            return await last_logits(engine)

    assert error(asyncio.run(main()), reference(model, TOKENS)[-1]) < 1e-4
