"""Many requests on one engine: shared prompts, grammars, several answers, scores, deadlines, lost devices."""

import asyncio
import json
import math
import re
import threading
from dataclasses import replace

import pytest
from test_engine import DEVICES, PROMPT, answer, params, run
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.errors import DeviceLost, OutOfDeviceMemory, RealmError, RequestError
from realm_web.runtime.adapters import open_device
from realm_web.sampler import SamplingParams

LONG = [(5 * i * i + 11 * i) % 300 for i in range(150)]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("batching") / "tiny.gguf", context=512, seed=3).path


async def whole(engine, prompt, **options):
    """The chunks of a request by answer."""
    given = {
        name: options.pop(name) for name in ("tenant", "cache_salt", "priority", "timeout") if name in options
    }
    chunks = [chunk async for chunk in engine.generate(prompt, params(**options), **given)]
    return [[c for c in chunks if c.index == i] for i in range(options.get("n", 1))]


def tokens(chunks):
    return [token for chunk in chunks for token in chunk.token_ids]


@pytest.mark.parametrize("device", DEVICES)
def test_a_prompt_seen_before_is_not_computed_again_and_changes_nothing(tiny_path, device):
    async def work(engine):
        found = []
        for prompt in (LONG, LONG, LONG[:100], LONG[:64], [*LONG[:70], 1, 2, 3]):
            (chunks,) = await whole(engine, prompt)
            found.append((tokens(chunks), chunks[-1].usage.cached_tokens))
        return found

    cached = run(tiny_path, device, work, context=256)
    alone = run(tiny_path, device, work, context=256, prefix_cache=False)
    assert [ids for ids, _ in cached] == [ids for ids, _ in alone]
    # whole blocks of 32, and the last token always runs
    assert [n for _, n in cached] == [0, 128, 96, 32, 64] and [n for _, n in alone] == [0] * 5


def test_tenants_share_nothing_unless_they_say_so(tiny_path):
    a, b, ours = {"tenant": "a"}, {"tenant": "b"}, {"cache_salt": b"a"}

    async def work(engine):
        found = []
        for options in (a, a, b, b | ours, a | ours):
            (chunks,) = await whole(engine, LONG, **options)
            found.append(chunks[-1].usage.cached_tokens)
        return found

    assert run(tiny_path, "cpu", work) == [0, 128, 0, 0, 128]


@pytest.mark.parametrize("device", DEVICES)
def test_answers_under_pressure_equal_those_with_room(tiny_path, device):
    requests = [
        (LONG[i : i + 20 + 9 * i], {"max_tokens": 60 + i, "temperature": i % 2, "seed": i}) for i in range(6)
    ]

    async def together(engine):
        found = await asyncio.gather(*(answer(engine, prompt, **options) for prompt, options in requests))
        return [ids for ids, _, _ in found], engine.scheduler.stats.n_preemptions

    roomy, none = run(tiny_path, device, together, context=160, kv_tokens=2048, max_seqs=6)
    assert none == 0
    for prefix_cache in (True, False):
        tight, preempted = run(
            tiny_path, device, together, context=160, kv_tokens=320, max_seqs=6, prefix_cache=prefix_cache
        )
        assert tight == roomy and preempted > 0


@pytest.mark.parametrize("device", DEVICES)
def test_n_answers_are_those_of_n_seeds_and_share_the_prompt(tiny_path, device):
    async def work(engine):
        answers = await whole(engine, LONG, n=3, temperature=1.5, seed=7)
        again = await whole(engine, LONG, n=3, temperature=1.5, seed=7)
        (one,) = await whole(engine, LONG, temperature=1.5, seed=7)
        return [tokens(a) for a in answers], [tokens(a) for a in again], tokens(one), answers[2][-1].usage

    answers, again, one, usage = run(tiny_path, device, work)
    assert answers == again and answers[0] == one
    assert len({tuple(ids) for ids in answers}) == 3
    assert usage.cached_tokens == 128  # from the first of the three, in the same step


@pytest.mark.parametrize("device", DEVICES)
def test_log_probabilities_are_those_of_the_scores(tiny_path, device):
    async def work(engine):
        (chunks,) = await whole(engine, LONG[:40], logprobs=True, top_logprobs=4, temperature=0.8, seed=3)
        told = [logprob for chunk in chunks for logprob in chunk.logprobs]
        scores = await engine.score([*LONG[:40], *tokens(chunks)])
        return told, scores

    told, scores = run(tiny_path, device, work)
    assert scores.logprobs[0] is None and len(scores.logprobs) == 52
    for logprob, scored in zip(told, scores.logprobs[40:], strict=True):
        assert logprob.logprob == pytest.approx(scored, abs=1e-3)  # f16 KV, rows in another order
        assert len(logprob.top) == 4 and logprob.top[0][1] == max(value for _, value in logprob.top)
        assert logprob.top[0][1] >= logprob.logprob
        if logprob.token_id in dict(logprob.top):
            assert dict(logprob.top)[logprob.token_id] == logprob.logprob


