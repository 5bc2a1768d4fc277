"""The scheduler in front of a device of three lists, and a state machine over everything one can do to it.

The device runs batches in the order of submission, as a GPU queue does, keeps each token in the KV cell that
the block table names, and samples a function of what it reads back through that table. So a wrong block, slot
or position, or one given away too early, changes the text. What it reads is compared, row by row, with what
the request would have there if it were alone.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from realm_web.errors import RequestError
from realm_web.kvcache import BlockPool
from realm_web.sampler import SamplingParams
from realm_web.scheduler import FROM_SLOT, Batch, Output, Request, Row, Scheduler, SeqSlice, Stats

EOG = 0
N_VOCAB = 11


def next_token(tokens: list[int], position: int) -> int:
    """The model: any function of all tokens so far will do, if it tells their orders apart."""
    h = position + 1
    for token in tokens:
        h = (h * 747796405 + token + 2891336453) & 0xFFFFFFFF
    return (h >> 13) % N_VOCAB


@dataclass(frozen=True)
class Cell:
    """What keys and values are a function of, but for the tokens before."""

    token: int
    position: int
    adapter: int
    salt: bytes  # no function of it, but nobody may read what was written under another


class FakeDevice:
    """KV cells of one token each, and the token that each slot sampled last."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.block_size = scheduler.pool.block_size
        self.cells: dict[tuple[int, int], Cell] = {}
        self.slots: dict[int, int] = {}
        self.ran_up_to: dict[int, int] = {}  # per request, by arrival
        self.admissions: dict[int, int] = {}

    def submit(self, batch: Batch) -> list[int]:
        """Run a batch; the tokens it samples (-1 where none), which the caller may look at later.

        As on a GPU, all rows are stored before any of them attends.
        """
        rows = list(batch.rows)
        requests = [self.scheduler.get(seq.request_id) for seq in batch.seqs]
        written = []
        for i, (seq, request) in enumerate(zip(batch.seqs, requests, strict=True)):
            mine = rows[seq.row_start : seq.row_start + seq.n_rows]
            assert [row.seq for row in mine] == [i] * seq.n_rows
            assert [row.position for row in mine] == list(range(seq.kv_len - seq.n_rows, seq.kv_len))
            if seq.first:
                self.slots.pop(seq.slot, None)
            for row in mine:
                token = self.slots[seq.slot] if row.token == FROM_SLOT else row.token
                written.append(self._place(seq, row.position))
                self.cells[written[-1]] = Cell(token, row.position, request.adapter, request.salt)
        assert len(set(written)) == len(written) == len(rows) == batch.n_rows, "a cell is written twice"
        return [self._attend(seq, request) for seq, request in zip(batch.seqs, requests, strict=True)]

    def check_positions(self, batch: Batch) -> None:
        """Rows of a request go on where it was, and start at a block's beginning when it enters a slot."""
        for seq in batch.seqs:
            request = self.scheduler.get(seq.request_id)
            start = seq.kv_len - seq.n_rows
            enters = self.admissions.get(request.arrival) != request.n_admissions
            if enters:
                self.admissions[request.arrival] = request.n_admissions
                assert start % self.block_size == 0 and start < len(request.token_ids)
                assert start == 0 or (self.scheduler.prefix_cache and request.task == "generate")
            else:
                assert start == self.ran_up_to[request.arrival]
            assert seq.first == enters
            self.ran_up_to[request.arrival] = seq.kv_len

    def _attend(self, seq: SeqSlice, request: Request) -> int:
        expected = whole(request, self.scheduler.max_context)
        read = [self.cells.get(self._place(seq, position)) for position in range(seq.kv_len)]
        assert read == [
            Cell(token, position, request.adapter, request.salt)
            for position, token in enumerate(expected[: seq.kv_len])
        ], f"{seq.request_id} reads what is not its own"
        if not seq.samples:
            return -1
        assert seq.draw_position == seq.kv_len
        self.slots[seq.slot] = next_token([cell.token for cell in read], seq.draw_position)
        return self.slots[seq.slot]

    def _place(self, seq: SeqSlice, position: int) -> tuple[int, int]:
        return seq.blocks[position // self.block_size], position % self.block_size


WHOLE: dict[Request, list[int]] = {}


def whole(request: Request, max_context: int) -> list[int]:
    """Its prompt, and the tokens that are sampled if nothing ever ends it: what it is, row by row."""
    tokens = WHOLE.get(request)
    if tokens is None:
        WHOLE.clear() if len(WHOLE) > 5000 else None
        tokens = WHOLE[request] = list(request.prompt_ids)
        while len(tokens) < max_context:
            tokens.append(next_token(tokens, len(tokens)))
    return tokens


def alone(request: Request, max_context: int) -> tuple[list[int], str]:
    """What the model answers to this request, without any scheduler."""
    if request.task != "generate":
        return [], "stop"
    n_prompt = len(request.prompt_ids)
    n_most = max_context if request.params.max_tokens is None else request.params.max_tokens
    output = whole(request, max_context)[n_prompt : n_prompt + n_most]
    for i, token in enumerate(output):
        if token in request.stop_ids and i >= request.params.min_tokens:
            return output[: i + 1], "stop"
    return output, "length"


def make_request(
    name: str, prompt, *, max_tokens=None, min_tokens=0, ignore_eos=True, stop_token_ids=(), **options
) -> Request:
    """`options` are task, priority, tenant, salt and adapter. A prompt of n tokens differs with the name."""
    if isinstance(prompt, int):
        prompt = [(7 * i + sum(map(ord, name))) % N_VOCAB for i in range(prompt)]
    params = SamplingParams(
        max_tokens=max_tokens, min_tokens=min_tokens, ignore_eos=ignore_eos, stop_token_ids=stop_token_ids
    )
    return Request(name, tuple(prompt), params, frozenset({EOG}), seed=1, **options)


def make_scheduler(
    *, n_blocks=16, block_size=4, max_seqs=4, max_rows=8, max_context=32, **options
) -> Scheduler:
    pool = BlockPool(n_blocks, block_size)
    return Scheduler(pool, max_seqs=max_seqs, max_rows=max_rows, max_context=max_context, **options)


def run_to_the_end(scheduler: Scheduler, depth: int, arrivals=()) -> dict[str, list[Output]]:
    """The engine's loop; `arrivals` are (step, request): added once so many steps were scheduled."""
    device = FakeDevice(scheduler)
    arrivals = deque(sorted(arrivals, key=lambda pair: pair[0]))
    in_flight: deque[tuple[Batch, list[int]]] = deque()
    outputs: dict[str, list[Output]] = {}
    n_steps = 0
    while scheduler.has_work or arrivals or in_flight:
        while arrivals and (arrivals[0][0] <= n_steps or not scheduler.has_work):
            scheduler.add(arrivals.popleft()[1])
        while len(in_flight) < depth and (batch := scheduler.schedule()):
            assert batch.n_rows <= scheduler.max_rows
            device.check_positions(batch)
            in_flight.append((batch, device.submit(batch)))
            n_steps += 1
        for output in scheduler.update(*in_flight.popleft()):
            outputs.setdefault(output.request_id, []).append(output)
    scheduler.check_integrity()
    assert scheduler.pool.n_free == scheduler.pool.n_blocks
    return outputs


def step(scheduler: Scheduler, *tokens: int) -> tuple[Batch, list[Output]]:
    batch = scheduler.schedule()
    return batch, scheduler.update(batch, tokens)


# ---- what a batch holds ------------------------------------------------------------------------------------


def test_one_request_runs_its_prompt_and_then_one_token_a_step():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5, 6, 7], max_tokens=3))
    batch, outputs = step(scheduler, 8)
    assert (batch.tokens, batch.positions, batch.row_seq) == ([5, 6, 7], [0, 1, 2], [0, 0, 0])
    assert not batch.is_decode and batch.n_rows == 3
    (seq,) = batch.seqs
    assert (seq.request_id, seq.slot, seq.row_start, seq.n_rows, seq.kv_len) == ("a", 0, 0, 3, 3)
    assert (seq.samples, seq.draw_position, seq.blocks, seq.first) == (True, 3, (0,), True)
    assert outputs == [Output("a", 8, None)]

    batch, outputs = step(scheduler, 9)
    assert list(batch.rows) == [Row(8, 3, 0)]
    assert batch.is_decode and not batch.seqs[0].first
    assert outputs == [Output("a", 9, None)]

    batch, outputs = step(scheduler, 10)
    assert (batch.seqs[0].kv_len, batch.seqs[0].draw_position, batch.seqs[0].blocks) == (5, 5, (0, 1))
    assert outputs == [Output("a", 10, "length")]
    assert scheduler.schedule() is None
    assert not scheduler.has_work


