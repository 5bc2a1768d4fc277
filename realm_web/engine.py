"""Requests in, text out: one engine per model, many requests at once, several steps in flight.

The engine keeps a few steps in flight: whenever one arrives, it hands out the tokens and submits the next. It
knows tokens, text and time; what runs is the scheduler's decision, how it runs is the runner's.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from array import array
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from realm_web.chat import ChatTemplate
from realm_web.errors import DeviceError, FormatError, RealmError, RequestError
from realm_web.gguf import GGUFFile
from realm_web.loader import Loader, Source, read_header, read_vector
from realm_web.models import build, read_config
from realm_web.models.config import ModelConfig
from realm_web.models.rope import RopeTable, rope_table
from realm_web.ops import Pages
from realm_web.pacing import Pacing
from realm_web.runner import Bucket, Runner, room_error
from realm_web.runtime.adapters import open_device
from realm_web.runtime.device import Device
from realm_web.sampler import SamplingParams
from realm_web.scheduler import Batch, FinishReason, Request, Scheduler
from realm_web.tokenizer import StopMatcher, StreamDecoder, Tokenizer

DEFAULT_CONTEXT = 8192
MAX_SEQS = 8
MAX_ROWS = 512
MAX_DEPTH = 16


@dataclass(frozen=True)
class Progress:
    """One step of loading: bytes for "load", pipelines for "compile"."""

    stage: str
    done: int
    total: int
    label: str


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

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


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer. The last one has finish_reason, usage and timings."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(eq=False)
class _Answer:
    """What the engine keeps of a request: its text so far, and who waits for it."""

    request: Request
    decoder: StreamDecoder
    stops: StopMatcher
    queue: asyncio.Queue[Chunk | BaseException] = field(default_factory=asyncio.Queue)
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    n_tokens: int = 0

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is safe to show after one more token, and whether a stop string ended it."""
        self.n_tokens += 1
        if self.n_tokens == 1:
            self.first = time.perf_counter()
        return self.stops.push(self.decoder.push(token))

    def rest(self) -> str:
        """The text held back, when no more tokens come."""
        text, stopped = self.stops.push(self.decoder.finish())
        return text if stopped else text + self.stops.finish()

    def last_chunk(self, text: str, tokens: tuple[int, ...], reason: FinishReason) -> Chunk:
        now = time.perf_counter()
        n_prompt, first = len(self.request.prompt_ids), self.first or now
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
        return Chunk(text, tokens, reason, Usage(n_prompt, self.n_tokens), timings)


