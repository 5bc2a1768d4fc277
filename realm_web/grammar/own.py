"""Our own grammar engine, for where llguidance is not: constraints become rules, rules a machine over bytes.

Which tokens may follow is found by walking the tree of all tokens together with the machine (as llama.cpp
and llguidance do). The walk is the hot loop and belongs to the place that runs it, a `TokenTree`: the
page's is JavaScript. Masks are remembered by place, so inside of a string most of them cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

from realm_web.errors import RequestError
from realm_web.grammar import MAX_SPACE, Constraint, Rows, end_mask, read_response_format, token_table
from realm_web.grammar.ebnf import parse_ebnf
from realm_web.grammar.machine import Machine, Place
from realm_web.grammar.regex import parse_regex
from realm_web.grammar.rules import Node
from realm_web.grammar.schema import schema_rules
from realm_web.tokenizer import Tokenizer

CACHED = 8  # machines; each remembers up to 25 MB
REMEMBERED = 256  # masks of a machine; 32 KB each with 262,144 tokens


class TokenTree(Protocol):
    """The bytes of all tokens as a tree."""

    def open(self) -> Walk: ...


class Walk(Protocol):
    """What the tree remembers of one machine."""

    def mask(self, number: int, row: Callable[[int], Sequence[int]]) -> bytes:
        """The tokens that lead somewhere from the place of this number; `row` as `Machine.row`."""

    def forget(self) -> None:
        """The numbers known so far are no longer good."""


class OwnGrammarEngine:
    """Constraints for one vocabulary, on `tree`."""

    name = "realm_web's own"

    def __init__(
        self, tokenizer: Tokenizer, n_vocab: int, make_tree: Callable[[list[bytes]], TokenTree]
    ) -> None:
        self.n_vocab = n_vocab
        self.eog_ids = frozenset(token for token in tokenizer.eog_ids if token < n_vocab)
        self.end_mask = end_mask(self.eog_ids, n_vocab)
        self.table = token_table(tokenizer, n_vocab)
        for token in self.eog_ids:
            self.table[token] = b""
        self._tree = make_tree(self.table)
        self._compiled = lru_cache(CACHED)(self._compile)

    def compile(self, response_format: Mapping[str, object]) -> OwnMatcher:
        constraint = read_response_format(response_format)
        if constraint is None:
            raise RequestError("response_format asks for any text: there is nothing to compile")
        return OwnMatcher(self, self._compiled(constraint))

    async def compile_aside(self, response_format: Mapping[str, object]) -> OwnMatcher:
        return self.compile(response_format)

    def fill(self, rows: Rows, masks: bytearray) -> None:
        n_bytes = len(self.end_mask)
        for matcher, row in rows:
            masks[row * n_bytes : (row + 1) * n_bytes] = matcher.mask()

    def _compile(self, constraint: Constraint) -> Masks:
        try:
            machine = Machine(constraint_rules(constraint))
        except RecursionError:
            raise RequestError("response_format is nested too deeply, or has too long a property") from None
        return Masks(machine, self._tree.open(), self.end_mask)


def constraint_rules(constraint: Constraint) -> dict[str, Node]:
    match constraint.kind:
        case "schema":
            return schema_rules(json.loads(constraint.text), MAX_SPACE)
        case "regex":
            return {"root": parse_regex(constraint.text).node}
        case "ebnf":
            return parse_ebnf(constraint.text)
    raise RequestError("response_format.grammar: a page reads EBNF, `root ::= ...`, and not Lark")


class Masks:
    """A machine and the masks of its places."""

    def __init__(self, machine: Machine, walk: Walk, ends: bytes) -> None:
        self.machine = machine
        self._walk = walk
        self._ends = int.from_bytes(ends, "little")
        self._known: dict[int, bytes] = {}
        self._generation = machine.generation

    def mask(self, place: Place) -> bytes:
        found = self._known.get(place.number)
        if found is not None:
            return found
        self.machine.forget()
        if self.machine.generation != self._generation:
            self._generation = self.machine.generation
            self._walk.forget()
        self.machine.numbered[place.number] = place
        mask = self._walk.mask(place.number, self.machine.row)
        if place.can_end:
            mask = (int.from_bytes(mask, "little") | self._ends).to_bytes(len(mask), "little")
        if not any(mask):
            raise RequestError("response_format: no token of this model leads on from here")
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        self._known[place.number] = mask
        return mask


class OwnMatcher:
    """One answer's place in its grammar."""

    def __init__(self, engine: OwnGrammarEngine, masks: Masks, places: Sequence[Place] = ()) -> None:
        self._engine = engine
        self._masks = masks
        self._places = list(places) or [masks.machine.start]  # after each token, for `rollback`
        self._has_ended = False

    def mask(self) -> bytes:
        return self._engine.end_mask if self.is_finished else self._masks.mask(self._places[-1])

    def accept(self, token_id: int) -> bool:
        if self._has_ended or not 0 <= token_id < self._engine.n_vocab:
            return False
        place = self._places[-1]
        if token_id in self._engine.eog_ids:
            self._has_ended = place.can_end
            return self._has_ended
        text = self._engine.table[token_id]
        following = self._masks.machine.walk(place, text) if text else None
        if following is None:
            return False
        self._places.append(following)
        return True

    @property
    def is_finished(self) -> bool:
        place = self._places[-1]
        return self._has_ended or (place.can_end and not place.ways)

    def fork(self) -> OwnMatcher:
        copy = OwnMatcher(self._engine, self._masks, self._places)
        copy._has_ended = self._has_ended
        return copy

    def rollback(self, n_tokens: int) -> None:
        if n_tokens and self._has_ended:
            self._has_ended = False
            n_tokens -= 1
        if n_tokens >= len(self._places):
            raise ValueError(f"cannot take back {n_tokens} tokens of {len(self._places) - 1}")
        if n_tokens:
            del self._places[-n_tokens:]

    def close(self) -> None:
        self._places.clear()
