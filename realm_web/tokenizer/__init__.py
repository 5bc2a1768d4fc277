"""Tokenizers of GGUF files: text to token ids and back, streaming, stop strings.

`Tokenizer.from_metadata` is the way in. Knows no model, no device and no file.
"""

from realm_web.tokenizer.stream import StopMatcher, StreamDecoder
from realm_web.tokenizer.tokenizer import Tokenizer

__all__ = ["StopMatcher", "StreamDecoder", "Tokenizer"]
