#!/usr/bin/env python3
"""Assemble `web/assets/`: all that the page loads beside its own files, so that it makes no outside request.

    python web/build_site.py            build if missing or older than the sources
    python web/build_site.py --check    exit status 1 and one line if the assets are missing or stale

What comes in, each by exact version and SHA-256 (the table below):
- Pyodide's four core files, from the npm package (`npm pack`);
- the jinja2 wheel, and MarkupSafe as a pure Python wheel built from its sdist (without its C accelerator);
- the realm_web wheel, built from this checkout;
- `pyodide-lock.json` with just these three wheels and their checksums, made by pyodide-lock's
  `lockfile add-wheels` (what `pyodide lockfile` runs). Names only: Pyodide looks for them beside the lock.

Knows nothing of the page or of serving it. Standard library only; the tools it needs go into a private
virtual environment under `build/site/`, downloads are kept beside it. First run about 10 s, after a change of
the package about 1 s, else 0.1 s.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "web" / "assets"
WORK = ROOT / "build" / "site"

PYODIDE = "314.0.7"
PYODIDE_FILES = {
    "pyodide.mjs": "6f1d60f7bf529beb300f0f47983c921d3982363640ba20af0e38efdddbc66109",
    "pyodide.asm.mjs": "f7cdc8ece80678ceb712f8e65ebe6d3a83203a180c399865f49612a051693635",
    "pyodide.asm.wasm": "cc36e3cab04fdfc9a63ff13eb52eae2b911bf46c025cc7b281f394bd3de1d5e6",
    "python_stdlib.zip": "fa1957e5777068fc4f7437f96d860ae2fbe9c19732ba06c84e004ec16dd7dd7a",
    "pyodide-lock.json": "5dc2fc119108bc148c7457dc86e7675b5c87e1cafd420b9c34c1eaef7b36c010",
}
JINJA2 = "jinja2==3.1.6 --hash=sha256:85ece4451f492d0c13c5dd7c13a64681a86afae63a5f347908daf103ce6d2f67"
MARKUPSAFE = (
    "markupsafe==3.0.4 --hash=sha256:2e9ad7dd851bf45fab9f75cbff4cb493fee9979e8d8c7c9c3ee119022518edd6"
)
# 0.2 needs Python 3.12; both read and write the same lock format.
LOCK_TOOL = [
    "pyodide-lock==0.1.2" if sys.version_info < (3, 12) else "pyodide-lock==0.2.1",
    "pkginfo==2.0",
    "click",
]
STAMP = "stamp.json"
EPOCH = "315532800"  # 1980-01-01, the first date a wheel can carry: equal sources, equal wheels


class BuildError(Exception):
    """One line: what could not be assembled, and the cure."""


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def package_files() -> Iterator[Path]:
    """The files that the realm_web wheel is made of, in a fixed order."""
    yield from (ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE") if (ROOT / name).exists())
    for path in sorted((ROOT / "realm_web").rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def inputs_digest() -> str:
    """Changes whenever the assets have to be made again: sources of the wheel, this script."""
    digest = hashlib.sha256()
    for path in (Path(__file__).resolve(), *package_files()):
        digest.update(f"{path.relative_to(ROOT)}\0{sha256(path)}\0".encode())
    return digest.hexdigest()


def fault(digest: str) -> str | None:
    """Why the assets cannot be used as they are; None when they are complete and fresh."""
    try:
        stamp = json.loads((ASSETS / STAMP).read_text())
    except (OSError, ValueError):
        return "not built yet"
    if stamp["inputs"] != digest:
        return "older than the sources"
    for name, expected in stamp["files"].items():
        if not (ASSETS / name).exists() or sha256(ASSETS / name) != expected:
            return f"{name} is missing or damaged"
    return None


def run(command: list[str], what: str, **env: str) -> None:
    """Run a tool quietly; what it said is shown only when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    except FileNotFoundError:
        raise BuildError(f"{what} needs `{command[0]}`, which is not installed") from None
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-12:]
        raise BuildError(
            f"{what} failed (`{command[0]}` exit status {done.returncode}):\n  " + "\n  ".join(said)
        )


def tools() -> str:
    """Path of the private environment's Python, with the lock tool and our build backend in it."""
    home = WORK / "tools"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    build_backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    wanted = "\n".join(
        [f"python {sys.version_info.major}.{sys.version_info.minor}", *LOCK_TOOL, *build_backend]
    )
    marker = home / "installed.txt"
    if not python.exists() or not marker.exists() or marker.read_text() != wanted:
        shutil.rmtree(home, ignore_errors=True)
        venv.create(home, with_pip=True)
        run(
            [str(python), "-m", "pip", "install", "-q", *LOCK_TOOL, *build_backend],
            "installing the lock tool",
        )
        marker.write_text(wanted)
    return str(python)


