"""Byte-level byte pair encoding: a word's UTF-8 bytes are merged pair by pair, best-ranked pair first.

Works on token ids. Knows its vocabulary's strings and merges, and no special tokens. Merging as in Sennrich
et al. 2016; the printable alphabet for bytes is GPT-2's.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import chain
from reprlib import repr as short  # a value of the file may be megabytes long

from realm_web.errors import FormatError
from realm_web.tokenizer.cache import WordCache
from realm_web.tokenizer.pretokenize import Splitter


def _printable_alphabet() -> str:
    """The character of every byte: itself where printable in Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(stand_ins)) for byte in range(256))


_ALPHABET = _printable_alphabet()
_TO_ALPHABET = dict(enumerate(_ALPHABET))
_FROM_ALPHABET = {ord(char): byte for byte, char in enumerate(_ALPHABET)}


class BytePairEncoder:
    """Ids of plain text, and bytes of a token, for `tokenizer.ggml.model` = "gpt2".

    A byte whose single-byte token the vocabulary lacks is dropped, as llama.cpp does (SmolLM2 lacks six
    control characters).
    """

    def __init__(self, ids: dict[str, int], merges: Sequence[str], splitter: Splitter) -> None:
        self._splitter = splitter
        self._stride = len(ids)
        # A pair of ids is one integer: left * stride + right.
        self._ranks, self._merged = _read_merges(ids, merges)
        # Stands for no token: a pair with it is negative, so it has no rank.
        self._nothing = -(self._stride**2) - 1
        self._byte_ids = [ids.get(char, self._nothing) for char in _ALPHABET]
        self._whole = ids if splitter.ignore_merges else {}
        self._cache = WordCache(self._encode_word)

    def encode(self, text: str) -> list[int]:
        return list(chain.from_iterable(map(self._cache.__getitem__, self._splitter.split(text))))

    def token_bytes(self, token: str) -> bytes:
        """Bytes that a token's string in the vocabulary stands for."""
        try:
            return bytes(map(_FROM_ALPHABET.__getitem__, map(ord, token)))
        except KeyError:
            # Not of the byte alphabet: a token added as plain text.
            return token.encode()

    def _encode_word(self, word: str) -> list[int]:
        data = word.encode()
        if self._whole:
            whole = self._whole.get(data.decode("latin-1").translate(_TO_ALPHABET))
            if whole is not None:
                return [whole]
        symbols = [self._byte_ids[byte] for byte in data]
        return [symbol for symbol in self._merge(symbols) if symbol >= 0]

    def _merge(self, symbols: list[int]) -> list[int]:
        """Merges in place, O(n log n): a linked list and a heap of (rank, place), each one integer.

        Scanning a short word for its best pair instead is no faster (measured from 8 symbols on).
        """
        rank_of, stride, merged = self._ranks.get, self._stride, self._merged
        size = len(symbols)
        following = [*range(1, size), -1]
        previous = list(range(-1, size - 1))
        heap = []
        for place in range(size - 1):
            rank = rank_of(symbols[place] * stride + symbols[place + 1])
            if rank is not None:
                heap.append(rank * size + place)
        heapify(heap)
        while heap:
            rank, place = divmod(heappop(heap), size)
            after = following[place]
            if after < 0 or rank_of(symbols[place] * stride + symbols[after]) != rank:
                continue  # one of the two was merged meanwhile
            symbols[place] = merged[rank]
            symbols[after] = self._nothing
            after = following[place] = following[after]
            if after >= 0:
                previous[after] = place
                rank = rank_of(symbols[place] * stride + symbols[after])
                if rank is not None:
                    heappush(heap, rank * size + place)
            before = previous[place]
            if before >= 0:
                rank = rank_of(symbols[before] * stride + symbols[place])
                if rank is not None:
                    heappush(heap, rank * size + before)
        return symbols


def _read_merges(ids: dict[str, int], merges: Sequence[str]) -> tuple[dict[int, int], list[int]]:
    """Rank of every pair, and the id that the pair of a rank becomes."""
    ranks: dict[int, int] = {}
    merged: list[int] = []
    stride = len(ids)
    for rank, merge in enumerate(merges):
        # A symbol may itself be a space, so the separator is looked for from the second character on.
        middle = merge.find(" ", 1)
        left, right = merge[:middle], merge[middle + 1 :]
        try:
            key = ids[left] * stride + ids[right]
            merged.append(ids[left + right])
        except KeyError as error:
            where = f"tokenizer.ggml.merges[{rank}]: {short(merge)}"
            if middle < 0 or not right:
                raise FormatError(f"{where} is not two tokens") from None
            raise FormatError(f"{where} needs {short(error.args[0])}, which is not a token") from None
        ranks.setdefault(key, rank)
    return ranks, merged
