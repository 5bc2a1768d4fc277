"""Batches: what a line asks for, what is written of it, the file of results, and the command."""

import argparse
import asyncio
import json
import signal
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHATML, write_tiny

from realm_web import batchfile
from realm_web.__main__ import main
from realm_web.batchfile import Answer, LineError, parse
from realm_web.cli import batch, model
from realm_web.engine import Engine
from realm_web.errors import DeviceError, OutOfDeviceMemory, RealmError, RequestError
from realm_web.sampler import SamplingParams

HELLO = {"role": "user", "content": "hello"}
Usage = namedtuple("Usage", "prompt_tokens completion_tokens cached_tokens")
TokenLogprob = namedtuple("TokenLogprob", "token_id logprob top")


def line(**fields) -> bytes:
    return json.dumps(fields).encode()


def chunk(text, ids=(), reason=None, usage=None, index=0, logprobs=None) -> SimpleNamespace:
    return SimpleNamespace(
        text=text, token_ids=ids, finish_reason=reason, usage=usage, index=index, logprobs=logprobs
    )  # fmt: skip


# ---- a line


def test_a_chat_body_is_a_conversation_with_its_parameters():
    request = parse(
        line(
            custom_id="a", model="any", messages=[{"role": "system", "content": "Be kind."}, HELLO],
            max_completion_tokens=9, temperature=0.5, top_p=0.9, seed=7, stop="\n", logprobs=True,
            top_logprobs=3, n=2, logit_bias={"5": -100}, presence_penalty=0.1, frequency_penalty=0.2,
            user="me", stream=False, response_format={"type": "json_object"},
        ),
        1,
    )  # fmt: skip
    assert (request.custom_id, request.prompt) == ("a", None)
    assert request.messages == ({"role": "system", "content": "Be kind."}, HELLO)
    assert request.params == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, seed=7, stop=("\n",), logprobs=True, top_logprobs=3, n=2,
        logit_bias={5: -100.0}, presence_penalty=0.1, frequency_penalty=0.2,
        response_format={"type": "json_object"},
    )  # fmt: skip


def test_null_means_the_default_and_the_defaults_are_those_of_openai():
    request = parse(line(messages=[HELLO], max_tokens=None, stop=None, n=None, seed=None, logprobs=None), 3)
    assert request.params == SamplingParams()
    assert request.params.temperature == 1.0
    assert request.custom_id == "line-3"


def test_a_bare_prompt_is_a_message_of_the_user_unless_it_is_raw():
    assert parse(line(prompt="hello"), 1).messages == (HELLO,)
    assert parse(line(prompt="hello", raw=False), 1).messages == (HELLO,)
    raw = parse(line(prompt="hello", raw=True), 1)
    assert (raw.messages, raw.prompt) == (None, "hello")
    assert parse(line(prompt=[1, 2]), 1).prompt == (1, 2)


def test_an_envelope_says_by_its_url_how_the_prompt_is_meant():
    def enveloped(url, **body):
        return parse(line(custom_id="x", method="POST", url=url, body=body), 1)

    assert enveloped("/v1/chat/completions", messages=[HELLO]).messages == (HELLO,)
    assert enveloped("/v1/completions", prompt="hello").prompt == "hello"
    assert enveloped("/v1/completions", prompt="hello", raw=False).messages == (HELLO,)
    assert enveloped("/v1/completions", prompt="hello", logprobs=2).params.top_logprobs == 2


def test_text_parts_of_a_message_are_put_together():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert parse(line(messages=[{"role": "user", "content": parts, "name": None}]), 1).messages == (HELLO,)


