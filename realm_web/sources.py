"""Where a desktop's models come from: a path, a URL with ranges, or Hugging Face. Not for the page."""

from __future__ import annotations

import asyncio
import http.client
import mmap
import os
import urllib.error
import urllib.request
from pathlib import Path

from realm_web.errors import RealmError, RequestError
from realm_web.loader import Source

TIMEOUT = 30  # seconds without a byte
TRIES = 3


class FileSource:
    """A file on disk, mapped: what is read goes from the system's cache to the device in one copy.

    RequestError when it cannot be opened.
    """

    def __init__(self, path: str | Path):
        self.name = str(path)
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise RequestError(f"{path}: {error.strerror or error}; give the path of a .gguf file") from None
        if self.size and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)  # a file that is not cached is read ahead
        self._bytes = memoryview(self._map)

    async def read(self, offset: int, nbytes: int) -> bytes | memoryview:
        data = self._bytes[offset : offset + nbytes]
        return data if len(data) % 4 == 0 else bytes(data) + bytes(-len(data) % 4)

    async def read_bytes(self, offset: int, nbytes: int) -> bytes:
        return bytes(self._bytes[offset : offset + nbytes])

    def close(self) -> None:
        self._bytes = memoryview(b"")
        self._map = b""  # unmapped when the last piece of it was handed on


class HTTPSource:
    """A URL read by ranges, never whole. Each read is tried three times; the server must support ranges."""

    def __init__(self, url: str, size: int):
        self.name, self.size = url, size

    @classmethod
    async def open(cls, url: str) -> HTTPSource:
        return await asyncio.to_thread(cls._open, url)

    @classmethod
    def _open(cls, url: str) -> HTTPSource:
        request = urllib.request.Request(url, headers={"Range": "bytes=0-0"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                if answer.status != 206:
                    raise RequestError(
                        f"{url}: the server does not serve ranges; download the file and give its path"
                    )
                size = int(answer.headers["Content-Range"].rpartition("/")[2])
                return cls(answer.url, size)
        except urllib.error.HTTPError as error:
            raise RequestError(
                f"{url}: the server answered {error.code} {error.reason}; check the address"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise RequestError(f"{url} cannot be read: {getattr(error, 'reason', error)}") from None

    async def read(self, offset: int, nbytes: int) -> bytes:
        data = await asyncio.to_thread(self._read, offset, nbytes)
        return data if len(data) % 4 == 0 else data + bytes(-len(data) % 4)

    async def read_bytes(self, offset: int, nbytes: int) -> bytes:
        return await asyncio.to_thread(self._read, offset, nbytes)

    def _read(self, offset: int, nbytes: int) -> bytes:
        end = min(offset + nbytes, self.size) - 1
        if end < offset:
            return b""
        request = urllib.request.Request(self.name, headers={"Range": f"bytes={offset}-{end}"})
        problem: object = None
        for _ in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    data = answer.read()
                if len(data) == end - offset + 1:
                    return data
                problem = f"{len(data)} bytes instead of {end - offset + 1}"
            except (OSError, http.client.HTTPException) as error:
                problem = error
        raise RealmError(f"{self.name}: reading bytes {offset} to {end} failed {TRIES} times: {problem}")

    def close(self) -> None:
        pass


async def open_source(name: str | Path) -> Source:
    """A path, an http(s) URL, or `hf:user/repo:Q4_K_M` (needs huggingface_hub)."""
    text = str(name)
    if text.startswith(("http://", "https://")):
        return await HTTPSource.open(text)
    if text.startswith("hf:"):
        return FileSource(await asyncio.to_thread(_download_hf, text))
    return FileSource(text)


def _download_hf(name: str) -> str:
    """The file of a repository whose name holds the quant type; kept in huggingface_hub's shared cache."""
    try:
        import huggingface_hub
    except ImportError:
        raise RequestError(f"{name} needs the package huggingface_hub: pip install 'realm-web[hf]'") from None
    repo, _, wanted = name.removeprefix("hf:").partition(":")
    try:
        files = [f for f in huggingface_hub.list_repo_files(repo) if f.endswith(".gguf")]
        fitting = [f for f in files if wanted.lower() in f.lower()]
        if not fitting:
            raise RequestError(
                f"{repo} has no .gguf file named like {wanted!r}; it has {', '.join(files) or 'none'}"
            )
        return huggingface_hub.hf_hub_download(repo, sorted(fitting, key=len)[0])
    except RequestError:
        raise
    except Exception as error:  # whatever the hub's client raises: offline, no such repository, gated
        raise RequestError(f"{name} could not be downloaded: {error}") from error
