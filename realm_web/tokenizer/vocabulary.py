"""The tokens of a GGUF file: their strings and types, the special ones, and which of them end a generation.

Knows nothing about how text becomes tokens. Lists of names and overridden types follow llama.cpp's
`llama_vocab::impl::load`, because files rely on them.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from reprlib import repr as short  # a value of the file may be megabytes long
from typing import Any

from realm_web.errors import FormatError

_PREFIX = "tokenizer.ggml."
# Characters of a token that is not of the plain kind. Each is looked for at every place of a text, and an
# unused one may be written with another that is a character shorter; in real files they have a few dozen.
_MAX_LENGTH = 256


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4  # matched before everything else, shown as text
    UNUSED = 5
    BYTE = 6  # <0x0A>


# Special tokens found by their string where the metadata does not give them: the first that is present.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
)
_END_OF_MESSAGE = ("<|eom_id|>",)
_FILL_PREFIX = (
    "<|fim_prefix|>",
    "<fim-prefix>",
    "<fim_prefix>",
    "<｜fim▁begin｜>",
    "<PRE>",
    "▁<PRE>",
    "<|code_prefix|>",
    "<|prefix|>",
)
_FILL_SUFFIX = (
    "<|fim_suffix|>",
    "<fim-suffix>",
    "<fim_suffix>",
    "<｜fim▁hole｜>",
    "<SUF>",
    "▁<SUF>",
    "<|code_suffix|>",
    "<|suffix|>",
)
_FILL_MIDDLE = (
    "<|fim_middle|>",
    "<fim-middle>",
    "<fim_middle>",
    "<｜fim▁end｜>",
    "<MID>",
    "▁<MID>",
    "<|code_middle|>",
    "<|middle|>",
)
_FILL_PAD = ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")
_FILL_REPOSITORY = ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")
_FILL_SEPARATOR = ("<|file_sep|>",)

# Every token of these strings is a control token and ends a generation.
_END_OF_GENERATION = frozenset(
    (
        *_END_OF_TURN,
        *_END_OF_MESSAGE,
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "</s>",
        "[EOS]",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
    )
)
_ALWAYS_SHOWN = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


@dataclass(frozen=True)
class Vocabulary:
    """Token strings as the file has them, their types and the special ids."""

    tokens: Sequence[str]
    ids: dict[str, int]
    types: Sequence[int]  # TokenType, or a number that is none: neither special nor text
    scores: Sequence[float] | None  # the higher the earlier a token is merged
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    pad_id: int | None
    unknown_id: int | None
    eog_ids: frozenset[int]  # every token that ends a generation

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Vocabulary":
        tokens = string_array(metadata, "tokens")
        if not tokens:
            raise FormatError(f"{_PREFIX}tokens: the vocabulary is empty")
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        ids = {token: i for i, token in enumerate(tokens)}
        if len(ids) < len(tokens):
            twice = next(i for i, token in enumerate(tokens) if ids[token] != i)
            raise FormatError(
                f"{_PREFIX}tokens: {short(tokens[twice])} stands at {twice} and at {ids[tokens[twice]]}"
            )
        types = _read_types(metadata, len(tokens))
        _check_lengths(tokens, types)
        scores = _read_scores(metadata, len(tokens))

        def special(names: Sequence[str], *keys: str) -> int | None:
            """Id from the metadata, else of the first name that is a token; it then is a control token."""
            for key in keys:
                if _PREFIX + key in metadata:
                    return _read_id(metadata, key, len(tokens))
            found = next((ids[name] for name in names if name in ids), None)
            if found is not None:
                types[found] = TokenType.CONTROL
            return found

        eos_id = special((), "eos_token_id")
        eot_id = special(_END_OF_TURN, "eot_token_id")
        special(_FILL_PREFIX, "fim_pre_token_id", "prefix_token_id")
        special(_FILL_SUFFIX, "fim_suf_token_id", "suffix_token_id")
        special(_FILL_MIDDLE, "fim_mid_token_id", "middle_token_id")
        ends = {
            eos_id,
            eot_id,
            special(_END_OF_MESSAGE, "eom_token_id"),
            special(_FILL_PAD, "fim_pad_token_id"),
            special(_FILL_REPOSITORY, "fim_rep_token_id"),
            special(_FILL_SEPARATOR, "fim_sep_token_id"),
        }
        for name in _END_OF_GENERATION & ids.keys():
            ends.add(ids[name])
            types[ids[name]] = TokenType.CONTROL
        _apply_family_exceptions(ids, types, ends)
        return cls(
            tokens,
            ids,
            types,
            scores,
            bos_id=special((), "bos_token_id"),
            eos_id=eos_id,
            eot_id=eot_id,
            pad_id=special((), "padding_token_id"),
            unknown_id=special((), "unknown_token_id"),
            eog_ids=frozenset(ends - {None}),
        )


def string_array(metadata: Mapping[str, Any], key: str) -> list[str]:
    """`tokenizer.ggml.<key>`, which must be there and hold strings only."""
    value = _array(metadata, key)
    if value is None:
        raise FormatError(f"{_PREFIX}{key} is missing: the file has no usable tokenizer")
    for kind in set(map(type, value)) - {str}:
        raise FormatError(f"{_PREFIX}{key}: an array of strings is wanted, but it holds {kind.__name__}")
    return list(value)


def read_flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """`tokenizer.ggml.<key>`, true or false."""
    value = metadata.get(_PREFIX + key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{_PREFIX}{key}: true or false is wanted, not {short(value)}")
    return value


def read_string(metadata: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """`tokenizer.ggml.<key>`, a string."""
    value = metadata.get(_PREFIX + key, default)
    if value is None:
        raise FormatError(f"{_PREFIX}{key} is missing: the file has no usable tokenizer")
    if not isinstance(value, str):
        raise FormatError(f"{_PREFIX}{key}: a string is wanted, not {type(value).__name__}")
    return value


def _array(metadata: Mapping[str, Any], key: str) -> Sequence[Any] | None:
    value = metadata.get(_PREFIX + key)
    if value is not None and not isinstance(value, (list, tuple, array)):
        raise FormatError(f"{_PREFIX}{key}: an array is wanted, not {type(value).__name__}")
    return value


def _read_types(metadata: Mapping[str, Any], n_tokens: int) -> list[int]:
    types = _array(metadata, "token_type")
    if types is None:
        return [TokenType.NORMAL] * n_tokens
    if len(types) != n_tokens:
        raise FormatError(f"{_PREFIX}token_type: {len(types)} entries for {n_tokens} tokens")
    for kind in set(map(type, types)) - {int, TokenType}:
        raise FormatError(f"{_PREFIX}token_type: integers are wanted, but it holds {kind.__name__}")
    return list(types)


def _check_lengths(tokens: Sequence[str], types: Sequence[int]) -> None:
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind != TokenType.NORMAL and len(token) > _MAX_LENGTH:
            raise FormatError(
                f"{_PREFIX}tokens[{i}]: {short(token)} is of type {kind} and {len(token)} characters long; "
                f"at most {_MAX_LENGTH} are accepted"
            )


def _read_scores(metadata: Mapping[str, Any], n_tokens: int) -> Sequence[float] | None:
    scores = _array(metadata, "scores")
    if scores is None:
        return None
    if len(scores) != n_tokens:
        raise FormatError(f"{_PREFIX}scores: {len(scores)} entries for {n_tokens} tokens")
    for i, score in enumerate(scores):
        if not isinstance(score, (int, float)) or score != score:
            raise FormatError(f"{_PREFIX}scores[{i}]: a number is wanted, not {short(score)}")
    return scores


def _read_id(metadata: Mapping[str, Any], key: str, n_tokens: int) -> int:
    value = metadata[_PREFIX + key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_tokens:
        raise FormatError(f"{_PREFIX}{key}: {short(value)} is not a token of the vocabulary of {n_tokens}")
    return value


def _apply_family_exceptions(ids: Mapping[str, int], types: list[int], ends: set[int | None]) -> None:
    """Three families whose tokens do not mean what their strings mean elsewhere."""
    for name in _ALWAYS_SHOWN:  # gpt-oss
        if name in ids:
            types[ids[name]] = TokenType.USER_DEFINED
    ending = {name for name in _END_OF_GENERATION & ids.keys() if ids[name] in ends}
    called = not ending.isdisjoint({"<|call|>", "<|calls|>"})
    if called and "<|end|>" in ending and not ending.isdisjoint({"<|return|>", "<|flush|>"}):
        # gpt-oss and solar-open: it ends a message, and the next one follows
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if {"<|tool_response>", "</s>"} <= ending:  # gemma 4
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
