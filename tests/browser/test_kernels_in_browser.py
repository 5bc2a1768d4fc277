"""Every kernel in the browser, through Pyodide, against its numpy twin: the cases of the native test."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, is_dataclass, replace

import pytest
from kernel_cases import grid_of, resolve, tensors_of
from test_kernels import CASES, check

SINE = 2**-11  # what WGSL allows sin and cos to be off; SwiftShader is, by up to 2e-4


@pytest.fixture(scope="module")
def worker(browser, web):
    """ask(request) -> reply of the worker with the open device."""
    page = browser.new_page()
    page.goto(f"{web.url}kernels/kernels.html")
    yield lambda request: json.loads(page.evaluate("(request) => ask(request)", json.dumps(request)))
    page.close()


@pytest.fixture(scope="module")
def adapter(worker):
    found = worker(None)
    assert "error" not in found, found
    return found


@pytest.mark.parametrize("name", CASES)
def test_kernel_in_the_browser_equals_its_numpy_twin(worker, adapter, name):
    case = CASES[name]
    consts = resolve(case, adapter["subgroup_size"], frozenset(adapter["features"]))
    if consts is None:
        pytest.skip(f"{adapter['name']} in the browser lacks {', '.join(case.needs)}")
    grid = grid_of(case, consts)  # completes the constants
    reply = worker(
        {
            "kernel": case.kernel,
            "consts": {k: asdict(v) if is_dataclass(v) else v for k, v in consts.items()},
            "tensors": [base64.b64encode(tensor.tobytes()).decode() for tensor in tensors_of(case)],
            "outputs": case.outputs,
            "grid": grid,
        }
    )
    assert "error" not in reply, reply["error"]
    rotates = case.kernel == "rope_store" or consts.get("fused", False)
    tolerance = case.tolerance + SINE * rotates
    check(replace(case, tolerance=tolerance), consts, [base64.b64decode(data) for data in reply["outputs"]])
