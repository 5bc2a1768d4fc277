"""Which rows run in the next forward pass: continuous batching without phases.

There is no "prefill" and no "decode": every request has `n_scheduled`, the tokens whose forward pass was
submitted, and it catches up with the tokens there are (the rule of vLLM's v1 scheduler). A prompt is caught
up in chunks, an answer one token at a time, both in the same batch.

`schedule` may be called again before `update` has brought the tokens of earlier steps: a token that is
sampled but not read back yet is `FROM_SLOT`, and the device, which runs the steps in order, knows it. What
those steps sample after a request has ended is dropped. Blocks and slot of an ended request are given to
others at once, for the same reason: the device writes in the order of submission.

This module is pure: it knows no device, no clock, no text and no event loop. The same calls give the same
batches.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .errors import RequestError
from .kvcache import BlockPool
from .sampler import SamplingParams

FROM_SLOT = 0xFFFFFFFF  # in place of a token id: the token that this slot sampled last
FinishReason = Literal["stop", "length", "abort"]


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what became of it. The first five fields are given, the scheduler keeps the others."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eog_ids: frozenset[int]  # the model's end-of-generation tokens, unless params.ignore_eos
    seed: int  # u32; the draw of every token is a function of it and of the token's position

    token_ids: list[int] = field(init=False)  # prompt and answer, as far as read back
    stop_ids: frozenset[int] = field(init=False)
    status: Literal["new", "waiting", "running", "finished"] = field(init=False, default="new")
    finish_reason: FinishReason | None = field(init=False, default=None)
    arrival: int = field(init=False, default=-1)
    limit: int = field(init=False, default=0)  # tokens of prompt and answer at which it ends
    slot: int | None = field(init=False, default=None)
    blocks: tuple[int, ...] = field(init=False, default=())
    n_scheduled: int = field(init=False, default=0)  # tokens whose forward pass was submitted
    n_pending: int = field(init=False, default=0)  # tokens sampled, or about to be, and not read back
    n_in_flight: int = field(init=False, default=0)  # steps with rows of this request and no update yet
    n_preemptions: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.prompt_ids = tuple(self.prompt_ids)
        self.token_ids = list(self.prompt_ids)
        self.stop_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self.stop_ids |= self.eog_ids

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[len(self.prompt_ids) :]

    @property
    def n_to_run(self) -> int:
        """Rows that are ready: tokens known or pending, less those submitted. The last token never runs."""
        n_tokens = len(self.token_ids) + self.n_pending
        return n_tokens - self.n_scheduled if n_tokens < self.limit else 0

    def ending(self) -> FinishReason | None:
        """Whether the newest token is the last one."""
        if self.token_ids[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None


@dataclass(frozen=True, slots=True)
class Row:
    """One token in one forward pass."""

    token: int  # or FROM_SLOT
    position: int
    seq: int  # index in Batch.seqs


@dataclass(frozen=True, slots=True)
class SeqSlice:
    """The rows of one request in a batch: row_start up to row_start + n_rows, at consecutive positions."""

    request_id: str
    slot: int
    row_start: int
    n_rows: int
    kv_len: int  # tokens in the KV cache after this step
    samples: bool  # the last row gets logits, and a token is drawn into the slot
    blocks: tuple[int, ...]  # the block table: position p is in blocks[p // block_size]
    draw_position: int  # index in the sequence of the token that is drawn, if one is
    first: bool  # the request enters this slot with this step: what the slot held before is void


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. tokens, positions and row_seq have one entry for each row."""

    step: int
    seqs: tuple[SeqSlice, ...]
    tokens: list[int]  # FROM_SLOT where the device alone knows
    positions: list[int]
    row_seq: list[int]  # index in seqs

    @property
    def n_rows(self) -> int:
        return len(self.tokens)

    @property
    def is_decode(self) -> bool:
        """Every request has one row."""
        return len(self.tokens) == len(self.seqs)

    @property
    def rows(self) -> Iterator[Row]:
        return map(Row, self.tokens, self.positions, self.row_seq)


@dataclass(frozen=True, slots=True)
class Output:
    """News of a request: a token, its end, or both (a token that ends it is part of its tokens)."""

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None


