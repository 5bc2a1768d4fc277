"""The real SmolLM2 file, loaded in the page by a person's clicks: the same greedy tokens as natively."""

from __future__ import annotations

import pytest
from test_chat_in_browser import ask, set_settings, start_chat

from realm_web import LLM
from realm_web.cli.web import build_site

QUESTION = "What is the capital of France?"
N_TOKENS = 5  # about a second each on SwiftShader


@pytest.fixture(scope="module")
def native(smollm2_path) -> str:
    """What the model answers on the CPU without a browser."""
    with LLM.load(str(smollm2_path), device="cpu", context=256) as llm:
        return llm.chat([{"role": "user", "content": QUESTION}], temperature=0, max_tokens=N_TOKENS).text


def test_the_first_greedy_tokens_in_the_page_are_the_native_ones(
    open_browser, site, serve, smollm2_path, native, tmp_path, shot
):
    offered = build_site(site.root, [smollm2_path])
    port = serve(offered)
    context = open_browser(tmp_path)
    page = context.pages[0]
    page.goto(f"http://localhost:{port}/")
    start_chat(page, "SmolLM2")
    set_settings(page, temperature=0, max_tokens=N_TOKENS)
    assert ask(page, QUESTION) == native.strip()
    shot(page, "smollm2")
    context.close()
