"""What the page's worker (`web/worker.js`) calls: load a model, answer a conversation, stop; all in JSON.

JavaScript objects come in as arguments; neither `js` nor `pyodide` is imported, so this module runs and is
tested anywhere. Every async method takes the number of the call first and replies with a JSON object of
either `ok` or `error`: {name, message}.
Knows nothing of how models are stored or downloaded, nor of how anything looks.
"""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from realm_web.answers import Answer, Chunk
from realm_web.engine import Engine
from realm_web.errors import RealmError, RequestError
from realm_web.sampler import SamplingParams

OPEN_OPTIONS = ("context", "kv_tokens", "kv_type", "max_seqs", "max_rows")


class JsSource:
    """A model file in JavaScript: {name, size, read(offset, nbytes) -> Promise, close(), reopen()}."""

    def __init__(self, js: Any):
        self._js = js
        self.name = str(js.name)
        self.size = int(js.size)

    async def read(self, offset: int, nbytes: int) -> Any:
        """The bytes as a JavaScript Uint8Array, which goes to the GPU without a copy in Python's memory."""
        try:
            return await self._js.read(offset, nbytes)
        except Exception as error:  # whatever the browser throws when a file moved or a disk failed
            raise RealmError(
                f"{self.name} cannot be read any more ({error}); choose or download it again"
            ) from error

    async def read_bytes(self, offset: int, nbytes: int) -> bytes:
        """The bytes in Python's memory, for the header."""
        return (await self.read(offset, nbytes)).to_bytes()

    def close(self) -> None:
        self._js.close()

    async def reopen(self) -> JsSource:
        """The same file once more, after it was closed."""
        return JsSource(await self._js.reopen())


class JsStore:
    """Small texts by name that the browser keeps: {get(name) -> Promise, put(name, text) -> Promise}."""

    def __init__(self, js: Any):
        self._js = js

    async def get(self, name: str) -> str | None:
        text = await self._js.get(name)
        return text if isinstance(text, str) else None

    async def put(self, name: str, text: str) -> None:
        await self._js.put(name, text)


@dataclass(eq=False)
class _Model:
    engine: Engine
    answers: set[int] = field(default_factory=set)  # calls that are writing one


def _call(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[str]]:
    """Make a method a call of the worker: numbered, so that it can be stopped, and replying in JSON."""

    @functools.wraps(method)
    async def numbered(page: Page, call_id: int, *arguments: Any) -> str:
        task = page._running[call_id] = asyncio.current_task()
        if call_id in page._stopped:
            task.cancel()  # takes effect where the method first waits
        try:
            return json.dumps({"ok": await method(page, call_id, *arguments)})
        except asyncio.CancelledError:
            return _error("AbortError", "stopped")
        except RealmError as error:
            return _error(type(error).__name__, str(error))
        except Exception as error:  # a bug of ours: one line for the person, the rest for the console
            traceback.print_exc()
            return _error("InternalError", f"{type(error).__name__}: {error}")
        finally:
            del page._running[call_id]
            page._stopped.discard(call_id)

    return numbered


def _error(name: str, message: str) -> str:
    return json.dumps({"error": {"name": name, "message": message}})


class Page:
    """The models that are open in one worker, and the answers that are being written."""

    def __init__(self, js_store: Any = None) -> None:
        self._store = JsStore(js_store) if js_store is not None else None
        self._models: dict[int, _Model] = {}
        self._n_opened = 0
        self._running: dict[int, asyncio.Task] = {}
        self._stopped: set[int] = set()  # asked to stop before they began

    @_call
    async def open(
        self, call_id: int, js_source: Any, options: str, on_progress: Callable[[str], None]
    ) -> dict:
        """Load a model; the reply describes it and gives the number (`model`) that later calls name it by."""
        wanted = _known(json.loads(options), OPEN_OPTIONS, "option")
        source = JsSource(js_source)
        engine = await Engine.open(
            source,
            device="browser",
            reopen=source.reopen,
            store=self._store,
            on_progress=lambda p: on_progress(json.dumps(asdict(p))),
            **wanted,
        )
        self._n_opened += 1
        self._models[self._n_opened] = _Model(engine)
        return {"model": self._n_opened, **_describe(engine, source)}

    @_call
    async def chat(self, call_id: int, request: str, on_chunk: Callable[[str], None]) -> dict:
        """Answer `messages`, or continue `prompt`: JSON {model, options, and messages or prompt}.

        `on_chunk` gets the text of every piece. The reply tells counts, rates and why the answer ended,
        which is "abort" when it was stopped.
        """
        wanted = json.loads(request)
        model = self._model(wanted["model"])
        params = sampling_params(wanted.get("options", {}))
        engine = model.engine
        prompt = engine.chat_prompt(wanted["messages"]) if "messages" in wanted else wanted["prompt"]
        model.answers.add(call_id)
        try:
            return await _stream(engine, prompt, params, on_chunk)
        finally:
            model.answers.discard(call_id)

    @_call
    async def embed(self, call_id: int, request: str) -> list[float]:
        """A text as one vector of length 1: JSON {model, text, options: {pooling}}."""
        wanted = json.loads(request)
        options = _known(wanted.get("options", {}), ("pooling",), "option")
        return await self._model(wanted["model"]).engine.embed(wanted["text"], **options)

    @_call
    async def score(self, call_id: int, request: str) -> dict:
        """How likely a text is: JSON {model, text}."""
        wanted = json.loads(request)
        scores = await self._model(wanted["model"]).engine.score(wanted["text"])
        return {"token_ids": scores.token_ids, "logprobs": scores.logprobs}

    def stop(self, call_id: int) -> None:
        """End a call at once: an answer also in the middle of its prompt, and with its normal reply."""
        if call_id in self._running:
            self._running[call_id].cancel()
        else:
            self._stopped.add(call_id)

    @_call
    async def close(self, call_id: int, model_id: int) -> None:
        """Give a model's memory back."""
        model = self._model(model_id)
        for answer in list(model.answers):
            self.stop(answer)
        del self._models[model_id]
        await model.engine.close()

    def _model(self, model_id: int) -> _Model:
        try:
            return self._models[model_id]
        except KeyError:
            raise RequestError(f"model {model_id} is not open (any more): load it again") from None