def test_scores_in_chunks_and_in_company_are_those_of_the_whole(tiny_path):
    async def work(engine):
        scores, *_ = await asyncio.gather(
            engine.score(LONG), answer(engine, PROMPT), engine.score(LONG[3:90])
        )
        return scores.logprobs[1:]

    alone = run(tiny_path, "cpu", lambda engine: engine.score(LONG)).logprobs[1:]
    for max_rows in (8, 33, 512):
        assert run(tiny_path, "cpu", work, max_rows=max_rows) == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_embeddings_have_length_one_and_do_not_hang_on_the_chunking(tiny_path, device):
    async def work(engine):
        kinds = [{"pooling": "mean"}, {"pooling": "last"}, {"pooling": "cls"}, {}]
        found = await asyncio.gather(
            *(engine.embed(LONG[:70], **kind) for kind in kinds), answer(engine, PROMPT)
        )
        return found[:4]

    mean, last, cls, default = run(tiny_path, device, work)
    assert default == mean != last != cls
    for vector, chunked in zip((mean, last, cls), run(tiny_path, device, work, max_rows=16), strict=False):
        assert math.fsum(v * v for v in vector) == pytest.approx(1, abs=1e-6)
        assert chunked == pytest.approx(vector, abs=2e-3)  # f16 KV


def test_an_unknown_pooling_is_refused(tiny_path):
    async def work(engine):
        with pytest.raises(RequestError, match="pooling 'max': use mean, last, cls"):
            await engine.embed(LONG, pooling="max")

    run(tiny_path, "cpu", work)


@pytest.mark.parametrize("device", DEVICES)
def test_no_token_ends_an_answer_before_min_tokens(tiny_path, device):
    async def work(engine):
        (chunks,) = await whole(engine, LONG[:9])
        stop = tokens(chunks)[2]
        (early,) = await whole(engine, LONG[:9], stop_token_ids=(stop,))
        (late,) = await whole(engine, LONG[:9], stop_token_ids=(stop,), min_tokens=7)
        return stop, tokens(early), tokens(late), late[-1].finish_reason

    stop, early, late, reason = run(tiny_path, device, work)
    assert early[-1] == stop and len(early) <= 3
    assert stop not in late[:7] and len(late) >= 7 and reason in ("stop", "length")


def test_a_deadline_ends_an_answer_with_what_there_is(tiny_path):
    async def work(engine):
        (chunks,) = await whole(engine, LONG[:9], max_tokens=None, timeout=0.2)
        assert chunks[-1].finish_reason == "timeout"
        assert chunks[-1].usage.completion_tokens == len(tokens(chunks)) > 0
        with pytest.raises(RequestError, match="timeout -1: give a number of seconds above 0"):
            await whole(engine, LONG[:9], timeout=-1)

    run(tiny_path, "cpu", work, context=512)


def test_blocks_are_free_within_one_step_of_leaving(tiny_path):
    async def work(engine):
        chunks = engine.generate(LONG, params(max_tokens=None))
        await anext(chunks)
        assert engine.scheduler.pool.n_free < engine.scheduler.pool.n_blocks
        await chunks.aclose()
        assert engine.scheduler.pool.n_free == engine.scheduler.pool.n_blocks

    run(tiny_path, "webgpu", work)


@pytest.mark.parametrize("device", DEVICES)
def test_what_a_grammar_allows_is_all_that_comes(smollm2_path, device):
    pytest.importorskip("llguidance", reason="structured output needs the package llguidance")
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "maximum": 130},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    formats = [
        {"type": "json_schema", "json_schema": {"schema": schema}},
        {"type": "regex", "regex": "[0-9]{3}-[0-9]{4}"},
    ]

    async def work(engine):
        found = await asyncio.gather(
            whole(engine, "A person: ", response_format=formats[0], max_tokens=60, ignore_eos=False),
            whole(
                engine, "A phone number: ", response_format=formats[1], max_tokens=60, temperature=1.0, seed=1
            ),
            whole(engine, "The capital of France is", max_tokens=8),
        )
        (alone,) = await whole(engine, "The capital of France is", max_tokens=8)
        return (
            ["".join(c.text for c in chunks) for (chunks,) in found],
            [f[0][-1].finish_reason for f in found],
            alone,
        )

    (person, number, free), reasons, alone = run(smollm2_path, device, work, context=128, max_seqs=3)
    assert set(json.loads(person)) == {"name", "age"}
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", number)
    assert reasons[:2] == ["stop", "stop"]
    assert free == "".join(chunk.text for chunk in alone)


