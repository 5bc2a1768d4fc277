"""Measure which kernel variants are fastest for a model on this machine's GPU, and remember them.

This happens by itself, within seconds, when an adapter meets a model with new shapes. The command does it
again from the start, without a limit of time, and shows every variant.
"""

import argparse
import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.errors import RequestError

if TYPE_CHECKING:
    from realm_web.gguf import GGUFFile
    from realm_web.tuning import Timing

EXAMPLES = """examples:
  realm tune model.gguf
  realm tune --json | jq '.timings[] | select(.chosen)'     of the default model"""

SECONDS = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{options.MODEL_HELP} (default: the demo)")
    parser.add_argument("--json", action="store_true", help="print all timings as JSON")
    options.add_device(parser)


def main(args: argparse.Namespace) -> int:
    header = model.read_header(model.model_or_default(args.model))
    adapter, timings = asyncio.run(_tune(header, args.device))
    if args.json:
        print(json.dumps({"adapter": adapter, "timings": [as_json(timing) for timing in timings]}))
    else:
        _print(adapter, timings)
    return 0


async def _tune(header: "GGUFFile", device_name: str) -> "tuple[str, list[Timing]]":
    """The weights are allocated and not read: how long a product takes does not hang on their values."""
    from realm_web import tiling, tuning
    from realm_web.cli.terminal import note
    from realm_web.models import build
    from realm_web.runtime.adapters import open_device

    device = await open_device(device_name)
    try:
        if device.info.is_cpu:
            raise RequestError(f"{device.name} is a software device: its kernels have no variants to measure")
        transformer = build(header, device)
        store = tuning.user_store()
        timings = await tuning.tune(
            device, transformer.matrices, store, again=True, seconds=SECONDS, on_message=note
        )
        await tiling.tune(device, transformer.matrices, store, again=True, seconds=SECONDS, on_message=note)
        return device.name, timings
    finally:
        device.close()


def as_json(timing: "Timing") -> dict[str, object]:
    """One variant of one product. Scripts rely on these names."""
    return {
        "product": timing.key,
        "variant": asdict(timing.variant),
        "microseconds": 1e6 * timing.seconds,
        "gb_per_second": timing.gb_per_second,
        "chosen": timing.chosen,
    }


def _print(adapter: str, timings: "list[Timing]") -> None:
    from realm_web.cli.terminal import Output

    out = Output()
    out.line(adapter)
    rows = []
    for timing in timings:
        v = timing.variant
        rows.append(
            (
                timing.key,
                f"{v.lanes} lanes, {v.rows} rows, {v.unroll} at a time, {v.wg} threads",
                f"{1e6 * timing.seconds:,.1f}",
                f"{timing.gb_per_second:,.0f}",
                "chosen" if timing.chosen else "",
            )
        )
    out.table(("product", "variant", "us", "GB/s", ""), rows, right=("us", "GB/s"))
