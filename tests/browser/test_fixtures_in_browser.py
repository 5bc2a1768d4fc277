"""llama.cpp's tiny files of every format in the page: the greedy answers are those of the CPU.

`tests/test_fixtures.py` compares the CPU's log-probabilities with llama.cpp's and with float64.
"""

from __future__ import annotations

import json

import pytest

from realm_web import LLM
from realm_web.cli.web import build_site

N_TOKENS = 6
GENERATE = """async ([file, prompts, options]) => {
    const { Realm } = await import('./realm.js');
    // few programs: compiling them on the processor would take most of the time
    const realm = await Realm.load(`models/${file}`, { context: 64, max_seqs: 1, max_rows: 8 });
    const answers = [];
    for (const prompt of prompts) {
        let text = '';
        for await (const piece of realm.generate(prompt, options)) text += piece;
        answers.push([text, realm.stats.completion_tokens]);
    }
    await realm.close();
    await Realm.remove(file).catch(() => {});
    return answers;
}"""


@pytest.fixture(scope="module")
def goldens(shared) -> dict[str, list[dict]]:
    return json.loads((shared / "goldens" / "tiny256.json").read_text())


@pytest.fixture(scope="module")
def fixture_page(open_browser, site, serve, shared, goldens, tmp_path_factory):
    port = serve(build_site(site.root, [shared / "fixtures" / name for name in goldens]))
    context = open_browser(tmp_path_factory.mktemp("profile"))
    page = context.pages[0]
    page.goto(f"http://localhost:{port}/")
    yield page
    context.close()


def test_every_fixture_answers_in_the_page_as_on_the_cpu(fixture_page, shared, goldens):
    options = {"temperature": 0, "max_tokens": N_TOKENS, "ignore_eos": True}
    different = []
    for name, cases in goldens.items():
        prompts = [case["prompt_ids"] for case in cases]
        with LLM.load(shared / "fixtures" / name, device="cpu", context=64) as llm:
            answers = [llm.generate(prompt, **options) for prompt in prompts]
        native = [[answer.text, len(answer.token_ids)] for answer in answers]
        if fixture_page.evaluate(GENERATE, [name, prompts, options]) != native:
            different.append(name)
    assert not different