class Engine:
    """A model that answers any number of requests at once. Open it with `await Engine.open(...)`.

    >>> async def main():
    ...     engine = await Engine.open(model_path, device="cpu")
    ...     params = SamplingParams(temperature=0, max_tokens=5)
    ...     async for chunk in engine.generate("The capital of France is", params):
    ...         print(chunk.text, end="")
    ...     await engine.close()
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer, template: ChatTemplate, gguf: GGUFFile):
        self.runner, self.tokenizer, self.template, self.gguf = runner, tokenizer, template, gguf
        self.context = runner.pool.n_blocks * runner.pool.block_size
        self.scheduler = Scheduler(
            runner.pool,
            max_seqs=runner.layout.max_seqs,
            max_rows=runner.max_rows,
            max_context=self.context,
            # blocks can be shared where they are all that is kept of a sequence
            prefix_cache=all(isinstance(kept, Pages) and not kept.ring for kept in runner.memory),
        )
        # steps in flight; numpy runs a step when it is submitted, so there is nothing to overlap
        self.pacing = Pacing(1 if runner.device.kind == "cpu" else MAX_DEPTH)
        self._answers: dict[str, _Answer] = {}
        self._names = itertools.count()
        self._n_in_flight = 0
        self._compiling: asyncio.Future | None = None  # of the program that the next step needs
        self._closed = False

    @classmethod
    async def open(
        cls,
        source: str | Path | Source,
        *,
        device: str | Device = "auto",
        context: int | None = None,
        max_seqs: int = MAX_SEQS,
        max_rows: int = MAX_ROWS,
        kv_type: Literal["f16", "f32"] = "f16",
        cpu_dequant: bool | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Engine:
        """Load a GGUF model onto a device.

        `source` is a path, a URL, `hf:user/repo:Q4_K_M`, or a `Source`. `device` is "auto", "webgpu", "cpu"
        or an open `Device`, which the engine then owns. `context` is how many tokens all running requests may
        hold together (the model's, at most 8192, if not given), `max_seqs` how many of them run at a time,
        `max_rows` how many tokens one forward pass takes at most: longer prompts run in several.
        Raises RealmError: FormatError, UnsupportedError, DeviceError, RequestError.
        """
        if isinstance(source, str | Path):
            from realm_web.sources import open_source

            source = await open_source(source)
        try:
            gguf = await read_header(source)
            try:
                config = read_config(gguf)
                tokenizer = Tokenizer.from_metadata(gguf.metadata)
                template = ChatTemplate.from_metadata(gguf.metadata, tokenizer)
            except (FormatError, RequestError) as error:
                raise type(error)(f"{source.name}: {error}") from None
            if tokenizer.n_vocab > config.n_vocab:
                raise FormatError(
                    f"{source.name}: {tokenizer.n_vocab} tokens in the vocabulary, "
                    f"{config.n_vocab} rows of weights"
                )
            context = _check_context(context, config)
            if not 1 <= max_seqs <= 64 or not max_seqs <= max_rows <= MAX_ROWS:
                raise RequestError(
                    f"max_seqs {max_seqs}, max_rows {max_rows}: "
                    f"give 1 to 64 sequences and as many rows, up to {MAX_ROWS}"
                )
            opened = device if isinstance(device, Device) else await open_device(device)
            _choose_dense(opened, gguf, cpu_dequant)
            sizes = {"context": context, "max_seqs": max_seqs, "max_rows": max_rows, "kv_type": kv_type}
            return await cls._load(source, gguf, opened, config, tokenizer, template, sizes, on_progress)
        finally:
            source.close()

    @classmethod
    async def _load(
        cls, source: Source, gguf: GGUFFile, device: Device, config: ModelConfig, tokenizer: Tokenizer,
        template: ChatTemplate, sizes: dict[str, Any], on_progress: Callable[[Progress], None] | None,
    ) -> Engine:  # fmt: skip
        def report(stage: str, label: str) -> Callable[[int, int], None] | None:
            if on_progress is None:
                return None
            return lambda done, total: on_progress(Progress(stage, done, total, label))

        ropes = await _rope_tables(source, gguf, config, sizes["context"])
        try:
            try:
                model = build(gguf, device)
                runner = Runner(device, model, **sizes, ropes=ropes)
                loader = Loader(device, model, gguf, source)
            except DeviceError as error:
                weights = sum(info.nbytes for info in gguf.tensors.values())
                raise room_error(
                    error, weights + config.kv_bytes_per_token * sizes["context"], device
                ) from error
            await device.compile()
            await asyncio.gather(
                loader.load(report("load", Path(source.name).name)),
                runner.prepare(report("compile", device.name)),
            )
        except BaseException:
            device.close()
            raise
        return cls(runner, tokenizer, template, gguf)

    @property
    def device(self) -> Device:
        return self.runner.device

    @property
    def config(self) -> ModelConfig:
        return self.runner.config

    def chat_prompt(self, messages: Sequence[dict]) -> str:
        """The text of a conversation in the model's own template, ready for `generate`."""
        return self.template.render(list(messages), add_generation_prompt=True)

    def chat(self, messages: Sequence[dict], params: SamplingParams | None = None) -> AsyncIterator[Chunk]:
        """Answer a conversation: dicts with "role" and "content"."""
        return self.generate(self.chat_prompt(messages), params)

    async def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> AsyncIterator[Chunk]:
        """Continue a text (special tokens in it count as such) or a list of token ids, piece by piece.

        Leaving the iteration early ends the request. RequestError when the prompt does not fit the context or
        a parameter names a token that the model does not have.
        """
        params = params or SamplingParams()
        params.check_vocabulary(self.config.n_vocab)
        answer = self._add(self._prompt_ids(prompt), params)
        try:
            while True:
                chunk = await answer.queue.get()
                if isinstance(chunk, BaseException):
                    raise chunk
                yield chunk
                if chunk.finish_reason is not None:
                    return
        finally:
            if self._answers.pop(answer.request.id, None):
                self.scheduler.abort(answer.request.id)

    async def close(self) -> None:
        """End every request and give the device's memory back."""
        self._closed = True
        if self._compiling is not None:
            self._compiling.cancel()
            await asyncio.gather(self._compiling, return_exceptions=True)
        self._fail_all(RealmError("the engine was closed"))
        await self.device.synchronize()
        while self._n_in_flight:
            await asyncio.sleep(0)
        self.device.close()

    def _prompt_ids(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode(prompt))
        ids = tuple(prompt)
        for token in ids:
            if not isinstance(token, int) or not 0 <= token < self.config.n_vocab:
                raise RequestError(
                    f"prompt token {token!r} is not one of this model's 0 to {self.config.n_vocab - 1}"
                )
        return ids

    def _add(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> _Answer:
        seed = params.seed if params.seed is not None else random.getrandbits(32)
        request = Request(f"r{next(self._names)}", prompt_ids, params, self.tokenizer.eog_ids, seed)
        self.scheduler.add(request)
        answer = _Answer(request, self.tokenizer.stream(skip_special=True), StopMatcher(params.stop))
        if not self._n_in_flight:
            self.pacing.pause()
        self._answers[request.id] = answer
        self._fill()
        return answer

    def _fill(self) -> None:
        """Submit until `depth` steps are in flight or nothing more can run."""
        try:
            while not (self._closed or self._compiling) and self._n_in_flight < self.pacing.depth:
                batch = self.scheduler.schedule()
                if batch is None:
                    return
                requests = [self.scheduler.get(seq.request_id) for seq in batch.seqs]
                bucket = self.runner.bucket(batch, requests)
                if self.runner.has(bucket):
                    self._submit(batch, bucket, requests)
                else:
                    self._compiling = asyncio.ensure_future(self._compile_and_submit(batch, bucket, requests))
        except Exception as error:  # of the device, or a bug of ours: whoever waits must hear of it
            self._fail_all(error)

    def _submit(self, batch: Batch, bucket: Bucket, requests: list[Request]) -> None:
        readback = self.runner.run(batch, bucket, requests)
        self._n_in_flight += 1
        readback.then(lambda data: self._arrive(batch, data))

    async def _compile_and_submit(self, batch: Batch, bucket: Bucket, requests: list[Request]) -> None:
        """For the first batch of its kind. Requests that end meanwhile run all the same, and nobody looks."""
        try:
            await self.runner.compile(bucket)
            self._submit(batch, bucket, requests)
        except Exception as error:
            self._fail_all(error)
        finally:
            self._compiling = None
            self._fill()

    def _arrive(self, batch: Batch, data: bytes | BaseException) -> None:
        """A step is done: hand out its tokens and submit what can run now."""
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
            self._deliver(batch, array("I", data))
        except Exception as error:
            self._fail_all(error)
        self._fill()

    def _fail_all(self, error: Exception) -> None:
        for answer in self._answers.values():
            self.scheduler.abort(answer.request.id)
            answer.queue.put_nowait(error)
        self._answers.clear()
        self.scheduler.pool.clear_cache()  # steps that should have filled the blocks may not have run
        self.runner.forget()

    def _deliver(self, batch: Batch, ids: array) -> None:
        outputs = self.scheduler.update(batch, ids[: len(batch.seqs)])
        for output in outputs:
            answer = self._answers.get(output.request_id)
            if answer is None:
                continue
            token, reason, text = output.token_id, output.finish_reason, ""
            if token is not None and token >= self.config.n_vocab:
                self._fail(
                    answer, RealmError("the model computed no number for any token (NaN): a broken file?")
                )
                continue
            if token is not None:
                text, stopped = answer.push(token)
                if stopped:
                    self.scheduler.finish(output.request_id, "stop")
                    reason = "stop"
                elif reason is not None:
                    text += answer.rest()
            if reason is None:
                answer.queue.put_nowait(Chunk(text, (token,)))
            else:
                del self._answers[output.request_id]
                answer.queue.put_nowait(answer.last_chunk(text, (token,), reason))

    def _fail(self, answer: _Answer, error: RealmError) -> None:
        self.scheduler.abort(answer.request.id)
        del self._answers[answer.request.id]
        answer.queue.put_nowait(error)


async def _rope_tables(source: Source, gguf: GGUFFile, config: ModelConfig, context: int) -> list[RopeTable]:
    """One table for each of config.ropes, and last the empty one of layers that do not rotate."""
    original = config.ropes[0].scaling.original_context
    length = "long" if context > original else "short"
    names = [name for name in ("rope_freqs.weight", f"rope_factors_{length}.weight") if name in gguf.tensors]
    divisors: list[float] = []
    for name in names:
        info = gguf.tensor(name, (config.rope_dim // 2,))
        divisors = list(await read_vector(source, info))
        if not all(0 < d < float("inf") for d in divisors):
            raise FormatError(f"{source.name}: {name} holds values that are no positive numbers")
    tables = [
        rope_table(rope.base, config.rope_dim, rope.scaling, () if i else divisors)
        for i, rope in enumerate(config.ropes)
    ]
    return [*tables, RopeTable((), 1.0)]


def _choose_dense(device: Device, gguf: GGUFFile, wanted: bool | None) -> None:
    """Drop "dense" from a CPU device where float32 weights are not wanted, or would not fit well."""
    if wanted is None:
        wanted = 4 * sum(info.n_elements for info in gguf.tensors.values()) <= device.limits.memory // 2
    if not wanted:
        device.features -= {"dense"}


def _check_context(context: int | None, config: ModelConfig) -> int:
    if context is None:
        return min(config.context_length, DEFAULT_CONTEXT)
    if not 2 <= context <= config.context_length:
        raise RequestError(f"context {context}: this model takes 2 to {config.context_length} tokens")
    return context
