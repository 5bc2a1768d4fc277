"""Remembers the ids of words: text repeats its words, so most of them need no merging."""

from collections.abc import Callable

_WORDS = 1 << 16
_WORD_CHARS = 64


class WordCache(dict[str, list[int]]):
    """Word to ids, filled on a miss and emptied when full. Long words are not kept: they seldom return."""

    def __init__(self, encode_word: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode_word = encode_word

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode_word(word)
        if len(word) <= _WORD_CHARS:
            if len(self) >= _WORDS:
                self.clear()
            self[word] = ids
        return ids