def test_a_token_that_is_not_read_back_yet_comes_from_the_slot():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5, 6]))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [batch.tokens for batch in batches] == [[5, 6], [FROM_SLOT], [FROM_SLOT], [FROM_SLOT]]
    assert [batch.positions for batch in batches] == [[0, 1], [2], [3], [4]]
    assert [batch.step for batch in batches] == [0, 1, 2, 3]
    assert scheduler.update(batches[0], [7]) == [Output("a", 7, None)]
    assert scheduler.schedule().tokens == [FROM_SLOT]
    for batch, token in zip(batches[1:], (8, 9, 10), strict=True):
        assert scheduler.update(batch, [token]) == [Output("a", token, None)]
    assert scheduler.get("a").token_ids == [5, 6, 7, 8, 9, 10]
    assert scheduler.get("a").output_ids == [7, 8, 9, 10]


def test_a_prompt_longer_than_max_rows_runs_in_chunks_of_which_the_last_samples():
    scheduler = make_scheduler(max_rows=4)
    scheduler.add(make_request("a", range(10)))
    batches = [scheduler.schedule() for _ in range(4)]
    assert [batch.tokens for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [FROM_SLOT]]
    assert [batch.seqs[0].samples for batch in batches] == [False, False, True, True]
    assert [batch.seqs[0].kv_len for batch in batches] == [4, 8, 10, 11]
    assert [batch.seqs[0].first for batch in batches] == [True, False, False, False]
    assert scheduler.update(batches[0], [99]) == scheduler.update(batches[1], [99]) == []
    assert scheduler.update(batches[2], [5]) == [Output("a", 5, None)]


def test_answers_go_first_and_prompts_share_what_is_left_in_the_order_of_arrival():
    scheduler = make_scheduler(max_rows=6)
    scheduler.add(make_request("a", [1]))
    step(scheduler, 5)
    scheduler.add(make_request("b", range(8)))
    scheduler.add(make_request("c", range(3)))
    batch = scheduler.schedule()
    assert [(seq.request_id, seq.n_rows) for seq in batch.seqs] == [("a", 1), ("b", 5)]
    batch = scheduler.schedule()
    assert [(seq.request_id, seq.n_rows) for seq in batch.seqs] == [("a", 1), ("b", 3), ("c", 2)]
    assert batch.row_seq == [0, 1, 1, 1, 2, 2]
    assert [seq.row_start for seq in batch.seqs] == [0, 1, 4]
    batch = scheduler.schedule()
    assert [(seq.request_id, seq.samples) for seq in batch.seqs] == [("a", True), ("b", True), ("c", True)]
    assert batch.is_decode and batch.tokens == [FROM_SLOT, FROM_SLOT, 2]


def test_more_answers_than_rows_wait_for_the_older_ones():
    scheduler = make_scheduler(max_rows=2)
    for name in "abc":
        scheduler.add(make_request(name, [1], max_tokens=2))
    names = [[seq.request_id for seq in step(scheduler, 5, 5)[0].seqs] for _ in range(2)]
    assert names == [["a", "b"], ["a", "b"]]
    assert [seq.request_id for seq in step(scheduler, 5)[0].seqs] == ["c"]


def test_running_requests_never_outnumber_the_rows():
    scheduler = make_scheduler(max_rows=2, max_seqs=4)
    for name, n in (("a", 1), ("b", 5), ("c", 1), ("d", 1)):
        scheduler.add(make_request(name, n))
    batches = [scheduler.schedule() for _ in range(8)]
    assert [batch.n_rows for batch in batches] == [2] * 8
    assert scheduler.n_running == 2


def test_no_more_than_max_seqs_run_and_a_free_slot_goes_to_the_first_in_line():
    scheduler = make_scheduler(max_seqs=2)
    for name in "abcd":
        scheduler.add(make_request(name, [1]))
    batch, _ = step(scheduler, 5, 5)
    assert [(seq.request_id, seq.slot) for seq in batch.seqs] == [("a", 0), ("b", 1)]
    assert (scheduler.n_running, scheduler.n_waiting) == (2, 2)
    scheduler.finish("a", "stop")
    batch, _ = step(scheduler, 5, 5)
    assert [(seq.request_id, seq.slot) for seq in batch.seqs] == [("b", 1), ("c", 0)]


def test_the_same_calls_give_the_same_batches():
    def batches():
        scheduler = make_scheduler(max_rows=5, n_blocks=8)
        for i, name in enumerate("abcdef"):
            scheduler.add(make_request(name, 3 * i + 1, max_tokens=6))
        return [scheduler.schedule() for _ in range(6)]

    assert batches() == batches()


def test_a_block_table_is_the_same_object_until_it_grows():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2, 3]))
    tables = [scheduler.schedule().seqs[0].blocks for _ in range(6)]
    assert [len(table) for table in tables] == [1, 1, 2, 2, 2, 2]
    assert tables[2] is tables[5]


