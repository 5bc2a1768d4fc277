"""Requests in, text out: one engine per model, many requests at once, several steps in flight.

Turns prompts into requests and requests into answers: text, log-probabilities, scores, embeddings. The steps
that write them are `stepping.py`'s.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from realm_web.answers import Answer, Chunk, Scores
from realm_web.errors import RealmError, RequestError
from realm_web.gguf import GGUFFile
from realm_web.grammar import Matcher, open_grammar
from realm_web.kvcache import BLOCK_SIZE
from realm_web.loader import Source
from realm_web.models.config import ModelConfig
from realm_web.opening import MAX_ROWS, MAX_SEQS, Model, OnProgress, Sizes, check_sizes, place, read_model
from realm_web.runner import POOLS, Runner
from realm_web.runtime.adapters import open_device
from realm_web.runtime.device import Device
from realm_web.sampler import SamplingParams, hash_u32
from realm_web.scheduler import Request, Scheduler
from realm_web.stepping import Stepper
from realm_web.tokenizer import StopMatcher, Tokenizer
from realm_web.tuning import Store, user_store

Sink = Callable[[Chunk | BaseException], None]
POOLINGS = {1: "mean", 2: "cls", 3: "last"}  # llama.cpp's pooling_type


class Engine:
    """A model that answers any number of requests at once. Open it with `await Engine.open(...)`.

    >>> async def main():
    ...     engine = await Engine.open(model_path, device="cpu")
    ...     params = SamplingParams(temperature=0, max_tokens=5)
    ...     async for chunk in engine.generate("The capital of France is", params):
    ...         print(chunk.text, end="")
    ...     await engine.close()
    """

    def __init__(self, model: Model, stepper: Stepper):
        self.model, self.stepper = model, stepper
        self._names = itertools.count()
        self._opening_grammar = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        source: str | Path | Source,
        *,
        device: str | Device = "auto",
        context: int | None = None,
        kv_tokens: int | Literal["max"] | None = None,
        max_seqs: int = MAX_SEQS,
        max_rows: int = MAX_ROWS,
        kv_type: Literal["f16", "f32", "q8_0"] = "f16",
        prefix_cache: bool | None = None,
        cpu_dequant: bool | None = None,
        exact: bool | None = None,
        tenant_weights: Mapping[str, float] | None = None,
        reopen: Callable[[], Awaitable[Source]] | None = None,
        store: Store | None = None,
        on_progress: OnProgress = None,
    ) -> Engine:
        """Load a GGUF model onto a device.

        `source` is a path, a URL, `hf:user/repo:Q4_K_M`, or a `Source`, which is closed when its weights are
        read; `reopen` opens it again after the device was lost. `device` is "auto", "webgpu", "cpu" or an
        open `Device`, which the engine then owns. `context` is how many tokens one request may hold (the
        model's, at most 8192, if not given), `kv_tokens` how many all running ones together: as many as one
        if not given, "max" for all that the device has room for. `max_seqs` of them run at a time, and one
        forward pass takes `max_rows` tokens at most: longer prompts run in several. `kv_type` "q8_0" holds
        twice the tokens of "f16". The prefix cache is on where the model allows it. `exact` multiplies
        float32 activations, as software devices do anyway; hardware GPUs bring them into 8 bits, as llama.cpp
        does.
        `tenant_weights` are the shares of the tenants that `generate` names, 1 where not given.
        `store` remembers what was measured of the kernels; natively the user's cache folder if not given.
        Raises RealmError: FormatError, UnsupportedError, DeviceError, RequestError.
        """
        if isinstance(source, str | Path):
            from realm_web.sources import open_source

            store = store or user_store()

            name = source
            reopen = reopen or (lambda: open_source(name))
            source = await open_source(source)
        sizes = Sizes(context, kv_tokens, max_seqs, max_rows, kv_type, prefix_cache, cpu_dequant, exact)
        try:
            model = await read_model(source, reopen)
            check_sizes(sizes, model.config)
            opened = device if isinstance(device, Device) else await open_device(device)
            runner = await place(model, source, opened, sizes, on_progress, store)
        finally:
            source.close()
        return cls(model, Stepper(model, runner, sizes, tenant_weights or {}, store))

    @property
    def runner(self) -> Runner:
        return self.stepper.runner

    @property
    def scheduler(self) -> Scheduler:
        return self.stepper.scheduler

    @property
    def device(self) -> Device:
        return self.runner.device

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def gguf(self) -> GGUFFile:
        return self.model.gguf

    @property
    def context(self) -> int:
        """Tokens that one request may hold."""
        return self.runner.context

    @property
    def kv_tokens(self) -> int:
        """Tokens that all running requests may hold together."""
        return self.runner.n_blocks * BLOCK_SIZE

    def chat_prompt(self, messages: Sequence[dict]) -> str:
        """The text of a conversation in the model's own template, ready for `generate`."""
        return self.model.template.render(list(messages), add_generation_prompt=True)

    def chat(
        self, messages: Sequence[dict], params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[Chunk]:
        """Answer a conversation: dicts with "role" and "content". Options are those of `generate`."""
        return self.generate(self.chat_prompt(messages), params, **options)

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: bytes | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Chunk]:
        """Continue a text (special tokens in it count as such) or a list of token ids, piece by piece.

        With params.n > 1 the chunks of all answers come mixed, told apart by `index`. Requests of higher
        `priority` go first; among equals each `tenant` has its share. Prompts are reused between requests of
        one tenant, or of one `cache_salt` where that is given. After `timeout` seconds the answer ends with
        what there is, and finish_reason "timeout". Leaving the iteration early ends the request. RequestError
        when the prompt does not fit the context or a parameter names a token that the model does not have.
        """
        queue: asyncio.Queue[Chunk | BaseException] = asyncio.Queue()
        answers = await self.start(
            prompt, params, queue.put_nowait,
            priority=priority, tenant=tenant, cache_salt=cache_salt, timeout=timeout,
        )  # fmt: skip
        n_running = len(answers)
        try:
            while n_running:
                chunk = await queue.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
                n_running -= chunk.finish_reason is not None
        finally:
            self.stop(answers)

    async def start(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        sink: Sink,
        *,
        priority: int = 0,
        tenant: str = "",
        cache_salt: bytes | None = None,
        timeout: float | None = None,
    ) -> list[Answer]:
        """Like `generate`, but every chunk goes to `sink` as soon as it is there; an error is the last."""
        params = params or SamplingParams()
        params.check_vocabulary(self.config.n_vocab)
        if timeout is not None and not timeout > 0:
            raise RequestError(f"timeout {timeout}: give a number of seconds above 0")
        prompt_ids = self.prompt_ids(prompt)
        matcher = await self._matcher(params)
        matchers = [matcher] + [matcher and matcher.fork() for _ in range(1, params.n)]
        # told apart, so that no tenant can name another's as its own
        salt = b"tenant " + tenant.encode() if cache_salt is None else b"salt " + cache_salt
        seed = params.seed if params.seed is not None else random.getrandbits(32)
        requests = [
            Request(
                f"r{next(self._names)}", prompt_ids, params, self.tokenizer.eog_ids,
                hash_u32(seed, 0xFFFFFFFF - i) if i else seed,
                priority=priority, tenant=tenant, salt=salt,
            )
            for i in range(params.n)
        ]  # fmt: skip
        answers = [
            Answer(
                request, self.tokenizer.stream(skip_special=True), StopMatcher(params.stop), sink,
                index=i, matcher=matcher,
            )
            for i, (request, matcher) in enumerate(zip(requests, matchers, strict=True))
        ]  # fmt: skip
        try:
            self.stepper.add(answers)
        except RealmError:
            for matcher in filter(None, matchers):
                matcher.close()
            raise
        if timeout is not None:
            for answer in answers:
                answer.deadline = asyncio.get_running_loop().call_later(timeout, self.stepper.expire, answer)
        return answers

    def stop(self, answers: Sequence[Answer]) -> None:
        """End these now; their sinks hear nothing more. Those that have ended already are left alone."""
        self.stepper.stop(answers)

    async def score(
        self, prompt: str | Sequence[int], *, first: int = 1, priority: int = 0, tenant: str = ""
    ) -> Scores:
        """How likely each token of a text, from `first` on, is to the model after those before it."""
        ids = self.prompt_ids(prompt)
        if first < 1:
            raise RequestError(f"first {first}: nothing predicts the token before 1")
        answer = await self._prompt_only(ids, "score", priority, tenant, first_scored=first)
        return Scores(ids, (*[None] * min(first, len(ids)), *answer.values[first - 1 : len(ids) - 1]))

    async def embed(
        self,
        prompt: str | Sequence[int],
        *,
        pooling: Literal["mean", "last", "cls"] | None = None,
        normalize: bool = True,
        priority: int = 0,
        tenant: str = "",
    ) -> list[float]:
        """The model's final hidden states of a text as one vector, (dim,), of length 1 with `normalize`.

        `pooling` is the mean over all tokens, the last or the first ("cls") of them; if not given, what the
        file says, or the mean.
        """
        if pooling is None:
            pooling = POOLINGS.get(self.gguf.metadata.get(f"{self.config.architecture}.pooling_type"), "mean")
        if pooling not in POOLS:
            raise RequestError(f"pooling {pooling!r}: use {', '.join(POOLS)}")
        answer = await self._prompt_only(self.prompt_ids(prompt), "embed", priority, tenant, pooling=pooling)
        length = math.sqrt(math.fsum(v * v for v in answer.values)) if normalize else 1.0
        return [v / length for v in answer.values] if length else answer.values

    async def close(self) -> None:
        """End every request and give the device's memory back."""
        await self.stepper.close()

    def prompt_ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        """The tokens of a prompt. RequestError for one that the model does not have."""
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        ids = tuple(prompt)
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.config.n_vocab:
                raise RequestError(
                    f"prompt token {token!r} is not one of this model's 0 to {self.config.n_vocab - 1}"
                )
        return ids

    async def _matcher(self, params: SamplingParams) -> Matcher | None:
        if not params.structured:
            return None
        async with self._opening_grammar:
            if self.stepper.grammars is None:
                self.stepper.grammars = await open_grammar(self.tokenizer, self.config.n_vocab)
        return await self.stepper.grammars.compile_aside(params.response_format)

    async def _prompt_only(
        self, ids: tuple[int, ...], task: str, priority: int, tenant: str, **how: Any
    ) -> Answer:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def sink(chunk: Chunk | BaseException) -> None:
            if done.done():
                return
            if isinstance(chunk, BaseException):
                done.set_exception(chunk)
            else:
                done.set_result(None)

        request = Request(
            f"r{next(self._names)}", ids, SamplingParams(), frozenset(), 0,
            task=task, priority=priority, tenant=tenant, **how,
        )  # fmt: skip
        answer = Answer(request, None, StopMatcher(()), sink, values=[0.0] * len(ids))
        self.stepper.add([answer])
        try:
            await done
        finally:
            self.stop([answer])
        return answer