def test_grammars_are_compiled_beside_the_loop_and_those_of_refused_requests_closed(tiny_path, monkeypatch):
    native = pytest.importorskip("realm_web.grammar.native")
    pytest.importorskip("llguidance", reason="structured output needs the package llguidance")
    threads, closed = [], []
    compile_, open_, close = (
        native.NativeGrammarEngine._compile,
        native.NativeGrammarEngine.__init__,
        native.NativeMatcher.close,
    )

    def aside(method):
        def call(*args):
            threads.append((method.__name__, threading.current_thread() is threading.main_thread()))
            return method(*args)

        return call

    monkeypatch.setattr(native.NativeGrammarEngine, "_compile", aside(compile_))
    monkeypatch.setattr(native.NativeGrammarEngine, "__init__", aside(open_))
    monkeypatch.setattr(native.NativeMatcher, "close", lambda self: (closed.append(self), close(self)))
    wanted = {"response_format": {"type": "regex", "regex": "[a-z]+"}, "n": 3}

    async def work(engine):
        both = await asyncio.gather(
            whole(engine, PROMPT * 20, **wanted), whole(engine, PROMPT * 20, **wanted), return_exceptions=True
        )
        assert all(isinstance(error, RequestError) for error in both)
        assert len(closed) == 6
        assert [name for name, _ in threads].count("__init__") == 1
        assert not any(is_main for _, is_main in threads)

    run(tiny_path, "cpu", work)


@pytest.mark.parametrize("n", [2, 7])
def test_a_grammar_that_may_end_does_not_before_min_tokens(tiny_path, n):
    pytest.importorskip("llguidance", reason="structured output needs the package llguidance")

    async def work(engine):
        wanted = {"response_format": {"type": "regex", "regex": "[a-z]{0,100}"}, "ignore_eos": False}
        likely = dict.fromkeys(engine.tokenizer.eog_ids, 100.0)
        (end,) = await whole(engine, PROMPT[:9], logit_bias=likely, min_tokens=n, **wanted)
        assert len(tokens(end)) == n + 1
        assert re.fullmatch("[a-z]{2,100}", "".join(chunk.text for chunk in end))

    run(tiny_path, "cpu", work)


