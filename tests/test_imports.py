"""The one-way import rule: who may import whom, read from the syntax trees.

A module of ours imports only modules of its own level or below, and a third-party package or a system
facility only where the tables here allow it. A new module must be given its level.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "realm_web"

# dotted name below realm_web (itself and everything under it) -> level
LEVELS = {
    "env": 0,
    "errors": 0,
    "gguf": 1,
    "quants": 1,
    "grids": 1,
    "dequant": 1,
    "quantize": 1,
    "mixture": 1,
    "ggufwriter": 1,
    "tokenizer": 1,
    "chat": 1,
    "runtime": 2,
    "step": 3,
    "tensor": 3,
    "ops": 3,
    "models": 4,
    "kvcache": 4,
    "tiling": 4,
    "tuning": 4,
    "sampler": 4,
    "grammar": 4,
    "request": 5,
    "fairness": 5,
    "scheduler": 5,
    "loader": 5,
    "sources": 5,
    "convert": 5,
    "runner": 5,
    "answers": 5,
    "opening": 5,
    "pacing": 5,
    "turns": 5,
    "stepping": 5,
    "engine": 5,
    "benchmark": 6,
    "llm": 6,
    "page": 6,
    "batchfile": 6,
    "api": 6,
    "server": 6,
    "client": 6,
    "cli": 6,
    "__main__": 6,
}

# Only these modules may import the package (a `*` at the end: any module that starts so).
THIRD_PARTY = {
    "jinja2": ("chat", "runtime.template"),
    "wgpu": ("runtime.webgpu*",),
    "wgpudawn": ("runtime.dawn",),
    "js": ("runtime.browser",),
    "pyodide": ("runtime.browser", "grammar.page"),
    "pyodide_js": ("runtime.browser",),
    "numpy": ("runtime.cpu*", "dequant*", "quantize", "convert"),
    "native": ("runtime.native",),
    "rich": ("cli*",),
    "huggingface_hub": ("sources",),
    "llguidance": ("grammar.native",),
}

# Never loaded by a page; everything else below level 6, and page.py, is.
NATIVE_ONLY = (
    "runtime.webgpu*",
    "runtime.dawn",
    "runtime.cpu*",
    "runtime.native",
    "dequant*",
    "quantize",
    "sources",
    "convert",
    "grammar.native",
)
NOT_IN_A_PAGE = {
    "_thread",
    "concurrent",
    "ctypes",
    "http",
    "mmap",
    "multiprocessing",
    "select",
    "selectors",
    "signal",
    "socket",
    "socketserver",
    "ssl",
    "subprocess",
    "threading",
    "urllib.request",
}
# Level 1 knows no device and does no input or output.
NOT_IN_FORMATS = NOT_IN_A_PAGE | {"asyncio", "io", "os", "pathlib", "shutil", "tempfile", "urllib"}


def modules() -> list[str]:
    """Dotted names below realm_web, without the root package (whose lazy exports may name every level)."""
    paths = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if name != "__init__"]


def source(module: str) -> str:
    path = PACKAGE.joinpath(*module.split("."))
    return (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8")


def imports(module: str, text: str) -> Iterator[str]:
    """Absolute dotted names that the module imports anywhere, in functions too."""
    package = f"realm_web.{module}"
    if not (PACKAGE.joinpath(*module.split("."))).is_dir():
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def is_one_of(module: str, patterns: tuple[str, ...]) -> bool:
    return any(module.startswith(p[:-1]) if p.endswith("*") else module == p for p in patterns)


def is_under(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:n]) in names for n in range(1, len(parts) + 1))


def level(module: str) -> int:
    name = module.split(".")[0]
    assert name in LEVELS, f"{module} has no level: add it to LEVELS in {Path(__file__).name}"
    return LEVELS[name]


def broken_rules(module: str, text: str) -> list[str]:
    """What is wrong with the module's imports, one line each."""
    found = []
    mine = level(module)
    in_page = (mine < 6 or module == "page") and not is_one_of(module, NATIVE_ONLY)
    for name in imports(module, text):
        top = name.split(".")[0]
        if top == "realm_web":
            target = name.split(".")[1] if "." in name else ""
            if target not in LEVELS:
                if mine < 6:
                    found.append(f"imports {name}: name the module, the root package is for users")
            elif mine == 0:
                found.append(f"imports {name}: level 0 imports nothing of ours")
            elif LEVELS[target] > mine:
                found.append(f"imports {name} of level {LEVELS[target]} from level {mine}")
        elif top in THIRD_PARTY:
            if not is_one_of(module, THIRD_PARTY[top]):
                found.append(f"imports {name}, which only {', '.join(THIRD_PARTY[top])} may")
        elif top not in sys.stdlib_module_names:
            found.append(f"imports {name}, which is no dependency of ours")
        elif mine == 1 and is_under(name, NOT_IN_FORMATS):
            found.append(f"imports {name}: no I/O here")
        elif in_page and is_under(name, NOT_IN_A_PAGE):
            found.append(f"imports {name}, which a page does not have")
    return found


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_what_its_level_allows(module):
    assert broken_rules(module, source(module)) == []


@pytest.mark.parametrize(
    ("module", "text", "rule"),
    [
        ("gguf", "from realm_web.engine import Engine", "of level 5 from level 1"),
        ("env", "import realm_web.errors", "level 0 imports nothing"),
        ("scheduler", "from . import engine as e\nfrom .cli import run", "of level 6 from level 5"),
        ("models.llama", "from ..scheduler import Batch", "of level 5 from level 4"),
        ("ops", "import numpy as np", "which only runtime.cpu*, dequant*, quantize, convert may"),
        ("engine", "def f():\n    import wgpu.utils", "which only runtime.webgpu* may"),
        ("page", "from js import navigator", "which only runtime.browser may"),
        ("engine", "import threading", "a page does not have"),
        ("loader", "from urllib.request import urlopen", "a page does not have"),
        ("tokenizer.bpe", "from pathlib import Path", "no I/O here"),
        ("engine", "import torch", "no dependency of ours"),
        ("ops", "from realm_web import __version__", "the root package is for users"),
    ],
)
def test_a_broken_rule_is_named(module, text, rule):
    (line,) = broken_rules(module, text)
    assert rule in line


def test_a_module_without_a_level_is_named():
    with pytest.raises(AssertionError, match="no level"):
        broken_rules("helpers", "")


def test_the_page_loads_without_numpy_wgpu_rich_and_native_modules():
    """Import all that a page may load, in an interpreter that refuses what a page does not have."""
    loaded = [
        f"realm_web.{module}"
        for module in modules()
        if (level(module) < 6 or module == "page")
        and not is_one_of(module, (*NATIVE_ONLY, "runtime.browser", "grammar.page"))
    ]
    script = f"""
import importlib, sys
for name in ("numpy", "wgpu", "rich", "huggingface_hub"):
    sys.modules[name] = None  # import raises
for name in {loaded!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_none_of_its_parts():
    script = (
        "import sys, realm_web; print(sorted(name for name in sys.modules if name.startswith('realm_web.')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_package_resolves_and_an_unknown_one_is_named():
    import realm_web

    assert all(getattr(realm_web, name) is not None for name in realm_web.__all__)
    with pytest.raises(AttributeError, match="'Modell'"):
        realm_web.Modell  # noqa: B018
