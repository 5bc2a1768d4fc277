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

from realm_web.engine import Chunk, Engine, Progress, Timings, Usage
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
    ) -> LLM:
        """Load a GGUF model from a path, a URL or `hf:user/repo:Q4_K_M`; see `Engine.open`."""
        loop = _LoopThread()
        try:
            engine = loop.run(Engine.open(source, device=device, context=context, on_progress=on_progress))
        except BaseException:
            loop.close()
            raise
        return cls(engine, loop)

    def generate(self, prompt: str | Sequence[int], **sampling: Any) -> Completion:
        """Continue the prompt. Keywords are the fields of `SamplingParams`; RequestError for a wrong one."""
        ids = self.engine._prompt_ids(prompt)
        return _complete(ids, self._iterate(self.engine.generate(ids, SamplingParams.from_mapping(sampling))))

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[Chunk]:
        """Continue the prompt, piece by piece. Leaving the loop early ends the request."""
        return self._iterate(self.engine.generate(prompt, SamplingParams.from_mapping(sampling)))

    def chat(self, messages: Sequence[dict], **sampling: Any) -> Completion:
        """Answer a conversation: dicts with "role" and "content"."""
        return self.generate(self.engine.chat_prompt(messages), **sampling)

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


def _complete(prompt_ids: tuple[int, ...], chunks: Iterator[Chunk]) -> Completion:
    pieces = list(chunks)
    last = pieces[-1]
    return Completion(
        text="".join(chunk.text for chunk in pieces),
        token_ids=tuple(token for chunk in pieces for token in chunk.token_ids),
        prompt_token_ids=prompt_ids,
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
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
