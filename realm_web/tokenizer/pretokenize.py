r"""Splits text into the words that byte pair merging never crosses.

The patterns of the model families are written with the Unicode classes \p{L}, \p{N} and \s, which the
standard `re` lacks. They look at a character's class only, never at its identity beyond ASCII, so `Splitter`
matches against a twin of the text in which every character past Latin-1 is replaced by a Latin-1 one of the
same class. The twin has the same length, and `re` tests Latin-1 classes by a bitmap.

Where a family splits in several passes (`smollm` first isolates digits), its passes are folded into one
pattern: the next pass may not look past the end of a piece, hence the longer lookaheads after `\s+`.
Patterns from the families' tokenizer.json files; names and aliases as in llama.cpp. For `tekken` and `gpt-4o`
llama.cpp itself uses simpler classes (no marks; case only for ASCII), which cut some words elsewhere than the
models were trained with: "éÀ" and most words with combining marks.
"""

import re
import unicodedata
from bisect import bisect_right
from dataclasses import dataclass
from reprlib import repr as short  # a value of the file may be megabytes long

from realm_web.errors import UnsupportedError

_UPPER = "A-ZÀ-ÖØ-Þ"  # Lu and Lt
_LOWER = "a-zµß-öø-ÿſ"  # Ll
_CASELESS = "ªº"  # Lm and Lo
_LETTER = _UPPER + _LOWER + _CASELESS
_MARK = "\x80"  # Latin-1 has no mark, so this control character is set aside for them
_NUMBER = "0-9²³¹¼-¾"
_SPACE = r"\t-\r \x85\xa0"  # Python's own \s also has 0x1C-0x1F, which Unicode's White_Space does not

# What stands in for a character past Latin-1, by its Unicode category or the first letter of that.
_STAND_INS = {"Lu": "À", "Lt": "À", "Ll": "à", "L": "ª", "M": _MARK, "N": "²", "P": "¡", "Z": "\xa0"}
_OTHER = "¤"
_REMEMBERED = 1 << 16  # characters
_CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
_PUNCTUATION = r"!-/:-@\[-_{-~¡§«¶·»¿"  # \p{P} and the symbols $+<=>^|~, as `default` isolates them

# Assigned in Unicode 15, 15.1 and 16: Python 3.11 knows 14, a page's Python 16, and both must split alike.
# Delete a version's ranges when the oldest supported Python knows it (3.12: 15.0, 3.13: 15.1, 3.14: 16).
_ASSIGNED_SINCE_14 = {
    "Lu": "1C89 A7CB-A7CC A7DA A7DC 10D50-10D65",
    "Ll": "1C8A A7CD A7DB 10D70-10D85 1DF25-1DF2A",
    "L": "105C0-105F3 10D4A-10D4F 10D6F 10EC2-10EC4 1123F-11240 11380-11389 1138B 1138E 11390-113B5 113B7 "
    "113D1 113D3 11BC0-11BE0 11F02 11F04-11F10 11F12-11F33 1342F 13441-13446 13460-143FA 16100-1611D "
    "16D40-16D6C 18CFF 1B132 1B155 1E030-1E06D 1E4D0-1E4EB 1E5D0-1E5ED 1E5F0 2B739 2EBF0-2EE5D 31350-323AF",
    "M": "897 CF3 ECE 10D69-10D6D 10EFC-10EFF 11241 113B8-113C0 113C2 113C5 113C7-113CA 113CC-113D0 113D2 "
    "113E1-113E2 11F00-11F01 11F03 11F34-11F3A 11F3E-11F42 11F5A 13440 13447-13455 1611E-1612F 1E08F "
    "1E4EC-1E4EF 1E5EE-1E5EF",
    "N": "10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16D70-16D79 1CCF0-1CCF9 1D2C0-1D2D3 "
    "1E4F0-1E4F9 1E5F1-1E5FA",
    "P": "1B4E-1B4F 1B7F 10D6E 113D4-113D5 113D7-113D8 11B00-11B09 11BE1 11F43-11F4F 16D6D-16D6F 1E5FF",
}


def _read_ranges() -> list[tuple[int, int, str]]:
    ranges = []
    for category, entries in _ASSIGNED_SINCE_14.items():
        for entry in entries.split():
            first, _, last = entry.partition("-")
            ranges.append((int(first, 16), int(last or first, 16), category))
    return sorted(ranges)


_NEWER_RANGES = _read_ranges()


def _newer_category(code: int) -> str:
    """Category of a code point that this Python's Unicode tables do not know yet."""
    i = bisect_right(_NEWER_RANGES, code, key=lambda entry: entry[0]) - 1
    return _NEWER_RANGES[i][2] if i >= 0 and code <= _NEWER_RANGES[i][1] else "C"


