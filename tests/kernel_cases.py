"""One table of kernel cases, run on every device: the GPU's result against the numpy twin.

A case is a kernel, its constants, its tensors (made from a seed) and the grid. `tolerance` is the largest
|got - want| allowed relative to the largest |want|, and stands with its reason where the case is made. The
same table is the benchmark (`realm kernels`), so cases name variants by their tuning constants.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import blocks
import numpy as np

from realm_web import dequant, grids
from realm_web.quants import FORMATS
from realm_web.step import NONE, StepLayout, sampling_words, sequence_record

SUM = 2e-6  # float32 sums in another order
FMA = 2e-5  # sums of products of a few thousand terms, with or without fused multiply-add
HALF = 2e-3  # operands rounded to float16 (11 bits)
EXACT = 0.0

# Decoding is one function, the same in every kernel: each format once per kernel, these in its variants too.
# They are one or two of each kind: floats, nibbles, K types, crumbs, codebook, grids of 8 and of 4.
SHAPES = ("F32", "BF16", "Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "Q3_K", "IQ4_XS", "IQ2_XS", "IQ3_S")

ST = StepLayout(max_rows=128, max_seqs=4, max_blocks=16)


@dataclass
class Case:
    id: str
    kernel: str
    consts: dict[str, Any]
    tensors: Callable[[np.random.Generator], list[np.ndarray]]
    outputs: tuple[int, ...]
    grid: tuple[int, ...]
    tolerance: float
    needs: tuple[str, ...] = ()  # features
    subgroup: int = 0  # the subgroup size that the constants assume
    dtype: str = "f32"  # "f16", "u32" to the bit, "count": whole numbers that may differ a little


def step_words(
    seqs: list[tuple[int, int]], *,
    rng: np.random.Generator, n_vocab: int = 100, qt: int = 1, block_size: int = 16,
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, advance: bool = False,
    st: StepLayout = ST,
) -> np.ndarray:  # fmt: skip
    """A step buffer: per sequence (first position, number of rows); random tokens and block tables."""
    tokens, positions, row_seqs, tiles, records = [], [], [], [], []
    params = sampling_words(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition=1.3,
        presence=0.4,
        frequency=0.2,
    )
    for s, (first, n) in enumerate(seqs):
        row0 = len(tokens)
        for start in range(0, n, qt):
            tiles.append((row0 + start) | min(qt, n - start) << 16)
        tokens += rng.integers(0, n_vocab, n).tolist()
        positions += range(first, first + n)
        row_seqs += [s] * n
        records.append(
            sequence_record(
                slot=(s + 1) % st.max_seqs,
                kv_len=first + n,
                logits_row=row0 + n - 1,
                draw_position=first + n,
                seed=int(rng.integers(2**32)),
                params=params,
            )
        )
    words = np.frombuffer(
        st.pack(
            tokens=tokens,
            positions=positions,
            row_seqs=row_seqs,
            records=records,
            tiles=tiles,
            advance=advance,
        ),
        np.uint32,
    )
    tables = np.zeros((st.max_seqs, st.max_blocks), np.uint32)
    tables.reshape(-1)[:] = rng.permutation(tables.size)
    return np.concatenate([words, tables.reshape(-1)])


def random_blocks(fmt: str, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Random valid ggml blocks with weights of about unit size: uint8 (n_blocks, block_bytes)."""
    n_blocks = FORMATS[fmt].n_blocks(n * k)
    if fmt not in ("F32", "F16", "BF16"):
        return blocks.random_blocks(fmt, n_blocks, rng)
    values = rng.standard_normal(n_blocks, dtype=np.float32)
    if fmt == "F32":
        return values.view(np.uint8).reshape(n_blocks, 4)
    if fmt == "F16":
        return values.astype(np.float16).view(np.uint8).reshape(n_blocks, 2)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(n_blocks, 2)


