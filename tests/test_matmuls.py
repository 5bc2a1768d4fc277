"""The choice of tiles for products of many rows: valid for every shape, and enough of them."""

from dataclasses import replace

import pytest

from realm_web.ops import matmuls
from realm_web.runtime import cpu

SHAPES = [
    (28672, 4096),
    (4096, 14336),
    (4096, 4096),
    (128256, 4096),
    (1536, 576),
    (576, 1536),
    (70, 96),
    (64, 32),
]
ROWS = (9, 16, 17, 32, 64, 65, 128, 512, 2048)


class Hardware:
    """As much of a device as the choice looks at."""

    def __init__(self, max_shared: int):
        self.features = frozenset({"f16", "subgroups", "subgroup_matrix"})
        self.subgroup_size = 32
        self.tiles = {}
        self.limits = replace(cpu.info().limits, max_shared=max_shared)


def shared_bytes(tiles: matmuls.Tiles) -> int:
    """Workgroup memory, as `matmul.wgsl` and `matmul_units.wgsl` declare it."""
    t, bm, bn = dict(tiles.tuning), tiles.bm, tiles.bn
    if tiles.kernel == "matmul_units":
        subgroups = bm // t["sm"] * (bn // t["sn"])
        tile = 2 * (bn * (32 * t["chunks"] + 8) + 32 * t["chunks"] * (bm + 8)) * t["stages"]
        return tile + 4 * 2 * 256 * subgroups
    if t["x_as"] == "f32":
        return 16 * 8 * t["chunks"] * (bm + bn) * t["stages"]
    return (16 * (2 * t["chunks"] + 1) + 4 * 4 * t["chunks"]) * (bm + bn) * t["stages"]


def threads(tiles: matmuls.Tiles) -> int:
    t = dict(tiles.tuning)
    if tiles.kernel == "matmul_units":
        return 32 * (tiles.bm // t["sm"]) * (tiles.bn // t["sn"])
    return tiles.bm // t["tm"] * (tiles.bn // t["tn"])


@pytest.mark.parametrize(
    ("x_as", "max_shared"), (("halves", 48), ("ints", 16), ("ints", 48), ("f32", 16), ("f32", 48))
)
def test_every_choice_fits_the_shape_and_the_device(x_as, max_shared):
    max_shared <<= 10
    device = Hardware(max_shared)
    for n, k in SHAPES:
        for m in ROWS:
            check_all(matmuls.candidates(device, x_as, n, k, m), k, max_shared)


def check_all(candidates: tuple[matmuls.Tiles, ...], k: int, max_shared: int) -> None:
    for tiles in candidates:
        t = dict(tiles.tuning)
        assert k // 32 % (tiles.splits * t["chunks"]) == 0
        assert shared_bytes(tiles) <= max_shared
        assert 32 <= threads(tiles) <= 256
        assert tiles.bn % (2 * tiles.group) == 0  # gates and their values share a tile
        if tiles.kernel == "matmul_units":
            assert tiles.bm % t["sm"] == tiles.bn % t["sn"] == t["sm"] % 16 == t["sn"] % 32 == 0


def test_few_tiles_are_cut_along_k_and_many_are_not():
    device = Hardware(48 << 10)
    assert matmuls.choose(device, "ints", "Q4_K", "", 4096, 14336, 16).splits > 1
    assert matmuls.choose(device, "ints", "Q4_K", "", 128256, 4096, 16).splits == 1
    assert matmuls.choose(device, "ints", "Q4_K", "", 4096, 14336, 2048).splits == 1


def test_shares_of_k_fit_a_binding():
    device = Hardware(48 << 10)
    device.limits = replace(device.limits, max_binding=128 << 20)
    many = matmuls.candidates(device, "halves", 28672, 4096, 512)[0]
    device.tiles = {matmuls.tiles_key("halves", "Q4_K", "", 28672, 4096, 512): replace(many, splits=8)}
    for m, splits in ((512, 2), (2048, 1)):
        tiles = matmuls.choose(device, "halves", "Q4_K", "", 28672, 4096, m)
        assert tiles.splits == splits
        assert splits == 1 or tiles.shares_nbytes(28672, m) <= device.limits.max_binding
