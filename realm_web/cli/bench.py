"""Measure a model on a device: pp512 (prompt tokens per second) and tg128 (generated tokens per second).

Prompts are random token ids, seeded; one run of each is thrown away, and the median and the range of the
others are shown. Generation reads every weight once per token: bytes × tokens per second is given in GB/s and
as a share of the bandwidth that a plain read kernel reaches on the same device.
"""

import argparse
import asyncio
import json
import random
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.cli.text import human_bytes
from realm_web.errors import RequestError

if TYPE_CHECKING:
    from realm_web.answers import Timings
    from realm_web.engine import Engine
    from realm_web.gguf import GGUFFile

EXAMPLES = """examples:
  realm bench model.gguf
  realm bench model.gguf --device cpu --runs 3
  realm bench model.gguf --json | jq .tg128.median"""

SEED = 1


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens per second over several runs.

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
        """Fastest minus slowest run."""
        return max(self.runs) - min(self.runs)

    def as_json(self) -> dict[str, object]:
        ends = {"min": min(self.runs), "max": max(self.runs)}
        return {"median": self.median, "spread": self.spread, **ends, "runs": list(self.runs)}


@dataclass(frozen=True, slots=True)
class Report:
    """All that one `realm bench` measured. `weight_bytes` is what one generated token reads."""

    model: str
    device: str
    adapter: str
    pp: Rate
    tg: Rate
    n_prompt: int
    n_generate: int
    weight_bytes: int
    bandwidth: float  # bytes per second of a plain read on this device

    @property
    def bytes_per_second(self) -> float:
        return self.weight_bytes * self.tg.median

    @property
    def percent(self) -> float:
        return 100 * self.bytes_per_second / self.bandwidth

    def as_json(self) -> dict[str, object]:
        read = {
            "weight_bytes_per_token": self.weight_bytes,
            "gb_per_second": self.bytes_per_second / 1e9,
            "percent_of_bandwidth": self.percent,
        }
        return {
            "model": self.model,
            "device": self.device,
            "adapter": self.adapter,
            f"pp{self.n_prompt}": self.pp.as_json(),
            f"tg{self.n_generate}": self.tg.as_json() | read,
            "bandwidth_gb_per_second": self.bandwidth / 1e9,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{options.MODEL_HELP} (default: the demo)")
    parser.add_argument(
        "--runs", type=int, default=5, metavar="N", help="measured runs (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--generate-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options.add_engine(parser)


def main(args: argparse.Namespace) -> int:
    for name, least in (("runs", 1), ("prompt_tokens", 1), ("generate_tokens", 2)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} is {getattr(args, name)}; it must be at least {least}")
    report = asyncio.run(_bench(args))
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        _print(report)
    return 0


async def _bench(args: argparse.Namespace) -> Report:
    from realm_web.cli.terminal import note
    from realm_web.runtime.profiler import measure_bandwidth

    if args.context is None:
        args.context = args.prompt_tokens + args.generate_tokens
    engine = await model.open_engine(args)
    try:
        note(f"{engine.device.name} ({engine.device.kind}): {engine.device.reason}")
        bandwidth = await measure_bandwidth(engine.device)
        pp = await _rate(engine, args.runs, n_prompt=args.prompt_tokens, n_generate=1)
        tg = await _rate(engine, args.runs, n_prompt=1, n_generate=args.generate_tokens)
        return Report(
            model=model.model_or_default(args.model),
            device=engine.device.kind,
            adapter=engine.device.name,
            pp=Rate(tuple(timings.prompt_per_second for timings in pp)),
            tg=Rate(tuple(timings.predicted_per_second for timings in tg)),
            n_prompt=args.prompt_tokens,
            n_generate=args.generate_tokens,
            weight_bytes=weight_bytes_per_token(engine.gguf),
            bandwidth=bandwidth,
        )
    finally:
        await engine.close()


async def _rate(engine: "Engine", runs: int, *, n_prompt: int, n_generate: int) -> "list[Timings]":
    """Timings of `runs` generations, after one that warms up pipelines and caches."""
    from realm_web.sampler import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n_generate, ignore_eos=True)
    draw = random.Random(SEED)
    found = []
    for _ in range(runs + 1):
        prompt = [draw.randrange(engine.tokenizer.n_vocab) for _ in range(n_prompt)]
        chunks = [chunk async for chunk in engine.generate(prompt, params)]
        found.append(chunks[-1].timings)
    return found[1:]


def weight_bytes_per_token(header: "GGUFFile") -> int:
    """Bytes of all weights that one token reads: of a separate embedding table it reads one row only."""
    total = sum(tensor.nbytes for tensor in header.tensors.values())
    if "output.weight" in header.tensors:
        embedding = header.tensors["token_embd.weight"]
        total -= embedding.nbytes - embedding.nbytes // embedding.shape[1]
    return total


def _print(report: Report) -> None:
    from realm_web.cli.terminal import Output

    out = Output()
    out.line(f"{report.model} on {report.adapter} ({report.device})")
    rates = {f"pp{report.n_prompt}": report.pp, f"tg{report.n_generate}": report.tg}
    out.table(
        ("test", "tok/s", "range", "runs"),
        (
            (
                name,
                f"{rate.median:,.1f}",
                f"{min(rate.runs):,.1f} – {max(rate.runs):,.1f}",
                str(len(rate.runs)),
            )
            for name, rate in rates.items()
        ),
        right=("tok/s", "range", "runs"),
    )
    out.line(
        f"generation reads {human_bytes(report.weight_bytes)} of weights per token: "
        f"{report.bytes_per_second / 1e9:,.1f} GB/s, {report.percent:.0f} % of the "
        f"{report.bandwidth / 1e9:,.1f} GB/s that this device reads"
    )
