"""Measure a model inside a page's worker (bench/page.js), with the very tests of `realm bench`.

Natively it measures what needs no model, for comparison: `python bench/page_bench.py Q4_K,Q6_K`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from realm_web.benchmark import Bench, Plan, generation_rate, prompt_rate
from realm_web.ops import Activations, Recorder, linear, matmuls
from realm_web.page import Page
from realm_web.quants import FORMATS, activation_words
from realm_web.runtime import profiler
from realm_web.runtime.adapters import open_device
from realm_web.runtime.device import Device, Program
from realm_web.step import StepLayout
from realm_web.tensor import Tensor, Weight

GREEDY = {"temperature": 0, "ignore_eos": True}
ROWS, LENGTH = 4096, 14336  # of the matrix that formats are compared on
CYCLED = 256 << 20  # bytes of weights: far beyond any cache
LONG = 20e-3  # seconds that one measurement takes at least


class InPage:
    """One model in one page, opened as the page opens it."""

    def __init__(self, js_store: Any, say: Callable[[str], None]):
        self._page, self._store = Page(js_store), js_store
        self._say = say
        self._n_calls = 0
        self._model = 0

    async def run(self, part: str, options: str, js_source: Any = None) -> None:
        """Measure one part, and say each of its results as soon as it is there, as JSON."""
        await getattr(self, f"_{part}")(
            **json.loads(options), **({"js_source": js_source} if js_source else {})
        )

    def _tell(self, **found: Any) -> None:
        self._say(json.dumps(found))

    def _rates(self, name: str, rates: Sequence[float]) -> None:
        self._tell(test=name, median=round(median(rates), 2), runs=[round(rate, 2) for rate in rates])

    @property
    def _engine(self) -> Any:
        return self._page._models[self._model].engine

    def _call_id(self) -> int:
        self._n_calls += 1
        return self._n_calls

    async def _open(self, js_source: Any, **sizes: Any) -> None:
        """From the store until ready, and how long each stage was the last one heard of."""
        size, start = int(js_source.size), time.perf_counter()
        stages: list[tuple[str, float]] = []

        def progress(text: str) -> None:
            stages.append((json.loads(text)["stage"], time.perf_counter()))

        reply = json.loads(await self._page.open(self._call_id(), js_source, json.dumps(sizes), progress))
        seconds = time.perf_counter() - start
        if "error" in reply:
            raise RuntimeError(reply["error"]["message"])
        self._model = reply["ok"]["model"]
        device = self._engine.device
        ends = {stage: round(at - start, 3) for stage, at in stages}
        first = {stage: round(at - start, 3) for stage, at in reversed(stages)}
        self._tell(
            test="open", seconds=round(seconds, 3), gb_per_second=round(size / seconds / 1e9, 3), first=first,
            last=ends, features=sorted(device.features), subgroup=device.subgroup_size,
            matrix_units=matmuls.has_units(device), tuned=len(device.tuned), tiles=len(device.tiles),
        )  # fmt: skip

    async def _close(self) -> None:
        await self._page.close(self._call_id(), self._model)

    async def _one(self, runs: int) -> None:
        """One conversation: rates of tokens and prompts, the first token, the host's share."""
        bench = Bench(self._engine, Plan(runs))
        self._rates("tg128", [generation_rate(c) for c in await bench.repeat([], 1, 128)])
        self._tell(steps_in_flight=self._engine.stepper.pacing.depth)
        self._rates("pp512", [prompt_rate(c) for c in await bench.repeat([], 512, 1)])
        first = [c.timings.time_to_first_token_ms for c in await bench.repeat([], 20, 2)]
        self._rates("first token of 20, ms", first)
        await self._host()
        shares = await bench.breakdown()
        self._tell(test="ms a token", **{name: round(1e3 * s, 3) for name, s in shares.items()})

    async def _host(self) -> None:
        """What Python does for each token of an answer that a page streams."""
        device, times = self._engine.device, profiler.HostTime()
        request = {"model": self._model, "prompt": "a", "options": {**GREEDY, "max_tokens": 257}}
        before, device.trace = device.trace, times
        pieces: list[str] = []
        try:
            await self._page.chat(self._call_id(), json.dumps(request), pieces.append)
        finally:
            device.trace = before
        n = max(times.n_steps, 1)
        self._tell(
            test="Python ms a token", submitting=round(1e3 * times.submitting / n, 3),
            handing_on=round(1e3 * times.handing_on / n, 3), steps=n, pieces=len(pieces),
        )  # fmt: skip

    async def _prompts(self, runs: int, lengths: Sequence[int]) -> None:
        bench = Bench(self._engine, Plan(runs))
        for n in lengths:
            self._rates(f"pp{n}", [prompt_rate(c) for c in await bench.repeat([], n, 1)])

    async def _batch(self, runs: int, sizes: Sequence[int]) -> None:
        bench = Bench(self._engine, Plan(runs))
        for n in sizes:
            rates = [await bench.together(n) for _ in range(runs + 1)]
            self._rates(f"tg128x{n}", rates[1:])

    async def _depth(self, runs: int, depth: int) -> None:
        bench = Bench(self._engine, Plan(runs))
        rates = [generation_rate(c) for c in await bench.repeat(bench.prompt(depth), 1, 128)]
        self._rates(f"tg128@d{depth}", rates)

    async def _kernels(self, rows: int = 12) -> None:
        """The kernels of one decode step that take most of it."""
        engine, times = self._engine, profiler.HostTime()
        engine.device.trace, before = times, engine.device.trace
        try:
            await Bench(engine, Plan(1)).repeat([], 1, 8)
        finally:
            engine.device.trace = before
        found = await profiler.profile(engine.device, times.last, 16)
        found.sort(key=lambda kind: -kind.count * kind.seconds)
        for kind in found[:rows]:
            self._tell(
                kernel=kind.label, calls=kind.count, us=round(1e6 * kind.seconds, 2),
                gb_per_second=round(kind.gb_per_second),
            )  # fmt: skip
        self._tell(test="sum of kernels, us", median=round(1e6 * sum(k.count * k.seconds for k in found)))

    async def _formats(self, names: Sequence[str]) -> None:
        device = self._engine.device
        bandwidth = await device.measure_bandwidth()
        self._tell(test="bandwidth, GB/s", median=round(bandwidth / 1e9))
        for name in names:
            rate = await format_rate(device, name)
            self._tell(format=name, gb_per_second=round(rate / 1e9), share=round(rate / bandwidth, 3))


