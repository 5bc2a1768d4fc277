"""Answer one prompt. Only the text (or, with --json, one JSON object) goes to stdout.

The prompt is the argument, --prompt, or all of stdin. It is put into the model's chat template as the user's
message; with --raw the model continues the text as it stands.
"""

import argparse
import asyncio
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.errors import RequestError

if TYPE_CHECKING:
    from realm_web.answers import Chunk
    from realm_web.engine import Engine

EXAMPLES = """examples:
  realm run model.gguf "Why is the sky blue?"
  realm run model.gguf --raw --temperature 0 --max-tokens 32 --prompt "Once upon a time"
  git diff | realm run model.gguf --system "Write a commit message for this diff."
  realm run model.gguf --prompt Hello --json | python3 -m json.tool"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("text", metavar="PROMPT", nargs="?", help="the prompt (default: stdin)")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt, too")
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the prompt")
    parser.add_argument(
        "--json", action="store_true", help="print text, token ids, usage and timings as JSON"
    )
    options.add_engine(parser)
    options.add_sampling(parser)


def main(args: argparse.Namespace) -> int:
    text = prompt_text(args)
    params = options.sampling_params(args)
    if args.raw and args.system is not None:
        raise RequestError("--system needs the chat template, and --raw leaves it out; drop one of them")
    asyncio.run(_run(args, text, params))
    return 0


def prompt_text(args: argparse.Namespace) -> str:
    """The prompt from its one place; RequestError where there are two or none."""
    if args.prompt is not None and args.text is not None:
        raise RequestError("two prompts given, as argument and as --prompt; drop one of them")
    text = args.prompt if args.prompt is not None else args.text
    if text is None:
        if sys.stdin.isatty():
            raise RequestError("no prompt; give it as argument, by --prompt or on stdin")
        text = sys.stdin.read()
    if not text.strip() and not args.raw:
        raise RequestError("the prompt is empty; give some text as argument, by --prompt or on stdin")
    return text


async def _run(args: argparse.Namespace, text: str, params) -> None:
    engine = await model.open_engine(args)
    try:
        prompt_ids = engine.tokenizer.encode(text if args.raw else _chat_text(engine, args.system, text))
        chunks = []
        async for chunk in engine.generate(prompt_ids, params):
            chunks.append(chunk)
            if not args.json:
                print(chunk.text, end="", flush=True)
        if args.json:
            print(json.dumps(result(engine, prompt_ids, chunks), ensure_ascii=False))
        else:
            print()
    finally:
        await engine.close()


def _chat_text(engine: "Engine", system: str | None, text: str) -> str:
    messages = [{"role": "system", "content": system}] if system is not None else []
    return engine.chat_prompt([*messages, {"role": "user", "content": text}])


def result(engine: "Engine", prompt_ids: list[int], chunks: "list[Chunk]") -> dict[str, object]:
    """The object that --json prints. Scripts rely on these keys."""
    last = chunks[-1]
    return {
        "text": "".join(chunk.text for chunk in chunks),
        "token_ids": [token for chunk in chunks for token in chunk.token_ids],
        "prompt_token_ids": list(prompt_ids),
        "finish_reason": last.finish_reason,
        "usage": dataclasses.asdict(last.usage) | {"total_tokens": last.usage.total_tokens},
        "timings": dataclasses.asdict(last.timings),
        "device": engine.device.kind,
        "adapter": engine.device.name,
    }
