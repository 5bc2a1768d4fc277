"""Every kernel on every device against its numpy twin."""

import asyncio

import numpy as np
import pytest
from kernel_cases import cases, error_of, grid_of, resolve, tensors_of

from realm_web.runtime.adapters import open_device
from realm_web.runtime.cpu import TWINS
from realm_web.runtime.template import kernel_names

CASES = {case.id: case for case in cases()}


@pytest.fixture(scope="module")
def device():
    opened = asyncio.run(open_device("webgpu"))
    yield opened
    opened.close()


async def run(device, case, consts, tensors):
    """The bytes of the case's outputs after one run on the device."""
    grid = grid_of(case, consts)
    buffers = []
    for i, tensor in enumerate(tensors):
        data = tensor.tobytes()
        buffer = device.alloc(len(data), f"{case.id} {i}")
        device.write(buffer, data + bytes(-len(data) % 4))
        buffers.append(buffer)
    kernel = device.kernel(case.kernel, **consts)
    await device.compile()
    program = device.program(case.id)
    program.add(kernel, [device.view(buffer) for buffer in buffers], grid)
    device.submit(program)
    result = [await device.read(buffers[i]) for i in case.outputs]
    for buffer in buffers:
        device.free(buffer)
    return result


@pytest.mark.parametrize("name", CASES)
def test_kernel_equals_its_numpy_twin(device, name):
    case = CASES[name]
    consts = resolve(case, device.subgroup_size, device.features)
    if consts is None:
        pytest.skip(f"{device.name} lacks {', '.join(case.needs)}")
    got = asyncio.run(run(device, case, consts, tensors_of(case)))
    wanted = tensors_of(case)
    padded = [np.pad(t.reshape(-1).view(np.uint8), (0, -t.nbytes % 16)) for t in wanted]
    TWINS[case.kernel](consts, padded)
    for index, data in zip(case.outputs, got, strict=True):
        want = padded[index][: wanted[index].nbytes].view(wanted[index].dtype)
        error = error_of(case, data, want)
        assert error <= case.tolerance, f"{case.id}: {error:.3g} > {case.tolerance:.3g}"


def test_every_kernel_has_a_twin_and_a_case():
    named = {case.kernel for case in CASES.values()}
    assert set(kernel_names()) - {"subgroup_probe"} == set(TWINS) == named
