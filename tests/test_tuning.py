"""Choosing kernel variants by measurement, and remembering them."""

import asyncio
import json
from dataclasses import replace

import pytest
import tiny

from realm_web import tuning
from realm_web.__main__ import main
from realm_web.errors import FormatError
from realm_web.ops.matrices import Matvec, Shape, choose_matvec
from realm_web.quants import FORMATS, RUN_FORMATS
from realm_web.runtime import adapters
from realm_web.runtime.adapters import open_device
from realm_web.tensor import Weight

DEFAULT = Matvec(lanes=32, rows=1, wg=256, m_tile=1, subgroup=32, unroll=2)
OTHER = replace(DEFAULT, lanes=64)


def timing(variant: Matvec, seconds: float, key: str = "a") -> tuning.Timing:
    return tuning.Timing(key, variant, seconds, 1000)


@pytest.fixture
def device():
    """A software device that passes for hardware."""
    opened = asyncio.run(open_device("webgpu"))
    opened.info = replace(opened.info, adapter_type="DiscreteGPU")
    yield opened
    opened.close()


def matrices(device, n=64, k=256):
    weights = [Weight.alloc(device, FORMATS["Q4_0"], n, k, f"blk.{i}.w") for i in range(2)]
    plain = Weight.alloc(device, FORMATS["F16"], n, k, "plain")
    return [(weights[0], "", "norm"), (weights[1], "", "norm"), (plain, "", "norm")]


def shape(m: int) -> Shape:
    return Shape("Q4_0", 64, 256, m, act=False, own=m == 1)


def test_the_fastest_variant_of_each_product_is_chosen():
    timings = [timing(DEFAULT, 3.0), timing(OTHER, 2.0), timing(DEFAULT, 1.0, "b"), timing(OTHER, 2.0, "b")]
    assert [t.chosen for t in tuning.best(timings)] == [False, True, True, False]


def test_the_default_stays_where_another_is_hardly_faster():
    assert [t.chosen for t in tuning.best([timing(DEFAULT, 1.0), timing(OTHER, 0.99)])] == [True, False]


def test_candidates_begin_with_the_default_and_are_all_different():
    for m in (1, 8):
        default = replace(DEFAULT, m_tile=m, unroll=1)
        for k in (576, 4096, 14336):
            for act in (False, True):
                of = Shape("Q4_K", 4096, k, m, act, own=m == 1, to_bytes=act and m == 1)
                found = tuning.candidates(default, of, 512, 28 << 10)
                assert found[0] == default
                assert len(set(found)) == len(found)
                assert {v.m_tile for v in found} <= ({1} if m == 1 else {4, 8})
                assert all(v.wg % v.lanes == 0 for v in found)
                assert all(v.wg // v.lanes * v.rows % 32 == 0 for v in found[1:] if of.to_bytes)
                assert all(48 * v.m_tile * v.lanes * v.stage <= 28 << 10 for v in found)
                assert 2 <= len(found) <= (40 if m == 1 else 13)


@pytest.mark.parametrize("fmt", ["Q1_0", "IQ1_S", "IQ4_XS"])
def test_formats_that_need_large_workgroups_have_few_candidates_too(fmt):
    for own in (False, True):
        of = Shape(fmt, 4096, 14336, 1, False, own)
        found = tuning.candidates(replace(DEFAULT, unroll=1), of, 1024, 28 << 10)
        assert len(set(found)) == len(found) <= 48
        assert {v.run for v in found} == ({1, 2} if fmt in RUN_FORMATS else {1})
        assert {v.run for v in tuning.candidates(DEFAULT, replace(of, second="Q8_0"), 1024, 28 << 10)} == {1}


def test_choices_survive_being_written_down():
    chosen = {"a": DEFAULT, "b": OTHER}
    assert tuning.decode(tuning.encode("a card", chosen)) == chosen


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"chosen": {"a": 1}}', '{"chosen": {"a": {"lanes": 1}}}'])
def test_damaged_choices_are_refused_with_the_cure(text):
    with pytest.raises(FormatError, match="realm tune"):
        tuning.decode(text)