class _StandIns(dict[int, str]):
    """Table for `str.translate`; filled as characters are met, so nothing is scanned at start."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        # ſ folds to s, so it may stand in a contraction.
        if (code < 256 and char != _MARK) or char == "ſ":
            stand_in = char
        else:
            category = unicodedata.category(char)
            if category == "Cn":
                category = _newer_category(code)
            stand_in = _STAND_INS.get(category) or _STAND_INS.get(category[0], _OTHER)
        if len(self) < _REMEMBERED:
            self[code] = stand_in
        return stand_in


_STAND_IN_TABLE = _StandIns()


@dataclass(frozen=True)
class Splitter:
    """How one family splits text, and the defaults that llama.cpp ties to the family's name."""

    name: str
    aliases: tuple[str, ...]
    pattern: re.Pattern[str]
    ignore_merges: bool = False  # a word that is a token needs no merging
    add_bos: bool = False  # where the metadata does not say

    def split(self, text: str) -> list[str]:
        """Words whose concatenation is `text`."""
        if text.isascii():
            return self.pattern.findall(text)
        words = []
        start = 0
        for twin in self.pattern.findall(text.translate(_STAND_IN_TABLE)):
            end = start + len(twin)
            words.append(text[start:end])
            start = end
        return words


_CLASSES = {
    "<L>": _LETTER,
    "<U>": _UPPER + _CASELESS + _MARK,  # what may begin a word of mixed case, and what may end it
    "<u>": _LOWER + _CASELESS + _MARK,
    "<M>": _MARK,
    "<N>": _NUMBER,
    "<S>": _SPACE,
    "<P>": _PUNCTUATION,
}


def _compile(pattern: str) -> re.Pattern[str]:
    for name, members in _CLASSES.items():
        pattern = pattern.replace(name, members)
    return re.compile(pattern)


def _tiktoken_style(numbers: str, word: str = "<L>") -> re.Pattern[str]:
    return _compile(
        rf"(?i:{_CONTRACTION})|[^\r\n<L><N>]?[{word}]+|{numbers}| ?[^<S>{word}<N>]+[\r\n]*"
        r"|[<S>]*[\r\n]+|[<S>]+(?![^<S>])|[<S>]+"
    )


def _by_case(numbers: str, contraction: str = "") -> re.Pattern[str]:
    """Words that also end where upper case follows lower case."""
    return _compile(
        rf"[^\r\n<L><N>]?[<U>]*[<u>]+{contraction}|[^\r\n<L><N>]?[<U>]+[<u>]*{contraction}|{numbers}"
        r"| ?[^<S><L><N>]+[\r\n/]*|[<S>]*[\r\n]+|[<S>]+(?![^<S>])|[<S>]+"
    )


SPLITTERS = (
    Splitter(
        "smollm",
        ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        # every digit by itself, then as gpt-2
        _compile(rf"[<N>]|{_CONTRACTION}| ?[<L>]+| ?[^<S><L><N>]+|[<S>]+(?![^<S><N>])|[<S>]+"),
    ),
    Splitter(
        "gpt-2",
        (
            "gpt2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "mellum",
            "a.x-4.0",
        ),
        _compile(rf"{_CONTRACTION}| ?[<L>]+| ?[<N>]+| ?[^<S><L><N>]+|[<S>]+(?![^<S>])|[<S>]+"),
    ),
    Splitter(
        "llama-bpe",
        ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _tiktoken_style("[<N>]{1,3}"),
        ignore_merges=True,
        add_bos=True,
    ),
    Splitter("dbrx", ("smaug-bpe", "chatglm-bpe"), _tiktoken_style("[<N>]{1,3}")),
    Splitter("glm4", ("glm5",), _tiktoken_style("[<N>]{1,3}"), ignore_merges=True),
    Splitter(
        "qwen2",
        ("deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "solar-open", "grok-2", "kormo", "f2llmv2"),
        _tiktoken_style("[<N>]"),
    ),
    Splitter("qwen35", (), _tiktoken_style("[<N>]", word="<L><M>")),
    Splitter("tekken", (), _by_case("[<N>]"), ignore_merges=True, add_bos=True),
    Splitter(
        "gpt-4o",
        ("llama4", "kanana2", "talkie", "minimax-m2"),
        _by_case("[<N>]{1,3}", contraction=f"(?i:{_CONTRACTION})?"),
    ),
    Splitter(
        "default",
        (),
        # runs of punctuation; then as gpt-2; then numbers; then ASCII digits by threes
        _compile(
            r"[<P>]+| ?[<L>]+| (?=[<N>])|[0-9]{3}|(?:(?![0-9]{3})[<N>])+| ?[^<S><L><N><P>]+"
            r"|[<S>]+(?![^<S><P>])|[<S>]+"
        ),
    ),
)
_BY_NAME = {name: splitter for splitter in SPLITTERS for name in (splitter.name, *splitter.aliases)}


def find_splitter(name: str) -> Splitter:
    """The splitter that `tokenizer.ggml.pre` names; `default` where a file has none."""
    if name not in _BY_NAME:
        raise UnsupportedError(
            f"tokenizer.ggml.pre: pre-tokenizer {short(name)} is not supported "
            f"(supported: {', '.join(_BY_NAME)})"
        )
    return _BY_NAME[name]
