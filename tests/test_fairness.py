"""Shares of tenants, and how long the lowest priority waits: the bounds, as properties of random traffic.

Nothing is computed here: every sampled token is the same, and requests end by their length. What a request
costs is therefore known beforehand, and so are the bounds.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import make_request, make_scheduler, step

from realm_web.fairness import OUTPUT_COST, PROMPT_COST, WaitingLine
from realm_web.scheduler import Batch, Scheduler


class Traffic:
    """A scheduler that is fed, stepped and watched."""

    def __init__(self, scheduler: Scheduler, seed: int, longest: tuple[int, int]):
        self.scheduler = scheduler
        self.rng = random.Random(seed)
        self.longest_prompt, self.longest_answer = longest
        self.in_flight: deque[Batch] = deque()
        self.names = map(str, itertools.count())
        self.service: Counter[str] = Counter()  # cost by tenant, counted from the batches
        self.paid: Counter[str] = Counter()  # tokens of a request that were counted
        self.turns: list[int] = []  # levels that the last batch admitted a request of

    @property
    def longest_cost(self) -> int:
        return PROMPT_COST * self.longest_prompt + OUTPUT_COST * self.longest_answer

    def add(self, tenant: str, priority: int = 0):
        request = make_request(
            next(self.names),
            [self.rng.randrange(11) for _ in range(self.rng.randint(1, self.longest_prompt))],
            max_tokens=self.rng.randint(1, self.longest_answer),
            tenant=tenant,
            priority=priority,
        )
        self.scheduler.add(request)
        return request

    def n_waiting(self, tenant: str, priority: int = 0) -> int:
        return sum(
            r.status == "waiting" and (r.tenant, r.priority) == (tenant, priority)
            for r in self.scheduler.requests
        )

    def backlog(self, tenant: str, n: int, priority: int = 0) -> None:
        """At least n waiting requests of a tenant: more than one step can admit."""
        for _ in range(n - self.n_waiting(tenant, priority)):
            self.add(tenant, priority)

    def step(self, depth: int = 1) -> None:
        """One more batch, and the update of the one `depth - 1` before it."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self._count(batch)
            self.in_flight.append(batch)
        if len(self.in_flight) >= depth or (batch is None and self.in_flight):
            done = self.in_flight.popleft()
            self.scheduler.update(done, [1] * len(done.seqs))

    def _count(self, batch: Batch) -> None:
        self.turns.clear()
        for seq in batch.seqs:
            request = self.scheduler.get(seq.request_id)
            if seq.first:
                self.turns.append(request.priority if request.n_admissions == 1 else request.level)
            paid = max(self.paid[request.id], request.n_start)
            n_prompt, now = len(request.prompt_ids), seq.kv_len + seq.samples
            prompt = max(0, min(now, n_prompt) - min(paid, n_prompt))
            answer = max(0, max(now, n_prompt) - max(paid, n_prompt))
            self.service[request.tenant] += PROMPT_COST * prompt + OUTPUT_COST * answer
            self.paid[request.id] = max(paid, now)


SIZES = {
    "block_size": st.integers(1, 8),
    "n_spare": st.integers(0, 20),
    "max_seqs": st.integers(1, 8),
    "max_rows": st.integers(1, 32),
    "depth": st.integers(1, 4),
    "seed": st.integers(0, 2**32),
}


