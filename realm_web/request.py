"""What a request is, and what a batch says to the device: the words between engine, scheduler and runner.

Plain data; the scheduler alone changes a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from .errors import RequestError
from .sampler import SamplingParams

if TYPE_CHECKING:
    from .fairness import Account

FROM_SLOT = 0xFFFFFFFF  # in place of a token id: the token that this slot sampled last
MAX_PRIORITY = 10  # and -10 at the other end; bounded, so that there is a bound to how long the lowest waits
NEVER = 1 << 62  # a number of tokens that no sequence reaches

FinishReason = Literal["stop", "length", "abort", "timeout"]
Task = Literal["generate", "score", "embed"]
TASKS: tuple[Task, ...] = ("generate", "score", "embed")


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and what became of it. The first fields are given, the scheduler keeps the others.

    "score" and "embed" run all rows of the prompt and sample nothing; what their rows bring is the runner's
    to read back. They find nothing in the prefix cache, as it holds keys and values and no results of rows.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    eog_ids: frozenset[int]  # the model's end-of-generation tokens, unless params.ignore_eos
    seed: int  # u32; the draw of every token is a function of it and of the token's position
    task: Task = field(default="generate", kw_only=True)
    priority: int = field(default=0, kw_only=True)  # -MAX_PRIORITY to MAX_PRIORITY, the higher the sooner
    tenant: str = field(default="", kw_only=True)  # whose share of the device it takes
    salt: bytes = field(default=b"", kw_only=True)  # only requests of the same salt share cached blocks
    adapter: int = field(default=0, kw_only=True)
    pooling: str | None = field(default=None, kw_only=True)  # of "embed": "mean", "last" or "cls"
    first_scored: int = field(default=1, kw_only=True)  # of "score": index of the first token that is scored

    token_ids: list[int] = field(init=False)  # prompt and answer, as far as read back
    stop_ids: frozenset[int] = field(init=False)
    n_must: int = field(init=False)  # tokens up to which a stop token does not end it
    status: Literal["new", "waiting", "running", "finished"] = field(init=False, default="new")
    finish_reason: FinishReason | None = field(init=False, default=None)
    arrival: int = field(init=False, default=-1)
    limit: int = field(init=False, default=0)  # tokens of prompt and answer at which it ends
    level: int = field(init=False)  # the priority, and what waiting has added to it
    account: Account = field(init=False, default=None)  # of its tenant
    n_charged: int = field(init=False, default=0)  # tokens that the tenant's account was charged for
    slot: int | None = field(init=False, default=None)
    # The block table. The first n_registered may be shared and are never written; a sequence can be cut back
    # to any length that is no shorter than what was read back, by freeing the blocks behind.
    blocks: tuple[int, ...] = field(init=False, default=())
    digests: list[bytes] = field(init=False, default_factory=list)  # of full blocks, as far as computed
    n_registered: int = field(init=False, default=0)  # blocks known to the prefix cache, or a twin of them
    register_at: int = field(init=False, default=NEVER)  # tokens at which the next block can be registered
    n_cached: int = field(init=False, default=0)  # prompt tokens that were in the cache when it first ran
    n_start: int = field(init=False, default=0)  # tokens that were there when it entered its slot
    n_scheduled: int = field(init=False, default=0)  # tokens whose forward pass was submitted
    n_pending: int = field(init=False, default=0)  # tokens sampled, or about to be, and not read back
    n_in_flight: int = field(init=False, default=0)  # steps with rows of this request and no update yet
    n_admissions: int = field(init=False, default=0)
    n_preemptions: int = field(init=False, default=0)
    n_yielded: int = field(init=False, default=0)  # those of them that were for a request of a higher level

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise RequestError(f"task is {self.task!r}: use {', '.join(TASKS)}")
        if type(self.priority) is not int or not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise RequestError(
                f"priority is {self.priority!r}: give a whole number from {-MAX_PRIORITY} to {MAX_PRIORITY}"
            )
        self.level = self.priority
        self.prompt_ids = tuple(self.prompt_ids)
        self.token_ids = list(self.prompt_ids)
        self.n_must = len(self.prompt_ids) + self.params.min_tokens
        self.stop_ids = frozenset(self.params.stop_token_ids)
        if not self.params.ignore_eos:
            self.stop_ids |= self.eog_ids

    @property
    def generates(self) -> bool:
        return self.task == "generate"

    @property
    def holds(self) -> int:
        """The level that a waiting request must exceed to take this one's place: never the same one twice."""
        return self.level + self.n_yielded

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
        if self.token_ids[-1] in self.stop_ids and len(self.token_ids) > self.n_must:
            return "stop"
        return "length" if len(self.token_ids) >= self.limit else None


# Row, SeqSlice and Output are named tuples: made up to 64 times a step, at a third of the cost of a frozen
# dataclass.


class Row(NamedTuple):
    """One token in one forward pass."""

    token: int  # or FROM_SLOT
    position: int
    seq: int  # index in Batch.seqs


class SeqSlice(NamedTuple):
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
    task: Task


@dataclass(frozen=True, slots=True)
class Batch:
    """One forward pass. tokens, positions and row_seq have one entry for each row.

    A row may attend to keys and values that another sequence's rows store in this very step: all rows of a
    step are stored, layer by layer, before any of them attends.
    """

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


class Output(NamedTuple):
    """News of a request: a token, its end, or both (a token that ends it is part of its tokens)."""

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None


class Draft:
    """A batch in the making."""

    __slots__ = ("positions", "requests", "room", "row_seq", "seqs", "tokens")

    def __init__(self, room: int):
        self.room = room
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.row_seq: list[int] = []
        self.seqs: list[SeqSlice] = []
        self.requests: list[Request] = []

    def add(self, request: Request, n: int) -> bool:
        """The next n tokens of a request; whether a token is sampled after them."""
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
        samples = end == n_tokens and request.task == "generate"
        self.seqs.append(
            SeqSlice(
                request.id, request.slot, row_start, n, end, samples, request.blocks, n_tokens,
                start == request.n_start, request.task,
            )
        )  # fmt: skip
        self.requests.append(request)
        self.room -= n
        request.n_scheduled = end
        request.n_in_flight += 1
        if samples:
            request.n_pending += 1
        return samples
