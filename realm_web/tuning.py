"""Which variant of the matrix-vector kernel is fastest for each product of a model: measured, and remembered.

Every variant gives the same numbers up to rounding, so this is about time alone. An adapter that has not seen
a product before times a few variants of it over the model's own weights, which takes well under a second a
product; the outcome is kept by adapter, driver and text of the kernel. Where nothing is measured (software
devices, or time is up) `ops.choose_matvec` has defaults. Knows weights; knows no architecture and no file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from realm_web.errors import FormatError
from realm_web.ops import Activations, Recorder, linear
from realm_web.ops.matrices import MATVEC_ROWS, Matvec, default_matvec, product_key
from realm_web.quants import activation_words
from realm_web.runtime import profiler
from realm_web.runtime.device import Device, Program, View
from realm_web.runtime.template import SHADERS
from realm_web.step import StepLayout
from realm_web.tensor import Tensor, Weight

SECONDS = 3.0  # for all products of a model
ROWS = (1, MATVEC_ROWS)  # of activations: one conversation, and as many as one reading of the weights serves
CALLS = 24  # of a variant in a run, over as many layers' weights
RUNS = 4


class Store(Protocol):
    """Texts by name that outlive the program: files natively, the page's own storage there."""

    async def get(self, name: str) -> str | None: ...

    async def put(self, name: str, text: str) -> None: ...


