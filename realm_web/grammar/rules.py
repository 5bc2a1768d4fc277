"""What a grammar is made of: characters, sequences, choices, repetitions and named rules; and their network.

The network is a recursive transition network over the bytes of UTF-8 (Woods, 1970): states with edges for
ranges of bytes, edges without a byte, and calls of a rule that come back to a state. It is what `machine`
runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from realm_web.errors import RequestError

MAX_STATES = 100_000
LAST = 0x10FFFF  # the last code point
_SURROGATES = (0xD800, 0xDFFF)

Ranges = tuple[tuple[int, int], ...]  # of code points, first and last, ascending and apart


@dataclass(frozen=True)
class Chars:
    """One character out of these."""

    ranges: Ranges


@dataclass(frozen=True)
class Literal:
    text: str


@dataclass(frozen=True)
class Sequence:
    items: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    items: tuple[Node, ...]  # none: nothing matches


@dataclass(frozen=True)
class Repeat:
    item: Node
    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class Call:
    rule: str


Node = Chars | Literal | Sequence | Choice | Repeat | Call
EMPTY = Sequence(())


def sequence(*items: Node | str) -> Sequence:
    return Sequence(tuple(Literal(item) if isinstance(item, str) else item for item in items))


def choice(*items: Node | str) -> Choice:
    return Choice(tuple(Literal(item) if isinstance(item, str) else item for item in items))


def optional(item: Node) -> Repeat:
    return Repeat(item, 0, 1)


def chars(*parts: str | tuple[int, int]) -> Chars:
    """Characters of strings and of ranges of code points.

    >>> chars("ba", (0x61, 0x63), "x")
    Chars(ranges=((97, 99), (120, 120)))
    """
    ranges = [part for part in parts if isinstance(part, tuple)]
    ranges += [(ord(char), ord(char)) for part in parts if isinstance(part, str) for char in part]
    return Chars(union(ranges))


def union(ranges: list[tuple[int, int]] | Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def complement(ranges: Ranges) -> Ranges:
    out = []
    begin = 0
    for low, high in union(ranges):
        if low > begin:
            out.append((begin, low - 1))
        begin = high + 1
    if begin <= LAST:
        out.append((begin, LAST))
    return tuple(out)


def intersection(a: Ranges, b: Ranges) -> Ranges:
    return complement(union([*complement(a), *complement(b)]))


def without_surrogates(ranges: Ranges) -> Ranges:
    return intersection(ranges, complement((_SURROGATES,)))


def utf8_ranges(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The code points from low to high as sequences of byte ranges; surrogates have no bytes.

    The method is that of RE2 and of Rust's `utf8-ranges`: split where the length changes, then where the
    continuation bytes do not run over their whole range.
    """
    if low <= _SURROGATES[1] and high >= _SURROGATES[0]:
        if low < _SURROGATES[0]:
            yield from utf8_ranges(low, _SURROGATES[0] - 1)
        if high > _SURROGATES[1]:
            yield from utf8_ranges(_SURROGATES[1] + 1, high)
        return
    for last in (0x7F, 0x7FF, 0xFFFF):
        if low <= last < high:
            yield from utf8_ranges(low, last)
            yield from utf8_ranges(last + 1, high)
            return
    if high > 0x7F:
        for n_bits in (6, 12, 18):
            rest = (1 << n_bits) - 1
            if low & ~rest != high & ~rest:
                if low & rest:
                    yield from utf8_ranges(low, low | rest)
                    yield from utf8_ranges((low | rest) + 1, high)
                    return
                if high & rest != rest:
                    yield from utf8_ranges(low, (high & ~rest) - 1)
                    yield from utf8_ranges(high & ~rest, high)
                    return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


