"""Where models come from and where they are kept: the server, addresses, files; OPFS, resuming, deleting."""

from __future__ import annotations

import http.server
import threading

import pytest
from test_chat_in_browser import expect, start_chat

MAGIC = b"GGUF"


class Handler(http.server.BaseHTTPRequestHandler):
    """Another origin that lets pages read it. A path in `cut` gets half an answer, held until `let_go`."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]
    ranges: list[str | None]
    cut: set[str]
    let_go: threading.Event

    def do_GET(self):
        self.ranges.append(self.headers.get("Range"))
        data = self.files.get(self.path)
        self.send_response(404 if data is None else 206 if self.headers.get("Range") else 200)
        start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
        body = (data or b"")[start:]
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path in self.cut:
            self.cut.discard(self.path)
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        if self.close_connection:
            self.let_go.wait(60)  # the browser drops what it has not handed on when a connection breaks

    def log_message(self, *args):
        pass


@pytest.fixture
def elsewhere():
    class Fresh(Handler):
        files, ranges, cut, let_go = {}, [], set(), threading.Event()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    Fresh.url = f"http://localhost:{server.server_port}"
    yield Fresh
    server.shutdown()
    server.server_close()


def kept(page) -> list[dict]:
    return page.evaluate("import('./realm.js').then(({ Realm }) => Realm.models())")


def remove_all(page) -> None:
    page.evaluate(
        "import('./realm.js').then(async ({ Realm }) => "
        "{ for (const { name } of await Realm.models()) await Realm.remove(name) })"
    )


def from_url(page, url: str) -> None:
    page.fill("#url", url)
    page.get_by_role("button", name="Download", exact=True).click()


def test_a_second_visit_loads_from_the_browser_without_the_network(open_browser, web, models, tmp_path, shot):
    before = web.asked.count("/models/small.gguf")
    context = open_browser(tmp_path)
    page = context.pages[0]
    page.goto(web.url)
    start_chat(page)
    assert web.asked.count("/models/small.gguf") == before + 1
    assert kept(page) == [
        {
            "name": "small.gguf",
            "bytes": models["small"].stat().st_size,
            "size": models["small"].stat().st_size,
            "complete": True,
            "url": f"{web.url}models/small.gguf",
        }
    ]
    context.close()

    context = open_browser(tmp_path)  # another day
    page = context.pages[0]
    page.goto(web.url)
    page.wait_for_selector("#kept-list li")
    assert "already in this browser" in page.inner_text("#offered-list li >> nth=0")
    shot(page, "kept")
    page.locator("#kept-list li", has_text="small").get_by_text("Load").click()
    page.wait_for_selector("#chat:not([hidden])")
    assert web.asked.count("/models/small.gguf") == before + 1
    context.close()


def test_a_kept_model_is_deleted_by_its_button(page, elsewhere):
    elsewhere.files["/broken.gguf"] = MAGIC + bytes(100)
    from_url(page, f"{elsewhere.url}/broken.gguf")
    page.wait_for_selector(".notice.error")  # broken, but kept: loading it is no download
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#kept-list >> role=button[name='Delete broken.gguf']")
    page.wait_for_selector("#kept-list li:has-text('broken')", state="detached")
    assert "broken.gguf" not in [model["name"] for model in kept(page)]


def test_a_file_is_loaded_by_the_picker_and_kept_only_when_asked(page, models):
    remove_all(page)
    page.set_input_files("#file", models["small"])
    page.wait_for_selector("#chat:not([hidden])")
    assert kept(page) == []
    page.click("#model-button")
    page.check("#keep")
    page.set_input_files("#file", models["small"])
    page.wait_for_selector("#chat:not([hidden])")
    assert [(m["name"], m["complete"], m["url"]) for m in kept(page)] == [("small.gguf", True, None)]


def test_a_file_is_loaded_by_dropping_it(page, models):
    data = list(models["small"].read_bytes())
    page.evaluate(
        """(data) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], 'dropped.gguf'));
            for (const type of ['dragenter', 'drop'])
                document.body.dispatchEvent(new DragEvent(type, {dataTransfer: transfer, bubbles: true}));
        }""",
        data,
    )
    page.wait_for_selector("#chat:not([hidden])")
    assert page.inner_text("#model-name") == "dropped"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!doctype html><p>not a model", "GGUF"),
        (b"", "GGUF"),
        (MAGIC, "truncated"),
        (MAGIC + (1).to_bytes(4, "little") + bytes(100), "version 1"),
    ],
)
def test_a_bad_file_gets_one_clear_line(page, tmp_path, content, said):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    page.set_input_files("#file", path)
    page.wait_for_selector(".notice.error")
    message = page.inner_text(".notice.error span")
    assert said in message
    assert "Traceback" not in message and "\n" not in message
    assert page.is_visible("#start")


def test_a_truncated_file_gets_one_clear_line(page, tmp_path, models):
    path = tmp_path / "cut.gguf"
    path.write_bytes(models["small"].read_bytes()[:-1000])
    page.set_input_files("#file", path)
    page.wait_for_selector(".notice.error")
    assert "cut.gguf" in page.inner_text(".notice.error") and page.is_visible("#start")


def test_a_broken_download_goes_on_where_it_stopped(page, models, elsewhere):
    data = models["small"].read_bytes()
    elsewhere.files["/a/far.gguf"] = data
    elsewhere.cut.add("/a/far.gguf")
    from_url(page, f"{elsewhere.url}/a/far.gguf")
    expect(page.locator("#amount")).to_contain_text("kB of 131 kB")
    elsewhere.let_go.set()
    page.wait_for_selector("#chat:not([hidden])")
    assert elsewhere.ranges[0] is None and elsewhere.ranges[1].startswith("bytes=")
    assert 0 < int(elsewhere.ranges[1][6:-1]) <= len(data) // 2
    assert next(m for m in kept(page) if m["name"] == "far.gguf")["complete"]


def test_two_addresses_with_one_file_name_are_two_models(page, models, elsewhere):
    elsewhere.files = {
        "/a/same.gguf": models["small"].read_bytes(),
        "/b/same.gguf": models["other"].read_bytes(),
    }
    names = page.evaluate(
        """async (urls) => {
            const { Realm } = await import('./realm.js');
            const files = [];
            for (const url of urls) {
                const realm = await Realm.load(url);
                files.push(realm.info.file);
                await realm.close();
            }
            return files;
        }""",
        [f"{elsewhere.url}/a/same.gguf", f"{elsewhere.url}/b/same.gguf"],
    )
    assert names[0] == "same.gguf" and names[1].startswith("same-")
    addresses = {model["name"]: model["url"] for model in kept(page)}
    assert [addresses[name].removeprefix(elsewhere.url) for name in names] == ["/a/same.gguf", "/b/same.gguf"]


@pytest.mark.parametrize(
    ("path", "said"),
    [("/none.gguf", "404"), ("/page.gguf", "not a GGUF"), (None, "no answer")],
)
def test_a_wrong_address_leaves_nothing_behind(page, elsewhere, path, said):
    before = kept(page)
    elsewhere.files["/page.gguf"] = b"<!doctype html>"
    from_url(page, f"{elsewhere.url}{path}" if path else "http://localhost:9/model.gguf")
    page.wait_for_selector(".notice.error")
    assert said in page.inner_text(".notice.error")
    assert kept(page) == before


def test_the_module_streams_stops_when_the_loop_is_left_and_names_unknown_options(page):
    seen = page.evaluate(
        """async () => {
            const { Realm } = await import('./realm.js');
            const stages = new Set();
            const onProgress = ({ stage }) => stages.add(stage);
            const realm = await Realm.load('models/small.gguf', { onProgress });
            const messages = [{ role: 'user', content: 'hello' }];
            let pieces = 0;
            for await (const piece of realm.chat(messages, { max_tokens: 300, ignore_eos: true }))
                if (++pieces === 3) break;
            const left = realm.stats;
            let text = '';
            const five = { max_tokens: 5, temperature: 0, ignore_eos: true };
            for await (const piece of realm.generate('hello', five)) text += piece;
            const full = realm.stats;
            const wrong = await realm.chat(messages, { heat: 1 }).next().then(() => null, (error) => error);
            await realm.close();
            const closed = await realm.chat(messages).next().then(() => null, (error) => error.message);
            return { stages: [...stages], left, full, text, info: realm.info, name: wrong.name,
                     wrong: wrong.message, closed };
        }"""
    )
    assert {"load", "compile"} <= set(seen["stages"])
    assert seen["left"]["finish_reason"] == "abort" and seen["left"]["completion_tokens"] < 300
    assert seen["full"]["completion_tokens"] == 5 and seen["full"]["finish_reason"] == "length"
    assert seen["full"]["predicted_per_second"] > 0 and seen["text"]
    assert seen["info"]["architecture"] == "llama" and seen["info"]["context"] == 512
    assert seen["name"] == "RequestError" and "heat" in seen["wrong"] and "temperature" in seen["wrong"]
    assert "not open" in seen["closed"]


def test_a_cancelled_load_returns_to_the_choice(page):
    page.locator("#offered-list li", has_text="small").get_by_role("button").click()
    page.click("#cancel")
    page.wait_for_selector("#start:not([hidden])")
    assert page.locator(".notice.error").count() == 0


def test_the_default_page_may_be_served_without_any_model(browser, site, serve):
    port = serve(type(site)(site.root, {}, {"/models.json": b"[]"}))
    page = browser.new_page()
    page.goto(f"http://localhost:{port}/")
    expect(page.locator("#adapter-name")).to_contain_text("swiftshader")
    assert page.is_hidden("#offered") and page.is_visible("#drop")
    page.close()
