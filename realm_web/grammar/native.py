"""Structured output natively: llguidance, a derivative-based lexer under an Earley parser, in Rust.

https://github.com/guidance-ai/llguidance. Its limits on work per step and on the size of the automaton are
set here. Forced tokens are off: where the grammar leaves one continuation, the model still chooses how to
cut it into tokens, so the mask is exactly the set of tokens that may follow, as in the page.

The lock of the interpreter is released while a grammar compiles and while masks are computed; `fill`
spreads masks over threads of the library's own.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from realm_web.errors import RequestError, UnsupportedError
from realm_web.grammar import (
    CACHED,
    MAX_SPACE,
    Constraint,
    Rows,
    end_mask,
    read_response_format,
    token_table,
)
from realm_web.grammar.ebnf import parse_ebnf, rules_to_lark
from realm_web.grammar.regex import parse_regex
from realm_web.grammar.rules import (
    Chars,
    Choice,
    Node,
    Ranges,
    Repeat,
    Sequence,
    complement,
    intersection,
    without_surrogates,
)
from realm_web.tokenizer import Tokenizer

try:
    import llguidance
except ImportError:
    llguidance = None

_OPTIONS = '%llguidance {"no_forcing": true}\n'
_SPACE = f"[ \\n\\t\\r]{{1,{MAX_SPACE}}}"
# An automaton of 20,000 states takes about 30 MB. The other limits are the library's: at most about 20 ms of
# work for one mask and 500,000 symbols of grammar.
_MAX_STATES = 20_000
# Without \\u: spelled with it, a property of the schema would pass for another one (llguidance 1.9).
_ESCAPES = 'nrbtf\\\\"'
_QUOTES: Ranges = ((0x22, 0x22), (0x5C, 0x5C))
_CONTROLS: Ranges = ((0x00, 0x1F),)
_NOT_US = complement(((0x1F, 0x1F),))
_WHERE = re.compile(r"^(at )?\d+\(\d+\): ")


class NativeGrammarEngine:
    """llguidance for one vocabulary. Made in 0.1 s for 49,152 tokens and in 1.1 s for 262,144."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        if llguidance is None:
            raise UnsupportedError("response_format needs llguidance: pip install 'realm-web[grammar]'")
        self.name = f"llguidance {llguidance.__version__}"
        self.n_vocab = n_vocab
        self.eog_ids = frozenset(token for token in tokenizer.eog_ids if token < n_vocab)
        self.end_mask = end_mask(self.eog_ids, n_vocab)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, n_vocab)), eos_token=sorted(self.eog_ids)
        )
        self._limits = llguidance.LLParserLimits(max_lexer_states=_MAX_STATES, verbose_errors=False)
        self._compiled = lru_cache(CACHED)(self._compile)
        self._threads: llguidance.LLExecutor | None = None

    def compile(self, response_format: Mapping[str, object]) -> NativeMatcher:
        constraint = read_response_format(response_format)
        if constraint is None:
            raise RequestError("response_format asks for any text: there is nothing to compile")
        return NativeMatcher(self, self._compiled(constraint).deep_copy())

    async def compile_aside(self, response_format: Mapping[str, object]) -> NativeMatcher:
        return await asyncio.get_running_loop().run_in_executor(None, self.compile, response_format)

    def fill(self, rows: Rows, masks: bytearray) -> None:
        n_bytes = len(self.end_mask)
        if len(rows) == 1:  # no thread to wake
            ((matcher, row),) = rows
            masks[row * n_bytes : (row + 1) * n_bytes] = matcher.mask()
            return
        running = []
        for matcher, row in rows:
            if matcher.is_finished:
                masks[row * n_bytes : (row + 1) * n_bytes] = self.end_mask
            else:
                running.append((matcher, row))
        if not running:
            return
        if self._threads is None:
            self._threads = llguidance.LLExecutor()
        memory = (ctypes.c_char * len(masks)).from_buffer(masks)
        self._threads.unsafe_compute_mask_ptr(
            [(matcher.library, row) for matcher, row in running],
            ctypes.addressof(memory),
            n_bytes,
            len(masks) // n_bytes,
        )
        for matcher, _ in running:
            matcher.check()

    def _compile(self, constraint: Constraint) -> llguidance.LLMatcher:
        grammar = _OPTIONS + _lark(constraint)
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, limits=self._limits, log_level=0)
        if matcher.is_error():
            raise RequestError(f"response_format: {_reason(matcher.get_error())}")
        return matcher


