"""One line of a batch file: out of it comes an OpenAI request or one clear error; and one line of results.

A line is the body of a chat or completion request, bare or in the envelope of OpenAI's Batch API
(`custom_id`, `method`, `url`, `body`). Pure: knows no file, no engine and no model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from realm_web.errors import RequestError
from realm_web.sampler import SamplingParams

if TYPE_CHECKING:
    from realm_web.answers import Chunk, TokenLogprob, Usage

MAX_LINE = 4 << 20  # bytes
MAX_ID = 512  # characters of a custom_id
ENVELOPE = ("custom_id", "method", "url", "body")
PROMPT_OF = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}  # which field a URL's body has
# What a body has beside the sampling parameters. OpenAI's `model` and `user` have no effect: the command line
# names the model.
OTHER_FIELDS = ("messages", "prompt", "raw", "custom_id", "max_completion_tokens", "model", "user", "stream")
BODY = (*OTHER_FIELDS, *(f.name for f in fields(SamplingParams)))
MESSAGE = ("role", "content", "name")


class LineError(RequestError):
    """What is wrong with one line. `custom_id` is the line's own where it could be read."""

    def __init__(self, message: str, custom_id: str):
        super().__init__(message)
        self.custom_id = custom_id


@dataclass(frozen=True)
class BatchRequest:
    """What one line asks for: either a conversation, or a prompt that is continued as it stands."""

    custom_id: str
    messages: tuple[dict[str, str], ...] | None
    prompt: str | tuple[int, ...] | None
    params: SamplingParams


def default_id(number: int) -> str:
    """The custom_id of a line without one; lines count from 1."""
    return f"line-{number}"


