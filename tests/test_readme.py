"""The examples in README.md run as they stand, on a tiny model."""

import ast
import asyncio
import re
import shlex
from pathlib import Path

import pytest
from tiny import CHATML, write_tiny

from realm_web.__main__ import COMMANDS, build_parser
from realm_web.models import ARCHITECTURES
from realm_web.quants import FORMATS


def blocks(repository: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (repository / "README.md").read_text("utf-8"), re.M | re.S
    )


@pytest.mark.parametrize("number", [0, 1])
def test_a_python_example_prints_text(number, repository, tmp_path, monkeypatch, capsys):
    write_tiny(tmp_path / "model.gguf", chat_template=CHATML, context=64)
    monkeypatch.chdir(tmp_path)
    code = compile(blocks(repository, "python")[number], "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names: dict[str, object] = {}

    async def run() -> None:
        done = eval(code, names)
        if done is not None:
            await done
        if "engine" in names:
            await names["engine"].close()

    asyncio.run(run())
    assert capsys.readouterr().out.strip()


def test_every_command_line_is_one_that_the_program_takes(repository):
    lines = re.findall(r"^    realm (.*?)(?:  +#.*)?$", (repository / "README.md").read_text("utf-8"), re.M)
    used = {build_parser().parse_args(shlex.split(line)).command for line in lines}
    assert used >= {"chat", "run", "inspect", "bench", "doctor"} and used <= COMMANDS.keys()


def test_every_weight_format_and_architecture_is_named(repository):
    text = (repository / "README.md").read_text("utf-8")
    section = text[text.index("## What runs") : text.index("## What is measured where")]
    missing = {name for name in FORMATS if not re.search(rf"\b{name}\b", section)}
    missing |= {name for name in ARCHITECTURES if f"`{name}`" not in section}
    assert not missing, f"README.md, section What runs, does not name {', '.join(sorted(missing))}"
