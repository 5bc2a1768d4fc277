"""The tree of tokens that our grammar engine walks, in plain Python: the twin of the page's JavaScript."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class TokenTree:
    """Nested dictionaries: byte -> (tokens that end here, what follows)."""

    def __init__(self, table: list[bytes]) -> None:
        self.n_tokens = len(table)
        self.root: dict[int, tuple[list[int], dict]] = {}
        for token, text in enumerate(table):
            below, ids = self.root, None
            for byte in text:
                ids, below = below.setdefault(byte, ([], {}))
            if ids is not None:
                ids.append(token)

    def open(self) -> Walk:
        return Walk(self)


class Walk:
    def __init__(self, tree: TokenTree) -> None:
        self._tree = tree
        self._rows: dict[int, Sequence[int]] = {}

    def mask(self, number: int, row: Callable[[int], Sequence[int]]) -> bytes:
        mask = bytearray((self._tree.n_tokens + 31) // 32 * 4)
        todo = [(self._tree.root, number)]
        while todo:
            below, number = todo.pop()
            if number not in self._rows:
                self._rows[number] = row(number)
            for byte, (ids, further) in below.items():
                following = self._rows[number][byte]
                if following >= 0:
                    for token in ids:
                        mask[token // 8] |= 1 << token % 8
                    todo.append((further, following))
        return bytes(mask)

    def forget(self) -> None:
        self._rows.clear()
