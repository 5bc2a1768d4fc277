"""Structured output: what the masks allow is what json, jsonschema and re accept, no more and no less."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from grammar_vocabulary import N_PADDING, allowed, random_walk, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from token_tree import TokenTree

from realm_web import gguf, grammar
from realm_web.errors import RequestError, UnsupportedError
from realm_web.grammar import machine, native, open_grammar, own, read_response_format, rules
from realm_web.grammar.ebnf import parse_ebnf
from realm_web.grammar.native import NativeGrammarEngine
from realm_web.grammar.own import OwnGrammarEngine
from realm_web.grammar.regex import parse_regex
from realm_web.tokenizer import Tokenizer

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

TOKENIZER = small_tokenizer()
N_VOCAB = TOKENIZER.n_vocab + N_PADDING
ENGINES = {
    "llguidance": NativeGrammarEngine(TOKENIZER, N_VOCAB),
    "own": OwnGrammarEngine(TOKENIZER, N_VOCAB, TokenTree),
}
OBJECT = {"type": "json_object"}


def of_schema(**schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def of_regex(text: str) -> dict:
    return {"type": "regex", "regex": text}


def of_grammar(text: str) -> dict:
    return {"type": "grammar", "grammar": text}


LINKED = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
# schema, and documents that it accepts and whose masks must let them pass
SCHEMAS = {
    "any object": (
        {"type": "object"},
        ['{"a" : [1,  2.5e3, {"b": null}], "ü\\n": "x", "": true}', "{}", "{ }"],
    ),
    "person": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "age": {"type": "integer", "minimum": 0, "maximum": 150},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        ['{"name": "Bob is here", "age": 12}', '{\n  "name": "\\"é",\n  "age": 150\n}'],
    ),
    "optional and other properties": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "n": {"type": "number"},
                "tags": {"type": "array", "items": {"enum": ["a", "bc", 1]}, "maxItems": 3},
            },
            "required": ["n"],
        },
        ['{"n":1}', '{"name":"", "n": -1.5e-2, "tags":["a",1,"a"], "namex":1, "na":[]}'],
    ),
    "other properties of a type": (
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "additionalProperties": {"type": "integer"},
        },
        ['{"a":null,"b":1}', '{"ab":1,"c":-2}', "{}"],
    ),
    "required but not described": (
        {"type": "object", "required": ["x"], "additionalProperties": {"type": "boolean"}},
        ['{"x":true}', '{"x":false,"y":true}'],
    ),
    "recursive": (LINKED, ['{"value":1,"next":{"value":-2,"next":null}}']),
    "tuple": (
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "boolean"}],
            "items": {"type": "string", "maxLength": 3},
            "minItems": 1,
            "maxItems": 4,
        },
        ["[7]", "[7 , true]", '[0,false,"ab","é\\n"]'],
    ),
    "closed tuple": (
        {"type": "array", "prefixItems": [{"const": 1}, {"const": "é"}], "items": False, "minItems": 2},
        ['[1,"é"]'],
    ),
    "list of at least two": (
        {"type": "array", "items": {"type": "null"}, "minItems": 2},
        ["[null,null,null]"],
    ),
    "empty list": ({"type": "array", "maxItems": 0}, ["[]"]),
    "string of a length": ({"type": "string", "minLength": 2, "maxLength": 4}, ['"ab"', '"é\\\\aé"']),
    "whole pattern": (
        {"type": "string", "pattern": "^[a-c]+(x|[^ -~])?$"},
        ['"abc"', '"ax"', '"a\\n"', '"aé"'],
    ),
    "loose pattern": ({"type": "string", "pattern": "b+\\."}, ['"b."', '"a bb. b"']),
    "date": ({"type": "string", "format": "date"}, ['"2024-02-28"']),
    "several types": ({"type": ["string", "null", "boolean"], "maxLength": 2}, ["null", '"ab"', "true"]),
    "any of": (
        {"anyOf": [{"type": "integer", "exclusiveMinimum": 17}, {"enum": [None, "x"]}]},
        ["18", "null"],
    ),
    "negative to positive": (
        {"type": "integer", "minimum": -25, "exclusiveMaximum": 1234},
        ["-25", "0", "1233"],
    ),
    "at most minus three": ({"type": "integer", "maximum": -3}, ["-3", "-999"]),
    "between thousands": ({"type": "integer", "minimum": 1095, "maximum": 20301}, ["1095", "9999", "20301"]),
}
REGEXES = {
    r"(a|b)+[0-9]{2}": ["abba12"],
    r"\w+@\w+\.(com|org)": ["bob@x.com"],
    r"^[^a-z]*\s\S{1,3}$": ["A9 ab"],
    r".{0,4}é?": ["abcdé", ""],
    r"(?:x{2,}|[\]\-a])y*?": ["xxx", "]yy"],
    r"\x41\u0042[\t]\$": ["AB\t$"],
}
EBNF = {  # grammar, texts of it, and others
    'root ::= [a-z]* "z"': (["abcz", "z"], ["a", "az1"]),
    'root ::= sum\nsum ::= term (("+" | "-") term)* # left to right\nterm ::= [0-9]+ | "(" sum ")"': (
        ["(12+3)-(4)", "0"],
        ["(1", "1+", "()"],
    ),
    'root ::= item ("," item){1,2}\nitem ::= [^,\\n"\\]]+ | "\\"" . "\\""': (
        ["ab,c", '"x",é,1'],
        ["a", "a,]", "a,b,c,d"],
    ),
    'root ::= "a" root "b" | ""': (["aabb", ""], ["aab", "b"]),
    "root ::= a-b a_b\na-b ::= [\\x41-\\u0043]?\na_b ::= [x-]{2}": (["Bx-", "--"], ["D--", "A-"]),
}


def read_tokenizer(path: Path) -> Tokenizer:
    n_bytes = 1 << 22
    while True:
        with path.open("rb") as file:
            try:
                return Tokenizer.from_metadata(gguf.parse(file.read(n_bytes)).metadata)
            except gguf.NeedMoreBytes:
                n_bytes *= 2


def text_of(tokens) -> str:
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()


def spellings(text: str) -> list[list[int]]:
    """The bytes one by one, and the longest tokens first."""
    data = text.encode()
    longest, at = [], 0
    while at < len(data):
        token = max(
            (i for i in range(TOKENIZER.n_vocab) if data.startswith(TOKENIZER.token_bytes(i) or b"\xff", at)),
            key=lambda i: len(TOKENIZER.token_bytes(i)),
        )
        longest.append(token)
        at += len(TOKENIZER.token_bytes(token))
    return [list(data_tokens(data)), longest]


def data_tokens(data: bytes) -> list[int]:
    by_byte = {TOKENIZER.token_bytes(i): i for i in reversed(range(TOKENIZER.n_vocab))}
    return [by_byte[bytes([byte])] for byte in data]


def passes(matcher, text: str, tokens: list[int] | None = None) -> bool:
    """Whether every token is in the mask at its place and the end is at the end."""
    for token in data_tokens(text.encode()) if tokens is None else tokens:
        is_allowed = token in allowed(matcher.mask())
        assert matcher.accept(token) == is_allowed
        if not is_allowed:
            return False
    ends = TOKENIZER.eog_ids & {*allowed(matcher.mask())}
    assert ends in (TOKENIZER.eog_ids, set())  # all of them or none
    return bool(ends)


@pytest.fixture(params=ENGINES)
def engine(request):
    return ENGINES[request.param]


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), n_free=st.integers(0, 40))
def test_a_random_walk_through_the_mask_of_a_schema_is_json_that_the_schema_accepts(name, seed, n_free):
    schema, _ = SCHEMAS[name]
    for engine in ENGINES.values():
        answer = text_of(random_walk(TOKENIZER, engine.compile(of_schema(**schema)), seed, n_free))
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_token_of_a_valid_document_is_allowed_at_its_place(engine, name):
    schema, documents = SCHEMAS[name]
    for document in documents:
        jsonschema.validate(json.loads(document), schema)
        for tokens in spellings(document):
            assert passes(engine.compile(of_schema(**schema)), document, tokens), document


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_end_is_not_allowed_before_the_end_of_a_document(engine, name):
    schema, documents = SCHEMAS[name]
    for document in documents:
        for n in range(len(document)):
            try:
                value = json.loads(document[:n])
            except ValueError:
                assert not passes(engine.compile(of_schema(**schema)), document[:n])
            else:  # a number that goes on
                assert passes(
                    engine.compile(of_schema(**schema)), document[:n]
                ) <= jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("text", REGEXES)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), n_free=st.integers(0, 12))
def test_a_random_walk_through_the_mask_of_a_regular_expression_matches_it(text, seed, n_free):
    for engine in ENGINES.values():
        answer = text_of(random_walk(TOKENIZER, engine.compile(of_regex(text)), seed, n_free))
        assert re.fullmatch(text, answer, re.ASCII), answer


@pytest.mark.parametrize("text", REGEXES)
def test_a_text_passes_the_mask_of_a_regular_expression_exactly_when_it_matches(engine, text):
    texts = [*REGEXES[text], *("".join(t) for n in range(4) for t in itertools.product("ab1@. é", repeat=n))]
    for answer in texts[:120]:
        matches = re.fullmatch(text, answer, re.ASCII) is not None
        assert passes(engine.compile(of_regex(text)), answer) == matches, answer


@pytest.mark.parametrize("text", EBNF)
def test_an_ebnf_grammar_lets_its_texts_pass(engine, text):
    right, wrong = EBNF[text]
    for answer in right:
        for tokens in spellings(answer):
            assert passes(engine.compile(of_grammar(text)), answer, tokens)
    for answer in wrong:
        assert not passes(engine.compile(of_grammar(text)), answer)


def test_a_lark_grammar_is_enforced_natively_and_refused_in_a_page():
    lark = 'start: "answer: " (/[0-9]+/ | %json {"type": "boolean"})'
    for answer, is_right in (
        ("answer: 12", True),
        ("answer: true", True),
        ("answer: ", False),
        ("a1", False),
    ):
        assert passes(ENGINES["llguidance"].compile(of_grammar(lark)), answer) == is_right
    with pytest.raises(RequestError, match="reads EBNF"):
        ENGINES["own"].compile(of_grammar(lark))


@pytest.mark.parametrize(
    "name", [name for name in SCHEMAS if name != "date"]
)  # llguidance gives February 29 days
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_both_engines_make_the_same_masks(name, seed):
    schema, _ = SCHEMAS[name]
    theirs, ours = (engine.compile(of_schema(**schema)) for engine in ENGINES.values())
    for token in random_walk(TOKENIZER, ours, seed, 20):
        assert theirs.accept(token)
        found, expected = ours.mask(), theirs.mask()
        assert found == expected, {*allowed(found)} ^ {*allowed(expected)}


def test_masks_of_a_real_vocabulary_are_the_same_in_both_engines(smollm2_path):
    tokenizer = read_tokenizer(smollm2_path)
    theirs = NativeGrammarEngine(tokenizer, tokenizer.n_vocab + 64)
    ours = OwnGrammarEngine(tokenizer, tokenizer.n_vocab + 64, TokenTree)
    for name in ("person", "optional and other properties", "recursive", "tuple"):
        schema, documents = SCHEMAS[name]
        a, b = theirs.compile(of_schema(**schema)), ours.compile(of_schema(**schema))
        for token in tokenizer.encode(documents[-1], add_special=False):
            assert a.mask() == b.mask()
            assert a.accept(token) and b.accept(token)
        assert a.mask() == b.mask() and a.is_finished and b.is_finished


def test_a_finished_answer_allows_only_the_tokens_that_end_it(engine):
    matcher = engine.compile(of_regex("ab"))
    assert not matcher.is_finished
    for token in data_tokens(b"ab"):
        assert not TOKENIZER.eog_ids & {*allowed(matcher.mask())}
        assert matcher.accept(token)
    assert matcher.is_finished and {*allowed(matcher.mask())} == TOKENIZER.eog_ids
    end = min(TOKENIZER.eog_ids)
    assert matcher.accept(end) and not matcher.accept(end)
    assert matcher.is_finished and {*allowed(matcher.mask())} == TOKENIZER.eog_ids


def test_an_answer_that_may_end_may_go_on(engine):
    matcher = engine.compile(of_regex("a+"))
    assert matcher.accept(*data_tokens(b"a"))
    assert not matcher.is_finished and {*allowed(matcher.mask())} > TOKENIZER.eog_ids


def test_a_mask_has_a_bit_for_every_row_and_none_for_padding_or_control_tokens(engine):
    matcher = engine.compile(of_regex(r"[^\x00]*"))
    mask = matcher.mask()
    assert len(mask) == (N_VOCAB + 31) // 32 * 4
    hidden = {i for i in range(TOKENIZER.n_vocab) if TOKENIZER.is_special(i)} - TOKENIZER.eog_ids
    assert not {*allowed(mask)} & (hidden | {*range(TOKENIZER.n_vocab, 8 * len(mask))})


def test_a_refused_token_changes_nothing(engine):
    matcher = engine.compile(OBJECT)
    before = matcher.mask()
    for token in (*data_tokens(b"[x"), N_VOCAB - 1, N_VOCAB + 5, *TOKENIZER.eog_ids):
        assert not matcher.accept(token)
    assert matcher.mask() == before and matcher.accept(*data_tokens(b"{"))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 12), back=st.integers(0, 12))
def test_rolling_back_and_forking_lead_to_the_masks_that_were(seed, n, back):
    for engine in ENGINES.values():
        matcher = engine.compile(OBJECT)
        masks = [matcher.mask()]
        for _ in zip(range(n), random_walk(TOKENIZER, matcher, seed, n), strict=False):
            masks.append(matcher.mask())
        back = min(back, len(masks) - 1)
        fork = matcher.fork()
        matcher.rollback(back)
        assert matcher.mask() == masks[len(masks) - 1 - back]
        assert fork.mask() == masks[-1]
        fork.close()


def test_the_end_is_rolled_back_like_any_token(engine):
    matcher = engine.compile(of_regex("a?"))
    masks = [matcher.mask()]
    assert matcher.accept(*data_tokens(b"a"))
    assert matcher.accept(min(TOKENIZER.eog_ids))
    fork = matcher.fork()
    fork.rollback(1)
    assert fork.is_finished
    matcher.rollback(2)
    assert matcher.mask() == masks[0]
    with pytest.raises(ValueError, match="cannot take back"):
        matcher.rollback(1)


def test_fill_writes_every_mask_at_its_row(engine):
    formats = [OBJECT, of_regex("a+"), of_schema(type="integer"), of_regex("b")]
    matchers = [engine.compile(each) for each in formats]
    assert matchers[3].accept(*data_tokens(b"b"))
    n_bytes = len(matchers[0].mask())
    masks = bytearray(b"\x55" * (n_bytes * 6))
    engine.fill([(matchers[0], 4)], masks)
    engine.fill([(matchers[3], 0)], masks)
    engine.fill([(matchers[1], 1), (matchers[2], 5), (matchers[3], 3)], masks)
    rows = [bytes(masks[i * n_bytes : (i + 1) * n_bytes]) for i in range(6)]
    end, number = matchers[3].mask(), matchers[2].mask()
    assert rows == [end, matchers[1].mask(), b"\x55" * n_bytes, end, matchers[0].mask(), number]
    engine.fill([(matchers[3], 2), (matchers[3].fork(), 1)], masks)
    assert masks[n_bytes : 3 * n_bytes] == end * 2


def test_requests_of_one_format_share_the_compiled_grammar_and_not_the_place(engine):
    first, second = engine.compile(OBJECT), engine.compile(dict(OBJECT))
    assert first.accept(*data_tokens(b"{"))
    assert second.accept(*data_tokens(b"{")) and not second.accept(*data_tokens(b"{"))


def test_a_sentencepiece_vocabulary_is_masked_by_what_its_tokens_add_to_a_text():
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "{",
        "}",
        "▁{",
        '"a":',
        "▁1",
    ]
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": [0.0] * len(tokens),
            "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 6],
        }
    )
    for engine in (NativeGrammarEngine(tokenizer, 300), OwnGrammarEngine(tokenizer, 300, TokenTree)):
        matcher = engine.compile(
            of_schema(type="object", properties={"a": {"const": 1}}, additionalProperties=False)
        )
        assert {tokens[i] for i in allowed(matcher.mask())} == {"{", "<0x7B>"}
        for text in ("{", '"a":', "▁1", "▁"):
            assert matcher.accept(tokens.index(text)), text
        assert {tokens[i] for i in allowed(matcher.mask())} >= {"}", "▁", "<0x7D>"}
        assert matcher.accept(tokens.index("}")) and allowed(matcher.mask()) == [2]


def test_open_grammar_takes_llguidance_and_says_how_to_get_it(monkeypatch):
    opened = asyncio.run(open_grammar(TOKENIZER, N_VOCAB))
    assert opened.name.startswith("llguidance ") and opened.n_vocab == N_VOCAB
    monkeypatch.setattr(native, "llguidance", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'realm-web\[grammar\]'"):
        asyncio.run(open_grammar(TOKENIZER, N_VOCAB))


def test_a_model_without_an_end_token_has_no_structured_output():
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "b"],
            "tokenizer.ggml.merges": [],
        }
    )
    with pytest.raises(RequestError, match="no token that ends an answer"):
        asyncio.run(open_grammar(tokenizer, 2))


DEEP: dict = {}
for _ in range(70):
    DEEP = {"items": DEEP}
ROUND: dict = {}
ROUND["items"] = ROUND


@pytest.mark.parametrize(
    ("response_format", "reason"),
    [
        ("json_object", "give an object with a type"),
        ({}, "has the type None: use text, json_object"),
        ({"type": "xml"}, "has the type 'xml': use text"),
        ({"type": "text", "schema": 1}, "has 'schema', which is unknown there: use type"),
        ({"type": "json_object", "json_schema": {}}, "unknown there"),
        ({"type": "json_schema"}, "give an object with a schema"),
        ({"type": "json_schema", "json_schema": {"schema": []}}, "give a JSON Schema object"),
        (
            {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}},
            "use name, description, strict, schema",
        ),
        (of_schema(enum=[float("nan")]), "cannot be written as JSON"),
        (of_schema(enum=[{1}]), "cannot be written as JSON"),
        (of_schema(properties={1: True}), "a key that is no string"),
        (of_schema(description="x" * 140_000), "characters as JSON: 131,072 are the limit"),
        (of_schema(enum=[0] * 140_000), "more than 131,072 values"),
        (of_schema(properties={f"p{i}": {} for i in range(2000)}), "more than 2,000 subschemas"),
        (of_schema(patternProperties={f"^{i}": True for i in range(65)}), "65 patternProperties in all"),
        (of_schema(**DEEP), "nested more than 64 deep"),
        (of_schema(**ROUND), "nested more than 64 deep"),
        (of_schema(multipleOf=999983), "need 999,983 states"),
        (of_schema(allOf=[{"multipleOf": 997}, {"multipleOf": 991}]), "need 988,027 states"),
        (of_schema(multipleOf=0), "multipleOf out of range"),
        (of_schema(multipleOf=1e-30), "30 decimals"),
        (of_schema(**{"x-guidance": {"lenient": True}}), "x-guidance"),
        (of_regex(""), "give a string that is not empty"),
        (of_regex(7), "give a string that is not empty"),
        (of_regex("a" * 140_000), "140,000 characters"),
        (of_regex("\ud800"), "half a surrogate pair"),
        (of_grammar("a ::= b\n" * 1001), "1,001 rules"),
        (of_grammar("start: %json nonsense"), "%json is not followed by a JSON Schema"),
        (of_grammar('start: %json {"multipleOf": 999983}'), "after %json: its multipleOf"),
    ],
)
def test_a_response_format_out_of_bounds_is_refused_by_name(response_format, reason):
    with pytest.raises(RequestError, match=re.escape(reason)):
        read_response_format(response_format)


def test_plain_text_needs_no_grammar(engine):
    assert read_response_format(None) is None and read_response_format({"type": "text"}) is None
    with pytest.raises(RequestError, match="nothing to compile"):
        engine.compile({"type": "text"})


def test_properties_that_are_called_like_keywords_are_properties():
    schema = {
        "properties": {name: {"type": "null"} for name in ("multipleOf", "patternProperties", "x-guidance")}
    }
    assert read_response_format(of_schema(type="object", **schema)) is not None


@pytest.mark.parametrize(
    ("response_format", "reason"),
    [
        (of_schema(**{"not": {"type": "string"}}), 'Unimplemented keys: ["not"]'),
        (of_schema(type="strange"), "strange"),
        (of_schema(**{"$ref": "#/nowhere"}), "does not exist"),
        (of_schema(**{"$ref": "http://localhost/x"}), "retrieving it failed"),
        (of_regex("(a"), "unclosed group"),
        (of_regex("a(?=b)"), "look-around"),
        (of_regex(r"(a)\1"), "backreferences are not supported"),
        (of_grammar("start: missing"), "missing"),
        (of_grammar("nonsense"), "Expected token ':'"),
    ],
)
def test_what_llguidance_cannot_compile_is_refused_in_one_line(response_format, reason):
    with pytest.raises(RequestError, match=re.escape(reason)) as caught:
        ENGINES["llguidance"].compile(response_format)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"not": {"type": "string"}}, "has 'not' beside no type, which the page cannot enforce"),
        ({"type": "number", "minimum": 1}, "has 'minimum' beside number"),
        ({"type": "array", "uniqueItems": True}, "has 'uniqueItems' beside array"),
        ({"anyOf": [{"type": "null"}], "properties": {}}, "has 'properties' beside anyOf"),
        ({"anyOf": []}, "#/anyOf is no list of schemas"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "two schemas for values of one type"),
        ({"oneOf": [{"enum": [1]}, {"enum": [2]}]}, "two schemas for values of one type"),
        ({"allOf": [{}, {}]}, "more than one schema"),
        ({"$ref": "#/nowhere"}, "refers to '#/nowhere', which is not there"),
        ({"$ref": "http://localhost/x"}, "only references into the schema itself"),
        ({"type": "strange"}, "has the type 'strange'"),
        ({"properties": {"a": 1}}, "a schema is an object, true or false"),
        ({"properties": []}, "properties that are no object"),
        ({"prefixItems": {}}, "prefixItems that are no list"),
        ({"enum": "ab"}, "an enum that is no list"),
        ({"type": "string", "pattern": "a", "maxLength": 1}, "of which the page can enforce one"),
        ({"type": "string", "format": "idn-email"}, "has the format 'idn-email': use date"),
        ({"type": "string", "pattern": 1}, "give a string"),
        ({"type": "string", "pattern": "a\\b"}, "#/pattern: \\b is not supported"),
        ({"type": "string", "maxLength": -1}, "has maxLength of -1"),
        ({"type": "string", "maxLength": 10**6}, "more than 100,000 states"),
        ({"type": "integer", "minimum": 1.5}, "has minimum of 1.5: give a whole number"),
        ({"type": "object", "properties": {'"': {}}}, "a character that JSON escapes"),
        ({"type": "object", "properties": {"a" * 5000: {}}}, "too long a property"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "there is no text that it allows"),
        ({"type": "array", "minItems": 2, "maxItems": 1}, "there is no text that it allows"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "there is no text that it allows"),
        ({"type": "array", "items": False, "minItems": 1}, "there is no text that it allows"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "there is no text that it allows"),
    ],
)
def test_a_schema_that_the_page_cannot_enforce_is_refused_by_keyword(schema, reason):
    with pytest.raises(RequestError, match=re.escape(reason)):
        ENGINES["own"].compile(of_schema(**schema))


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, '"x"'),
        ({"allOf": [{"type": "null"}]}, "null"),
        ({"type": "integer", "enum": [1, "1", 2.0, 1.5]}, "2.0"),
        ({"enum": [1, 2], "const": 2}, "2"),
        ({"prefixItems": [{"type": "null"}], "$comment": "items of any type"}, "[null,1]"),
        ({"type": "object", "properties": {"a": False}}, '{"ab":1}'),
        ({"$defs": {"a/b": {"type": "null"}}, "$ref": "#/$defs/a~1b"}, "null"),
        ({"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"$ref": "#/anyOf/0"}}]}, "[true]"),
    ],
)
def test_what_the_page_reads_beyond_the_plain_cases(schema, value):
    jsonschema.validate(json.loads(value), schema)
    assert passes(ENGINES["own"].compile(of_schema(**schema)), value)


def test_a_property_that_nothing_satisfies_is_never_begun():
    matcher = ENGINES["own"].compile(of_schema(properties={"a": False}, additionalProperties=False))
    assert passes(matcher, "{}")
    assert not passes(ENGINES["own"].compile(of_schema(properties={"a": False})), '{"a"')


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(a", "a ) is missing"),
        ("a)", "a ) too many"),
        ("a$b", "$ stands before the end"),
        ("(a$)", "$ inside of a group"),
        ("a^", "^ stands after the beginning"),
        ("^a|b$", "put the alternatives into a group"),
        ("*a", "* repeats nothing"),
        ("a**", "two quantifiers in a row"),
        ("a{2,1}", "{2,1} counts backwards"),
        ("a{x}", "{ is not {n}"),
        ("(?i)a", "look-around and mode switches"),
        ("[a", "it ends in the middle"),
        ("[z-a]", "runs backwards"),
        (r"[\d-z]", "begins or ends with a class"),
        ("[[:alpha:]]", "[:name:] is not supported"),
        (r"\ud800", "is no character"),
        (r"\pL", r"\p is not supported"),
        ("(" * 101 + ")" * 101, "nested more than 100 deep"),
    ],
)
def test_a_regular_expression_that_cannot_be_read_is_refused_with_its_place(text, reason):
    with pytest.raises(RequestError, match=re.escape(reason)) as caught:
        parse_regex(text)
    assert "(character " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('root ::= "a', "line 1: cannot read '\"a'"),
        ("root ::= a", "the rule a is not defined"),
        ("a ::= b\nb ::= a", "no rule is called root"),
        ('root ::= "a"\nroot ::= "b"', "line 2: the rule root is defined a second time"),
        ('"a" root ::= "b"', "a rule is wanted here"),
        ('root ::= ("a"', "the ( has no )"),
        ('root ::= "a")', "a rule is wanted here"),
        ("root ::= *", "* repeats nothing"),
        ("root ::= []", "a class of characters is empty"),
        ("root ::= [z-a]", "runs backwards"),
        ('root ::= "a"{3,2}', "{3,2} counts backwards"),
        (r'root ::= "\ud800"', "is no character"),
        (r'root ::= "\xg"', "is no whole escape"),
        ("root ::= " + "(" * 31 + '"a"' + ")" * 31, "nested more than 30 deep"),
    ],
)
def test_an_ebnf_grammar_that_cannot_be_read_is_refused_with_its_line(text, reason):
    with pytest.raises(RequestError, match=re.escape(reason)):
        parse_ebnf(text)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_ranges_of_characters_are_spelled_as_utf8(a, b, point):
    low, high = sorted((a, b))
    spelled = list(rules.utf8_ranges(low, high))
    if 0xD800 <= point <= 0xDFFF:
        return
    data = chr(point).encode()
    hits = [
        s
        for s in spelled
        if len(s) == len(data) and all(x <= c <= y for (x, y), c in zip(s, data, strict=True))
    ]
    assert len(hits) == (low <= point <= high)


def test_a_rule_that_begins_with_itself_is_refused():
    with pytest.raises(RequestError, match="begins with itself"):
        ENGINES["own"].compile(of_grammar('root ::= root "a" | "b"'))


def test_a_place_where_the_vocabulary_cannot_go_on_is_an_error_and_no_silent_end(engine):
    """A grammar may want a byte that no token has."""
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": ["a", "<|end|>"],
            "tokenizer.ggml.token_type": [1, 3],
            "tokenizer.ggml.merges": [],
        }
    )
    kind = type(engine)
    poor = kind(tokenizer, 2) if kind is NativeGrammarEngine else kind(tokenizer, 2, TokenTree)
    matcher = poor.compile(of_regex("ab"))
    assert matcher.accept(0)
    with pytest.raises(RequestError, match="response_format"):
        matcher.mask()


def test_a_grammar_that_becomes_too_complex_on_the_way_is_an_error_and_no_silent_end(monkeypatch):
    monkeypatch.setattr(native, "_MAX_STATES", 60)
    engine = NativeGrammarEngine(TOKENIZER, N_VOCAB)
    whole = of_regex("(.*a){9}.{30}b")
    with pytest.raises(RequestError, match="response_format: lexer error"):
        for _ in random_walk(TOKENIZER, engine.compile(whole), 1, 100):
            pass
    rows = [(engine.compile(whole), 0), (engine.compile(whole), 1)]
    with pytest.raises(RequestError, match="response_format: lexer error"):
        for token in data_tokens(b"aba" * 30):
            engine.fill(rows, bytearray(2 * len(engine.end_mask)))
            assert all(matcher.accept(token) for matcher, _ in rows)


def test_our_engine_forgets_places_and_masks_and_goes_on(monkeypatch):
    engine = OwnGrammarEngine(TOKENIZER, N_VOCAB, TokenTree)
    text = '{"a" : [1,  2.5e3, {"b": null}], "x": "hello", "": true}'
    expected = engine.compile(OBJECT)
    masks = [expected.mask() for token in data_tokens(text.encode()) if expected.accept(token)]
    monkeypatch.setattr(machine, "REMEMBERED", 3)
    monkeypatch.setattr(own, "REMEMBERED", 2)
    forgetful = OwnGrammarEngine(TOKENIZER, N_VOCAB, TokenTree).compile(OBJECT)
    assert [forgetful.mask() for token in data_tokens(text.encode()) if forgetful.accept(token)] == masks


HOSTILE = """
import json, random, resource, signal, string, sys
sys.path[:0] = [{tests!r}, {root!r}]
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from grammar_vocabulary import allowed, small_tokenizer
from token_tree import TokenTree
from realm_web.errors import RequestError
from realm_web.grammar.native import NativeGrammarEngine
from realm_web.grammar.own import OwnGrammarEngine

