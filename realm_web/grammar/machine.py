"""Runs a grammar byte by byte: a recursive transition network, made deterministic where it is visited.

A `Place` is every way in which the bytes so far can stand in the grammar, each way a state on a stack of
states to come back to. Places are remembered, and so is where each byte leads from each of them; inside of
a string, or of a list, the same few places come again and again, so a token costs a handful of table
look-ups.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Mapping

from realm_web.errors import RequestError

from .rules import Network, Node

MAX_WAYS = 4000  # at one place; with left recursion there would be no end of them
REMEMBERED = 8_000  # places; about 3 KB each

# States to come back to, innermost first: (state, the stack below), None at the bottom. Equal stacks are the
# same object, so that they compare and hash by identity.
Stack = tuple[int, "Stack | None"]


class Place:
    """All ways to have come here. `number` counts the places of a machine."""

    __slots__ = ("_row", "can_end", "number", "ways")

    def __init__(self, number: int, ways: tuple[tuple[int, Stack | None], ...], can_end: bool) -> None:
        self.number = number
        self.ways = ways  # (state with bytes to read, stack)
        self.can_end = can_end
        self._row: list[Place | None] | None = None


class Machine:
    """The grammar of `rules`, which begins with the rule `root`."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self._network = Network.of(rules)
        self._stacks: dict[tuple[int, int], Stack] = {}
        self._places: dict[frozenset[tuple[int, int]], Place] = {}
        self._n_places = 0
        self.generation = 0  # changes whenever the places so far are forgotten
        self.numbered: dict[int, Place] = {}
        self.start = self._place([(self._network.starts["root"], None)])
        if not self.start.ways and not self.start.can_end:
            raise RequestError("response_format: there is no text that it allows")

    def step(self, place: Place, byte: int) -> Place | None:
        """Where a byte leads; None where it is not allowed."""
        return self._row(place)[byte]

    def walk(self, place: Place, text: bytes) -> Place | None:
        for byte in text:
            following = self.step(place, byte)
            if following is None:
                return None
            place = following
        return place

    def row(self, number: int) -> array[int]:
        """For each byte after a place the number of the place it leads to; -1 where it is not allowed."""
        row = self._row(self.numbered[number])
        return array("i", [-1 if place is None else place.number for place in row])

    def forget(self) -> None:
        """Drop what is remembered once it is much. Places in use stay good, with what they lead to."""
        if len(self._places) > REMEMBERED:
            for place in self._places.values():
                place._row = None
            self._places.clear()
            self._stacks.clear()
            self.numbered.clear()
            self.generation += 1

    def _row(self, place: Place) -> list[Place | None]:
        if place._row is None:
            place._row = self._make_row(place)
        return place._row

    def _make_row(self, place: Place) -> list[Place | None]:
        edges = [(edge, stack) for state, stack in place.ways for edge in self._network.bytes[state]]
        cuts = sorted({0, *(edge[0] for edge, _ in edges), *(edge[1] + 1 for edge, _ in edges)})
        reached: list[list[tuple[int, Stack | None]]] = [[] for _ in cuts]
        for (first, last, state), stack in edges:
            for i in range(bisect_right(cuts, first) - 1, bisect_right(cuts, last)):
                reached[i].append((state, stack))
        row: list[Place | None] = []
        for i, ways in enumerate(reached):
            end = cuts[i + 1] if i + 1 < len(cuts) else 256
            row += [self._place(ways) if ways else None] * (end - cuts[i])
        return row[:256]

    def _place(self, ways: list[tuple[int, Stack | None]]) -> Place:
        """The place of these ways, once all that takes no byte is done: calls, returns and choices."""
        network = self._network
        seen: set[tuple[int, int]] = set()
        todo = list(ways)
        reading: dict[tuple[int, int], tuple[int, Stack | None]] = {}
        can_end = False
        while todo:
            state, stack = way = todo.pop()
            key = (state, id(stack))
            if key in seen:
                continue
            seen.add(key)
            if len(seen) > MAX_WAYS:
                raise RequestError(
                    "response_format: the grammar is too ambiguous, or a rule begins with itself"
                )
            if state == 0:
                if stack is None:
                    can_end = True
                else:
                    todo.append(stack)
                continue
            if network.bytes[state]:
                reading[key] = way
            todo += [(following, stack) for following in network.free[state]]
            for rule, back in network.calls[state]:
                # coming back only to return at once: right recursion needs no stack
                below = stack if back == 0 else self._stack(back, stack)
                todo.append((network.starts[rule], below))
        return self._known(reading, can_end)

    def _known(self, reading: dict[tuple[int, int], tuple[int, Stack | None]], can_end: bool) -> Place:
        key = frozenset([*reading, (0, 0)] if can_end else reading)
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = Place(self._n_places, tuple(reading.values()), can_end)
            self.numbered[place.number] = place
            self._n_places += 1
        return place

    def _stack(self, state: int, below: Stack | None) -> Stack:
        key = (state, id(below))
        found = self._stacks.get(key)
        if found is None:
            found = self._stacks[key] = (state, below)
        return found
