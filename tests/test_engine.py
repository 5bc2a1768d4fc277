"""The engine on tiny models: the same tokens whatever the chunking, depth or company; nothing leaks."""

import asyncio

import pytest
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.errors import RealmError, RequestError
from realm_web.pacing import Pacing
from realm_web.sampler import SamplingParams

DEVICES = ["cpu", "webgpu"]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf", context=512, seed=3).path


def params(**options) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options)


async def answer(engine, prompt, **options):
    """Token ids, text and the last chunk."""
    ids, text, last = [], "", None
    async for chunk in engine.generate(prompt, params(**options)):
        ids += chunk.token_ids
        text += chunk.text
        last = chunk
    return ids, text, last


def run(tiny_path, device, work, **sizes):
    async def main():
        engine = await Engine.open(tiny_path, device=device, **sizes)
        try:
            result = await work(engine)
            assert not engine.scheduler.has_work
            engine.scheduler.check_integrity()
            assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks
            return result
        finally:
            await engine.close()

    return asyncio.run(main())


PROMPT = [(7 * i * i + 3 * i) % 300 for i in range(75)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_in_chunks_gives_the_tokens_of_the_whole_one(tiny_path, device):
    async def work(engine):
        return (await answer(engine, PROMPT))[0]

    whole = run(tiny_path, device, work)
    assert len(whole) == 12
    for max_rows in (8, 20, 32):
        assert run(tiny_path, device, work, max_rows=max_rows, max_seqs=2) == whole


@pytest.mark.parametrize("device", DEVICES)
def test_steps_in_flight_change_nothing(tiny_path, device):
    def at(depth):
        async def work(engine):
            engine.stepper.pacing = Pacing(depth, depth)
            return [(await answer(engine, PROMPT[:9], temperature=t, seed=5))[0] for t in (0, 1.5)]

        return work

    alone = run(tiny_path, device, at(1))
    for depth in (2, 7):
        assert run(tiny_path, device, at(depth)) == alone


@pytest.mark.parametrize("device", DEVICES)
def test_answers_in_company_equal_those_alone(tiny_path, device):
    requests = [
        (PROMPT[:40], {}),
        (PROMPT[5:8], {"temperature": 1.0, "seed": 1, "max_tokens": 30}),
        (PROMPT[10:11], {"temperature": 0.7, "seed": 2, "top_k": 5, "max_tokens": 5}),
        (PROMPT[20:60], {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "max_tokens": 20}),
        (PROMPT[1:30], {"logit_bias": {11: 100.0}, "max_tokens": 3}),
    ]

    async def alone(engine):
        return [(await answer(engine, prompt, **options))[0] for prompt, options in requests]

    async def together(engine):
        answers = await asyncio.gather(*(answer(engine, prompt, **options) for prompt, options in requests))
        return [ids for ids, _, _ in answers]

    one_by_one = run(tiny_path, device, alone, max_seqs=3)
    assert run(tiny_path, device, together, max_seqs=3) == one_by_one
    assert one_by_one[4] == [11, 11, 11]
    assert len(set(one_by_one[3])) > 10  # the penalties forbid loops


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_created_and_nothing_written_per_token(tiny_path, device):
    async def work(engine):
        await answer(engine, PROMPT[:5], max_tokens=40)
        before = engine.device.n_created, engine.device.allocated
        writes = engine.runner.n_writes
        ids, _, _ = await answer(engine, PROMPT[:5], max_tokens=100)
        assert len(ids) == 100
        assert (engine.device.n_created, engine.device.allocated) == before
        assert engine.runner.n_writes - writes == 2  # for the prompt and for the first decode

    run(tiny_path, device, work)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_path, device):
    async def work(engine):
        draw = [
            await answer(engine, PROMPT[:6], temperature=2.0, seed=seed, max_tokens=20) for seed in (1, 1, 2)
        ]
        return [ids for ids, _, _ in draw]

    first, again, other = run(tiny_path, device, work)
    assert first == again != other


def test_leaving_early_ends_the_request(tiny_path):
    async def work(engine):
        async for chunk in (chunks := engine.generate(PROMPT[:6], params(max_tokens=None))):
            assert chunk.finish_reason is None
            break
        await chunks.aclose()
        return engine.scheduler.n_running

    assert run(tiny_path, "cpu", work) == 0


def test_a_stop_string_ends_the_text_before_it_and_never_leaks(tiny_path):
    async def work(engine):
        ids, text, _ = await answer(engine, PROMPT[:6], max_tokens=30)
        stop = text[8:11]
        _, stopped, last = await answer(engine, PROMPT[:6], max_tokens=30, stop=(stop,))
        assert stopped == text[: text.index(stop)]
        assert last.finish_reason == "stop"
        first = ids.index(ids[4])
        short, _, last = await answer(engine, PROMPT[:6], stop_token_ids=(ids[4],))
        assert short == ids[: first + 1] and last.finish_reason == "stop"

    run(tiny_path, "cpu", work)


def test_the_last_chunk_tells_usage_and_timings(tiny_path):
    async def work(engine):
        _, _, last = await answer(engine, PROMPT[:6])
        assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (
            6,
            12,
            18,
        )
        assert last.finish_reason == "length"
        assert last.timings.predicted_per_second > 0 < last.timings.time_to_first_token_ms

    run(tiny_path, "cpu", work)


def test_an_answer_ends_with_the_context(tiny_path):
    async def work(engine):
        ids, _, last = await answer(engine, PROMPT[:50], max_tokens=None)
        assert len(ids) + 50 == engine.context == 64
        assert last.finish_reason == "length"

    run(tiny_path, "cpu", work, context=64)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (list(range(64)), {}, "the prompt has 64 tokens and the context 64"),
        ([], {}, "the prompt has no tokens"),
        ([5, 320], {}, "prompt token 320 is not one of this model's 0 to 319"),
        ([5, -1], {}, "prompt token -1"),
        ([5], {"logit_bias": {320: 1.0}}, "logit_bias names token 320"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    tiny_path, prompt, options, message
):
    async def work(engine):
        with pytest.raises(RequestError, match=message):
            await answer(engine, prompt, **options)
        assert len((await answer(engine, [1, 2, 3]))[0]) == 12

    run(tiny_path, "cpu", work, context=64)


def test_weights_that_are_not_numbers_end_the_request_with_an_error(tmp_path):
    model = write_tiny(tmp_path / "tiny.gguf")
    data = bytearray(model.path.read_bytes())
    from realm_web.gguf import parse

    info = parse(bytes(data)).tensors["output_norm.weight"]
    data[info.offset : info.offset + info.nbytes] = b"\xff\xff\xff\x7f" * info.shape[0]
    model.path.write_bytes(data)

    async def work(engine):
        with pytest.raises(RealmError, match="NaN"):
            await answer(engine, [1, 2, 3])

    for device in DEVICES:
        run(model.path, device, work)


def test_a_context_beyond_the_models_is_refused(tiny_path):
    with pytest.raises(RequestError, match="context 100000: this model takes 2 to 512 tokens"):
        asyncio.run(Engine.open(tiny_path, device="cpu", context=100000))
