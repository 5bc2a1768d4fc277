"""Show the kernels that a model's passes are made of and, with --bench, how fast each of them is.

A pass is decoding by one sequence or several (--batch), or a prompt (--prompt-tokens). Kernels run in the
place and with the shapes that they have in the model: a line for each distinct one, with how often it is
called, its grid, the bytes it must move and what it computes. Sequences that decode together share what is
before (--depth). --bench adds the time of one call, by timestamps
where the device has them, GB/s with the share of what a plain read kernel reaches here, and TFLOP/s.
"""

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from realm_web.cli import model, options
from realm_web.cli.text import human_bytes
from realm_web.errors import RequestError

if TYPE_CHECKING:
    from realm_web.engine import Engine
    from realm_web.runtime.profiler import KernelTime

EXAMPLES = """examples:
  realm kernels model.gguf                                     which kernels there are
  realm kernels model.gguf --bench -k ffn                      how fast those of the feed-forward block are
  realm kernels model.gguf --bench --batch 1,8 --depth 4096    decoding behind 4096 tokens
  realm kernels --bench --json | jq '.passes.decode[] | .percent_of_bandwidth'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{options.MODEL_HELP} (default: the demo)")
    parser.add_argument("--bench", action="store_true", help="measure them")
    parser.add_argument("-k", metavar="TEXT", default="", help="only kernels with TEXT in their line's name")
    parser.add_argument(
        "--batch",
        type=options.numbers,
        default=(1,),
        metavar="N,N",
        help="sequences that decode together (default: 1)",
    )
    parser.add_argument(
        "--depth", type=int, default=1, metavar="N", help="tokens before (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="of the prompt's pass (default: %(default)s)",
    )
    parser.add_argument(
        "--runs", type=int, default=16, metavar="N", help="of each pass (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print all as JSON")
    options.add_engine(parser)


def main(args: argparse.Namespace) -> int:
    if min(args.depth, args.prompt_tokens, args.runs, *args.batch) < 1:
        raise RequestError("--depth, --prompt-tokens, --runs and --batch take numbers from 1")
    found = asyncio.run(_kernels(args))
    if args.json:
        print(json.dumps(found))
    else:
        _print(found, bench=args.bench)
    return 0


async def _kernels(args: argparse.Namespace) -> dict[str, Any]:
    """Adapter, bandwidth and, by pass, a line for each kernel."""
    from realm_web.cli.terminal import note
    from realm_web.runtime import profiler

    sizes = {}
    if args.context is None:
        args.context = max(args.depth + 32, args.prompt_tokens + 1)
    if max(args.batch) > 1:
        total = max(args.batch) * (args.depth + 64)
        sizes = {"max_seqs": max(args.batch), "kv_tokens": max(args.context, total)}
    engine = await model.open_engine(args, **sizes)
    try:
        note(f"{engine.device.name} ({engine.device.kind}): {engine.device.reason}")
        bandwidth = await profiler.measure_bandwidth(engine.device) if args.bench else 0.0
        passes = {}
        for name, n_seqs, n_prompt, n_generate in _passes(args):
            program = await _last_program(engine, n_seqs, n_prompt, n_generate)
            if args.bench:
                times = await profiler.profile(engine.device, program, args.runs)
            else:
                times = profiler.kinds(program.steps, [0.0] * len(program.steps))
            passes[name] = [_as_json(kind, bandwidth) for kind in times if args.k in kind.label]
        return {"adapter": engine.device.name, "bandwidth_gb_per_second": bandwidth / 1e9, "passes": passes}
    finally:
        await engine.close()


def _passes(args: argparse.Namespace) -> list[tuple[str, int, int, int]]:
    """Name, sequences, tokens of the prompt and of the answer whose last step is the pass."""
    decode = [(f"decode{f' x{n}' if n > 1 else ''}", n, args.depth, 8) for n in args.batch]
    return [*decode, (f"prompt of {args.prompt_tokens}", 1, args.prompt_tokens, 1)]


async def _last_program(engine: "Engine", n_seqs: int, n_prompt: int, n_generate: int) -> Any:
    """The program of the last step of these requests, whose rows are then in the step buffer."""
    import random

    from realm_web.kvcache import BLOCK_SIZE
    from realm_web.runtime.profiler import HostTime
    from realm_web.sampler import SamplingParams

    draw = random.Random(n_seqs + n_prompt)
    params = SamplingParams(temperature=0, max_tokens=n_generate, ignore_eos=True)

    def tokens(n: int) -> list[int]:
        return [draw.randrange(engine.tokenizer.n_vocab) for _ in range(n)]

    async def one(prompt: list[int]) -> None:
        async for _ in engine.generate(prompt, params):
            pass

    before, engine.device.trace = engine.device.trace, HostTime()
    try:
        if n_seqs == 1:
            await one(tokens(n_prompt))
        else:  # behind whole blocks that they share, all begin in one step, and so end in one
            shared = tokens(n_prompt // BLOCK_SIZE * BLOCK_SIZE)
            await one([*shared, 0])
            await asyncio.gather(*(one([*shared, *tokens(1)]) for _ in range(n_seqs)))
        return engine.device.trace.last
    finally:
        engine.device.trace = before


def _as_json(kind: "KernelTime", bandwidth: float) -> dict[str, Any]:
    """One kernel. Scripts rely on these names; what is not known or not measured is null."""
    rate = kind.gb_per_second or None
    return {
        "kernel": kind.label,
        "calls": kind.count,
        "grid": list(kind.grid),
        "bytes": kind.nbytes or None,
        "flops": kind.flops or None,
        "microseconds": 1e6 * kind.seconds or None,
        "gb_per_second": rate,
        "percent_of_bandwidth": 1e11 * rate / bandwidth if rate and bandwidth else None,
        "tflops": kind.tflops or None,
    }


def _print(found: dict[str, Any], *, bench: bool) -> None:
    from realm_web.cli.terminal import Output

    out = Output()
    reads = f", reads {found['bandwidth_gb_per_second']:,.0f} GB/s" if bench else ""
    out.line(f"{found['adapter']}{reads}")
    for name, kernels in found["passes"].items():
        columns = [name, "calls", "grid", "bytes", "Mflop"]
        if bench:
            columns += ["us", "all us", "GB/s", "% of peak", "TFLOP/s"]
        rows = []
        for kernel in kernels:
            row = [kernel["kernel"], str(kernel["calls"]), " x ".join(map(str, kernel["grid"]))]
            row += [
                human_bytes(kernel["bytes"]) if kernel["bytes"] else "",
                _number(kernel["flops"], 1e-6, 1),
            ]
            if bench:
                row += [_number(kernel["microseconds"], 1, 1)]
                row += [_number(kernel["microseconds"], kernel["calls"], 0)]
                row += [_number(kernel["gb_per_second"], 1, 0), _number(kernel["percent_of_bandwidth"], 1, 0)]
                row += [_number(kernel["tflops"], 1, 2)]
            rows.append(row)
        if bench:
            total = sum(kernel["calls"] * (kernel["microseconds"] or 0) for kernel in kernels)
            rows.append(
                [
                    "sum",
                    str(sum(kernel["calls"] for kernel in kernels)),
                    *[""] * 4,
                    f"{total:,.0f}",
                    *[""] * 3,
                ]
            )
        out.table(columns, rows, right=columns[1:])


def _number(value: float | None, factor: float, digits: int) -> str:
    return f"{value * factor:,.{digits}f}" if value else ""