chance = random.Random(1)
word = lambda n: "".join(chance.choice(string.ascii_letters) for _ in range(n))
schema = lambda **s: {{"type": "json_schema", "json_schema": {{"schema": s}}}}
regex = lambda r: {{"type": "regex", "regex": r}}
lark = lambda g: {{"type": "grammar", "grammar": g}}
text = {{"type": "string"}}
twice = lambda key: {{f"d{{i}}": {{key: [{{"$ref": f"#/$defs/d{{i + 1}}"}}] * 2}} for i in range(25)}}
branches = lambda i: {{"anyOf": [{{"properties": {{f"p{{i}}{{j}}": text}}}} for j in range(4)]}}
optional = "".join(f'\\nr{{i}} ::= "a"?' for i in range(900))
cases = [
    schema(enum=[word(8) for _ in range(11000)]),
    schema(type="object", properties={{word(8): text for _ in range(1990)}}),
    schema(anyOf=[{{"type": "object", "properties": {{word(5): {{"const": i}}}}}} for i in range(660)]),
    schema(allOf=[branches(i) for i in range(12)]),
    schema(patternProperties={{f"^{{word(3)}}.*{{i}}$": text for i in range(64)}}),
    schema(**{{"$defs": twice("anyOf") | {{"d25": text}}, "$ref": "#/$defs/d0"}}),
    schema(**{{"$defs": twice("allOf") | {{"d25": text}}, "$ref": "#/$defs/d0"}}),
    schema(**{{"$ref": "#"}}),
    schema(type="string", maxLength=10**6),
    schema(type="array", items=text, minItems=10**6),
    schema(type="integer", minimum=1, maximum=10**300),
    schema(type="number", multipleOf=59999),
    schema(type="string", pattern="(.*a){{25}}.{{30}}"),
    regex("((a{{100}}){{100}}){{100}}"),
    regex("(a|a)*{{1000}}"),
    regex("(.{{0,1000}}x){{0,1000}}"),
    regex("(x+x+)+y"),
    regex("[a-z]*a[a-z]{{20}}"),
    regex("(" * 5000 + ")" * 5000),
    regex("|".join(word(20) for _ in range(5000))),
    lark("start: " + "(" * 1000 + '"a"' + ")" * 1000),
    lark("start: A\\nA: ~/(.*a.{{12}}|.*b.{{14}}|.*c.{{13}})/ & /(.*c.{{18}}|.*d.{{11}})/"),
    lark("root ::= " + " ".join(f"r{{i}}" for i in range(900)) + optional),
    lark("root ::= (((((a{{99}}){{99}}){{99}}){{99}}){{99}})\\na ::= root | 'x'".replace("'", '"')),
]
tokenizer = small_tokenizer()
for engine in (NativeGrammarEngine(tokenizer, 400), OwnGrammarEngine(tokenizer, 400, TokenTree)):
    for i, case in enumerate(cases):
        signal.alarm(20)  # ends the process
        print(engine.name, i, flush=True)
        try:
            matcher = engine.compile(case)
            for _ in range(20):
                matcher.accept(chance.choice(allowed(matcher.mask())))
        except RequestError:
            pass
