"""Tiles of products of many rows: measured once, remembered, used."""

import asyncio
from dataclasses import replace

import pytest

from realm_web import tiling
from realm_web.errors import FormatError
from realm_web.ops import matmuls
from realm_web.quants import FORMATS
from realm_web.runtime.adapters import open_device
from realm_web.tensor import Weight

N, K, M = 256, 1024, 16


class Memory:
    """A store that forgets with the test."""

    def __init__(self):
        self.texts = {}

    async def get(self, name):
        return self.texts.get(name)

    async def put(self, name, text):
        self.texts[name] = text


@pytest.fixture
def device():
    """The software rasteriser, which has products of its own unless told otherwise."""
    opened = asyncio.run(open_device("webgpu"))
    opened.info = replace(opened.info, adapter_type="DiscreteGPU")
    yield opened
    opened.close()


def weights(device):
    fmt = FORMATS["Q4_K"]
    gate_up, down = (Weight.alloc(device, fmt, n, k, "w") for n, k in ((2 * N, K), (N, K)))
    return [(gate_up, "silu_mul", "norm"), (down, "", "bytes")]


def measured(device, store, **options):
    return asyncio.run(tiling.tune(device, weights(device), store, rows=(M,), x_as="ints", **options))


def test_every_product_is_measured_once_and_its_fastest_tiles_are_used(device):
    store, said = Memory(), []
    assert measured(device, store, on_message=said.append) == 2
    assert len(said) == 1
    for n, act in ((2 * N, "silu_mul"), (N, "")):
        chosen = matmuls.choose(device, "ints", "Q4_K", act, n, K, M)
        assert chosen in matmuls.candidates(device, "ints", n, K, M)
        assert device.tiles[matmuls.tiles_key("ints", "Q4_K", act, n, K, M)] == chosen
    before, device.tiles = device.tiles, {}
    assert measured(device, store) == 0
    assert device.tiles == before


def test_when_time_is_up_the_first_choice_stands(device):
    assert measured(device, Memory(), seconds=-1.0) == 0
    assert device.tiles == {}


def test_what_is_damaged_is_measured_again(device):
    store = Memory()
    store.texts[tiling.store_name(device)] = '{"a": [1]}'
    assert measured(device, store) == 2
    with pytest.raises(FormatError, match="damaged"):
        tiling.decode("[]")


def test_a_device_without_matrix_units_keeps_its_choice(device):
    assert asyncio.run(tiling.tune(device, weights(device), Memory())) == 0