def test_a_store_of_files_gives_back_what_was_put_there(tmp_path):
    store = tuning.FileStore(tmp_path / "new")

    async def both():
        assert await store.get("a") is None
        await store.put("a", "one")
        await store.put("a", "two")
        return await store.get("a")

    assert asyncio.run(both()) == "two"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_the_cache_folder_is_the_systems(tmp_path):
    given = {"XDG_CACHE_HOME": str(tmp_path), "LOCALAPPDATA": str(tmp_path / "local")}
    assert tuning.user_folder("linux", given, tmp_path / "home") == tmp_path / "realm_web"
    assert tuning.user_folder("win32", given, tmp_path / "home") == tmp_path / "local" / "realm_web"


def test_matrices_of_equal_format_and_shape_are_one_product(device):
    (product,) = tuning.products(matrices(device))
    assert [weight.label for weight in product.weights] == ["blk.0.w", "blk.1.w"]
    assert (product.act, product.x) == ("", "norm")


def test_products_are_measured_once_and_then_remembered(device, tmp_path):
    store, said = tuning.FileStore(tmp_path), []

    async def tune(**options):
        return await tuning.tune(device, matrices(device), store, on_message=said.append, **options)

    timings = asyncio.run(tune())
    keys = {str(shape(m)) for m in (1, 8)}
    assert {t.key for t in timings} == keys == set(device.tuned)
    assert sum(t.chosen for t in timings) == 2
    assert all(t.seconds > 0 for t in timings)
    assert len(said) == 1 and "2 products" in said[0]
    chosen = dict(device.tuned)
    device.tuned = {}
    assert asyncio.run(tune()) == [] and device.tuned == chosen
    assert choose_matvec(device, shape(1), ints=True) == chosen[str(shape(1))]
    assert len(asyncio.run(tune(again=True))) == len(timings)
    assert len(said) == 2


def test_rounded_timestamps_are_taken_of_longer_runs_as_a_whole(device, tmp_path, monkeypatch):
    asked = []

    async def time_program(program, runs=16, *, whole=False):
        asked.append((len(program.steps), runs, whole))
        steps = 1 if whole else len(program.steps)
        return [max(1, round(1e-6 * len(program.steps) / tuning.ROUNDED)) * tuning.ROUNDED] * steps

    monkeypatch.setattr(device, "time_program", time_program)
    timings = asyncio.run(tuning.tune(device, matrices(device), tuning.FileStore(tmp_path)))
    assert asked[0][1:] == (1, False) and asked[0][0] < 2 * tuning.CALLS
    assert len(asked) == 1 + len(timings)
    assert all(n >= tuning.CALLS * tuning.LONGER and whole for n, _, whole in asked[1:])
    assert all(0 < t.seconds < tuning.ROUNDED / tuning.CALLS for t in timings)


def test_damaged_memories_are_measured_again(device, tmp_path):
    (tmp_path / tuning.store_name(device)).write_text("{")
    assert asyncio.run(tuning.tune(device, matrices(device), tuning.FileStore(tmp_path)))
    json.loads((tmp_path / tuning.store_name(device)).read_text())


def test_what_no_time_is_left_for_keeps_its_default(device, tmp_path):
    assert asyncio.run(tuning.tune(device, matrices(device), tuning.FileStore(tmp_path), seconds=-1)) == []
    assert device.tuned == {}


def test_a_software_device_measures_nothing(device, tmp_path):
    device.info = replace(device.info, adapter_type="CPU")
    assert asyncio.run(tuning.tune(device, matrices(device), tuning.FileStore(tmp_path / "none"))) == []
    assert not (tmp_path / "none").exists()


def test_the_command_measures_again_and_prints_every_variant(device, tmp_path, monkeypatch, capsys):
    model = tiny.write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=256, quant="Q4_K")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(adapters, "open_device", lambda name: _given(device))
    monkeypatch.setattr(device, "close", lambda: None)
    monkeypatch.setattr(tuning, "ROWS", (1,))
    assert main(["tune", str(model.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["adapter"] == device.name
    products = {timing["product"] for timing in report["timings"]}
    assert sum(timing["chosen"] for timing in report["timings"]) == len(products) == len(device.tuned)
    assert main(["tune", str(model.path)]) == 0
    assert capsys.readouterr().out.count("chosen") == len(products)


def test_the_command_refuses_a_software_device(tmp_path, capsys):
    assert (
        main(
            [
                "tune",
                str(tiny.write_tiny(tmp_path / "tiny.gguf", dim=256, ffn=256, quant="Q4_K").path),
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert "no variants to measure" in capsys.readouterr().err


async def _given(device):
    return device
