"""Which variant of the matrix-vector kernel is fastest for each product of a model: measured, and remembered.

Every variant gives the same numbers up to rounding, so this is about time alone. An adapter that has not seen
a product before times a few variants of it over the model's own weights, which takes well under a second a
product; the outcome is kept by adapter, driver and text of the kernel. Where nothing is measured (software
devices, or time is up) `matrices.default_matvec` stands. Knows weights; knows no architecture and no file.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from realm_web.errors import FormatError
from realm_web.ops import MATVEC_ROWS, Activations, Recorder, linear, makes_bytes
from realm_web.ops.matrices import Matvec, Shape, default_matvec, memory_for, shape_of, staged_bytes
from realm_web.quants import RUN_FORMATS, activation_words
from realm_web.runtime import profiler
from realm_web.runtime.device import Device, Program
from realm_web.runtime.template import SHADERS
from realm_web.step import StepLayout
from realm_web.tensor import Tensor, Weight

SECONDS = 3.0  # for all products of a model
ROWS = (1, MATVEC_ROWS)  # of activations: one conversation, and as many as one reading of the weights serves
CALLS = 24  # of a variant in a run, over as many layers' weights
RUNS = 4
WARM_UP = 0.01  # seconds
ROUNDED = 1e-4  # seconds, to which Chromium rounds timestamps, unless started with special flags
LONGER = 10  # times as many calls make a run, where timestamps are rounded


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
    x: str  # "norm", "plain" or "bytes", as `Transformer.matrices` has it

    def input(self, r: Recorder) -> Activations:
        """Activations of the kind that this product gets."""
        k = self.weights[0].k
        if self.x == "bytes":
            return Activations.made(r.scratch("bytes", r.n_rows, activation_words(k)), r.n_rows, k)
        norm = r.scratch("norm", k) if self.x == "norm" else None
        return Activations(r.scratch("x", r.n_rows, k), norm, 1e-5)

    def to_bytes(self, r: Recorder) -> bool:
        return bool(self.act) and makes_bytes(r, self.weights[0], self.act)

    def shape(self, r: Recorder) -> Shape:
        weight = self.weights[0]
        return shape_of(r, self.input(r), weight, r.n_rows, self.act, to_bytes=self.to_bytes(r))

    def record(self, r: Recorder, calls: int = CALLS) -> None:
        """The product again and again, over the weights of many layers: caches are as cold as in a pass."""
        x, to_bytes = self.input(r), self.to_bytes(r)
        n = self.weights[0].n // (2 if self.act else 1)
        out = r.scratch("out", r.n_rows, activation_words(n) if to_bytes else n)
        for i in range(calls):
            weight = self.weights[i % len(self.weights)]
            linear(r, x, weight, out, act=self.act, to_bytes=to_bytes)


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


def products(matrices: Iterable[tuple[Weight, str, str]]) -> list[Product]:
    """Of what `Transformer.matrices` lists those alike together, without floats."""
    alike: dict[tuple, list[Weight]] = {}
    for weight, act, x in matrices:
        if weight.fmt.is_quantised:
            shape = weight.fmt.name, weight.shards[0].n_rows, weight.k, act, x
            alike.setdefault(shape, []).append(weight)
    return [Product(tuple(weights), act, x) for (*_, act, x), weights in alike.items()]


def candidates(default: Matvec, shape: Shape, largest: int, room: int) -> tuple[Matvec, ...]:
    """The default, then what could be faster in workgroups of `largest` threads, `room` bytes, at most."""
    tried = _of_several(default, shape) if shape.m_tile > 1 else _of_one(default, shape, largest)
    found = dict.fromkeys(v for v in tried if v.wg <= largest and _sensible(v, shape, room))
    found.pop(default, None)
    return default, *found


def _of_one(default: Matvec, shape: Shape, largest: int) -> Iterator[Matvec]:
    size, most = default.subgroup or 16, min(largest, 1024 if shape.has_table else 512)
    for wg in (most // 2, most) if shape.fills_memory or shape.to_bytes else (256,):
        for lanes in (size, 2 * size, 4 * size):
            for rows in (1, 2, 4):
                for unroll in (1, 2):
                    yield replace(default, lanes=lanes, rows=rows, unroll=unroll, wg=wg)
    if shape.fmt in RUN_FORMATS and not shape.second:
        yield from _of_small(default)


def _of_small(default: Matvec) -> Iterator[Matvec]:
    """Of chunks of few bytes, of which many have to be under way: what was fastest on an NVIDIA H200."""
    size = default.subgroup or 16
    for subgroups, rows, wg, unroll, run in (
        (2, 2, 1024, 4, 1), (4, 4, 512, 2, 1), (2, 1, 512, 4, 1), (2, 2, 1024, 2, 1), (2, 2, 512, 4, 1),
        (2, 2, 1024, 2, 2), (4, 4, 512, 1, 2), (2, 4, 512, 1, 2), (2, 2, 512, 2, 2), (2, 2, 1024, 1, 2),
    ):  # fmt: skip
        yield replace(default, lanes=subgroups * size, rows=rows, wg=wg, unroll=unroll, run=run)


def _of_several(default: Matvec, shape: Shape) -> Iterator[Matvec]:
    """What was fastest for some shape or format on an NVIDIA H200."""
    size = default.subgroup or 16
    for subgroups, loads, wg, m_tile, ahead, stage in (  # that share weight rows; and those
        (0.5, 4, 128, 8, 1, 1), (1, 4, 128, 8, 1, 1), (1, 4, 256, 8, 1, 1), (2, 4, 128, 8, 1, 0),
        (2, 4, 256, 8, 1, 0), (4, 4, 128, 8, 1, 0), (2, 4, 256, 8, 1, 1), (2, 2, 512, 8, 1, 1),
        (1, 2, 256, 8, 1, 1), (2, 2, 128, 8, 0, 0), (1, 4, 128, 8, 0, 0), (1, 4, 256, 4, 0, 0),
    ):  # fmt: skip
        yield replace(
            default, lanes=max(int(subgroups * size), 1), rows=max(loads // (1 + shape.act), 1), wg=wg,
            m_tile=min(m_tile, shape.m_tile), ahead=ahead, stage=stage,
        )  # fmt: skip


def _sensible(v: Matvec, shape: Shape, room: int) -> bool:
    """Neither idle lanes, nor more loads and sums than a thread has registers for; whole chunks of bytes."""
    if v.lanes > v.wg or v.lanes * v.unroll * v.run > max(shape.k // 32, v.subgroup or 16):
        return False
    if shape.to_bytes and v.wg // v.lanes * v.rows % 32:
        return False
    loads = v.rows * v.unroll * v.run * (1 + shape.act)
    sums = v.rows * v.m_tile * (1 + shape.act)
    if not v.subgroup:  # sums meet in workgroup memory
        return loads <= 8 and 4 * sums * v.wg <= 4096 and not v.stage
    return loads <= 8 and sums <= 32 and staged_bytes(v.lanes, v.m_tile) * v.stage <= room


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
    matrices: Iterable[tuple[Weight, str, str]],
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
    bench = _Bench(device, products(matrices))
    try:
        todo = [at for at in bench.places if again or str(bench.shape(*at)) not in known]
        if not todo:
            return []
        if on_message:
            on_message(f"measuring {len(todo)} products on {device.name} (once)")
        timings = best(await bench.measure(todo, seconds))
    finally:
        bench.close()
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


class _Bench:
    """Scratch memory that is large enough for every product, and the programs that time them."""

    def __init__(self, device: Device, products: Sequence[Product]):
        self._device, self._products = device, products
        self._rounded: bool | None = None  # not known yet
        self._layout = StepLayout(max_rows=MATVEC_ROWS, max_seqs=1, max_blocks=1)
        rows = range(MATVEC_ROWS)
        words = self._layout.pack(
            tokens=rows, positions=rows, row_seqs=rows, records=[], tiles=[], advance=False
        )
        self._step = device.alloc(len(words), "tuning")
        device.write(self._step, words)
        k = max((product.weights[0].k for product in products), default=32)
        n = max((product.weights[0].n for product in products), default=32)
        sizes = {"norm": k, "x": MATVEC_ROWS * k, "out": MATVEC_ROWS * 2 * n}
        for name in ("bytes", "activations in bytes"):
            sizes[name] = MATVEC_ROWS * activation_words(k)
        self._arena = {
            name: Tensor.alloc(device, (size,), "f32", f"tuning {name}") for name, size in sizes.items()
        }

    @property
    def places(self) -> list[tuple[Product, int]]:
        """Every product with every number of rows."""
        return [(product, m) for product in self._products for m in ROWS]

    def shape(self, product: Product, m: int) -> Shape:
        return product.shape(self._recorder(m))

    async def measure(self, todo: Iterable[tuple[Product, int]], seconds: float) -> list[Timing]:
        """The time of every variant, until `seconds` are over. `device.tuned` is what it was before."""
        device, timings = self._device, []
        before, end = device.tuned, time.perf_counter() + seconds
        try:
            for product, m in todo:
                if time.perf_counter() > end:
                    break
                timings += await self._measure(product, m)
        finally:
            device.tuned = before
        return timings

    async def _measure(self, product: Product, m: int) -> list[Timing]:
        device, shape = self._device, self.shape(product, m)
        default = default_matvec(device, shape, ints=True)
        room = memory_for(device, shape.fmt)
        tried = candidates(default, shape, device.limits.max_invocations, room)
        programs = [self._program(product, m, shape, variant) for variant in tried]
        await device.compile()
        await self._warm_up(programs[0])
        calls, nbytes = CALLS, product.weights[0].nbytes
        if await self._rounds(programs[0]):
            calls *= LONGER
            programs = [self._program(product, m, shape, variant, calls) for variant in tried]
        return [
            Timing(str(shape), variant, await self._seconds(program) / calls, nbytes)
            for variant, program in zip(tried, programs, strict=True)
        ]

    def _program(
        self, product: Product, m: int, shape: Shape, variant: Matvec, calls: int = CALLS
    ) -> Program:
        self._device.tuned = {str(shape): variant}
        r = self._recorder(m)
        product.record(r, calls)
        return r.program

    async def _rounds(self, program: Program) -> bool:
        """Whether timestamps are too coarse to tell of single steps."""
        if self._rounded is None:
            has_them = "timestamps" in self._device.features
            spent = await self._device.time_program(program, 1) if has_them else []
            self._rounded = has_them and all(round(1e9 * s) % round(1e9 * ROUNDED) == 0 for s in spent)
        return self._rounded

    async def _warm_up(self, program: Program) -> None:
        """A GPU that has waited for the compiler runs slowly at first."""
        end = time.perf_counter() + WARM_UP
        while time.perf_counter() < end:
            self._device.submit(program, RUNS)
            await self._device.synchronize()

    async def _seconds(self, program: Program) -> float:
        """Of one run, warm; of its matrix products alone where the device tells."""
        device = self._device
        if "timestamps" not in device.features:
            return await profiler.timed(device, program, RUNS)
        device.submit(program)
        if self._rounded:
            return (await device.time_program(program, RUNS // 2, whole=True))[0]
        spent = await device.time_program(program, RUNS)
        steps = zip(program.steps, spent, strict=True)
        return sum(seconds for step, seconds in steps if step.kernel.name == "matvec")

    def _recorder(self, m: int) -> Recorder:
        device, step = self._device, self._device.view(self._step)
        return Recorder(
            device, device.program("tuning"), self._layout, step, step, n_rows=m, n_seqs=1, qt=1, context=1,
            arena=self._arena, exact=False,
        )  # fmt: skip

    def close(self) -> None:
        for buffer in (self._step, *(tensor.buffer for tensor in self._arena.values())):
            self._device.free(buffer)
