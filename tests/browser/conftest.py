"""The page in Debian's Chromium, on SwiftShader (WebGPU on the processor), driven by Playwright.

Files in the private file system need a profile on disk and one origin: a browser here is a persistent
context, and the server keeps its port for the whole session. What the pages ask the server for is recorded.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tiny import CHATML, write_tiny

from realm_web.cli.static import Site, server
from realm_web.cli.web import build_site

HERE = Path(__file__).resolve().parent
WEB = HERE.parents[1] / "web"
SHOTS = HERE.parents[1] / "build" / "shots"
HYGIENE = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WEBGPU = "--enable-unsafe-webgpu"
TIMEOUT = 90_000  # ms; SwiftShader on two busy cores


@dataclass(frozen=True)
class RecordedSite(Site):
    """A site that remembers the path of every request."""

    asked: list[str] = field(default_factory=list)

    def find(self, target: str) -> Path | bytes | None:
        self.asked.append(urlsplit(target).path)
        return super().find(target)


@dataclass(frozen=True)
class Server:
    url: str
    asked: list[str]


@pytest.fixture(scope="session")
def playwright():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not shutil.which("chromium"):
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as running:
        yield running


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two tiny models with random weights."""
    folder = tmp_path_factory.mktemp("models")
    made = {name: folder / f"{name}.gguf" for name in ("small", "other")}
    for seed, path in enumerate(made.values(), 3):  # seed 3: greedy answers go on without an end
        write_tiny(path, quant="Q8_0", context=512, chat_template=CHATML, seed=seed)
    return made


@pytest.fixture(scope="session")
def site(playwright, models) -> RecordedSite:
    """web/ with fresh assets, the tiny models, and the page of the kernel tests."""
    built = subprocess.run([sys.executable, WEB / "build_site.py"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    plain = build_site(WEB, list(models.values()))
    kernels = (HERE / "kernels.html", HERE / "kernels.js", HERE.parent / "kernel_run.py")
    extra = {f"/kernels/{path.name}": path for path in kernels}
    return RecordedSite(plain.root, plain.extra | extra, plain.documents)


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Site, int], int]]:
    """serve(site, port=0) -> the port on which it is now served, until the session ends."""
    running = []

    def start(site: Site, port: int = 0) -> int:
        made = server(site, port)
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        running.append(made)
        return made.server_port

    yield start
    for made in running:
        made.shutdown()
        made.server_close()


@pytest.fixture(scope="session")
def web(site, serve) -> Server:
    return Server(f"http://localhost:{serve(site)}/", site.asked)


@pytest.fixture(scope="session")
def open_browser(playwright):
    """open_browser(profile folder, webgpu=True) -> persistent context; the caller closes it."""

    def open_(profile: Path, *, webgpu: bool = True):
        context = playwright.chromium.launch_persistent_context(
            str(profile),
            executable_path=shutil.which("chromium"),
            headless=True,
            args=[*HYGIENE, WEBGPU] if webgpu else HYGIENE,
            viewport={"width": 1100, "height": 800},
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(TIMEOUT)
        return context

    return open_


@pytest.fixture(scope="module")
def browser(open_browser, tmp_path_factory):
    """One browser for the tests of a module."""
    context = open_browser(tmp_path_factory.mktemp("profile"))
    yield context
    context.close()


@pytest.fixture
def page(browser, web):
    """The page, just opened. A test that leaves an error on the console fails."""
    opened = browser.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: message.type == "error" and errors.append(message.text))
    opened.goto(web.url)
    opened.wait_for_selector("#offered-list li")
    yield opened
    opened.close()
    unexpected = [text for text in errors if not text.startswith("Failed to load resource")]
    assert not unexpected, unexpected


@pytest.fixture(scope="session")
def shot() -> Callable[..., None]:
    """shot(page, name): a screenshot in build/shots/, to be looked at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=str(SHOTS / f"{name}.png"))