# ---- how a request ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_nothing_is_scheduled_past_max_tokens(depth):
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2], max_tokens=5))
    n_scheduled = 0
    in_flight = deque()
    while scheduler.has_work:
        while len(in_flight) < depth and (batch := scheduler.schedule()):
            in_flight.append(batch)
            n_scheduled += 1
        scheduler.update(in_flight.popleft(), [7])
    assert n_scheduled == 5 and not in_flight


@pytest.mark.parametrize("max_tokens", [None, 7, 100])
def test_an_answer_ends_where_the_context_ends(max_tokens):
    scheduler = make_scheduler(max_context=12)
    request = make_request("a", [1, 2, 3, 4, 5], max_tokens=max_tokens)
    scheduler.add(request)
    outputs = run_to_the_end(scheduler, depth=3)["a"]
    assert [output.finish_reason for output in outputs] == [None] * 6 + ["length"]
    assert len(request.token_ids) == 12
    assert (request.status, request.finish_reason) == ("finished", "length")


def test_a_prompt_may_leave_room_for_a_single_token():
    scheduler = make_scheduler(max_context=12)
    scheduler.add(make_request("a", 11))
    assert [output.finish_reason for output in run_to_the_end(scheduler, depth=4)["a"]] == ["length"]


@pytest.mark.parametrize("n_prompt", [12, 13, 5000])
def test_a_prompt_that_leaves_no_room_in_the_context_names_both_numbers_and_the_cure(n_prompt):
    scheduler = make_scheduler(max_context=12)
    with pytest.raises(RequestError) as error:
        scheduler.add(make_request("a", n_prompt))
    assert str(error.value) == (
        f"the prompt has {n_prompt} tokens and the context 12, of which at least one is for the answer: "
        "shorten the prompt to 11 tokens or open the model with a larger context"
    )
    assert not scheduler.has_work


def test_a_prompt_without_tokens_is_an_error():
    with pytest.raises(RequestError, match="the prompt has no tokens: give at least one"):
        make_scheduler().add(make_request("a", []))


def test_an_end_of_generation_token_ends_a_request_and_is_its_last_token():
    scheduler = make_scheduler()
    request = make_request("a", [1, 2], ignore_eos=False)
    scheduler.add(request)
    assert step(scheduler, 5)[1] == [Output("a", 5, None)]
    assert step(scheduler, EOG)[1] == [Output("a", EOG, "stop")]
    assert request.output_ids == [5, EOG]


def test_ignore_eos_goes_on_past_it_but_not_past_stop_token_ids():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2], ignore_eos=True, stop_token_ids=(9,)))
    assert step(scheduler, EOG)[1] == [Output("a", EOG, None)]
    assert step(scheduler, 9)[1] == [Output("a", 9, "stop")]


def test_a_stop_token_at_the_last_allowed_place_is_a_stop():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1], max_tokens=1, ignore_eos=False))
    assert step(scheduler, EOG)[1] == [Output("a", EOG, "stop")]


def test_tokens_sampled_after_the_end_are_dropped_and_the_others_of_their_batch_kept():
    scheduler = make_scheduler()
    a, b = make_request("a", [1], ignore_eos=False), make_request("b", [2])
    scheduler.add(a)
    scheduler.add(b)
    batches = [scheduler.schedule() for _ in range(3)]
    assert scheduler.update(batches[0], [EOG, 5]) == [Output("a", EOG, "stop"), Output("b", 5, None)]
    scheduler.check_integrity()
    assert scheduler.update(batches[1], [6, 6]) == [Output("b", 6, None)]
    assert scheduler.update(batches[2], [7, 7]) == [Output("b", 7, None)]
    assert (a.output_ids, b.output_ids) == ([EOG], [5, 6, 7])


def test_finish_frees_slot_and_blocks_at_once_and_a_second_one_does_nothing():
    scheduler = make_scheduler(n_blocks=8)
    request = make_request("a", 6)
    scheduler.add(request)
    batches = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.pool.n_free == 6
    assert scheduler.finish("a", "stop") == Output("a", None, "stop")
    assert scheduler.pool.n_free == 8 and request.slot is None
    assert (request.status, request.finish_reason) == ("finished", "stop")
    assert scheduler.finish("a", "length") is scheduler.abort("a") is None
    assert request.finish_reason == "stop"
    assert not scheduler.has_work
    assert [scheduler.update(batch, [5]) for batch in batches] == [[], []]
    scheduler.check_integrity()


def test_abort_takes_a_waiting_request_out_of_the_line():
    scheduler = make_scheduler(max_seqs=1)
    for name in "abc":
        scheduler.add(make_request(name, [1], max_tokens=1))
    step(scheduler, 5)
    assert scheduler.abort("b") == Output("b", None, "abort")
    assert scheduler.abort("nobody") is None
    assert step(scheduler, 5)[1] == [Output("c", 5, "length")]


def test_an_id_can_be_used_again_while_steps_of_its_first_use_are_in_flight():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2]))
    old = [scheduler.schedule(), scheduler.schedule()]
    with pytest.raises(RequestError, match="a request with the id 'a' is not finished yet: use another id"):
        scheduler.add(make_request("a", [3]))
    scheduler.abort("a")
    scheduler.add(make_request("a", [3]))
    new = scheduler.schedule()
    assert scheduler.update(old[0], [5]) == scheduler.update(old[1], [6]) == []
    assert scheduler.update(new, [7]) == [Output("a", 7, None)]
    assert scheduler.get("a").token_ids == [3, 7]


# ---- calling it wrongly ------------------------------------------------------------------------------------


def test_a_request_object_is_used_once():
    scheduler = make_scheduler()
    request = make_request("a", [1])
    scheduler.add(request)
    scheduler.abort("a")
    with pytest.raises(ValueError, match="request 'a' was added before: make a new one"):
        scheduler.add(request)


def test_batches_come_back_once_and_in_order():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1]))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(ValueError, match="update for step 1 before that for step 0"):
        scheduler.update(second, [5])
    with pytest.raises(ValueError, match="2 sampled tokens for 1 sequences"):
        scheduler.update(first, [5, 6])
    scheduler.check_integrity()
    scheduler.update(first, [5])
    with pytest.raises(ValueError, match="update for step 0 before that for step 1"):
        scheduler.update(first, [5])
    scheduler.update(second, [5])
    with pytest.raises(ValueError, match="step 1 is not in flight: each batch is updated once"):
        scheduler.update(second, [5])


def test_batches_in_which_all_have_ended_may_be_left_out():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1]))
    for _ in range(3):
        scheduler.schedule()
    scheduler.abort("a")
    scheduler.add(make_request("b", [1]))
    assert step(scheduler, 5)[1] == [Output("b", 5, None)]


