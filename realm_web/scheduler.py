"""Which rows run in the next forward pass: continuous batching without phases.

There is no "prefill" and no "decode": every request has `n_scheduled`, the tokens whose forward pass was
submitted, and it catches up with the tokens there are (the rule of vLLM's v1 scheduler). A prompt is caught
up in chunks, an answer one token at a time, both in the same batch.

`schedule` may be called again before `update` has brought the tokens of earlier steps: a token that is
sampled but not read back yet is `FROM_SLOT`, and the device, which runs the steps in order, knows it. What
those steps sample after a request has ended is dropped. Blocks and slot of an ended request are given to
others at once, for the same reason: the device writes in the order of submission.

A full block whose tokens are known is registered in the pool as soon as the rows that fill it are scheduled:
whoever is admitted after that, be it into the same batch, runs behind them and may share it.

This module is pure: it knows no device, no clock, no text and no event loop. The same calls give the same
batches.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import RequestError
from .fairness import AGING, OUTPUT_COST, PROMPT_COST, WaitingLine
from .kvcache import BlockPool, block_digest, root_digest
from .request import FROM_SLOT, NEVER, Batch, Draft, FinishReason, Output, Request, Row, SeqSlice

__all__ = ["FROM_SLOT", "Batch", "FinishReason", "Output", "Request", "Row", "Scheduler", "SeqSlice", "Stats"]


@dataclass(frozen=True, slots=True)
class Stats:
    """The scheduler at a glance. The last three count from the start."""

    n_running: int
    n_waiting: int
    n_blocks_free: int  # the cached ones among them
    n_blocks_cached: int
    prefix_queries: int  # prompt tokens that were looked for in the prefix cache
    prefix_hits: int  # and those that were there
    n_preemptions: int


class Scheduler:
    """Requests in, batches out, sampled tokens in, outputs out.

    At most `max_seqs` requests run at a time, in slots 0 to max_seqs-1; a batch has at most `max_rows` rows,
    and at most `prompt_rows_with_decodes` of them are of prompts if it also has answers, which wait for the
    whole step (all of max_rows if not given: the fewest steps, and the least time to a first token); prompt
    and answer together have at most `max_context` tokens.

    Who runs first is told by `WaitingLine`: by priority, then by the tenants' shares, then by arrival. When
    blocks run out the lowest and youngest gives way, and so it does when slots or blocks are missing for a
    request of a higher level; it goes on later where it was.

    With `prefix_cache`, prompts share the blocks of equal beginnings. It is for models that keep nothing of a
    sequence but blocks: neither rings of pages nor recurrent state.

    A loop around it, with `depth` steps in flight::

        while scheduler.has_work:
            while len(in_flight) < depth and (batch := scheduler.schedule()):
                in_flight.append((batch, submit(batch)))
            batch, sampled = in_flight.popleft()
            for output in scheduler.update(batch, await sampled): ...
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_seqs: int,
        max_rows: int,
        max_context: int,
        prefix_cache: bool = True,
        tenant_weights: Mapping[str, float] | None = None,
        prompt_rows_with_decodes: int | None = None,
        aging: int = AGING,
    ):
        if max_seqs < 1 or max_rows < 1 or max_context < 2:
            raise ValueError(
                f"max_seqs {max_seqs}, max_rows {max_rows}, max_context {max_context}: "
                "must be at least 1, 1 and 2"
            )
        if prompt_rows_with_decodes is not None and prompt_rows_with_decodes < 1:
            raise ValueError(f"prompt_rows_with_decodes {prompt_rows_with_decodes}: must be at least 1")
        if pool.blocks_for(max_context) > pool.n_blocks:
            raise ValueError(
                f"a context of {max_context} tokens needs {pool.blocks_for(max_context)} blocks and the pool "
                f"has {pool.n_blocks}: a request alone could run out of them"
            )
        self.pool = pool
        self.max_seqs = max_seqs
        self.max_rows = max_rows
        self.max_context = max_context
        self.prefix_cache = prefix_cache
        self.prompt_rows_with_decodes = prompt_rows_with_decodes or max_rows
        self._requests: dict[str, Request] = {}  # all that are not finished
        self._waiting = WaitingLine(tenant_weights or {}, aging)
        self._running: list[Request] = []  # by level, then by arrival: the last one gives way first
        self._free_slots = list(range(max_seqs))  # a heap: the lowest is taken first
        self._in_flight: deque[tuple[int, list[Request]]] = deque()
        self._most = min(max_seqs, max_rows)  # requests at a time, so that each of them has a row
        self._n_arrived = 0
        self._n_steps = 0
        self._n_forgotten = 0  # steps before the last reset
        self._prefix_queries = self._prefix_hits = self._n_preemptions = 0

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

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests that are not finished, in the order of arrival."""
        return tuple(self._requests.values())

    @property
    def stats(self) -> Stats:
        return Stats(
            n_running=len(self._running),
            n_waiting=len(self._waiting),
            n_blocks_free=self.pool.n_free,
            n_blocks_cached=self.pool.n_cached,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            n_preemptions=self._n_preemptions,
        )

    def get(self, request_id: str) -> Request | None:
        """The request of this id, if it is not finished."""
        return self._requests.get(request_id)

    def add(self, request: Request) -> None:
        """Queue a new request. RequestError if its prompt is empty or leaves no room in the context."""
        n_prompt = len(request.prompt_ids)
        n_room = self.max_context - request.generates  # a prompt that is only scored may fill the context
        if n_prompt == 0:
            raise RequestError("the prompt has no tokens: give at least one")
        if n_prompt > n_room:
            for_answer = ", of which at least one is for the answer" if request.generates else ""
            raise RequestError(
                f"the prompt has {n_prompt} tokens and the context {self.max_context}{for_answer}: "
                f"shorten the prompt to {n_room} tokens or open the model with a larger context"
            )
        if request.id in self._requests:
            raise RequestError(f"a request with the id {request.id!r} is not finished yet: use another id")
        if request.status != "new":
            raise ValueError(f"request {request.id!r} was added before: make a new one")
        max_tokens = request.params.max_tokens
        if not request.generates:
            request.limit = n_prompt + 1  # which it never reaches: its last row runs as well
        elif max_tokens is None:
            request.limit = self.max_context
        else:
            request.limit = min(self.max_context, n_prompt + max_tokens)
        request.arrival = self._n_arrived
        request.status = "waiting"
        request.account = self._waiting.account(request.tenant)
        self._n_arrived += 1
        self._requests[request.id] = request
        self._waiting.push(request)

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

    def reset(self) -> None:
        """The device has lost what it held: all that runs waits again, with the tokens that were read back.

        Steps in flight are forgotten: their updates, if they still come, say nothing.
        """
        self._in_flight.clear()
        self._n_forgotten = self._n_steps
        for request in reversed(self._running):
            request.n_pending = request.n_in_flight = 0
            self._send_back(request)
        self._running.clear()
        self.pool.clear_cache()

    def schedule(self) -> Batch | None:
        """The next forward pass, or None when nothing can run before an `update` (or an `add`).

        One token each for the answers; then chunks of the prompts, those that run already and those that are
        admitted, in the order of `WaitingLine`, as far as max_rows, slots and blocks go. The caller submits
        it to the device before the next one, and brings the sampled tokens to `update`.
        """
        held = self._make_way() if self._waiting else set()  # give way once their steps in flight are done
        draft = Draft(self.max_rows)
        behind: list[Request] = []  # with more than one token to run
        block_size = self.pool.block_size
        # Preemption takes requests from the end of `running` only, so that this iteration stays valid.
        for request in self._running:
            n_tokens = len(request.token_ids) + request.n_pending
            n_scheduled = request.n_scheduled
            if n_tokens >= request.limit or n_tokens == n_scheduled or request in held:
                continue
            if n_tokens - n_scheduled > 1:
                behind.append(request)
            elif n_scheduled < len(request.blocks) * block_size or self._allocate_next(request):
                self._run(draft, request, 1)
            elif self._running:
                held.add(self._running[-1])
        if draft.seqs:
            draft.room = min(draft.room, self.prompt_rows_with_decodes)
        if draft.room and (behind or self._waiting):
            self._run_prompts(draft, behind)
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
        outputs: list[Output] = []
        if batch.step < self._n_forgotten:
            return outputs
        for request, seq, token_id in zip(self._take(batch), batch.seqs, sampled_ids, strict=True):
            request.n_in_flight -= 1
            if request.status == "finished":
                continue
            if seq.samples:
                request.n_pending -= 1
                request.token_ids.append(token_id)
                if (
                    request.register_at <= len(request.token_ids)
                    and request.register_at <= request.n_scheduled
                ):
                    self._register(request)
                reason = request.ending()
                if reason is not None:
                    self._end(request, reason)
                outputs.append(Output(request.id, token_id, reason))
            elif not request.generates and seq.kv_len == len(request.prompt_ids):
                self._end(request, "stop")
                outputs.append(Output(request.id, None, "stop"))
        return outputs

    def check_integrity(self) -> None:
        """AssertionError naming what is wrong, if the books disagree with each other. For tests."""
        self.pool.check_integrity()
        self._waiting.check_integrity()
        order = [_rank(request) for request in self._running]
        assert order == sorted(order), f"running out of order (level, arrival): {order}"
        listed = {request.id: request for request in (*self._running, *self._waiting)}
        assert listed == self._requests, f"listed {sorted(listed)}, known {sorted(self._requests)}"
        slots = [request.slot for request in self._running] + self._free_slots
        assert sorted(slots) == list(range(self.max_seqs)), f"slots in use and free: {slots}"
        holders = Counter(block for request in self._running for block in request.blocks)
        for block in range(self.pool.n_blocks):
            assert holders[block] == self.pool.ref_count(block), (
                f"block {block} has {holders[block]} holders and {self.pool.ref_count(block)} references"
            )
        for request in self._waiting:
            counts = (request.n_scheduled, request.n_pending, request.n_in_flight, request.n_registered)
            held = (request.slot, request.blocks, *counts)
            assert request.status == "waiting" and held == (None, (), 0, 0, 0, 0), (
                f"{request.id} waits with {held}"
            )
        contents: dict[int, bytes] = {}
        for request in self._running:
            self._check_running(request)
            self._check_blocks(request, holders, contents)

    def _check_running(self, request: Request) -> None:
        name = request.id
        n_tokens = len(request.token_ids) + request.n_pending
        room = len(request.blocks) * self.pool.block_size
        n_in_flight = sum(request in requests for _, requests in self._in_flight)
        assert request.status == "running", f"{name} runs and is {request.status}"
        assert request.n_scheduled <= room, f"{name}: {request.n_scheduled} tokens in room for {room}"
        assert request.n_start <= request.n_scheduled <= n_tokens <= request.limit, (
            f"{name}: {n_tokens} of {request.limit} tokens, "
            f"run from {request.n_start} to {request.n_scheduled}"
        )
        assert len(request.token_ids) < request.limit, f"{name} runs on at its limit of {request.limit}"
        assert request.n_in_flight == n_in_flight, f"{name}: {request.n_in_flight} steps, not {n_in_flight}"
        assert 0 <= request.n_pending <= n_in_flight, (
            f"{name}: {request.n_pending} tokens of {n_in_flight} steps"
        )

    def _check_blocks(self, request: Request, holders: Mapping[int, int], contents: dict[int, bytes]) -> None:
        """Of registered and shared blocks: that they are full, and hold what their digests say."""
        name, size = request.id, self.pool.block_size
        n_full = min(len(request.token_ids), request.n_scheduled) // size
        if self.prefix_cache and request.generates:
            assert request.n_registered == n_full, (
                f"{name}: {request.n_registered} of {n_full} blocks registered"
            )
        assert len(set(request.blocks)) == len(request.blocks), (
            f"{name} holds a block twice: {request.blocks}"
        )
        parent = root_digest(request.adapter, request.salt)
        for i, block in enumerate(request.blocks):
            digest = self.pool.digest(block)
            if i >= n_full:
                assert holders[block] == 1 and digest is None, (
                    f"{name} will write to block {block}, which is shared or registered"
                )
                continue
            parent = block_digest(parent, request.token_ids[i * size : (i + 1) * size])
            assert digest in (None, parent), f"block {block} of {name} is registered as something else"
            assert contents.setdefault(block, parent) == parent, (
                f"block {block} of {name} is shared by mistake"
            )

    def _allocate_next(self, request: Request) -> bool:
        """Give the request room for one more token; False if it must wait for the last one to give way."""
        while self.pool.n_free == 0:
            last = self._running[-1]
            if last.n_in_flight:
                return False
            self._preempt(last)
            if last is request:
                return False
        request.blocks += tuple(self.pool.allocate(1))
        return True

    def _make_way(self) -> set[Request]:
        """Preempt requests of lower levels if the first one in the line can be admitted then, and admit it.

        Returns those that must first see the end of their steps in flight, and get no more rows until then.
        """
        if not self._running or self._waiting.top <= self._running[-1].holds:
            return set()
        first, level = self._waiting.first()
        hits = self._match(first)
        victims: list[Request] = []
        n_gained, gone = 0, Counter()
        while not self._fits(first, hits, len(victims), n_gained):
            last = self._running[-1 - len(victims)] if len(victims) < len(self._running) else None
            if last is None or last.holds >= level:
                return set()
            victims.append(last)
            gone.update(last.blocks)
            n_gained = sum(n == self.pool.ref_count(block) for block, n in gone.items() if block not in hits)
        for request in victims:
            if not request.n_in_flight:
                self._preempt(request)
                request.n_yielded += 1
        held = {request for request in victims if request.n_in_flight}
        if victims and not held:
            self._admit(first, level)  # now, before the answers of others take the blocks
        return held

    def _run_prompts(self, draft: Draft, behind: list[Request]) -> None:
        """Fill the room that is left with chunks of prompts, of running requests and of new ones."""
        behind.sort(key=_turn, reverse=True)
        first = self._waiting.first() if len(self._running) < self._most else None
        while draft.room:
            if first and (not behind or _turn(first[0], first[1]) < _turn(behind[-1])):
                if self._admit(*first):
                    request = first[0]
                    self._run(draft, request, min(request.n_to_run, draft.room))
                    first = self._waiting.first()
                else:
                    first = None  # nobody overtakes it
            elif behind:
                request = behind.pop()
                self._run(draft, request, min(request.n_to_run, draft.room))
            else:
                return

    def _match(self, request: Request) -> list[int]:
        """The blocks that hold the beginning of a request's tokens already; the last token always runs."""
        if not (self.prefix_cache and request.generates):
            return []
        return self.pool.match(self._digests(request, (len(request.token_ids) - 1) // self.pool.block_size))

    def _fits(self, request: Request, hits: Sequence[int], n_victims: int = 0, n_gained: int = 0) -> bool:
        """Whether there are a slot, a row and blocks for all tokens of a waiting request.

        One block for each running request stays free, so that the new one is not preempted at once.
        """
        n_running = len(self._running) - n_victims
        n_blocks = self.pool.blocks_for(len(request.token_ids)) - len(hits)
        n_blocks += sum(self.pool.ref_count(block) == 0 for block in hits)
        return n_running < self._most and n_blocks + n_running <= self.pool.n_free + n_gained

    def _admit(self, request: Request, level: int) -> bool:
        """Give the first waiting request a slot and blocks, if there are any left."""
        hits = self._match(request)
        if not self._fits(request, hits):
            return False
        self._waiting.admit(request, level)
        self.pool.share(hits)
        n_new = self.pool.blocks_for(len(request.token_ids)) - len(hits)
        request.blocks = (*hits, *self.pool.allocate(n_new))
        request.slot = heapq.heappop(self._free_slots)
        request.status = "running"
        if hits:
            request.n_scheduled = len(hits) * self.pool.block_size
        request.n_start = request.n_scheduled
        request.n_charged = max(request.n_charged, request.n_start)
        request.n_registered = len(hits)
        if self.prefix_cache and request.generates:
            request.register_at = (len(hits) + 1) * self.pool.block_size
            if request.n_admissions == 0:
                request.n_cached = request.n_start
                self._prefix_hits += request.n_start
                self._prefix_queries += len(request.prompt_ids)
        request.n_admissions += 1
        insort(self._running, request, key=_rank)
        return True

    def _run(self, draft: Draft, request: Request, n: int) -> None:
        """Put the next n tokens of a request into the batch."""
        samples = draft.add(request, n)
        done = request.n_scheduled
        if request.register_at <= done and request.register_at <= len(request.token_ids):
            self._register(request)
        # The tenant pays for a token once, however often the request is preempted, and for none of the cache.
        paid, now = request.n_charged, done + samples
        if now > paid:
            n_new = now - min(max(paid, len(request.prompt_ids)), now)  # tokens of the answer
            self._waiting.charge(request, OUTPUT_COST * n_new + PROMPT_COST * (now - paid - n_new))
            request.n_charged = now

    def _register(self, request: Request) -> None:
        """Let others find the blocks that are full of known tokens."""
        n_full = min(len(request.token_ids), request.n_scheduled) // self.pool.block_size
        digests = self._digests(request, n_full)
        for i in range(request.n_registered, n_full):
            self.pool.register(request.blocks[i], digests[i])
        request.n_registered = n_full
        request.register_at = (n_full + 1) * self.pool.block_size

    def _digests(self, request: Request, n: int) -> list[bytes]:
        """The digests of the first n blocks of a request's tokens."""
        known, size = request.digests, self.pool.block_size
        parent = known[-1] if known else root_digest(request.adapter, request.salt)
        for i in range(len(known), n):
            parent = block_digest(parent, request.token_ids[i * size : (i + 1) * size])
            known.append(parent)
        return known[:n]

    def _preempt(self, request: Request) -> None:
        """Back into the line; all its tokens are known, and run again, or are found, when there is room."""
        self._running.remove(request)
        request.n_preemptions += 1
        self._n_preemptions += 1
        self._send_back(request)

    def _send_back(self, request: Request) -> None:
        self._release(request)
        request.status = "waiting"
        request.n_scheduled = request.n_start = request.n_registered = 0
        request.register_at = NEVER
        self._waiting.push(request)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status == "running":
            self._running.remove(request)
            self._release(request)
        else:
            self._waiting.remove(request)
        self._waiting.close(request)
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


def _rank(request: Request) -> tuple[int, int]:
    """Who keeps its blocks: the higher level, then the older."""
    return -request.holds, request.arrival


def _turn(request: Request, level: int | None = None) -> tuple[int, float, int]:
    """Whose prompt runs first."""
    return -(request.level if level is None else level), request.account.counter, request.arrival
