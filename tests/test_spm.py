"""SentencePiece vocabularies against the `sentencepiece` package and llama.cpp's recorded ids."""

import io
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers

from realm_web.errors import FormatError
from realm_web.gguf import NeedMoreBytes, parse
from realm_web.tokenizer import Tokenizer
from realm_web.tokenizer.spm import PieceEncoder
from realm_web.tokenizer.vocabulary import TokenType

sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")

# Runs, repeats, what has no piece of its own and what looks like a token.
texts = (
    st.text(st.sampled_from("aabben  tt.()=_\n\té漢字😀\x00\u200d<>s/0xA"), max_size=60)
    | st.text(max_size=30)
    | st.lists(
        st.sampled_from(["test", " the", "tokenizer", "  ", "assert", "<s>", "</s>", "<0x41>", "é"])
    ).map("".join)
).filter(lambda text: "▁" not in text)


@cache
def model_of(**options) -> bytes:
    """A small model, trained on this file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*Path(__file__).read_text("utf-8").splitlines(), "x" * 40, "a  b    c"]),
        model_writer=model,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **{"vocab_size": 700, "byte_fallback": True, "character_coverage": 0.999} | options,
    )
    return model.getvalue()


@cache
def trained(**options) -> "sentencepiece.SentencePieceProcessor":
    return sentencepiece.SentencePieceProcessor(model_proto=model_of(**options))


def metadata(sp: "sentencepiece.SentencePieceProcessor", **overrides) -> dict:
    """Header entries of the model, as llama.cpp's converter writes them."""
    ids = range(sp.vocab_size())
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    entries = {
        "model": "llama",
        "tokens": [sp.id_to_piece(i) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in ids],
        "unknown_token_id": sp.unk_id(),
        "bos_token_id": sp.bos_id(),
        "eos_token_id": sp.eos_id(),
    } | overrides
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


@cache
def small(**flags) -> Tokenizer:
    return Tokenizer.from_metadata(metadata(trained(), **flags))


