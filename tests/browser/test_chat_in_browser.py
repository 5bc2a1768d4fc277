"""The page as a person uses it: look, load, talk, stop, settle, begin anew."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect


def start_chat(page, name: str = "small") -> None:
    page.locator("#offered-list li", has_text=name).get_by_role("button").click()
    page.wait_for_selector("#chat:not([hidden])")


@pytest.fixture(scope="module")
def loaded(browser, web):
    """One page with the small model loaded, for all tests that only talk."""
    page = browser.new_page()
    page.goto(web.url)
    start_chat(page)
    yield page
    page.close()


@pytest.fixture
def chat(loaded):
    """An empty chat with the default settings."""
    loaded.click("#new-chat")
    expect(loaded.locator("#send")).to_be_visible()
    loaded.click("#settings-button")
    loaded.click("#settings >> text=Defaults")
    loaded.click("#settings >> text=Done")
    return loaded


def set_settings(page, **values: object) -> None:
    page.click("#settings-button")
    for name, value in values.items():
        page.fill(f"#settings [name={name}]", str(value))
    page.click("#settings >> text=Done")


def ask(page, text: str) -> str:
    """Send a message; the finished answer as shown."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#log > :last-child .facts")
    assert page.locator("#log > :last-child .error").all_inner_texts() == []
    return page.inner_text("#log > :last-child .body")


def facts(page) -> str:
    return page.inner_text("#log > :last-child .numbers")


def test_the_page_names_its_adapter_and_warns_that_it_is_a_processor(page, shot):
    expect(page.locator("#adapter-name")).to_contain_text("swiftshader")
    assert "processor" in page.inner_text(".notice.warn")
    shot(page, "start")


def test_an_answer_comes_with_its_rates_and_nothing_is_asked_outside(browser, web, shot):
    urls: list[str] = []
    browser.on("request", lambda request: urls.append(request.url))
    page = browser.new_page()
    page.goto(web.url)
    start_chat(page)
    set_settings(page, max_tokens=8, temperature=0)
    ask(page, "hello")
    assert re.search(r"tok/s · first token after .* · 8 tokens", facts(page))
    shot(page, "answer")
    page.close()
    assert {urlsplit(url).netloc for url in urls} == {urlsplit(web.url).netloc}
    assert any(url.endswith("pyodide.asm.wasm") for url in urls), "the worker's requests are not observed"


def test_the_same_seed_gives_the_same_answer(chat):
    set_settings(chat, max_tokens=12, seed=7, temperature=1)
    first = ask(chat, "hello world")
    chat.click("#new-chat")
    assert chat.locator("#log > li").count() == 0
    assert ask(chat, "hello world") == first


def test_settings_outlive_the_visit_until_the_defaults_are_wanted(page):
    set_settings(page, seed=7, system="Be brief.")
    page.reload()
    page.click("#settings-button")
    assert page.input_value("#settings [name=seed]") == "7"
    assert page.input_value("#settings [name=system]") == "Be brief."
    page.click("#settings >> text=Defaults")
    assert page.input_value("#settings [name=seed]") == ""
    page.click("#settings >> text=Done")


def test_escape_stops_an_answer_and_the_next_one_works(chat):
    set_settings(chat, temperature=0)
    chat.fill("#prompt", "tell me a very long story")
    chat.press("#prompt", "Enter")
    chat.wait_for_selector("#stop:not([hidden])")
    expect(chat.locator("#log > :last-child .body")).not_to_be_empty()
    chat.keyboard.press("Escape")
    chat.wait_for_selector("#log > :last-child .facts")
    assert "stopped" in facts(chat)
    assert chat.is_visible("#send")
    set_settings(chat, max_tokens=3)
    ask(chat, "and now a short one")
    assert "3 tokens" in facts(chat)


def test_the_stop_button_stops_and_try_again_replaces_the_answer(chat):
    set_settings(chat, temperature=0)
    chat.fill("#prompt", "a story")
    chat.press("#prompt", "Enter")
    chat.click("#stop")
    chat.wait_for_selector("#log > :last-child .facts")
    assert "stopped" in facts(chat)
    set_settings(chat, max_tokens=2)
    chat.click("text=Try again")
    chat.wait_for_selector("#log > :last-child .numbers:has-text('2 tokens')")
    assert chat.locator("#log > li").count() == 2


