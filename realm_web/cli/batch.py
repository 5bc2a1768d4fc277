"""Answer a file of requests: an OpenAI request body per line in, a line of results for each out.

A line is the body of a chat or completion request, bare or in the envelope of OpenAI's Batch API. The prompt
of a bare one is put into the chat template as the user's message; with "raw": true the model continues it as
it stands. Results come in order of completion. After an interruption the same command does what is missing.
A line that cannot be answered gets an error for its result, and costs nobody else anything.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from io import FileIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from realm_web import batchfile
from realm_web.batchfile import MAX_LINE, BatchRequest, LineError
from realm_web.cli import model, options
from realm_web.cli.text import visible
from realm_web.errors import DeviceError, OutOfDeviceMemory, RealmError, RequestError

if TYPE_CHECKING:
    from realm_web.engine import Engine

EXAMPLES = """examples:
  realm batch model.gguf --input requests.jsonl --output answers.jsonl
  realm batch model.gguf --input requests.jsonl --output answers.jsonl --retry-errors
  realm batch model.gguf --input requests.jsonl --output answers.jsonl --max-seqs 64 --kv-tokens max
  echo '{"custom_id": "a", "prompt": "Once upon a time", "raw": true, "max_tokens": 32}' > one.jsonl"""

MAX_SEQS = 32
WINDOW = 4  # requests under way per sequence of the batch, so that there is always one that can start
SHOW_EVERY = 0.1  # seconds
FSYNC_EVERY = 1.0  # seconds; what a power cut takes is done again
RESULT_START = b'{"custom_id": "'  # of every line that we write

INVALID, DUPLICATE, FAILED = "invalid_request_error", "duplicate_custom_id", "server_error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{options.MODEL_HELP} (default: the demo)")
    parser.add_argument("--input", required=True, type=Path, metavar="FILE", help="requests, one per line")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="results; those already there are kept"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="do lines again whose result so far is an error"
    )
    parser.add_argument(
        "--max-seqs",
        type=int,
        default=MAX_SEQS,
        metavar="N",
        help="requests that run at a time (default: %(default)s)",
    )
    options.add_engine(parser)


def main(args: argparse.Namespace) -> int:
    from realm_web.cli.terminal import WorkProgress, note

    if args.max_seqs < 1:
        raise RequestError(f"--max-seqs is {args.max_seqs}; it must be at least 1")
    if args.output.exists() and (args.output.samefile(args.input) or not args.output.is_file()):
        raise RequestError(f"--output {args.output} cannot be appended to; give another file")
    with args.input.open("rb") as requests, Results(args.output, retry_errors=args.retry_errors) as results:
        tally = Tally(count_lines(args.input))
        try:
            with WorkProgress("answering", tally.total) as bar:
                batch = Batch(results, tally, lambda: bar.show(tally.settled, str(tally)))
                asyncio.run(
                    batch.run(
                        read_lines(requests),
                        open_engine=lambda: model.open_engine(args, max_seqs=args.max_seqs),
                        window=WINDOW * args.max_seqs,
                    )
                )
        except KeyboardInterrupt:
            note(f"interrupted: {tally}; the same command does the rest")
            raise
    note(f"{visible(str(args.output))}: {tally}")
    return 0


@dataclass
class Tally:
    """How far a run is."""

    total: int | None  # lines of the input
    settled: int = 0  # lines that are done with, in this run or before
    n_earlier: int = 0  # of these in an earlier run
    n_failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        seconds = max(time.perf_counter() - self.started, 1e-9)
        parts = [f"{self.settled:,}" + ("" if self.total is None else f" of {self.total:,}") + " lines"]
        if self.n_earlier:
            parts.append(f"{self.n_earlier:,} of an earlier run")
        if self.n_failed:
            parts.append(f"{self.n_failed:,} failed")
        if self.prompt_tokens or self.new_tokens:
            parts.append(f"prompts {self.prompt_tokens / seconds:,.0f} tok/s")
            parts.append(f"answers {self.new_tokens / seconds:,.0f} tok/s")
        return ", ".join(parts)


class Results:
    """The output file: which lines have their result, and where new ones are appended.

    Keeps 16 bytes of each custom_id, so that memory stays small however long the lines are. A line that an
    interruption cut in two is removed. RequestError where the file holds anything but results.
    """

    def __init__(self, path: Path, *, retry_errors: bool = False):
        self._done: set[bytes] = set()
        self._duplicates: set[int] = set()  # lines of the input whose result says so
        self._seen: set[bytes] = set()  # in this pass over the input
        if retry_errors:
            _open(path).close()  # nobody else writes it
            _drop_errors(path)
        self._file = _open(path)
        try:
            end = 0
            with path.open("rb") as existing:
                for result, end in _results(existing, path):  # noqa: B007 (the last end counts)
                    self._remember(result)
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise
        self._synced = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def is_new(self, custom_id: str) -> bool:
        """Whether no line before this one in the input has that custom_id."""
        key = _digest(custom_id)
        new = key not in self._seen
        self._seen.add(key)
        return new

    def has(self, custom_id: str) -> bool:
        return _digest(custom_id) in self._done

    def has_duplicate(self, number: int) -> bool:
        """Whether it is written already that line `number` repeats a custom_id."""
        return number in self._duplicates

    def add(self, result: dict[str, object]) -> None:
        """Append one line; it outlives the process from now on, and a power cut from the next fsync on."""
        data = memoryview(batchfile.encode(result))
        while data:
            data = data[self._file.write(data) :]
        self._remember(result)
        now = time.monotonic()
        if now - self._synced > FSYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = now

    def _remember(self, result: dict) -> None:
        if result.get("error", {}).get("type") == DUPLICATE:
            self._duplicates.add(result.get("line"))
        else:
            self._done.add(_digest(result["custom_id"]))


class Batch:
    """One run over the lines of an input."""

    def __init__(self, results: Results, tally: Tally, show: Callable[[], None]):
        self._results, self._tally, self._bar = results, tally, show
        self._shown: float | None = None  # when; None before the engine is open, which has bars of its own

    async def run(
        self,
        lines: Iterator[tuple[int, bytes]],
        *,
        open_engine: "Callable[[], Awaitable[Engine]]",
        window: int,
    ) -> None:
        """Answer the lines that have no result yet, `window` of them at a time at most.

        The engine is opened for the first of them. An error of the device ends the run; others are results.
        """
        engine, gate = None, asyncio.Semaphore(window)
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, line in lines:
                    request = self._request(number, line)
                    if request is None:
                        if number % 64 == 0:
                            await asyncio.sleep(0)  # let answers come in
                        continue
                    if engine is None:
                        engine = await open_engine()
                        self._shown = self._tally.started = time.perf_counter()
                    await gate.acquire()
                    task = tasks.create_task(self._answer(engine, request, number))
                    task.add_done_callback(lambda _: gate.release())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            if engine is not None:
                await engine.close()

    def _request(self, number: int, line: bytes) -> BatchRequest | None:
        """What is to be done for a line; None where it has its result, or gets it here."""
        if not line.strip():
            self._tally.settled += 1
            return None
        request, error = None, None
        try:
            request = batchfile.parse(line, number)
            custom_id = request.custom_id
        except LineError as bad:
            error, custom_id = bad, bad.custom_id
        if not self._results.is_new(custom_id):
            if self._results.has_duplicate(number):
                self._settle_earlier()
            else:
                self._fail(custom_id, number, DUPLICATE, "an earlier line has this custom_id: give another")
        elif self._results.has(custom_id):
            self._settle_earlier()
        elif error is not None:
            self._fail(custom_id, number, INVALID, str(error))
        else:
            return request
        return None

    async def _answer(self, engine: "Engine", request: BatchRequest, number: int) -> None:
        answer = batchfile.Answer(request)
        try:
            prompt = request.prompt if request.messages is None else engine.chat_prompt(request.messages)
            async for chunk in engine.generate(prompt, request.params):
                answer.add(chunk)
                self._tally.new_tokens += len(chunk.token_ids)
                self._show()
        except RequestError as error:
            self._fail(request.custom_id, number, INVALID, str(error))
        except OutOfDeviceMemory as error:
            self._fail(request.custom_id, number, FAILED, str(error))
        except DeviceError:
            raise
        except RealmError as error:
            self._fail(request.custom_id, number, FAILED, str(error))
        else:
            self._tally.prompt_tokens += answer.usages[0].prompt_tokens
            self._tally.settled += 1
            self._results.add(answer.result(_token_text(engine)))
            self._show()

    def _fail(self, custom_id: str, number: int, kind: str, message: str) -> None:
        self._tally.settled += 1
        self._tally.n_failed += 1
        self._results.add(batchfile.failure(custom_id, number, kind, message))
        self._show()

    def _show(self) -> None:
        now = time.perf_counter()
        if self._shown is not None and now - self._shown > SHOW_EVERY:
            self._shown = now
            self._bar()

    def _settle_earlier(self) -> None:
        self._tally.settled += 1
        self._tally.n_earlier += 1


def read_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, from 1. Of one that is far too long only so much that it is seen to be."""
    for number in count(1):
        line = file.readline(MAX_LINE + 1)
        if not line:
            return
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE)
        yield number, line


