"""The page's Python side without a page: Python objects play JavaScript's, the device is the CPU."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from tiny import CHATML, write_tiny

from realm_web import page as page_module
from realm_web.engine import Engine
from realm_web.errors import RequestError
from realm_web.page import Page, sampling_params

HELLO = [{"role": "user", "content": "hello"}]


class File:
    """What the worker hands over: {name, size, read, close}; read gives an object with to_bytes()."""

    def __init__(self, path, name="tiny.gguf"):
        self.data, self.name = path.read_bytes(), name
        self.size, self.closed = len(self.data), False

    async def read(self, offset, nbytes):
        part = self.data[offset : offset + nbytes]
        return Bytes(part)

    def close(self):
        self.closed = True


class Bytes(bytes):
    def to_bytes(self):
        return bytes(self)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "tiny.gguf"
    write_tiny(path, context=128, chat_template=CHATML, seed=3)  # seed 3: greedy answers have no end
    return path


@pytest.fixture
def page(monkeypatch):
    """A page whose engines run on the CPU."""

    async def on_cpu(source, *, device, **options):
        assert device == "browser"
        return await Engine.open(source, device="cpu", **options)

    monkeypatch.setattr(page_module, "Engine", SimpleNamespace(open=on_cpu))
    return Page()


async def opened(page, path, call_id=1):
    """(the file, the reply of open, its progress events)"""
    file, events = File(path), []
    reply = json.loads(await page.open(call_id, file, "{}", lambda text: events.append(json.loads(text))))
    return file, reply["ok"], events


def request(model, messages=HELLO, **options):
    return json.dumps({"model": model, "messages": messages, "options": options})


def test_a_model_is_described_when_it_is_open_and_its_file_is_closed(page, path):
    file, info, events = asyncio.run(opened(page, path))
    assert info["model"] == 1 and info["file"] == "tiny.gguf" and info["name"] == "tiny random"
    assert info["size"] == file.size and info["architecture"] == "llama" and info["context"] == 128
    assert file.closed
    assert {event["stage"] for event in events} >= {"load"}
    assert all(event["done"] <= event["total"] for event in events)


def test_the_pieces_of_an_answer_make_its_text_and_the_reply_counts_them(page, path):
    async def run():
        _, info, _ = await opened(page, path)
        pieces = []
        options = {"temperature": 0, "max_tokens": 6}
        reply = await page.chat(2, request(info["model"], **options), pieces.append)
        prompt = json.dumps({"model": info["model"], "prompt": "hello", "options": options})
        raw = await page.chat(3, prompt, lambda text: None)
        await page.close(4, info["model"])
        return pieces, json.loads(reply)["ok"], json.loads(raw)["ok"]

    pieces, stats, raw = asyncio.run(run())
    assert "".join(pieces)
    assert stats["completion_tokens"] == 6 and stats["finish_reason"] == "length"
    assert stats["predicted_per_second"] > 0 and stats["time_to_first_token_ms"] > 0
    assert raw["prompt_tokens"] < stats["prompt_tokens"], "generate puts no template around the prompt"


@pytest.mark.parametrize("early", [True, False])
def test_a_stopped_answer_replies_normally_and_the_next_one_works(page, path, early):
    async def run():
        _, info, _ = await opened(page, path)
        pieces = []
        if early:
            page.stop(2)  # asked before the call begins, as messages may cross
        answer = asyncio.ensure_future(page.chat(2, request(info["model"], temperature=0), pieces.append))
        while not early and not pieces:
            await asyncio.sleep(0)
        if not early:
            page.stop(2)
        stopped = json.loads(await answer)["ok"]
        again = json.loads(await page.chat(3, request(info["model"], max_tokens=2), lambda text: None))["ok"]
        return stopped, again

    stopped, again = asyncio.run(run())
    assert stopped["finish_reason"] == "abort"
    assert stopped["completion_tokens"] == 0 if early else stopped["completion_tokens"] > 0
    assert again["completion_tokens"] <= 2


def test_closing_a_model_ends_its_answers_and_later_calls_say_so(page, path):
    async def run():
        _, info, _ = await opened(page, path)
        answer = asyncio.ensure_future(page.chat(2, request(info["model"], temperature=0), lambda text: None))
        await asyncio.sleep(0.05)
        await page.close(3, info["model"])
        later = await page.chat(4, request(info["model"]), lambda text: None)
        return json.loads(await answer)["ok"], json.loads(later)["error"]

    ended, error = asyncio.run(run())
    assert ended["finish_reason"] == "abort"
    assert error["name"] == "RequestError" and "load it again" in error["message"]


def test_a_cancelled_load_says_so_and_closes_the_file(page, path):
    async def run():
        file = File(path)
        loading = asyncio.ensure_future(page.open(1, file, "{}", lambda text: page.stop(1)))
        return file, json.loads(await loading)

    file, reply = asyncio.run(run())
    assert reply["error"]["name"] == "AbortError"
    assert file.closed


def failure(page, path, **request_fields):
    async def run():
        _, info, _ = await opened(page, path)
        wanted = json.dumps({"model": info["model"], "messages": HELLO, **request_fields})
        return json.loads(await page.chat(2, wanted, lambda text: None))["error"]

    return asyncio.run(run())


def test_an_unknown_option_is_named_with_those_there_are(page, path):
    error = failure(page, path, options={"heat": 1})
    assert error["name"] == "RequestError" and "heat" in error["message"] and "top_p" in error["message"]


def test_a_prompt_beyond_the_context_is_refused(page, path):
    error = failure(page, path, messages=[{"role": "user", "content": "hello " * 200}])
    assert error["name"] == "RequestError" and "128" in error["message"]


def test_an_unknown_loading_option_is_refused(page, path):
    reply = asyncio.run(page.open(1, File(path), '{"speed": 2}', lambda text: None))
    assert "speed" in json.loads(reply)["error"]["message"]


def test_a_file_that_is_no_model_gives_one_line(page, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"<!doctype html>")
    reply = asyncio.run(page.open(1, File(tmp_path / "x.gguf"), "{}", lambda text: None))
    error = json.loads(reply)["error"]
    assert error["name"] == "FormatError" and "\n" not in error["message"]


def test_a_file_that_moved_away_is_named_with_the_cure(page, path):
    file = File(path, "gone.gguf")

    async def read(offset, nbytes):
        raise OSError("NotReadableError")

    file.read = read
    error = json.loads(asyncio.run(page.open(1, file, "{}", lambda text: None)))["error"]
    assert "gone.gguf" in error["message"] and "again" in error["message"]


def test_a_bug_is_one_line_for_the_person_and_a_traceback_for_the_console(page, path, capsys, monkeypatch):
    monkeypatch.setattr(page_module, "_describe", lambda *_: 1 / 0)
    error = json.loads(asyncio.run(page.open(1, File(path), "{}", lambda text: None)))["error"]
    assert error == {"name": "InternalError", "message": "ZeroDivisionError: division by zero"}
    assert "Traceback" in capsys.readouterr().err


def test_options_are_read_as_javascript_writes_them():
    params = sampling_params({"logit_bias": {"7": 2}, "stop": ["a", "b"], "max_tokens": 3})
    assert params.logit_bias == {7: 2.0} and params.stop == ("a", "b") and params.max_tokens == 3
    with pytest.raises(RequestError, match="token ids"):
        sampling_params({"logit_bias": {"seven": 2}})
