"""Files with something wrong in them, from first byte to first tokens: they run, or give one clear error.

The guided version of this, to be run by hand, is `fuzz/fuzz_load.py`. The tests of the last part are for what
one of them, or reading with them in mind, has found.
"""

import math
import random
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import MODELS, OPTIONAL, Entry, Parts, Piece, attempt, model, mutate

from realm_web.errors import FormatError, UnsupportedError
from realm_web.tokenizer import Tokenizer

U32, STRING, F64 = 4, 8, 12


def entry(parts: Parts, key: str) -> Entry:
    return next(entry for entry in parts.entries if entry.key == key.encode())


def changed(name: str, **values: object) -> bytes:
    """The model's file with other metadata: keys with `__` for a dot; a float is written as float64."""
    parts = copy_of(name)
    for key, value in values.items():
        key = key.replace("__", ".").encode()
        parts.entries = [entry for entry in parts.entries if entry.key != key]
        if value is not None:
            kind = {int: U32, float: F64, bytes: STRING}[type(value)]
            parts.entries.append(Entry(key, kind, value))
    return parts.file()


def copy_of(name: str) -> Parts:
    parts = model(name)
    return Parts(list(parts.entries), [Piece(p.name, p.shape, p.kind, p.data) for p in parts.pieces])


def assert_refused(data: bytes, message: str, kind: type = FormatError) -> None:
    error = attempt(data)
    assert type(error) is kind and message in str(error), repr(error)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_run_as_they_are(name):
    """Else every mutation would be refused for the same reason."""
    file = model(name).file()
    assert attempt(file) is None
    assert attempt(file + bytes(1)) is None  # weights packed


@settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    name=st.sampled_from(sorted(MODELS)), seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3)
)
def test_what_is_wrong_in_a_file_is_one_clear_error(name, seeds):
    parts = model(name)
    for seed in seeds:
        try:
            parts = mutate(parts, random.Random(seed))
        except (IndexError, ValueError):  # nothing left that this mutation changes
            break
    attempt(parts.file())


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss"])
def test_every_key_may_be_missing_or_of_another_type(name):
    for i in range(len(model(name).entries)):
        for other in (None, (U32, 7), (STRING, b"\n"), (F64, math.nan), (U32, [0]), (STRING, [])):
            parts = copy_of(name)
            key = parts.entries[i].key
            parts.entries[i : i + 1] = [Entry(key, *other)] if other else []
            attempt(parts.file())


@pytest.mark.parametrize("value", [0, (1 << 32) - 1, 1e-300, 1e300, -1.0, math.inf])
def test_every_optional_number_may_be_extreme(value):
    for key in OPTIONAL:
        attempt(changed("llama", **{f"llama.{key}": value}))


def test_a_cut_file_is_refused_wherever_it_is_cut():
    file = model("qwen2").file()
    for end in [*range(0, len(file) - 1, 997), len(file) - 1]:
        assert attempt(file[:end]) is not None


# -- found by fuzzing ---------------------------------------------------------------------------------


LONG = b"long" * 9999


def with_tensor(name: bytes) -> bytes:
    parts = copy_of("llama")
    parts.pieces.append(Piece(name, (8,), 0, bytes(32)))
    return parts.file()


def test_a_long_name_is_cut_short_in_the_error():
    """`attempt` refuses an error longer than a line."""
    assert_refused(changed("llama", general__architecture=LONG), "architecture 'longlong", UnsupportedError)
    assert_refused(changed("qwen2", qwen2__rope__scaling__type=LONG), "type is 'longlong", UnsupportedError)
    assert_refused(with_tensor(LONG), "tensor 'longlong", UnsupportedError)


@pytest.mark.parametrize("layer", [b"9" * 5000, b"2", b"00", b"-1", b"", "\u0661".encode()])
def test_a_tensor_of_a_layer_that_is_not_there(layer):
    """Python reads no integer of more than 4300 digits, and reads 00 and Arabic digits like 0 and 1."""
    assert_refused(with_tensor(b"blk." + layer + b".attn_q.weight"), "is of a layer beyond block_count 2")


@pytest.mark.parametrize("key", ["yarn_beta_fast", "yarn_beta_slow"])
def test_the_ends_of_the_ramp_of_yarn_may_be_far_off(key):
    """2 pi times them was infinite, and the logarithm of what is left undefined."""
    assert_refused(changed("qwen2", **{f"qwen2.rope.scaling.{key}": 1e308}), f"{key}' is 1e+308; it must be")


@pytest.mark.parametrize("value", [1e300, 1e-300])
@pytest.mark.parametrize("key", ["attention.scale", "attn_logit_softcapping", "final_logit_softcapping"])
def test_factors_beyond_float32_are_refused(key, value):
    """A kernel with such a constant does not compile, or divides by zero."""
    assert_refused(changed("llama", **{f"llama.{key}": value}), f"{key}")


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_no_numbers_are_the_engines_business(name):
    """One error, and no warnings of numpy before it."""
    parts = copy_of(name)
    for piece in parts.pieces:
        if not piece.name.startswith(b"rope"):
            piece.data = b"\xff" * len(piece.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for end in (b"", bytes(1)):
            error = attempt(parts.file() + end)
            assert "no number for any token" in str(error)


def test_a_long_chain_of_unused_tokens_is_refused():
    """Each was written with the next shorter one, and so deep Python does not recurse."""
    word = "".join(chr(0x4E00 + i) for i in range(1000))
    prefixes = [word[:n] for n in range(2, len(word))]
    with pytest.raises(FormatError, match="of type 5 and 257 characters long; at most 256 are accepted"):
        pieces(word, prefixes)
    assert len(pieces(word, prefixes[:255]).encode(word)) == 1 + len(word)


def pieces(word: str, unused: list[str]) -> Tokenizer:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *word, *unused]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [2, 3, 3, 1] + [1] * len(word) + [5] * len(unused),
            "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
            "tokenizer.ggml.add_space_prefix": False,
        }
    )