@dataclass
class Network:
    """The states of all rules; state 0 is the end of every rule. `calls`: (rule, state to come back to)."""

    bytes: list[list[tuple[int, int, int]]] = field(default_factory=lambda: [[]])  # (first, last, next state)
    free: list[list[int]] = field(default_factory=lambda: [[]])
    calls: list[list[tuple[str, int]]] = field(default_factory=lambda: [[]])
    starts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, rules: Mapping[str, Node]) -> Network:
        """RequestError when the rules unroll to too many states; every called rule must be there."""
        network = cls()
        for name, node in rules.items():
            network.starts[name] = network._enter(node, 0)
        network._drop_dead_ends()
        return network

    def _drop_dead_ends(self) -> None:
        """Keep only what leads to the end of its rule: then every beginning of a text can be completed."""
        before: dict[int, list[int]] = {}  # state -> states that wait for it
        for state in range(len(self.bytes)):
            for following in (*(edge[2] for edge in self.bytes[state]), *self.free[state]):
                before.setdefault(following, []).append(state)
            for rule, back in self.calls[state]:
                for following in (self.starts[rule], back):
                    before.setdefault(following, []).append(state)
        alive = {0}
        todo = [0]
        while todo:
            for state in before.get(todo.pop(), ()):
                if state not in alive and self._leads_on(state, alive):
                    alive.add(state)
                    todo.append(state)
        for state in range(len(self.bytes)):
            self.bytes[state] = [edge for edge in self.bytes[state] if edge[2] in alive]
            self.free[state] = [following for following in self.free[state] if following in alive]
            self.calls[state] = [
                (rule, back)
                for rule, back in self.calls[state]
                if back in alive and self.starts[rule] in alive
            ]

    def _leads_on(self, state: int, alive: set[int]) -> bool:
        return (
            any(edge[2] in alive for edge in self.bytes[state])
            or any(following in alive for following in self.free[state])
            or any(back in alive and self.starts[rule] in alive for rule, back in self.calls[state])
        )

    def _state(self) -> int:
        if len(self.bytes) >= MAX_STATES:
            raise RequestError(
                f"response_format: the grammar unrolls to more than {MAX_STATES:,} states; repeat less in it"
            )
        self.bytes.append([])
        self.free.append([])
        self.calls.append([])
        return len(self.bytes) - 1

    def _enter(self, node: Node, then: int) -> int:
        """The state that stands before `node` and leads through it to `then`."""
        match node:
            case Literal(text):
                for byte in reversed(text.encode()):
                    state = self._state()
                    self.bytes[state].append((byte, byte, then))
                    then = state
                return then
            case Chars(ranges):
                return self._enter_chars(ranges, then)
            case Sequence(items):
                for item in reversed(items):
                    then = self._enter(item, then)
                return then
            case Choice(items):
                state = self._state()
                self.free[state] = [self._enter(item, then) for item in items]
                return state
            case Repeat(item, low, high):
                return self._enter_repeat(item, low, high, then)
            case Call(rule):
                state = self._state()
                self.calls[state].append((rule, then))
                return state
        raise AssertionError(node)

    def _enter_chars(self, ranges: Ranges, then: int) -> int:
        state = self._state()
        tails: dict[tuple[tuple[int, int], ...], int] = {(): then}
        for low, high in ranges:
            for spelling in utf8_ranges(low, high):
                for i in range(len(spelling) - 1, 0, -1):
                    if spelling[i:] not in tails:
                        tail = self._state()
                        self.bytes[tail].append((*spelling[i], tails[spelling[i + 1 :]]))
                        tails[spelling[i:]] = tail
                self.bytes[state].append((*spelling[0], tails[spelling[1:]]))
        return state

    def _enter_repeat(self, item: Node, low: int, high: int | None, then: int) -> int:
        if high is None:
            state = self._state()
            self.free[state] = [self._enter(item, state), then]
        else:
            state = then
            for _ in range(high - low):
                before = self._state()
                self.free[before] = [self._enter(item, state), then]
                state = before
        for _ in range(low):
            state = self._enter(item, state)
        return state
