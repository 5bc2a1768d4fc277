"""What sharing one engine costs and gains: rates by rows, time to first token in company, prefix hits.

    python bench/serving.py MODEL [--device auto] [--rows 1,8,32,64] [--json OUT]

Random prompts, greedy, nothing stops early; every figure is the median of several runs after a warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from statistics import median

from realm_web.engine import Engine
from realm_web.sampler import SamplingParams

N_PROMPT = N_GENERATE = 128
LONG_PROMPT = 2000


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=N_PROMPT)
    parser.add_argument("--generate", type=int, default=N_GENERATE)
    parser.add_argument("--long", type=int, default=LONG_PROMPT)
    parser.add_argument("--json")
    args = parser.parse_args()
    rows = [int(n) for n in args.rows.split(",")]
    most = max(rows)
    each = args.prompt + args.generate
    engine = await Engine.open(
        args.model, device=args.device, max_seqs=most, context=max(args.long + 64, each),
        kv_tokens=max(most * (each + 32), 4 * args.long),
    )  # fmt: skip
    bench = Bench(engine, args)
    report = {"device": engine.device.name, "model": args.model, "rows": {}}
    for n in rows:
        report["rows"][n] = await bench.together(n)
        print(n, "rows", {k: round(v, 2) for k, v in report["rows"][n].items()}, flush=True)
    report["company"] = await bench.company(min(32, most - 1))
    print("first token", {k: round(v, 2) for k, v in report["company"].items()}, flush=True)
    report["prefix"] = await bench.prefix(args.long)
    print("prefix", {k: round(v, 2) for k, v in report["prefix"].items()}, flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)
    await engine.close()


class Bench:
    def __init__(self, engine: Engine, args: argparse.Namespace):
        self.engine, self.args = engine, args
        self.draw = random.Random(1)

    def prompt(self, n: int) -> list[int]:
        return [self.draw.randrange(self.engine.tokenizer.n_vocab) for _ in range(n)]

    async def answer(self, prompt: list[int], n: int) -> list[float]:
        """When each token came, and before them when it was asked for."""
        params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True)
        times = [time.perf_counter()]
        async for _ in self.engine.generate(prompt, params):
            times.append(time.perf_counter())
        return times

    async def together(self, n: int) -> dict[str, float]:
        """Total tokens per second while all n decode, and the host's own share of a step."""
        rates, hosts = [], []
        for run in range(self.args.runs + 1):
            clock = _Clock(self.engine)
            answers = await asyncio.gather(
                *(self.answer(self.prompt(self.args.prompt), self.args.generate) for _ in range(n))
            )
            clock.stop()
            start, end = max(times[1] for times in answers), min(times[-1] for times in answers)
            tokens = sum(sum(start < t <= end for t in times[1:]) for times in answers)
            if run:
                rates.append(tokens / (end - start))
                hosts.append(clock.milliseconds)
        return {"tokens_per_second": median(rates), "host_ms_per_step": median(hosts)}

    async def company(self, n: int) -> dict[str, float]:
        """Milliseconds to the first token of a prompt, alone and while n others decode."""
        alone, beside = [], []
        for run in range(self.args.runs + 1):
            times = await self.answer(self.prompt(self.args.prompt), 2)
            if run:
                alone.append(times[1] - times[0])
        others = [
            asyncio.ensure_future(self.answer(self.prompt(8), self.args.generate * 2)) for _ in range(n)
        ]
        await asyncio.sleep(0.2)
        while self.engine.scheduler.n_waiting:
            await asyncio.sleep(0.01)
        for run in range(self.args.runs + 1):
            times = await self.answer(self.prompt(self.args.prompt), 2)
            if run:
                beside.append(times[1] - times[0])
        running = self.engine.scheduler.n_running
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return {"alone_ms": 1e3 * median(alone), "beside_ms": 1e3 * median(beside), "still_running": running}

    async def prefix(self, n: int) -> dict[str, float]:
        """Milliseconds to the first token of a long prompt, new and seen before."""
        fresh, again = [], []
        for run in range(self.args.runs + 1):
            prompt = self.prompt(n)
            for found in (fresh, again):
                times = await self.answer(prompt, 2)
                if run:
                    found.append(times[1] - times[0])
        return {"new_ms": 1e3 * median(fresh), "seen_ms": 1e3 * median(again)}


class _Clock:
    """Time spent in the engine's own bookkeeping, by step: scheduling, delivering, writing the step."""

    NAMES = (
        ("scheduler", "schedule"),
        ("scheduler", "update"),
        ("stepper", "_deliver"),
        ("runner", "_write_step"),
    )

    def __init__(self, engine: Engine):
        self.spent, self.steps = 0.0, 0
        self._restore = []
        owners = {"stepper": engine.stepper, "scheduler": engine.scheduler, "runner": engine.runner}
        depth = 0

        def timed(function, counts):
            def call(*args, **kwargs):
                nonlocal depth
                start, depth = time.perf_counter(), depth + 1
                try:
                    return function(*args, **kwargs)
                finally:
                    depth -= 1
                    if depth == 0:
                        self.spent += time.perf_counter() - start
                    self.steps += counts

            return call

        for owner, name in self.NAMES:
            setattr(owners[owner], name, timed(getattr(owners[owner], name), name == "_deliver"))
            self._restore.append((owners[owner], name))

    def stop(self) -> None:
        for owner, name in self._restore:
            delattr(owner, name)

    @property
    def milliseconds(self) -> float:
        return 1e3 * self.spent / max(1, self.steps)


if __name__ == "__main__":
    asyncio.run(main())