def open_traffic(*, block_size, n_spare, max_seqs, max_rows, seed, longest=(20, 12), **options) -> Traffic:
    n_blocks = -(-32 // block_size) + n_spare
    scheduler = make_scheduler(
        n_blocks=n_blocks, block_size=block_size, max_seqs=max_seqs, max_rows=max_rows, **options
    )
    return Traffic(scheduler, seed, longest)


# ---- shares ------------------------------------------------------------------------------------------------


@given(weights=st.tuples(*[st.sampled_from([0.5, 1, 3])] * 2), prefix_cache=st.booleans(), **SIZES)
@settings(max_examples=40, deadline=None)
def test_tenants_that_always_wait_are_served_alike_over_any_stretch_of_time(
    weights, prefix_cache, depth, **sizes
):
    """Whoever else comes and goes. The bound is that of the module's text, for whatever fits the slots."""
    w = dict(zip("fg", weights, strict=True))
    traffic = open_traffic(tenant_weights=w, prefix_cache=prefix_cache, **sizes)
    n_most = traffic.scheduler._most
    differences = []
    for i in range(300):
        for tenant in w:
            traffic.backlog(tenant, n_most + 1)
        if i % 50 < 10 and traffic.n_waiting("other") < 3:
            traffic.add("other")
        traffic.step(depth)
        differences.append(traffic.service["f"] / w["f"] - traffic.service["g"] / w["g"])
    assert min(traffic.service[tenant] for tenant in w) > 0
    bound = n_most * traffic.longest_cost * (1 / w["f"] + 1 / w["g"])
    assert max(differences) - min(differences) <= bound + 1e-6


def test_shares_are_in_proportion_to_the_weights():
    traffic = open_traffic(
        block_size=4, n_spare=8, max_seqs=4, max_rows=16, seed=1, tenant_weights={"b": 3, "c": 0.5}
    )
    for _ in range(6000):
        for tenant in "abc":
            traffic.backlog(tenant, 5)
        traffic.step()
    shares = [traffic.service[tenant] / sum(traffic.service.values()) for tenant in "abc"]
    assert shares == pytest.approx([1 / 4.5, 3 / 4.5, 0.5 / 4.5], abs=0.01)


@pytest.mark.parametrize("waits", [True, False])
def test_a_tenant_that_was_idle_has_saved_nothing_up(waits):
    traffic = open_traffic(block_size=4, n_spare=8, max_seqs=2, max_rows=16, seed=2)
    traffic.add("g")
    for _ in range(500):
        traffic.backlog("f", 3)
        traffic.step()
    while not waits and traffic.scheduler.has_work:  # g comes back when nobody waits
        traffic.step()
    before = traffic.service.copy()
    for _ in range(60):
        for tenant in "fg":
            traffic.backlog(tenant, 3)
        traffic.step()
    gained = {tenant: traffic.service[tenant] - before[tenant] for tenant in "fg"}
    assert abs(gained["f"] - gained["g"]) <= 2 * 2 * traffic.longest_cost
    assert min(gained.values()) > 0.3 * sum(gained.values())


def test_a_tenant_pays_for_every_token_once_and_for_none_of_the_cache():
    scheduler = make_scheduler(n_blocks=8, max_seqs=1, max_rows=8)
    a = make_request("a", 10, max_tokens=4)
    scheduler.add(a)
    account = a.account
    step(scheduler, 5)
    assert account.counter == 8 * PROMPT_COST
    scheduler.add(make_request("b", [3], priority=1, max_tokens=1, tenant="other"))
    step(scheduler, 5)  # a gives way
    assert (a.n_preemptions, account.counter) == (1, 8 * PROMPT_COST)
    for _ in range(4):
        step(scheduler, 5)
    assert a.status == "finished"
    assert account.counter == 10 * PROMPT_COST + 4 * OUTPUT_COST
    scheduler.add(make_request("c", a.prompt_ids, max_tokens=1))
    step(scheduler, 5)
    assert account.counter == 12 * PROMPT_COST + 5 * OUTPUT_COST


def test_what_two_ways_of_counting_say_is_the_same():
    traffic = open_traffic(block_size=2, n_spare=6, max_seqs=4, max_rows=9, seed=3)
    accounts = {}
    for _ in range(1000):
        for tenant in "fg":
            traffic.backlog(tenant, 5)
        traffic.step(3)
        for request in traffic.scheduler.requests:
            accounts[request.tenant] = request.account
    assert traffic.scheduler.stats.n_preemptions > 10
    assert {tenant: account.counter for tenant, account in accounts.items()} == dict(traffic.service)


def test_the_accounts_of_tenants_that_went_are_dropped():
    scheduler = make_scheduler(max_seqs=2)
    for i in range(1000):
        scheduler.add(make_request("a", [1, 2], max_tokens=1, tenant=f"t{i}"))
        step(scheduler, 5)
    assert len(scheduler._waiting._accounts) <= 65


# ---- priorities and aging ----------------------------------------------------------------------------------


@given(
    levels=st.lists(st.integers(-3, 10), min_size=2, max_size=4, unique=True),
    aging=st.sampled_from([1, 20, 100, 500]),
    **SIZES,
)
@settings(max_examples=40, deadline=None)
def test_every_level_gets_its_turn_within_the_bound_whatever_comes_above_it(levels, aging, depth, **sizes):
    """With every level always waiting. Between two turns of a level lies at most what ages it to the top,
    one step in which that happens, and for its own turn and that of each other level what was running.
    """
    traffic = open_traffic(aging=aging, longest=(12, 6), **sizes)
    scheduler = traffic.scheduler
    most, top = scheduler._most, max(levels)
    running = most * traffic.longest_cost
    one_step = OUTPUT_COST * scheduler.max_rows
    bound = {level: aging * (top - level) + one_step + len(levels) * (running + one_step) for level in levels}
    last = dict.fromkeys(levels, 0)
    longest = sum(bound.values())
    while (served := sum(traffic.service.values())) < 2 * longest:
        for level in levels:
            traffic.backlog("", most + 1, level)
        traffic.step(depth)
        last |= dict.fromkeys(traffic.turns, served)
        for level in levels:
            assert served - last[level] <= bound[level], f"level {level} of {levels}"


@given(n_low=st.integers(1, 3), distance=st.integers(1, 20), aging=st.sampled_from([1, 50, 300]), **SIZES)
@settings(max_examples=40, deadline=None)
def test_the_lowest_priority_ends_too_though_higher_ones_never_stop_coming(
    n_low, distance, aging, depth, **sizes
):
    traffic = open_traffic(aging=aging, longest=(12, 6), **sizes)
    scheduler = traffic.scheduler
    traffic.backlog("", scheduler._most + 1, distance - 10)
    traffic.step(depth)
    low = [traffic.add("low", -10) for _ in range(n_low)]
    running = scheduler._most * traffic.longest_cost
    bound = aging * distance + 2 * running + 4 * OUTPUT_COST * scheduler.max_rows
    start = sum(traffic.service.values())
    for i, request in enumerate(low):
        while request.n_admissions == 0:
            traffic.backlog("", scheduler._most + 1, distance - 10)
            traffic.step(depth)
            assert sum(traffic.service.values()) - start <= (i + 1) * bound
    for _ in range(2000):
        traffic.backlog("", scheduler._most + 1, distance - 10)
        traffic.step(depth)
    assert all(request.status == "finished" for request in low)


def test_within_a_level_that_ages_the_shares_of_tenants_stay():
    traffic = open_traffic(block_size=4, n_spare=8, max_seqs=2, max_rows=16, seed=4, aging=50)
    for _ in range(20):
        traffic.add("flood")  # older than all that the other one sends
    for _ in range(4000):
        traffic.backlog("high", 3, priority=1)
        for tenant in ("flood", "other"):
            traffic.backlog(tenant, 3)
        traffic.step()
    assert traffic.service["high"] > traffic.service["flood"]
    assert abs(traffic.service["flood"] - traffic.service["other"]) <= 4 * traffic.longest_cost


def test_a_request_admitted_by_aging_does_not_give_way_to_those_it_came_before():
    scheduler = make_scheduler(max_seqs=1, aging=10)
    scheduler.add(make_request("low", [1, 2, 3], max_tokens=5))
    for i in range(4):
        scheduler.add(make_request(f"high{i}", [1], priority=1, max_tokens=3))
    order = [batch.seqs[0].request_id for batch in iter(lambda: step_or_none(scheduler), None)]
    assert [name for name, _ in itertools.groupby(order)] == ["high0", "high1", "low", "high2", "high3"]


def step_or_none(scheduler: Scheduler) -> Batch | None:
    return step(scheduler, 5)[0] if scheduler.has_work else None


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_no_number_above_zero_is_an_error(weight):
    with pytest.raises(ValueError, match=r"tenant 'a' has the weight .*: must be a number above 0"):
        make_scheduler(tenant_weights={"a": weight})


def test_aging_by_nothing_is_an_error():
    with pytest.raises(ValueError, match="aging 0: must be at least 1"):
        WaitingLine({}, 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda line, r: setattr(line, "_n", 1), "1 waiting, 2 in line"),
        (lambda line, r: setattr(r, "level", 3), "a of level 3 waits at 0"),
        (lambda line, r: setattr(r.account, "n_waiting", 7), "'' has 2 waiting, not 7"),
        (lambda line, r: line._accounts.clear(), "the account of '' is gone"),
        (lambda line, r: next(iter(line._levels[0].lines.values())).move_to_end(0), "of the order"),
        (lambda line, r: setattr(r, "account", None), "a waits in the line of ''"),
    ],
)
def test_check_integrity_of_the_line_names_what_is_wrong(spoil, message):
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add(make_request(name, [1]))
    scheduler.check_integrity()
    spoil(scheduler._waiting, scheduler.get("a"))
    with pytest.raises(AssertionError, match=message):
        scheduler.check_integrity()
