"""Which tiles are fastest for products of many rows on matrix units: measured, and remembered.

Every choice gives the same numbers up to rounding. What a driver makes of these kernels cannot be foreseen
(`matmuls.candidates`), so each product of a model tries a few, once for an adapter, driver and text of the
kernel. Devices without matrix units keep `matmuls.choose`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from realm_web.errors import FormatError
from realm_web.ops import Recorder, linear, matmuls
from realm_web.ops.matmuls import Tiles
from realm_web.runtime import profiler
from realm_web.runtime.device import Buffer, Device
from realm_web.runtime.template import SHADERS
from realm_web.step import StepLayout
from realm_web.tensor import Tensor, Weight
from realm_web.tuning import Store

SECONDS = 3.0  # for all products of a model; the rest is measured at later starts, or by `realm tune`
ROWS = (512, 32, 64, 16)  # of activations: a prompt, and conversations side by side
CALLS = 6  # of a variant in a run, over as many layers' weights
RUNS = 2
LONG = 8e-3  # seconds that a measurement takes at least: waiting for a browser's GPU process costs up to 1 ms
MARGIN = 0.03  # differences below are noise
LARGEST = 1 << 16  # rows of weights; a vocabulary's product takes the first choice


async def tune(
    device: Device,
    matrices: Iterable[tuple[Weight, str, str]],
    store: Store,
    *,
    again: bool = False,
    seconds: float = SECONDS,
    rows: Sequence[int] = ROWS,
    x_as: str = "halves",
    on_message: Callable[[str], None] | None = None,
) -> int:
    """Set `device.tiles` from the store, measuring what is not there, or all `again`; returns how many were.

    `x_as`: for which form of activations, as `matmuls.form_of` has it.
    """
    if x_as == "halves" and not matmuls.has_units(device):
        return 0
    name = store_name(device)
    known = await _remembered(store, name)
    device.tiles = dict(known)
    todo = [
        (key, x_as, weights, act, residual, m)
        for m in rows
        for weights, act, residual in _alike(matrices)
        if (key := _key(x_as, weights[0], act, m)) not in known or again
    ]
    if not todo:
        return 0
    if on_message:
        on_message(f"measuring {len(todo)} products of many rows on {device.name} (once)")
    end, longest, found = time.perf_counter() + seconds, 0.0, {}
    for key, *product in todo:
        begin = time.perf_counter()
        if begin + longest > end:
            break
        found[key] = await _fastest(device, key, *product)
        longest = max(longest, time.perf_counter() - begin)
    device.tiles = known | found
    await store.put(name, encode(device.tiles))
    return len(found)


def encode(tiles: dict[str, Tiles]) -> str:
    return json.dumps({key: [t.kernel, t.bm, t.bn, t.tuning, t.group, t.splits] for key, t in tiles.items()})


def decode(text: str) -> dict[str, Tiles]:
    """What `encode` wrote. FormatError for anything else."""
    try:
        return {str(key): _tiles(*fields) for key, fields in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"remembered tiles are damaged ({error})") from None


def _tiles(kernel: Any, bm: Any, bn: Any, tuning: Any, group: Any, splits: Any) -> Tiles:
    pairs = tuple((str(name), value if isinstance(value, str) else int(value)) for name, value in tuning)
    return Tiles(str(kernel), int(bm), int(bn), pairs, int(group), int(splits))


def store_name(device: Device) -> str:
    """The name under which choices for this adapter, driver and kernel are kept."""
    digest = hashlib.sha256()
    for path in sorted(SHADERS.glob("**/*.wgsl")):
        if path.stem.startswith("matmul") or path.parent.name in ("lib", "quant"):
            digest.update(path.read_bytes())
    digest.update(f"{device.kind}\0{device.name}\0{device.info.driver}\0{device.info.backend}".encode())
    return f"tiles-{digest.hexdigest()[:16]}.json"


async def _remembered(store: Store, name: str) -> dict[str, Tiles]:
    """What the store has; nothing where that is damaged, as it will be measured again."""
    text = await store.get(name)
    try:
        return decode(text) if text else {}
    except FormatError:
        return {}


def _alike(matrices: Iterable[tuple[Weight, str, str]]) -> list[tuple[list[Weight], str, bool]]:
    """Weights of one shape and use, the largest first. What takes no norm adds to its output."""
    groups: dict[tuple, list[Weight]] = {}
    for weight, act, x in matrices:
        if len(weight.shards) == 1 and weight.n < LARGEST:
            groups.setdefault((weight.n, weight.k, weight.fmt.name, act, x != "norm"), []).append(weight)
    ordered = sorted(groups, key=lambda group: -group[0] * group[1])
    return [(groups[group], group[3], group[4]) for group in ordered]


def _key(x_as: str, weight: Weight, act: str, m: int) -> str:
    return matmuls.tiles_key(x_as, weight.fmt.name, act, weight.n, weight.k, m)


async def _fastest(
    device: Device, key: str, x_as: str, weights: list[Weight], act: str, residual: bool, m: int
) -> Tiles:  # fmt: skip
    layout = StepLayout(max_rows=m, max_seqs=1, max_blocks=1)
    rows = range(m)
    words = layout.pack(tokens=rows, positions=rows, row_seqs=rows, records=[], tiles=[], advance=False)
    step = device.alloc(len(words), "tiling")
    device.write(step, words)
    arena: dict[str, Tensor] = {}
    n, k, before = weights[0].n // (2 if act else 1), weights[0].k, device.tiles
    tried, programs = matmuls.candidates(device, x_as, weights[0].n, k, m), []
    try:
        for tiles in tried:
            device.tiles = {key: tiles}
            view = device.view(step)
            r = Recorder(
                device, device.program("tiling"), layout, view, view, n_rows=m, n_seqs=1, qt=1, context=1,
                arena=arena, exact=False,
            )  # fmt: skip
            x, out = r.scratch("x", m, k), r.scratch("out", m, n)
            for i in range(CALLS):
                linear(r, x, weights[i % len(weights)], out, act=act, residual=residual)
            programs.append(r.program)
        await device.compile()
        once = await profiler.timed(device, programs[0], RUNS)
        runs = max(RUNS, min(int(LONG / max(once, 1e-6)), 200))
        seconds = [await profiler.timed(device, program, runs) for program in programs]
    finally:
        device.tiles = before
        _free(device, [step, *(tensor.buffer for tensor in arena.values())])
    good = min(seconds) / (1 - MARGIN)
    return next(tiles for tiles, needed in zip(tried, seconds, strict=True) if needed <= good)


def _free(device: Device, buffers: Iterable[Buffer]) -> None:
    for buffer in buffers:
        device.free(buffer)