def extended(*extra: tuple[str, int], score: float = 0.0, **flags) -> Tokenizer:
    """The small tokenizer with more tokens, given as (string, type)."""
    entries = metadata(trained())
    for key, more in (
        ("tokens", [token for token, _ in extra]),
        ("token_type", [kind for _, kind in extra]),
        ("scores", [score] * len(extra)),
    ):
        entries[f"tokenizer.ggml.{key}"] += more
    entries |= {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    return Tokenizer.from_metadata(entries)


def read_header(path: Path) -> dict:
    with path.open("rb") as file:
        n = 1 << 23
        while True:
            file.seek(0)
            try:
                return parse(file.read(n)).metadata
            except NeedMoreBytes as more:
                n = more.n


@pytest.fixture(scope="module")
def gemma(gemma_path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(read_header(gemma_path))


def test_gemma_agrees_with_llama_cpp(gemma: Tokenizer, shared: Path) -> None:
    golden = shared / "goldens" / "gemma3-270m-q4_k_m.json"
    for case in json.loads(golden.read_text(encoding="utf-8"))["tokenize"]:
        text = case["text"]
        plain = gemma.encode(text, add_special=False, parse_special=False)
        assert gemma.encode(text) == case["ids_special"], text
        assert plain == case["ids_plain"], text
        assert gemma.decode(plain) == case["detokenized"], text
    assert {gemma.token_text(i) for i in gemma.eog_ids} == {"<eos>", "<end_of_turn>", "</s>"}
    assert (gemma.bos_id, gemma.eos_id, gemma.pad_id, gemma.add_bos, gemma.add_eos) == (2, 1, 0, True, False)


@given(text=texts | st.text(st.sampled_from("a ▁<>\n\t1é漢नमस्ते"), max_size=40).filter(lambda s: "▁" not in s))
@settings(max_examples=300, deadline=None)
def test_gemma_gives_every_text_back(gemma: Tokenizer, text: str) -> None:
    for special in (False, True):
        assert gemma.decode(gemma.encode(text, add_special=False, parse_special=special)) == text


@pytest.mark.parametrize("prefix", [True, False])
@given(text=texts)
@settings(max_examples=500, deadline=None)
@example("  a  b ")
@example("x" * 41 + " " * 9)
def test_ids_and_text_are_those_of_sentencepiece(prefix: bool, text: str) -> None:
    sp, tokenizer = both(prefix)
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert ids == sp.encode(text)
    assert tokenizer.decode(ids) == text == sp.decode(ids)


@given(text=texts)
@settings(max_examples=300, deadline=None)
def test_ids_are_those_of_the_tokenizers_package(text: str) -> None:
    tokenizer = both(False)[1]
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert ids == as_ranked_merges().encode(text).ids


@cache
def as_ranked_merges() -> tokenizers.Tokenizer:
    """The same vocabulary as Hugging Face converts it: every way to make a piece, the best pieces first."""
    vocabulary = both(False)[1].vocabulary
    ids = {piece: i for piece, i in vocabulary.ids.items() if vocabulary.types[i] == TokenType.NORMAL}
    merges = []
    for piece in sorted(ids, key=lambda piece: -vocabulary.scores[ids[piece]]):
        halves = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        merges += sorted(
            (pair for pair in halves if ids.keys() >= {*pair}), key=lambda pair: [ids[half] for half in pair]
        )
    model = models.BPE(vocabulary.ids, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    oracle = tokenizers.Tokenizer(model)
    oracle.normalizer = normalizers.Replace(" ", "▁")
    return oracle


@cache
def both(prefix: bool) -> tuple["sentencepiece.SentencePieceProcessor", Tokenizer]:
    sp = trained(add_dummy_prefix=prefix)
    return sp, Tokenizer.from_metadata(metadata(sp, add_space_prefix=prefix))


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_unused_pieces_are_written_with_others_or_bytes_as_sentencepiece_does(text: str) -> None:
    sp, tokenizer = with_unused_pieces()
    assert tokenizer.encode(text, add_special=False, parse_special=False) == sp.encode(text)


@cache
def with_unused_pieces() -> tuple["sentencepiece.SentencePieceProcessor", Tokenizer]:
    """Every third normal piece is made an unused one, in the model's protocol buffer."""
    model, changed, start, n = model_of(), b"", 0, 0
    while model[start] == 0x0A:  # field 1, a piece; shorter than 128 bytes
        end = start + 2 + model[start + 1]
        piece = model[start + 2 : end]
        n += 1
        if b"\x18" not in piece[-2:-1] and n % 3 == 0:  # no field 3: of the normal type
            piece += b"\x18\x05"
        changed += bytes([0x0A, len(piece)]) + piece
        start = end
    sp = sentencepiece.SentencePieceProcessor(model_proto=changed + model[start:])
    assert sum(map(sp.is_unused, range(sp.vocab_size()))) > 100
    return sp, Tokenizer.from_metadata(metadata(sp))


@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_pieces_with_a_space_inside_are_found(text: str) -> None:
    sp = trained(split_by_whitespace=False)
    assert any("▁" in sp.id_to_piece(i)[1:].lstrip("▁") for i in range(sp.vocab_size()))
    tokenizer = across_words()
    assert tokenizer.encode(text, add_special=False, parse_special=False) == sp.encode(text)


@cache
def across_words() -> Tokenizer:
    return Tokenizer.from_metadata(metadata(trained(split_by_whitespace=False)))


@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_without_byte_tokens_what_no_piece_covers_is_unknown(text: str) -> None:
    sp, tokenizer = without_bytes()
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    # SentencePiece writes one unknown token for neighbouring unknown characters.
    joined = [i for n, i in enumerate(ids) if i != sp.unk_id() or ids[n - 1 : n] != [i]]
    assert joined == sp.encode(text)


@cache
def without_bytes() -> tuple["sentencepiece.SentencePieceProcessor", Tokenizer]:
    sp = trained(byte_fallback=False, vocab_size=450)
    return sp, Tokenizer.from_metadata(metadata(sp))


def test_a_character_without_piece_byte_and_unknown_token_is_dropped() -> None:
    vocabulary = replace(without_bytes()[1].vocabulary, unknown_id=None)
    encoder = PieceEncoder(vocabulary, vocabulary.scores, space_prefix=False)
    assert encoder.encode("test \u2603 test") == encoder.encode("test ") + encoder.encode(" test")


@given(st.lists(texts | st.sampled_from(["<s>", "</s>", "<tool>", "<unk>", " "]), max_size=6).map("".join))
@settings(max_examples=300, deadline=None)
def test_every_text_with_special_tokens_comes_back(text: str) -> None:
    for tokenizer in with_tool():
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
        plain = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(plain, skip_special=True) == text  # so nothing was read as a control token


@cache
def with_tool() -> tuple[Tokenizer, ...]:
    return tuple(extended(("<tool>", 4), ("<s", 1), add_space_prefix=prefix) for prefix in (True, False))


def test_a_control_or_byte_token_is_never_merged_from_text() -> None:
    # "<s" and ">" would give <s>, whose score is the best of all.
    tokenizer = extended(("<s", 1), ("<0x41", 1), score=-0.5)
    for text in ("<s>", "<0x41>"):
        ids = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.decode(ids, skip_special=True) == text
        assert len(ids) > 1
    assert tokenizer.encode("<s>", add_special=False) == [tokenizer.bos_id]


def test_the_space_before_the_text_is_added_after_special_tokens_too_and_undone() -> None:
    tokenizer = extended(("<tool>", 4))
    tool = tokenizer.n_vocab - 1
    plain = {"add_special": False}
    test = tokenizer.encode("test", **plain)
    assert tokenizer.token_bytes(test[0]).startswith(b" ")
    assert tokenizer.encode("test<tool>test<s>test", **plain) == [*test, tool, *test, tokenizer.bos_id, *test]
    assert tokenizer.decode([*test, tool, *test]) == "test<tool>test"
    assert tokenizer.decode([tokenizer.bos_id, *test], skip_special=True) == "test"
    assert tokenizer.decode([*test, *test]) == "test test"
    assert tokenizer.encode(" test", **plain) != test
    bare = extended(("<tool>", 4), add_space_prefix=False)
    assert bare.encode(" test", **plain) == test
    assert bare.decode(test) == " test"


def test_a_stream_continues_a_text() -> None:
    tokenizer = small()
    ids = tokenizer.encode("test 漢字", add_special=False)
    stream = tokenizer.stream()
    pieces = [*map(stream.push, ids), stream.finish()]
    assert "".join(pieces) == " test 漢字"
    assert not any("\ufffd" in piece for piece in pieces)


def test_bos_is_added_unless_the_file_says_otherwise() -> None:
    body = small().encode("test", add_special=False)
    assert small().encode("test") == [1, *body]
    assert small().encode("") == [1]
    assert small().encode("<s>test") == [1, *body]
    assert small(add_bos_token=False).encode("test") == body
    assert small(add_eos_token=True).encode("test") == [1, *body, 2]


def test_special_ids_have_sentencepieces_defaults() -> None:
    tokenizer = small(bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocabulary.unknown_id) == (1, 2, 0)
    assert tokenizer.encode("test") == small().encode("test")


def test_special_tokens_of_phi_3_take_the_white_space_behind_them() -> None:
    extra = [("<|user|>", 3), ("<|end|>", 3), ("<|endoftext|>", 3)]
    plain = extended(*extra)
    user, end, endoftext = range(plain.n_vocab - 3, plain.n_vocab)
    for name, strips in (("Phi-3-mini-4k", True), ("Phi3 Mini", True), ("Llama 2", False)):
        entries = metadata(trained(), add_bos_token=False) | {"general.name": name}
        for key, more in (("tokens", [t for t, _ in extra]), ("token_type", [3] * 3), ("scores", [0.0] * 3)):
            entries[f"tokenizer.ggml.{key}"] += more
        tokenizer = Tokenizer.from_metadata(entries)
        test, spaced = (tokenizer.encode(text, add_special=False) for text in ("test", " \ntest"))
        after = test if strips else spaced
        text = "<|user|> \ntest<|end|> \ntest<|endoftext|> \ntest<s> \ntest<|user|>  <|end|>"
        wanted = [user, *after, end, *after, endoftext, *spaced, 1, *spaced, user, end]
        if strips:
            assert tokenizer.encode(text) == wanted
        else:
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [0.0]}, r"tokenizer\.ggml\.scores: 1 entries for 700 tokens"),
        ({"scores": [float("nan")] * 700}, r"tokenizer\.ggml\.scores\[0\]"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type: 1 entries"),
        ({"bos_token_id": 700}, r"tokenizer\.ggml\.bos_token_id: 700"),
        ({"add_space_prefix": 1}, r"tokenizer\.ggml\.add_space_prefix: true or false"),
        ({"remove_extra_whitespaces": "yes"}, r"tokenizer\.ggml\.remove_extra_whitespaces: true or false"),
        ({"pre": 1}, r"tokenizer\.ggml\.pre"),
    ],
)
def test_malformed_metadata_is_one_clear_error(wrong: dict, message: str) -> None:
    with pytest.raises(FormatError, match=f"^{message}") as caught:
        Tokenizer.from_metadata(metadata(trained(), **wrong))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("score", [0.0, float("inf"), float("-inf"), -1e38])
def test_scores_may_be_equal_or_extreme(score: float) -> None:
    tokenizer = small(scores=(score,) * 700)
    assert tokenizer.decode(tokenizer.encode("assert tokenizer", add_special=False)) == "assert tokenizer"


def test_english_is_encoded_at_a_megabyte_per_second(gemma: Tokenizer, shared: Path) -> None:
    text = (shared / "fixtures" / "apache-2.0.txt").read_text(encoding="utf-8") * 100  # 1.1 MB
    began = time.process_time()
    ids = gemma.encode(text, add_special=False)
    assert len(text) / (time.process_time() - began) > 1e6
    assert gemma.decode(ids) == text


@pytest.mark.parametrize("letter", ["a", "漢", " ", "<", " x"])
def test_a_megabyte_of_one_character_takes_seconds(letter: str) -> None:
    text = letter * (1_000_000 // len(letter.encode()))
    for tokenizer in (small(), across_words()):
        began = time.process_time()
        ids = tokenizer.encode(text, add_special=False)
        assert time.process_time() - began < 15
        assert tokenizer.decode(ids) == text
