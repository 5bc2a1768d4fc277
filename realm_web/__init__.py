"""Run GGUF language models from Python: on a desktop GPU through wgpu, in a browser page, or on the CPU.

>>> import realm_web
>>> realm_web.SamplingParams(temperature=0).greedy
True

Importing the package loads nothing: each public name is imported at its first use, so `realm --help` is
instant and a page loads only what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realm_web.answers import Chunk, Scores, Timings, TokenLogprob, Usage
    from realm_web.engine import Engine
    from realm_web.errors import DeviceError, FormatError, RealmError, RequestError, UnsupportedError
    from realm_web.llm import LLM, Completion
    from realm_web.sampler import SamplingParams

__version__ = "0.1.0"

_HOME = {
    "LLM": "llm",
    "Completion": "llm",
    "Engine": "engine",
    "Chunk": "answers",
    "Progress": "opening",
    "Timings": "answers",
    "Usage": "answers",
    "Scores": "answers",
    "TokenLogprob": "answers",
    "SamplingParams": "sampler",
    "RealmError": "errors",
    "FormatError": "errors",
    "UnsupportedError": "errors",
    "RequestError": "errors",
    "DeviceError": "errors",
}

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "DeviceError",
    "Engine",
    "FormatError",
    "Progress",
    "RealmError",
    "RequestError",
    "SamplingParams",
    "Scores",
    "Timings",
    "TokenLogprob",
    "UnsupportedError",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'realm_web' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"realm_web.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
