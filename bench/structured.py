"""What a grammar costs: the rate of answers that one constrains beside that of free ones.

    python bench/structured.py MODEL [--device auto] [--rows 1,8,32]

The regular expression allows a hundred letters and spaces and more, the schema an object with a string of
three thousand characters and more, so that all write the same number of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from statistics import median

from realm_web.engine import Engine
from realm_web.sampler import SamplingParams

N_TOKENS = 100
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 3000}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMATS = {
    "free": None,
    "regex": {"type": "regex", "regex": "[a-z ]{100,100000}"},
    "schema": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
}


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    rows = [int(n) for n in args.rows.split(",")]
    engine = await Engine.open(
        args.model, device=args.device, max_seqs=max(rows), context=512, kv_tokens=16384
    )
    for n in rows:
        found: dict[str, list[float]] = {name: [] for name in FORMATS}
        for run in range(args.runs + 1):
            for name, wanted in FORMATS.items():
                rate = await measure(engine, n, run, wanted)
                if run:
                    found[name].append(rate)
        rates = {name: median(each) for name, each in found.items()}
        held = (
            f"{name} {rates[name]:,.0f} ({rates['free'] / rates[name]:.3f} times)"
            for name in FORMATS
            if FORMATS[name]
        )
        print(f"{n} rows: free {rates['free']:,.0f} tok/s, {', '.join(held)}", flush=True)
    await engine.close()


async def measure(engine: Engine, n: int, run: int, wanted: dict | None) -> float:
    async def one(k: int) -> tuple[float, float]:
        params = SamplingParams(
            temperature=0.8, seed=run * n + k, max_tokens=N_TOKENS, ignore_eos=True, response_format=wanted
        )
        times = []
        async for _ in engine.generate(f"{k} once upon a time", params):
            times.append(time.perf_counter())
        return times[0], times[-1]

    spans = await asyncio.gather(*map(one, range(n)))
    return n * (N_TOKENS - 1) / (max(end for _, end in spans) - min(start for start, _ in spans))


if __name__ == "__main__":
    asyncio.run(main())