def verify(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        path.unlink()
        raise BuildError(f"{path.name}: SHA-256 is {found}, expected {expected}; refused")


def fetch_pyodide(cache: Path) -> Path:
    """Folder with Pyodide's files, each checked."""
    folder = cache / f"pyodide-{PYODIDE}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            command = ["npm", "pack", f"pyodide@{PYODIDE}", "--silent", "--pack-destination", scratch]
            run([shutil.which("npm") or "npm", *command[1:]], f"fetching Pyodide {PYODIDE}")
            fresh = Path(scratch) / "files"
            fresh.mkdir()
            with tarfile.open(Path(scratch) / f"pyodide-{PYODIDE}.tgz") as package:
                for name in PYODIDE_FILES:
                    (fresh / name).write_bytes(package.extractfile(f"package/{name}").read())
            fresh.rename(folder)
    for name, expected in PYODIDE_FILES.items():
        verify(folder / name, expected)
    return folder


def fetch_wheels(python: str, cache: Path) -> list[Path]:
    """jinja2 as published; MarkupSafe without its C part, which its set-up skips when the compiler fails."""
    folder = cache / "wheels"
    folder.mkdir(exist_ok=True)
    # no cache: pip would hand out a MarkupSafe that it once built with a working compiler
    for requirement, options in ((JINJA2, []), (MARKUPSAFE, ["--no-binary=markupsafe", "--no-cache-dir"])):
        name, version = requirement.split()[0].split("==")
        if any(folder.glob(f"{name}-{version}-py3-none-any.whl")):
            continue
        wanted = cache / f"{name}.txt"
        wanted.write_text(requirement + "\n")
        command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--require-hashes", *options]
        command += ["-w", str(folder), "-r", str(wanted)]
        run(command, f"fetching {name}", CC="/bin/false", SOURCE_DATE_EPOCH=EPOCH)
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        if not wheel.name.endswith("-none-any.whl"):
            raise BuildError(f"{wheel.name} is not a pure Python wheel: the page cannot load it")
    return wheels


def build_own_wheel(python: str, scratch: Path) -> Path:
    """The realm_web wheel, from a clean copy: nothing is left in the checkout, nothing stale gets in."""
    source = scratch / "source"
    for path in package_files():
        target = source / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    command = [python, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(scratch)]
    command.append(str(source))
    run(command, "building the realm_web wheel", SOURCE_DATE_EPOCH=EPOCH)
    return next(scratch.glob("realm_web-*.whl"))


def write_lock(python: str, npm_lock: Path, wheels: list[Path], out: Path, scratch: Path) -> None:
    """The site's lock: Pyodide's own header, only the packages that lie beside it."""
    info = json.loads(npm_lock.read_text())["info"]
    base, made = scratch / "base.json", scratch / "made.json"
    # pyodide-lock 0.1 insists on the (now deprecated) version; the header is restored below
    base.write_text(json.dumps({"info": {**info, "version": PYODIDE}, "packages": {}}))
    tool = "from pyodide_lock.cli import main; main()"
    command = [
        python,
        "-c",
        tool,
        "add-wheels",
        "--input",
        str(base),
        "--output",
        str(made),
        *map(str, wheels),
    ]
    run(command, "writing the site's lock file")
    packages = json.loads(made.read_text())["packages"]
    for name, package in packages.items():
        if "/" in package["file_name"] or not package["sha256"]:
            raise BuildError(f"the lock entry of {name} is not a local file with a checksum")
    out.write_text(json.dumps({"info": info, "packages": packages}, indent=1, sort_keys=True) + "\n")


def build(digest: str) -> None:
    cache = WORK / "downloads"
    cache.mkdir(parents=True, exist_ok=True)
    python = tools()
    pyodide = fetch_pyodide(cache)
    with tempfile.TemporaryDirectory(dir=WORK) as scratch_name:
        scratch, site = Path(scratch_name), Path(scratch_name) / "assets"
        site.mkdir()
        for name in PYODIDE_FILES:
            if name != "pyodide-lock.json":
                shutil.copyfile(pyodide / name, site / name)
        wheels = [*fetch_wheels(python, cache), build_own_wheel(python, scratch)]
        wheels = [Path(shutil.copy(wheel, site)) for wheel in wheels]
        write_lock(python, pyodide / "pyodide-lock.json", wheels, site / "pyodide-lock.json", scratch)
        files = {path.name: sha256(path) for path in sorted(site.iterdir())}
        (site / STAMP).write_text(json.dumps({"inputs": digest, "files": files}, indent=1) + "\n")
        if ASSETS.exists():
            ASSETS.rename(scratch / "old")
        site.rename(ASSETS)  # whole at any time, also for a server that is running


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="only say whether the assets are complete and fresh"
    )
    arguments = parser.parse_args()
    digest = inputs_digest()
    reason = fault(digest)
    if reason is None:
        print("web/assets: up to date")
        return 0
    if arguments.check:
        print(f"web/assets: {reason}; run `python web/build_site.py`")
        return 1
    print(f"web/assets: {reason}, building", flush=True)
    try:
        build(digest)
    except BuildError as error:
        print(f"web/build_site.py: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in ASSETS.iterdir())
    print(f"web/assets: {len(list(ASSETS.iterdir()))} files, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
