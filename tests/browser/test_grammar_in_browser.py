"""Structured output in a real page: our engine there gives llguidance's masks, on SmolLM2's vocabulary."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest
from test_grammar import EBNF, REGEXES, SCHEMAS, of_grammar, of_regex, of_schema, read_tokenizer

from realm_web.grammar.native import NativeGrammarEngine

pytest.importorskip("llguidance")
HERE = Path(__file__).resolve().parent
SAME = ("any object", "person", "optional and other properties", "recursive", "tuple", "loose pattern")


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return read_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def native(tokenizer):
    return NativeGrammarEngine(tokenizer, tokenizer.n_vocab + 64)


@pytest.fixture(scope="module")
def ask(browser, site, serve, smollm2_path):
    """ask(response format, token ids) -> what the page's engine said."""
    files = {f"/grammar/{name}": HERE / name for name in ("grammar.html", "grammar.js")}
    offered = type(site)(
        site.root, site.extra | files | {"/grammar/model.gguf": smollm2_path}, site.documents
    )
    page = browser.new_page()
    page.goto(f"http://localhost:{serve(offered)}/grammar/grammar.html")

    def asked(response_format: dict, tokens: list[int]) -> dict:
        request = json.dumps({"format": response_format, "tokens": tokens})
        return json.loads(page.evaluate("(request) => window.ask(request)", request))

    yield asked
    page.close()


def masks_of(engine, response_format: dict, tokens: list[int]) -> bytes:
    matcher = engine.compile(response_format)
    masks = [matcher.mask()]
    for token in tokens:
        assert matcher.accept(token)
        masks.append(matcher.mask())
    return b"".join(masks)


CASES = [
    *((of_schema(**SCHEMAS[name][0]), SCHEMAS[name][1][0]) for name in SAME),
    *((of_regex(text), texts[0]) for text, texts in REGEXES.items()),
    *((of_grammar(text), right[0]) for text, (right, _) in EBNF.items()),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_masks_of_the_page_are_those_of_llguidance(ask, native, tokenizer, case):
    response_format, answer = CASES[case]
    tokens = tokenizer.encode(answer, add_special=False)
    said = ask(response_format, tokens)
    assert "error" not in said, said["error"]
    compile_ms, *mask_ms = (1000 * each for each in said["times"])
    print(
        f"{said['name']}: tree {said['opened']:.2f} s, compile {compile_ms:.1f} ms, "
        f"masks {max(mask_ms):.1f} ms at most, {sum(mask_ms) / len(mask_ms):.2f} ms on average"
    )
    assert all(said["accepted"])
    assert zlib.decompress(base64.b64decode(said["masks"])) == masks_of(native, response_format, tokens)


def test_the_page_says_what_it_cannot_enforce(ask):
    said = ask(of_schema(type="array", uniqueItems=True), [])
    assert "which the page cannot enforce" in said["error"]
    said = ask(of_grammar('root ::= root "a" | "b"'), [])
    assert "begins with itself" in said["error"]
