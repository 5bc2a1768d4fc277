"""What tests of whole models ask of an engine."""

import numpy as np

from realm_web.engine import Engine
from realm_web.sampler import SamplingParams


async def greedy(engine: Engine, prompt: list[int], n: int = 1) -> list[int]:
    """n tokens after the prompt, the likeliest each time."""
    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
    return [token async for chunk in engine.generate(prompt, params) for token in chunk.token_ids]


async def last_logits(engine: Engine) -> np.ndarray:
    """Those from which the last token was taken, by the first sequence of its step: (n_vocab,)."""
    data = await engine.device.read(engine.runner._arena["logits"].buffer)
    return np.frombuffer(data, np.float32)[: engine.config.n_vocab]