def test_a_closed_engine_says_so(tiny_path):
    async def main():
        engine = await Engine.open(tiny_path, device="cpu")
        await engine.close()
        with pytest.raises(RealmError, match="the engine was closed"):
            await answer(engine, PROMPT)

    asyncio.run(main())


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_is_written_when_it_changes_and_neighbours_together(tiny_path, device):
    async def work(engine):
        runner, written = engine.runner, []
        n_bytes = 4 * -(-engine.config.n_vocab // 32)
        write = engine.device.write

        def spy(buffer, data, offset=0):
            written.append((offset // n_bytes, len(data) // n_bytes))
            write(buffer, data, offset)

        engine.device.write = spy
        one, two = bytes(range(1, n_bytes + 1)), bytes(range(2, n_bytes + 2))
        for masks in ({0: one, 1: two, 3: one}, {0: one, 1: two}, {3: two, 1: one, 2: two}, {}):
            runner._write_masks(masks)
        held = await engine.device.read(runner._tables["mask"].buffer, 0, 4 * n_bytes)
        assert written == [(0, 2), (3, 1), (1, 3)]
        assert held == one + one + two + two

    run(tiny_path, device, work, max_seqs=4)


@pytest.mark.parametrize("at", [0, 5])
def test_a_lost_device_is_opened_again_and_answers_go_on(tiny_path, at):
    async def work(engine):
        expected = [(await answer(engine, prompt, max_tokens=40))[0] for prompt in (LONG[:50], PROMPT)]
        lost = engine.device

        async def losing(prompt):
            ids = []
            async for chunk in engine.generate(prompt, params(max_tokens=40)):
                ids += chunk.token_ids
                if len(ids) == at + 1 and engine.device is lost:
                    lost.backend.device.destroy()
            return ids

        found = await asyncio.gather(losing(LONG[:50]), losing(PROMPT))
        assert engine.device is not lost
        assert found == expected

    run(tiny_path, "webgpu", work)


def test_a_device_lost_while_a_program_compiles_is_opened_again_only_once(tiny_path, monkeypatch):
    async def work(engine):
        prompts = LONG[:50], PROMPT
        expected = [(await answer(engine, prompt, max_tokens=8))[0] for prompt in prompts]
        reopen, opened = engine.model.reopen, []

        async def counted():
            opened.append(True)
            return await reopen()

        async def fails_late(bucket):
            engine.stepper._failed(DeviceLost("gone, says a step in flight"))
            raise DeviceLost("gone, says the compiler a little later")

        object.__setattr__(engine.model, "reopen", counted)
        monkeypatch.setattr(engine.stepper.runner, "compile", fails_late)
        found = await asyncio.gather(*(answer(engine, prompt, max_tokens=8) for prompt in prompts))
        assert [ids for ids, _, _ in found] == expected
        assert len(opened) == 1

    run(tiny_path, "webgpu", work)


def test_a_device_that_stays_lost_is_told_to_all(tiny_path, monkeypatch):
    async def work(engine):
        async def gone(*_):
            raise RequestError("no such file")

        object.__setattr__(engine.model, "reopen", gone)
        with pytest.raises(DeviceLost, match="could not be opened again: no such file"):
            async for _ in engine.generate(PROMPT, params(max_tokens=40)):
                engine.device.backend.device.destroy()

    async def main():
        engine = await Engine.open(tiny_path, device="webgpu")
        await work(engine)
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_is_not_there_costs_only_who_asked_for_it(tiny_path, device):
    async def work(engine):
        expected, _, _ = await answer(engine, PROMPT, max_tokens=40)
        alloc = engine.device.alloc

        def full(nbytes, label):
            if label in ("bias", "counts"):
                raise OutOfDeviceMemory(f"no room for {label}")
            return alloc(nbytes, label)

        engine.device.alloc = full
        found, refused = await asyncio.gather(
            answer(engine, PROMPT, max_tokens=40),
            answer(engine, PROMPT[:20], frequency_penalty=1.0, max_tokens=40),
            return_exceptions=True,
        )
        assert isinstance(refused, OutOfDeviceMemory) and "no room for" in str(refused)
        assert found[0] == expected
        engine.device.alloc = alloc
        assert len((await answer(engine, PROMPT[:20], frequency_penalty=1.0))[0]) == 12

    run(tiny_path, device, work)


def test_room_for_the_cache_is_what_the_device_has_left(tiny_path):
    reports = []

    async def main():
        engine = await Engine.open(
            tiny_path, device="webgpu", context=512, kv_tokens="max", max_seqs=4, on_progress=reports.append
        )
        assert engine.kv_tokens == 4 * 512  # no more can run at a time
        await engine.close()

    asyncio.run(main())
    assert "room for 2,048 tokens" in [report.label for report in reports]


def test_sizes_that_make_no_sense_are_refused(tiny_path):
    async def main(**sizes):
        await Engine.open(tiny_path, device="cpu", **sizes)

    for sizes, words in (
        ({"context": 400, "kv_tokens": 300}, "kv_tokens 300: less than the context of one request, 400"),
        ({"kv_tokens": -5}, "kv_tokens -5: give 2 or more"),
        ({"max_seqs": 65}, "max_seqs 65"),
        ({"kv_type": "q4"}, "kv_type"),
    ):
        with pytest.raises(RequestError, match=words):
            asyncio.run(main(**sizes))


def test_parameters_of_several_answers_are_checked():
    with pytest.raises(RequestError, match="n is 0"):
        SamplingParams(n=0)


@pytest.mark.parametrize("exact", [True, False])
def test_batches_of_every_size_agree_on_the_paths_of_a_hardware_gpu(tiny_path, exact):
    """Tiled products, splits and 8-bit activations, which a software device does without otherwise."""
    prompts = [LONG[i : i + 3 + 7 * (i % 5)] for i in range(40)]

    async def main():
        device = await open_device("webgpu")
        device.info = replace(device.info, adapter_type="DiscreteGPU")
        engine = await Engine.open(
            tiny_path, device=device, max_seqs=40, context=128, kv_tokens=40 * 64, exact=exact
        )

        async def told(prompt):
            (chunks,) = await whole(engine, prompt, max_tokens=4, logprobs=True, top_logprobs=20)
            return tokens(chunks), [logprob.logprob for chunk in chunks for logprob in chunk.logprobs]

        try:
            alone = [await told(prompt) for prompt in prompts]
            for n in (2, 5, 12, 24, 40):
                together = await asyncio.gather(*map(told, prompts[:n]))
                for (ids, mine), (others, theirs) in zip(together, alone[:n], strict=True):
                    # other kernels add up in another order, so f16 keys round apart; at near ties paths part
                    same = next((i for i in range(4) if ids[i] != others[i]), 4)
                    assert mine[:same] == pytest.approx(theirs[:same], abs=5e-3)
                    if same < 4:
                        assert mine[same] == pytest.approx(theirs[same], abs=5e-3)
        finally:
            await engine.close()

    asyncio.run(main())
