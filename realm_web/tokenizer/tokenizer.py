"""Text to token ids and back, with the special tokens of a GGUF file.

Knows no model and no device. How plain text is split is the business of the encoder that
`tokenizer.ggml.model` names; everything around it (special tokens, BOS, EOS, decoding) is the same for all.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from reprlib import repr as short  # a value of the file may be megabytes long
from typing import Any, Protocol

from realm_web.errors import FormatError, RequestError, UnsupportedError
from realm_web.tokenizer.bpe import BytePairEncoder
from realm_web.tokenizer.pretokenize import find_splitter
from realm_web.tokenizer.spm import PieceEncoder
from realm_web.tokenizer.stream import StreamDecoder
from realm_web.tokenizer.vocabulary import TokenType, Vocabulary, read_flag, read_string, string_array

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")

# What SentencePiece's trainer gives these ids, for files that do not say.
_SPM_DEFAULTS = {
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
_KINDS = "gpt2, that is byte-level BPE, and llama, that is SentencePiece BPE"

# Phi-3 was trained with its special tokens taking the white space that follows them; a file says so by its
# name only, as in llama.cpp.
_STRIPPING_NAMES = ("phi-3", "phi3")
_NEVER_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
_WHITE = re.compile("[ \t-\r]*")


_SPECIAL = frozenset((TokenType.CONTROL, TokenType.UNKNOWN))


class Encoder(Protocol):
    """How a kind of tokenizer handles plain text."""

    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, token: str) -> bytes: ...


class Tokenizer:
    """Tokenizer of one GGUF file.

    >>> letters = [chr(c) for c in range(0x21, 0x7f)] + ["Ġ", "Ġh", "Ġhi", "<end>"]
    >>> types = [1] * (len(letters) - 1) + [3]
    >>> tokenizer = Tokenizer.from_metadata({
    ...     "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    ...     "tokenizer.ggml.tokens": letters, "tokenizer.ggml.token_type": types,
    ...     "tokenizer.ggml.merges": ["Ġ h", "Ġh i"], "tokenizer.ggml.eos_token_id": 97})
    >>> tokenizer.encode("oh hi<end>")
    [78, 71, 96, 97]
    >>> tokenizer.decode([78, 71, 96, 97], skip_special=True)
    'oh hi'
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        encoder: Encoder,
        *,
        add_bos: bool,
        add_eos: bool,
        space_prefix: bool = False,
        special_strips: bool = False,
    ) -> None:
        """`space_prefix`: the encoder puts a space before the text. `special_strips`: see Phi-3."""
        for flag, key, token in (
            (add_bos, "bos", vocabulary.bos_id),
            (add_eos, "eos", vocabulary.eos_id),
        ):
            if flag and token is None:
                raise FormatError(f"tokenizer.ggml.add_{key}_token is set, but {key}_token_id is missing")
        self.vocabulary = vocabulary
        self.add_bos = add_bos
        self.add_eos = add_eos
        self._encoder = encoder
        self._space_prefix = space_prefix
        self._bytes: dict[int, bytes] = {}
        # User-defined tokens are found in any text, control tokens only where the caller wants them parsed.
        shown = {i for i, kind in enumerate(vocabulary.types) if kind == TokenType.USER_DEFINED}
        hidden = {i for i, kind in enumerate(vocabulary.types) if kind in _SPECIAL}
        self._cutting = shown | hidden  # tokens that text is cut at
        self._user_defined = self._matcher(shown, special_strips)
        self._all_special = self._matcher(shown | hidden, special_strips)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """From the `tokenizer.ggml.*` entries of a GGUF header.

        Raises FormatError for malformed tables, UnsupportedError for a kind of tokenizer that we lack.
        """
        model = read_string(metadata, "model")
        if model not in ("gpt2", "llama"):
            raise UnsupportedError(
                f"tokenizer.ggml.model: {short(model)} is not supported (supported: {_KINDS})"
            )
        name = read_string(metadata, "pre", "default")
        # Of text-to-text vocabularies only Unigram ones collapse spaces, so the flag is checked and no more.
        read_flag(metadata, "remove_extra_whitespaces", False)
        space_prefix = read_flag(metadata, "add_space_prefix", model == "llama")
        encoder: Encoder
        if model == "gpt2":
            splitter = find_splitter(name)
            vocabulary = Vocabulary.from_metadata(metadata)
            encoder = BytePairEncoder(vocabulary.ids, string_array(metadata, "merges"), splitter)
            add_bos = splitter.add_bos and vocabulary.bos_id is not None
            space_prefix = False  # byte-level vocabularies know no such thing, whatever the file says
        else:
            vocabulary = Vocabulary.from_metadata({**_SPM_DEFAULTS, **metadata})
            if vocabulary.scores is None:
                raise FormatError("tokenizer.ggml.scores is missing: without scores nothing can be merged")
            encoder = PieceEncoder(vocabulary, vocabulary.scores, space_prefix=space_prefix)
            add_bos = True
        return cls(
            vocabulary,
            encoder,
            add_bos=read_flag(metadata, "add_bos_token", add_bos),
            add_eos=read_flag(metadata, "add_eos_token", False),
            space_prefix=space_prefix,
            special_strips=any(
                part in str(metadata.get("general.name")).lower() for part in _STRIPPING_NAMES
            ),
        )

    @property
    def n_vocab(self) -> int:
        return len(self.vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        return self.vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.vocabulary.eos_id

    @property
    def eot_id(self) -> int | None:
        return self.vocabulary.eot_id

    @property
    def pad_id(self) -> int | None:
        return self.vocabulary.pad_id

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every token that ends a generation: end of text, turn, message."""
        return self.vocabulary.eog_ids

    def is_special(self, token: int) -> bool:
        """Whether the token is control (or unknown): parsed only on request, no part of the text."""
        return self.vocabulary.types[self._checked(token)] in _SPECIAL

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special` puts BOS before and EOS after where the file asks for them and the text has none yet.
        `parse_special` reads the strings of control tokens (`<|im_start|>`) as those tokens; without it, as
        for text from a stranger, they are plain characters. Lone surrogates are read as U+FFFD.
        """
        if not text.isascii():
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        matcher = self._all_special if parse_special else self._user_defined
        ids: list[int] = []
        for part in matcher.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encoder.encode(part)
        if add_special and self.add_bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if add_special and self.add_eos and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids; control tokens by name unless skipped, malformed UTF-8 as U+FFFD.

        The ids are a whole text: the space that `encode` puts before it, and after special tokens, is undone.
        """
        piece = self.token_bytes if skip_special else self._visible_bytes
        pieces = self._without_prefixes(ids, piece) if self._space_prefix else map(piece, ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """Decodes the continuation of a text token by token, never half a character.

        A space that the first token begins with is part of the text: it parts it from what came before.
        """
        return StreamDecoder(self.token_bytes if skip_special else self._visible_bytes)

    def token_bytes(self, token: int) -> bytes:
        """Bytes that a token adds to the text; none for a control token. Often not whole UTF-8 characters."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._read_bytes(self._checked(token))
        return known

    def token_text(self, token: int) -> str:
        """The token's string as it stands in the vocabulary."""
        return self.vocabulary.tokens[self._checked(token)]

    def _without_prefixes(self, ids: Iterable[int], piece: Callable[[int], bytes]) -> Iterator[bytes]:
        at_beginning = True
        for token in ids:
            text = piece(token)
            cuts = token in self._cutting
            yield text.removeprefix(b" ") if at_beginning and not cuts else text
            at_beginning = cuts

    def _matcher(self, tokens: Iterable[int], special_strips: bool) -> "_LongestMatch":
        ids = {self.vocabulary.tokens[token]: token for token in tokens}
        return _LongestMatch(ids, strip_after=ids.keys() - {*_NEVER_STRIPPING} if special_strips else ())

    def _visible_bytes(self, token: int) -> bytes:
        return self.token_text(token).encode() if self.is_special(token) else self.token_bytes(token)

    def _read_bytes(self, token: int) -> bytes:
        text = self.vocabulary.tokens[token]
        match self.vocabulary.types[token]:
            case TokenType.NORMAL:
                return self._encoder.token_bytes(text)
            case TokenType.USER_DEFINED:
                return text.encode()
            case TokenType.BYTE if match := _BYTE_TOKEN.fullmatch(text):
                return bytes.fromhex(match[1])
        return b""

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.n_vocab:
            raise RequestError(f"token id {token}: the vocabulary has {self.n_vocab} tokens")
        return token


class _LongestMatch:
    """Cuts known strings out of text: what begins first, and of those that begin there the longest.

    White space after a string of `strip_after` is dropped.
    """

    def __init__(self, ids: Mapping[str, int], strip_after: Collection[str] = ()) -> None:
        self._ids = ids
        self._strip_after = {ids[string] for string in strip_after}
        lengths: dict[str, set[int]] = {}
        for string in ids:
            lengths.setdefault(string[:2], set()).add(len(string))
        # By the first two characters, or the only one: the lengths to try, longest first.
        self._lengths = {
            begin: sorted(found | lengths.get(begin[0], set()), reverse=True)
            for begin, found in lengths.items()
        }
        seconds: dict[str, str] = {}
        for begin in sorted(lengths):
            seconds[begin[0]] = seconds.get(begin[0], "") + re.escape(begin[1:])
        branches = (
            re.escape(first) + ("" if first in lengths else f"(?=[{rest}])")
            for first, rest in seconds.items()
        )
        self._begin = re.compile("|".join(branches)) if ids else None

    def split(self, text: str) -> Iterator[str | int]:
        """Pieces of text, none empty, and ids of the strings found between them."""
        done = 0
        for candidate in self._begin.finditer(text) if self._begin else ():
            begin = candidate.start()
            if begin < done:
                continue
            lengths = self._lengths.get(text[begin : begin + 2]) or self._lengths[text[begin]]
            for length in lengths:
                token = self._ids.get(text[begin : begin + length])
                if token is not None:
                    if begin > done:
                        yield text[done:begin]
                    yield token
                    done = begin + length
                    if token in self._strip_after:
                        done = _WHITE.match(text, done).end()
                    break
        if done < len(text):
            yield text[done:]
