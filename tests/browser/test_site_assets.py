"""What `web/build_site.py` assembles: complete, checked, free of addresses, and built only when needed."""

import hashlib
import json
import subprocess
import sys
import zipfile

import pytest

from realm_web.runtime.template import kernel_names


@pytest.fixture
def assets(site):
    return site.root / "assets"


def test_the_lock_names_three_local_wheels_by_checksum_and_no_address(assets):
    text = (assets / "pyodide-lock.json").read_text()
    packages = json.loads(text)["packages"]
    assert set(packages) == {"realm-web", "jinja2", "markupsafe"}
    assert "://" not in text
    for package in packages.values():
        digest = hashlib.sha256((assets / package["file_name"]).read_bytes()).hexdigest()
        assert package["sha256"] == digest and package["file_name"].endswith("-none-any.whl")
    assert packages["realm-web"]["depends"] == ["jinja2"]


def test_our_wheel_holds_the_kernels_and_not_the_site(assets):
    (wheel,) = assets.glob("realm_web-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"realm_web/shaders/{name}.wgsl" for name in kernel_names()} <= set(names)
    assert not [name for name in names if name.startswith(("web/", "tests/")) or "__pycache__" in name]


def test_a_second_build_finds_nothing_to_do_and_damage_is_noticed(assets):
    script = [sys.executable, assets.parent / "build_site.py", "--check"]
    fresh = subprocess.run(script, capture_output=True, text=True)
    assert (fresh.returncode, fresh.stdout) == (0, "web/assets: up to date\n")
    stdlib = assets / "python_stdlib.zip"
    whole = stdlib.read_bytes()
    stdlib.write_bytes(whole[:-1])
    try:
        damaged = subprocess.run(script, capture_output=True, text=True)
    finally:
        stdlib.write_bytes(whole)
    assert damaged.returncode == 1 and "python_stdlib.zip is missing or damaged" in damaged.stdout
