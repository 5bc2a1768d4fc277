"""The `realm` command: picks the subcommand and turns every failure into one line and an exit code.

0 success; 2 the user's or the machine's fault (one line says what and the cure); 1 a bug of ours; 130 Ctrl-C.
REALM_DEBUG=1 shows tracebacks.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import realm_web
from realm_web import env
from realm_web.cli.options import CommandParser, Parser
from realm_web.cli.text import visible
from realm_web.errors import RealmError

COMMANDS = {
    "chat": "talk with a model in the terminal",
    "run": "complete or answer one prompt",
    "batch": "answer a file of requests, one per line",
    "tokenize": "show the token ids of a text",
    "inspect": "show what a model file holds and whether it will run",
    "quantize": "write a model again in a smaller type",
    "bench": "measure prompt processing and generation",
    "kernels": "show the kernels of a model, and how fast each of them is",
    "tune": "measure which kernel variants are fastest here",
    "perplexity": "measure how well a model predicts a text",
    "web": "serve the page on this machine",
    "doctor": "show which devices there are and which one is chosen",
}
EXAMPLES = """examples:
  realm chat                                   talk with the default model
  realm run model.gguf "Why is the sky blue?"  one answer on stdout
  realm inspect model.gguf                     metadata, tensors, will it run
  realm web                                    the same in a browser page

'realm COMMAND --help' tells more."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, one subparser per command."""
    parser = Parser(
        prog="realm",
        description="Run GGUF language models on the GPU, on the CPU, or in a browser page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"realm {realm_web.__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=CommandParser
    )
    for name, summary in COMMANDS.items():
        module = import_module(f"realm_web.cli.{name}")
        command = commands.add_parser(
            name,
            help=summary,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code."""
    try:
        args = build_parser().parse_args(argv)
        code = args.main(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (`realm run ... | head`); without this the interpreter complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (RealmError, OSError) as error:
        return _fail(f"realm: error: {_one_line(error)}", 2)
    except Exception as error:
        return _fail(f"realm: internal error: {type(error).__name__}: {_one_line(error)}", 1)


def _fail(line: str, code: int) -> int:
    if env.debug_level():
        import traceback

        traceback.print_exc()
    elif code == 1:
        line += " (REALM_DEBUG=1 shows where)"
    print(line, file=sys.stderr)
    return code


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return visible(" ".join(str(error).split()))  # a message may quote a hostile file


if __name__ == "__main__":
    sys.exit(main())
