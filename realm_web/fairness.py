"""Who is next: priorities, weighted fair shares of tenants, and aging, over the requests that wait.

Among requests of one level (their priority, to begin with) the tenant that was served least comes first, and
of its requests the oldest. Service is counted by virtual token counters (Sheng et al., "Fairness in Serving
Large Language Models", OSDI 2024): every token that is run for a tenant adds its cost over the tenant's
weight, and a tenant that had nothing waiting starts again no lower than those that had, so that idling saves
nothing up.

Two tenants that always have requests waiting differ, over any stretch of time, by at most twice the cost of
all that one of them can have running at once (over its weight): while one is ahead, only the other is
admitted.

Levels age as wholes, so that aging leaves the shares of tenants within a level alone. While requests of a
level wait and others of higher levels are served, the level gains one for each `aging` units of that service,
up to the highest level that waits. There levels take turns, the one whose turn is longest ago first: one
request is admitted, which stays at that height, and the level is back where it was. So the first in line of
level p is admitted after at most aging * (top - p) units of service to higher levels, and then one turn of
each other level that waits; a turn comes whenever a slot and blocks come free.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import takewhile

from .request import MAX_PRIORITY, Request

# An output token takes a row of a forward pass as a prompt token does, but of one that reads all weights for
# few rows, and the output matrix and the sampling are run for it. Twice is what the paper takes. Prompt
# tokens from the prefix cache cost nothing: the device does nothing for them, and tenants should be glad to
# share prefixes.
PROMPT_COST = 1
OUTPUT_COST = 2
# Service to higher levels that raises waiting ones by a level, in prompt tokens: that of a hundred requests,
# so that a level gets about one admission in a hundred from the next higher one; seconds of a large GPU,
# minutes of a small one. In tokens and not in seconds, as this knows no clock.
AGING = 65536


class Account:
    """What a tenant was served, and how much of it waits."""

    __slots__ = ("counter", "n_requests", "n_waiting", "name", "weight")

    def __init__(self, name: str, weight: float):
        self.name = name
        self.weight = weight
        self.counter = 0.0  # cost of the service, over the weight
        self.n_waiting = 0
        self.n_requests = 0  # that are not finished


class _Level:
    """The waiting requests of one level: of each tenant in the order of arrival."""

    __slots__ = ("lines", "since", "turn")

    def __init__(self):
        self.lines: dict[Account, OrderedDict[int, Request]] = {}
        self.turn = 0  # admissions before it last had its turn, or nothing waiting
        self.since = 0  # service to higher levels up to then


class WaitingLine:
    """The waiting requests, and the accounts of all tenants."""

    def __init__(self, weights: Mapping[str, float], aging: int):
        for tenant, weight in weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"tenant {tenant!r} has the weight {weight}: must be a number above 0")
        if aging < 1:
            raise ValueError(f"aging {aging}: must be at least 1")
        self._weights = dict(weights)
        self._aging = aging
        self._accounts: dict[str, Account] = {}
        self._sweep_at = 64  # accounts at which those that make no difference are dropped
        self._last: Account | None = None  # of the request that was admitted last
        self._levels: dict[int, _Level] = {}
        self._served = [0] * (2 * MAX_PRIORITY + 1)  # cost by level, from -MAX_PRIORITY on
        self._n = 0
        self._n_admitted = 0

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Request]:
        """In no particular order."""
        for level in self._levels.values():
            for line in level.lines.values():
                yield from line.values()

    def account(self, tenant: str) -> Account:
        """The account of a tenant that has a new request."""
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._sweep()
            account = self._accounts[tenant] = Account(tenant, self._weights.get(tenant, 1.0))
        account.n_requests += 1
        return account

    def close(self, request: Request) -> None:
        """A request of this account has ended, and does not wait."""
        request.account.n_requests -= 1

    def charge(self, request: Request, cost: int) -> None:
        """Rows of a request are run."""
        account = request.account
        account.counter += cost / account.weight
        self._served[request.level + MAX_PRIORITY] += cost

    def push(self, request: Request) -> None:
        """A new request, or one that ran before and goes ahead of the younger ones of its tenant."""
        account = request.account
        if account.n_waiting == 0:
            account.counter = max(account.counter, self._least())
        account.n_waiting += 1
        self._n += 1
        level = self._levels.get(request.level)
        if level is None:
            level = self._levels[request.level] = _Level()
            self._begin(request.level, level)
        line = level.lines.setdefault(account, OrderedDict())
        ran_before = request.arrival < next(reversed(line), -1)
        older = list(takewhile(lambda arrival: arrival < request.arrival, line)) if ran_before else []
        line[request.arrival] = request
        if ran_before:
            for arrival in (request.arrival, *reversed(older)):
                line.move_to_end(arrival, last=False)

    def remove(self, request: Request) -> None:
        """A waiting request has ended."""
        account, level = request.account, self._levels[request.level]
        line = level.lines[account]
        del line[request.arrival]
        if not line:
            del level.lines[account]
        if not level.lines:
            del self._levels[request.level]
        account.n_waiting -= 1
        self._n -= 1

    def admit(self, request: Request, level: int) -> None:
        """A waiting request runs, at the level that `first` gave it; its old level has had its turn."""
        waited_at = self._levels[request.level]
        self.remove(request)
        self._n_admitted += 1
        self._begin(request.level, waited_at)
        request.level = level
        self._last = request.account

    def first(self) -> tuple[Request, int] | None:
        """The request that is next, and the level at which it is: the highest, by itself or by aging."""
        if not self._levels:
            return None
        top = self.top
        at_the_top = [number for number in self._levels if self._aged(number, top) == top]
        number = min(at_the_top, key=lambda number: (self._levels[number].turn, number))
        lines = self._levels[number].lines
        account = min(lines, key=lambda account: (account.counter, next(iter(lines[account]))))
        return next(iter(lines[account].values())), top

    @property
    def top(self) -> int:
        """The highest level that waits."""
        return max(self._levels)

    def check_integrity(self) -> None:
        """AssertionError naming what is wrong, if the counts disagree with the lines."""
        assert self._n == sum(1 for _ in self), f"{self._n} waiting, {sum(1 for _ in self)} in line"
        n_waiting: dict[Account, int] = {}
        for number, level in self._levels.items():
            assert level.lines, f"level {number} is empty"
            for account, line in level.lines.items():
                assert self._accounts.get(account.name) is account, f"the account of {account.name!r} is gone"
                assert line, f"the line of {account.name!r} at level {number} is empty"
                assert list(line) == sorted(line), (
                    f"{account.name!r} is out of the order of arrival: {list(line)}"
                )
                n_waiting[account] = n_waiting.get(account, 0) + len(line)
                for request in line.values():
                    assert request.level == number, f"{request.id} of level {request.level} waits at {number}"
                    assert request.account is account, f"{request.id} waits in the line of {account.name!r}"
        for account in self._accounts.values():
            assert account.n_waiting == n_waiting.get(account, 0), (
                f"{account.name!r} has {n_waiting.get(account, 0)} waiting, not {account.n_waiting}"
            )

    def _begin(self, number: int, level: _Level) -> None:
        level.turn = self._n_admitted
        level.since = self._served_above(number)

    def _aged(self, level: int, top: int) -> int:
        gained = (self._served_above(level) - self._levels[level].since) // self._aging
        return min(top, level + gained)

    def _served_above(self, level: int) -> int:
        return sum(self._served[level + MAX_PRIORITY + 1 :])

    def _least(self) -> float:
        """Where the counter of a tenant that comes back starts, if it is lower: with the least served of
        those that wait, or with the tenant that left the line last if none does.
        """
        counters = [account.counter for level in self._levels.values() for account in level.lines]
        if counters:
            return min(counters)
        return self._last.counter if self._last else 0.0

    def _sweep(self) -> None:
        """Drop the accounts that would start where they would if they were new."""
        least = self._least()
        self._accounts = {
            name: account
            for name, account in self._accounts.items()
            if account.n_requests or account.counter > least
        }
        self._sweep_at = 64 + 2 * len(self._accounts)
