"""The drawing of rates: well-formed, every engine and point in it, mistakes named."""

import importlib.util
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "plot.py"
spec = importlib.util.spec_from_file_location("plot", SCRIPT)
plot = sys.modules["plot"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def ours(size: int, **rates: float) -> str:
    tests = {name.replace("_", "@"): {"median": rate} for name, rate in rates.items()}
    tests["tg128"]["weight_bytes_per_token"] = size
    return json.dumps(tests)


def theirs(size: int, rates: dict[int, float]) -> str:
    tests = [
        {"n_prompt": 0, "n_gen": 128, "n_depth": depth, "avg_ts": rate, "model_size": size}
        for depth, rate in rates.items()
    ]
    return json.dumps(tests)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a-small.json").write_text(ours(98_000_000, tg128=900, tg128_d8192=700))
    (tmp_path / "a-large.json").write_text(ours(4_700_000_000, tg128=450, tg128_d8192=400))
    (tmp_path / "b-large.json").write_text(theirs(4_900_000_000, {0: 277, 8192: 250}))
    return tmp_path


def test_the_drawing_shows_every_engine_and_every_point(folder):
    out = folder / "rates.svg"
    series = [f"Ours & more={folder}/a-*.json", f"Theirs={folder}/b-*.json"]
    subprocess.run([sys.executable, SCRIPT, out, *series, "--bandwidth", "3850"], check=True)
    root = ET.parse(out).getroot()
    name = "{http://www.w3.org/2000/svg}"
    texts = {element.text for element in root.iter(f"{name}text")}
    assert {"Ours & more", "Theirs", "limit of the bandwidth", "tokens before"} <= texts
    assert any("model of 4.9 GB" in text for text in texts)
    assert len(list(root.iter(f"{name}circle"))) == (2 + 1) + (2 + 2)
    for circle in root.iter(f"{name}circle"):
        assert 0 < float(circle.get("cx")) < plot.WIDTH and 0 < float(circle.get("cy")) < plot.HEIGHT


def test_faster_is_higher_and_larger_is_further_right(folder):
    points = plot.read_series(f"x={folder}/a-*.json").by_size
    assert points == [(98_000_000, 900), (4_700_000_000, 450)]
    x = plot.Axis(1e7, 1e10, 0, 100, log=True)
    assert x(points[0][0]) < x(points[1][0]) and x.ticks[0] == 1e7
    assert plot.Axis(0, 8601.6, 0, 100).ticks == [0, 2000, 4000, 6000, 8000]


def test_files_that_are_missing_or_tell_no_size_are_named(folder):
    with pytest.raises(ValueError, match="no file is named"):
        plot.read_series(f"x={folder}/c-*.json")
    (folder / "c.json").write_text('{"tg128": {"median": 1}}')
    with pytest.raises(ValueError, match="does not tell the size"):
        plot.read_series(f"x={folder}/c.json")