def count_lines(path: Path) -> int | None:
    """How many lines a file has; None for a pipe, which can be read only once."""
    if not path.is_file():
        return None
    n_lines, last = 0, b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            n_lines, last = n_lines + block.count(b"\n"), block[-1:]
    return n_lines + (last != b"\n")


def _results(file: BinaryIO, path: Path) -> Iterator[tuple[dict, int]]:
    """The results in a file, and where each one ends. The rest of one that was cut off is left out."""
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n") and (line.startswith(RESULT_START) or RESULT_START.startswith(line)):
            return
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            result = None
        if not _is_result(result):
            raise RequestError(f"{path}: line {number} is not a result of realm batch; give another --output")
        yield result, file.tell()


def _is_result(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("custom_id"), str):
        return False
    if "error" in value:
        return isinstance(value["error"], dict) and isinstance(value.get("line"), int)
    return "text" in value or "choices" in value


def _drop_errors(path: Path) -> None:
    """Write the file again without the lines that are errors."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with path.open("rb") as old, part.open("wb") as new:
            for result, _ in _results(old, path):
                if "error" not in result:
                    new.write(batchfile.encode(result))
            new.flush()
            os.fsync(new.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _open(path: Path) -> FileIO:
    """The file for appending. No other run can have it at the same time, where the system has such locks."""
    file = path.open("ab", buffering=0)
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass
    except BlockingIOError:
        file.close()
        raise RequestError(f"{path} is being written by another realm batch; wait for it") from None
    return file


def _digest(custom_id: str) -> bytes:
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _token_text(engine: "Engine") -> Callable[[int], str]:
    return lambda token_id: engine.tokenizer.token_bytes(token_id).decode("utf-8", "replace")
