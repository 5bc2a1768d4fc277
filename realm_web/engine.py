"""Requests in, text out: one engine per model, many requests at once, several steps in flight.

The engine keeps a few steps in flight: whenever one arrives, it hands out the tokens and submits the next. It
knows tokens, text and time; what runs is the scheduler's decision, how it runs is the runner's.

A request with a grammar needs the mask of its next token, which only the token before tells. So the forward
pass is submitted at once, and the draw by a second program as soon as the mask is there: the host computes it
while the device computes the logits.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from realm_web.answers import Answer, Chunk, Scores
from realm_web.errors import DeviceLost, OutOfDeviceMemory, RealmError, RequestError
from realm_web.gguf import GGUFFile
from realm_web.grammar import GrammarEngine, Matcher, open_grammar
from realm_web.kvcache import BLOCK_SIZE, BlockPool
from realm_web.loader import Source
from realm_web.models.config import ModelConfig
from realm_web.opening import MAX_ROWS, MAX_SEQS, Model, OnProgress, Sizes, check_sizes, place, read_model
from realm_web.ops.sampling import LOGPROB_WORDS
from realm_web.pacing import Pacing
from realm_web.runner import FEATURES, POOLS, Bucket, Runner, features
from realm_web.runtime.adapters import open_device
from realm_web.runtime.device import Device, Readback
from realm_web.sampler import SamplingParams, hash_u32
from realm_web.scheduler import Batch, Request, Scheduler
from realm_web.tokenizer import StopMatcher, Tokenizer
from realm_web.tuning import Store, user_store

MAX_DEPTH = 16
# At most, and to begin with: numpy runs a step when it is submitted, so there is nothing to overlap; in a
# page a result comes back some 4 ms late from a busy GPU, so that two steps would wait for it.
STEPS_IN_FLIGHT = {"cpu": (1, 1), "browser": (MAX_DEPTH, 8)}
MOST_RECOVERIES = 3  # of a lost device without one token in between
Sink = Callable[[Chunk | BaseException], None]


POOLINGS = {1: "mean", 2: "cls", 3: "last"}  # llama.cpp's pooling_type


@dataclass(eq=False, slots=True)
class _Held:
    """A batch whose forward pass is submitted and whose draw waits for masks."""

    batch: Batch
    bucket: Bucket
    requests: list[Request]


class Engine:
    """A model that answers any number of requests at once. Open it with `await Engine.open(...)`.

    >>> async def main():
    ...     engine = await Engine.open(model_path, device="cpu")
    ...     params = SamplingParams(temperature=0, max_tokens=5)
    ...     async for chunk in engine.generate("The capital of France is", params):
    ...         print(chunk.text, end="")
    ...     await engine.close()
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        sizes: Sizes,
        tenant_weights: Mapping[str, float] | None = None,
        store: Store | None = None,
    ):
        self.model, self.runner, self.sizes, self._store = model, runner, sizes, store
        self.scheduler = Scheduler(
            BlockPool(runner.n_blocks, BLOCK_SIZE), max_seqs=runner.max_seqs, max_rows=runner.max_rows,
            max_context=runner.context, prefix_cache=runner.prefix_cache, tenant_weights=tenant_weights or {},
        )  # fmt: skip
        self.pacing = Pacing(*STEPS_IN_FLIGHT.get(runner.device.kind, (MAX_DEPTH, 2)))
        self._answers: dict[str, Answer] = {}
        self._names = itertools.count()
        self._n_in_flight = 0
        self._busy: asyncio.Future | None = None  # compiling a program, or getting the device back
        self._held: _Held | None = None
        self._asked: set[str] = set()  # features whose memory is there
        self._draining = False  # until nothing is in flight: a batch could not run
        self._n_lost = 0  # devices, since the last token
        self._epoch = 0  # counts what made the steps in flight worthless
        self._grammars: GrammarEngine | None = None
        self._closed = False

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
        return cls(model, runner, sizes, tenant_weights, store)

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
        matchers = [await self._matcher(params) for _ in range(params.n)]
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
                request, self.tokenizer.stream(skip_special=True), StopMatcher(params.stop), sink, i, matcher,
                params.top_logprobs if params.logprobs else None,
            )
            for i, (request, matcher) in enumerate(zip(requests, matchers, strict=True))
        ]  # fmt: skip
        self._add(answers)
        if timeout is not None:
            for answer in answers:
                answer.deadline = asyncio.get_running_loop().call_later(timeout, self._expire, answer)
        return answers

    def stop(self, answers: Sequence[Answer]) -> None:
        """End these now; their sinks hear nothing more. Those that have ended already are left alone."""
        for answer in answers:
            if self._forget(answer):
                self.scheduler.abort(answer.request.id)
        self._fill()

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
        self._closed = True
        if self._busy is not None:
            self._busy.cancel()
            await asyncio.gather(self._busy, return_exceptions=True)
        self._fail_all(RealmError("the engine was closed"))
        await self.device.synchronize()
        while self._n_in_flight:
            await asyncio.sleep(0)
        self.device.close()

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

    # ---- requests

    async def _matcher(self, params: SamplingParams) -> Matcher | None:
        if not params.structured:
            return None
        if self._grammars is None:
            self._grammars = await open_grammar(self.tokenizer, self.config.n_vocab)
        return self._grammars.compile(params.response_format)

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
        self._add([answer])
        try:
            await done
        finally:
            self.stop([answer])
        return answer

    def _add(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            self.scheduler.add(answer.request)
            self._answers[answer.request.id] = answer
        if not self._n_in_flight:
            self.pacing.pause()
        self._fill()

    def _expire(self, answer: Answer) -> None:
        if self._forget(answer):
            self.scheduler.finish(answer.request.id, "timeout")
            answer.sink(answer.last_chunk(answer.rest(), (), "timeout"))
        self._fill()

    # ---- steps

    def _fill(self) -> None:
        """Submit until `depth` steps are in flight or nothing more can run."""
        try:
            while self._n_in_flight < self.pacing.depth:
                if self._closed or self._busy or self._draining:
                    return
                if self._held is not None and not self._draw_held():
                    return
                batch = self.scheduler.schedule()
                if batch is None:
                    return
                requests = [self.scheduler.get(seq.request_id) for seq in batch.seqs]
                bucket = self.runner.bucket(batch, requests)
                if self.runner.has(bucket):
                    self._submit(batch, bucket, requests)
                else:
                    self._busy = asyncio.ensure_future(self._compile_and_submit(batch, bucket, requests))
        except Exception as error:  # of the device, or a bug of ours: whoever waits must hear of it
            self._failed(error)

    def _submit(self, batch: Batch, bucket: Bucket, requests: list[Request]) -> None:
        readback = self.runner.run(batch, bucket, requests)
        if readback is None:
            self._held = _Held(batch, bucket, requests)
        else:
            self._expect(readback, batch, bucket)

    def _expect(self, readback: Readback, batch: Batch, bucket: Bucket) -> None:
        self._n_in_flight += 1
        epoch = self._epoch
        readback.then(lambda data: self._arrive(epoch, batch, bucket, data))

    def _draw_held(self) -> bool:
        """Draw the held batch's tokens, if every mask can be told by now."""
        held = self._held
        wanted: dict[int, Answer] = {}  # by slot
        for seq, request in zip(held.batch.seqs, held.requests, strict=True):
            answer = self._answers.get(request.id)
            if answer is None or answer.matcher is None or not seq.samples:
                continue
            if request.n_pending > 1:  # tokens before the one to draw that are not known yet
                return False
            wanted[seq.slot] = answer
        self._held = None
        self._expect(self.runner.draw(held.bucket, self._masks(wanted)), held.batch, held.bucket)
        return True

    def _masks(self, wanted: Mapping[int, Answer]) -> dict[int, bytes]:
        """The mask of each slot, computed together; one that cannot be told ends only its own answer."""
        size = 4 * -(-self.config.n_vocab // 32)
        rows = bytearray(size * len(wanted))
        try:
            self._grammars.fill([(answer.matcher, i) for i, answer in enumerate(wanted.values())], rows)
        except RequestError:  # which of them it is shows when they are asked one by one
            masks = {}
            for slot, answer in wanted.items():
                try:
                    masks[slot] = self._mask(answer, answer.matcher.mask())
                except RequestError as error:
                    self._fail(answer, error)
            return masks
        return {
            slot: self._mask(answer, bytes(rows[size * i : size * (i + 1)]))
            for i, (slot, answer) in enumerate(wanted.items())
        }

    def _mask(self, answer: Answer, mask: bytes) -> bytes:
        """What the grammar allows next; before min_tokens none that ends, if others are left."""
        if answer.n_tokens < answer.request.params.min_tokens:
            left = _without(mask, answer.request.stop_ids)
            return left if any(left) else mask
        return mask

    async def _compile_and_submit(self, batch: Batch, bucket: Bucket, requests: list[Request]) -> None:
        """For the first batch of its kind. Requests that end meanwhile run all the same, and nobody looks."""
        epoch = self._epoch
        try:
            await self.runner.compile(bucket)
            if epoch != self._epoch:  # the device was lost meanwhile
                return
            self._asked |= {name for name in FEATURES if getattr(bucket, name)}
            self._submit(batch, bucket, requests)
        except OutOfDeviceMemory as error:
            self._blame(error, requests)
        except Exception as error:
            self._failed(error)
        finally:
            if self._busy is asyncio.current_task():
                self._busy = None
            self._fill()

    def _arrive(self, epoch: int, batch: Batch, bucket: Bucket, data: bytes | BaseException) -> None:
        """A step is done: hand out its tokens and submit what can run now."""
        if epoch != self._epoch:  # of a device that was lost
            return
        self._n_in_flight -= 1
        if self._closed:
            return
        try:
            if isinstance(data, BaseException):
                raise data
            if batch.is_decode and self.pacing.depth > 1:
                self.pacing.arrive(time.perf_counter())
            else:
                self.pacing.pause()
            self._deliver(batch, bucket, data)
        except Exception as error:
            self._failed(error)
        self._drained()
        self._fill()

    def _deliver(self, batch: Batch, bucket: Bucket, data: bytes) -> None:
        if bucket.score or bucket.pool:
            self._keep_values(batch, data)
        logprobs = {}
        if bucket.logprobs:
            logprobs = {seq.request_id: self._logprob_words(i, data) for i, seq in enumerate(batch.seqs)}
        for output in self.scheduler.update(batch, array("I", data[: 4 * len(batch.seqs)])):
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            token, reason = output.token_id, output.finish_reason
            if token is None:  # a prompt was scored or embedded
                self._forget(answer)
                answer.sink(answer.last_chunk("", (), reason))
                continue
            if token >= self.config.n_vocab:
                self._fail(answer, _no_token(answer))
                continue
            self._n_lost = 0
            chosen = answer.logprobs(token, *logprobs[output.request_id]) if answer.wants_logprobs else None
            text, stopped = answer.push(token)
            if reason is None and (stopped or answer.completes(token)):
                self.scheduler.finish(output.request_id, "stop")
                reason = "stop"
            if reason is None:
                answer.sink(Chunk(text, (token,), index=answer.index, logprobs=chosen))
            else:
                self._forget(answer)
                text = text if stopped else text + answer.rest()
                answer.sink(answer.last_chunk(text, (token,), reason, chosen))

    def _keep_values(self, batch: Batch, data: bytes) -> None:
        """Scores by position, and what a pooled sequence has come to."""
        results, dim = self.runner.results, self.config.dim
        for i, seq in enumerate(batch.seqs):
            answer = self._answers.get(seq.request_id)
            if answer is None or seq.task == "generate":
                continue
            if seq.task == "score":
                start = results.scores + 4 * seq.row_start
                scores = array("f", data[start : start + 4 * seq.n_rows])
                answer.values[seq.kv_len - seq.n_rows : seq.kv_len] = scores
            else:
                start = results.pooled + 4 * dim * i
                answer.values = array("f", data[start : start + 4 * dim])

    def _logprob_words(self, i: int, data: bytes) -> tuple[float, array, array]:
        """Of the i-th sequence: the drawn token's log-probability, the likeliest ids, and theirs."""
        start = self.runner.results.logprobs + 4 * LOGPROB_WORDS * i
        words = data[start : start + 4 * LOGPROB_WORDS]
        half = 2 * (LOGPROB_WORDS + 1)
        return array("f", words[:4])[0], array("I", words[4:half]), array("f", words[half:])

    # ---- failures

    def _failed(self, error: Exception) -> None:
        if isinstance(error, DeviceLost) and self.model.reopen and self._n_lost < MOST_RECOVERIES:
            self._n_lost += 1
            self._forget_steps()
            self._busy = asyncio.ensure_future(self._recover(error))
        else:
            self._fail_all(error)

    async def _recover(self, lost: DeviceLost) -> None:
        """Open the device again, load the weights again, and run all requests on from their tokens."""
        old = self.runner
        try:
            old.device.close()
            device = await open_device("auto" if old.device.kind == "browser" else old.device.kind)
            source = await self.model.reopen()
            try:
                sizes = replace(self.sizes, kv_tokens=self.kv_tokens)
                self.runner = await place(self.model, source, device, sizes, store=self._store)
            finally:
                source.close()
            self._asked.clear()
        except Exception as problem:
            self._fail_all(DeviceLost(f"{lost}; it could not be opened again: {problem}"))
        finally:
            self._busy = None
            self._fill()

    def _blame(self, error: OutOfDeviceMemory, requests: Sequence[Request]) -> None:
        """End the request that asked for too much memory; the others run again from their tokens."""
        asked = [r for r in requests if r.status != "finished" and features(r) - self._asked]
        asked = asked or [r for r in requests if r.status != "finished"]
        answer = self._answers.get(max(asked, key=lambda r: r.arrival).id) if asked else None
        if answer:
            self._fail(answer, error)
        self._draining = True
        self._drained()

    def _drained(self) -> None:
        """What was scheduled and never ran is forgotten, once nothing is in flight any more."""
        if self._draining and not self._n_in_flight:
            self._forget_steps()

    def _forget_steps(self) -> None:
        """Every running request runs again from its tokens; what is still in flight, nobody looks at."""
        self._epoch += 1
        self._n_in_flight = 0
        self._held = None
        self._draining = False
        self.scheduler.reset()
        self.runner.forget()
        self.pacing.pause()

    def _fail_all(self, error: Exception) -> None:
        for answer in list(self._answers.values()):
            self._fail(answer, error)
        self._held = None
        self.runner.forget()
        self.scheduler.pool.clear_cache()  # steps that should have filled the blocks may not have run

    def _fail(self, answer: Answer, error: Exception) -> None:
        self.scheduler.abort(answer.request.id)
        self._forget(answer)
        answer.sink(error)

    def _forget(self, answer: Answer) -> bool:
        """Nobody is to hear of this answer again; False if that was so already."""
        if self._answers.pop(answer.request.id, None) is None:
            return False
        if answer.matcher is not None:
            answer.matcher.close()
        if answer.deadline is not None:
            answer.deadline.cancel()
        return True


def _no_token(answer: Answer) -> RealmError:
    if answer.matcher is not None:
        return RequestError("the grammar of response_format allows none of this model's tokens to follow")
    return RealmError("the model computed no number for any token (NaN): a broken file?")


def _without(mask: bytes, ids: frozenset[int]) -> bytes:
    """The mask without these tokens."""
    left = bytearray(mask)
    for token in ids:
        left[token // 8] &= ~(1 << token % 8)
    return bytes(left)
