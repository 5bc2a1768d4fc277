"""Perplexity: the pieces of a text, the estimate, the command; real models against llama-perplexity."""

import argparse
import io
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
from tiny import write_tiny

from realm_web.__main__ import main
from realm_web.cli import model
from realm_web.cli.perplexity import Estimate, pieces
from realm_web.tokenizer import Tokenizer

TEXT = "to be or not to be, that is the question\n"


class ScriptedEngine:
    """Bytes are tokens; a token is as likely as 1 / (1 + its id). Remembers what it was asked to score."""

    def __init__(self, add_bos=True, value=None):
        self.tokenizer = SimpleNamespace(
            add_bos=add_bos, bos_id=0, encode=lambda text, parse_special: [0] * add_bos + list(text.encode())
        )
        self.device = SimpleNamespace(kind="cpu", name="scripted", reason="test")
        self.value, self.asked, self.sizes, self.closed = value, [], {}, False

    async def score(self, token_ids, *, first):
        assert first == len(token_ids) // 2 + 1
        self.asked.append(token_ids)
        found = (self.value if self.value is not None else -math.log1p(token) for token in token_ids[1:])
        return SimpleNamespace(token_ids=tuple(token_ids), logprobs=(None, *found))

    async def close(self):
        self.closed = True


@pytest.fixture
def scripted(monkeypatch):
    def install(**how) -> ScriptedEngine:
        engine = ScriptedEngine(**how)

        async def open_engine(args: argparse.Namespace, **sizes: int) -> ScriptedEngine:
            engine.sizes = {"context": args.context, **sizes}
            return engine

        monkeypatch.setattr(model, "open_engine", open_engine)
        return engine

    return install


def test_the_estimate_is_that_of_llama_perplexity_in_any_order():
    rng = np.random.default_rng(1)
    logprobs = (-rng.exponential(2.0, (7, 50))).tolist()
    estimate, backwards = Estimate(), Estimate()
    for piece in logprobs:
        estimate.add(piece)
    for piece in reversed(logprobs):
        backwards.add(piece)
    flat = [-x for piece in logprobs for x in piece]
    ppl = math.exp(statistics.fmean(flat))
    assert estimate.n == 350
    assert estimate.perplexity == pytest.approx(ppl, rel=1e-12)
    assert estimate.error == pytest.approx(ppl * statistics.pstdev(flat) / math.sqrt(349), rel=1e-9)
    assert (estimate.perplexity, estimate.error) == (backwards.perplexity, backwards.error)


def test_the_estimate_of_one_token_has_no_error_and_of_an_impossible_text_no_bound():
    estimate = Estimate()
    estimate.add([-2.0])
    assert (round(estimate.perplexity, 3), estimate.error) == (7.389, 0.0)
    estimate.add([-1e4])
    assert estimate.perplexity == math.inf


def test_pieces_are_whole_and_begin_with_bos_where_the_model_wants_one():
    ids = list(range(10, 21))
    assert list(pieces(ids, 4, None)) == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert list(pieces(ids, 4, 1)) == [[1, 11, 12, 13], [1, 15, 16, 17]]
    assert list(pieces(ids, 12, 1)) == []
    assert list(pieces(ids, 11, None)) == [ids]


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_second_half_of_every_piece_is_scored(scripted, tmp_path, capsys, add_bos):
    engine = scripted(add_bos=add_bos)
    (tmp_path / "text").write_text(TEXT)
    assert main(["perplexity", "m.gguf", str(tmp_path / "text"), "--context", "8", "--json"]) == 0
    ids = [0] * add_bos + list(TEXT.removesuffix("\n").encode())
    parts = [ids[i : i + 8] for i in range(0, 40, 8)]
    if add_bos:
        parts = [[0, *part[1:]] for part in parts]
    assert engine.asked == parts
    scored = [math.log1p(token) for part in parts for token in part[5:]]
    report = json.loads(capsys.readouterr().out)
    assert report["perplexity"] == pytest.approx(math.exp(statistics.fmean(scored)))
    assert report["scored_tokens"] == len(scored) == 15
    assert (report["context"], report["pieces"], report["model"]) == (8, 5, "m.gguf")
    assert engine.sizes["context"] == 8
    assert engine.closed


