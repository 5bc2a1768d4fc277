"""`realm web`: what its file server answers, what it refuses, and what it says when something is missing."""

import http.client
import json
import signal
import threading
from urllib.parse import quote

import pytest

from realm_web.__main__ import main
from realm_web.cli import web
from realm_web.cli.static import RangeError, Site, is_loopback, parse_range, server
from realm_web.errors import RequestError


@pytest.fixture
def site(tmp_path):
    """A folder like web/, a model outside it, and a secret that must stay out of reach."""
    folder = tmp_path / "web"
    (folder / "assets").mkdir(parents=True)
    (folder / "index.html").write_text("<!doctype html>")
    (folder / "realm.js").write_text("export {};")
    (folder / ".secret").write_text("s")
    (folder / "assets" / "pyodide.mjs").write_text("export {};")
    (folder / "assets" / "pyodide.asm.wasm").write_bytes(bytes(range(256)))
    (tmp_path / "tiny model.gguf").write_bytes(bytes(range(100)))
    (tmp_path / "secret.txt").write_text("s")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return web.build_site(folder, [tmp_path / "tiny model.gguf"])


@pytest.fixture
def ask(site):
    """ask(target, method, headers) -> (status, headers, body) from a running server."""
    with server(site, 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def request(target: str, method: str = "GET", headers: dict[str, str] | None = None):
            connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=5)
            connection.request(method, target, headers={"Host": "localhost", **(headers or {})})
            response = connection.getresponse()
            answer = response.status, response.headers, response.read()
            connection.close()
            return answer

        yield request
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/index.html?x=1", "text/html; charset=utf-8"),
        ("/realm.js", "text/javascript; charset=utf-8"),
        ("/assets/pyodide.mjs", "text/javascript; charset=utf-8"),
        ("/assets/pyodide.asm.wasm", "application/wasm"),
        ("/models/tiny%20model.gguf", "application/octet-stream"),
        ("/models.json", "application/json"),
    ],
)
def test_files_come_with_their_type(target, kind, ask):
    status, headers, body = ask(target)
    assert (status, headers["Content-Type"]) == (200, kind)
    assert len(body) == int(headers["Content-Length"]) > 0
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_is_told_which_models_are_offered(ask, tmp_path):
    (model,) = json.loads(ask("/models.json")[2])
    assert model == {"name": "tiny model", "file": "tiny model.gguf", "size": 100}
    assert ask("/models/" + quote(model["file"]))[2] == bytes(range(100))
    assert json.loads(web.build_site(tmp_path / "web").documents["/models.json"]) == []


@pytest.mark.parametrize(
    "target",
    [
        "/assets/",
        "/assets",
        "/nothing.js",
        "/.secret",
        "/link.txt",
        "/../secret.txt",
        "/..%2fsecret.txt",
        "/%00",
        "//etc/passwd",
    ],
)
def test_folders_hidden_files_and_paths_outside_are_not_found(target, ask):
    assert ask(target)[0] == 404


@pytest.mark.parametrize(
    "host", ["example.org", "localhost.example.org", "127.0.0.1.example.org:80", "192.168.0.1", ""]
)
def test_a_request_for_another_host_is_refused(host, ask):
    assert ask("/", headers={"Host": host})[0] == 403
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]:8000"])
def test_a_request_for_this_machine_is_answered(host, ask):
    assert ask("/", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    ("asked", "part"),
    [("bytes=0-9", (0, 10)), ("bytes=90-", (90, 100)), ("bytes=-5", (95, 100)), ("bytes=5-999", (5, 100))],
)
def test_a_byte_range_is_answered_with_206(asked, part, ask):
    status, headers, body = ask("/models/tiny%20model.gguf", headers={"Range": asked})
    assert status == 206
    assert body == bytes(range(*part))
    assert headers["Content-Range"] == f"bytes {part[0]}-{part[1] - 1}/100"


def test_a_range_past_the_end_is_refused_and_an_odd_one_ignored(ask):
    status, headers, _ = ask("/models/tiny%20model.gguf", headers={"Range": "bytes=100-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */100")
    for odd in ("bytes=9-2", "items=0-1", "bytes=0-1,5-6", "bytes=-"):
        assert ask("/models/tiny%20model.gguf", headers={"Range": odd})[0] == 200
    with pytest.raises(RangeError):
        parse_range("bytes=-0", 10)


def test_a_file_that_did_not_change_is_not_sent_twice(ask, tmp_path):
    _, headers, _ = ask("/realm.js")
    status, again, body = ask("/realm.js", headers={"If-None-Match": headers["ETag"]})
    assert (status, body, again["ETag"]) == (304, b"", headers["ETag"])
    (tmp_path / "web" / "realm.js").write_text("export {}; // changed")
    assert ask("/realm.js", headers={"If-None-Match": headers["ETag"]})[0] == 200
    half = {"Range": "bytes=0-3", "If-Range": headers["ETag"]}
    assert ask("/realm.js", headers=half)[0] == 200  # the first half would be of another file


def test_head_tells_the_size_without_the_bytes(ask):
    status, headers, body = ask("/models/tiny%20model.gguf", "HEAD")
    assert (status, headers["Content-Length"], headers["Accept-Ranges"], body) == (200, "100", "bytes", b"")


def test_only_get_and_head_are_answered(ask):
    assert ask("/", "POST")[0] == 501


def test_web_says_how_to_assemble_missing_assets_and_that_a_port_is_taken(site, tmp_path, capsys):
    with server(site, 0) as running, pytest.raises(RequestError, match="--port"):
        server(site, running.server_port)
    with pytest.raises(RequestError, match="--port"):
        server(site, 65536)
    with pytest.raises(RequestError, match="--site"):
        web.build_site(tmp_path)
    (tmp_path / "web" / "assets" / "pyodide.mjs").unlink()
    with pytest.raises(RequestError, match=r"python web/build_site\.py"):
        web.build_site(tmp_path / "web")


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (["no.gguf"], "no such file"),
        (["https://example.org/x.gguf"], "opened in the page"),
        (["tiny model.gguf", "--no-model"], "drop one of them"),
        (["tiny model.gguf", "web/../tiny model.gguf"], "same file name"),
    ],
)
def test_web_refuses_models_that_it_cannot_offer(models, words, site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["web", "--site", str(site.root), *models]) == 2
    assert words in capsys.readouterr().err


def test_web_prints_its_address_and_ends_quietly_with_ctrl_c(site, monkeypatch, capsys):
    def strike(running) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("http.server.ThreadingHTTPServer.serve_forever", strike)
    monkeypatch.setattr(
        "http.server.ThreadingHTTPServer.serve_forever", lambda self: signal.raise_signal(signal.SIGINT)
    )
    assert main(["web", "--port", "0", "--no-model", "--site", str(site.root)]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("http://localhost:")
    assert "no model is offered" in err


def test_a_site_finds_nothing_for_a_path_with_a_hidden_part(site):
    assert isinstance(site, Site)
    assert site.find("/assets/../.secret") is None
    assert site.find("/assets/pyodide.mjs") is not None
