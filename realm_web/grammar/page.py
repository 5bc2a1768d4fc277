"""The page's part of structured output: the tree of all tokens, walked in JavaScript.

For 262,144 tokens a walk through the inside of a string takes a few milliseconds, which Python would spend
seconds on. What a byte leads to is asked of Python once for each place and then remembered here.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from pyodide.code import run_js
from pyodide.ffi import create_proxy, to_js

from realm_web.grammar.own import OwnGrammarEngine
from realm_web.tokenizer import Tokenizer

# The nodes of the tree in depth-first order; skip[i] is the first node that is not below node i.
TREE = """
(bytes, ends, ask) => {
  const nTokens = ends.length;
  const byte = [0], child = [-1], sibling = [-1], ids = [-1];
  const same = new Int32Array(nTokens).fill(-1); // the next token with the same bytes
  for (let token = 0, at = 0; token < nTokens; at = ends[token++]) {
    if (ends[token] === at) continue;
    let node = 0;
    for (let i = at; i < ends[token]; i++) {
      let next = child[node];
      while (next >= 0 && byte[next] !== bytes[i]) next = sibling[next];
      if (next < 0) {
        next = byte.length;
        byte.push(bytes[i]);
        child.push(-1);
        sibling.push(child[node]);
        ids.push(-1);
        child[node] = next;
      }
      node = next;
    }
    same[token] = ids[node];
    ids[node] = token;
  }
  const n = byte.length - 1;
  const value = new Uint8Array(n), depth = new Int32Array(n), skip = new Int32Array(n);
  const first = new Int32Array(n); // token that ends here, or -1
  const path = [];
  let deepest = 0;
  for (let node = child[0], i = 0; node >= 0; ) {
    value[i] = byte[node];
    depth[i] = path.length;
    first[i] = ids[node];
    deepest = Math.max(deepest, path.length);
    path.push([node, i++]);
    if (child[node] >= 0) {
      node = child[node];
      continue;
    }
    node = -1;
    while (node < 0 && path.length) {
      const [done, index] = path.pop();
      skip[index] = i;
      node = sibling[done];
    }
  }
  const row = new Array(deepest + 2); // of the place before each byte of the path
  return () => {
    const rows = new Map();
    const rowOf = (number) => {
      let row = rows.get(number);
      if (row === undefined) rows.set(number, (row = ask(number)));
      return row;
    };
    return {
      mask(number) {
        const mask = new Uint32Array((nTokens + 31) >> 5);
        row[0] = rowOf(number);
        for (let i = 0; i < n; ) {
          const d = depth[i];
          if (!row[d]) return null; // Python failed, and knows why
          const next = row[d][value[i]];
          if (next < 0) {
            i = skip[i];
            continue;
          }
          for (let token = first[i]; token >= 0; token = same[token]) mask[token >> 5] |= 1 << (token & 31);
          if (skip[i] > ++i) row[d + 1] = rowOf(next);
        }
        return mask;
      },
      forget: () => rows.clear(),
    };
  };
}
"""


class PageGrammarEngine(OwnGrammarEngine):
    """Our own engine over the page's tree of tokens."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        super().__init__(tokenizer, n_vocab, _JsTree)


class _JsTree:
    def __init__(self, table: list[bytes]) -> None:
        self._row: Callable[[int], Sequence[int]] | None = None
        self._failure: Exception | None = None
        ends = array("i", accumulate(map(len, table)))
        self._open = run_js(TREE)(to_js(b"".join(table)), to_js(ends), create_proxy(self._ask))

    def open(self) -> _JsWalk:
        return _JsWalk(self, self._open())

    def mask(self, walk: Any, number: int, row: Callable[[int], Sequence[int]]) -> bytes:
        self._row, self._failure = row, None
        mask = walk.mask(number)
        if self._failure is not None:
            raise self._failure
        return mask.to_bytes()

    def _ask(self, number: int) -> Any:
        """The row of a place as an Int32Array; none when it failed: no error passes through JavaScript."""
        try:
            return to_js(self._row(number))
        except Exception as error:
            self._failure = error
            return None


class _JsWalk:
    def __init__(self, tree: _JsTree, walk: Any) -> None:
        self._tree = tree
        self._walk = walk

    def mask(self, number: int, row: Callable[[int], Sequence[int]]) -> bytes:
        return self._tree.mask(self._walk, number, row)

    def forget(self) -> None:
        self._walk.forget()