def test_shift_enter_makes_a_new_line_and_an_empty_message_is_not_sent(chat):
    chat.press("#prompt", "Enter")
    assert chat.locator("#log > li").count() == 0
    chat.type("#prompt", "one")
    chat.press("#prompt", "Shift+Enter")
    chat.type("#prompt", "two")
    assert chat.input_value("#prompt") == "one\ntwo"


def test_a_prompt_longer_than_the_context_is_refused_in_words(chat):
    chat.fill("#prompt", "word " * 2000)
    chat.press("#prompt", "Enter")
    chat.wait_for_selector(".error")
    assert "context" in chat.inner_text(".error")
    set_settings(chat, max_tokens=2)
    chat.click("#new-chat")
    ask(chat, "hello")
    assert "2 tokens" in facts(chat)


def test_another_model_can_be_loaded_and_the_chat_begins_anew(page):
    start_chat(page)
    page.click("#model-button")
    start_chat(page, "other")
    assert "other" in page.inner_text("#model-name")
    assert page.is_visible("#empty")


def test_on_a_telephone_nothing_is_wider_than_the_screen(chat, shot):
    wide = "document.documentElement.scrollWidth > innerWidth"
    desk = chat.viewport_size
    chat.set_viewport_size({"width": 360, "height": 740})
    set_settings(chat, max_tokens=8, temperature=0)
    ask(chat, "hello")
    assert not chat.evaluate(wide)
    chat.emulate_media(color_scheme="dark")
    shot(chat, "answer-phone-dark")
    chat.click("#model-button")
    assert not chat.evaluate(wide)
    shot(chat, "start-phone-dark")
    chat.click("#back")
    chat.emulate_media(color_scheme="light")
    chat.set_viewport_size(desk)


def test_every_control_has_a_name_for_screen_readers(chat):
    unnamed = """[...document.querySelectorAll('button, input, textarea')].filter((node) =>
        !(node.closest('[hidden]') || node.ariaLabel || node.textContent.trim() || node.labels?.length)
        ).map((node) => node.id)"""
    assert chat.evaluate(unnamed) == []
    chat.click("#model-button")
    assert chat.evaluate(unnamed) == []
    chat.click("#back")


def test_model_output_becomes_text_and_never_markup(page):
    shown = page.evaluate(
        """async () => {
            const { render } = await import('./markdown.js');
            const box = document.createElement('div');
            box.append(render('<img src=x onerror="window.hit = 1"> **bold** [a](javascript:alert(1))\\n\\n' +
                '```html\\n<script>window.hit = 1</script>\\n```\\n' +
                '- one\\n  - two\\n1. `x*y*z` *it*\\n\\n# T'));
            return {html: box.innerHTML, hit: window.hit ?? null};
        }"""
    )
    assert shown["hit"] is None
    assert shown["html"] == (
        '<p>&lt;img src=x onerror="window.hit = 1"&gt; <strong>bold</strong> [a](javascript:alert(1))</p>'
        '<pre tabindex="0"><code>&lt;script&gt;window.hit = 1&lt;/script&gt;</code></pre>'
        "<ul><li>one<ul><li>two</li></ul></li></ul>"
        "<ol><li><code>x*y*z</code> <em>it</em></li></ol><h3>T</h3>"
    )


def test_without_webgpu_the_page_says_what_to_do(open_browser, web, tmp_path, shot):
    context = open_browser(tmp_path, webgpu=False)
    page = context.pages[0]
    page.goto(web.url)
    page.wait_for_selector(".notice")
    assert "offers no GPU" in page.inner_text(".notice")
    assert page.inner_text("#adapter-name") == "no WebGPU"
    page.wait_for_selector("#offered-list button:disabled")
    expect(page.locator("#file")).to_be_disabled()
    shot(page, "no-webgpu")
    context.close()


def test_a_browser_that_never_heard_of_webgpu_is_told_so(browser, web):
    page = browser.new_page()
    page.route("**/worker.js", lambda route: route.fulfill(
        body=(route.fetch().text()).replace("navigator.gpu", "navigator.none"), content_type="text/javascript"
    ))  # fmt: skip
    page.goto(web.url)
    page.wait_for_selector(".notice")
    assert "has no WebGPU" in page.inner_text(".notice")
    page.close()


def test_missing_assets_are_named_with_the_cure(browser, web):
    page = browser.new_page()
    page.route("**/assets/pyodide.mjs", lambda route: route.fulfill(status=404))
    page.goto(web.url)
    page.wait_for_selector(".notice:has-text('web/build_site.py')")
    page.close()
