"""Show what a model file holds: metadata, tensors, and whether it will run. Reads the header only."""

import argparse
import json
import math
from collections import defaultdict
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.cli.text import human_bytes, human_count, visible
from realm_web.errors import RealmError

if TYPE_CHECKING:
    from rich.console import Console

    from realm_web.gguf import GGUFFile

EXAMPLES = """examples:
  realm inspect model.gguf
  realm inspect hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M
  realm inspect model.gguf --json | jq .runs"""

SHOWN_ITEMS = 6  # of a long array
SHOWN_CHARACTERS = 160  # of a long string, such as a chat template


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--full", action="store_true", help="do not shorten long values")
    parser.add_argument("--json", action="store_true", help="print metadata, tensors and verdict as JSON")


def main(args: argparse.Namespace) -> int:
    header = model.read_header(args.model)
    problems = why_not(header)
    if args.json:
        print(json.dumps(_as_json(header, problems), ensure_ascii=False))
        return 0
    from realm_web.cli.terminal import output

    console = output()
    _print_file(console, args.model, header)
    _print_metadata(console, header, full=args.full)
    _print_tensors(console, header)
    _print_totals(console, header)
    _print_verdict(console, problems)
    return 0


def why_not(header: "GGUFFile") -> list[str]:
    """The reasons why this file cannot run, each one line; empty when it can."""
    from realm_web.chat import ChatTemplate
    from realm_web.models import load_config
    from realm_web.tokenizer import Tokenizer

    problems = []

    def attempt(step) -> object:
        try:
            return step()
        except RealmError as error:
            problems.append(str(error))
            return None

    attempt(lambda: load_config(header))
    tokenizer = attempt(lambda: Tokenizer.from_metadata(header.metadata))
    if tokenizer is not None:
        attempt(lambda: ChatTemplate.from_metadata(header.metadata, tokenizer))
    return problems


def shorten(value: object, *, full: bool = False) -> str:
    """
    >>> shorten([1, 2, 3, 4, 5, 6, 7, 8])
    '[1, 2, 3, 4, 5, 6, … 8 items]'
    >>> shorten("two\\nlines")
    'two⏎lines'
    >>> shorten(9.999999747378752e-06), shorten(True)
    ('1e-05', 'true')
    """
    if isinstance(value, list):
        shown = value if full else value[:SHOWN_ITEMS]
        head = ", ".join(json.dumps(item, ensure_ascii=False) for item in shown)
        return visible(f"[{head}]" if len(shown) == len(value) else f"[{head}, … {len(value)} items]")
    if isinstance(value, float):
        return f"{value:.7g}"  # the digits that a float32 holds
    text = visible(value if isinstance(value, str) else json.dumps(value))
    if full or len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]}… {len(text)} characters"


def totals(header: "GGUFFile") -> list[tuple[str, int, int, int]]:
    """(type name, tensors, elements, bytes) per type, largest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in header.tensors.values():
        entry = sums[tensor.type_name]
        entry[0] += 1
        entry[1] += tensor.n_elements
        entry[2] += tensor.nbytes
    return sorted(((name, *entry) for name, entry in sums.items()), key=lambda row: -row[3])


def _as_json(header: "GGUFFile", problems: list[str]) -> dict[str, object]:
    return {
        "version": header.version,
        "metadata": {key: _plain(value) for key, value in header.metadata.items()},
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "type": tensor.type_name,
                "offset": tensor.offset,
                "nbytes": tensor.nbytes,
            }
            for tensor in header.tensors.values()
        ],
        "runs": not problems,
        "problems": problems,
    }


def _plain(value: object) -> object:
    """The value as JSON can hold it: there is no NaN and no infinity."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print_file(console: "Console", name: str, header: "GGUFFile") -> None:

    elements = sum(tensor.n_elements for tensor in header.tensors.values())
    nbytes = sum(tensor.nbytes for tensor in header.tensors.values())
    from rich.text import Text

    title = visible(str(header.metadata.get("general.name", name)))
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(
        f"GGUF version {header.version}, header {human_bytes(header.header_size)}, "
        f"{len(header.tensors)} tensors, {human_count(elements)} weights in {human_bytes(nbytes)} "
        f"({8 * nbytes / max(elements, 1):.2f} bits each)\n",
        soft_wrap=True,
    )


def _print_metadata(console: "Console", header: "GGUFFile", *, full: bool) -> None:
    from rich.text import Text

    from realm_web.cli.terminal import table

    shown = table("metadata", "value")
    for key, value in header.metadata.items():
        shown.add_row(Text(key), Text(shorten(value, full=full)))
    console.print(shown)
    console.print()


def _print_tensors(console: "Console", header: "GGUFFile") -> None:
    from rich.text import Text

    from realm_web.cli.terminal import table

    shown = table("tensor", "shape", "type", "size", right=("shape", "size"))
    for tensor in header.tensors.values():
        shape = " × ".join(map(str, tensor.shape))
        shown.add_row(Text(visible(tensor.name)), shape, tensor.type_name, human_bytes(tensor.nbytes))
    console.print(shown)
    console.print()


def _print_totals(console: "Console", header: "GGUFFile") -> None:
    from realm_web.cli.terminal import table

    shown = table("type", "tensors", "weights", "size", right=("tensors", "weights", "size"))
    for name, count, elements, nbytes in totals(header):
        shown.add_row(name, str(count), human_count(elements), human_bytes(nbytes))
    console.print(shown)
    console.print()


def _print_verdict(console: "Console", problems: list[str]) -> None:
    from rich.text import Text

    if not problems:
        console.print(Text("This model will run.", style="green"))
    for problem in problems:
        console.print(Text(f"Will not run: {problem}", style="red"), soft_wrap=True)