def test_sizes_that_cannot_work_are_errors():
    for sizes in ({"max_seqs": 0}, {"max_rows": 0}, {"max_context": 1}):
        with pytest.raises(ValueError, match="must be at least 1, 1 and 2"):
            make_scheduler(**sizes)
    with pytest.raises(ValueError, match="a context of 33 tokens needs 9 blocks and the pool has 8"):
        make_scheduler(n_blocks=8, max_context=33)


# ---- too few blocks ----------------------------------------------------------------------------------------


def test_the_youngest_gives_way_when_blocks_run_out_and_resumes_with_all_its_tokens():
    scheduler = make_scheduler(n_blocks=4, block_size=4, max_context=16)
    a, b = make_request("a", 3, max_tokens=8), make_request("b", 3, max_tokens=8)
    scheduler.add(a)
    scheduler.add(b)
    device = FakeDevice(scheduler)
    for _ in range(6):
        batch = scheduler.schedule()
        scheduler.update(batch, device.submit(batch))
        scheduler.check_integrity()
    assert [len(a.blocks), len(b.blocks)] == [2, 2]
    batch = scheduler.schedule()  # a needs its third block
    assert [seq.request_id for seq in batch.seqs] == ["a"]
    assert (b.status, b.n_scheduled, b.n_preemptions, b.slot) == ("waiting", 0, 1, None)
    assert len(b.output_ids) == 6
    scheduler.update(batch, device.submit(batch))
    batch = scheduler.schedule()
    assert scheduler.update(batch, device.submit(batch))[0].finish_reason == "length"
    batch = scheduler.schedule()  # of b's two full blocks a has taken the second
    assert batch.tokens == b.token_ids[4:] and batch.seqs[0].first
    scheduler.update(batch, device.submit(batch))
    while batch := scheduler.schedule():
        scheduler.update(batch, device.submit(batch))
    assert [(a.output_ids, "length"), (b.output_ids, "length")] == [alone(a, 16), alone(b, 16)]


def test_a_request_gives_way_only_after_its_steps_in_flight_are_done_and_is_not_given_more():
    scheduler = make_scheduler(n_blocks=4, block_size=4, max_context=16)
    a, b = make_request("a", 4), make_request("b", 1)
    scheduler.add(a)
    scheduler.add(b)
    batches = [scheduler.schedule() for _ in range(5)]
    assert all(len(batch.seqs) == 2 for batch in batches)
    assert scheduler.schedule() is None  # a needs its third block; b has room left in its second
    assert (a.n_scheduled, b.n_scheduled, b.status) == (8, 5, "running")
    for i, batch in enumerate(batches):
        assert len(scheduler.update(batch, [5, 5])) == 2
        later = scheduler.schedule()
        assert (later is None) == (i < 4)
    assert [seq.request_id for seq in later.seqs] == ["a"]
    assert b.status == "waiting"
    scheduler.check_integrity()


def test_older_requests_that_need_no_block_go_on_while_the_youngest_is_emptied():
    scheduler = make_scheduler(n_blocks=9, block_size=4, max_context=16, max_rows=32)
    a, b, c = make_request("a", 8), make_request("b", 5), make_request("c", 8)
    for request in (a, b, c):
        scheduler.add(request)
    first = scheduler.schedule()  # 2 + 2 + 2 blocks, and one to spare for each running one
    second = scheduler.schedule()  # a and c: their third
    assert [len(request.blocks) for request in (a, b, c)] == [3, 2, 3] and scheduler.pool.n_free == 1
    third, fourth = scheduler.schedule(), scheduler.schedule()
    assert [len(batch.seqs) for batch in (first, second, third, fourth)] == [3, 3, 3, 3]
    fifth = scheduler.schedule()  # b takes the last block
    assert scheduler.pool.n_free == 0 and len(fifth.seqs) == 3
    sixth = scheduler.schedule()  # a needs its fourth: c, in flight, gets no more rows
    assert [seq.request_id for seq in sixth.seqs] == ["b"]
    for batch in (first, second, third, fourth, fifth):
        scheduler.update(batch, [5] * 3)
    assert [seq.request_id for seq in scheduler.schedule().seqs] == ["a", "b"]
    assert c.status == "waiting"


def test_a_new_request_is_not_admitted_into_the_blocks_that_running_ones_need_next():
    scheduler = make_scheduler(n_blocks=4, block_size=4, max_context=16)
    scheduler.add(make_request("a", 8))
    scheduler.add(make_request("b", 8))
    assert [seq.request_id for seq in scheduler.schedule().seqs] == ["a"]
    scheduler = make_scheduler(n_blocks=5, block_size=4, max_context=16, max_rows=16)
    scheduler.add(make_request("a", 8))
    scheduler.add(make_request("b", 8))
    assert [seq.request_id for seq in scheduler.schedule().seqs] == ["a", "b"]


def test_a_large_prompt_is_not_overtaken_by_a_small_one():
    scheduler = make_scheduler(n_blocks=4, block_size=4, max_context=16, max_rows=32)
    scheduler.add(make_request("a", 4, max_tokens=3))
    scheduler.add(make_request("large", 12, max_tokens=1))
    scheduler.add(make_request("small", 1, max_tokens=1))
    order = [output for outputs in (step_all(scheduler) for _ in range(20)) for output in outputs]
    ended = [output.request_id for output in order if output.finish_reason]
    assert ended == ["a", "large", "small"]


def step_all(scheduler):
    batch = scheduler.schedule()
    return scheduler.update(batch, [5] * len(batch.seqs)) if batch else []


# ---- the prefix cache --------------------------------------------------------------------------------------


def names_and_rows(batch: Batch) -> list[tuple[str, int]]:
    return [(seq.request_id, seq.n_rows) for seq in batch.seqs]


def end_all(scheduler: Scheduler) -> None:
    for request in scheduler.requests:
        scheduler.abort(request.id)


def test_a_prompt_that_begins_like_an_earlier_one_runs_only_the_rest():
    scheduler = make_scheduler(max_rows=16)
    first = make_request("first", range(10))
    scheduler.add(first)
    scheduler.schedule()
    scheduler.abort("first")
    assert (scheduler.pool.n_free, scheduler.pool.n_cached) == (16, 2)
    second = make_request("second", [*range(8), 9, 9, 9])
    scheduler.add(second)
    batch = scheduler.schedule()
    assert (batch.tokens, batch.positions) == ([9, 9, 9], [8, 9, 10])
    (seq,) = batch.seqs
    assert (seq.kv_len, seq.first, seq.samples, seq.draw_position) == (11, True, True, 11)
    assert seq.blocks[:2] == (0, 1) and seq.blocks[2] not in (0, 1)
    assert (first.n_cached, second.n_cached) == (0, 8)
    assert (scheduler.stats.prefix_queries, scheduler.stats.prefix_hits) == (21, 8)
    scheduler.check_integrity()


