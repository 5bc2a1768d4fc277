"""Arguments that several commands share, and the sampling parameters they stand for."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from realm_web.sampler import SamplingParams

MODEL_HELP = "path or URL of a .gguf file, or hf:user/repo:Q4_K_M"
DEVICES = ("auto", "webgpu", "cpu", "dawn")

# name of the SamplingParams field, type, default of the command line, help
SAMPLING: tuple[tuple[str, Callable[[str], float | int], float | int | None, str], ...] = (
    ("temperature", float, 0.7, "0 always takes the likeliest token"),
    ("top_k", int, 0, "draw among the K likeliest tokens; 0: among all"),
    ("top_p", float, 0.95, "draw among the likeliest tokens that together hold this probability"),
    ("min_p", float, 0.0, "drop tokens below this share of the likeliest one's probability"),
    ("repetition_penalty", float, 1.0, "above 1: tokens of prompt and answer become less likely"),
    ("presence_penalty", float, 0.0, "taken once off the logit of every token of the answer"),
    ("frequency_penalty", float, 0.0, "taken off for each time that a token occurs in the answer"),
    ("seed", int, None, "same seed, same device: same text (default: a new one each time)"),
    ("max_tokens", int, None, "longest answer (default: what the context holds)"),
    ("min_tokens", int, 0, "shortest answer: the end-of-text token cannot come before"),
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, like every other error of the program."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"realm: error: {message}; see '{self.prog} --help'\n")


class CommandParser(Parser):
    """The parser of one command: options may stand between its positional arguments.

    Plain argparse gives up an optional positional at the first option: in `run MODEL --raw PROMPT` it calls
    PROMPT unrecognized. The intermixed parse comes back to `parse_known_args`, with options and positionals
    apart.
    """

    _apart = False

    def parse_known_args(self, args=None, namespace=None):
        if self._apart:
            return super().parse_known_args(args, namespace)
        self._apart = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._apart = False


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, as `adapters.choose` reads it: `auto` means what REALM_DEVICE says."""
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="where to run (default: %(default)s)"
    )


def add_engine(parser: argparse.ArgumentParser, *, context: int | None = None) -> None:
    """What `open_engine` reads; `context` is the default of --context."""
    add_device(parser)
    usual = "the model's, at most 8192" if context is None else str(context)
    parser.add_argument(
        "--context", type=int, default=context, metavar="N", help=f"tokens of context (default: {usual})"
    )
    parser.add_argument(
        "--cpu-dequant",
        action=argparse.BooleanOptionalAction,
        help="on the CPU, keep weights as float32: quicker, four bytes a weight "
        "(default: if half the free memory is enough)",
    )
    parser.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        help="on a GPU, multiply float32 activations rather than 8-bit ones: slower "
        "(default: only on software devices)",
    )
    parser.add_argument(
        "--kv-type",
        choices=("f16", "f32", "q8_0"),
        default="f16",
        help="type of the KV cache; q8_0 is half of f16 (default: %(default)s)",
    )
    parser.add_argument(
        "--kv-tokens",
        type=_kv_tokens,
        metavar="N",
        help="tokens that all requests may hold together, or 'max': what the device has room for "
        "(default: as many as --context)",
    )


def numbers(text: str) -> tuple[int, ...]:
    """The type of a flag that takes several numbers.

    >>> numbers("1,8,32")
    (1, 8, 32)
    """
    return tuple(int(word) for word in text.split(","))


def _kv_tokens(text: str) -> int | str:
    return text if text == "max" else int(text)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """One flag per sampling parameter."""
    group = parser.add_argument_group("sampling")
    for name, kind, default, text in SAMPLING:
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=default,
            metavar="N" if kind is int else "X",
            help=text if default is None else f"{text} (default: {default})",
        )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before TEXT; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-text token")


def sampling_params(args: argparse.Namespace) -> "SamplingParams":
    """The parsed flags as SamplingParams; RequestError for a value out of range."""
    from realm_web.sampler import SamplingParams

    values = {name: getattr(args, name) for name, _, _, _ in SAMPLING}
    return SamplingParams(**values, stop=tuple(args.stop), ignore_eos=args.ignore_eos)
