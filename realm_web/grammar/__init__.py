"""Structured output: what an answer must look like, and the interface of what enforces it.

A response format (JSON mode, a JSON Schema, a regular expression, a grammar) is checked here for shape and
size and becomes a `Constraint`. A `GrammarEngine` compiles that for one vocabulary; the `Matcher` that
comes out says after every token which tokens may follow, as a bitmask that the device applies. Natively the
engine is llguidance (`native`). In a page it is our own (`page`, with `schema`, `regex`, `ebnf`, `rules`,
`machine`), of less reach: what it cannot say exactly it refuses.

Why our own: llguidance is published for no page. The one library that is, XGrammar (npm
@mlc-ai/web-xgrammar 0.1.27, 1.1 MB), was tried and is neither exact nor bounded. It lets {"type": "number",
"maximum": 3} be 3.1, a bare quote stand in a string with a pattern, and an optional property come twice,
the second time of any type; it drops what stands beside anyOf. An error of the request aborts the module
without a word; maxLength 300 took 4 s to compile and 200 optional properties more than 3 minutes.

Knows no device and no request. The limits are there because a schema may come from a stranger: with them,
compiling is bounded in time and memory (measured in the tests), which the libraries alone do not promise.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from reprlib import repr as short
from typing import Literal, Protocol

from realm_web.errors import RequestError
from realm_web.tokenizer import Tokenizer

Kind = Literal["schema", "regex", "lark", "ebnf"]

MAX_TEXT = 128 * 1024  # characters of a schema (as JSON), a regular expression or a grammar
MAX_DEPTH = 64  # of a schema
MAX_OBJECTS = 2000  # in a schema; compiling 2,000 properties takes 0.3 s, 5,000 take 1.5 s
MAX_PATTERN_PROPERTIES = 64  # in a schema: each is compared with each
MAX_MULTIPLE = 60_000  # of all multipleOf together: states of an automaton; 50,021 takes 0.4 s and 24 MB
MAX_RULES = 1000  # of an EBNF grammar
MAX_SPACE = 40  # characters of white space in a row: small models like to go on with it for ever
CACHED = 32  # compiled constraints that an engine remembers

_TYPES = "text, json_object, json_schema, regex, grammar"
_EBNF_RULE = re.compile(r"(?m)^[ \t]*[\w-]+[ \t]*::=")
_INLINE_SCHEMA = re.compile(r"%json\s*")


@dataclass(frozen=True)
class Constraint:
    """A checked response format. `text`: the schema as JSON, the regular expression or the grammar.

    A regular expression must match the whole answer. A grammar is Lark (start rule `start`) or EBNF as
    llama.cpp writes it (`root ::= ...`).
    """

    kind: Kind
    text: str


class Matcher(Protocol):
    """Where one answer stands in its grammar. Starts before the first token."""

    def mask(self) -> bytes | memoryview:
        """Which tokens may follow: ceil(n_vocab / 32) little-endian u32, bit set = allowed.

        The bits of the tokens that end a generation are set exactly where the answer may end, and there is
        always one bit at least. RequestError when the grammar turns out too complex, or has a dead end.
        """

    def accept(self, token_id: int) -> bool:
        """Go on by a token. False: it was not allowed, and the matcher is as before."""

    @property
    def is_finished(self) -> bool:
        """Nothing but the end may follow, or it has followed."""

    def fork(self) -> Matcher:
        """A second matcher at the same place."""

    def rollback(self, n_tokens: int) -> None:
        """Take back the last accepted tokens."""

    def close(self) -> None:
        """Give its memory back at once; the matcher must not be used afterwards."""


Rows = Sequence[tuple[Matcher, int]]  # which matcher's mask goes to which row


class GrammarEngine(Protocol):
    """Compiles constraints for one vocabulary."""

    name: str  # the library and its version, for people
    n_vocab: int  # rows of the model's output, so bits of a mask

    def compile(self, response_format: Mapping[str, object]) -> Matcher:
        """A matcher for one answer. RequestError says what is wrong with the format."""

    async def compile_aside(self, response_format: Mapping[str, object]) -> Matcher:
        """`compile`, in a thread where there are any: a schema may take 0.4 s, and steps go on meanwhile."""

    def fill(self, rows: Rows, masks: bytearray) -> None:
        """Write the mask of each matcher at its row of `masks`, (n, ceil(n_vocab / 32)) u32."""


async def open_grammar(tokenizer: Tokenizer, n_vocab: int) -> GrammarEngine:
    """The engine for this place: llguidance natively, our own in a page.

    `n_vocab`: rows of the model's output, usually as many as the tokenizer has tokens, or more.
    UnsupportedError with the cure when llguidance is missing.
    """
    if not tokenizer.eog_ids:
        raise RequestError("response_format: this model has no token that ends an answer, which it needs")
    if sys.platform == "emscripten":
        from realm_web.grammar.page import PageGrammarEngine

        return PageGrammarEngine(tokenizer, n_vocab)
    from realm_web.grammar.native import NativeGrammarEngine

    return await asyncio.get_running_loop().run_in_executor(None, NativeGrammarEngine, tokenizer, n_vocab)


def read_response_format(response_format: Mapping[str, object] | None) -> Constraint | None:
    """The constraint that a response format asks for; None where any text will do.

    >>> read_response_format({"type": "regex", "regex": "[0-9]+"})
    Constraint(kind='regex', text='[0-9]+')
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise RequestError(f"response_format is {short(response_format)}: give an object with a type")
    match response_format.get("type"):
        case "text":
            _only(response_format, "response_format", "type")
            return None
        case "json_object":
            _only(response_format, "response_format", "type")
            return Constraint("schema", '{"type":"object"}')
        case "json_schema":
            _only(response_format, "response_format", "type", "json_schema")
            return Constraint("schema", _read_schema(response_format.get("json_schema")))
        case "regex":
            _only(response_format, "response_format", "type", "regex")
            return Constraint("regex", _read_text(response_format, "regex"))
        case "grammar":
            _only(response_format, "response_format", "type", "grammar")
            return _read_grammar(_read_text(response_format, "grammar"))
        case other:
            raise RequestError(f"response_format has the type {short(other)}: use {_TYPES}")


