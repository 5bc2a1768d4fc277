"""Write a model's file again in a smaller type, so that it fits the memory of a tab or a GPU.

File types such as Q4_K_M mix types as llama.cpp's llama-quantize does: more bits where errors hurt most.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from realm_web.cli import options
from realm_web.cli.text import human_bytes
from realm_web.mixture import ALIASES, FILE_TYPES, file_type

if TYPE_CHECKING:
    from realm_web.convert import Converted, Plan
    from realm_web.loader import Source

EXAMPLES = """examples:
  realm quantize model-F16.gguf model-Q4_K_M.gguf --type Q4_K_M
  realm quantize model-F16.gguf model-Q4_0.gguf --type Q4_0 --pure
  realm quantize model-F16.gguf model-Q6_K.gguf --type Q6_K --dry-run   how large will it be?"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="IN", help=options.MODEL_HELP)
    parser.add_argument("out", metavar="OUT", type=Path, help="path of the new .gguf file")
    parser.add_argument(
        "--type",
        required=True,
        metavar="TYPE",
        help=f"one of {', '.join((*FILE_TYPES, *ALIASES))}; {_aliases()}",
    )
    parser.add_argument("--pure", action="store_true", help="one type for all matrices, no mixture")
    parser.add_argument(
        "--allow-requantize", action="store_true", help="accept weights that are quantised already"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--dry-run", action="store_true", help="show types and sizes, write nothing")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one per core, at most 8")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def _aliases() -> str:
    return ", ".join(f"{short} is {long}" for short, long in ALIASES.items())


def main(args: argparse.Namespace) -> int:
    import asyncio

    return asyncio.run(_main(args))


async def _main(args: argparse.Namespace) -> int:
    from realm_web import convert
    from realm_web.errors import RequestError
    from realm_web.sources import open_source

    wanted = file_type(args.type)
    if args.threads is not None and args.threads < 1:
        raise RequestError(f"--threads is {args.threads}; it must be at least 1")
    source = await open_source(args.model)
    try:
        if not args.dry_run:
            convert.check_target(args.out, source, force=args.force)
        plan = await convert.make_plan(source, wanted, pure=args.pure, allow_requantize=args.allow_requantize)
        started = time.perf_counter()
        converted = None if args.dry_run else await _write(plan, source, args.out, args.threads)
        _report(args, plan, converted, time.perf_counter() - started)
    finally:
        source.close()
    return 0


async def _write(plan: "Plan", source: "Source", out: Path, threads: int | None) -> "list[Converted]":
    import sys

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from realm_web import convert

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with (
        convert.new_file(out, plan.nbytes) as file,
        Progress(
            *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as bars,
    ):
        task = bars.add_task("quantising", total=None)

        def show(done: int, total: int, tensor: str) -> None:
            bars.update(task, completed=done, total=total, description=tensor)

        return await convert.write(plan, source, file, workers=threads, on_progress=show)


@dataclass
class _Sum:
    """What happened to all tensors of one pair of types."""

    tensors: int = 0
    weights: int = 0
    before: int = 0
    after: int = 0
    squared_error: float = 0.0
    squared_weights: float = 0.0

    def __add__(self, other: "_Sum") -> "_Sum":
        mine, others = vars(self).values(), vars(other).values()
        return _Sum(*(a + b for a, b in zip(mine, others, strict=True)))

    @property
    def rms_error(self) -> float:
        return (self.squared_error / self.weights) ** 0.5

    @property
    def relative_error(self) -> float:
        return (self.squared_error / self.squared_weights) ** 0.5 if self.squared_weights else 0.0

    @property
    def bits(self) -> float:
        return 8 * self.after / self.weights


def _sums(plan: "Plan", converted: "Sequence[Converted] | None") -> dict[tuple[str, str], _Sum]:
    """By old and new type, the largest first."""
    sums: dict[tuple[str, str], _Sum] = defaultdict(_Sum)
    for i, new in enumerate(plan.tensors):
        old = plan.gguf.tensors[new.name]
        errors = (converted[i].squared_error, converted[i].squared_weights) if converted else (0.0, 0.0)
        sums[old.type_name, new.type_name] += _Sum(1, old.n_elements, old.nbytes, new.nbytes, *errors)
    return dict(sorted(sums.items(), key=lambda item: -item[1].after))


def _total(sums: Iterable[_Sum]) -> _Sum:
    return sum(sums, _Sum())


def _report(
    args: argparse.Namespace, plan: "Plan", converted: "Sequence[Converted] | None", seconds: float
) -> None:
    sums = _sums(plan, converted)
    total = _total(sums.values())
    changed = _total(part for (old, new), part in sums.items() if old != new)
    if args.json:
        print(json.dumps(_as_json(args, plan, sums, total, changed, converted is not None, seconds)))
        return

    from realm_web.cli.terminal import Output

    out = Output()
    columns = ("from", "to", "tensors", "before", "after", "RMS error", "relative")
    rows = (
        (
            old,
            new,
            str(part.tensors),
            human_bytes(part.before),
            human_bytes(part.after),
            f"{part.rms_error:.3g}" if converted and old != new else "",
            f"{part.relative_error:.2%}" if converted and old != new else "",
        )
        for (old, new), part in sums.items()
    )
    out.table(columns, rows, right=columns[2:])
    line = (
        f"{args.out}: {human_bytes(plan.nbytes)}, weights {human_bytes(total.before)} -> "
        f"{human_bytes(total.after)}, {total.bits:.2f} bits each"
    )
    if converted is None:
        out.line(f"{line}; nothing written (--dry-run)")
        return
    if changed.weights:
        line += f", RMS error {changed.rms_error:.3g} ({changed.relative_error:.2%} of the weights)"
    out.line(f"{line}; {seconds:.1f} s, {human_bytes(total.before / seconds)}/s")


def _as_json(
    args: argparse.Namespace,
    plan: "Plan",
    sums: dict[tuple[str, str], _Sum],
    total: _Sum,
    changed: _Sum,
    written: bool,
    seconds: float,
) -> dict[str, object]:
    return {
        "file": str(args.out),
        "type": file_type(args.type).name,
        "written": written,
        "nbytes": plan.nbytes,
        "weight_bytes_before": total.before,
        "weight_bytes": total.after,
        "bits_per_weight": total.bits,
        "rms_error": changed.rms_error if written and changed.weights else None,
        "relative_rms_error": changed.relative_error if written and changed.weights else None,
        "seconds": seconds,
        "types": [
            {
                "from": old,
                "to": new,
                "tensors": part.tensors,
                "weights": part.weights,
                "before": part.before,
                "after": part.after,
                "rms_error": part.rms_error if written else None,
            }
            for (old, new), part in sums.items()
        ],
    }
