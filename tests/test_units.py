"""Kernels for matrix units on devices without them: the fragments' work spelled out in plain WGSL."""

import asyncio
from dataclasses import replace

import pytest
from kernel_cases import cases, tensors_of
from kernel_run import run_kernel
from plain_units import spelled_out
from test_kernels import check

from realm_web.runtime import template
from realm_web.runtime.adapters import open_device

CASES = {
    case.id: case
    for case in cases()
    if case.kernel == "matmul_units" and case.consts["fmt"] in ("Q4_1", "Q6_K", "F16")
}


@pytest.fixture(scope="module")
def device():
    opened = asyncio.run(open_device("webgpu"))
    yield opened
    opened.close()


@pytest.mark.parametrize("name", CASES)
def test_what_fragments_are_made_of_is_right(device, monkeypatch, name):
    if "f16" not in device.features:
        pytest.skip(f"{device.name} has no f16")
    render = template.render

    def plain(kernel, consts):
        source = render(kernel, consts)
        return replace(source, code=spelled_out(source.code))

    monkeypatch.setattr(template, "render", plain)
    case = CASES[name]
    tensors = [tensor.tobytes() for tensor in tensors_of(case)]
    got = asyncio.run(run_kernel(device, case.kernel, case.consts, tensors, case.outputs, case.grid))
    check(case, case.consts, got)