@pytest.mark.parametrize(
    "arguments",
    [["FILE"], ["m.gguf", "FILE"], ["FILE", "--model", "m.gguf"], ["--context", "16", "m.gguf", "-"]],
)
def test_the_model_may_be_left_out_and_the_text_come_from_stdin(
    scripted, tmp_path, monkeypatch, capsys, arguments
):
    scripted(value=-1.0)
    (tmp_path / "text").write_text(TEXT * 20)
    monkeypatch.setenv("REALM_MODEL", "default.gguf")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((TEXT * 20).encode())))
    assert main(["perplexity", *(str(tmp_path / "text") if a == "FILE" else a for a in arguments)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("perplexity 2.7183 ± 0.0000 over ") and out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["short.txt"], "has 3 tokens, less than one piece of 512; choose a smaller --context"),
        (["picture.png"], "picture.png is not UTF-8 text (byte 0)"),
        (["absent.txt"], "absent.txt: No such file"),
        (["short.txt", "--context", "3"], "--context is 3; it must be at least 4"),
        (["m.gguf", "short.txt", "--model", "other.gguf"], "two models given"),
    ],
)
def test_perplexity_refuses_what_makes_no_sense(scripted, tmp_path, monkeypatch, capsys, arguments, words):
    scripted()
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("hi")
    Path("picture.png").write_bytes(b"\x89PNG")
    assert main(["perplexity", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_model_that_computes_no_number_is_called_broken(scripted, tmp_path, capsys):
    engine = scripted(value=math.nan)
    (tmp_path / "text").write_text(TEXT)
    assert main(["perplexity", "m.gguf", str(tmp_path / "text"), "--context", "8"]) == 2
    assert "computed no number" in capsys.readouterr().err
    assert engine.closed


# ---- with models


@pytest.mark.parametrize("device", ["cpu", "webgpu"])
def test_the_perplexity_of_a_tiny_model_is_that_of_exact_arithmetic(tmp_path, capsys, device):
    tiny = write_tiny(tmp_path / "tiny.gguf", add_bos=True, vocab=320)
    (tmp_path / "text").write_text(TEXT * 6)
    arguments = ["perplexity", str(tiny.path), str(tmp_path / "text"), "--context", "32", "--device", device]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)

    tokenizer = Tokenizer.from_metadata(tiny.metadata)
    ids = tokenizer.encode((TEXT * 6).removesuffix("\n"))
    scored = []
    for piece in pieces(ids, 32, tokenizer.bos_id):
        logits = reference.logits(tiny.weights, tiny.metadata, piece)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        scored += [-logprobs[i, piece[i + 1]] for i in range(16, 31)]
    assert report["scored_tokens"] == len(scored) >= 45
    # float32 throughout, but for a KV cache of 11 bits
    assert report["nll_per_token"] == pytest.approx(statistics.fmean(scored), abs=1e-3)


@pytest.mark.parametrize(
    ("path", "golden"), [("smollm2_path", 15.929), ("gemma_path", 10.145)], ids=["SmolLM2", "Gemma"]
)
def test_the_perplexity_of_a_real_model_is_that_of_llama_perplexity(request, shared, capsys, path, golden):
    model_path, text = request.getfixturevalue(path), shared / "fixtures" / "apache-2.0.txt"
    assert main(["perplexity", str(model_path), str(text), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    # llama.cpp rounds activations to 8 bits, which moves the third digit
    assert report["perplexity"] == pytest.approx(golden, rel=0.005)
    assert (report["pieces"], report["scored_tokens"]) == (4, 1020)
