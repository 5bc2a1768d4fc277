"""Draw decode rates as an SVG: over the size of the model, and over the context before.

    python bench/plot.py rates.svg "realm_web=ours/*.json" "llama.cpp CUDA=cuda/*.json" --bandwidth 3850

Each series is a name and the files that belong to it, one per model: what `realm bench --json` or
`llama-bench -o json` wrote. The left panel takes tg128 of every file, the right one tg128 at all depths of
the largest model that has some. Needs nothing but the standard library and realm_web.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from realm_web.benchmark import read_rates

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito: for every eye
LIMIT = "#888888"
WIDTH, HEIGHT = 900, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 44, 52  # margins of a panel
FONT = 'font-family="system-ui, sans-serif"'

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """What one engine measured: for each model its bytes and its rates by test."""

    name: str
    models: tuple[tuple[int, dict[str, float]], ...]

    @property
    def by_size(self) -> list[Point]:
        """(bytes of the model, tokens per second) of tg128, the smallest model first."""
        return sorted((size, rates["tg128"]) for size, rates in self.models if "tg128" in rates)

    def by_depth(self, size: int) -> list[Point]:
        """(tokens before, tokens per second) of tg128 with the model of about this size."""
        for model, rates in self.models:
            if abs(model / size - 1) < 0.1:
                found = {name: rate for name, rate in rates.items() if re.fullmatch(r"tg128(@d\d+)?", name)}
                return sorted((float(name.partition("@d")[2] or 0), rate) for name, rate in found.items())
        return []


def read_series(text: str) -> Series:
    """NAME=PATTERN. ValueError where there is no such file, or one that tells no size."""
    name, _, pattern = text.partition("=")
    paths = sorted(glob.glob(pattern))
    if not paths:
        raise ValueError(f"{text}: no file is named {pattern!r}")
    return Series(name, tuple(_read_model(Path(path)) for path in paths))


def _read_model(path: Path) -> tuple[int, dict[str, float]]:
    text = path.read_text("utf-8")
    found = json.loads(text)
    if isinstance(found, list):
        size = found[0].get("model_size")
    else:
        size = found.get("tg128", {}).get("weight_bytes_per_token")
    if not size:
        raise ValueError(f"{path}: does not tell the size of the model")
    return int(size), read_rates(text)


@dataclass(frozen=True)
class Axis:
    """Values to pixels, linear or by powers."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values: 1, 2 and 5 times the powers of ten, or steps that divide the range by about four."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [m * 10.0**p for p in powers for m in (1, 2, 5)]
            return [tick for tick in every if self.low <= tick <= self.high * 1.0001]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step = next(step * m for m in (1, 2, 5, 10) if step * m * 5 >= self.high - self.low)
        return [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def draw(series: Sequence[Series], bandwidth: float = 0.0) -> str:
    """The SVG. `bandwidth` in GB/s draws what a card can do that reads every weight once per token."""
    half = WIDTH / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" {FONT}>',
        "<title>Tokens per second by model size and by context</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    sizes = {s.name: s.by_size for s in series}
    limit = []
    if bandwidth:
        xs = [x for points in sizes.values() for x, _ in points]
        limit = [(x, bandwidth * 1e9 / x) for x in (min(xs), max(xs))]
    parts += _panel(
        0, "one sequence, 128 tokens", "weights read per token, GB", sizes, limit, _gigabytes, log=True
    )
    deepest = [size for s in series for size, rates in s.models if any("@d" in name for name in rates)]
    if deepest:
        depths = {s.name: s.by_depth(max(deepest)) for s in series}
        title = f"the same behind a context, model of {max(deepest) / 1e9:.1f} GB"
        parts += _panel(half, title, "tokens before", depths, [], _plain, log=False)
    parts += _legend([s.name for s in series], bool(limit))
    return "\n".join([*parts, "</svg>", ""])


def _panel(
    x0: float, title: str, label: str, lines: dict[str, list[Point]], limit: list[Point],
    text: Callable[[float], str], *, log: bool,
) -> list[str]:  # fmt: skip
    points = [point for line in lines.values() for point in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low_x, high_x = (min(xs) / 1.3, max(xs) * 1.3) if log else (0.0, max(xs) * 1.05 or 1.0)
    low_y, high_y = (min(ys) / 1.5, max(ys) * 1.5) if log else (0.0, max(ys) * 1.15)
    bottom = HEIGHT - BOTTOM
    x = Axis(low_x, high_x, x0 + LEFT, x0 + WIDTH / 2 - RIGHT, log)
    y = Axis(low_y, high_y, bottom, TOP, log)
    parts = [_text(x0 + LEFT, TOP - 14, f"tok/s: {title}", size=13, bold=True)]
    for tick in y.ticks:
        parts.append(_line([(x.start, y(tick)), (x.end, y(tick))], "#e4e4e4", 1))
        parts.append(_text(x.start - 6, y(tick) + 4, _plain(tick), anchor="end"))
    for tick in x.ticks:
        parts.append(_text(x(tick), bottom + 16, text(tick), anchor="middle"))
    parts.append(_text((x.start + x.end) / 2, bottom + 32, label, anchor="middle"))
    if limit:
        inside = [(x(a), y(b)) for a, b in _dense(limit) if low_y <= b <= high_y]
        parts.append(_line(inside, LIMIT, 1.5, dash=True))
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        at = [(x(a), y(b)) for a, b in line]
        parts.append(_line(at, colour, 2))
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in at]
    return parts


def _dense(ends: list[Point], n: int = 32) -> list[Point]:
    """Points between two of a line that is straight where both axes go by powers."""
    (x0, y0), (x1, y1) = ends
    return [(x0 * (x1 / x0) ** (i / n), y0 * (y1 / y0) ** (i / n)) for i in range(n + 1)] if x1 > x0 else ends


def _legend(names: Sequence[str], limit: bool) -> list[str]:
    parts, x = [], float(LEFT)
    shown = [*zip(names, COLOURS, strict=False), *([("limit of the bandwidth", LIMIT)] if limit else [])]
    for name, colour in shown:
        parts.append(_line([(x, HEIGHT - 9), (x + 18, HEIGHT - 9)], colour, 3, dash=colour == LIMIT))
        parts.append(_text(x + 23, HEIGHT - 5, name))
        x += 44 + 6.6 * len(name)
    return parts


def _line(points: list[Point], colour: str, width: float, *, dash: bool = False) -> str:
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashes = ' stroke-dasharray="5 4"' if dash else ""
    return f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 11, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="#333"{weight}>'
        f"{escape(text)}</text>"
    )


def _plain(value: float) -> str:
    return f"{value:,.0f}"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:g}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="the SVG file to write")
    parser.add_argument("series", nargs="+", metavar="NAME=PATTERN", help="an engine and its files")
    parser.add_argument("--bandwidth", type=float, default=0.0, metavar="GB/S", help="draw this limit, too")
    args = parser.parse_args()
    try:
        Path(args.out).write_text(draw([read_series(text) for text in args.series], args.bandwidth), "utf-8")
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
