"""What `realm bench` measures: rates of an engine by prompt length, depth and batch, and where time goes.

Knows an engine and the clock; prints nothing.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from realm_web.answers import Chunk
from realm_web.engine import Engine
from realm_web.runtime import profiler
from realm_web.sampler import SamplingParams

SEED = 1
BATCH_PROMPT = 128  # tokens of each sequence's prompt in a batch, as llama-batched-bench is mostly run
SHORT_PROMPT = 20  # tokens, of the time to first token


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured."""

    runs: int
    n_prompt: int = 512
    n_generate: int = 128
    depths: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = ()
    breakdown: bool = False

    @property
    def short_prompt(self) -> int:
        return min(SHORT_PROMPT, self.n_prompt)

    @property
    def context(self) -> int:
        """Tokens that one sequence needs."""
        longest = max(self.depths) + self.n_prompt + 1, max(self.depths) + 1 + self.n_generate
        return max(*longest, BATCH_PROMPT + self.n_generate if self.batches else 0)

    @property
    def max_seqs(self) -> int:
        return max(self.batches, default=1)

    @property
    def tokens(self) -> int:
        """Tokens that all sequences of the widest batch hold together."""
        return self.max_seqs * (BATCH_PROMPT + self.n_generate + 32)


@dataclass(frozen=True, slots=True)
class Rate:
    """A number measured several times: tokens per second, or milliseconds.

    >>> rate = Rate((10.0, 14.0, 11.0))
    >>> rate.median, rate.spread
    (11.0, 4.0)
    """

    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.runs)

    @property
    def spread(self) -> float:
        """Largest minus smallest run."""
        return max(self.runs) - min(self.runs)

    def as_json(self) -> dict[str, Any]:
        ends = {"min": min(self.runs), "max": max(self.runs)}
        return {"median": self.median, "spread": self.spread, **ends, "runs": list(self.runs)}


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured. `weight_bytes` is what one generated token reads."""

    model: str
    device: str
    adapter: str
    plan: Plan
    rates: dict[str, Rate]  # tokens per second by name: pp512, tg128, pp512@d8192, tg128x8
    first_token_ms: Rate
    weight_bytes: int
    bandwidth: float  # bytes per second of a plain read on this device
    breakdown: dict[str, float] = field(default_factory=dict)  # seconds per token

    @property
    def generation(self) -> str:
        """The name of the plain generation test."""
        return _name("tg", self.plan.n_generate, min(self.plan.depths))

    @property
    def bytes_per_second(self) -> float:
        return self.weight_bytes * self.rates[self.generation].median

    @property
    def percent(self) -> float:
        return 100 * self.bytes_per_second / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        tests = {name: rate.as_json() for name, rate in self.rates.items()}
        tests[self.generation] |= {
            "weight_bytes_per_token": self.weight_bytes,
            "gb_per_second": self.bytes_per_second / 1e9,
            "percent_of_bandwidth": self.percent,
        }
        return {
            "model": self.model,
            "device": self.device,
            "adapter": self.adapter,
            **tests,
            "time_to_first_token_ms": self.first_token_ms.as_json(),
            "bandwidth_gb_per_second": self.bandwidth / 1e9,
            "breakdown_ms": {name: 1e3 * seconds for name, seconds in self.breakdown.items()},
        }


async def measure(
    engine: Engine, plan: Plan, name: str = "", on_message: Callable[[str], None] = lambda text: None
) -> Report:
    """Run the whole plan on an open engine of plan.context, plan.max_seqs and plan.tokens."""
    bandwidth = await profiler.measure_bandwidth(engine.device)
    bench = Bench(engine, plan)
    rates: dict[str, Rate] = {}
    for depth in plan.depths:
        prefix = bench.prompt(depth)
        for test, n_prompt, n_generate in (("pp", plan.n_prompt, 1), ("tg", 1, plan.n_generate)):
            on_message(_name(test, max(n_prompt, n_generate), depth))
            answers = await bench.repeat(prefix, n_prompt, n_generate)
            get = prompt_rate if test == "pp" else generation_rate
            rates[_name(test, max(n_prompt, n_generate), depth)] = Rate(tuple(map(get, answers)))
    first = await bench.repeat([], plan.short_prompt, 2)
    for n in plan.batches:
        on_message(f"tg{plan.n_generate}x{n}")
        goes = [await bench.together(n) for _ in range(plan.runs + 1)]
        rates[f"tg{plan.n_generate}x{n}"] = Rate(tuple(goes[1:]))
    return Report(
        model=name,
        device=engine.device.kind,
        adapter=engine.device.name,
        plan=plan,
        rates=rates,
        first_token_ms=Rate(tuple(chunk.timings.time_to_first_token_ms for chunk in first)),
        weight_bytes=engine.runner.model.bytes_per_token,
        bandwidth=bandwidth,
        breakdown=await bench.breakdown() if plan.breakdown else {},
    )


class Bench:
    """The single tests, on prompts of random tokens."""

    def __init__(self, engine: Engine, plan: Plan):
        self._engine, self._plan = engine, plan
        self._draw = random.Random(SEED)

    def prompt(self, n: int) -> list[int]:
        return [self._draw.randrange(self._engine.tokenizer.n_vocab) for _ in range(n)]

    async def repeat(self, prefix: list[int], n_prompt: int, n_generate: int) -> list[Chunk]:
        """The last chunk of each run, after one that warms up pipelines, and the cache with the prefix."""
        return [
            await self._answer(prefix + self.prompt(n_prompt), n_generate) for _ in range(self._plan.runs + 1)
        ][1:]

    async def together(self, n: int) -> float:
        """Tokens per second of n sequences, while all of them generate."""
        n_generate = self._plan.n_generate
        times: list[list[float]] = [[] for _ in range(n)]

        async def one(own: list[float]) -> None:
            async for _ in self._engine.generate(self.prompt(BATCH_PROMPT), _params(n_generate)):
                own.append(time.perf_counter())

        await asyncio.gather(*map(one, times))
        begin, end = max(own[0] for own in times), min(own[-1] for own in times)
        return sum(begin < at <= end for own in times for at in own) / max(end - begin, 1e-9)

    async def breakdown(self) -> dict[str, float]:
        """Seconds per token of the host's work, of waiting, and of the device when it is timed alone."""
        device = self._engine.device
        times = profiler.HostTime()
        before, device.trace = device.trace, times
        arrivals = []
        try:
            async for _ in self._engine.generate(self.prompt(1), _params(self._plan.n_generate)):
                if not arrivals:
                    times.reset()  # the first token belongs to the prompt
                arrivals.append(time.perf_counter())
        finally:
            device.trace = before
        n = len(arrivals) - 1
        whole, python, submitting = (
            (arrivals[-1] - arrivals[0]) / n, times.handing_on / n, times.submitting / n
        )  # fmt: skip
        result = {
            "all": whole,
            "Python": python,
            "submitting": submitting,
            "waiting for the device": max(0.0, whole - python - submitting),
        }
        if "timestamps" in device.features:
            result["the device alone"] = (await device.time_program(times.last, whole=True))[0]
        return result

    async def _answer(self, prompt: list[int], n_generate: int) -> Chunk:
        last = None
        async for chunk in self._engine.generate(prompt, _params(n_generate)):
            last = chunk
        return last


