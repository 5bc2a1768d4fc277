"""The steps of an engine: submit, hand out what arrives, submit again; and what happens when a device fails.

A few steps are kept in flight: whenever one arrives its tokens are handed out and the next is submitted, at
once or when it is the host's turn (`turns.py`). What runs is the scheduler's decision, how it runs is the
runner's. Knows answers and time; knows neither prompts as text nor where a model comes from.

A request with a grammar needs the mask of its next token, which only the token before tells. So the forward
pass is submitted at once, and the draw by a second program as soon as the mask is there: the host computes it
while the device computes the logits.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from realm_web.answers import Answer, Chunk
from realm_web.errors import DeviceLost, OutOfDeviceMemory, RealmError, RequestError
from realm_web.grammar import GrammarEngine
from realm_web.kvcache import BLOCK_SIZE, BlockPool
from realm_web.opening import Model, Sizes, place
from realm_web.ops.sampling import LOGPROB_WORDS
from realm_web.pacing import Pacing
from realm_web.runner import FEATURES, Bucket, Runner, features
from realm_web.runtime.adapters import open_device
from realm_web.runtime.device import Readback
from realm_web.scheduler import Batch, Output, Request, Scheduler
from realm_web.tuning import Store
from realm_web.turns import Events, Turns

MAX_DEPTH = 16
# At most, and to begin with: numpy runs a step when it is submitted, so there is nothing to overlap; in a
# page a result comes back some 4 ms late from a busy GPU, so that two steps would wait for it.
STEPS_IN_FLIGHT = {"cpu": (1, 1), "browser": (MAX_DEPTH, 8)}
BLOCKING = ("webgpu", "dawn")  # kinds of device that keep the thread while a result is waited for
CLOSED = "the engine was closed"
MOST_RECOVERIES = 3  # of a lost device without one token in between


@dataclass(eq=False, slots=True)
class _Held:
    """A batch whose forward pass is submitted and whose draw waits for masks."""

    batch: Batch
    bucket: Bucket
    requests: list[Request]


class Stepper:
    """Runs answers on a runner until each has ended."""

    def __init__(
        self,
        model: Model,
        runner: Runner,
        sizes: Sizes,
        tenant_weights: Mapping[str, float],
        store: Store | None,
    ):
        self.model, self.runner, self.sizes, self._store = model, runner, sizes, store
        self.scheduler = Scheduler(
            BlockPool(runner.n_blocks, BLOCK_SIZE), max_seqs=runner.max_seqs, max_rows=runner.max_rows,
            max_context=runner.context, prefix_cache=runner.prefix_cache, tenant_weights=tenant_weights,
        )  # fmt: skip
        self.pacing = Pacing(*STEPS_IN_FLIGHT.get(runner.device.kind, (MAX_DEPTH, 2)))
        self.turns = Turns(self._fill) if runner.device.kind in BLOCKING else Events()
        self.grammars: GrammarEngine | None = None  # from the first answer with a grammar on
        self.answers: dict[str, Answer] = {}  # that have not ended, by request
        self._n_in_flight = 0
        self._busy: asyncio.Future | None = None  # compiling a program, or getting the device back
        self._held: _Held | None = None
        self._asked: set[str] = set()  # features whose memory is there
        self._draining = False  # until nothing is in flight: a batch could not run
        self._n_lost = 0  # devices, since the last token
        self._epoch = 0  # counts what made the steps in flight worthless
        self._closed = False

    def add(self, answers: Sequence[Answer]) -> None:
        """Queue answers that are written from now on. RequestError if the scheduler refuses one."""
        if self._closed:
            raise RealmError(CLOSED)
        for answer in answers:
            self.scheduler.add(answer.request)
            self.answers[answer.request.id] = answer
        if not self._n_in_flight:
            self.pacing.pause()
        self._fill()

    def stop(self, answers: Sequence[Answer]) -> None:
        """End these now; their sinks hear nothing more. Those that have ended already are left alone."""
        for answer in answers:
            if self._forget(answer):
                self.scheduler.abort(answer.request.id)
        self._fill()

    def expire(self, answer: Answer) -> None:
        if self._forget(answer):
            self.scheduler.finish(answer.request.id, "timeout")
            answer.sink(answer.last_chunk(answer.rest(), (), "timeout"))
        self._fill()

    async def close(self) -> None:
        """End every request and give the device's memory back."""
        self._closed = True
        if self._busy is not None:
            self._busy.cancel()
            await asyncio.gather(self._busy, return_exceptions=True)
        self._fail_all(RealmError(CLOSED))
        await self.runner.device.synchronize()
        while self._n_in_flight:
            await asyncio.sleep(0)
        self.runner.device.close()

    def _fill(self) -> None:
        """Submit until enough steps are in flight or nothing more can run."""
        try:
            while self.turns.may_submit(self._n_in_flight, self.pacing.depth):
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

        def heard(data: bytes | BaseException) -> None:
            self._arrive(epoch, batch, bucket, data)

        self.turns.expect(readback, bucket, heard)

    def _draw_held(self) -> bool:
        """Draw the held batch's tokens, if every mask can be told by now."""
        held = self._held
        wanted: dict[int, Answer] = {}  # by slot
        for seq, request in zip(held.batch.seqs, held.requests, strict=True):
            answer = self.answers.get(request.id)
            if answer is None or answer.matcher is None or not seq.samples or request.status == "finished":
                continue
            if request.n_pending > 1:  # tokens before the one to draw that are not known yet
                return False
            wanted[seq.slot] = answer
        self._held = None
        self._expect(self.runner.draw(held.bucket, self._masks(wanted)), held.batch, held.bucket)
        return True

    def _masks(self, wanted: Mapping[int, Answer]) -> dict[int, bytes]:
        """The mask of each slot, computed together; one that cannot be told ends only its own answer."""
        size = 4 * -(-self.runner.config.n_vocab // 32)
        rows = bytearray(size * len(wanted))
        try:
            self.grammars.fill([(answer.matcher, i) for i, answer in enumerate(wanted.values())], rows)
        except RequestError:  # which of them it is shows when they are asked one by one
            masks = {}
            for slot, answer in wanted.items():
                try:
                    masks[slot] = self._mask(answer, answer.matcher.mask())
                except RequestError as error:
                    self._fail(answer, error)
            return masks
        view = memoryview(rows)
        return {
            slot: self._mask(answer, bytes(view[size * i : size * (i + 1)]))
            for i, (slot, answer) in enumerate(wanted.items())
        }

    def _mask(self, answer: Answer, mask: bytes) -> bytes:
        """What the grammar allows next; before min_tokens none that ends, if others are left."""
        request = answer.request
        if len(request.token_ids) - len(request.prompt_ids) < request.params.min_tokens:
            left = _without(mask, request.stop_ids)
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
        except Exception as error:
            if epoch != self._epoch:  # the loss of the device is known already, and being mended
                return
            if isinstance(error, OutOfDeviceMemory):
                self._blame(error, requests)
            else:
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
        outputs = self.scheduler.update(batch, array("I", data[: 4 * len(batch.seqs)]))
        complete = self._tell_grammars(outputs)
        if self._held is not None:  # the device may be idle until it has these masks; texts can wait
            self._fill()
        for output in outputs:
            answer = self.answers.get(output.request_id)
            if answer is None:
                continue
            token, reason = output.token_id, output.finish_reason
            if token is None:  # a prompt was scored or embedded
                self._forget(answer)
                answer.sink(answer.last_chunk("", (), reason))
                continue
            if token >= self.runner.config.n_vocab:
                self._fail(answer, _no_token(answer))
                continue
            self._n_lost = 0
            chosen = answer.logprobs(token, *logprobs[output.request_id]) if answer.wants_logprobs else None
            text, stopped = answer.push(token)
            if reason is None and (stopped or output.request_id in complete):
                self.scheduler.finish(output.request_id, "stop")
                reason = "stop"
            if reason is None:
                answer.sink(Chunk(text, (token,), index=answer.index, logprobs=chosen))
            else:
                text = text if stopped else text + answer.rest()
                last = answer.last_chunk(text, (token,), reason, chosen)
                self._forget(answer)
                answer.sink(last)

    def _tell_grammars(self, outputs: Sequence[Output]) -> set[str]:
        """Of the tokens; the requests that these complete have ended."""
        complete = set()
        for output in outputs:
            answer = self.answers.get(output.request_id)
            if answer is None or output.finish_reason is not None or not answer.completes(output.token_id):
                continue
            complete.add(output.request_id)
            self.scheduler.finish(output.request_id, "stop")
        return complete

    def _keep_values(self, batch: Batch, data: bytes) -> None:
        """Scores by position, and what a pooled sequence has come to."""
        results, dim = self.runner.results, self.runner.config.dim
        for i, seq in enumerate(batch.seqs):
            answer = self.answers.get(seq.request_id)
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
                sizes = replace(self.sizes, kv_tokens=self.runner.n_blocks * BLOCK_SIZE)
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
        answer = self.answers.get(max(asked, key=lambda r: r.arrival).id) if asked else None
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
        self.turns.forget()
        self.scheduler.reset()
        self.runner.forget()
        self.pacing.pause()

    def _fail_all(self, error: Exception) -> None:
        for answer in list(self.answers.values()):
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
        if self.answers.pop(answer.request.id, None) is None:
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