def token_table(tokenizer: Tokenizer, n_vocab: int) -> list[bytes]:
    """For each row of the model's output the bytes that it adds to a text; none for what adds no text.

    A byte token FF is left out as well: no text has it, and llguidance marks special tokens with it.
    """
    table = [tokenizer.token_bytes(i) for i in range(min(tokenizer.n_vocab, n_vocab))]
    table = [b"" if text.startswith(b"\xff") else text for text in table]
    return table + [b""] * (n_vocab - len(table))


def end_mask(eog_ids: Iterable[int], n_vocab: int) -> bytes:
    """The mask that allows nothing but the end."""
    mask = bytearray((n_vocab + 31) // 32 * 4)
    for token in eog_ids:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def _only(mapping: Mapping[str, object], where: str, *allowed: str) -> None:
    for name in mapping:
        if name not in allowed:
            raise RequestError(f"{where} has {short(name)}, which is unknown there: use {', '.join(allowed)}")


def _read_text(response_format: Mapping[str, object], key: str) -> str:
    text = response_format.get(key)
    if not isinstance(text, str) or not text:
        raise RequestError(f"response_format.{key} is {short(text)}: give a string that is not empty")
    if len(text) > MAX_TEXT:
        raise RequestError(f"response_format.{key} has {len(text):,} characters: {MAX_TEXT:,} are the limit")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise RequestError(f"response_format.{key} holds half a surrogate pair, which is no character")
    return text


def _read_grammar(text: str) -> Constraint:
    rules = len(_EBNF_RULE.findall(text))
    if rules > MAX_RULES:
        raise RequestError(f"response_format.grammar has {rules:,} rules: {MAX_RULES:,} are the limit")
    if rules:
        return Constraint("ebnf", text)
    for match in _INLINE_SCHEMA.finditer(text):  # a schema inside must not get around the limits
        try:
            schema, _ = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError):
            raise RequestError("response_format.grammar: %json is not followed by a JSON Schema") from None
        _check_schema(schema, "response_format.grammar: the schema after %json")
    return Constraint("lark", text)


