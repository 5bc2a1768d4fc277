"""What comes out of an engine: pieces of answers with their numbers, and how a piece is made of tokens.

Knows text, time and log-probabilities; knows neither the scheduler's decisions nor the device.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from realm_web.grammar import Matcher
from realm_web.request import FinishReason, Request
from realm_web.tokenizer import StopMatcher, StreamDecoder


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer. `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timings:
    """Milliseconds, and tokens per second. The first token belongs to the prompt's time."""

    prompt_ms: float
    predicted_ms: float
    time_to_first_token_ms: float
    prompt_per_second: float
    predicted_per_second: float


class TokenLogprob(NamedTuple):
    """Natural log-probabilities under the model's own distribution, before penalties and temperature."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens and theirs, best first


class Chunk(NamedTuple):
    """A piece of an answer. The last one of each answer has finish_reason, usage and timings."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    index: int = 0  # which of the n answers
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each token id, where they were asked for


@dataclass(frozen=True)
class Scores:
    """How likely a text is to the model: the natural log-probability of each token after those before it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]  # None for the first token, which nothing predicts


@dataclass(eq=False, slots=True)
class Answer:
    """What the engine keeps of a request: its text so far, its grammar, and who is told."""

    request: Request
    decoder: StreamDecoder | None  # None for requests that generate nothing
    stops: StopMatcher
    sink: Callable[[Chunk | BaseException], None]
    index: int = 0
    matcher: Matcher | None = None
    deadline: asyncio.TimerHandle | None = None
    values: MutableSequence[float] = ()  # scores by position, or the pooled hidden state
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    n_tokens: int = 0

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is safe to show after one more token, and whether a stop string ended it."""
        self.n_tokens += 1
        if self.n_tokens == 1:
            self.first = time.perf_counter()
        text = self.decoder.push(token)
        if self.n_tokens <= self.request.params.min_tokens:  # a stop string does not end it yet either
            return text, False
        return self.stops.push(text)

    def completes(self, token: int) -> bool:
        """Tell the grammar of one more token; whether nothing may follow it."""
        if self.matcher is None:
            return False
        self.matcher.accept(token)
        return self.matcher.is_finished

    @property
    def wants_logprobs(self) -> bool:
        return self.request.params.logprobs

    def logprobs(
        self, token: int, logprob: float, ids: Sequence[int], logprobs: Sequence[float]
    ) -> tuple[TokenLogprob]:  # fmt: skip
        """As they came from the device, the likeliest tokens first; as many of these as were asked for."""
        n = self.request.params.top_logprobs
        return (TokenLogprob(token, logprob, tuple(zip(ids[:n], logprobs[:n], strict=True))),)

    def rest(self) -> str:
        """The text held back, when no more tokens come."""
        text, stopped = self.stops.push(self.decoder.finish())
        return text if stopped else text + self.stops.finish()

    def last_chunk(
        self, text: str, tokens: tuple[int, ...], reason: FinishReason,
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> Chunk:  # fmt: skip
        now = time.perf_counter()
        request = self.request
        n_prompt, first = len(request.prompt_ids), self.first or now
        prompt_s, predicted_s = first - self.started, now - first
        timings = Timings(
            prompt_ms=1e3 * prompt_s,
            predicted_ms=1e3 * predicted_s,
            time_to_first_token_ms=1e3 * prompt_s,
            prompt_per_second=n_prompt / max(prompt_s, 1e-9),
            predicted_per_second=(self.n_tokens - 1) / predicted_s
            if self.n_tokens > 1 and predicted_s
            else 0.0,
        )
        usage = Usage(n_prompt, self.n_tokens, request.n_cached)
        return Chunk(text, tokens, reason, usage, timings, self.index, logprobs)
