"""Two thousand requests on one engine: lengths, parameters, prefixes, deadlines and departures at random."""

import asyncio
import gc
import random

import pytest
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.sampler import SamplingParams

N_REQUESTS = 2000
AT_ONCE = 24


def request(draw: random.Random, prefixes: list[list[int]]) -> tuple[list[int], dict, int | None]:
    """(prompt, sampling parameters, how many tokens are awaited before leaving, None: all)"""
    prompt = draw.choice(prefixes)[: draw.randrange(0, 97)] + [
        draw.randrange(300) for _ in range(draw.randrange(1, 9))
    ]
    options = {"max_tokens": draw.choice((1, 2, 5, 9, 30, 100)), "ignore_eos": True, "temperature": 0}
    if draw.random() < 0.5:
        options |= {"temperature": draw.choice((0.5, 1.0, 2.0)), "seed": draw.randrange(100)}
        options |= draw.choice(({}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}))
    if draw.random() < 0.1:
        options |= draw.choice(
            ({"repetition_penalty": 1.3}, {"logit_bias": {7: 5.0}}, {"frequency_penalty": 1.0})
        )
    if draw.random() < 0.1:
        options |= {"stop_token_ids": tuple(range(0, 300, 9)), "ignore_eos": False}
    if draw.random() < 0.05:
        options["min_tokens"] = 1
    if draw.random() < 0.1:
        options |= {"logprobs": True, "top_logprobs": 2}
    leaves = draw.randrange(1, 4) if draw.random() < 0.15 else None
    return prompt, options, leaves


async def answer(engine: Engine, prompt, options, leaves) -> list[int]:
    ids: list[int] = []
    chunks = engine.generate(prompt, SamplingParams(**options), tenant=f"t{len(prompt) % 3}")
    async for chunk in chunks:
        ids += chunk.token_ids
        if leaves is not None and len(ids) >= leaves:
            break
    await chunks.aclose()
    return ids


# with room for all, and with constant preemption
@pytest.mark.parametrize(("kv_tokens", "n_requests"), [(4096, N_REQUESTS), (288, 400)])
def test_nothing_is_lost_and_nothing_leaks(tmp_path, kv_tokens, n_requests):
    path = write_tiny(tmp_path / "tiny.gguf", context=256, seed=3).path
    draw = random.Random(kv_tokens)
    prefixes = [[draw.randrange(300) for _ in range(96)] for _ in range(4)]
    requests = [request(draw, prefixes) for _ in range(n_requests)]

    async def soak() -> tuple[dict[int, list[int]], int]:
        engine = await Engine.open(path, device="cpu", context=256, kv_tokens=kv_tokens, max_seqs=8)
        found: dict[int, list[int]] = {}
        numbers = iter(range(n_requests))
        n_objects = []  # of the whole process, less the answers kept here

        async def client() -> None:
            for number in numbers:
                found[number] = await answer(engine, *requests[number])
                if (number + 1) % (n_requests // 4) == 0:
                    gc.collect()
                    n_objects.append(len(gc.get_objects()) - len(found))

        await asyncio.gather(*(client() for _ in range(AT_ONCE)))
        engine.scheduler.check_integrity()
        stats = engine.scheduler.stats
        assert not engine.scheduler.has_work and not engine.stepper.answers
        assert stats.n_blocks_free == engine.scheduler.pool.n_blocks
        # a request that stayed behind would leave ten objects; by the third quarter all programs are made
        assert n_objects[3] < n_objects[2] + n_requests, f"objects after each quarter: {n_objects}"
        await engine.close()
        return found, stats.n_preemptions

    async def alone(numbers: list[int]) -> dict[int, list[int]]:
        engine = await Engine.open(path, device="cpu", context=256, prefix_cache=False, max_seqs=1)
        try:
            return {number: await answer(engine, *requests[number]) for number in numbers}
        finally:
            await engine.close()

    found, n_preemptions = asyncio.run(soak())
    assert sorted(found) == list(range(n_requests))
    assert (n_preemptions > 20) == (kv_tokens == 288)
    some = draw.sample(range(n_requests), n_requests // 10)
    assert {number: found[number] for number in some} == asyncio.run(alone(some))
