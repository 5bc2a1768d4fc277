"""What tests of whole models ask of an engine."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from realm_web.engine import Engine
from realm_web.sampler import SamplingParams


def run_engine(path: Path, device: str, work: Callable[[Engine], Awaitable[Any]]) -> Any:
    """What `work` makes of an engine for two sequences at a time, which is closed afterwards."""

    async def main() -> Any:
        engine = await Engine.open(path, device=device, max_seqs=2)
        try:
            return await work(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


async def greedy(engine: Engine, prompt: list[int], n: int = 1) -> list[int]:
    """n tokens after the prompt, the likeliest each time."""
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    return [token async for chunk in engine.generate(prompt, params) for token in chunk.token_ids]


async def last_logits(engine: Engine) -> np.ndarray:
    """Those from which the last token was taken, by the first sequence of its step: (n_vocab,)."""
    data = await engine.device.read(engine.runner._arena["logits"].buffer)
    return np.frombuffer(data, np.float32)[: engine.config.n_vocab]