"""


def test_hostile_formats_end_soon_and_in_little_memory():
    """In a process of its own with 3 GiB of address space, which the alarm ends when a case takes 20 s."""
    tests = Path(__file__).parent
    script = HOSTILE.format(tests=str(tests), root=str(tests.parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.returncode, done.stderr[-500:])
    assert grammar.MAX_TEXT == 131072  # the cases come up to the limits


PATTERNS = ('^[^"]$', r"^[^\\]$", r'^[^"\\]$', "^[^ -~]$", r"^[\u0000-\u001f]$", "^(a|[^b]){1,2}$")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_with_control_characters_does_not_let_the_quote_and_the_backslash_through(engine, pattern):
    for value in ('"', "\\", "\n", "é", "b"):
        matcher = engine.compile(of_schema(type="string", pattern=pattern))
        is_right = re.search(pattern, value) is not None
        assert passes(matcher, json.dumps(value, ensure_ascii=False)) == is_right, value


def test_llguidance_still_needs_its_patterns_rewritten(monkeypatch):
    """When this fails, `safe_pattern` can go."""
    monkeypatch.setattr(native, "safe_pattern", lambda text: text)
    fresh = NativeGrammarEngine(TOKENIZER, N_VOCAB)
    assert passes(fresh.compile(of_schema(type="string", pattern='^[^"]$')), '"\\""')


def test_patterns_are_rewritten_only_where_they_need_it():
    for text in ("^[a-z]+$", r"\s*\d.", "a(?=b)", r"[\u0000-\u001e]", "[^a]"):
        assert native.safe_pattern(text) == text
    for text in ('^(a|[^"b]{2,})+?é$', r"\D[^\\]", r'[^"]|y*'):
        again = re.compile(
            re.sub(r"\\u\{([0-9a-f]+)\}", lambda m: f"\\U{int(m[1], 16):08x}", native.safe_pattern(text))
        )
        assert again.pattern != text
        for value in ("a", "aé", '"é', "cdé", "x1y", " 1 ", "y", "xx", ""):
            assert bool(again.search(value)) == bool(re.search(text, value, re.ASCII)), (text, value)


def test_what_looks_like_a_pattern_inside_of_an_enum_is_left_alone():
    value = {"pattern": '[^"]', "patternProperties": {'[^"]': 1}}
    matcher = ENGINES["llguidance"].compile(of_schema(enum=[value], items={"pattern": '[^"]'}))
    assert passes(matcher, json.dumps(value, separators=(",", ":")))
