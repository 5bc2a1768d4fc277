"""Several answers at once on one model in the page, and a GPU that is lost meanwhile."""

from __future__ import annotations

import json

import pytest

ANSWER = """async ([realm, prompt, options]) => {
  let text = "";
  for await (const piece of realm.generate(prompt, options)) text += piece;
  return [text, realm.stats];
}"""
OPTIONS = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
PROMPTS = [
    "one two three",
    "a cat and a dog",
    "the sun",
    "in the beginning there was nothing but water and a boat",
]
REMEMBER_DEVICES = """() => {
  const { requestDevice } = GPUAdapter.prototype;
  self.devices = [];
  GPUAdapter.prototype.requestDevice = async function (...given) {
    self.devices.push(await requestDevice.apply(this, given));
    return self.devices.at(-1);
  };
}"""


@pytest.fixture(scope="module")
def shared(browser, web):
    """(a page, its worker, the handle of a model that is loaded there)"""
    page = browser.new_page()
    page.goto(web.url)
    with page.expect_event("worker") as started:
        page.evaluate("() => import('./realm.js').then(({ Realm }) => Realm.boot())")
    worker = started.value
    worker.evaluate(REMEMBER_DEVICES)
    realm = page.evaluate_handle(
        "() => import('./realm.js').then(({ Realm }) => Realm.load('/models/small.gguf', {kv_tokens: 1024}))"
    )
    yield page, worker, realm
    page.close()


def test_answers_at_once_equal_those_alone(shared):
    page, _, realm = shared
    alone = [page.evaluate(ANSWER, [realm, prompt, OPTIONS])[0] for prompt in PROMPTS]
    together = page.evaluate(
        f"([realm, prompts, options]) => Promise.all(prompts.map((p) => ({ANSWER})([realm, p, options])))",
        [realm, PROMPTS, OPTIONS],
    )
    assert [text for text, _ in together] == alone
    assert len(set(alone)) == len(alone)


def test_a_prompt_seen_before_is_taken_from_the_cache(shared):
    page, _, realm = shared
    prompt = "once upon a time " * 8
    first, again = (page.evaluate(ANSWER, [realm, prompt, OPTIONS]) for _ in range(2))
    assert first[0] == again[0]
    assert first[1]["cached_tokens"] == 0 < again[1]["cached_tokens"]


def test_texts_are_scored_and_embedded(shared):
    page, _, realm = shared
    vector = page.evaluate("(realm) => realm.embed('a cat')", realm)
    assert sum(v * v for v in vector) == pytest.approx(1, abs=1e-5)
    scores = page.evaluate("(realm) => realm.score('a cat')", realm)
    assert scores["logprobs"][0] is None and all(value < 0 for value in scores["logprobs"][1:])
    assert len(scores["token_ids"]) == len(scores["logprobs"])


def test_an_answer_keeps_to_its_schema(shared):
    page, _, realm = shared
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}}
    schema |= {"required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    text, stats = page.evaluate(
        ANSWER, [realm, "give me a number", {"temperature": 0, "max_tokens": 60, "response_format": wanted}]
    )
    assert stats["finish_reason"] == "stop"
    assert 0 <= json.loads(text)["n"] <= 99


def test_a_lost_gpu_is_opened_again_and_the_answer_goes_on(shared):
    page, worker, realm = shared
    expected, _ = page.evaluate(ANSWER, [realm, PROMPTS[0], OPTIONS | {"max_tokens": 300}])
    found = page.evaluate_handle(
        """async ([realm, prompt, options]) => {
          const found = { text: "" };
          found.done = (async () => {
            for await (const piece of realm.generate(prompt, options)) found.text += piece;
          })();
          while (!found.text) await new Promise((resolve) => setTimeout(resolve, 5));
          return found;
        }""",
        [realm, PROMPTS[0], OPTIONS | {"max_tokens": 300}],
    )
    worker.evaluate("() => self.devices.at(-1).destroy()")
    text = page.evaluate("async (found) => { await found.done; return found.text; }", found)
    assert text == expected
    assert worker.evaluate("() => self.devices.length") == 2