def test_our_own_sampling_parameters_are_taken_too():
    params = parse(
        line(prompt="x", top_k=3, min_p=0.1, ignore_eos=True, stop_token_ids=[4], min_tokens=2), 1
    ).params
    assert params == SamplingParams(top_k=3, min_p=0.1, ignore_eos=True, stop_token_ids=(4,), min_tokens=2)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "the line is not JSON: "),
        (b"\xff{}", "the line is not UTF-8 (byte 0)"),
        (b"[1]", "the line is [1]: give an object"),
        (b"[" * 100_000, "the line is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "the line is not JSON: it holds a number"),
        (b'{"prompt": "x", "temperature": NaN}', "the line is not JSON: it holds a number"),
        (b" " * (batchfile.MAX_LINE + 1), "the line is longer than 4,194,304 bytes"),
        (line(), "give messages or a prompt"),
        (line(prompt="x", messages=[HELLO]), "give messages or a prompt, not both"),
        (line(prompt="x", tempreature=1), "unknown field 'tempreature': use messages, prompt, raw,"),
        (line(prompt="x", temperature="hot"), "temperature is 'hot': give a number from 0 to 100"),
        (line(prompt="x", max_tokens=0), "max_tokens is 0: give a whole number from 1"),
        (line(prompt="x", max_tokens=2, max_completion_tokens=3), "max_tokens and max_completion"),
        (line(prompt="x", logit_bias={"a": 1}), "logit_bias names token 'a': give token ids"),
        (line(prompt="x", stream=True), "stream is True: a batch does not stream"),
        (line(prompt="x", model=5), "model is 5: give a string"),
        (line(prompt="x", raw=1), "raw is 1: give true or false"),
        (line(prompt=["x", "y"]), "prompt is ['x', 'y']: give one text, or one list of token ids"),
        (line(prompt=[1, True]), "prompt is [1, True]: give one text"),
        (line(prompt=[]), "prompt is []: give one text"),
        (line(prompt="x", custom_id=""), "custom_id is '': give a string of 1 to 512 characters"),
        (line(prompt="x", custom_id=5), "custom_id is 5: give a string"),
        (line(messages=[]), "messages is []: give a list"),
        (line(messages=[HELLO], raw=True), "raw is for a prompt"),
        (line(messages=["x"]), "messages[0] is 'x': give an object with role and content"),
        (line(messages=[HELLO, {"role": "user"}]), "messages[1] has no content"),
        (line(messages=[{"role": 1, "content": "x"}]), "messages[0].role is 1: give a string"),
        (line(messages=[{**HELLO, "tool_calls": []}]), "messages[0]: unknown field 'tool_calls'"),
        (line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "only parts of type text"),
        (line(messages=[{"role": "user", "content": [{"type": "text", "text": 1}]}]), "text is 1: give"),
        (line(body={}), "custom_id is missing beside body"),
        (line(custom_id="a", method="POST", url="/v1/completions", body={}, prompt="x"), "field 'prompt'"),
        (line(custom_id="a", method="GET", url="/v1/completions", body={}), "method is 'GET': give \"POST\""),
        (line(custom_id="a", method="POST", url="/v1/embeddings", body={}), "url is '/v1/embeddings': give"),
        (line(custom_id="a", method="POST", url="/v1/completions", body=[]), "body is []: give an object"),
        (line(custom_id="a", method="POST", url="/v1/completions", body={"custom_id": "b"}), "given twice"),
        (
            line(custom_id="a", method="POST", url="/v1/completions", body={"messages": [HELLO]}),
            "messages is not for this url: it takes prompt",
        ),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_what_is_wrong_with_it(data, words):
    with pytest.raises(LineError) as caught:
        parse(data, 1)
    assert words in str(caught.value)


def test_the_error_of_a_line_has_its_custom_id_where_that_can_be_read():
    for data, custom_id in (
        (line(custom_id="a", prompt="x", n="y"), "a"),
        (line(custom_id=5, prompt="x"), "line-9"),
        (b"{", "line-9"),
    ):
        with pytest.raises(LineError) as caught:
            parse(data, 9)
        assert caught.value.custom_id == custom_id


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = (*batchfile.BODY, *batchfile.ENVELOPE, "nonsense")
BODIES = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5)


@settings(max_examples=300, deadline=None)
@given(BODIES | JSON | st.builds(lambda body: {"prompt": "x", **body}, BODIES))
def test_any_json_is_a_request_or_one_clear_error(value):
    try:
        request = parse(json.dumps(value).encode(), 1)
    except LineError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert isinstance(request.params, SamplingParams)
        assert (request.messages is None) != (request.prompt is None)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=50))
def test_bytes_that_are_no_request_are_one_clear_error(data):
    with pytest.raises(LineError):
        parse(data, 1)


# ---- an answer


def test_an_answer_is_put_together_from_its_pieces():
    answer = Answer(parse(line(custom_id="a", prompt="x"), 1))
    answer.add(chunk("Hel", (1,)))
    answer.add(chunk("lo", (2, 3), "stop", Usage(5, 3, 4)))
    assert answer.result(str) == {
        "custom_id": "a",
        "text": "Hello",
        "token_ids": [1, 2, 3],
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "cached_tokens": 4},
    }


