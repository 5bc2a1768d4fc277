"""WGSL from jinja2 templates: constants are in the source, variables are in buffers.

A kernel is `shaders/<name>.wgsl`. Inside a template
- `{{ bind("x", "vec4<f32>") }}` declares the next storage binding (read-only unless `access="read_write"`);
  the order of these calls is the order of the tensors given to `Program.add`;
- `{{ weight("w", "Q4_K") }}` includes the snippet `shaders/quant/q4_k.wgsl`, which declares the bindings of
  one packed weight, and a function `w_decode(chunk) -> array<vec4<f32>, 8>`;
- `{{ weight_ints("w", "Q4_K") }}` does so for products with activations of 8 bits (`lib/ints.wgsl`). If it
  gets the number of threads too, and `has_table("IQ4_NL")`, they call `w_prepare(lid)` first, then a barrier;
- `codebook_words("iq4")` are the four words of a codebook of `grids.py`;
- lines that begin with `#` are jinja2 statements.

An undefined name is an error, and so is a constant that no template reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from realm_web import grids
from realm_web.errors import DeviceError

SHADERS = Path(__file__).resolve().parent.parent / "shaders"


@dataclass(frozen=True)
class Source:
    """Rendered WGSL and the access mode of each binding, in order."""

    code: str
    access: tuple[str, ...]

    def numbered(self) -> str:
        return "\n".join(f"{i:4} {line}" for i, line in enumerate(self.code.splitlines(), 1))


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(SHADERS),
        undefined=jinja2.StrictUndefined,
        line_statement_prefix="#",
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.globals["codebook_words"] = grids.codebook_words
    return environment


def kernel_names() -> list[str]:
    """Names of all kernels: one file each, `lib/` and `quant/` hold what they include."""
    return sorted(path.stem for path in SHADERS.glob("*.wgsl"))


def render(name: str, consts: dict[str, object]) -> Source:
    """Render `shaders/<name>.wgsl`. Raises DeviceError naming the template line for a mistake in it."""
    environment = _environment()
    access: list[str] = []
    ints = environment.get_template("lib/ints.wgsl").module

    def bind(variable: str, element: str, access_mode: str = "read", *, array: bool = True) -> str:
        access.append(access_mode)
        kind = f"array<{element}>" if array else element
        index = len(access) - 1
        return f"@group(0) @binding({index}) var<storage, {access_mode}> {variable}: {kind};"

    def weight(variable: str, fmt: str) -> str:
        own = environment.get_template(f"quant/{fmt.lower()}.wgsl").module
        if not hasattr(own, "ints"):
            return own.decode(variable, bind)
        return weight_ints(variable, fmt) + ints.decode(variable, own.offset, own.minimum)

    def weight_ints(variable: str, fmt: str, wg: int = 0, room: int = 0, run: int = 1) -> str:
        own = environment.get_template(f"quant/{fmt.lower()}.wgsl").module
        given = {"wg": wg, "room": room, "run": run}
        chunk = own.ints(variable, bind, **{name: given[name] for name in own.ints.arguments[2:]})
        first = variable == "w"
        product = ints.product(
            "product" if first else f"{variable}_product", own.offset, own.halves, own.minimum
        )
        onto = ints.onto(f"{variable}_onto", own.offset, own.halves, own.minimum)
        return "\n".join((ints.types() if first else "", chunk, product, onto))

    def has_table(fmt: str) -> bool:
        return hasattr(environment.get_template(f"quant/{fmt.lower()}.wgsl").module, "table")

    def repack(fmt: str) -> str:
        return environment.get_template(f"quant/{fmt.lower()}.wgsl").module.repack(bind)

    try:
        code = environment.get_template(f"{name}.wgsl").render(
            **consts, bind=bind, weight=weight, weight_ints=weight_ints, has_table=has_table, repack=repack
        )
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" line {line}" if line else ""
        raise DeviceError(f"kernel {name}{where}: {error} (constants: {sorted(consts)})") from error
    return Source(code, tuple(access))
