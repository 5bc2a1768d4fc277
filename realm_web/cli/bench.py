"""Measure a model on a device: prompt processing (pp512), generation (tg128), many sequences at once.

pp512 is the rate of a prompt of 512 tokens, tg128 that of 128 tokens after it; `@d8192` means: behind 8192
tokens of context, `x8`: the rate of 8 sequences together while all of them generate, behind prompts of 128
tokens. Prompts are random token ids, seeded; one run of each is thrown away, and the median and the range of
the others are shown. Generation reads every weight once per token: bytes × tokens per second is given in GB/s
and as a share of the bandwidth that a plain read kernel reaches on the same device.
"""

import argparse
import asyncio
import json
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.cli.text import human_bytes
from realm_web.errors import RequestError

if TYPE_CHECKING:
    from realm_web.benchmark import Plan, Report

EXAMPLES = """examples:
  realm bench model.gguf
  realm bench model.gguf --depth 0,8192 --batch 1,8,32 --breakdown
  realm bench model.gguf --json > ours.json          later: --compare ours.json
  llama-bench -m model.gguf -o json > theirs.json    then: realm bench model.gguf --compare theirs.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{options.MODEL_HELP} (default: the demo)")
    parser.add_argument(
        "--runs", type=int, default=5, metavar="N", help="measured runs (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: %(default)s")
    parser.add_argument("--generate-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "-d",
        "--depth",
        type=options.numbers,
        default=(0,),
        metavar="N,N",
        help="tokens of context before (default: 0)",
    )
    parser.add_argument(
        "--batch",
        type=options.numbers,
        default=(),
        metavar="N,N",
        help="sequences at once (default: one only)",
    )
    parser.add_argument(
        "--breakdown", action="store_true", help="where the time of one token goes: Python, submitting, GPU"
    )
    parser.add_argument(
        "--compare",
        metavar="FILE",
        help="show beside: the output of `llama-bench -o json`, of llama-batched-bench "
        "--output-format jsonl, or of --json",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options.add_engine(parser)


def main(args: argparse.Namespace) -> int:
    plan = _plan(args)
    others = _read_rates(args.compare) if args.compare else {}
    report = asyncio.run(_bench(args, plan))
    if args.json:
        print(json.dumps(report.as_json()))
    else:
        _print(report, others)
    return 0


def _plan(args: argparse.Namespace) -> "Plan":
    from realm_web.benchmark import Plan

    for name, least in (("runs", 1), ("prompt_tokens", 1), ("generate_tokens", 2)):
        if getattr(args, name) < least:
            flag = "--" + name.replace("_", "-")
            raise RequestError(f"{flag} is {getattr(args, name)}; it must be at least {least}")
    if min(args.depth) < 0 or min(args.batch, default=1) < 1:
        raise RequestError("--depth takes numbers from 0, --batch numbers from 1")
    return Plan(args.runs, args.prompt_tokens, args.generate_tokens, args.depth, args.batch, args.breakdown)


def _read_rates(path: str) -> dict[str, float]:
    from realm_web.benchmark import read_rates

    try:
        with open(path, encoding="utf-8") as file:
            return read_rates(file.read())
    except (OSError, ValueError) as error:
        raise RequestError(f"--compare {path}: {error}") from None


async def _bench(args: argparse.Namespace, plan: "Plan") -> "Report":
    from realm_web.benchmark import measure
    from realm_web.cli.terminal import note

    sizes = {}
    if args.context is None:
        args.context = plan.context
    if plan.max_seqs > 1:
        sizes = {"max_seqs": plan.max_seqs, "kv_tokens": max(args.context, plan.tokens)}
    engine = await model.open_engine(args, **sizes)
    try:
        note(f"{engine.device.name} ({engine.device.kind}): {engine.device.reason}")
        return await measure(engine, plan, model.model_or_default(args.model), note)
    finally:
        await engine.close()


def _print(report: "Report", others: dict[str, float]) -> None:
    from realm_web.cli.terminal import Output

    out = Output()
    out.line(f"{report.model} on {report.adapter} ({report.device})")
    columns = ["test", "tok/s", "range", "runs", *(["theirs", "ours / theirs"] if others else [])]
    rows = []
    for name, rate in report.rates.items():
        row = [
            name,
            f"{rate.median:,.1f}",
            f"{min(rate.runs):,.1f} – {max(rate.runs):,.1f}",
            str(len(rate.runs)),
        ]
        if others:
            other = others.get(name)
            row += [f"{other:,.1f}", f"{rate.median / other:.2f}"] if other else ["–", "–"]
        rows.append(row)
    out.table(columns, rows, right=columns[1:])
    out.line(f"first token of a prompt of {report.plan.short_prompt}: {report.first_token_ms.median:,.1f} ms")
    for name, seconds in report.breakdown.items():
        out.line(f"per token, {name}: {1e3 * seconds:,.3f} ms")
    out.line(
        f"generation reads {human_bytes(report.weight_bytes)} of weights per token: "
        f"{report.bytes_per_second / 1e9:,.1f} GB/s, {report.percent:.0f} % of the "
        f"{report.bandwidth / 1e9:,.1f} GB/s that this device reads"
    )