def test_several_answers_to_one_prompt_are_choices():
    answer = Answer(parse(line(custom_id="a", prompt="x", n=2), 1))
    answer.add(chunk("one", (1,), index=1))
    answer.add(chunk("two", (2,), "length", Usage(5, 1, 4), index=0))
    answer.add(chunk("!", (3,), "stop", Usage(5, 2, 5), index=1))
    assert answer.result(str) == {
        "custom_id": "a",
        "choices": [
            {"index": 0, "text": "two", "token_ids": [2], "finish_reason": "length"},
            {"index": 1, "text": "one!", "token_ids": [1, 3], "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "cached_tokens": 4},
    }


def test_log_probabilities_are_written_where_they_were_asked_for():
    answer = Answer(parse(line(prompt="x", logprobs=True, top_logprobs=1), 1))
    found = (TokenLogprob(7, -0.5, ((7, -0.5),)),)
    answer.add(chunk("A", (7,), "stop", Usage(1, 1, 0), logprobs=found))
    entry = {"token_id": 7, "token": "<7>", "logprob": -0.5}
    assert answer.result(lambda i: f"<{i}>")["logprobs"] == [entry | {"top_logprobs": [entry]}]


def test_a_result_is_one_line_of_utf_8_whatever_is_in_it():
    for text in ("naïve\n\u2028", "lone \ud800 surrogate"):
        data = batchfile.encode({"text": text})
        assert data.count(b"\n") == 1 and json.loads(data.decode()) == {"text": text}


# ---- the command


class ScriptedEngine:
    """Answers with the prompt in capitals, a character a token; prompts may say what happens instead."""

    def __init__(self, **sizes):
        self.sizes, self.asked, self.at_once, self.most_at_once, self.closed = sizes, [], 0, 0, False
        self.tokenizer = SimpleNamespace(token_bytes=lambda token: bytes([token]))

    def chat_prompt(self, messages) -> str:
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

    async def generate(self, prompt, params):
        self.asked.append(prompt)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            await asyncio.sleep(0)
            if prompt in ERRORS:
                raise ERRORS[prompt]
            if prompt == "interrupt":
                signal.raise_signal(signal.SIGINT)
                await asyncio.sleep(60)
            text = prompt.upper()
            for index in range(params.n):
                yield chunk(text[:-1], tuple(text[:-1].encode()), index=index)
                yield chunk(
                    text[-1:], tuple(text[-1:].encode()), "stop", Usage(len(prompt), len(text), 0), index
                )  # fmt: skip
        finally:
            self.at_once -= 1

    async def close(self):
        self.closed = True


ERRORS = {
    "too long": RequestError("the prompt has 900 tokens, the context 64"),
    "no room": OutOfDeviceMemory("no room"),
    "odd": RealmError("the model computed no number"),
    "lost": DeviceError("the device is lost"),
}


class Folder:
    """An input file, an output file, and `realm batch` run over them."""

    def __init__(self, path: Path, engines: list):
        self.input, self.output, self.engines = path / "in.jsonl", path / "out.jsonl", engines

    def write(self, *requests) -> None:
        lines = (item if isinstance(item, bytes) else json.dumps(item).encode() for item in requests)
        self.input.write_bytes(b"\n".join(lines) + b"\n")

    def run(self, *flags: str) -> int:
        return main(["batch", "m.gguf", "--input", str(self.input), "--output", str(self.output), *flags])

    @property
    def results(self) -> list[dict]:
        return [json.loads(data) for data in self.output.read_bytes().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    engines = []

    async def open_engine(args: argparse.Namespace, **sizes: int) -> ScriptedEngine:
        engines.append(ScriptedEngine(**sizes))
        return engines[-1]

    monkeypatch.setattr(model, "open_engine", open_engine)
    return Folder(tmp_path, engines)


def raw(custom_id: str, prompt: str, **more) -> dict:
    return {"custom_id": custom_id, "prompt": prompt, "raw": True, **more}


def test_every_line_gets_its_result_and_a_bad_one_costs_only_itself(folder, capsys):
    folder.write(
        raw("a", "one"), b"{nonsense", {"custom_id": "chat", "messages": [HELLO]}, b"  ",
        raw("long", "too long"), raw("room", "no room"), raw("odd", "odd"), raw("typo", "x", tempreature=1),
        {"prompt": "hello"}, raw("b", "two"),
    )  # fmt: skip
    assert folder.run() == 0
    answers = {result["custom_id"]: result.get("text") for result in folder.results}
    assert answers == {
        "a": "ONE", "line-2": None, "chat": "<USER>HELLO", "long": None, "room": None, "odd": None,
        "typo": None, "line-9": "<USER>HELLO", "b": "TWO",
    }  # fmt: skip
    errors = {r["custom_id"]: (r["line"], r["error"]["type"]) for r in folder.results if "error" in r}
    assert errors == {
        "line-2": (2, "invalid_request_error"), "long": (5, "invalid_request_error"),
        "room": (6, "server_error"), "odd": (7, "server_error"), "typo": (8, "invalid_request_error"),
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert out == "" and "10 of 10 lines, 5 failed" in err and err.count("\n") == 1
    assert folder.engines[0].closed and folder.engines[0].sizes["max_seqs"] == 32


def test_the_keys_of_a_result_are_those_that_scripts_rely_on(folder):
    folder.write(raw("a", "one"), raw("b", "two", n=2))
    folder.run()
    one, two = folder.results
    assert list(one) == ["custom_id", "text", "token_ids", "finish_reason", "usage"]
    assert one["token_ids"] == list(b"ONE")
    assert [choice["text"] for choice in two["choices"]] == ["TWO", "TWO"]


def test_a_second_run_does_only_what_is_missing(folder, capsys):
    folder.write(
        raw("a", "one"), b"{", raw("a", "again"), raw("lost", "lost"), *(raw(f"c{i}", "x") for i in range(9))
    )
    assert folder.run("--max-seqs", "1") == 2
    assert "the device is lost" in capsys.readouterr().err
    first = folder.results
    assert folder.engines[0].closed
    assert {r["custom_id"] for r in first} >= {"a", "line-2"} and "lost" not in {
        r["custom_id"] for r in first
    }

    folder.write(
        raw("a", "one"), b"{", raw("a", "again"), raw("lost", "found"), *(raw(f"c{i}", "x") for i in range(9))
    )
    assert folder.run() == 0
    done = [r["custom_id"] for r in folder.results]
    assert folder.results[: len(first)] == first
    assert sorted(done) == sorted(["a", "a", "line-2", "lost", *(f"c{i}" for i in range(9))])
    assert "one" not in folder.engines[1].asked and "found" in folder.engines[1].asked

    before = folder.output.read_bytes()
    assert folder.run() == 0
    assert folder.output.read_bytes() == before
    assert len(folder.engines) == 2  # there was nothing to open one for


def test_a_repeated_custom_id_is_an_error_of_the_later_line(folder):
    folder.write(raw("a", "one"), raw("b", "two"), raw("a", "three"), raw("a", "four"))
    folder.run()
    assert [(r["custom_id"], r["line"]) for r in folder.results if "error" in r] == [("a", 3), ("a", 4)]
    assert all(r["error"]["type"] == "duplicate_custom_id" for r in folder.results if "error" in r)
    assert {r["custom_id"]: r["text"] for r in folder.results if "text" in r} == {"a": "ONE", "b": "TWO"}


def test_errors_are_kept_unless_they_are_to_be_tried_again(folder):
    folder.write(raw("a", "one"), raw("b", "odd"), raw("a", "dup"))
    folder.run()
    kept = folder.output.read_bytes()
    folder.write(raw("a", "one"), raw("b", "two"), raw("a", "dup"))
    folder.run()
    assert folder.output.read_bytes() == kept
    folder.run("--retry-errors")
    assert [(r["custom_id"], r.get("text")) for r in folder.results] == [
        ("a", "ONE"),
        ("a", None),
        ("b", "TWO"),
    ]
    assert folder.engines[1].asked == ["two"]
    assert list(folder.output.parent.glob("out.jsonl.*")) == []


@pytest.mark.parametrize("cut", [1, 5, 14, 30])
def test_a_line_that_was_cut_off_is_done_again(folder, cut):
    folder.write(raw("a", "one"), raw("b", "two"))
    folder.run()
    whole = folder.output.read_bytes()
    end = whole.index(b"\n") + 1
    folder.output.write_bytes(whole[: end + cut])
    folder.run()
    assert folder.output.read_bytes() == whole
    assert folder.engines[1].asked == ["two"]


@pytest.mark.parametrize(
    "text", [b"my diary", b"my diary\n", b'{"custom_id": 5, "text": ""}\n', b'{"error": {}}\n[]\n']
)
def test_a_file_that_holds_no_results_is_not_touched(folder, text, capsys):
    folder.write(raw("a", "one"))
    folder.output.write_bytes(text)
    assert folder.run() == 2
    assert "line 1 is not a result of realm batch" in capsys.readouterr().err
    assert folder.output.read_bytes() == text


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(folder, capsys):
    folder.write(raw("a", "one"), raw("b", "two"), raw("c", "interrupt"), raw("d", "four"))
    assert folder.run() == 130
    assert {r["custom_id"] for r in folder.results} >= {"a", "b"}
    assert "the same command does the rest" in capsys.readouterr().err
    assert folder.engines[0].closed and folder.engines[0].at_once == 0
    folder.write(raw("a", "one"), raw("b", "two"), raw("c", "three"), raw("d", "four"))
    assert folder.run() == 0
    assert {r["custom_id"]: r["text"] for r in folder.results} == {
        "a": "ONE",
        "b": "TWO",
        "c": "THREE",
        "d": "FOUR",
    }


def test_no_more_requests_are_under_way_than_the_window_holds(folder):
    folder.write(*(raw(f"r{i}", f"p{i}") for i in range(300)))
    folder.run("--max-seqs", "2")
    assert folder.engines[0].most_at_once == 2 * batch.WINDOW
    assert {r["custom_id"]: r["text"] for r in folder.results} == {f"r{i}": f"P{i}" for i in range(300)}


def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MAX_LINE", 1000)
    path = tmp_path / "in"
    path.write_bytes(b"x" * 5000 + b"\ny\n" + b"z" * 3001)
    with path.open("rb") as file:
        assert list(batch.read_lines(file)) == [(1, b"x" * 1001), (2, b"y\n"), (3, b"z" * 1001)]
    assert batch.count_lines(path) == 3


def test_two_runs_do_not_write_one_file(folder, tmp_path):
    pytest.importorskip("fcntl", reason="this system has no file locks")
    with batch.Results(tmp_path / "out"), pytest.raises(RequestError, match="being written by another"):
        batch.Results(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "absent"], "absent: No such file"),
        (["--output", "in.jsonl"], "cannot be appended to; give another file"),
        (["--output", "/dev/null"], "cannot be appended to; give another file"),
        (["--output", "no/such/folder"], "no/such/folder: No such file"),
        (["--max-seqs", "0"], "--max-seqs is 0; it must be at least 1"),
    ],
)
def test_batch_refuses_what_makes_no_sense(folder, monkeypatch, capsys, flags, words):
    folder.write(raw("a", "one"))
    monkeypatch.chdir(folder.input.parent)
    assert folder.run(*flags) == 2
    assert words in capsys.readouterr().err


# ---- with a model


async def alone(path, data: bytes) -> list[tuple[str, list[int], str]]:
    """Text, token ids and finish reason of each answer to a line, when nothing else runs."""
    request = parse(data, 1)
    engine = await Engine.open(path, device="cpu", max_seqs=4)
    answer = Answer(request)
    prompt = request.prompt if request.messages is None else engine.chat_prompt(request.messages)
    async for piece in engine.generate(prompt, request.params):
        answer.add(piece)
    await engine.close()
    result = answer.result(str)
    return [(c["text"], c["token_ids"], c["finish_reason"]) for c in result.get("choices", [result])]


def test_a_batch_answers_every_line_as_if_it_were_alone(tmp_path, capsys):
    path = write_tiny(tmp_path / "tiny.gguf", chat_template=CHATML, context=64).path
    lines = [
        line(custom_id="chat", messages=[HELLO], max_tokens=6, temperature=0),
        line(custom_id="raw", prompt="the world", raw=True, max_tokens=9, temperature=0.8, seed=5, top_p=0.9),
        line(custom_id="two", prompt="hello", raw=True, max_tokens=4, temperature=1.5, seed=6, n=2),
        line(custom_id="ids", prompt=[40, 41, 42], max_tokens=3, temperature=0, logprobs=2),
        line(custom_id="stop", prompt="a", raw=True, max_tokens=30, temperature=2, seed=1, stop=["e", "t"]),
        line(custom_id="bias", prompt="a", raw=True, max_tokens=3, temperature=0, logit_bias={"65": 100}),
        line(custom_id="long", prompt=[7] * 90, max_tokens=3),
        line(custom_id="alien", prompt=[9999], max_tokens=3),
    ]
    (tmp_path / "in").write_bytes(b"\n".join(lines))
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["batch", str(path), *arguments, "--max-seqs", "4", "--kv-tokens", "128"]) == 0
    capsys.readouterr()
    results = {r["custom_id"]: r for r in map(json.loads, (tmp_path / "out").read_bytes().splitlines())}
    assert len(results) == len(lines)
    for data in lines[:-2]:
        result = results[json.loads(data)["custom_id"]]
        got = [(c["text"], c["token_ids"], c["finish_reason"]) for c in result.get("choices", [result])]
        assert got == asyncio.run(alone(path, data))
    assert results["bias"]["token_ids"] == [65, 65, 65]
    assert [len(entry["top_logprobs"]) for entry in results["ids"]["logprobs"]] == [2, 2, 2]
    assert all(e["top_logprobs"][0]["logprob"] == e["logprob"] <= 0 for e in results["ids"]["logprobs"])
    assert results["two"]["usage"]["completion_tokens"] == 8
    assert "90 tokens" in results["long"]["error"]["message"]
    assert "9999" in results["alien"]["error"]["message"]
