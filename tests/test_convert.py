"""`realm quantize`: the new file, what it refuses, and that nothing half-written is left."""

import asyncio
import json
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from tiny import write_tiny

from realm_web import LLM, convert, ggufwriter
from realm_web.__main__ import main
from realm_web.dequant import dequantize
from realm_web.gguf import parse
from realm_web.quantize import quantize
from realm_web.sources import FileSource

CHANGED = ("general.file_type", "general.quantization_version")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model") / "tiny.gguf", dim=256, ffn=512, quant="F16")


def run(*arguments: object) -> int:
    return main(["quantize", *map(str, arguments)])


def run_json(capsys, *arguments: object) -> dict:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def error_line(capsys, *arguments: object) -> str:
    """The one line of a refusal."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def fields(path: Path) -> dict[str, tuple[object, object]]:
    """Every key with its types and value, as the gguf package reads them."""
    keys = gguf.GGUFReader(path).fields.values()
    return {f.name: (f.types, f.contents()) for f in keys if not f.name.startswith("GGUF.")}


# ---- the new file


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "BF16", "F32", "MXFP4"])
def test_the_gguf_package_reads_equal_metadata_and_the_bytes_it_would_make(name, tiny, tmp_path):
    out = tmp_path / "out.gguf"
    assert run(tiny.path, out, "--type", name, "--pure") == 0
    before, after = fields(tiny.path), fields(out)
    assert after.keys() == before.keys() | set(CHANGED)
    assert all(after[key] == before[key] for key in before.keys() - set(CHANGED))
    assert [after[key][1] for key in CHANGED] == [
        {"Q8_0": 7, "Q4_0": 2, "BF16": 32, "F32": 0, "MXFP4": 38}[name],
        2,
    ]
    tensors = gguf.GGUFReader(out).tensors
    assert [t.name for t in tensors] == list(tiny.weights)
    for tensor in tensors:
        weights = tiny.weights[tensor.name]
        kind = gguf.GGMLQuantizationType[name if weights.ndim > 1 else "F32"]
        assert tensor.tensor_type == kind and tuple(tensor.shape[::-1]) == weights.shape
        want = gguf.quants.quantize(weights, kind)
        np.testing.assert_array_equal(np.asarray(tensor.data).view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ4_NL", "Q5_1"])
def test_the_new_file_runs(name, tiny, tmp_path):
    out = tmp_path / "out.gguf"
    assert run(tiny.path, out, "--type", name) == 0
    with LLM.load(str(out), device="cpu") as llm:
        assert (
            llm.generate("hello world", max_tokens=4, temperature=0, ignore_eos=True).usage.completion_tokens
            == 4
        )


def test_eight_bits_change_no_greedy_token(tiny, tmp_path):
    texts = []
    assert run(tiny.path, tmp_path / "out.gguf", "--type", "Q8_0") == 0
    for path in (tiny.path, tmp_path / "out.gguf"):
        with LLM.load(str(path), device="cpu") as llm:
            texts.append(llm.generate("hello world", max_tokens=4, temperature=0, ignore_eos=True).token_ids)
    assert texts[0] == texts[1]


def test_every_kind_of_value_and_the_alignment_are_copied(tmp_path):
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_custom_alignment(128)
    for kind, value in (("uint8", 7), ("int8", -7), ("uint16", 700), ("int16", -700), ("int32", -70000)):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    for kind, value in (("uint64", 1 << 63), ("int64", -(1 << 62)), ("float64", 0.1), ("bool", True)):
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_string("x.text", "zwölf\n")
    for name, value in (
        ("strings", ["a", "", "ü"]),
        ("ints", [1, -2]),
        ("floats", [0.5, 1e-9]),
        ("bools", [True]),
    ):
        writer.add_array(f"x.{name}", value)
    writer.add_array("x.nested", [[1, 2], [3]])
    writer.add_uint32("general.file_type", 1)
    writer.add_uint32("x.after", 5)
    weights = np.linspace(-1, 1, 3 * 64, dtype=np.float32).reshape(3, 64)
    writer.add_tensor("a.weight", weights)
    writer.add_tensor("b.bias", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(source, out, "--type", "Q8_0") == 0

    old, new = source.read_bytes(), out.read_bytes()
    old_entries = ggufwriter.entries(old[: parse(old).header_size])
    new_entries = ggufwriter.entries(new[: parse(new).header_size])
    assert list(new_entries) == [*old_entries, "general.quantization_version"]
    assert all(new_entries[key] == entry for key, entry in old_entries.items() if key != "general.file_type")
    header = parse(new, len(new))
    assert header.alignment == 128 and len(new) % 128 == 0
    bias = header.tensors["b.bias"]
    assert new[bias.offset : bias.offset + bias.nbytes] == weights[0].tobytes()


def test_experts_of_three_dimensions_are_quantised_row_by_row(tmp_path):
    weights = np.random.default_rng(0).standard_normal((4, 3, 64)).astype(np.float32)
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_tensor("blk.0.ffn_down_exps.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(source, out, "--type", "MXFP4_MOE") == 0
    (tensor,) = gguf.GGUFReader(out).tensors
    assert tensor.tensor_type == gguf.GGMLQuantizationType.MXFP4 and list(tensor.shape) == [64, 3, 4]
    np.testing.assert_array_equal(
        np.asarray(tensor.data).reshape(-1, 17), quantize("MXFP4", weights.reshape(-1, 64))
    )


@pytest.mark.parametrize("name", ["Q4_K_M", "F32"])
def test_pieces_and_threads_change_nothing(name, tiny, tmp_path, monkeypatch):
    files = []
    for piece, threads in ((1 << 20, 1), (1 << 15, 3), (256 * 99, 1)):
        monkeypatch.setattr(convert, "PIECE", piece)
        files.append(tmp_path / f"{piece}.gguf")
        assert run(tiny.path, files[-1], "--type", name, "--threads", threads) == 0
    assert len({file.read_bytes() for file in files}) == 1


def test_only_a_few_pieces_are_in_memory(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "PIECE", 1024)
    written, ahead = 0, []

    class Counting(FileSource):
        seen = 0

        async def read_bytes(self, offset: int, nbytes: int) -> bytes:
            Counting.seen += nbytes
            ahead.append(Counting.seen - written)
            return await super().read_bytes(offset, nbytes)

    def on_progress(done: int, total: int, name: str) -> None:
        nonlocal written
        written = done

    async def convert_it() -> None:
        source = Counting(tiny.path)
        plan = await convert.make_plan(source, convert.mixture.file_type("F32"))
        Counting.seen = 0
        ahead.clear()
        with convert.new_file(tmp_path / "out.gguf", plan.nbytes) as file:
            await convert.write(plan, source, file, workers=2, on_progress=on_progress)
        source.close()

    asyncio.run(convert_it())
    assert 0 < max(ahead) <= 4 * 2 * 1024  # four pieces of F16
    assert written == sum(t.nbytes for t in parse(tiny.path.read_bytes()).tensors.values())


# ---- the summary


def test_the_summary_states_sizes_bits_and_the_true_error(tiny, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    report = run_json(capsys, tiny.path, out, "--type", "Q4_K_M")
    data = out.read_bytes()
    header = parse(data, len(data))
    assert report["nbytes"] == len(data) and report["type"] == "Q4_K_M" and report["written"]
    assert report["weight_bytes"] == sum(t.nbytes for t in header.tensors.values())
    weights = sum(w.size for w in tiny.weights.values())
    assert report["bits_per_weight"] == pytest.approx(8 * report["weight_bytes"] / weights)
    errors = [
        dequantize(
            t.type_name, np.frombuffer(data, np.uint8, t.nbytes, t.offset).reshape(-1, t.format.block_bytes)
        )
        .reshape(-1)
        .astype(np.float64)
        - tiny.weights[t.name].reshape(-1)
        for t in header.tensors.values()
        if len(t.shape) > 1
    ]
    assert report["rms_error"] == pytest.approx(np.sqrt(np.square(np.concatenate(errors)).mean()))
    assert {(row["from"], row["to"]) for row in report["types"]} == {
        ("F16", "Q4_K"),
        ("F16", "Q6_K"),
        ("F32", "F32"),
    }


def test_the_table_is_for_people(tiny, tmp_path, capsys):
    assert run(tiny.path, tmp_path / "out.gguf", "--type", "q8_0") == 0
    out = capsys.readouterr().out
    assert re.search(r"^F16 +Q8_0 +16 ", out, re.M) and re.search(r"8\.\d\d bits each, RMS error 0\.000", out)


def test_a_dry_run_states_the_size_and_writes_nothing(tiny, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    dry = run_json(capsys, tiny.path, out, "--type", "Q6_K", "--dry-run")
    assert not out.exists() and not dry["written"] and dry["rms_error"] is None
    assert run(tiny.path, out, "--type", "Q6_K", "--dry-run") == 0
    assert "nothing written" in capsys.readouterr().out
    assert run_json(capsys, tiny.path, out, "--type", "Q6_K")["nbytes"] == dry["nbytes"] == out.stat().st_size


# ---- refusals


def test_a_quantised_model_is_not_quantised_again_unless_asked(tiny, tmp_path, capsys):
    small, again = tmp_path / "small.gguf", tmp_path / "again.gguf"
    assert run(tiny.path, small, "--type", "Q8_0") == 0
    capsys.readouterr()
    line = error_line(capsys, small, again, "--type", "Q4_0")
    assert "'token_embd.weight' is quantised already, as Q8_0" in line and "--allow-requantize" in line
    assert run(small, again, "--type", "Q8_0") == 0  # the same type: copied
    assert parse(again.read_bytes()).tensors == parse(small.read_bytes()).tensors
    assert run(small, again, "--type", "Q4_0", "--allow-requantize", "--force") == 0


def test_an_existing_file_is_kept_unless_forced(tiny, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    assert "--force" in error_line(capsys, tiny.path, out, "--type", "Q8_0")
    assert out.read_text() == "mine"
    assert run(tiny.path, out, "--type", "Q8_0", "--force") == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_the_model_itself_is_never_the_target(tiny, tmp_path, capsys):
    link = tmp_path / "link.gguf"
    link.symlink_to(tiny.path)
    before = tiny.path.read_bytes()
    for target in (tiny.path, link):
        assert "is the model itself" in error_line(capsys, tiny.path, target, "--type", "Q8_0", "--force")
    assert tiny.path.read_bytes() == before


@pytest.mark.parametrize(
    ("target", "arguments", "words"),
    [
        ("", ["--force"], "is no plain file"),
        ("missing/out.gguf", [], "missing is no folder"),
        ("out.gguf", ["--threads", "0"], "--threads is 0"),
        ("out.gguf", ["--type", "Q9_K"], "there is no type 'Q9_K'"),
    ],
)
def test_a_wrong_request_is_one_line(target, arguments, words, tiny, tmp_path, capsys):
    assert words in error_line(capsys, tiny.path, tmp_path / target, "--type", "Q8_0", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "its disk has 0 MB" in error_line(capsys, tiny.path, tmp_path / "out.gguf", "--type", "Q8_0")


def patched(tiny, path: Path, name: str, value: float) -> Path:
    """The tiny model with one weight of a tensor replaced."""
    data = bytearray(tiny.path.read_bytes())
    tensor = parse(bytes(data)).tensors[name]
    struct.pack_into("<e", data, tensor.offset + 2 * 300, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_with_a_weight_that_is_no_number_is_named_and_no_file_is_left(value, tiny, tmp_path, capsys):
    model = patched(tiny, tmp_path / "in.gguf", "blk.1.ffn_up.weight", value)
    line = error_line(capsys, model, tmp_path / "out.gguf", "--type", "Q4_K_M")
    assert "tensor 'blk.1.ffn_up.weight': a weight is" in line
    assert list(tmp_path.iterdir()) == [model]


def test_a_part_of_a_split_model_is_refused(tmp_path, capsys):
    model = write_tiny(tmp_path / "m.gguf", metadata={"split.count": 2, "split.no": 0}).path
    assert "one of several parts" in error_line(capsys, model, tmp_path / "out.gguf", "--type", "Q8_0")


def test_nothing_is_left_after_ctrl_c(tiny, tmp_path, monkeypatch):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write", interrupted)
    assert run(tiny.path, tmp_path / "out.gguf", "--type", "Q8_0") == 130
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_ends_early_is_named(tiny, tmp_path):
    class Short(FileSource):
        async def read_bytes(self, offset: int, nbytes: int) -> bytes:
            return (await super().read_bytes(offset, nbytes))[: nbytes if offset < 1000 else 10]

    async def convert_it() -> None:
        source = Short(tiny.path)
        plan = await convert.make_plan(source, convert.mixture.file_type("Q8_0"))
        with convert.new_file(tmp_path / "out.gguf", plan.nbytes) as file:
            await convert.write(plan, source, file)

    with pytest.raises(convert.FormatError, match="the file ends within tensor 'token_embd"):
        asyncio.run(convert_it())
    assert list(tmp_path.iterdir()) == []
