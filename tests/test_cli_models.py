"""The commands on real files: tiny random ones on the CPU, SmolLM2, and broken ones (one clear line each)."""

import io
import json
import struct
from pathlib import Path

import pytest
from tiny import CHATML, TinyModel, write_tiny

from realm_web.__main__ import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> TinyModel:
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", chat_template=CHATML, quant="Q8_0")


def run_json(capsys, *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- tokenize and inspect


def test_tokenize_gives_the_recorded_ids_of_every_text(shared, smollm2_path, capsys):
    golden = json.loads((shared / "goldens" / "smollm2-135m-instruct-q4_1.json").read_text("utf-8"))
    for case in golden["tokenize"][:8]:
        command = ["tokenize", str(smollm2_path), "--text", case["text"]]
        assert run_json(capsys, *command) == {"ids": case["ids_special"]}
        assert run_json(capsys, *command, "--no-special") == {"ids": case["ids_plain"]}


def test_tokenize_shows_each_token_with_its_text(tiny, capsys):
    assert main(["tokenize", str(tiny.path), "--text", "hello é"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [str(tiny.metadata["tokenizer.ggml.tokens"].index("hello")), "'hello'"]
    assert "'\\\\xc3'" in lines[2]  # a token may be half a character


def test_inspect_shows_metadata_tensors_totals_and_the_verdict(tiny, capsys):
    assert main(["inspect", str(tiny.path)]) == 0
    out = capsys.readouterr().out
    assert "tiny random" in out and "llama.embedding_length" in out
    assert all(name in out for name in tiny.weights)
    assert "64 × 320" in out  # the contiguous dimension first, as GGUF has it
    assert "This model will run. It needs " in out


def test_inspect_json_has_every_tensor_and_key(tiny, capsys):
    found = run_json(capsys, "inspect", str(tiny.path))
    assert {tensor["name"]: tensor["type"] for tensor in found["tensors"]} == tiny.types
    assert sum(tensor["nbytes"] for tensor in found["tensors"]) < tiny.path.stat().st_size
    assert found["metadata"].keys() == tiny.metadata.keys()
    assert (found["runs"], found["problems"]) == (True, [])
    assert found["weight_bytes"] >= sum(weight.size for weight in tiny.weights.values())


def test_inspect_shows_a_model_that_cannot_run_and_says_why(tmp_path, capsys):
    model = write_tiny(tmp_path / "m.gguf", architecture="mamba")
    assert main(["inspect", str(model.path)]) == 2
    out, err = capsys.readouterr()
    assert "mamba.embedding_length" in out
    assert err.count("\n") == 1 and "'mamba' is not supported" in err


# ---- run, chat, bench


def test_run_answers_on_the_cpu_and_greedy_answers_repeat(tiny, capsys):
    command = [
        "run",
        str(tiny.path),
        "--prompt",
        "hello",
        "--temperature",
        "0",
        "--max-tokens",
        "6",
        "--device",
        "cpu",
    ]
    first = run_json(capsys, *command, "--ignore-eos")
    assert first["usage"] == {
        "prompt_tokens": len(first["prompt_token_ids"]),
        "completion_tokens": 6,
        "cached_tokens": 0,
        "total_tokens": len(first["prompt_token_ids"]) + 6,
    }
    assert len(first["token_ids"]) == 6 and first["finish_reason"] == "length"
    assert first["timings"].keys() >= {"prompt_per_second", "predicted_per_second", "time_to_first_token_ms"}
    assert (first["device"], bool(first["adapter"])) == ("cpu", True)
    again = run_json(capsys, *command, "--ignore-eos")
    assert (again["text"], again["token_ids"]) == (first["text"], first["token_ids"])
    assert main([*command, "--ignore-eos"]) == 0
    assert capsys.readouterr().out == first["text"] + "\n"


def test_raw_leaves_the_chat_template_out(tiny, capsys):
    command = ["run", str(tiny.path), "--prompt", "hello", "--max-tokens", "1", "--device", "cpu"]
    tokens = tiny.metadata["tokenizer.ggml.tokens"]
    assert run_json(capsys, *command, "--raw")["prompt_token_ids"] == [tokens.index("hello")]
    assert tokens.index("<|im_start|>") in run_json(capsys, *command)["prompt_token_ids"]


def test_run_continues_a_prompt_as_recorded(shared, smollm2_path, capsys):
    golden = json.loads((shared / "goldens" / "smollm2-135m-instruct-q4_1.json").read_text("utf-8"))
    case = golden["greedy"][0]
    flags = ["--raw", "--temperature", "0", "--max-tokens", "5", "--device", "cpu"]
    found = run_json(capsys, "run", str(smollm2_path), "--prompt", case["prompt"], *flags)
    assert found["token_ids"] == case["ids"][:5]  # then two tokens are nearly as likely


def test_chat_answers_until_the_input_ends(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/set max_tokens 2\nagain\n"))
    flags = ["--device", "cpu", "--max-tokens", "3", "--seed", "1", "--ignore-eos"]
    assert main(["chat", str(tiny.path), *flags]) == 0
    err = capsys.readouterr().err
    assert "tiny random on " in err
    assert "[3 tokens · " in err and "[2 tokens · " in err


def test_bench_measures_both_tests(tiny, capsys):
    flags = ["--device", "cpu", "--runs", "2", "--prompt-tokens", "16", "--generate-tokens", "4"]
    report = run_json(capsys, "bench", str(tiny.path), *flags)
    for test in ("pp16", "tg4"):
        assert report[test]["median"] > 0 and len(report[test]["runs"]) == 2
    assert report["tg4"]["percent_of_bandwidth"] > 0 and report["bandwidth_gb_per_second"] > 0


def test_bench_measures_depths_batches_and_where_the_time_goes(tiny, capsys):
    flags = ["--device", "cpu", "--runs", "1", "--prompt-tokens", "16", "--generate-tokens", "4"]
    flags += ["--depth", "0,40", "--batch", "1,3", "--breakdown"]
    report = run_json(capsys, "bench", str(tiny.path), *flags)
    for test in ("pp16", "tg4", "pp16@d40", "tg4@d40", "tg4x1", "tg4x3"):
        assert report[test]["median"] > 0
    parts = report["breakdown_ms"]
    assert parts["Python"] > 0 and parts["the device alone"] > 0
    assert parts["all"] >= parts["submitting"] > 0


def test_kernels_lists_every_call_of_a_pass_and_measures_them(tiny, capsys):
    flags = ["--device", "cpu", "--prompt-tokens", "9", "--batch", "1,3", "--runs", "2"]
    listed = run_json(capsys, "kernels", str(tiny.path), *flags)
    assert listed["passes"].keys() == {"decode", "decode x3", "prompt of 9"}
    assert all(line["microseconds"] is None for line in listed["passes"]["decode"])
    measured = run_json(capsys, "kernels", str(tiny.path), *flags, "--bench")
    for name, lines in measured["passes"].items():
        assert [line["kernel"] for line in lines] == [line["kernel"] for line in listed["passes"][name]]
        assert all(line["microseconds"] > 0 for line in lines)
        products = [line for line in lines if line["bytes"]]
        assert products and all(line["percent_of_bandwidth"] > 0 for line in products)
        assert all(line["tflops"] > 0 for line in lines if line["flops"])


def test_kernels_shows_only_those_asked_for(tiny, capsys):
    flags = ["--device", "cpu", "--prompt-tokens", "9", "--bench", "-k", "ffn_down", "--runs", "1"]
    assert main(["kernels", str(tiny.path), *flags]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "ffn" in line]
    assert len(lines) == 2 and all("ffn_down" in line for line in lines)


# ---- bad input: one line on stderr, exit code 2


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def in_name(data: bytes, name: bytes, after: int) -> int:
    """Offset `after` bytes behind a tensor's or key's name in the header."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + after


BROKEN = {
    "empty": (lambda data: b"", "GGUF"),
    "no GGUF": (lambda data: b"PK\3\4" + data[4:], "not a GGUF"),
    "cut in the magic": (lambda data: data[:3], "GGUF"),
    "cut in the counts": (lambda data: data[:20], "truncated"),
    "cut in the metadata": (lambda data: data[:500], "truncated"),
    "cut in the last tensor": (lambda data: data[:-1], ""),
    "version 1": (lambda data: patched(data, 4, struct.pack("<I", 1)), "version 1"),
    "version 99": (lambda data: patched(data, 4, struct.pack("<I", 99)), "version 99"),
    "big-endian": (lambda data: patched(data, 4, struct.pack(">I", 3)), "big-endian"),
    "2**63 tensors": (lambda data: patched(data, 8, struct.pack("<Q", 2**63)), "tensors"),
    "2**63 keys": (lambda data: patched(data, 16, struct.pack("<Q", 2**63)), "keys"),
    "key of 2**60 bytes": (lambda data: patched(data, 24, struct.pack("<Q", 2**60)), ""),
    "unknown quant type": (
        lambda data: patched(data, in_name(data, b"blk.0.attn_q.weight", 20), struct.pack("<I", 77)),
        "blk.0.attn_q.weight",
    ),
    "tensor out of the file": (
        lambda data: patched(data, in_name(data, b"blk.0.attn_q.weight", 24), struct.pack("<Q", 2**40)),
        "blk.0.attn_q.weight",
    ),
    "overlapping tensors": (
        lambda data: patched(data, in_name(data, b"blk.0.attn_q.weight", 24), struct.pack("<Q", 0)),
        "overlap",
    ),
    "NaN metadata": (
        lambda data: patched(
            data, in_name(data, b"llama.attention.layer_norm_rms_epsilon", 4), struct.pack("<f", float("nan"))
        ),
        "llama.attention.layer_norm_rms_epsilon",
    ),
}


def refused(capsys, *command: str) -> str:
    """The one line with which a command ends with exit code 2."""
    assert main(list(command)) == 2
    err = capsys.readouterr().err
    assert err.startswith("realm: error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(case, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("REALM_DEBUG", raising=False)
    damage, words = BROKEN[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(damage(tiny.path.read_bytes()))
    for command in (["inspect", str(path)], ["run", str(path), "hi", "--device", "cpu"]):
        line = refused(capsys, *command)
        assert words in line and "broken.gguf" in line, line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"omit": ["blk.1.ffn_up.weight"]}, "blk.1.ffn_up.weight"),
        ({"shapes": {"blk.0.attn_q.weight": (32, 64)}}, "blk.0.attn_q.weight"),
        ({"architecture": "mamba"}, "'mamba' is not supported; supported are "),
        ({"pre": "klingon"}, "klingon"),
        ({"shapes": {"token_embd.weight": (300, 64), "output.weight": (300, 64)}}, "token_embd.weight"),
        ({"metadata": {"llama.block_count": None}}, "llama.block_count"),
        ({"metadata": {"llama.block_count": 10**9}}, "llama.block_count"),
        ({"metadata": {"llama.attention.head_count": 0}}, "llama.attention.head_count"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused_in_one_line(options, words, tmp_path, capsys):
    model = write_tiny(tmp_path / "m.gguf", **options)
    assert words in refused(capsys, "run", str(model.path), "hi", "--device", "cpu")
    assert words in refused(capsys, "inspect", str(model.path))


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**9 }}",
        "{% for a in range(10**5) %}{% for b in range(10**5) %}x{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({}) }}",
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "x" * 10**6,
    ],
)
def test_a_hostile_chat_template_is_refused_in_one_line(template, tmp_path, capsys):
    model = write_tiny(tmp_path / "m.gguf", chat_template=template)
    line = refused(capsys, "run", str(model.path), "hi", "--device", "cpu")
    assert len(line) < 500


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(tiny, capsys):
    line = refused(capsys, "run", str(tiny.path), "--raw", "x " * 300, "--device", "cpu")
    assert "256" in line


def test_a_missing_file_a_folder_and_a_dead_address_are_one_line(tmp_path: Path, capsys):
    assert "no.gguf" in refused(capsys, "inspect", str(tmp_path / "no.gguf"))
    assert str(tmp_path) in refused(capsys, "inspect", str(tmp_path))
    assert "127.0.0.1" in refused(capsys, "inspect", "http://127.0.0.1:9/model.gguf")
