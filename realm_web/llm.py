"""The synchronous facade: `LLM.load("model.gguf").generate("...")`.

Drives an `Engine` on an event loop of its own thread, so that it works in scripts, in notebooks (whose own
loop is already running) and from several threads. Not for the page, which has no threads: use `Engine` there.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_web.answers import Chunk, Scores, Timings, TokenLogprob, Usage
from realm_web.engine import Engine
from realm_web.errors import RequestError
from realm_web.opening import Progress
from realm_web.sampler import SamplingParams
from realm_web.scheduler import FinishReason


@dataclass(frozen=True)
class Completion:
    """A whole answer. `str(completion)` is its text."""

    text: str
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None  # one for each token id, where they were asked for

    def __str__(self) -> str:
        return self.text


class LLM:
    """A model, loaded and ready.

    >>> llm = LLM.load(model_path, device="cpu")
    >>> llm.generate("The capital of France is", temperature=0, max_tokens=2).text
    ' Paris.'
    >>> for chunk in llm.stream("1, 2, 3, 4,", temperature=0, max_tokens=6):
    ...     print(chunk.text, end="")
     5, 6,
    >>> answer = llm.chat([{"role": "user", "content": "Hi"}], max_tokens=4, seed=1)
    >>> answer.finish_reason, answer.usage.completion_tokens
    ('length', 4)
    >>> llm.close()
    """

    def __init__(self, engine: Engine, loop: _LoopThread):
        self.engine = engine
        self._loop = loop

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: str = "auto",
        context: int | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        **sizes: Any,
    ) -> LLM:
        """Load a GGUF model from a path, a URL or `hf:user/repo:Q4_K_M`; other keywords: `Engine.open`."""
        loop = _LoopThread()
        try:
            engine = loop.run(
                Engine.open(source, device=device, context=context, on_progress=on_progress, **sizes)
            )
        except BaseException:
            loop.close()
            raise
        return cls(engine, loop)

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Completion:
        """Continue the prompt. Keywords are the fields of `SamplingParams`; RequestError for a wrong one."""
        if sampling.get("n", 1) != 1:
            raise RequestError("n: generate gives one answer; generate_all([prompt], n=...) gives several")
        return self.generate_all([prompt], **sampling)[0]

    def generate_all(self, prompts: Sequence[str | Sequence[int]], **sampling: Any) -> list[Completion]:
        """Continue all prompts at once, in one batch: n answers of the first, then those of the second...

        As many of them run at a time as the engine has room for (`max_seqs`).
        """
        params = SamplingParams.from_mapping(sampling)

        async def one(prompt: str | Sequence[int]) -> list[Completion]:
            ids = self.engine.prompt_ids(prompt)
            return _complete(ids, [chunk async for chunk in self.engine.generate(ids, params)], params.n)

        async def all_of_them() -> list[list[Completion]]:
            tasks = [asyncio.ensure_future(one(prompt)) for prompt in prompts]
            try:
                return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

        return [completion for completions in self._run(all_of_them()) for completion in completions]

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[Chunk]:
        """Continue the prompt, piece by piece. Leaving the loop early ends the request."""
        return self._iterate(self.engine.generate(prompt, SamplingParams.from_mapping(sampling)))

    def chat(self, messages: Sequence[dict], **sampling: Any) -> Completion:
        """Answer a conversation: dicts with "role" and "content"."""
        return self.generate(self.engine.chat_prompt(messages), **sampling)

    def score(self, prompt: str | Sequence[int]) -> Scores:
        """How likely each token of a text is to the model after those before it."""
        return self._run(self.engine.score(prompt))

    def embed(self, prompt: str | Sequence[int], **options: Any) -> list[float]:
        """A text as one vector of length 1; options are those of `Engine.embed`."""
        return self._run(self.engine.embed(prompt, **options))

    def stream_chat(self, messages: Sequence[dict], **sampling: Any) -> Iterator[Chunk]:
        """Answer a conversation, piece by piece."""
        return self.stream(self.engine.chat_prompt(messages), **sampling)

    def close(self) -> None:
        """Give the device's memory back. Twice is harmless."""
        if not self._loop.closed:
            self._loop.run(self.engine.close())
            self._loop.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _iterate(self, chunks: AsyncIterator[Chunk]) -> Iterator[Chunk]:
        try:
            while (chunk := self._loop.run(anext(chunks, None))) is not None:
                yield chunk
        finally:
            self._loop.run(chunks.aclose())

    def _run(self, work: Coroutine) -> Any:
        return self._loop.run(work)


def _complete(prompt_ids: tuple[int, ...], chunks: Sequence[Chunk], n: int) -> list[Completion]:
    """The chunks of n answers, put together."""
    return [_join(prompt_ids, [chunk for chunk in chunks if chunk.index == index]) for index in range(n)]


def _join(prompt_ids: tuple[int, ...], pieces: Sequence[Chunk]) -> Completion:
    last = pieces[-1]
    logprobs = [logprob for chunk in pieces for logprob in chunk.logprobs or ()]
    return Completion(
        text="".join(chunk.text for chunk in pieces),
        token_ids=tuple(token for chunk in pieces for token in chunk.token_ids),
        prompt_token_ids=prompt_ids,
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        logprobs=tuple(logprobs) or None,
    )


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="realm_web", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, work: Coroutine | Any) -> Any:
        """The result of a coroutine on that loop. An interrupt here cancels it there."""

        async def awaited():
            return await work

        future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
