"""Text functions for templates whose result or time can be much larger than what goes in.

Each takes the meter first and asks it before doing anything. Methods of `str` keep Python's meaning and
signature, filters jinja2's.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from realm_web.chat.meter import Meter, refusal, text_bytes

_DIGITS = re.compile(r"\d+")
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def pad(method: str, meter: Meter, text: str, width: int, *fill: str) -> str:
    meter.room(4 * width)
    return getattr(text, method)(width, *fill)


def replace(meter: Meter, text: str, old: str, new: str, count: int = -1) -> str:
    meter.room(text_bytes(text) + text.count(old) * text_bytes(new))
    return text.replace(old, new, count)


def join(meter: Meter, separator: str, items: Iterable[str]) -> str:
    items = list(items)
    meter.room(sum(map(text_bytes, items)) + len(items) * text_bytes(separator))
    return separator.join(items)


def split(method: str, meter: Meter, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    _check_search(text, sep)
    limit = meter.limits.pieces
    pieces = getattr(text, method)(sep, limit if maxsplit < 0 else min(maxsplit, limit))
    if len(pieces) > limit:
        raise refusal(f"splits a text into more than {limit} pieces")
    return pieces


def split_lines(meter: Meter, text: str, keepends: bool = False) -> list[str]:
    if sum(map(text.count, _LINE_ENDS)) > meter.limits.pieces:
        raise refusal(f"splits a text into more than {meter.limits.pieces} pieces")
    return text.splitlines(keepends)


def search(method: str, meter: Meter, text: str, wanted: str | None = None, *rest: int) -> Any:
    """Searching from the end, and stripping, take time in proportion to the product of both lengths."""
    _check_search(text, wanted)
    return getattr(text, method)(wanted, *rest)


def _check_search(text: str, wanted: str | None) -> None:
    if isinstance(wanted, str) and len(text) * len(wanted) > 1 << 28:  # some 0.3 s
        raise refusal("searches a long text for a long one")


# What is called in place of the method of that name.
METHODS: dict[str, Callable[..., Any]] = {
    "join": join,
    "replace": replace,
    "splitlines": split_lines,
    **{name: partial(pad, name) for name in ("center", "ljust", "rjust", "zfill")},
    **{name: partial(split, name) for name in ("split", "rsplit")},
    **{
        name: partial(search, name) for name in ("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip")
    },
}


def percent(meter: Meter, text: str, values: Any) -> str:
    """`text % values`."""
    if re.search(r"%[#0\- +\d.]*\*", text):
        raise refusal("takes a width from the values of a % format")
    # Each value is written once or, taken by name, once for every %.
    times = text.count("%")
    written = meter.weigh(values) * (times if isinstance(values, dict) else 1)
    meter.room(text_bytes(text) + largest_width(text) + written + 400 * times)
    return meter.made(text % values)


def largest_width(spec: str) -> int:
    """Bound on the widths and precisions that a format asks for, all together."""
    return sum(int(digits[:12]) for digits in _DIGITS.findall(spec))


def filter_format(meter: Meter, text: str, *args: Any, **kwargs: Any) -> str:
    return percent(meter, str(text), kwargs or args)


def filter_replace(meter: Meter, text: str, old: str, new: str, count: int | None = None) -> str:
    return replace(meter, str(text), str(old), str(new), -1 if count is None else count)


def filter_center(meter: Meter, text: str, width: int = 80) -> str:
    return pad("center", meter, str(text), width)


def filter_trim(meter: Meter, text: str, chars: str | None = None) -> str:
    return search("strip", meter, str(text), chars)


def filter_indent(
    meter: Meter, text: str, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    """Indents the lines after the first, with `first` that too; empty ones only with `blank`."""
    text = f"{text}\n"  # so that a last line which is empty counts
    margin_bytes = 4 * len(width) if isinstance(width, str) else width
    meter.room(text_bytes(text) + sum(map(text.count, _LINE_ENDS)) * margin_bytes)
    margin = width if isinstance(width, str) else " " * width
    head, *lines = split_lines(meter, text)
    return "\n".join([margin + head if first else head, *(margin + s if s or blank else s for s in lines)])


def filter_tojson(
    meter: Meter,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """`json.dumps` as `transformers` has it for chat templates, without jinja2's HTML escapes."""
    meter.room(meter.weigh(value))
    if not isinstance(indent, int | None) or (indent or 0) > 16 or any(len(s) > 16 for s in separators or ()):
        raise refusal("asks tojson for an indent or a separator of more than 16 characters")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


FILTERS: dict[str, Callable[..., Any]] = {
    "center": filter_center,
    "format": filter_format,
    "indent": filter_indent,
    "replace": filter_replace,
    "tojson": filter_tojson,
    "trim": filter_trim,
}