class FileStore:
    """Texts as files in one folder, which is made when something is put there."""

    def __init__(self, folder: Path):
        self._folder = folder

    async def get(self, name: str) -> str | None:
        path = self._folder / name
        return path.read_text() if path.is_file() else None

    async def put(self, name: str, text: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        part = self._folder / f"{name}.{os.getpid()}.part"
        part.write_text(text)
        part.replace(self._folder / name)  # readers see all of it or nothing


def user_folder(platform: str, environ: Mapping[str, str], home: Path) -> Path:
    """Where a program keeps what it can make again, on this system.

    >>> user_folder("linux", {}, Path("/home/a")).as_posix()
    '/home/a/.cache/realm_web'
    >>> user_folder("darwin", {}, Path("/Users/a")).as_posix()
    '/Users/a/Library/Caches/realm_web'
    """
    if platform == "win32":
        base = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "realm_web"


def user_store() -> FileStore:
    return FileStore(user_folder(sys.platform, os.environ, Path.home()))


@dataclass(frozen=True)
class Product:
    """Weights of one format and shape, all of which a pass multiplies with: those of the layers."""

    weights: tuple[Weight, ...]
    act: str

    @property
    def n(self) -> int:
        """Outputs; with a gate half of the weight's rows."""
        return self.weights[0].shards[0].n_rows // (2 if self.act else 1)

    def key(self, m: int) -> str:
        weight = self.weights[0]
        return product_key(weight.fmt.name, self.n, weight.k, m, act=bool(self.act))

    def default(self, device: Device, m: int) -> Matvec:
        return default_matvec(device, self.n, self.weights[0].k, m, ints=True, act=bool(self.act))


@dataclass(frozen=True)
class Timing:
    """One variant of one product: its time, and what it reads in that."""

    key: str
    variant: Matvec
    seconds: float
    nbytes: int
    chosen: bool = False

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


def products(matrices: Iterable[tuple[Weight, str]]) -> list[Product]:
    """The matrices of a model, each with its activation or "", those alike together; floats are left out."""
    alike: dict[tuple, list[Weight]] = {}
    for weight, act in matrices:
        if weight.fmt.is_quantised:
            shape = weight.fmt.name, weight.shards[0].n_rows, weight.k, act
            alike.setdefault(shape, []).append(weight)
    return [Product(tuple(weights), act) for (*_, act), weights in alike.items()]


def candidates(default: Matvec, k: int, *, act: bool) -> tuple[Matvec, ...]:
    """The default, then what differs from it in one or two constants and could be faster."""
    size = default.subgroup or 16
    chunks = k // 32
    found = [default]
    for lanes in (size, 2 * size, 4 * size):
        for rows in (1, 2, 4):
            for unroll in (1, 2, 4):
                variant = replace(default, lanes=lanes, rows=rows, unroll=unroll, wg=max(default.wg, lanes))
                if variant not in found and _sensible(variant, chunks, act=act):
                    found.append(variant)
    return tuple(found)


def _sensible(v: Matvec, chunks: int, *, act: bool) -> bool:
    """Neither idle lanes, nor more loads and sums than a thread has registers for."""
    if v.lanes * v.unroll > max(chunks, v.subgroup or 16):
        return False
    loads = v.rows * v.unroll * (2 if act else 1)
    sums = v.rows * v.m_tile * (2 if act else 1)
    return loads <= 8 and sums <= 32 and (v.m_tile == 1 or v.unroll == 1)


def best(timings: Sequence[Timing], *, margin: float = 0.02) -> list[Timing]:
    """The same timings, one of each product marked as chosen: the fastest, or the first if hardly slower.

    The first is the default: differences below `margin` are noise.
    """
    chosen: dict[str, Timing] = {}
    for timing in timings:
        have = chosen.get(timing.key)
        if have is None or timing.seconds < have.seconds * (1 - margin):
            chosen[timing.key] = timing
    return [replace(timing, chosen=chosen[timing.key] is timing) for timing in timings]


def encode(adapter: str, chosen: dict[str, Matvec]) -> str:
    return json.dumps({"adapter": adapter, "chosen": {k: asdict(v) for k, v in chosen.items()}}, indent=1)


def decode(text: str) -> dict[str, Matvec]:
    """What `encode` wrote. FormatError for anything else."""
    try:
        data = json.loads(text)["chosen"]
        return {str(key): Matvec(**{k: int(v) for k, v in fields.items()}) for key, fields in data.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"remembered kernel variants are damaged ({error}): run `realm tune`") from None


def store_name(device: Device) -> str:
    """The name under which choices for this adapter, driver and kernel are kept."""
    digest = hashlib.sha256()
    for path in sorted(SHADERS.glob("**/*.wgsl")):
        if path.stem == "matvec" or path.parent.name in ("lib", "quant"):
            digest.update(path.read_bytes())
    size = device.subgroup_size
    digest.update(f"{device.name}\0{device.info.driver}\0{device.info.backend}\0{size}".encode())
    return f"tuning-{digest.hexdigest()[:16]}.json"


async def tune(
    device: Device,
    matrices: Iterable[tuple[Weight, str]],
    store: Store,
    *,
    again: bool = False,
    seconds: float = SECONDS,
    on_message: Callable[[str], None] | None = None,
) -> list[Timing]:
    """Set `device.tuned` for these matrices from the store, measuring what is not there; all with `again`.

    Returns what was measured. A software device keeps its defaults: there is nothing to choose.
    """
    if device.info.is_cpu:
        return []
    name = store_name(device)
    known = await _remembered(store, name)
    device.tuned = dict(known)
    todo = [(p, m) for p in products(matrices) for m in ROWS if again or p.key(m) not in known]
    if not todo:
        return []
    if on_message:
        on_message(f"measuring {len(todo)} products on {device.name} (once)")
    timings = best(await measure(device, todo, seconds))
    device.tuned |= {timing.key: timing.variant for timing in timings if timing.chosen}
    await store.put(name, encode(device.name, device.tuned))
    return timings


async def _remembered(store: Store, name: str) -> dict[str, Matvec]:
    """What the store has; nothing where that is damaged, as it will be measured again."""
    text = await store.get(name)
    try:
        return decode(text) if text else {}
    except FormatError:
        return {}


async def measure(
    device: Device, todo: Sequence[tuple[Product, int]], seconds: float = SECONDS
) -> list[Timing]:
    """The time of every variant of each product with m rows, until `seconds` are over.

    `device.tuned` is what it was before.
    """
    layout = StepLayout(max_rows=MATVEC_ROWS, max_seqs=1, max_blocks=1)
    step = device.alloc(4 * layout.n_words, "tuning")
    rows = range(MATVEC_ROWS)
    device.write(
        step, layout.pack(tokens=rows, positions=rows, row_seqs=rows, records=[], tiles=[], advance=False)
    )
    arena = _scratch(device, [product for product, _ in todo])
    before, timings, end = device.tuned, [], time.perf_counter() + seconds
    try:
        for product, m in todo:
            if time.perf_counter() > end:
                break
            tried = candidates(product.default(device, m), product.weights[0].k, act=bool(product.act))
            programs = []
            for variant in tried:
                device.tuned = {product.key(m): variant}
                programs.append(_program(device, product, m, layout, device.view(step), arena))
            await device.compile()
            for variant, program in zip(tried, programs, strict=True):
                spent = await _seconds(device, program) / CALLS
                timings.append(Timing(product.key(m), variant, spent, product.weights[0].nbytes))
    finally:
        device.tuned = before
        for buffer in (step, *(tensor.buffer for tensor in arena.values())):
            device.free(buffer)
    return timings


def _scratch(device: Device, products: Sequence[Product]) -> dict[str, Tensor]:
    """What the programs of all products share, large enough for each."""
    k = max(product.weights[0].k for product in products)
    sizes = {
        "x": k,
        "activations in bytes": activation_words(k),
        "out": max(product.weights[0].n for product in products),
    }
    return {
        name: Tensor.alloc(device, (MATVEC_ROWS * size,), "f32", f"tuning {name}")
        for name, size in sizes.items()
    }


def _program(
    device: Device, product: Product, m: int, layout: StepLayout, step: View, arena: dict[str, Tensor]
) -> Program:  # fmt: skip
    """The product again and again, over the weights of many layers: caches are as cold as in a pass."""
    program = device.program(f"tuning {product.key(m)}")
    r = Recorder(
        device, program, layout, step, step, n_rows=m, n_seqs=1, qt=1, context=1, arena=arena, exact=False
    )
    x = Activations(r.scratch("x", m, product.weights[0].k))
    out = r.scratch("out", m, product.weights[0].n // (2 if product.act else 1))
    for i in range(CALLS):
        linear(r, x, product.weights[i % len(product.weights)], out, act=product.act)
    return program


async def _seconds(device: Device, program: Program) -> float:
    """Of one run, warm; of its matrix products alone where the device tells."""
    if "timestamps" not in device.features:
        return await profiler.timed(device, program, RUNS)
    device.submit(program)
    spent = await device.time_program(program, RUNS)
    steps = zip(program.steps, spent, strict=True)
    return sum(seconds for step, seconds in steps if step.kernel.name == "matvec")
