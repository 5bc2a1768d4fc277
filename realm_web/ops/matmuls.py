"""Matrix products of many rows: which kernel computes one on this device, with which tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import View

UNITS = {"coop_matrix": "naga", "subgroup_matrix": "tint"}  # feature -> the words that its compiler has


def units_of(features: frozenset[str]) -> str:
    """How kernels name the matrix units of a device with such features; "" where it has none for them."""
    return next((words for feature, words in UNITS.items() if feature in features), "")


def record(
    r: Recorder, consts: dict[str, Any], views: Sequence[View], m: int, label: str, exact: bool
) -> None:
    """Record the product of m rows. `consts` and `views` as `matmul.wgsl` has them, without its tuning."""
    bm = 32 if m <= 32 else 64
    f16 = "f16" in r.device.features and not exact
    kernel = r.device.kernel("matmul", **consts, bm=bm, f16=f16)
    grid = (-(-consts["n"] // (32 if consts["act"] else 64)), -(-m // bm))
    r.add(kernel, views, grid, f"{kernel.name} {label}")
