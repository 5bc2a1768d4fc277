"""A file server for the page: byte ranges, entity tags, exact MIME types, loopback names only.

It serves files under one folder, and single files under other names (the model). There are no listings, no
uploads and no scripts; a request that names another host is refused, so that a foreign page cannot reach the
server through a rebound DNS name.
"""

import os
import re
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from realm_web.errors import RequestError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".gguf": "application/octet-stream",
    ".html": "text/html; charset=utf-8",
    ".ico": "image/x-icon",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".whl": "application/zip",
    ".zip": "application/zip",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class RangeError(ValueError):
    """A Range header that the file cannot satisfy: answered with 416."""


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """(start, end) of the one byte range that `header` asks of `size` bytes; None: send everything.

    RFC 9110: several ranges or another unit may be answered in full; a range past the end is RangeError.

    >>> parse_range("bytes=0-3", 10), parse_range("bytes=8-", 10), parse_range("bytes=-3", 10)
    ((0, 4), (8, 10), (7, 10))
    >>> parse_range(None, 10) is parse_range("bytes=0-1,4-5", 10) is None
    True
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        start, end = max(size - int(last), 0), size
    else:
        start, end = int(first), min(int(last) + 1 if last else size, size)
        if last and int(last) < int(first):
            return None
    if start >= end:
        raise RangeError(header)
    return start, end


@dataclass(frozen=True)
class Site:
    """What is served: all files under `root`; by URL path, `extra` files and JSON `documents`."""

    root: Path
    extra: dict[str, Path]
    documents: dict[str, bytes]

    def find(self, target: str) -> Path | bytes | None:
        """The file or document behind a request target; None where there is none or it is outside `root`."""
        path = unquote(urlsplit(target).path)
        if path in self.documents:
            return self.documents[path]
        if path in self.extra:
            return self.extra[path]
        if "\0" in path or any(part.startswith(".") for part in path.split("/")):
            return None
        root = self.root.resolve()
        file = (root / path.lstrip("/")).resolve()
        if path.endswith("/"):
            file /= "index.html"
        return file if file.is_relative_to(root) and file.is_file() else None


def server(site: Site, port: int, *, quiet: bool = True) -> ThreadingHTTPServer:
    """A server for `site` on 127.0.0.1; port 0 takes a free one. RequestError when the port is taken."""

    class Handler(_Handler):
        pass

    Handler.site, Handler.quiet = site, quiet
    try:
        made = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"port {port} cannot be used: {reason}; choose another by --port") from None
    made.daemon_threads = True
    return made


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "realm"
    sys_version = ""
    timeout = 120  # seconds that an idle connection is kept
    site: Site
    quiet: bool

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        if not is_loopback(self.headers.get("Host", "")):
            return self._refuse(HTTPStatus.FORBIDDEN)
        found = self.site.find(self.path)
        if found is None:
            return self._refuse(HTTPStatus.NOT_FOUND)
        try:
            if isinstance(found, bytes):
                self._head(HTTPStatus.OK, "application/json", len(found), {"Cache-Control": "no-store"})
                self.wfile.write(found if body else b"")
            else:
                self._send_file(found, body=body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the browser went away: a stopped download is no news

    def _send_file(self, path: Path, *, body: bool) -> None:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            tag = f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
            # Asset names carry no hash: a browser keeps the files and asks each time if the tag still holds.
            headers = {"ETag": tag, "Cache-Control": "no-cache", "Accept-Ranges": "bytes"}
            if tag in self.headers.get("If-None-Match", ""):
                return self._head(HTTPStatus.NOT_MODIFIED, None, None, headers)
            asked = self.headers.get("Range") if self.headers.get("If-Range", tag) == tag else None
            try:
                part = parse_range(asked, status.st_size)
            except RangeError:
                return self._refuse(
                    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{status.st_size}"}
                )
            start, end = part or (0, status.st_size)
            if part:
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{status.st_size}"
            kind = TYPES.get(path.suffix.lower(), "application/octet-stream")
            self._head(HTTPStatus.PARTIAL_CONTENT if part else HTTPStatus.OK, kind, end - start, headers)
            if body and end > start:
                self.wfile.flush()
                self.connection.sendfile(file, start, end - start)

    def _head(
        self, status: HTTPStatus, kind: str | None, length: int | None, headers: dict[str, str]
    ) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _refuse(self, status: HTTPStatus, headers: dict[str, str] | None = None) -> None:
        text = f"{status.value} {status.phrase}\n".encode()
        self._head(status, "text/plain; charset=utf-8", len(text), headers or {})
        if self.command != "HEAD":
            self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        if not self.quiet:
            super().log_message(format, *args)


def is_loopback(host: str) -> bool:
    """Whether a Host header names this machine.

    >>> is_loopback("localhost:8000"), is_loopback("[::1]"), is_loopback("example.org"), is_loopback("")
    (True, True, False, False)
    """
    name = re.sub(r":\d+$", "", host)
    return name.lower() in LOOPBACK
