"""Which devices this machine has, which one a request means, and why; opens it.

The only place that decides between backends. In a page there is one candidate: `navigator.gpu`.
"""

from __future__ import annotations

import sys
from array import array
from dataclasses import replace
from importlib.util import find_spec

from realm_web import env
from realm_web.errors import DeviceError
from realm_web.runtime.device import AdapterInfo, Device
from realm_web.runtime.profiler import Tracer

KINDS = ("auto", "webgpu", "cpu", "dawn", "browser")
PROBE_THREADS = 256
IN_PAGE = sys.platform == "emscripten"
OPTIONAL = frozenset({"subgroups", "f16", "subgroup_matrix"})  # features that REALM_DISABLE may name


def list_adapters() -> list[AdapterInfo]:
    """Every adapter of this machine, GPUs first, numpy on the CPU last."""
    found = []
    if find_spec("wgpu"):
        from realm_web.runtime import webgpu

        found += [info for info, _ in webgpu.adapters()]
    if find_spec("numpy"):
        from realm_web.runtime import cpu

        found.append(cpu.info())
    return found


def choose(device: str = "auto") -> tuple[AdapterInfo, str]:
    """The adapter that `device` ("auto", "webgpu", "cpu", "dawn") means here, and the reason in words.

    Raises DeviceError when there is none, with the cure.
    """
    if device == "auto":
        device = env.get("REALM_DEVICE")
    if device not in KINDS[:4]:
        raise DeviceError(f"unknown device {device!r}: choose one of {', '.join(KINDS[:4])}")
    if device == "dawn":
        return _dawn(), "asked for dawn"
    found = list_adapters()
    gpus = [info for info in found if info.kind == "webgpu"]
    if device == "webgpu":
        if not gpus:
            raise DeviceError(
                "no WebGPU adapter: install wgpu (`pip install wgpu`) and a Vulkan driver "
                "(Debian: apt-get install mesa-vulkan-drivers), or use --device cpu"
            )
        return gpus[0], "asked for webgpu" + (
            "; only a software rasteriser was found, no hardware GPU" if gpus[0].is_cpu else ""
        )
    cpu = next((info for info in found if info.kind == "cpu"), None)
    if device == "cpu" and cpu:
        return cpu, "asked for cpu"
    hardware = [info for info in gpus if not info.is_cpu]
    if device == "auto" and hardware:
        return hardware[0], "the first hardware GPU"
    if cpu:
        why = (
            "the only GPU is a software rasteriser, slower than numpy" if gpus else "no GPU adapter was found"
        )
        return cpu, why
    if device == "auto" and gpus:
        return gpus[0], "no hardware GPU and no numpy: the software rasteriser is all there is"
    raise DeviceError("no device: install numpy for the CPU, or wgpu and a Vulkan driver for a GPU")


def _dawn() -> AdapterInfo:
    """Dawn's first adapter. It is not looked for unless asked for: two libraries for one GPU help nobody."""
    if not find_spec("wgpudawn"):
        raise DeviceError("no Dawn: install it with `pip install 'realm_web[dawn]'`, or use --device webgpu")
    from realm_web.runtime import dawn

    found = dawn.adapters()
    if not found:
        raise DeviceError("Dawn offers no hardware adapter here: use --device webgpu or cpu")
    return found[0][0]


async def open_device(device: str = "auto") -> Device:
    """Open the chosen device with every limit it has, less the features in REALM_DISABLE."""
    disabled = env.disabled_features()
    if unknown := disabled - OPTIONAL:
        raise DeviceError(
            f"REALM_DISABLE names {', '.join(sorted(unknown))}: it knows {', '.join(sorted(OPTIONAL))}"
        )
    if IN_PAGE:
        from realm_web.runtime import browser

        opened = Device(await browser.open_backend(), disabled=disabled, reason="the page's navigator.gpu")
        return _traced(opened)
    info, reason = choose(device)
    if info.kind == "cpu":
        from realm_web.runtime import cpu

        return _traced(Device(cpu.CPUBackend(), disabled=disabled, reason=reason))
    if info.kind == "dawn":
        from realm_web.runtime import dawn as library
    else:
        from realm_web.runtime import webgpu as library

    opened = Device(await library.open_backend(info), disabled=disabled, reason=reason)
    await _probe_subgroups(opened)
    return _traced(opened)


def _traced(device: Device) -> Device:
    """With REALM_DEBUG=2, a device that writes what the kernels of every program take."""
    if env.debug_level() >= 2 and "timestamps" in device.features:
        device.trace = Tracer(device, lambda table: print(table, file=sys.stderr))
    return device


async def _probe_subgroups(device: Device) -> None:
    """Learn the subgroup size from a kernel, where the adapter does not say; 0 stays where it is not plain.

    wgpu-native 29 reports no sizes. A kernel may trust the size only if all subgroups have it and threads
    fill them in order. Intel compiles each kernel for a size of its own choice, so nothing is trusted there.
    """
    if "subgroups" not in device.features or device.info.subgroup_size or "intel" in device.name.lower():
        return
    kernel = device.kernel("subgroup_probe")
    await device.compile()
    out = device.alloc(4 * PROBE_THREADS, "subgroup probe")
    program = device.program("subgroup probe")
    program.add(kernel, [device.view(out)], (1,))
    device.submit(program)
    words = array("I", await device.read(out))
    device.free(out)
    size = words[0] >> 16
    if all(word == (size << 16 | i % size) for i, word in enumerate(words)) if size else False:
        device.info = replace(device.info, subgroup_size=size)
