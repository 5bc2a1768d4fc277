"""Talk with a model in the terminal. Without MODEL it is the default one (SmolLM2-135M-Instruct).

Ctrl-C stops an answer, Ctrl-D or /exit ends the talk, /help lists the other commands.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.cli.text import visible
from realm_web.errors import RealmError, RequestError

if TYPE_CHECKING:
    from realm_web.answers import Chunk
    from realm_web.engine import Engine
    from realm_web.sampler import SamplingParams

EXAMPLES = """examples:
  realm chat
  realm chat model.gguf --system "You answer in one sentence."
  realm chat hf:bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M --device webgpu"""

HELP = """/new                 forget the conversation
/system TEXT         set the system message and forget the conversation; without TEXT: show it
/set NAME VALUE      change a sampling setting, as in /set temperature 0.5; without them: show all
/help                this list
/exit                end (as Ctrl-D); Ctrl-C stops an answer"""

HISTORY_LINES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=options.MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    options.add_engine(parser)
    options.add_sampling(parser)


def main(args: argparse.Namespace) -> int:
    from realm_web.cli.terminal import note

    params = options.sampling_params(args)
    with asyncio.Runner() as runner, _line_history():
        engine = runner.run(model.open_engine(args))
        try:
            name = visible(str(engine.gguf.metadata.get("general.name", "the model")))
            note(
                f"{name} on {engine.device.name} ({engine.device.reason}), {engine.context} tokens of context"
            )
            note("/help lists the commands")
            _talk(runner, engine, Conversation(params, args.system))
        finally:
            runner.run(engine.close())
    return 0


@dataclass
class Conversation:
    """What was said so far and how to answer. Knows neither the terminal nor the engine."""

    params: "SamplingParams"
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    def command(self, line: str) -> str:
        """Carry out one `/command`; what to show. RequestError for one that does not exist."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/help":
                return HELP
            case "/new":
                self.turns.clear()
                return "new conversation"
            case "/system":
                return self._system(rest)
            case "/set":
                return self._set(rest)
        raise RequestError(f"no command {name}; /help lists them")

    def _system(self, text: str) -> str:
        if not text:
            return self.system or "no system message"
        self.system = text
        self.turns.clear()
        return "new conversation with this system message"

    def _set(self, rest: str) -> str:
        kinds = {name: kind for name, kind, _, _ in options.SAMPLING}
        if not rest:
            return "\n".join(f"{name} {getattr(self.params, name)}" for name in kinds)
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name not in kinds:
            raise RequestError(f"no setting {name}; there are {', '.join(kinds)}")
        try:
            number = None if value == "none" else kinds[name](value)
        except ValueError:
            raise RequestError(f"{name} takes a number, not {value!r}; as in /set {name} 1") from None
        self.params = dataclasses.replace(self.params, **{name: number})
        return f"{name} {getattr(self.params, name)}"


def _talk(runner: asyncio.Runner, engine: "Engine", conversation: Conversation) -> None:
    from realm_web.cli.terminal import note

    for line in _lines():
        if line in ("/exit", "/quit"):
            return
        try:
            if line.startswith("/"):
                note(conversation.command(line))
            else:
                _turn(runner, engine, conversation, line)
        except RealmError as error:
            note(f"error: {error}", style="red")


def _turn(runner: asyncio.Runner, engine: "Engine", conversation: Conversation, text: str) -> None:
    """One question and its answer; a stopped answer stays in the conversation as far as it came."""
    from realm_web.cli.terminal import note

    conversation.turns.append({"role": "user", "content": text})
    chunks: list[Chunk] = []
    try:
        runner.run(_answer(engine, conversation, chunks))
    except KeyboardInterrupt:
        pass  # stopped by Ctrl-C: the prompt comes back
    except RealmError:
        conversation.turns.pop()
        raise
    print()
    if chunks:
        conversation.turns.append({"role": "assistant", "content": "".join(chunk.text for chunk in chunks)})
    else:
        conversation.turns.pop()
    note(summary(chunks))


async def _answer(engine: "Engine", conversation: Conversation, chunks: "list[Chunk]") -> None:
    answer = engine.chat(conversation.messages, conversation.params)
    async with contextlib.aclosing(answer):
        async for chunk in answer:
            chunks.append(chunk)
            print(chunk.text, end="", flush=True)


def summary(chunks: "list[Chunk]") -> str:
    """The line under an answer: tokens, rate, time to the first token; or that it was stopped."""
    n_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    if not chunks or chunks[-1].timings is None:
        return f"[stopped after {n_tokens} tokens]"
    usage, timings = chunks[-1].usage, chunks[-1].timings
    ended = " · cut off by max_tokens or the context" if chunks[-1].finish_reason == "length" else ""
    return (
        f"[{usage.completion_tokens} tokens · {timings.predicted_per_second:.1f} tok/s · "
        f"first token after {timings.time_to_first_token_ms:.0f} ms · prompt {usage.prompt_tokens} tokens at "
        f"{timings.prompt_per_second:.0f} tok/s{ended}]"
    )


def _lines() -> Iterator[str]:
    """What the person types, without empty lines, until end of input; Ctrl-C clears the line."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line:
            yield line


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Line editing, with the lines of earlier talks, where there are readline and a terminal."""
    try:
        import readline
    except ImportError:  # Windows
        readline = None
    if readline is None or not sys.stdin.isatty():
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "realm" / "history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