@pytest.mark.parametrize(("n_prompt", "n_cached"), [(4, 0), (5, 4), (8, 4), (9, 8)])
def test_the_last_token_of_a_prompt_always_runs(n_prompt, n_cached):
    scheduler = make_scheduler(max_rows=16)
    for name in ("first", "second"):
        scheduler.add(make_request(name, range(n_prompt)))
        batch = scheduler.schedule()
        end_all(scheduler)
    assert batch.tokens == list(range(n_cached, n_prompt))


def test_two_requests_admitted_together_share_the_blocks_that_the_first_one_fills_in_that_batch():
    scheduler = make_scheduler(max_rows=32)
    scheduler.add(make_request("a", range(10)))
    scheduler.add(make_request("b", [*range(9), 3]))
    batch = scheduler.schedule()
    assert names_and_rows(batch) == [("a", 10), ("b", 2)]
    assert batch.seqs[0].blocks[:2] == batch.seqs[1].blocks[:2]
    assert [scheduler.pool.ref_count(block) for block in range(4)] == [2, 2, 1, 1]
    scheduler.check_integrity()
    scheduler.abort("a")
    assert [scheduler.pool.ref_count(block) for block in range(4)] == [1, 1, 0, 1]
    scheduler.check_integrity()


def test_answers_are_found_again_in_the_next_prompt_of_the_conversation():
    scheduler = make_scheduler()
    a = make_request("a", [5, 6, 7], max_tokens=10)
    scheduler.add(a)
    for _ in range(10):
        step(scheduler, 8)
    assert a.status == "finished" and len(a.token_ids) == 13
    scheduler.add(make_request("b", [*a.token_ids, 1, 2]))
    batch = scheduler.schedule()  # the 13th token of a never ran
    assert (batch.tokens, batch.positions) == ([8, 1, 2], [12, 13, 14])


def test_a_block_of_an_answer_is_found_only_when_its_tokens_are_known():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [5, 6, 7]))
    batches = [scheduler.schedule() for _ in range(3)]
    assert scheduler.pool.digest(0) is None  # full, of a token that the device alone knows
    for batch in batches:
        scheduler.update(batch, [8])
    assert scheduler.pool.digest(0) is not None


def test_blocks_computed_twice_are_kept_once():
    scheduler = make_scheduler(max_rows=16)
    for name in "ab":
        scheduler.add(make_request(name, [5, 6, 7], max_tokens=6))
    for _ in range(6):
        batch, _ = step(scheduler, 8, 8)
        scheduler.check_integrity()
    assert not set(batch.seqs[0].blocks) & set(batch.seqs[1].blocks)
    assert not scheduler.has_work
    assert (scheduler.pool.n_free, scheduler.pool.n_cached) == (16, 2)


@pytest.mark.parametrize("other", [{"salt": b"other"}, {"adapter": 1}])
def test_another_salt_or_adapter_shares_nothing(other):
    scheduler = make_scheduler(max_rows=32)
    for name, options in (("a", {}), ("b", other), ("c", other)):
        scheduler.add(make_request(name, range(10), **options))
    assert names_and_rows(scheduler.schedule()) == [("a", 10), ("b", 10), ("c", 2)]
    scheduler.check_integrity()


def test_without_prefix_cache_every_prompt_runs_whole():
    scheduler = make_scheduler(max_rows=32, prefix_cache=False)
    scheduler.add(make_request("a", range(10)))
    scheduler.add(make_request("b", range(10)))
    assert names_and_rows(scheduler.schedule()) == [("a", 10), ("b", 10)]
    end_all(scheduler)
    assert scheduler.pool.n_cached == scheduler.stats.prefix_queries == 0


def test_empty_blocks_are_taken_before_cached_ones_and_of_these_the_ends_of_the_oldest():
    scheduler = make_scheduler(n_blocks=6, max_rows=32, max_context=16)
    for first in (1, 2):
        scheduler.add(make_request("old", [first] * 9, max_tokens=1))
        step(scheduler, 5)  # two full blocks, and one that is empty again
    assert (scheduler.pool.n_free, scheduler.pool.n_cached) == (6, 4)
    scheduler.add(make_request("new", [3] * 9, max_tokens=1))
    scheduler.schedule()  # two empty blocks, and the second of the first prompt
    assert scheduler.pool.n_cached == 3
    scheduler.abort("new")
    for first, n_rows in ((2, 1), (1, 5)):
        scheduler.add(make_request("again", [first] * 9, max_tokens=1))
        assert names_and_rows(scheduler.schedule()) == [("again", n_rows)]
        scheduler.abort("again")


def test_a_request_that_gave_way_goes_on_where_its_blocks_end():
    scheduler = make_scheduler(n_blocks=8, max_seqs=1, max_rows=16)
    low, high = make_request("low", 10), make_request("high", [3], priority=1, max_tokens=1)
    scheduler.add(low)
    step(scheduler, 5)
    scheduler.add(high)
    batch, _ = step(scheduler, 5)
    assert names_and_rows(batch) == [("high", 1)]
    batch = scheduler.schedule()
    assert names_and_rows(batch) == [("low", 3)] and batch.seqs[0].first
    assert (low.n_cached, low.n_preemptions, low.n_admissions) == (
        0,
        1,
        2,
    )  # n_cached is what the prompt saved


# ---- score and embed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["score", "embed"])
def test_a_prompt_that_is_scored_may_fill_the_context_and_ends_with_its_last_rows(task):
    scheduler = make_scheduler(max_context=12)
    scheduler.add(make_request("a", 12, task=task))
    batches = [scheduler.schedule(), scheduler.schedule()]
    assert scheduler.schedule() is None
    assert [batch.positions for batch in batches] == [list(range(8)), list(range(8, 12))]
    assert [(seq.task, seq.samples) for batch in batches for seq in batch.seqs] == [(task, False)] * 2
    assert scheduler.update(batches[0], [5]) == []
    assert scheduler.update(batches[1], [5]) == [Output("a", None, "stop")]
    assert not scheduler.has_work
    with pytest.raises(
        RequestError, match="has 13 tokens and the context 12: shorten the prompt to 12 tokens"
    ):
        scheduler.add(make_request("b", 13, task=task))


def test_a_prompt_that_is_scored_takes_nothing_from_the_prefix_cache_and_leaves_nothing():
    scheduler = make_scheduler(max_rows=32)
    for name, task in (("a", "generate"), ("b", "score"), ("c", "embed")):
        scheduler.add(make_request(name, range(10), task=task))
    assert names_and_rows(scheduler.schedule()) == [("a", 10), ("b", 10), ("c", 10)]
    scheduler.check_integrity()
    end_all(scheduler)
    assert scheduler.pool.n_cached == 2