def parse(line: bytes, number: int) -> BatchRequest:
    """The request of line `number`. LineError says what is wrong with it.

    >>> parse(b'{"prompt": "Hi", "max_tokens": 3, "raw": true}', 7).custom_id
    'line-7'
    """
    custom_id = default_id(number)
    try:
        request = _object(line)
        custom_id = _custom_id(request.get("custom_id"), custom_id)
        wanted = None
        if any(name in request for name in ("method", "url", "body")):
            request, wanted = _unwrapped(request)
        _check_names("", request, BODY)
        request = {name: value for name, value in request.items() if value is not None}
        messages, prompt = _prompt(request, wanted)
        return BatchRequest(custom_id, messages, prompt, SamplingParams.from_mapping(_sampling(request)))
    except RequestError as error:
        raise LineError(str(error), custom_id) from None


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise RequestError(f"the line is longer than {MAX_LINE:,} bytes")
    try:
        value = json.loads(line.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise RequestError(f"the line is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"the line is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # an integer of thousands of digits, or NaN
        raise RequestError("the line is not JSON: it holds a number that is none, or is too large") from None
    except RecursionError:
        raise RequestError("the line is nested too deeply") from None
    if not isinstance(value, dict):
        raise RequestError(f"the line is {short(value)}: give an object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _custom_id(value: object, default: str) -> str:
    if value is None:
        return default
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID:
        raise RequestError(f"custom_id is {short(value)}: give a string of 1 to {MAX_ID} characters")
    return value


def _unwrapped(envelope: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The body in an envelope, and the field that its URL asks for."""
    _check_names("", envelope, ENVELOPE)
    missing = [name for name in ENVELOPE if name not in envelope]
    if missing:
        raise RequestError(
            f"{missing[0]} is missing beside {', '.join(n for n in ENVELOPE if n in envelope)}"
        )
    method, url, body = (envelope[name] for name in ENVELOPE[1:])
    if method != "POST":
        raise RequestError(f'method is {short(method)}: give "POST"')
    if not isinstance(url, str) or url not in PROMPT_OF:
        raise RequestError(f"url is {short(url)}: give {' or '.join(PROMPT_OF)}")
    if not isinstance(body, dict):
        raise RequestError(f"body is {short(body)}: give an object")
    if "custom_id" in body:
        raise RequestError("custom_id is given twice, beside body and in it")
    return body, PROMPT_OF[url]


def _check_names(where: str, given: Mapping[str, object], allowed: Iterable[str]) -> None:
    for name in given:
        if name not in allowed:
            raise RequestError(f"{where}unknown field {short(name)}: use {', '.join(allowed)}")


def _prompt(
    request: dict[str, Any], wanted: str | None
) -> tuple[tuple[dict[str, str], ...] | None, str | tuple[int, ...] | None]:
    """The conversation or the prompt. A text alone is a user's message, unless it is raw or went to a URL
    that completes."""
    given = [name for name in ("messages", "prompt") if name in request]
    if len(given) != 1:
        raise RequestError("give messages or a prompt" + (", not both" if given else ""))
    if wanted and given != [wanted]:
        raise RequestError(f"{given[0]} is not for this url: it takes {wanted}")
    raw = request.get("raw", wanted == "prompt")
    if not isinstance(raw, bool):
        raise RequestError(f"raw is {short(raw)}: give true or false")
    if given == ["messages"]:
        if raw:
            raise RequestError("raw is for a prompt: messages need the chat template")
        return _messages(request["messages"]), None
    prompt = request["prompt"]
    if isinstance(prompt, str):
        return (None, prompt) if raw else (({"role": "user", "content": prompt},), None)
    if isinstance(prompt, list) and prompt and all(type(token) is int and token >= 0 for token in prompt):
        return None, tuple(prompt)
    raise RequestError(f"prompt is {short(prompt)}: give one text, or one list of token ids")


def _messages(messages: object) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages is {short(messages)}: give a list of objects with role and content")
    return tuple(_message(f"messages[{i}]", message) for i, message in enumerate(messages))


def _message(where: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{where} is {short(message)}: give an object with role and content")
    _check_names(f"{where}: ", message, MESSAGE)
    found = {name: value for name, value in message.items() if value is not None}
    for name in ("role", "content"):
        if name not in found:
            raise RequestError(f"{where} has no {name}")
    found["content"] = _content(where, found["content"])
    for name, value in found.items():
        if not isinstance(value, str):
            raise RequestError(f"{where}.{name} is {short(value)}: give a string")
    return found


def _content(where: str, content: object) -> object:
    """The text of a content; OpenAI's list of parts is put together where all of them are texts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"} or part["type"] != "text":
            raise RequestError(f"{where}.content holds {short(part)}: only parts of type text are supported")
        if not isinstance(part["text"], str):
            raise RequestError(f"{where}.content: text is {short(part['text'])}: give a string")
    return "".join(part["text"] for part in content)


def _sampling(request: dict[str, Any]) -> dict[str, object]:
    """The sampling parameters by our names; their values are checked by SamplingParams."""
    for name in ("model", "user"):
        if not isinstance(request.get(name, ""), str):
            raise RequestError(f"{name} is {short(request[name])}: give a string")
    if request.get("stream", False) is not False:
        raise RequestError(f"stream is {short(request['stream'])}: a batch does not stream")
    options = {name: value for name, value in request.items() if name not in OTHER_FIELDS}
    limit = request.get("max_completion_tokens")
    if limit is not None and options.setdefault("max_tokens", limit) != limit:
        raise RequestError("max_tokens and max_completion_tokens differ: give one of them")
    bias = options.get("logit_bias")
    if isinstance(bias, dict):
        options["logit_bias"] = {_token_id(name): value for name, value in bias.items()}
    if "prompt" in request and type(options.get("logprobs")) is int:  # completions give a number
        options["top_logprobs"] = options.pop("logprobs")
        options["logprobs"] = True
    return options


def _token_id(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 10):
        raise RequestError(f"logit_bias names token {short(name)}: give token ids")
    return int(name)


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """The pieces of the answers to one request, put together."""

    def __init__(self, request: BatchRequest):
        self._request = request
        self._choices = [_Choice() for _ in range(request.params.n)]
        self.usages: list[Usage] = []

    def add(self, chunk: Chunk) -> None:
        choice = self._choices[chunk.index]
        choice.text.append(chunk.text)
        choice.token_ids += chunk.token_ids
        choice.logprobs += chunk.logprobs or ()
        if chunk.finish_reason is not None:
            choice.finish_reason = chunk.finish_reason
            self.usages.append(chunk.usage)

    def result(self, token_text: Callable[[int], str]) -> dict[str, object]:
        """What is written of it. With n > 1 there are `choices`; `usage` counts their shared prompt once."""
        choices = [self._choice(choice, token_text) for choice in self._choices]
        answers = choices[0] if len(choices) == 1 else {
            "choices": [{"index": i} | choice for i, choice in enumerate(choices)]
        }  # fmt: skip
        n_prompt = self.usages[0].prompt_tokens
        n_new = sum(usage.completion_tokens for usage in self.usages)
        usage = {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_new,
            "total_tokens": n_prompt + n_new,
            "cached_tokens": min(usage.cached_tokens for usage in self.usages),
        }
        return {"custom_id": self._request.custom_id, **answers, "usage": usage}

    def _choice(self, choice: _Choice, token_text: Callable[[int], str]) -> dict[str, object]:
        found = {
            "text": "".join(choice.text),
            "token_ids": choice.token_ids,
            "finish_reason": choice.finish_reason,
        }
        if self._request.params.logprobs:
            found["logprobs"] = [_logprob(entry, token_text) for entry in choice.logprobs]
        return found


def _logprob(entry: TokenLogprob, token_text: Callable[[int], str]) -> dict[str, object]:
    def shown(token_id: int, logprob: float) -> dict[str, object]:
        return {"token_id": token_id, "token": token_text(token_id), "logprob": logprob}

    return shown(entry.token_id, entry.logprob) | {"top_logprobs": [shown(*pair) for pair in entry.top]}


def failure(custom_id: str, number: int, kind: str, message: str) -> dict[str, object]:
    """What is written of a line that brought no answer."""
    return {"custom_id": custom_id, "line": number, "error": {"type": kind, "message": message}}


def encode(result: Mapping[str, object]) -> bytes:
    """One line of results. Lone surrogates, which UTF-8 does not have, stay escaped."""
    try:
        return json.dumps(result, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(result).encode() + b"\n"