async def format_rate(device: Device, name: str, n: int = ROWS, k: int = LENGTH) -> float:
    """Bytes per second of weights that one row of activations is multiplied with, in the default variant."""
    fmt, layout = FORMATS[name], StepLayout(max_rows=1, max_seqs=1, max_blocks=1)
    words = layout.pack(tokens=[0], positions=[0], row_seqs=[0], records=[], tiles=[], advance=False)
    step = device.alloc(len(words), "step")
    device.write(step, words)
    noise = random.Random(1).randbytes(4 << 20)
    weights: list[Weight] = []
    while sum(weight.nbytes for weight in weights) < CYCLED:
        weights.append(Weight.alloc(device, fmt, n, k, f"{name} {len(weights)}"))
        for view in weights[-1].shards[0].parts[: len(fmt.parts)]:
            for offset in range(0, view.nbytes, len(noise)):
                data = noise[: min(len(noise), view.nbytes - offset)]
                device.write(view.buffer, data, view.offset + offset)
    n_words = activation_words(k) if fmt.is_quantised else k
    made = Tensor.alloc(device, (1, n_words), "f32", "activations")
    device.write(made.buffer, array("I", range(n_words)).tobytes())
    out = Tensor.alloc(device, (1, n), "f32", "out")
    view = device.view(step)
    r = Recorder(
        device, device.program(name), layout, view, view, n_rows=1, n_seqs=1, qt=1, context=1, arena={},
        exact=False,
    )  # fmt: skip
    for weight in weights:
        x = Activations.made(made, 1, k) if fmt.is_quantised else Activations(made)
        linear(r, x, weight, out)
    await device.compile()
    seconds = await _seconds(device, r.program) / len(weights)
    for buffer in (step, made.buffer, out.buffer, *(w.shards[0].parts[0].buffer for w in weights)):
        device.free(buffer)
    return weights[0].nbytes / seconds


async def _seconds(device: Device, program: Program) -> float:
    """Of one run, by the clock, over enough of them that waiting for their end does not count."""
    once = await profiler.timed(device, program, 2)
    return await profiler.timed(device, program, max(2, min(int(LONG / once), 400)))


async def _native(names: Sequence[str]) -> None:
    device = await open_device("auto")
    bandwidth = await device.measure_bandwidth()
    print(f"{device.name}: reads {bandwidth / 1e9:,.0f} GB/s")
    for name in names:
        rate = await format_rate(device, name)
        print(f"{name:8} {rate / 1e9:7,.0f} GB/s  {100 * rate / bandwidth:3.0f} %", flush=True)
    device.close()


if __name__ == "__main__":
    asyncio.run(_native(sys.argv[1].split(",") if len(sys.argv) > 1 else list(FORMATS)))