class NativeMatcher:
    """One answer's place in its grammar; `library` is llguidance's own matcher."""

    def __init__(self, engine: NativeGrammarEngine, library: llguidance.LLMatcher) -> None:
        self.library = library
        self._engine = engine
        self._has_ended = False  # a token that ends the generation was accepted; the library does not see it

    def mask(self) -> bytes:
        if self.is_finished:
            return self._engine.end_mask
        mask = self.library.compute_bitmask()
        self.check()
        return mask[: len(self._engine.end_mask)]  # the library may add a word

    def accept(self, token_id: int) -> bool:
        if self._has_ended or not 0 <= token_id < self._engine.n_vocab:
            return False
        if token_id in self._engine.eog_ids:
            self._has_ended = self.library.is_accepting()
            return self._has_ended
        return self.library.try_consume_tokens([token_id]) == 1

    @property
    def is_finished(self) -> bool:
        return self._has_ended or (self.library.is_stopped() and self.library.is_accepting())

    def fork(self) -> NativeMatcher:
        copy = NativeMatcher(self._engine, self.library.deep_copy())
        copy._has_ended = self._has_ended
        return copy

    def rollback(self, n_tokens: int) -> None:
        if n_tokens and self._has_ended:
            self._has_ended = False
            n_tokens -= 1
        if n_tokens and not self.library.rollback(n_tokens):
            raise ValueError(f"cannot take back {n_tokens} tokens: {self.library.get_error()}")

    def close(self) -> None:
        del self.library

    def check(self) -> None:
        """RequestError when the library gave up; its mask then only looks like a mask (it allows the end)."""
        if self.library.is_error():
            raise RequestError(f"response_format: {_reason(self.library.get_error())}")
        if self.library.is_stopped() and not self.library.is_accepting():
            raise RequestError("response_format: the grammar has a dead end, no token leads on from here")


class _Vocabulary:
    """What llguidance asks of a tokenizer. It would tokenize only to force tokens, which is off."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.tokens = token_table(tokenizer, n_vocab)
        self.special_token_ids = [
            i for i in range(min(tokenizer.n_vocab, n_vocab)) if tokenizer.is_special(i)
        ]
        for i in self.special_token_ids:  # so that a Lark grammar can name them: <|im_start|>
            self.tokens[i] = b"\xff" + tokenizer.token_text(i).encode()
        self.eos_token_id = min(tokenizer.eog_ids)
        self.bos_token_id = tokenizer.bos_id

    def __call__(self, text: bytes) -> list[int]:
        return []


def _lark(constraint: Constraint) -> str:
    match constraint.kind:
        case "schema":
            schema = _with_safe_patterns(json.loads(constraint.text))
            schema["x-guidance"] = {"whitespace_pattern": _SPACE, "json_allowed_escapes": _ESCAPES}
            return f"start: %json {json.dumps(schema)}"
        case "regex":
            return f"start: /{llguidance.regex_to_lark(constraint.text, 'dws')}/"
        case "ebnf":
            return rules_to_lark(parse_ebnf(constraint.text))
    return constraint.text


def _with_safe_patterns(value: Any) -> Any:
    """A schema with its patterns rewritten where llguidance 1.9 lets too much through.

    Inside of a JSON string it takes a class with all control characters, as [^"] is, for one with the quote
    and the backslash. Such a class loses the last of them, the unit separator. To be dropped once
    `"pattern": "^[^\\"]$"` no longer accepts a quote; a test says so.
    """
    if isinstance(value, list):
        return [_with_safe_patterns(each) for each in value]
    if not isinstance(value, dict):
        return value
    safe = {
        key: each if key in ("enum", "const") else _with_safe_patterns(each) for key, each in value.items()
    }
    if isinstance(safe.get("pattern"), str):
        safe["pattern"] = safe_pattern(safe["pattern"])
    if isinstance(safe.get("patternProperties"), dict):
        safe["patternProperties"] = {
            safe_pattern(key): each for key, each in safe["patternProperties"].items()
        }
    return safe


def safe_pattern(text: str) -> str:
    """The pattern, written anew if a class in it needs it; as it is where our own reader cannot read it."""
    try:
        pattern = parse_regex(text)
    except RequestError:
        return text
    node = _without_us(pattern.node)
    if node == pattern.node:
        return text
    return "^" * pattern.from_start + f"(?:{_regex(node)})" + "$" * pattern.to_end


def _without_us(node: Node) -> Node:
    match node:
        case Chars(ranges) if intersection(ranges, _CONTROLS) == _CONTROLS:
            return node if intersection(ranges, _QUOTES) == _QUOTES else Chars(intersection(ranges, _NOT_US))
        case Repeat(item, low, high):
            return Repeat(_without_us(item), low, high)
        case Sequence(items) | Choice(items):
            return type(node)(tuple(map(_without_us, items)))
    return node


def _regex(node: Node) -> str:
    match node:
        case Chars(ranges):
            pairs = (f"\\u{{{low:x}}}-\\u{{{high:x}}}" for low, high in without_surrogates(ranges))
            return f"[{''.join(pairs)}]"
        case Repeat(item, low, high):
            return f"(?:{_regex(item)}){{{low},{'' if high is None else high}}}"
        case Choice(items):
            return f"(?:{'|'.join(map(_regex, items))})"
        case Sequence(items):
            return "".join(map(_regex, items))
    raise AssertionError(node)


def _reason(error: str) -> str:
    """What is wrong, out of an error with excerpts and hints over many lines."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    known = next((line for line in lines if line.startswith("error: ")), None)  # of the regex parser
    reason = _WHERE.sub("", known or (lines[0] if lines else "the grammar is refused"))
    return reason if len(reason) <= 240 else f"{reason[:237]}..."