def _read_schema(json_schema: object) -> str:
    """The schema of OpenAI's {"name", "description", "strict", "schema"} as JSON, in its own order."""
    if not isinstance(json_schema, Mapping):
        raise RequestError(
            f"response_format.json_schema is {short(json_schema)}: give an object with a schema"
        )
    _only(json_schema, "response_format.json_schema", "name", "description", "strict", "schema")
    schema = json_schema.get("schema")
    if not isinstance(schema, Mapping):
        raise RequestError(
            f"response_format.json_schema.schema is {short(schema)}: give a JSON Schema object"
        )
    where = "response_format.json_schema.schema"
    _check_schema(schema, where)
    try:
        text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{where} cannot be written as JSON: {error}") from None
    if len(text) > MAX_TEXT:
        raise RequestError(f"{where} has {len(text):,} characters as JSON: {MAX_TEXT:,} are the limit")
    return text


def _check_schema(schema: object, where: str) -> None:
    """The limits on what a schema asks for, before any library sees it."""
    if isinstance(schema, Mapping) and "x-guidance" in schema:  # switches of llguidance
        raise RequestError(f"{where} has x-guidance, which is not for a request to set")
    n_objects = n_patterns = 0
    multiples: list[int | float] = []
    for value in _values(schema, where):
        if not isinstance(value, Mapping):
            continue
        n_objects += 1
        if n_objects > MAX_OBJECTS:
            raise RequestError(f"{where} has more than {MAX_OBJECTS:,} subschemas, which is the limit")
        patterns = value.get("patternProperties")
        n_patterns += len(patterns) if isinstance(patterns, Mapping) else 0
        multiple = value.get("multipleOf")  # anything but a number is a property of that name
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            multiples.append(multiple)
    if n_patterns > MAX_PATTERN_PROPERTIES:
        raise RequestError(
            f"{where} has {n_patterns} patternProperties in all: {MAX_PATTERN_PROPERTIES} are the limit"
        )
    _check_multiples(multiples, where)


def _values(schema: object, where: str) -> Iterator[object]:
    """Every value of a schema, itself first; RequestError where it is too deep (as when it holds itself)."""
    level: list[object] = [schema]
    n_values = 0
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for value in level:
            yield value
            if isinstance(value, Mapping):
                if not all(isinstance(key, str) for key in value):
                    raise RequestError(f"{where} has a key that is no string: JSON has none but strings")
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            n_values += 1
            if n_values + len(below) > MAX_TEXT:
                raise RequestError(f"{where} has more than {MAX_TEXT:,} values, which is the limit")
        if not below:
            return
        level = below
    raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep, which is the limit")


def _check_multiples(multiples: Sequence[int | float], where: str) -> None:
    """Bound what `multipleOf` costs: an automaton of as many states as the multiple that all of them have.

    Powers of two and five are free: they only look at the last digits.
    """
    if not all(0 < multiple < 1e15 for multiple in multiples):
        raise RequestError(f"{where} has a multipleOf out of range: give a number above 0 and below 1e15")
    decimals = [Decimal(repr(multiple)) for multiple in multiples]
    n_digits = max((-int(number.as_tuple().exponent) for number in decimals), default=0)
    if n_digits > 20:
        raise RequestError(f"{where} has a multipleOf with {n_digits} decimals: 20 are the limit")
    common = rest = math.lcm(*(int(number.scaleb(max(n_digits, 0))) for number in decimals))
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest > 1 and common > MAX_MULTIPLE:
        raise RequestError(
            f"{where}: its multipleOf, taken together, need {common:,} states: {MAX_MULTIPLE:,} are the limit"
        )