def _params(n_generate: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=n_generate, ignore_eos=True)


def prompt_rate(last: Chunk) -> float:
    """Tokens per second of the tokens that were not in the prefix cache."""
    n = last.usage.prompt_tokens - last.usage.cached_tokens
    return 1e3 * n / last.timings.time_to_first_token_ms


def generation_rate(last: Chunk) -> float:
    """Tokens per second after the first."""
    return last.timings.predicted_per_second


def _name(test: str, n: int, depth: int) -> str:
    """As llama-bench names its tests.

    >>> _name("pp", 512, 0), _name("tg", 128, 8192)
    ('pp512', 'tg128@d8192')
    """
    return f"{test}{n}" + (f"@d{depth}" if depth else "")


def read_rates(text: str) -> dict[str, float]:
    """Tokens per second by test, from our own JSON, llama-bench's, or llama-batched-bench's JSON lines.

    ValueError for anything else.

    >>> read_rates('[{"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 99.5}]')
    {'pp512': 99.5}
    >>> read_rates('{"pp": 128, "tg": 128, "pl": 8, "speed_tg": 3671.0}')
    {'tg128x8': 3671.0}
    >>> read_rates('{"model": "m", "tg128@d8192": {"median": 80.0}}')
    {'tg128@d8192': 80.0}
    """
    try:
        found = json.loads(text)
        entries = found if isinstance(found, list) else [found]
    except ValueError:
        entries = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    rates: dict[str, float] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError("a list of something else than tests")
        if entry.get("n_prompt") and entry.get("n_gen"):
            continue  # both in one: we have no such test
        if "avg_ts" in entry:
            test = ("pp", entry["n_prompt"]) if entry["n_prompt"] else ("tg", entry["n_gen"])
            rates[_name(*test, entry.get("n_depth", 0))] = float(entry["avg_ts"])
        elif "speed_tg" in entry:
            rates[f"tg{entry['tg']}x{entry['pl']}"] = float(entry["speed_tg"])
        else:
            tests = {name: value for name, value in entry.items() if name[:2] in ("pp", "tg")}
            rates |= {name: float(value["median"]) for name, value in tests.items()}
    if not rates:
        raise ValueError("no rates found: give the output of llama-bench -o json, or of realm bench --json")
    return rates
