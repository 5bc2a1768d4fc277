"""Show the tokens of a text, as the model's own tokenizer cuts it. Reads the file's header only."""

import argparse
import json
import sys

from realm_web.cli import model, options

EXAMPLES = """examples:
  realm tokenize model.gguf --text "Hello, world!"
  realm tokenize model.gguf --json < book.txt
  realm tokenize model.gguf --no-special --text "<|im_start|> is plain text here"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--text", help="the text (default: stdin)")
    parser.add_argument(
        "--no-special",
        action="store_true",
        help="add no begin or end token, and take special tokens in the text as plain text",
    )
    parser.add_argument("--json", action="store_true", help='print {"ids": [...]}')


def main(args: argparse.Namespace) -> int:
    from realm_web.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_metadata(model.read_header(args.model).metadata)
    text = sys.stdin.read() if args.text is None else args.text
    special = not args.no_special
    ids = tokenizer.encode(text, add_special=special, parse_special=special)
    if args.json:
        print(json.dumps({"ids": ids}))
        return 0
    for token in ids:
        piece = tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") or tokenizer.decode([token])
        print(f"{token:>7}  {piece!r}")
    return 0