class Scheduler:
    """Requests in, batches out, sampled tokens in, outputs out.

    At most `max_seqs` requests run at a time, in slots 0 to max_seqs-1; a batch has at most `max_rows` rows;
    prompt and answer together have at most `max_context` tokens. First come, first served: requests are
    admitted in the order of arrival, and when blocks run out the youngest gives way.

    A loop around it, with `depth` steps in flight::

        while scheduler.has_work:
            while len(in_flight) < depth and (batch := scheduler.schedule()):
                in_flight.append((batch, submit(batch)))
            batch, sampled = in_flight.popleft()
            for output in scheduler.update(batch, await sampled): ...
    """

    def __init__(self, pool: BlockPool, *, max_seqs: int, max_rows: int, max_context: int):
        if max_seqs < 1 or max_rows < 1 or max_context < 2:
            raise ValueError(
                f"max_seqs {max_seqs}, max_rows {max_rows}, max_context {max_context}: "
                "must be at least 1, 1 and 2"
            )
        if pool.blocks_for(max_context) > pool.n_blocks:
            raise ValueError(
                f"a context of {max_context} tokens needs {pool.blocks_for(max_context)} blocks and the pool "
                f"has {pool.n_blocks}: a request alone could run out of them"
            )
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_rows = max_rows
        self.max_context = max_context
        self._requests: dict[str, Request] = {}  # all that are not finished
        self._waiting: deque[Request] = deque()  # both in the order of arrival, and
        self._running: list[Request] = []  # everything running came before everything waiting
        self._free_slots = list(range(max_seqs))  # a heap: the lowest is taken first
        self._in_flight: deque[tuple[int, list[Request]]] = deque()
        self._n_arrived = 0
        self._n_steps = 0

    @property
    def has_work(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._requests)

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def get(self, request_id: str) -> Request | None:
        """The request of this id, if it is not finished."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a new request. RequestError if its prompt is empty or leaves no room in the context."""
        n_prompt = len(request.prompt_ids)
        if n_prompt == 0:
            raise RequestError("the prompt has no tokens: give at least one")
        if n_prompt >= self.max_context:
            raise RequestError(
                f"the prompt has {n_prompt} tokens and the context {self.max_context}, of which at least one "
                f"is for the answer: shorten the prompt to {self.max_context - 1} tokens or open the model "
                "with a larger context"
            )
        if request.id in self._requests:
            raise RequestError(f"a request with the id {request.id!r} is not finished yet: use another id")
        if request.status != "new":
            raise ValueError(f"request {request.id!r} was added before: make a new one")
        max_tokens = request.params.max_tokens
        request.limit = (
            self.max_context if max_tokens is None else min(self.max_context, n_prompt + max_tokens)
        )
        request.arrival = self._n_arrived
        request.status = "waiting"
        self._n_arrived += 1
        self._requests[request.id] = request
        self._waiting.append(request)

    def finish(self, request_id: str, reason: FinishReason) -> Output | None:
        """End a request now; tokens of it that are still in flight will be dropped. None if it has ended."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, reason)
        return Output(request_id, None, reason)

    def abort(self, request_id: str) -> Output | None:
        """End a request that nobody wants any more; never an error, as it may just have ended by itself."""
        return self.finish(request_id, "abort")

    def schedule(self) -> Batch | None:
        """The next forward pass, or None when nothing can run before an `update` (or an `add`).

        One token each for the answers, then chunks of the prompts in the order of arrival, then new requests,
        as far as max_rows, slots and blocks go. The caller submits it to the device before the next one, and
        brings the sampled tokens to `update`.
        """
        draft = _Draft(self.max_rows)
        # Requests are admitted into rows that all others left over, so one row for each running one fits.
        behind: list[Request] = []  # with more than one token to run
        held: Request | None = None  # gives way as soon as its steps in flight are done
        # Preemption takes requests from the end of `running` only, so that this iteration stays valid.
        for request in self._running:
            n = request.n_to_run
            if n == 0 or request is held:
                continue
            if n > 1:
                behind.append(request)
            elif self._has_block_for_next(request):
                draft.add(request, 1)
            elif self._running:
                held = self._running[-1]
        for request in behind:
            if draft.room:
                draft.add(request, min(request.n_to_run, draft.room))
        while draft.room and self._admit_next():
            request = self._running[-1]
            draft.add(request, min(request.n_to_run, draft.room))
        if not draft.seqs:
            return None
        batch = Batch(self._n_steps, tuple(draft.seqs), draft.tokens, draft.positions, draft.row_seq)
        self._n_steps += 1
        self._in_flight.append((batch.step, draft.requests))
        return batch

    def update(self, batch: Batch, sampled_ids: Sequence[int]) -> list[Output]:
        """Bring the tokens that a batch sampled, one for each of batch.seqs (ignored where it samples none).

        Batches come back in the order in which they were scheduled; only those in which every request has
        ended may be left out. Raises ValueError otherwise.
        """
        if len(sampled_ids) != len(batch.seqs):
            raise ValueError(f"{len(sampled_ids)} sampled tokens for {len(batch.seqs)} sequences")
        outputs = []
        for request, seq, token_id in zip(self._take(batch), batch.seqs, sampled_ids, strict=True):
            request.n_in_flight -= 1
            if not seq.samples or request.status == "finished":
                continue
            request.n_pending -= 1
            request.token_ids.append(token_id)
            reason = request.ending()
            if reason is not None:
                self._end(request, reason)
            outputs.append(Output(request.id, token_id, reason))
        return outputs

    def check_integrity(self) -> None:
        """AssertionError naming what is wrong, if the books disagree with each other. For tests."""
        self.pool.check_integrity()
        order = [request.arrival for request in (*self._running, *self._waiting)]
        assert order == sorted(order), f"out of the order of arrival: {order}"
        listed = {request.id: request for request in (*self._running, *self._waiting)}
        assert listed == self._requests, f"listed {sorted(listed)}, known {sorted(self._requests)}"
        slots = [request.slot for request in self._running] + self._free_slots
        assert sorted(slots) == list(range(self.max_seqs)), f"slots in use and free: {slots}"
        blocks = [block for request in self._running for block in request.blocks]
        assert len(set(blocks)) == len(blocks), f"a block has two owners: {sorted(blocks)}"
        assert len(blocks) + self.pool.n_free == self.pool.n_blocks, (
            f"{len(blocks)} blocks held, {self.pool.n_free} of {self.pool.n_blocks} free"
        )
        for request in self._waiting:
            held = (request.slot, request.blocks, request.n_scheduled, request.n_pending, request.n_in_flight)
            assert request.status == "waiting" and held == (None, (), 0, 0, 0), (
                f"{request.id} waits with {held}"
            )
        for request in self._running:
            self._check_running(request)

    def _check_running(self, request: Request) -> None:
        name = request.id
        n_tokens = len(request.token_ids) + request.n_pending
        room = len(request.blocks) * self.pool.block_size
        n_in_flight = sum(request in requests for _, requests in self._in_flight)
        assert request.status == "running", f"{name} runs and is {request.status}"
        assert request.n_scheduled <= room, f"{name}: {request.n_scheduled} tokens in room for {room}"
        assert request.n_scheduled <= n_tokens <= request.limit, (
            f"{name}: {n_tokens} of {request.limit} tokens"
        )
        assert len(request.token_ids) < request.limit, f"{name} runs on at its limit of {request.limit}"
        assert request.n_in_flight == n_in_flight, f"{name}: {request.n_in_flight} steps, not {n_in_flight}"
        assert 0 <= request.n_pending <= n_in_flight, (
            f"{name}: {request.n_pending} tokens of {n_in_flight} steps"
        )

    def _has_block_for_next(self, request: Request) -> bool:
        """Give the request room for one more token; False if it must wait for the youngest to give way."""
        if request.n_scheduled < len(request.blocks) * self.pool.block_size:
            return True
        while self.pool.n_free == 0:
            youngest = self._running[-1]
            if youngest.n_in_flight:
                return False
            self._preempt(youngest)
            if youngest is request:
                return False
        request.blocks += tuple(self.pool.allocate(1))
        return True

    def _admit_next(self) -> bool:
        """Give the first waiting request a slot and blocks for all its tokens, if there are any left.

        One block for each running request stays free, so that the new one is not preempted at once.
        """
        if not self._waiting or not self._free_slots:
            return False
        n_blocks = self.pool.blocks_for(len(self._waiting[0].token_ids))
        if n_blocks + len(self._running) > self.pool.n_free:
            return False
        request = self._waiting.popleft()
        request.blocks = tuple(self.pool.allocate(n_blocks))
        request.slot = heapq.heappop(self._free_slots)
        request.status = "running"
        self._running.append(request)
        return True

    def _preempt(self, request: Request) -> None:
        """Back to the head of the queue; all its tokens are known, and run again when there is room."""
        self._running.remove(request)
        self._release(request)
        request.status = "waiting"
        request.n_scheduled = 0
        request.n_preemptions += 1
        self._waiting.appendleft(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status == "running":
            self._running.remove(request)
            self._release(request)
        else:
            self._waiting.remove(request)
        request.status = "finished"
        request.finish_reason = reason
        del self._requests[request.id]

    def _release(self, request: Request) -> None:
        self.pool.free(request.blocks)
        heapq.heappush(self._free_slots, request.slot)
        request.blocks = ()
        request.slot = None

    def _take(self, batch: Batch) -> list[Request]:
        """The requests of a batch, in the order of its seqs, which is then no longer in flight."""
        while self._in_flight:
            step, requests = self._in_flight[0]
            if step == batch.step:
                self._in_flight.popleft()
                return requests
            if any(request.status != "finished" for request in requests):
                raise ValueError(f"update for step {batch.step} before that for step {step}")
            self._in_flight.popleft()
        raise ValueError(f"step {batch.step} is not in flight: each batch is updated once")


class _Draft:
    """A batch in the making."""

    __slots__ = ("positions", "requests", "room", "row_seq", "seqs", "tokens")

    def __init__(self, room: int):
        self.room = room
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.row_seq: list[int] = []
        self.seqs: list[SeqSlice] = []
        self.requests: list[Request] = []

    def add(self, request: Request, n: int) -> None:
        """The next n tokens of a request."""
        seq = len(self.seqs)
        row_start = len(self.tokens)
        start = request.n_scheduled
        end = start + n
        n_known = len(request.token_ids)
        n_tokens = n_known + request.n_pending
        if n > 1:  # pending tokens come one at a time: all of these are known
            self.tokens += request.token_ids[start:end]
            self.positions += range(start, end)
            self.row_seq += [seq] * n
        else:
            self.tokens.append(request.token_ids[start] if start < n_known else FROM_SLOT)
            self.positions.append(start)
            self.row_seq.append(seq)
        samples = end == n_tokens
        self.seqs.append(
            SeqSlice(
                request.id, request.slot, row_start, n, end, samples, request.blocks, n_tokens, start == 0
            )
        )
        self.requests.append(request)
        self.room -= n
        request.n_scheduled = end
        request.n_in_flight += 1
        if samples:
            request.n_pending += 1