def packed(fmt: str, n: int, k: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The tensors that a kernel binds to read a random weight (n, k)."""
    return bindings(fmt, random_blocks(fmt, n, k, rng))


def bindings(fmt: str, raw: np.ndarray) -> list[np.ndarray]:
    grid = FORMATS[fmt].grid
    table = [np.frombuffer(grids.table(grid), np.uint32)] if grid else []
    return [*dequant.repack(fmt, raw).values(), *table]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def cases() -> Iterator[Case]:
    import attention_cases  # which need this module
    import matmul_cases
    import matrix_cases
    import moe_cases
    import sampling_cases
    import score_cases

    yield from repack_cases()
    yield from embed_cases()
    yield from matrix_cases.cases()
    yield from matmul_cases.cases()
    yield from gated_cases()
    yield from attention_cases.cases()
    yield from short_conv_cases()
    yield from moe_cases.cases()
    yield from sampling_cases.cases()
    yield from score_cases.cases()
    tensors = lambda rng: [rng.integers(0, 1000, (4096, 4)).astype(np.uint32), np.ones(4, np.uint32)]  # noqa: E731
    yield Case(
        "stream_read", "stream_read", {"n": 4096, "stride": 512}, tensors, (1,), (2,), EXACT, dtype="u32"
    )


def repack_cases() -> Iterator[Case]:
    n, k, first = 3, 512, 16  # the destination starts at chunk 16
    whole = n * k // 32
    # all in one run; or two chunks of 256-blocks into their run, in runs of 24 chunks with gaps of 8
    for name, placing, end in (("", (0, whole, 0), first + whole), (" in runs", (16, 24, 32), 16 + 96)):
        for fmt, f in FORMATS.items():

            def tensors(rng, fmt=fmt, f=f, placing=placing, end=end):
                raw = random_blocks(fmt, n, k, rng).reshape(-1)
                raw = np.pad(raw, (0, -len(raw) % 16))
                params = np.array([whole, first, *placing, 0, 0, 0], np.uint32)
                sizes = f.packed_nbytes(end * 32)
                return [raw, params, *(np.zeros(size // 4, np.uint32) for size in sizes.values())]

            outputs, grid = tuple(range(2, 2 + len(f.parts))), (-(-n * k // 2048),)
            yield Case(
                f"repack {fmt}{name}", "repack", {"fmt": fmt}, tensors, outputs, grid, EXACT, dtype="u32"
            )


def embed_cases() -> Iterator[Case]:
    n_vocab = 100

    def case(fmt, name, dim, first, rows, scale, make, tolerance):
        def tensors(rng):
            step = step_words([(3, 5), (0, 2)], rng=rng, n_vocab=n_vocab)
            step[ST.tokens + 4] = NONE  # the token that its slot drew last
            slots = rng.integers(0, n_vocab, ST.max_seqs).astype(np.uint32)
            return [step, slots, *bindings(fmt, make(fmt, rows, dim, rng)), np.zeros((8, dim), np.float32)]

        consts = {
            "fmt": fmt, "dim": dim, "first_row": first, "n_shard_rows": rows, "scale": scale, "st": ST,
        }  # fmt: skip
        grid = (-(-8 * dim // 32 // 64),)
        return Case(
            f"embed {fmt} {name}", "embed", consts, tensors, (2 + FORMATS[fmt].n_bindings,), grid, tolerance
        )

    def edges(fmt, n, k, rng):
        return blocks.edge_blocks(fmt, FORMATS[fmt].n_blocks(n * k), rng)

    for fmt in FORMATS:
        # d * (q - c) is exact or rounds once, in every format; times 2.5 it rounds twice
        yield case(fmt, "from row 0", 256, 0, 100, 2.5, random_blocks, 2e-7)
        yield case(fmt, "from row 40", 256, 40, 60, 1.0, random_blocks, EXACT)
        if fmt not in ("F32", "F16", "BF16"):
            yield case(fmt, "with edge scales", 1024, 0, 100, 1.0, edges, EXACT)


def linear_tensors(fmt: str, n: int, k: int, m: int, act: str, bias: bool, residual: bool, stride: int):
    def tensors(rng):
        step = step_words([(0, m)], rng=rng)
        extra = [normal(rng, stride)] * bias
        weight = packed(fmt, n * (2 if act else 1), k, rng)
        return [step, normal(rng, m, k), *weight, *extra, normal(rng, m, stride)]

    return tensors, 2 + FORMATS[fmt].n_bindings + bias


def gated_cases() -> Iterator[Case]:
    def tensors(rng):
        step = step_words([(0, 1), (9, 3)], rng=rng)
        return [step, normal(rng, 8, 128) * 5, np.zeros((8, 64), np.float32)]

    for act in ("silu_mul", "gelu_mul", "swiglu_oai"):
        for times in (1, 2):
            consts = {"act": act, "dim": 64, "times": times, "st": ST}
            yield Case(f"gated {act} times {times}", "gated", consts, tensors, (2,), (2,), 1e-6)


def short_conv_cases() -> Iterator[Case]:
    for dim, l_cache, stride, seqs in (
        (96, 3, 1000, [(0, 1), (1, 1), (40, 1), (2, 1)]),
        (96, 3, 192, [(0, 1), (5, 2), (40, 3), (0, 9)]),
        (288, 3, 576, [(7, 40)]),
        (64, 4, 192, [(0, 2), (3, 4), (1, 1), (12, 3)]),
        (32, 2, 64, [(0, 5), (6, 1), (9, 2)]),
    ):

        def tensors(rng, dim=dim, l_cache=l_cache, stride=stride, seqs=seqs):
            n = sum(n for _, n in seqs)
            step = step_words(seqs, rng=rng)
            state, out = normal(rng, 4 * stride), np.zeros((n, dim), np.float32)
            return [step, normal(rng, n, 3 * dim), normal(rng, dim, l_cache), state, out]

        consts = {"dim": dim, "l_cache": l_cache, "stride": stride, "st": ST}
        grid = (-(-dim // 256), sum(n for _, n in seqs))
        name = f"short_conv {dim} x {l_cache}, rows {' '.join(str(n) for _, n in seqs)}"
        yield Case(name, "short_conv", consts, tensors, (3, 4), grid, SUM)


def resolve(case: Case, subgroup_size: int, features: frozenset[str]) -> dict[str, Any] | None:
    """The constants with the device's subgroup size for -1; None where the device lacks what it takes."""
    if not set(case.needs) <= features or (case.subgroup and not subgroup_size):
        return None
    makes_bytes = case.consts.get("out_as") == "ints" or case.consts.get("made") == "bytes"
    makes_bytes |= case.consts.get("to_bytes", False) or case.consts.get("then", False)
    if case.subgroup and makes_bytes and subgroup_size < 8:
        return None  # a chunk of bytes is made by eight lanes of a subgroup
    return {k: subgroup_size if v == -1 and k in ("subgroup", "lanes") else v for k, v in case.consts.items()}


def grid_of(case: Case, consts: dict[str, Any]) -> tuple[int, ...]:
    if case.kernel not in ("matvec", "moe_matvec"):
        return case.grid
    per_group = consts["wg"] // consts["lanes"] * consts["rows"]
    blocks = -(-consts["n"] // per_group)
    consts["grid_x"] = case.grid[0] or blocks
    return (consts["grid_x"], case.grid[1], -(-blocks // consts["grid_x"]))


def tensors_of(case: Case) -> list[np.ndarray]:
    return case.tensors(np.random.default_rng(struct.unpack("<I", case.id.encode()[-4:])[0]))


def error_of(case: Case, got: bytes, want: np.ndarray) -> float:
    """The largest difference relative to the largest value wanted; "u32" counts differing words."""
    if case.dtype == "u32":
        return float((np.frombuffer(got, np.uint32)[: want.size] != want.reshape(-1).view(np.uint32)).sum())
    if case.dtype.startswith("bytes of "):
        import matrix_cases

        return matrix_cases.bytes_error(np.frombuffer(got, np.uint32), want, int(case.dtype[9:]))
    kind = {"f16": np.float16, "count": np.uint32}.get(case.dtype, np.float32)
    data = np.frombuffer(got, kind)[: want.size].astype(np.float64)
    flat = want.reshape(-1).view(kind).astype(np.float64)
    error = np.abs(data - flat).max() / max(np.abs(flat).max(), 1e-30)
    return float("inf") if np.isnan(error) else float(error)
