"""`?debug=2`: what every kernel takes, in the console."""

from __future__ import annotations

from test_chat_in_browser import ask, set_settings, start_chat

from realm_web.runtime.profiler import TIMED_RUNS, WARM_UP


def test_a_table_of_kernels_is_written_to_the_console_and_only_when_asked_for(browser, web):
    page = browser.new_page()
    written: list[str] = []
    page.on("console", lambda message: written.append(message.text))
    for address in (web.url, f"{web.url}?debug=2"):
        page.goto(address)
        start_chat(page)
        set_settings(page, max_tokens=WARM_UP + TIMED_RUNS + 4, temperature=0)
        assert not any("us each" in text for text in written)
        ask(page, "hello")
    page.close()
    table = "\n".join(written)
    assert "us each" in table and "blk.*.ffn_down" in table
