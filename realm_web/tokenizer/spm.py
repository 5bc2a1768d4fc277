"""SentencePiece's BPE: the characters of a text are merged pair by pair into the best-scored piece first.

Knows its pieces and their scores, and no special tokens. A space is written as U+2581, and what no piece
covers as byte tokens. Method: `bpe_model.cc` of SentencePiece, which llama.cpp's "llama" tokenizer follows.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import chain

from realm_web.tokenizer.cache import WordCache
from realm_web.tokenizer.vocabulary import TokenType, Vocabulary

_SPACE = "▁"
_PIECES = frozenset((TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED))


class PieceEncoder:
    """Ids of plain text, and bytes of a token, for `tokenizer.ggml.model` = "llama".

    `space_prefix` puts a space before the text: a word then is one token at the beginning and further on.
    Control and byte tokens never result from a merge, whatever the text says; unused ones are written with
    the pieces that they would be made of. A character without a piece is written as its bytes; where byte
    tokens are lacking as the unknown token, or not at all.
    """

    def __init__(self, vocabulary: Vocabulary, scores: Sequence[float], *, space_prefix: bool) -> None:
        self._ids = vocabulary.ids
        self._prefix = _SPACE if space_prefix else ""
        typed = list(zip(vocabulary.tokens, vocabulary.types, scores, strict=True))
        best_first = sorted({score for _, kind, score in typed if kind in _PIECES}, reverse=True)
        rank_of = {score: rank for rank, score in enumerate(best_first)}
        # Pieces of one score share a rank: of those the leftmost is merged first.
        self._ranks = {piece: rank_of[score] for piece, kind, score in typed if kind in _PIECES}
        # An unused piece, and what it is written with once that is known.
        self._unused: dict[str, list[int] | None] = {
            piece: None for piece, kind, _ in typed if kind == TokenType.UNUSED
        }
        self._byte_ids = [self._ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        self._unknown = [] if vocabulary.unknown_id is None else [vocabulary.unknown_id]
        self._words = _compile_words(self._ranks)
        self._cache = WordCache(self._encode_word)

    def encode(self, text: str) -> list[int]:
        words = self._words.findall(self._prefix + text.replace(" ", _SPACE))
        return list(chain.from_iterable(map(self._cache.__getitem__, words)))

    def token_bytes(self, token: str) -> bytes:
        """Bytes that a token's string in the vocabulary stands for."""
        return token.replace(_SPACE, " ").encode()

    def _encode_word(self, word: str) -> list[int]:
        return list(chain.from_iterable(map(self._encode_piece, _merge(word, self._ranks.get))))

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self._ranks:  # a character
            return self._encode_bytes(piece)
        if piece not in self._unused:
            return [self._ids[piece]]
        if self._unused[piece] is None:
            parts = _merge(piece, lambda part: None if part == piece else self._ranks.get(part))
            encode = self._encode_piece if len(parts) > 1 else self._encode_bytes
            self._unused[piece] = list(chain.from_iterable(map(encode, parts)))
        return self._unused[piece]

    def _encode_bytes(self, char: str) -> list[int]:
        ids = [self._byte_ids[byte] for byte in char.encode()]
        return self._unknown if None in ids else ids


def _merge(word: str, rank_of: Callable[[str], int | None]) -> list[str]:
    """Pieces of the word, O(n log n): a linked list and a heap of (rank, place), each one integer."""
    size = len(word)
    # A piece is named by the place where it begins; one that was merged into the piece before it has no end.
    ends = list(range(1, size + 1))
    previous = list(range(-1, size - 1))
    heap = []
    for place in range(size - 1):
        rank = rank_of(word[place : place + 2])
        if rank is not None:
            heap.append(rank * size + place)
    heapify(heap)
    while heap:
        rank, place = divmod(heappop(heap), size)
        middle = ends[place]
        if not middle or middle == size:
            continue
        end = ends[middle]
        if rank_of(word[place:end]) != rank:
            continue  # one of the two was merged meanwhile
        ends[place] = end
        ends[middle] = 0
        if end < size:
            previous[end] = place
            rank = rank_of(word[place : ends[end]])
            if rank is not None:
                heappush(heap, rank * size + place)
        before = previous[place]
        if before >= 0:
            rank = rank_of(word[before:end])
            if rank is not None:
                heappush(heap, rank * size + before)
    return [word[place:end] for place, end in enumerate(ends) if end]


def _compile_words(pieces: Iterable[str]) -> re.Pattern[str]:
    """Cuts a text before the spaces where no piece could reach across, so that the words may be remembered.

    A text may be cut between two characters that stand together in no piece: merging never joins them.
    """
    inner = re.compile(f"[^{_SPACE}]{_SPACE}")
    joined = {pair[0] for piece in pieces if piece.find(_SPACE, 1) > 0 for pair in inner.findall(piece)}
    if not joined:
        return re.compile(f"{_SPACE}+[^{_SPACE}]*|[^{_SPACE}]+")
    kept = "".join(map(re.escape, sorted({_SPACE, *joined})))
    return re.compile(f"{_SPACE}*(?:[^{_SPACE}]+|(?<=[{kept}]){_SPACE}+)+|{_SPACE}+")