# ---- when it may end ---------------------------------------------------------------------------------------


def test_before_min_tokens_a_stop_token_does_not_end_an_answer():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2], min_tokens=2, ignore_eos=False))
    assert [step(scheduler, EOG)[1] for _ in range(3)] == [
        [Output("a", EOG, None)],
        [Output("a", EOG, None)],
        [Output("a", EOG, "stop")],
    ]


def test_a_request_that_is_too_late_ends_with_timeout_and_frees_its_blocks():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1, 2]))
    scheduler.schedule()
    assert scheduler.finish("a", "timeout") == Output("a", None, "timeout")
    assert scheduler.pool.n_free == 16


# ---- a lost device -----------------------------------------------------------------------------------------


def test_after_a_reset_all_that_ran_runs_again_with_the_tokens_that_were_read_back():
    scheduler = make_scheduler(max_rows=16)
    a, b = make_request("a", [5, 6, 7, 8, 9]), make_request("b", [3])
    scheduler.add(a)
    scheduler.add(b)
    lost = [scheduler.schedule() for _ in range(3)]
    scheduler.update(lost[0], [1, 2])
    scheduler.reset()
    scheduler.check_integrity()
    assert (scheduler.n_running, scheduler.n_waiting, scheduler.pool.n_free) == (0, 2, 16)
    assert scheduler.update(lost[1], [4, 4]) == []
    batch = scheduler.schedule()
    assert batch.tokens == [5, 6, 7, 8, 9, 1, 3, 2]
    assert [seq.first for seq in batch.seqs] == [True, True]
    assert scheduler.update(lost[2], [4, 4]) == []
    assert scheduler.update(batch, [9, 9]) == [Output("a", 9, None), Output("b", 9, None)]
    assert (a.output_ids, b.output_ids, a.n_preemptions, a.n_cached) == ([1, 9], [2, 9], 0, 0)


def test_the_unfinished_requests_and_the_figures_are_there_to_be_looked_at():
    scheduler = make_scheduler(max_seqs=1)
    a, b = make_request("a", 6), make_request("b", 6)
    scheduler.add(a)
    scheduler.add(b)
    scheduler.schedule()
    assert scheduler.requests == (a, b)
    assert scheduler.stats == Stats(
        n_running=1, n_waiting=1, n_blocks_free=14, n_blocks_cached=0,
        prefix_queries=6, prefix_hits=0, n_preemptions=0,
    )  # fmt: skip
    scheduler.abort("a")
    assert scheduler.requests == (b,)
    assert (scheduler.stats.n_blocks_free, scheduler.stats.n_blocks_cached) == (16, 1)


# ---- priorities --------------------------------------------------------------------------------------------


def test_of_those_that_wait_the_highest_priority_comes_first_and_then_the_oldest():
    scheduler = make_scheduler(max_seqs=1)
    for name, priority in (("a", 0), ("b", -1), ("c", 2), ("d", 0), ("e", 2)):
        scheduler.add(make_request(name, [1], priority=priority, max_tokens=1))
    assert [step(scheduler, 5)[1][0].request_id for _ in range(5)] == list("ceadb")


def test_prompts_get_the_rows_of_a_step_in_the_order_of_priority_even_before_they_run():
    scheduler = make_scheduler(max_rows=8, n_blocks=32)
    scheduler.add(make_request("a", 20))
    assert names_and_rows(scheduler.schedule()) == [("a", 8)]
    scheduler.add(make_request("b", 10, priority=1))
    assert names_and_rows(scheduler.schedule()) == [("b", 8)]
    assert names_and_rows(scheduler.schedule()) == [("b", 2), ("a", 6)]
    assert names_and_rows(scheduler.schedule()) == [("b", 1), ("a", 6)]


def test_a_request_of_higher_priority_takes_the_slot_of_the_lowest_and_youngest():
    scheduler = make_scheduler(max_seqs=3)
    for name, priority in (("a", 0), ("b", 1), ("c", 0)):
        scheduler.add(make_request(name, [1], priority=priority))
    step(scheduler, 5, 5, 5)
    scheduler.add(make_request("d", [3], priority=1))
    batch, _ = step(scheduler, 5, 5, 5)
    assert [seq.request_id for seq in batch.seqs] == ["b", "d", "a"]
    scheduler.add(make_request("e", [3]))
    assert [seq.request_id for seq in step(scheduler, 5, 5, 5)[0].seqs] == ["b", "d", "a"]
    assert (scheduler.get("c").n_yielded, scheduler.stats.n_preemptions) == (1, 1)
    scheduler.check_integrity()


def test_a_request_in_flight_gives_way_when_its_steps_are_done_and_gets_no_more_rows_until_then():
    scheduler = make_scheduler(max_seqs=1)
    scheduler.add(make_request("low", [1]))
    batches = [scheduler.schedule(), scheduler.schedule()]
    scheduler.add(make_request("high", [3], priority=1, max_tokens=1))
    assert scheduler.schedule() is None
    assert scheduler.update(batches[0], [5]) == [Output("low", 5, None)]
    assert scheduler.schedule() is None
    assert scheduler.update(batches[1], [6]) == [Output("low", 6, None)]
    assert step(scheduler, 7)[1] == [Output("high", 7, "length")]
    assert scheduler.schedule().tokens == [1, 5, 6]


def test_as_many_give_way_as_the_blocks_need_and_nobody_if_that_is_not_enough():
    def running():
        scheduler = make_scheduler(n_blocks=11, max_rows=32)
        for name, n, priority in (("a", 12, 2), ("b", 8, 0), ("c", 8, 0)):
            scheduler.add(make_request(name, n, priority=priority))
        batch, _ = step(scheduler, 5, 5, 5)
        assert len(batch.seqs) == 3 and scheduler.pool.n_free == 4
        return scheduler

    scheduler = running()
    scheduler.add(make_request("d", 14, priority=1))
    batch, _ = step(scheduler, 5, 5, 5)
    assert [seq.request_id for seq in batch.seqs] == ["a", "b", "d"]
    scheduler = running()
    scheduler.add(make_request("d", 21, priority=1))
    assert [seq.request_id for seq in step(scheduler, 5, 5)[0].seqs] == ["a", "d"]
    scheduler = running()
    scheduler.add(make_request("d", 30, priority=1))
    assert [seq.request_id for seq in step(scheduler, 5, 5, 5)[0].seqs] == ["a", "b", "c"]


