"""A small vocabulary for the tests of structured output, and walks through the masks of a matcher."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tiny import byte_tokens

from realm_web.grammar import Matcher
from realm_web.tokenizer import Tokenizer

# Tokens that run over several parts of a JSON text, begin in the middle of a character, or are white space.
PIECES = """{" ": "," "} ]} }} [{ "] {} [] [[ true false null ,Ġ" :Ġ ":Ġ" Ġ{ ĠĠ ĊĠĠ -1 12 0. e+ name age tags
next ab bc abc aaa xx \\n \\u \\" é Ã© ðŁĺ Ġb 2024 -0 @x .com root (( )) + ++ 00 99 a1""".split()  # noqa: SIM905
N_PADDING = 37


def small_tokenizer(n_eog: int = 2) -> Tokenizer:
    """All bytes, the pieces, and two control tokens that end a text."""
    tokens = [*byte_tokens(), *dict.fromkeys(PIECES), "<|end|>", "</s>", "<|im_start|>"]
    tokens = list(dict.fromkeys(tokens))
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * (len(tokens) - 3) + [3] * 3,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        }
    )


def allowed(mask: bytes | memoryview) -> list[int]:
    """The ids whose bit is set."""
    return [i for i, byte in enumerate(mask) for i in range(8 * i, 8 * i + 8) if byte >> i % 8 & 1]


def random_walk(tokenizer: Tokenizer, matcher: Matcher, seed: int, n_free: int) -> Iterator[int]:
    """Tokens of one answer with its end: `n_free` random ones, then those that bring it to its end soon."""
    chance = random.Random(seed)
    closing = [bytes([byte]) for byte in b'"""}}}]]],:nul019b.a@z '] + [b"null", b"com"]
    for n in range(n_free + 2000):
        ids = allowed(matcher.mask())
        ends = [token for token in ids if token in tokenizer.eog_ids]
        if n < n_free:
            token = chance.choice(ids)
        elif ends:
            token = ends[0]
        else:
            texts = {tokenizer.token_bytes(token): token for token in ids}
            likely = closing if chance.random() < 0.5 else [b'"', b"b", b"."]
            token = chance.choice([texts[text] for text in likely if text in texts] or ids)
        assert matcher.accept(token)
        yield token
        if token in tokenizer.eog_ids:
            return
    raise AssertionError("the walk did not come to an end")
