"""The Dawn backend, where its package and an adapter are; what is said where they are not."""

import asyncio
from importlib.util import find_spec

import pytest
from kernel_cases import cases, grid_of, resolve, tensors_of
from kernel_run import run_kernel
from test_kernels import check

from realm_web.errors import DeviceError
from realm_web.runtime import adapters

CASES = {
    case.id: case for case in cases() if case.kernel in ("matmul", "matmul_units", "half_rows", "matvec")
}


def test_without_the_package_its_name_is_said(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"realm_web\[dawn\]"):
        asyncio.run(adapters.open_device("dawn"))


@pytest.fixture(scope="module")
def device():
    if not find_spec("wgpudawn"):
        pytest.skip("wgpudawn is not installed")
    try:
        opened = asyncio.run(adapters.open_device("dawn"))
    except DeviceError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", CASES)
def test_products_equal_their_numpy_twins_through_dawn(device, name):
    case = CASES[name]
    consts = resolve(case, device.subgroup_size, device.features)
    if consts is None:
        pytest.skip(f"{device.name} lacks {', '.join(case.needs)}")
    grid = grid_of(case, consts)  # completes the constants
    tensors = [tensor.tobytes() for tensor in tensors_of(case)]
    check(case, consts, asyncio.run(run_kernel(device, case.kernel, consts, tensors, case.outputs, grid)))
