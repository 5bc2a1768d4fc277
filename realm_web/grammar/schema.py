"""JSON Schema as rules of a grammar, for the engine of the page.

Exact or refused: every text of the rules is valid JSON that the schema accepts, and a keyword that cannot
be said so is a RequestError that names it. Where there is a choice of spelling, rules are narrower than the
schema: properties come in the order of the schema (as with llguidance), values of `enum` and `const` in one
spelling, and `\\u` escapes not at all, so that no property can pass for another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from reprlib import repr as short

from realm_web.errors import RequestError

from . import regex
from .rules import (
    EMPTY,
    Call,
    Chars,
    Choice,
    Literal,
    Node,
    Ranges,
    Repeat,
    chars,
    choice,
    complement,
    intersection,
    optional,
    sequence,
)

_WHERE = "response_format.json_schema.schema"
_NOTES = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$schema", "$id", "$comment", "$defs", "definitions",
}  # fmt: skip
_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set(),
    "boolean": set(),
    "null": set(),
}
_TYPES = tuple(_OF_TYPE)
_FORMATS = {
    "date": r"\d{4}-"  # no 29th of February: not every year has one
    r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))",
    "time": r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,9})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    "uuid": r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": r"((25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)",
    "email": r"[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@([A-Za-z0-9]+(-[A-Za-z0-9]+)*\.)+[A-Za-z]{2,63}",
}
_FORMATS["date-time"] = f"{_FORMATS['date']}T{_FORMATS['time']}"

_MUST_ESCAPE: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))  # DEL as in llguidance
_PLAIN = Chars(complement(_MUST_ESCAPE))
_SHORT = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
_ESCAPE = sequence("\\", chars('"\\bfnrt'))
_SPACE = Call("space")
_VALUE = Call("value")


def schema_rules(schema: Mapping[str, object], max_space: int) -> dict[str, Node]:
    """Rules of a checked schema, beginning with `root`; at most `max_space` white space in a row."""
    reader = _Reader(schema)
    reader.rules |= _json_rules(max_space)
    reader.rules["root"] = reader.node(schema, "#")
    return reader.rules


def _json_rules(max_space: int) -> dict[str, Node]:
    digit = chars((0x30, 0x39))
    whole = sequence(optional(Literal("-")), _whole())
    return {
        "space": Repeat(chars(" \n\t\r"), 0, max_space),
        "char": choice(_PLAIN, Call("escape")),
        "escape": _ESCAPE,
        "string": sequence('"', Repeat(Call("char")), '"'),
        "integer": whole,
        "number": sequence(
            whole,
            optional(sequence(".", Repeat(digit, 1))),
            optional(sequence(chars("eE"), optional(chars("+-")), Repeat(digit, 1))),
        ),
        "value": choice(*map(Call, ("object", "array", "string", "number")), "true", "false", "null"),
        "object": _braced("{", _list(_pair(Call("string"), _VALUE)), "}"),
        "array": _braced("[", _list(sequence(_VALUE, _SPACE)), "]"),
    }  # fmt: skip


def _whole() -> Node:
    return choice("0", sequence(chars((0x31, 0x39)), Repeat(chars((0x30, 0x39)))))


def _braced(begin: str, inside: Node, end: str) -> Node:
    return sequence(begin, _SPACE, inside, end)


def _pair(key: Node, value: Node) -> Node:
    return sequence(key, _SPACE, ":", _SPACE, value, _SPACE)


_COMMA = sequence(",", _SPACE)


def _list(item: Node) -> Node:
    return optional(sequence(item, Repeat(sequence(_COMMA, item))))


class _Reader:
    """Makes the rules of a schema; a subschema that is referred to is a rule of its own."""

    def __init__(self, schema: Mapping[str, object]) -> None:
        self.rules: dict[str, Node] = {}
        self._schema = schema

    def node(self, schema: object, where: str) -> Node:
        if schema is True or schema == {}:
            return _VALUE
        if schema is False:
            return Choice(())
        if not isinstance(schema, Mapping):
            raise self._error(where, f"is {short(schema)}: a schema is an object, true or false")
        stated = {key: value for key, value in schema.items() if key not in _NOTES}
        for key, read in (
            ("$ref", self._reference),
            ("anyOf", self._any),
            ("oneOf", self._one),
            ("allOf", self._all),
        ):
            if key in stated:
                self._only(stated, where, key, {key})
                return read(stated[key], f"{where}/{key}")
        if "enum" in stated or "const" in stated:
            return self._values(stated, where)
        types = self._types(stated, where)
        known = {"type"}.union(*(_OF_TYPE[name] for name in types))
        self._only(stated, where, " or ".join(types) or "no type", known)
        return Choice(tuple(self._of_type(name, stated, where) for name in types))

    def _of_type(self, name: str, stated: Mapping[str, object], where: str) -> Node:
        match name:
            case "object":
                return self._object(stated, where)
            case "array":
                return self._array(stated, where)
            case "string":
                return self._string(stated, where)
            case "integer":
                return self._integer(stated, where)
            case "number":
                return Call("number")
            case "boolean":
                return choice("true", "false")
        return Literal("null")

    def _types(self, stated: Mapping[str, object], where: str) -> list[str]:
        """The types that are stated; else those that the keywords are about, or all."""
        if "type" not in stated:
            return [name for name in _TYPES if _OF_TYPE[name] & stated.keys()]
        names = stated["type"] if isinstance(stated["type"], list) else [stated["type"]]
        for name in names:
            if name not in _TYPES:
                raise self._error(where, f"has the type {short(name)}: JSON has {', '.join(_TYPES)}")
        return list(dict.fromkeys(names))

    def _only(self, stated: Mapping[str, object], where: str, beside: str, known: set[str]) -> None:
        for key in stated:
            if key not in known:
                raise self._error(where, f"has {short(key)} beside {beside}, which the page cannot enforce")

    def _error(self, where: str, reason: str) -> RequestError:
        return RequestError(f"{_WHERE}: {where} {reason}")

    def _reference(self, target: object, where: str) -> Node:
        if not isinstance(target, str) or not target.startswith("#"):
            raise self._error(where, f"is {short(target)}: only references into the schema itself are read")
        if target not in self.rules:
            found: object = self._schema
            for part in target[1:].split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                if isinstance(found, Mapping) and key in found:
                    found = found[key]
                elif isinstance(found, list) and key.isdigit() and int(key) < len(found):
                    found = found[int(key)]
                else:
                    raise self._error(where, f"refers to {short(target)}, which is not there")
            self.rules[target] = EMPTY  # so that a schema may refer to itself
            self.rules[target] = self.node(found, target)
        return Call(target)

    def _several(self, schemas: object, where: str) -> list[object]:
        if not isinstance(schemas, list) or not schemas:
            raise self._error(where, "is no list of schemas")
        return schemas

    def _any(self, schemas: object, where: str) -> Node:
        nodes = [self.node(each, f"{where}/{i}") for i, each in enumerate(self._several(schemas, where))]
        return Choice(tuple(nodes))

    def _one(self, schemas: object, where: str) -> Node:
        """oneOf where no value can match two: each of another type."""
        seen: set[str] = set()
        for i, each in enumerate(self._several(schemas, where)):
            types = (
                self._types(each, f"{where}/{i}") if isinstance(each, Mapping) and "type" in each else _TYPES
            )
            names = {"number" if name == "integer" else name for name in types}
            if names & seen:
                raise self._error(where, "has two schemas for values of one type: use anyOf")
            seen |= names
        return self._any(schemas, where)

    def _all(self, schemas: object, where: str) -> Node:
        if len(self._several(schemas, where)) > 1:
            raise self._error(where, "has more than one schema, which the page cannot enforce")
        return self._any(schemas, where)

    def _values(self, stated: Mapping[str, object], where: str) -> Node:
        self._only(stated, where, "enum" if "enum" in stated else "const", {"enum", "const", "type"})
        values = stated.get("enum", [stated.get("const")])
        if not isinstance(values, list):
            raise self._error(where, "has an enum that is no list")
        types = self._types(stated, where) if "type" in stated else _TYPES
        spelled = [json.dumps(value, ensure_ascii=False) for value in values if _type_of(value) & {*types}]
        if "const" in stated:
            constant = json.dumps(stated["const"], ensure_ascii=False)
            spelled = [each for each in spelled if each == constant]
        return Choice(tuple(map(Literal, spelled)))

    def _object(self, stated: Mapping[str, object], where: str) -> Node:
        properties = stated.get("properties", {})
        required = stated.get("required", [])
        others = stated.get("additionalProperties", True)
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise self._error(where, "has properties that are no object, or required that is no list")
        named = dict(properties) | {key: others for key in required if key not in properties}
        other = (
            None
            if others is False
            else _pair(_other_key(list(named)), self.node(others, f"{where}/additionalProperties"))
        )
        if not named:
            return _braced("{", EMPTY if other is None else _list(other), "}")
        # From the last property to the first: what may follow, with a member before it and without.
        later = EMPTY if other is None else Repeat(sequence(_COMMA, other))
        first = EMPTY if other is None else _list(other)
        for i, (key, schema) in reversed(list(enumerate(named.items()))):
            member = _pair(
                Literal(json.dumps(key, ensure_ascii=False)), self.node(schema, f"{where}/properties/{key}")
            )
            name = f"{where} {i}"
            self.rules[f"{name} member"] = member
            self.rules[f"{name} later"] = later
            self.rules[f"{name} first"] = first
            with_it = Call(f"{name} member"), Call(f"{name} later")
            skipped = (Call(f"{name} later"), Call(f"{name} first"))
            later, first = sequence(_COMMA, *with_it), sequence(*with_it)
            if key not in required:
                later, first = choice(later, skipped[0]), choice(first, skipped[1])
        return _braced("{", first, "}")

    def _array(self, stated: Mapping[str, object], where: str) -> Node:
        low, high = self._counts(stated, where, "minItems", "maxItems")
        prefix = stated.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise self._error(where, "has prefixItems that are no list")
        items = stated.get("items", True)
        if items is False:
            high = min(len(prefix), len(prefix) if high is None else high)
        if high is not None and high < low:
            return Choice(())
        n = len(prefix) if high is None else min(len(prefix), high)
        rest = Choice(()) if n == high else sequence(self.node(items, f"{where}/items"), _SPACE)
        # From the last item to the first; before the n-th they are the prefix, after it any number of `rest`.
        last = max(n, 1) if high is None else min(max(n, 1), high)
        tail: Node = Repeat(
            sequence(_COMMA, rest), max(low - last, 0), None if high is None else max(high - last, 0)
        )
        for i in reversed(range(last)):
            item = sequence(self.node(prefix[i], f"{where}/prefixItems/{i}"), _SPACE) if i < n else rest
            name = f"{where} from {i}"
            self.rules[name] = sequence(*([_COMMA] if i else []), item, tail)
            tail = Call(name) if i < low else optional(Call(name))
        return _braced("[", tail if last else EMPTY, "]")

    def _string(self, stated: Mapping[str, object], where: str) -> Node:
        low, high = self._counts(stated, where, "minLength", "maxLength")
        is_bounded = low > 0 or high is not None
        if high is not None and high < low:
            return Choice(())
        if is_bounded + ("pattern" in stated) + ("format" in stated) > 1:
            raise self._error(
                where, "has two of length, pattern and format, of which the page can enforce one"
            )
        if "pattern" in stated:
            return sequence('"', self._pattern(stated["pattern"], where), '"')
        if "format" in stated:
            if stated["format"] not in _FORMATS:
                raise self._error(
                    where, f"has the format {short(stated['format'])}: use {', '.join(_FORMATS)}"
                )
            return sequence('"', regex.parse_regex(_FORMATS[stated["format"]]).node, '"')
        return sequence('"', Repeat(Call("char"), low, high), '"') if is_bounded else Call("string")

    def _pattern(self, pattern: object, where: str) -> Node:
        """A pattern is searched for: other text may stand on a side that ^ or $ does not close."""
        if not isinstance(pattern, str):
            raise self._error(where, f"has the pattern {short(pattern)}: give a string")
        found = regex.parse_regex(pattern, f"{_WHERE}: {where}/pattern")
        around = Repeat(Call("char"))
        inside = _inside_string(found.node)
        return sequence(*([] if found.from_start else [around]), inside, *([] if found.to_end else [around]))

    def _counts(
        self, stated: Mapping[str, object], where: str, low: str, high: str
    ) -> tuple[int, int | None]:
        counts = []
        for key, default in ((low, 0), (high, None)):
            count = stated.get(key, default)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
                raise self._error(where, f"has {key} of {short(count)}: give a whole number from 0")
            counts.append(count)
        return counts[0], counts[1]

    def _integer(self, stated: Mapping[str, object], where: str) -> Node:
        low = high = None
        for key, step in (("minimum", 0), ("exclusiveMinimum", 1), ("maximum", 0), ("exclusiveMaximum", -1)):
            if key not in stated:
                continue
            bound = stated[key]
            if isinstance(bound, bool) or not isinstance(bound, int | float) or bound != bound // 1:
                raise self._error(where, f"has {key} of {short(bound)}: give a whole number")
            bound = int(bound) + step
            if "inimum" in key:
                low = bound if low is None else max(low, bound)
            else:
                high = bound if high is None else min(high, bound)
        if low is None and high is None:
            return Call("integer")
        ranges: list[Node] = []
        if low is None or low < 0:
            nearest, farthest = max(0, -high) if high is not None else 0, None if low is None else -low
            if farthest is None or nearest <= farthest:
                ranges.append(sequence("-", _from_to(nearest, farthest)))
        if high is None or high >= 0:
            ranges.append(_from_to(max(low or 0, 0), high))
        return Choice(tuple(ranges))


def _type_of(value: object) -> set[str]:
    match value:
        case bool():
            return {"boolean"}
        case None:
            return {"null"}
        case int():
            return {"integer", "number"}
        case float():
            return {"integer", "number"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case Mapping():
            return {"object"}
    return {"array"}


def _from_to(low: int, high: int | None) -> Node:
    """Whole numbers from low (0 or more) to high, written without leading zeros."""
    digit, first = chars((0x30, 0x39)), chars((0x31, 0x39))
    shortest = len(str(low))
    if high is None:
        more = sequence(first, Repeat(digit, shortest))
        return choice(_same_length(str(low), "9" * shortest), more)
    if high < low:
        return Choice(())
    longest = len(str(high))
    if shortest == longest:
        return _same_length(str(low), str(high))
    parts = [_same_length(str(low), "9" * shortest), _same_length(f"1{'0' * (longest - 1)}", str(high))]
    if longest - shortest > 1:
        parts.append(sequence(first, Repeat(digit, shortest, longest - 2)))
    return Choice(tuple(parts))


def _same_length(low: str, high: str) -> Node:
    """Numbers of as many digits, from low to high."""
    rest = len(low) - 1
    digit = chars((0x30, 0x39))
    if low == "0" * len(low) and high == "9" * len(high):
        return Repeat(digit, len(low), len(low))
    if low[0] == high[0]:
        return sequence(low[0], _same_length(low[1:], high[1:]))
    parts = [
        sequence(low[0], _same_length(low[1:], "9" * rest)),
        sequence(high[0], _same_length("0" * rest, high[1:])),
    ]
    if ord(high[0]) - ord(low[0]) > 1:
        between = Chars(((ord(low[0]) + 1, ord(high[0]) - 1),))
        parts.append(sequence(between, Repeat(digit, rest, rest)))
    return Choice(tuple(parts))


def _inside_string(node: Node) -> Node:
    """A regular expression's texts as they are spelled inside of a JSON string."""
    match node:
        case Chars(ranges):
            plain = intersection(ranges, complement(_MUST_ESCAPE))
            escaped: list[Node] = [Chars(plain)] if plain else []
            for low, high in intersection(ranges, _MUST_ESCAPE):
                points = (point for point in range(low, high + 1) if point in _SHORT)
                escaped += [Literal("\\" + _SHORT[point]) for point in points]
            return Choice(tuple(escaped))
        case Repeat(item, low, high):
            return Repeat(_inside_string(item), low, high)
        case Choice(items):
            return Choice(tuple(map(_inside_string, items)))
        case Literal():
            return node
    assert not isinstance(node, Call)
    return type(node)(tuple(map(_inside_string, node.items)))


def _other_key(keys: Sequence[str]) -> Node:
    """A string that is none of `keys`: at every character another one, or one of theirs and on."""
    if not keys:
        return Call("string")
    for key in keys:
        if any(ord(char) < 0x20 or char in '"\\' for char in key):
            raise RequestError(
                f"{_WHERE}: the property {short(key)} has a character that JSON escapes; beside it the page "
                "cannot enforce additionalProperties: set them to false"
            )
    return sequence('"', _not_of({*keys}))


def _not_of(keys: set[str]) -> Node:
    """What is left of a string, closing quote included, that is none of the keys."""
    more: dict[str, set[str]] = {}
    for key in keys - {""}:
        more.setdefault(key[0], set()).add(key[1:])
    rest = sequence(Repeat(Call("char")), '"')
    taken = tuple((ord(char), ord(char)) for char in sorted(more))
    other = Chars(intersection(_PLAIN.ranges, complement(taken)))
    parts: list[Node] = [sequence(choice(other, Call("escape")), rest)]
    parts += [sequence(char, _not_of(tails)) for char, tails in more.items()]
    if "" not in keys:
        parts.append(Literal('"'))
    return Choice(tuple(parts))