def sampling_params(options: dict) -> SamplingParams:
    """Sampling options as JavaScript can write them: object keys are strings, lists stand for tuples."""
    wanted = dict(options)
    if isinstance(wanted.get("logit_bias"), dict):
        try:
            wanted["logit_bias"] = {int(key): value for key, value in wanted["logit_bias"].items()}
        except ValueError as error:
            raise RequestError(f"logit_bias: {error}; its keys are token ids") from None
    return SamplingParams.from_mapping(wanted)


async def _stream(
    engine: Engine, prompt: str, params: SamplingParams, on_chunk: Callable[[str], None]
) -> dict:
    """Pass the pieces on as they come; the summary of the whole, also when cancelled half-way."""
    done: asyncio.Future[Chunk] = asyncio.get_running_loop().create_future()
    started = time.perf_counter()

    def sink(chunk: Chunk | BaseException) -> None:
        if isinstance(chunk, BaseException):
            if not done.done():
                done.set_exception(chunk)
            return
        if chunk.text:
            on_chunk(chunk.text)
        if chunk.finish_reason is not None and not done.done():
            done.set_result(chunk)

    if params.n != 1:
        raise RequestError(f"n is {params.n}: a conversation has one answer")
    answers: list[Answer] = []
    try:
        await asyncio.sleep(0)  # where a call that was stopped before it began ends
        answers = await engine.start(prompt, params, sink)
        final = await done
    except asyncio.CancelledError:  # stopped: the engine's own summary never comes
        engine.stop(answers)
        n_tokens, first = (answers[0].n_tokens, answers[0].first) if answers else (0, started)
        writing = time.perf_counter() - first
        return {
            "finish_reason": "abort",
            "prompt_tokens": None,
            "completion_tokens": n_tokens,
            "predicted_per_second": (n_tokens - 1) / writing if n_tokens > 1 and writing > 0 else None,
            "prompt_per_second": None,
            "time_to_first_token_ms": (first - started) * 1000 if n_tokens else None,
        }
    return {
        "finish_reason": final.finish_reason,
        "prompt_tokens": final.usage.prompt_tokens,
        "cached_tokens": final.usage.cached_tokens,
        "completion_tokens": final.usage.completion_tokens,
        "predicted_per_second": _finite(final.timings.predicted_per_second),
        "prompt_per_second": _finite(final.timings.prompt_per_second),
        "time_to_first_token_ms": _finite(final.timings.time_to_first_token_ms),
    }


def _describe(engine: Engine, source: JsSource) -> dict:
    metadata = engine.gguf.metadata
    return {
        "name": str(metadata.get("general.name") or source.name.removesuffix(".gguf")),
        "file": source.name,
        "size": source.size,
        "architecture": str(metadata.get("general.architecture", "")),
        "adapter": engine.device.name,
        "fallback": engine.device.info.is_cpu,
        "context": engine.context,
    }


def _known(options: dict, allowed: tuple[str, ...], what: str) -> dict:
    for name in options:
        if name not in allowed:
            raise RequestError(f"unknown {what} {name!r}: use {', '.join(allowed)}")
    return options


def _finite(value: float | None) -> float | None:
    """JSON has no infinities; a rate over no time is unknown."""
    return value if value is not None and math.isfinite(value) else None
