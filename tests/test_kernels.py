"""Every kernel on every device against its numpy twin."""

import asyncio

import numpy as np
import pytest
from kernel_cases import cases, error_of, grid_of, resolve, tensors_of
from kernel_run import run_kernel

from realm_web.runtime.adapters import open_device
from realm_web.runtime.cpu import TWINS
from realm_web.runtime.template import kernel_names

CASES = {case.id: case for case in cases()}


@pytest.fixture(scope="module")
def device():
    opened = asyncio.run(open_device("webgpu"))
    yield opened
    opened.close()


def check(case, consts, got):
    """Compare the bytes of the case's outputs with what the numpy twin makes of the same tensors."""
    wanted = tensors_of(case)
    padded = [np.pad(t.reshape(-1).view(np.uint8), (0, -t.nbytes % 16)) for t in wanted]
    TWINS[case.kernel](consts, padded)
    for index, data in zip(case.outputs, got, strict=True):
        want = padded[index][: wanted[index].nbytes].view(wanted[index].dtype)
        error = error_of(case, data, want)
        assert error <= case.tolerance, f"{case.id}: {error:.3g} > {case.tolerance:.3g}"


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_its_numpy_twin(device, name):
    case = CASES[name]
    consts = resolve(case, device.subgroup_size, device.features)
    if consts is None:
        pytest.skip(f"{device.name} lacks {', '.join(case.needs)}")
    grid = grid_of(case, consts)  # completes the constants
    tensors = [tensor.tobytes() for tensor in tensors_of(case)]
    check(case, consts, asyncio.run(run_kernel(device, case.kernel, consts, tensors, case.outputs, grid)))


def test_every_kernel_has_a_twin_and_a_case():
    named = {case.kernel for case in CASES.values()}
    assert set(kernel_names()) - {"subgroup_probe"} == set(TWINS) == named
