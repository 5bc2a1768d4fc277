r"""Regular expressions as rules of a grammar. A match is a match of the whole text.

Read: literals, classes, groups, alternatives, quantifiers, `.` (all but a new line), `\d \w \s` and their
opposites (of ASCII, as in JavaScript), escapes, `^` at the beginning and `$` at the end. What looks around,
refers back or switches modes is refused: no grammar says it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from realm_web.errors import RequestError

from .rules import EMPTY, LAST, Chars, Choice, Node, Ranges, Repeat, Sequence, complement, union

MAX_NESTING = 100
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = ((0x09, 0x0D), (0x20, 0x20))
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE}
_CLASSES |= {name.upper(): complement(ranges) for name, ranges in _CLASSES.items()}
_ESCAPES = {"n": 0x0A, "r": 0x0D, "t": 0x09, "f": 0x0C, "v": 0x0B, "0": 0}
_COUNTS = re.compile(r"\{(\d{1,6})(,?)(\d{0,6})\}")
_CODE = re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|[xu]\{([0-9A-Fa-f]{1,6})\}")
ANY = Chars(complement(((0x0A, 0x0A),)))


@dataclass(frozen=True)
class Pattern:
    node: Node
    from_start: bool  # it began with ^
    to_end: bool  # it ended with $


def parse_regex(text: str, where: str = "response_format.regex") -> Pattern:
    """RequestError names what cannot be read, and its place."""
    parser = _Parser(text, where)
    from_start = text.startswith("^")
    parser.place = int(from_start)
    node = parser.alternatives(0)
    to_end = parser.peek() == "$" and parser.place == len(text) - 1
    if not to_end and parser.place < len(text):
        raise parser.error("a ) too many" if parser.peek() == ")" else "$ stands before the end")
    if (from_start or to_end) and isinstance(node, Choice):
        raise parser.error("^ and $ beside alternatives: put the alternatives into a group, ^(a|b)$")
    return Pattern(node, from_start, to_end)


class _Parser:
    def __init__(self, text: str, where: str) -> None:
        self.text = text
        self.where = where
        self.place = 0

    def error(self, reason: str) -> RequestError:
        return RequestError(f"{self.where}: {reason} (character {self.place + 1})")

    def peek(self) -> str:
        return self.text[self.place : self.place + 1]

    def take(self) -> str:
        char = self.peek()
        if not char:
            raise self.error("it ends in the middle")
        self.place += 1
        return char

    def alternatives(self, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise self.error(f"groups are nested more than {MAX_NESTING} deep")
        branches = [self.branch(depth)]
        while self.peek() == "|":
            self.place += 1
            branches.append(self.branch(depth))
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def branch(self, depth: int) -> Node:
        items: list[Node] = []
        while self.peek() not in ("", "|", ")", "$"):
            items.append(self.quantified(self.atom(depth)))
        return Sequence(tuple(items)) if items else EMPTY

    def atom(self, depth: int) -> Node:
        char = self.take()
        match char:
            case "(":
                return self.group(depth)
            case "[":
                return self.char_class()
            case ".":
                return ANY
            case "\\":
                return Chars(self.escape())
            case "^":
                raise self.error("^ stands after the beginning")
            case "*" | "+" | "?" | "{":
                raise self.error(f"{char} repeats nothing; write \\{char} for the character")
        return Chars(((ord(char), ord(char)),))

    def group(self, depth: int) -> Node:
        if self.peek() == "?":
            named = re.compile(r"\?(?::|P?<[A-Za-z_]\w*>)").match(self.text, self.place)
            if named is None:
                raise self.error("look-around and mode switches, (?...), are not supported")
            self.place = named.end()
        node = self.alternatives(depth + 1)
        if self.peek() != ")":
            raise self.error("$ inside of a group" if self.peek() == "$" else "a ) is missing")
        self.place += 1
        return node

    def quantified(self, node: Node) -> Node:
        n_quantifiers = 0
        while True:
            low, high, end = self.quantifier()
            if end == self.place:
                return node
            n_quantifiers += 1
            if n_quantifiers > 1:
                raise self.error("two quantifiers in a row: put the first into a group")
            if high is not None and high < low:
                raise self.error(f"{{{low},{high}}} counts backwards")
            self.place = end
            if self.peek() == "?":  # lazy: the same texts match
                self.place += 1
            node = Repeat(node, low, high)

    def quantifier(self) -> tuple[int, int | None, int]:
        match self.peek():
            case "*":
                return 0, None, self.place + 1
            case "+":
                return 1, None, self.place + 1
            case "?":
                return 0, 1, self.place + 1
            case "{":
                found = _COUNTS.match(self.text, self.place)
                if found is None:
                    raise self.error("{ is not {n}, {n,} or {n,m}; write \\{ for the character")
                low = int(found[1])
                high = low if not found[2] else int(found[3]) if found[3] else None
                return low, high, found.end()
        return 0, None, self.place

    def escape(self) -> Ranges:
        code = _CODE.match(self.text, self.place)
        if code is not None:
            point = int(code[1] or code[2] or code[3], 16)
            if point > LAST or 0xD800 <= point <= 0xDFFF:
                raise self.error(f"\\{code[0]} is no character")
            self.place = code.end()
            return ((point, point),)
        char = self.take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char in _ESCAPES:
            return ((_ESCAPES[char], _ESCAPES[char]),)
        if char.isalnum():
            raise self.error(f"\\{char} is not supported")
        return ((ord(char), ord(char)),)

    def char_class(self) -> Node:
        negated = self.peek() == "^"
        self.place += negated
        ranges: list[tuple[int, int]] = []
        first = True
        while first or self.peek() != "]":
            first = False
            low = self.class_item()
            if self.peek() == "-" and self.text[self.place + 1 : self.place + 2] != "]":
                self.place += 1
                high = self.class_item()
                if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
                    raise self.error("a range begins or ends with a class")
                if high[0][0] < low[0][0]:
                    raise self.error("a range of a class runs backwards")
                low = ((low[0][0], high[0][0]),)
            ranges += low
        self.place += 1
        found = union(ranges)
        return Chars(complement(found) if negated else found)

    def class_item(self) -> Ranges:
        char = self.take()
        if char == "\\":
            return self.escape()
        if char == "[" and self.peek() == ":":
            raise self.error("[:name:] is not supported")
        return ((ord(char), ord(char)),)
