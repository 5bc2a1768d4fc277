"""The environment variables of realm_web: one table, read in one place.

Knows names, defaults and how to split a value; the module that uses a value judges it. Every row is listed in
README.md (a test compares). Values are read when asked for, never cached, so that a test can set them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: `default` is the text that stands in when it is unset or empty."""

    name: str
    default: str
    doc: str


VARIABLES: dict[str, Variable] = {
    variable.name: variable
    for variable in (
        Variable("REALM_DEVICE", "auto", "device when none is asked for: `auto`, `webgpu`, `cpu` or `dawn`"),
        Variable(
            "REALM_DISABLE",
            "",
            "device features not to use, by commas: `subgroups`, `f16`, `subgroup_matrix`",
        ),
        Variable(
            "REALM_DEBUG",
            "0",
            "1: show the traceback of an error; 2: also the time of every kernel, by timestamps",
        ),
        Variable("REALM_MODEL", "", "model file or URL used where none is given"),
    )
}


def get(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """The variable's text, or its default when unset or blank; KeyError for a name not in the table."""
    default = VARIABLES[name].default
    return environ.get(name, "").strip() or default


def debug_level(environ: Mapping[str, str] = os.environ) -> int:
    """REALM_DEBUG as a level: 0 is off, and a value that is no number counts as 1."""
    text = get("REALM_DEBUG", environ)
    return int(text) if text.isdecimal() else 1


def disabled_features(environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """REALM_DISABLE as a set of lower-case words."""
    words = (word.strip().lower() for word in get("REALM_DISABLE", environ).split(","))
    return frozenset(word for word in words if word)


def unknown_names(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Names that start with REALM_ and are not in the table: probably typing errors."""
    return tuple(sorted(name for name in environ if name.startswith("REALM_") and name not in VARIABLES))
