"""From a source to a model on a device: what the file says, then weights and a KV cache of the right size.

`read_model` is done once; `place` is done again when a device was lost. Knows files, devices and sizes; knows
no request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from realm_web import tiling, tuning
from realm_web.chat import ChatTemplate
from realm_web.errors import DeviceError, FormatError, OutOfDeviceMemory, RequestError
from realm_web.gguf import GGUFFile
from realm_web.kvcache import BLOCK_SIZE
from realm_web.loader import Loader, Source, read_header, read_vector
from realm_web.models import build, read_config
from realm_web.models.config import ModelConfig
from realm_web.models.rope import RopeTable, rope_table
from realm_web.models.transformer import Transformer
from realm_web.runner import Runner
from realm_web.runtime.device import Device
from realm_web.tokenizer import Tokenizer
from realm_web.tuning import Store

DEFAULT_CONTEXT = 8192
MAX_SEQS = 8
MAX_ROWS = 512
MOST_SEQS = 64
KV_TYPES = ("f16", "f32", "q8_0")
RESERVE = 1 / 16  # of what is free stays so, for scratch memory and for others on the same device
LEAST_RESERVE = 64 << 20  # bytes


@dataclass(frozen=True)
class Progress:
    """One step of opening: bytes for "load", pipelines for "compile", tokens of KV cache for "room".

    "tune" is a message alone: kernel variants are measured, once for each adapter.
    """

    stage: str
    done: int
    total: int
    label: str


OnProgress = Callable[[Progress], None] | None


@dataclass(frozen=True)
class Sizes:
    """How much runs at a time. Checked against the model on creation of `Plan`."""

    context: int | None = None  # tokens of one request; None: the model's, at most 8192
    kv_tokens: int | Literal["max"] | None = None  # of all running requests; None: one full context
    max_seqs: int = MAX_SEQS
    max_rows: int = MAX_ROWS
    kv_type: Literal["f16", "f32", "q8_0"] = "f16"
    prefix_cache: bool | None = None  # None: where the model allows it
    cpu_dequant: bool | None = None  # None: if half of the free memory is enough
    exact: bool | None = None  # products of float32 activations; None: of 8-bit ones on a hardware GPU


@dataclass(frozen=True)
class Model:
    """What a model file says, less its weights, and how to open it again."""

    name: str
    gguf: GGUFFile
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    reopen: Callable[[], Awaitable[Source]] | None


async def read_model(source: Source, reopen: Callable[[], Awaitable[Source]] | None) -> Model:
    """Header, configuration, tokenizer and chat template. FormatError, UnsupportedError, RequestError."""
    gguf = await read_header(source)
    try:
        config = read_config(gguf)
        tokenizer = Tokenizer.from_metadata(gguf.metadata)
        template = ChatTemplate.from_metadata(gguf.metadata, tokenizer)
    except (FormatError, RequestError) as error:
        raise type(error)(f"{source.name}: {error}") from None
    if tokenizer.n_vocab > config.n_vocab:
        raise FormatError(
            f"{source.name}: {tokenizer.n_vocab} tokens in the vocabulary, {config.n_vocab} rows of weights"
        )
    return Model(source.name, gguf, config, tokenizer, template, reopen)


def check_sizes(sizes: Sizes, config: ModelConfig) -> int:
    """The context of one request. RequestError for sizes that make no sense."""
    if not 1 <= sizes.max_seqs <= MOST_SEQS or not sizes.max_seqs <= sizes.max_rows <= MAX_ROWS:
        raise RequestError(
            f"max_seqs {sizes.max_seqs}, max_rows {sizes.max_rows}: "
            f"give 1 to {MOST_SEQS} sequences and as many rows, up to {MAX_ROWS}"
        )
    if sizes.kv_type not in KV_TYPES:
        raise RequestError(f"kv_type {sizes.kv_type!r}: use {', '.join(KV_TYPES)}")
    if isinstance(sizes.kv_tokens, int) and sizes.kv_tokens < 2:
        raise RequestError(f"kv_tokens {sizes.kv_tokens}: give 2 or more tokens, or 'max'")
    context = sizes.context
    if context is None:
        context = min(config.context_length, DEFAULT_CONTEXT)
        if isinstance(sizes.kv_tokens, int):
            context = min(context, sizes.kv_tokens)
    if not 2 <= context <= config.context_length:
        raise RequestError(f"context {context}: this model takes 2 to {config.context_length} tokens")
    if isinstance(sizes.kv_tokens, int) and sizes.kv_tokens < context:
        raise RequestError(
            f"kv_tokens {sizes.kv_tokens}: less than the context of one request, {context} tokens"
        )
    return context


async def place(
    model: Model,
    source: Source,
    device: Device,
    sizes: Sizes,
    on_progress: OnProgress = None,
    store: Store | None = None,
) -> Runner:
    """The model on a device: weights read, KV cache allocated, first programs compiled.

    `store` remembers which kernel variants are fastest on this adapter; without it they are the defaults.
    Raises DeviceError with what is needed and what there is; the device is closed then.
    """

    def report(stage: str, label: str) -> Callable[[int, int], None] | None:
        if on_progress is None:
            return None
        return lambda done, total: on_progress(Progress(stage, done, total, label))

    config = model.config
    try:
        context = check_sizes(sizes, config)
        _choose_dense(device, model.gguf, sizes.cpu_dequant)
        ropes = await _rope_tables(source, model.gguf, config, context)
        try:
            transformer = build(model.gguf, device)
            loader = Loader(device, transformer, model.gguf, source)
            n_blocks = await _n_blocks(device, config, context, sizes)
            runner = Runner(
                device, transformer, ropes, context=context, n_blocks=n_blocks, max_seqs=sizes.max_seqs,
                max_rows=sizes.max_rows, kv_type=sizes.kv_type,
                prefix_cache=sizes.prefix_cache is not False and not config.is_recurrent,
                n_valid=model.tokenizer.n_vocab, exact=sizes.exact,
            )  # fmt: skip
        except DeviceError as error:
            raise _room_error(error, model, context, device) from error
        if on_progress:
            n_tokens = n_blocks * BLOCK_SIZE
            on_progress(Progress("room", n_tokens, n_tokens, f"room for {n_tokens:,} tokens"))
        if store is not None and not sizes.exact:
            await _tune(device, transformer, store, on_progress)
        await device.compile()
        await asyncio.gather(
            loader.load(report("load", Path(model.name).name)),
            runner.prepare(report("compile", device.name)),
        )
    except BaseException:
        device.close()
        raise
    return runner


async def _tune(device: Device, transformer: Transformer, store: Store, on_progress: OnProgress) -> None:
    def say(message: str) -> None:
        if on_progress:
            on_progress(Progress("tune", 0, 0, message))

    try:
        await tuning.tune(device, transformer.matrices, store, on_message=say)
        await tiling.tune(device, transformer.matrices, store, on_message=say)
    except OSError as error:  # a home that cannot be written to
        say(f"what was measured is not kept: {error}")


async def _n_blocks(device: Device, config: ModelConfig, context: int, sizes: Sizes) -> int:
    """Blocks of the KV cache; for "max" as many as the device has room for, asked or found by trying."""
    per_request = -(-context // BLOCK_SIZE)
    if sizes.kv_tokens != "max":
        return -(-(sizes.kv_tokens or context) // BLOCK_SIZE)
    layers = [BLOCK_SIZE * n for n in config.kv_bytes_by_layer(sizes.kv_type)]  # keys and values, a block
    n_blocks = min(per_request * sizes.max_seqs, device.limits.max_binding // (max(layers) // 2))
    reserve = LEAST_RESERVE
    if device.limits.memory:
        free = max(0, device.limits.memory - device.allocated)
        reserve = max(LEAST_RESERVE, int(free * RESERVE))
        n_blocks = min(n_blocks, (free - reserve) // sum(layers))
    while n_blocks >= per_request:
        if await _fits(device, [n_blocks * nbytes // 2 for nbytes in layers for _ in range(2)] + [reserve]):
            return n_blocks
        n_blocks = n_blocks * 7 // 8
    raise OutOfDeviceMemory(
        f"no room for a KV cache of {context:,} tokens ({per_request * sum(layers) / 1e9:.2f} GB) on "
        f"{device.name}: use a shorter context"
    )


async def _fits(device: Device, sizes: list[int]) -> bool:
    """Whether buffers of all these sizes can be had at once."""
    buffers = []
    try:
        for nbytes in sizes:
            buffers.append(device.alloc(nbytes, "probe of free memory"))
        await device.synchronize()  # a page hears of a failure only afterwards
        return True
    except OutOfDeviceMemory:
        return False
    finally:
        for buffer in buffers:
            device.free(buffer)


def _room_error(error: DeviceError, model: Model, context: int, device: Device) -> DeviceError:
    """A failed allocation in terms of the whole model: what it needs, what was had before it failed."""
    weights = sum(info.nbytes for info in model.gguf.tensors.values())
    needed = weights + model.config.kv_bytes_per_token * context
    return type(error)(
        f"{error} (the model needs about {needed / 1e9:.2f} GB on {device.name}; "
        f"{device.allocated / 1e9:.2f} GB were had before this)"
    )


async def _rope_tables(source: Source, gguf: GGUFFile, config: ModelConfig, context: int) -> list[RopeTable]:
    """One table for each of config.ropes, and last the empty one of layers that do not rotate."""
    original = config.ropes[0].scaling.original_context
    length = "long" if context > original else "short"
    names = [name for name in ("rope_freqs.weight", f"rope_factors_{length}.weight") if name in gguf.tensors]
    divisors: list[float] = []
    for name in names:
        info = gguf.tensor(name, (config.rope_dim // 2,))
        divisors = list(await read_vector(source, info))
        if not all(0 < d < float("inf") for d in divisors):
            raise FormatError(f"{source.name}: {name} holds values that are no positive numbers")
    tables = [
        rope_table(rope.base, config.rope_dim, rope.scaling, () if i else divisors)
        for i, rope in enumerate(config.ropes)
    ]
    return [*tables, RopeTable((), 1.0)]


def _choose_dense(device: Device, gguf: GGUFFile, wanted: bool | None) -> None:
    """Drop "dense" from a CPU device where float32 weights are not wanted, or would not fit well."""
    if wanted is None:
        wanted = 4 * sum(info.n_elements for info in gguf.tensors.values()) <= device.limits.memory // 2
    if not wanted:
        device.features -= {"dense"}
