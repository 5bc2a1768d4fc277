"""Show what a model file holds: metadata, tensors, and whether it will run.

Reads the header only. Exit code 2, and the reasons on stderr, when the model will not run.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from realm_web.cli import model, options
from realm_web.cli.text import human_bytes, human_count, visible
from realm_web.errors import RealmError, UnsupportedError

if TYPE_CHECKING:
    from realm_web.gguf import GGUFFile
    from realm_web.runtime.device import Device

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
    verdict = judge(header)
    if args.json:
        print(json.dumps(_as_json(header, verdict), ensure_ascii=False))
    else:
        _print(args.model, header, full=args.full)
    if verdict.problems:
        raise UnsupportedError(f"{args.model} will not run: {'; '.join(verdict.problems)}")
    if not args.json:
        print(
            f"This model will run. It needs {human_bytes(verdict.weight_bytes)} of device memory for weights "
            f"and {human_bytes(verdict.bytes_per_token)} for each token of context."
        )
    return 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The reasons why a file cannot run, each one line; if there are none, the device memory it needs."""

    problems: tuple[str, ...]
    weight_bytes: int = 0
    bytes_per_token: int = 0  # of context


def judge(header: "GGUFFile") -> Verdict:
    """Go through all that loading does, short of reading weights and of a device."""
    from realm_web.chat import ChatTemplate
    from realm_web.models import build
    from realm_web.tokenizer import Tokenizer

    problems = []

    def attempt(step: Callable[[], Any]) -> Any:
        try:
            return step()
        except RealmError as error:
            problems.append(str(error))

    transformer = attempt(lambda: build(header, paper_device()))
    tokenizer = attempt(lambda: Tokenizer.from_metadata(header.metadata))
    if tokenizer is not None:
        attempt(lambda: ChatTemplate.from_metadata(header.metadata, tokenizer))
    if transformer and tokenizer and tokenizer.n_vocab > transformer.config.n_vocab:
        rows = transformer.config.n_vocab
        problems.append(f"{tokenizer.n_vocab} tokens in the vocabulary, {rows} rows of weights")
    if problems:
        return Verdict(tuple(problems))
    return Verdict((), transformer.weight_bytes, transformer.config.kv_bytes_per_token)


def paper_device() -> "Device":
    """A device that allocates nothing: a model laid out on it is checked and its bytes are counted."""
    from realm_web.runtime.device import AdapterInfo, Device, Limits

    most = 1 << 62
    limits = Limits(most, most, most, most, most, most, offset_alignment=4)
    info = AdapterInfo("paper", "paper", "", "CPU", frozenset(), limits)
    return Device(SimpleNamespace(info=info, alloc=lambda nbytes, label: None))


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
        return f"[{head}]" if len(shown) == len(value) else f"[{head}, … {len(value)} items]"
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


def _as_json(header: "GGUFFile", verdict: Verdict) -> dict[str, object]:
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
        "runs": not verdict.problems,
        "problems": verdict.problems,
        "weight_bytes": verdict.weight_bytes,
        "bytes_per_token": verdict.bytes_per_token,
    }


def _plain(value: object) -> object:
    """The value as JSON can hold it: there is no NaN and no infinity."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _print(name: str, header: "GGUFFile", *, full: bool) -> None:
    from realm_web.cli.terminal import Output

    out = Output()
    tensors = header.tensors.values()
    elements = sum(tensor.n_elements for tensor in tensors)
    nbytes = sum(tensor.nbytes for tensor in tensors)
    out.line(str(header.metadata.get("general.name", name)), style="bold")
    out.line(
        f"GGUF version {header.version}, header {human_bytes(header.header_size)}, {len(tensors)} tensors, "
        f"{human_count(elements)} weights in {human_bytes(nbytes)}, "
        f"{8 * nbytes / max(elements, 1):.2f} bits each"
    )
    out.line()
    out.table(
        ("metadata", "value"), ((key, shorten(value, full=full)) for key, value in header.metadata.items())
    )
    out.table(
        ("tensor", "shape", "type", "size"),
        ((t.name, " × ".join(map(str, t.shape)), t.type_name, human_bytes(t.nbytes)) for t in tensors),
        right=("shape", "size"),
    )
    out.table(
        ("type", "tensors", "weights", "size"),
        ((kind, str(n), human_count(count), human_bytes(size)) for kind, n, count, size in totals(header)),
        right=("tensors", "weights", "size"),
    )
