"""EBNF as llama.cpp writes it (GBNF): read into rules, and said in the words of Lark as llguidance reads it.

In Lark every rule stays a rule and takes its characters one by one, because a Lark terminal takes the
longest match and `[a-z]* "z"` would then match nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping

from realm_web.errors import RequestError

from .rules import (
    LAST,
    Call,
    Chars,
    Choice,
    Literal,
    Node,
    Repeat,
    Sequence,
    complement,
    union,
    without_surrogates,
)

MAX_NESTING = 30  # of groups; Lark has the same limit

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
      | (?P<rule>[A-Za-z_][\w-]*)[ \t]*::=
      | (?P<name>[A-Za-z_][\w-]*)
      | "(?P<literal>(?:[^"\\\n]|\\.)*)"
      | \[(?P<not>\^?)(?P<chars>(?:[^\]\\\n]|\\.)*)\]
      | (?P<repeat>\{[ \t]*\d+[ \t]*(?:,[ \t]*\d*[ \t]*)?\})
      | (?P<mark>[()|*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


def parse_ebnf(text: str) -> dict[str, Node]:
    """The rules by name, `root` among them; RequestError names the place of what cannot be read."""
    return _Parser(text).rules()


def rules_to_lark(rules: Mapping[str, Node]) -> str:
    r"""A Lark grammar of the same language.

    >>> print(rules_to_lark(parse_ebnf('root ::= [a-z]* "z" | "n\\n"  # comment')))
    start: ((/[\u{61}-\u{7a}]/)* "z" | "n\n")
    """
    return "\n".join(f"{_lark_name(name)}: {_lark(node)}" for name, node in rules.items())


class _Parser:
    """Recursive descent over the tokens; a new line ends a rule only where another one begins."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = list(self._scan())
        self._next = 0
        self._called: dict[str, int] = {}

    def rules(self) -> dict[str, Node]:
        rules: dict[str, Node] = {}
        while (token := self._peek()) is not None:
            if token["rule"] is None:
                raise self._error(token.start(), "a rule is wanted here, as in `root ::= ...`")
            if token["rule"] in rules:
                raise self._error(token.start(), f"the rule {token['rule']} is defined a second time")
            self._next += 1
            rules[token["rule"]] = self._alternatives(0)
        for name, place in self._called.items():
            if name not in rules:
                raise self._error(place, f"the rule {name} is not defined")
        if "root" not in rules:
            raise self._error(0, "no rule is called root, where an EBNF grammar begins")
        return rules

    def _scan(self) -> Iterator[re.Match[str]]:
        place = 0
        while place < len(self._text):
            found = _TOKEN.match(self._text, place)
            if found is None:
                raise self._error(place, f"cannot read {self._text[place : place + 20]!r}")
            if found["space"] is None:
                yield found
            place = found.end()

    def _peek(self) -> re.Match[str] | None:
        return self._tokens[self._next] if self._next < len(self._tokens) else None

    def _is_at(self, mark: str) -> bool:
        token = self._peek()
        return token is not None and token["mark"] == mark

    def _alternatives(self, depth: int) -> Node:
        branches = [self._sequence(depth)]
        while self._is_at("|"):
            self._next += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else Choice(tuple(branches))

    def _sequence(self, depth: int) -> Node:
        items: list[Node] = []
        while (token := self._peek()) is not None and token["rule"] is None:
            if token["mark"] in ("|", ")"):
                break
            items.append(self._quantified(self._item(token, depth)))
        return items[0] if len(items) == 1 else Sequence(tuple(items))

    def _item(self, token: re.Match[str], depth: int) -> Node:
        self._next += 1
        if token["name"] is not None:
            self._called.setdefault(token["name"], token.start())
            return Call(token["name"])
        if token["literal"] is not None:
            return Literal("".join(char for char, _ in self._characters(token, "literal")))
        if token["chars"] is not None:
            return self._class(token)
        if token["mark"] == ".":
            return Chars(((0, LAST),))
        if token["mark"] != "(":
            raise self._error(token.start(), f"{token[0]} repeats nothing")
        if depth == MAX_NESTING:
            raise self._error(token.start(), f"groups are nested more than {MAX_NESTING} deep")
        node = self._alternatives(depth + 1)
        if not self._is_at(")"):
            raise self._error(token.start(), "the ( has no )")
        self._next += 1
        return node

    def _quantified(self, node: Node) -> Node:
        token = self._peek()
        if token is None or (token["repeat"] is None and token["mark"] not in ("*", "+", "?")):
            return node
        self._next += 1
        if token["repeat"] is None:
            return Repeat(node, int(token[0] == "+"), 1 if token[0] == "?" else None)
        low, comma, high = token["repeat"][1:-1].replace(" ", "").replace("\t", "").partition(",")
        counts = int(low), int(high) if high else None if comma else int(low)
        if counts[1] is not None and counts[1] < counts[0]:
            raise self._error(token.start(), f"{token[0]} counts backwards")
        return Repeat(node, *counts)

    def _class(self, token: re.Match[str]) -> Node:
        items = list(self._characters(token, "chars"))
        if not items:
            raise self._error(token.start(), "a class of characters is empty")
        ranges = []
        i = 0
        while i < len(items):
            low = high = items[i][0]
            if i + 2 < len(items) and items[i + 1] == ("-", False):
                i += 2
                high = items[i][0]
                if high < low:
                    raise self._error(token.start(), f"the range {low!r}-{high!r} runs backwards")
            ranges.append((ord(low), ord(high)))
            i += 1
        return Chars(complement(union(ranges)) if token["not"] else union(ranges))

    def _characters(self, token: re.Match[str], group: str) -> Iterator[tuple[str, bool]]:
        """What a literal or a class stands for, character by character, and whether each was escaped."""
        for found in _ESCAPE.finditer(token[group]):
            code = found[1] or found[2] or found[3]
            if code is not None:
                if int(code, 16) > LAST or 0xD800 <= int(code, 16) <= 0xDFFF:
                    raise self._error(token.start(), f"{found[0]} is no character")
                yield chr(int(code, 16)), True
            elif found[4] is not None:
                if found[4] in "xuU":
                    raise self._error(token.start(), f"{found[0]} is no whole escape")
                yield _NAMED.get(found[4], found[4]), True
            else:
                yield found[5], False

    def _error(self, place: int, reason: str) -> RequestError:
        line = self._text.count("\n", 0, place) + 1
        return RequestError(f"response_format.grammar, line {line}: {reason}")


def _lark(node: Node) -> str:
    match node:
        case Literal(text):
            return json.dumps(text)
        case Chars(ranges):
            pairs = (f"\\u{{{low:x}}}-\\u{{{high:x}}}" for low, high in without_surrogates(ranges))
            return f"/[{''.join(pairs)}]/"
        case Sequence(items):
            return " ".join(map(_lark, items)) or '""'
        case Choice(items):
            return f"({' | '.join(map(_lark, items))})"
        case Repeat(item, low, None):
            return f"({_lark(item)}){'*' if low == 0 else '+' if low == 1 else f'{{{low},}}'}"
        case Repeat(item, low, high):
            return f"({_lark(item)}){{{low},{high}}}"
        case Call(rule):
            return _lark_name(rule)
    raise AssertionError(node)


def _lark_name(name: str) -> str:
    """Lark tells rules from terminals by their case, and has no hyphens: no two names become one."""
    if name == "root":
        return "start"
    return "r_" + "".join(c if c.islower() or c.isdigit() else f"_{ord(c):x}_" for c in name)