def test_blocks_that_are_shared_with_those_that_give_way_are_not_won_by_it():
    scheduler = make_scheduler(n_blocks=8, max_rows=32)
    scheduler.add(make_request("top", 8, priority=2))
    scheduler.add(make_request("low", [3] * 8))
    step(scheduler, 5, 5)
    scheduler.add(make_request("a", [3] * 21, priority=1))  # four blocks besides those of low, one for top
    assert [seq.request_id for seq in step(scheduler, 5, 5)[0].seqs] == ["top", "low"]
    assert scheduler.stats.n_preemptions == 0


def test_nobody_gives_way_twice_to_the_same_level():
    scheduler = make_scheduler(max_seqs=1)
    low = make_request("low", [1])
    scheduler.add(low)
    step(scheduler, 5)
    order = []
    for name, priority in (("b", 1), ("c", 1), ("d", 2)):
        scheduler.add(make_request(name, [3], priority=priority, max_tokens=1))
        order += [step(scheduler, 5)[0].seqs[0].request_id for _ in range(3)]
    assert order == ["b", "low", "low", "low", "low", "low", "d", "c", "low"]
    assert (low.level, low.holds, low.n_yielded) == (0, 2, 2)


def test_when_blocks_run_out_the_lowest_priority_gives_way_though_it_is_older():
    scheduler = make_scheduler(n_blocks=4, max_context=16)
    low, high = make_request("low", 3, priority=-1), make_request("high", 3)
    scheduler.add(low)
    scheduler.schedule()
    scheduler.add(high)
    scheduler.reset()
    device = FakeDevice(scheduler)
    while low.n_preemptions == 0:
        batch = scheduler.schedule()
        scheduler.update(batch, device.submit(batch))
    assert high.n_preemptions == 0 and low.n_yielded == 0
    while batch := scheduler.schedule():
        scheduler.update(batch, device.submit(batch))
    assert [low.output_ids, high.output_ids] == [alone(low, 16)[0], alone(high, 16)[0]]


@pytest.mark.parametrize("priority", [-11, 11, 0.5, True, "high"])
def test_a_priority_outside_of_the_range_is_an_error(priority):
    with pytest.raises(RequestError, match=f"priority is {priority!r}: give a whole number from -10 to 10"):
        make_request("a", [1], priority=priority)


def test_an_unknown_task_is_an_error():
    with pytest.raises(RequestError, match="task is 'sing': use generate, score, embed"):
        make_request("a", [1], task="sing")


def test_prompts_take_no_more_rows_from_a_step_with_answers_than_they_may():
    scheduler = make_scheduler(max_rows=8, n_blocks=32, prompt_rows_with_decodes=3)
    scheduler.add(make_request("a", 10, max_tokens=2))
    assert names_and_rows(scheduler.schedule()) == [("a", 8)]
    scheduler.add(make_request("b", 14))
    assert names_and_rows(scheduler.schedule()) == [("a", 2), ("b", 6)]
    assert names_and_rows(scheduler.schedule()) == [("a", 1), ("b", 3)]
    assert names_and_rows(scheduler.schedule()) == [("b", 5)]
    with pytest.raises(ValueError, match="prompt_rows_with_decodes 0: must be at least 1"):
        make_scheduler(prompt_rows_with_decodes=0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s._running.reverse(), "running out of order"),
        (lambda s: s._requests.pop("c"), "listed .*'c'"),
        (lambda s: s._free_slots.append(0), "slots in use and free"),
        (
            lambda s: setattr(s.get("b"), "blocks", s.get("a").blocks),
            "block 0 has 2 holders and 1 references",
        ),
        (lambda s: s.pool.allocate(1), "block 3 has 0 holders and 1 references"),
        (lambda s: setattr(s.get("c"), "n_scheduled", 1), "c waits with"),
        (lambda s: setattr(s.get("a"), "status", "waiting"), "a runs and is waiting"),
        (lambda s: setattr(s.get("a"), "n_scheduled", 9), "a: 9 tokens in room for 8"),
        (lambda s: setattr(s.get("a"), "n_scheduled", 8), "a: 7 of 32 tokens"),
        (lambda s: setattr(s.get("a"), "limit", 6), "a: 7 of 6 tokens"),
        (lambda s: setattr(s.get("a"), "n_in_flight", 2), "a: 2 steps, not 1"),
        (lambda s: setattr(s.get("a"), "n_pending", 2), "a: 2 tokens of 1 steps"),
    ],
)
def test_check_integrity_names_what_is_wrong(spoil, message):
    scheduler = make_scheduler(max_seqs=2)
    for name, n in (("a", 6), ("b", 2), ("c", 1)):
        scheduler.add(make_request(name, n))
    scheduler.schedule()
    scheduler.check_integrity()
    spoil(scheduler)
    with pytest.raises(AssertionError, match=message):
        scheduler.check_integrity()


# ---- alone and batched -------------------------------------------------------------------------------------

REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 40),  # arrives after so many steps
        st.lists(st.integers(1, N_VOCAB - 1), min_size=1, max_size=23),
        st.one_of(st.none(), st.integers(1, 24)),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(
    REQUESTS,
    st.integers(1, 4),
    st.integers(0, 6),
    st.integers(1, 5),
    st.integers(1, 16),
    st.integers(1, 8),
)
@settings(max_examples=300, deadline=None)
def test_every_request_gets_the_tokens_it_gets_alone(specs, block_size, n_spare, max_seqs, max_rows, depth):
    max_context = 24
    n_blocks = -(-max_context // block_size) + n_spare
    scheduler = make_scheduler(
        n_blocks=n_blocks,
        block_size=block_size,
        max_seqs=max_seqs,
        max_rows=max_rows,
        max_context=max_context,
    )
    arrivals = [
        (when, make_request(f"r{i}", prompt, max_tokens=max_tokens, ignore_eos=ignore_eos))
        for i, (when, prompt, max_tokens, ignore_eos) in enumerate(specs)
    ]
    outputs = run_to_the_end(scheduler, depth, arrivals)
    for _, request in arrivals:
        tokens, reason = alone(request, max_context)
        assert [output.token_id for output in outputs[request.id]] == tokens
        assert [output.finish_reason for output in outputs[request.id]] == [None] * (len(tokens) - 1) + [
            reason
        ]
        assert request.output_ids == tokens


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_two_thousand_requests_on_a_small_pool_are_all_answered_as_alone(prefix_cache):
    rng = random.Random(5)
    scheduler = make_scheduler(
        n_blocks=22,
        max_seqs=8,
        max_rows=24,
        max_context=48,
        prefix_cache=prefix_cache,
        tenant_weights={"a": 3},
        aging=200,
    )
    prefixes = [[rng.randrange(1, N_VOCAB) for _ in range(rng.randint(4, 30))] for _ in range(6)]
    arrivals = [
        (
            rng.randrange(6000),
            make_request(
                f"r{i}",
                rng.choice([[], *prefixes]) + [rng.randrange(1, N_VOCAB) for _ in range(rng.randint(1, 17))],
                max_tokens=rng.choice([None, 1, 4, 16]),
                min_tokens=rng.choice([0, 1]),
                ignore_eos=rng.random() < 0.5,
                task=rng.choice(["generate"] * 8 + ["score", "embed"]),
                priority=rng.choice([0] * 6 + [-10, 1, 10]),
                tenant=rng.choice("abc"),
                salt=rng.choice([b"", b"", b"salt"]),
                adapter=rng.choice([0, 0, 1]),
            ),
        )
        for i in range(2000)
    ]
    outputs = run_to_the_end(scheduler, 4, arrivals)
    for _, request in arrivals:
        tokens, reason = alone(request, 48)
        assert [o.token_id for o in outputs[request.id] if o.token_id is not None] == tokens
        assert outputs[request.id][-1].finish_reason == request.finish_reason == reason
    stats = scheduler.stats
    assert stats.n_preemptions == sum(request.n_preemptions for _, request in arrivals) > 20
    assert any(request.n_yielded for _, request in arrivals)
    assert (stats.n_running, stats.n_waiting, stats.n_blocks_free) == (0, 0, 22)
    assert stats.prefix_hits == sum(request.n_cached for _, request in arrivals)
    assert (
        (stats.prefix_hits > 1000) if prefix_cache else (stats.prefix_queries == stats.n_blocks_cached == 0)
    )


# ---- any order of everything -------------------------------------------------------------------------------


class Engine(RuleBasedStateMachine):
    """Everything one can do, in any order, up to 8 steps ahead, on a pool of few blocks."""

    def __init__(self):
        super().__init__()
        self.in_flight: deque[tuple[Batch, list[int]]] = deque()
        self.requests: list[Request] = []
        self.answers: dict[int, list[int]] = {}

    @initialize(
        block_size=st.integers(1, 4),
        n_spare=st.integers(0, 4),
        max_seqs=st.integers(1, 4),
        max_rows=st.integers(1, 9),
        prefix_cache=st.sampled_from([True, True, False]),
        prompt_rows=st.sampled_from([None, 1, 3]),
        aging=st.sampled_from([1, 8, 1000]),
    )
    def open(self, block_size, n_spare, max_seqs, max_rows, prefix_cache, prompt_rows, aging):
        self.max_context = 16
        self.scheduler = make_scheduler(
            n_blocks=-(-self.max_context // block_size) + n_spare,
            block_size=block_size,
            max_seqs=max_seqs,
            max_rows=max_rows,
            max_context=self.max_context,
            prefix_cache=prefix_cache,
            prompt_rows_with_decodes=prompt_rows,
            tenant_weights={"a": 2.5},
            aging=aging,
        )
        self.device = FakeDevice(self.scheduler)

    @rule(
        name=st.sampled_from("abcdef"),
        prefix=st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]),
        prompt=st.lists(st.integers(1, 2), max_size=9),
        max_tokens=st.one_of(st.none(), st.integers(1, 20)),
        min_tokens=st.integers(0, 1),
        ignore_eos=st.booleans(),
        task=st.sampled_from(["generate", "generate", "generate", "score", "embed"]),
        priority=st.sampled_from([0, 0, 0, 1, 10, -10]),
        tenant=st.sampled_from("ab"),
        salt=st.sampled_from([b"", b"", b"x"]),
        adapter=st.sampled_from([0, 0, 1]),
    )
    def add(self, name, prefix, prompt, **options):
        request = make_request(name, prefix + prompt, **options)
        n_prompt, n_room = len(request.prompt_ids), self.max_context - request.generates
        if not 0 < n_prompt <= n_room or self.scheduler.get(name):
            with pytest.raises(RequestError):
                self.scheduler.add(request)
            return
        self.scheduler.add(request)
        self.requests.append(request)
        self.answers[request.arrival] = []

    @precondition(lambda self: len(self.in_flight) < 8)
    @rule(n=st.integers(1, 8))
    def schedule(self, n):
        for _ in range(min(n, 8 - len(self.in_flight))):
            self.schedule_one()

    def schedule_one(self):
        batch = self.scheduler.schedule()
        if batch is None:
            assert self.in_flight or not self.scheduler.has_work, "stuck"
            return
        assert 0 < batch.n_rows <= self.scheduler.max_rows
        slots = [seq.slot for seq in batch.seqs]
        assert len(set(slots)) == len(slots)
        self.device.check_positions(batch)
        self.in_flight.append((batch, self.device.submit(batch)))

    @precondition(lambda self: self.in_flight)
    @rule()
    def update(self):
        batch, sampled = self.in_flight.popleft()
        live = {seq.request_id: self.scheduler.get(seq.request_id) for seq in batch.seqs}
        for output in self.scheduler.update(batch, sampled):
            request = live[output.request_id]
            if output.token_id is not None:
                self.answers[request.arrival].append(output.token_id)
            assert (request.status == "finished") == (output.finish_reason is not None)
            assert request.finish_reason == output.finish_reason

    @rule(name=st.sampled_from("abcdef"), reason=st.sampled_from(["stop", "length", "abort", "timeout"]))
    def end(self, name, reason):
        request = self.scheduler.get(name)
        output = self.scheduler.abort(name) if reason == "abort" else self.scheduler.finish(name, reason)
        assert output == (request and Output(name, None, reason))
        if request:
            assert (request.status, request.finish_reason) == ("finished", reason)

    @rule()
    def lose_the_device(self):
        self.scheduler.reset()
        lost = [batch for batch, _ in self.in_flight]
        self.in_flight.clear()
        self.device.cells.clear()
        self.device.slots.clear()
        assert self.scheduler.n_running == self.scheduler.pool.n_cached == 0
        assert all(self.scheduler.update(batch, [5] * len(batch.seqs)) == [] for batch in lost)

    @rule()
    def clear_the_cache(self):
        self.scheduler.pool.clear_cache()

    @invariant()
    def the_books_agree(self):
        if self.requests:
            self.scheduler.check_integrity()

    @invariant()
    def every_answer_is_a_beginning_of_the_one_alone(self):
        for request in self.requests:
            answer = self.answers[request.arrival]
            tokens, reason = alone(request, self.max_context)
            assert answer == request.output_ids == tokens[: len(answer)]
            if answer == tokens and request.generates:
                assert request.finish_reason == reason

    def teardown(self):
        if not self.requests:
            return
        for _ in range(10_000):
            if not self.in_flight and not self.scheduler.has_work:
                break
            self.schedule_one()
            if self.in_flight:
                self.update()
            self.the_books_agree()
        self.every_answer_is_a_beginning_of_the_one_alone()
        assert all(request.status == "finished" for request in self.requests)
        assert self.scheduler.pool.n_free == self.scheduler.pool.n_blocks


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
