"""EBNF as llama.cpp writes it (GBNF), in the words of Lark as llguidance reads it.

Character by character and not by lexemes: every rule stays a rule, because a Lark terminal takes the longest
match and `[a-z]* "z"` would then match nothing. `root` becomes `start`; everything else keeps its meaning.
"""

import json
import re

from .errors import RequestError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
      | (?P<rule>[A-Za-z_][\w-]*)[ \t]*::=
      | (?P<name>[A-Za-z_][\w-]*)
      | "(?P<literal>(?:[^"\\\n]|\\.)*)"
      | \[(?P<not>\^?)(?P<chars>(?:[^\]\\\n]|\\.)*)\]
      | (?P<repeat>\{[ \t]*\d+[ \t]*(?:,[ \t]*\d*[ \t]*)?\})
      | (?P<mark>[()|*+?.])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))|(.)", re.DOTALL)
_NAMED = {"n": "\n", "r": "\r", "t": "\t"}


def ebnf_to_lark(text: str) -> str:
    r"""A Lark grammar with the same language; RequestError names the place of what cannot be read.

    >>> print(ebnf_to_lark('root ::= [a-z]* "z" | "n\\n"  # comment'))
    start: /[\u{61}-\u{7a}]/ * "z" | "n\n"
    """
    lines: list[list[str]] = []
    defined: set[str] = set()
    used: dict[str, int] = {}
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise _error(text, place, f"cannot read {text[place : place + 20]!r}")
        if found["rule"] is not None:
            if found["rule"] in defined:
                raise _error(text, place, f"the rule {found['rule']} is defined a second time")
            defined.add(found["rule"])
            lines.append([f"{_lark_name(found['rule'])}:"])
        elif found["space"] is None:
            if not lines:
                raise _error(text, place, "a rule is wanted first, as in `root ::= ...`")
            if found["name"] is not None:
                used.setdefault(found["name"], place)
            lines[-1].append(_lark_item(text, found))
        place = found.end()
    for name, begin in used.items():
        if name not in defined:
            raise _error(text, begin, f"the rule {name} is not defined")
    if "root" not in defined:
        raise RequestError("response_format.grammar: no rule is called root, where an EBNF grammar begins")
    return "\n".join(" ".join(line) for line in lines)


def _lark_item(text: str, found: re.Match[str]) -> str:
    if found["name"] is not None:
        return _lark_name(found["name"])
    if found["literal"] is not None:
        return json.dumps("".join(_characters(text, found.start("literal"), found["literal"])[0]))
    if found["chars"] is not None:
        return _lark_class(text, found)
    if found["repeat"] is not None:
        return re.sub(r"[ \t]", "", found["repeat"])
    return "/(?s:.)/" if found["mark"] == "." else found["mark"]


def _lark_class(text: str, found: re.Match[str]) -> str:
    chars, plain = _characters(text, found.start("chars"), found["chars"])
    if not chars:
        raise _error(text, found.start(), "a class of characters is empty")
    out = []
    i = 0
    while i < len(chars):
        last = i
        if i + 2 < len(chars) and chars[i + 1] == "-" and plain[i + 1]:
            last = i + 2
            if chars[last] < chars[i]:
                raise _error(text, found.start(), f"the range {chars[i]!r}-{chars[last]!r} runs backwards")
        out.append(_point(chars[i]) + (f"-{_point(chars[last])}" if last > i else ""))
        i = last + 1
    return f"/[{found['not']}{''.join(out)}]/"


def _characters(text: str, begin: int, written: str) -> tuple[list[str], list[bool]]:
    """The characters that a literal or a class stands for, and which of them were written without escape."""
    chars, plain = [], []
    for found in _ESCAPE.finditer(written):
        code = found[1] or found[2] or found[3]
        if code is not None:
            if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) <= 0xDFFF:
                raise _error(text, begin + found.start(), f"{found[0]} is no character")
            chars.append(chr(int(code, 16)))
        elif found[4] is not None:
            if found[4] in "xuU":
                raise _error(text, begin + found.start(), f"{found[0]} is no whole escape")
            chars.append(_NAMED.get(found[4], found[4]))
        else:
            chars.append(found[5])
        plain.append(found[5] is not None)
    return chars, plain


def _lark_name(name: str) -> str:
    """Lark tells rules from terminals by their case, and has no hyphens: no two names become one."""
    if name == "root":
        return "start"
    return "r_" + "".join(c if c.islower() or c.isdigit() else f"_{ord(c):x}_" for c in name)


def _point(char: str) -> str:
    return f"\\u{{{ord(char):x}}}"


def _error(text: str, place: int, reason: str) -> RequestError:
    return RequestError(f"response_format.grammar, line {text.count(chr(10), 0, place) + 1}: {reason}")
