"""Measure how well a model predicts a text: perplexity, by the method of llama-perplexity.

The text is cut into pieces of --context tokens; a rest that fills none is left out. A model that wants a BOS
token gets it in place of the first token of each piece. The second half of each is scored: its tokens have at
least half a context before them. Less is better; only equal tokenizers and contexts compare.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from realm_web.cli import model, options
from realm_web.errors import RealmError, RequestError

if TYPE_CHECKING:
    from realm_web.cli.terminal import WorkProgress
    from realm_web.engine import Engine

EXAMPLES = """examples:
  realm perplexity model.gguf wiki.test.raw
  realm perplexity text.txt                       of the default model
  realm perplexity model.gguf text.txt --context 2048 --device cpu
  cat *.md | realm perplexity model.gguf - --json | jq .perplexity"""

AT_ONCE = 4  # pieces under way: while one is computed, the next are ready
LEAST_CONTEXT = 4


@dataclass
class Estimate:
    """exp(mean negative log-likelihood) of the tokens so far, with the standard error of that mean.

    >>> estimate = Estimate()
    >>> estimate.add([-1.0, -3.0])
    >>> round(estimate.perplexity, 3), round(estimate.error, 3), estimate.n
    (7.389, 7.389, 2)
    """

    n: int = 0
    _sums: list[float] = field(default_factory=list)
    _squares: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.4f} ± {self.error:.4f}"

    @property
    def n_pieces(self) -> int:
        return len(self._sums)

    def add(self, logprobs: Sequence[float]) -> None:
        self.n += len(logprobs)
        self._sums.append(-math.fsum(logprobs))
        self._squares.append(math.fsum(x * x for x in logprobs))

    @property
    def mean(self) -> float:
        """Negative log-likelihood per token, in nats; whatever the order in which the pieces came."""
        return math.fsum(self._sums) / self.n

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the perplexity, to first order; 0 for a single token."""
        variance = max(math.fsum(self._squares) / self.n - self.mean**2, 0.0)
        return self.perplexity * math.sqrt(variance / max(self.n - 1, 1))


@dataclass(frozen=True, slots=True)
class Report:
    """What --json prints. Scripts rely on these names."""

    model: str
    file: str
    device: str
    adapter: str
    context: int
    pieces: int
    scored_tokens: int
    perplexity: float
    standard_error: float
    nll_per_token: float  # nats
    tokens_per_second: float  # of all pieces, also of the halves that are not scored

    @property
    def line(self) -> str:
        return (
            f"perplexity {self.perplexity:.4f} ± {self.standard_error:.4f} over {self.scored_tokens:,} "
            f"tokens (second halves of {self.pieces} × {self.context}), {self.tokens_per_second:,.0f} tok/s"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{options.MODEL_HELP} (default: the demo)")
    parser.add_argument("file", metavar="FILE", help="a UTF-8 text; - for stdin")
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the model, too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    options.add_engine(parser, context=512)


def main(args: argparse.Namespace) -> int:
    if args.model is not None and args.model_flag is not None:
        raise RequestError("two models given, as argument and as --model; drop one of them")
    args.model = args.model_flag if args.model is None else args.model
    if args.context < LEAST_CONTEXT:
        raise RequestError(f"--context is {args.context}; it must be at least {LEAST_CONTEXT}")
    text = read_text(args.file)
    asyncio.run(_measure(args, text))
    return 0


def read_text(name: str) -> str:
    """The file's text without a line end at its end, which llama-perplexity drops too."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(
            f"{name} is not UTF-8 text (byte {error.start}); give a text, and a model before it"
        ) from None


def pieces(token_ids: Sequence[int], size: int, bos_id: int | None) -> Iterator[list[int]]:
    """The whole pieces of `size` tokens, each with `bos_id` in place of its first token if there is one.

    >>> list(pieces([5, 6, 7, 8, 9], 2, bos_id=1))
    [[1, 6], [1, 8]]
    """
    for start in range(0, len(token_ids) - size + 1, size):
        piece = list(token_ids[start : start + size])
        if bos_id is not None:
            piece[0] = bos_id
        yield piece


async def _measure(args: argparse.Namespace, text: str) -> None:
    from realm_web.cli.terminal import Output, WorkProgress, note

    size = args.context
    engine = await model.open_engine(args, max_seqs=AT_ONCE, kv_tokens=AT_ONCE * size)
    try:
        note(f"{engine.device.name} ({engine.device.kind}): {engine.device.reason}")
        tokenizer = engine.tokenizer
        token_ids = tokenizer.encode(text, parse_special=False)
        parts = list(pieces(token_ids, size, tokenizer.bos_id if tokenizer.add_bos else None))
        if not parts:
            raise RequestError(
                f"the text has {len(token_ids)} tokens, less than one piece of {size}; "
                "choose a smaller --context"
            )
        started = time.perf_counter()
        with WorkProgress("scoring", len(parts)) as bar:
            estimate = await _score_all(engine, parts, bar)
        seconds = time.perf_counter() - started
    finally:
        await engine.close()
    report = Report(
        model=model.model_or_default(args.model),
        file=args.file,
        device=engine.device.kind,
        adapter=engine.device.name,
        context=size,
        pieces=len(parts),
        scored_tokens=estimate.n,
        perplexity=estimate.perplexity,
        standard_error=estimate.error,
        nll_per_token=estimate.mean,
        tokens_per_second=size * len(parts) / seconds,
    )
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        Output().line(report.line)


async def _score_all(engine: "Engine", parts: Sequence[list[int]], bar: "WorkProgress") -> Estimate:
    """Score the second half of every part, a few parts at a time."""
    size = len(parts[0])
    first = size // 2 + 1
    estimate, started = Estimate(), time.perf_counter()
    gate = asyncio.Semaphore(AT_ONCE)

    async def score(part: list[int]) -> None:
        async with gate:
            scores = await engine.score(part, first=first)
        logprobs = scores.logprobs[first:]
        if not all(map(math.isfinite, logprobs)):
            raise RealmError("the model computed no number for the probability of a token: a broken file?")
        estimate.add(logprobs)
        done = estimate.n_pieces
        rate = done * size / (time.perf_counter() - started)
        bar.show(done, f"{done}/{len(parts)}  {estimate}  {rate:,.0f} tok/s")

    try:
        async with asyncio.TaskGroup() as tasks:
            for part in parts:
                tasks.create_task(score(part))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return estimate
