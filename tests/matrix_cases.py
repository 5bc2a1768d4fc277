"""Cases of the kernels that multiply few rows, and of those that make activations for them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from kernel_cases import FMA, SHAPES, ST, SUM, Case, normal, packed, step_words

from realm_web.quants import FORMATS, RUN_FORMATS, activation_words
from realm_web.runtime.cpu_kernels import from_bytes, put_bytes, to_bytes
from realm_web.step import NONE

FLOATS = ("F32", "F16", "BF16")
# A value at the middle between two bytes may go to either, a step of d apart; the largest is 127 d.
STEP = 1.01 / 127


def cases() -> Iterator[Case]:
    yield from norm_cases()
    yield from quantise_cases()
    yield from matvec_cases()


def norm_cases() -> Iterator[Case]:
    for dim, wg, gather, kind, subgroup in (
        (64, 64, False, "", 0),
        (576, 256, False, "", 0),
        (96, 64, True, "residual", 0),
        (576, 256, False, "", -1),
        (576, 256, False, "ints", -1),
        (96, 64, True, "ints", 0),
        (576, 64, False, "then", -1),
    ):
        ints, then = kind == "ints", kind == "then"

        def tensors(rng, dim=dim, gather=gather, ints=ints, then=then):
            step = step_words([(0, 3), (7, 1), (2, 2)], rng=rng)
            if gather:
                step[ST.seqs + ST.SEQ_WORDS + ST.LOGITS_ROW] = NONE
            out = np.zeros((8, activation_words(dim)), np.uint32) if ints else normal(rng, 8, dim)
            made = [normal(rng, dim), np.zeros((8, activation_words(dim)), np.uint32)] * then
            return [step, normal(rng, 8, dim) * 3, normal(rng, dim), out, *made]

        consts = {
            "dim": dim, "eps": 1e-5, "gather": gather, "residual": kind in ("residual", "then"), "ints": ints,
            "then": then, "wg": wg, "subgroup": subgroup, "st": ST,
        }  # fmt: skip
        name = (
            f"rmsnorm {dim} wg {wg}{' gather' * gather}{' to bytes' * ints}{' subgroups' * bool(subgroup)}"
            f"{' then' * then}"
        )
        needs = ("subgroups",) if subgroup else ()
        in_bytes = STEP, f"bytes of {dim}"
        for output, (tolerance, dtype) in ((3, in_bytes if ints else (SUM, "f32")), (5, in_bytes))[
            : 1 + then
        ]:
            yield Case(
                name + " bytes" * (output == 5), "rmsnorm", consts, tensors, (output,), (8,), tolerance,
                needs, subgroup=subgroup, dtype=dtype,
            )  # fmt: skip
    for len_q, len_k, subgroup in ((40, 40, 0), (96, 48, -1)):

        def slices(rng, len_q=len_q, len_k=len_k):
            step = step_words([(0, 3), (7, 1)], rng=rng)
            return [step, normal(rng, 6, 208) * 2, normal(rng, len_q), normal(rng, len_k)]

        consts = {
            "len_q": len_q, "len_k": len_k, "stride": 208, "eps": 1e-6, "wg": 64, "subgroup": subgroup,
            "st": ST,
        }  # fmt: skip
        needs = ("subgroups",) if subgroup else ()
        name = f"qk_norm {len_q}, {len_k}"
        yield Case(name, "qk_norm", consts, slices, (1,), (2, 6), SUM, needs=needs, subgroup=subgroup)


def quantise_cases() -> Iterator[Case]:
    for k, times, per_seq, subgroup in (
        (32, 1, False, 0),
        (96, 2, False, -1),
        (320, 1, True, 0),
        (576, 1, False, -1),
    ):

        def tensors(rng, k=k):
            x = normal(rng, 8, k) * np.exp2(rng.integers(-30, 30, (8, k // 32)).repeat(32, axis=1))
            x[1] = 0
            x[2, :32] = 1e-38
            out = np.zeros((8, activation_words(k)), np.uint32)
            return [step_words([(0, 3), (9, 1)], rng=rng), x.astype(np.float32), out]

        consts = {
            "k": k, "times": times, "per_seq": per_seq, "wg": 64, "subgroup": subgroup, "st": ST,
        }  # fmt: skip
        name = f"quantise {k} times {times}{' by sequence' * per_seq}{' subgroups' * bool(subgroup)}"
        grid, needs = (-(-k // 4 // 64), 8), ("subgroups",) * bool(subgroup)
        yield Case(
            name, "quantise", consts, tensors, (2,), grid, STEP, needs, subgroup, dtype=f"bytes of {k}"
        )


def matvec_tensors(
    fmt: str, n: int, k: int, m: int, act: str, bias: bool, residual: bool, stride: int, x_as: str,
    fmt2: str, n1: int,
):  # fmt: skip
    """What a product binds, and where its output is among that."""

    def tensors(rng):
        step = step_words([(0, m)], rng=rng)
        extra = [normal(rng, stride)] * bias
        weight = packed(fmt, n1 or n * (2 if act else 1), k, rng)
        weight += packed(fmt2, n - n1, k, rng) if fmt2 else []
        x = normal(rng, m, k)
        if x_as == "ints":
            x = in_bytes(x)
        norm = [rng.uniform(0.5, 2, k).astype(np.float32)] if x_as == "norm" else []
        if x_as in ("quantise", "norm"):
            x = near_bytes(x, rng) / (norm[0] if norm else 1)
        return [step, x, *norm, *weight, *extra, normal(rng, m, stride)]

    n_bindings = sum(FORMATS[name].n_bindings for name in (fmt, fmt2) if name)
    return tensors, 2 + (x_as == "norm") + n_bindings + bias


def in_bytes(x: np.ndarray) -> np.ndarray:
    """Rows x (m, k) as (m, activation_words) u32."""
    words = np.zeros((len(x), activation_words(x.shape[1])), np.uint32)
    put_bytes(words, slice(len(x)), *to_bytes(x))
    return words


def near_bytes(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows like x, each value within a fifth of a step of a byte: every device rounds it to the same one."""
    q, d = to_bytes(x)
    inside = np.abs(q) < 126
    return ((q + inside * rng.uniform(-0.2, 0.2, q.shape)) * d[..., None]).astype(np.float32).reshape(x.shape)


def bytes_error(got: np.ndarray, want: np.ndarray, k: int) -> float:
    """The largest difference of a value, relative to the largest of its chunk; inf where sums are wrong."""
    chunks = k // 32
    got, want = got.reshape(-1, activation_words(k)), want.reshape(-1, activation_words(k))
    planes = np.ascontiguousarray(got[:, : 8 * chunks]).view(np.int8).reshape(len(got), 2, chunks, 16)
    sums = planes.sum(axis=3, dtype=np.int32).transpose(0, 2, 1)  # (rows, chunks, 2)
    scales = np.ascontiguousarray(got[:, 8 * chunks :]).view(np.float32).reshape(-1, chunks, 4)
    of = np.concatenate([sums.sum(axis=2, keepdims=True), sums], axis=2)
    if not np.allclose(scales[..., 1:], scales[..., :1] * of, rtol=1e-6, atol=0):  # rounded once
        return float("inf")
    a, b = (from_bytes(words, k).astype(np.float64).reshape(-1, 32) for words in (got, want))
    error = np.abs(a - b).max(axis=1) / np.maximum(np.abs(b).max(axis=1), 1e-37)
    return float(error.max())


def matvec_cases() -> Iterator[Case]:
    def case(fmt, *, n=40, k=512, m=1, lanes=1, rows=1, wg=64, m_tile=1, unroll=1, subgroup=0, act="",
             bias=False, residual=False, offset=0, fold=0, scale=1.0, softcap=0.0, x_as="f32",
             out_as="f32", fmt2="", n1=0, ahead=0, stage=0, table=0, run=1,
             sure=False):  # fmt: skip
        stride = activation_words(n) if out_as == "ints" else n + offset
        tensors, out = matvec_tensors(fmt, n, k, m, act, bias, residual, stride, x_as, fmt2, n1)
        consts = {
            "fmt": fmt, "fmt2": fmt2, "n1": n1, "k": k, "n": n, "act": act, "bias": bias,
            "residual": residual, "scale": scale, "softcap": softcap, "out_stride": stride,
            "out_offset": offset, "per_seq": False, "x_as": x_as, "eps": 1e-5, "out_as": out_as,
            "lanes": lanes, "rows": rows, "wg": wg, "m_tile": m_tile, "unroll": unroll,
            "subgroup": subgroup, "grid_x": fold, "st": ST, "ahead": ahead, "stage": stage,
            "table": table, "run": run, "sure": sure,
        }  # fmt: skip
        name = (
            f"matvec {fmt} {n}x{k} m {m} lanes {lanes} rows {rows} wg {wg}{' subgroups' * bool(subgroup)}"
            f"{' ' * bool(act) + act}{' bias' * bias}{' residual' * residual}{' fold' * bool(fold)}"
            f"{f' {x_as} unroll {unroll}' * (x_as != 'f32')}{' to bytes' * (out_as == 'ints')}"
            f"{f' and {fmt2} from {n1}' * bool(fmt2)}{' ahead' * ahead}{' staged' * stage}"
            f"{f' table {table}' * bool(table)}"
            f"{f' run {run}' * (run > 1)}{' sure' * sure}"
        )
        grid = (fold, -(-m // m_tile), 1)  # grid_of finishes it, once the lanes are known
        tolerance, dtype = (STEP, f"bytes of {n}") if out_as == "ints" else (FMA, "f32")
        needs = ("subgroups",) * bool(subgroup)
        return Case(name, "matvec", consts, tensors, (out,), grid, tolerance, needs, subgroup, dtype)

    for fmt in FORMATS:
        yield case(fmt)
        if fmt not in FLOATS:
            yield case(fmt, x_as="ints", lanes=4, k=768)
    for fmt in SHAPES:
        yield case(fmt, lanes=16, m=3, m_tile=4)
        yield case(fmt, lanes=16, rows=2, subgroup=0, act="silu_mul")
        if fmt not in FLOATS:
            yield case(fmt, lanes=16, rows=2, x_as="ints", act="silu_mul", m=3, m_tile=4, k=768, unroll=2)
    for fmt in RUN_FORMATS:
        yield case(fmt, x_as="ints", lanes=8, k=768, run=2, sure=True)
    for fmt, table in (("IQ2_XXS", 16384), ("IQ2_S", 0), ("Q1_0", 0)):
        yield case(fmt, x_as="ints", lanes=4, rows=2, k=1536, run=2, unroll=2, table=table)
    yield case("Q4_K", x_as="ints", lanes=8, k=768, sure=True, residual=True, n=37)
    for fmt, wg, table in (
        ("MXFP4", 64, 8192), ("IQ4_XS", 256, 12000), ("IQ4_NL", 256, 3072), ("IQ2_XXS", 128, 16384),
        ("IQ3_S", 96, 8192), ("IQ1_M", 64, 16384),
    ):  # fmt: skip
        yield case(fmt, x_as="ints", lanes=4, k=768, n=wg // 4 + 3, wg=wg, table=table)
    for fmt in ("Q4_1", "Q4_K", "Q6_K"):
        # -1: the device's subgroup size
        yield case(fmt, lanes=-1, subgroup=-1, rows=2, bias=True, residual=True)
        yield case(fmt, lanes=-1, subgroup=-1, act="silu_mul", m=2, m_tile=2)
        yield case(fmt, lanes=64, subgroup=-1, rows=2, wg=128, m=2, m_tile=2, act="silu_mul")
        yield case(fmt, lanes=-1, subgroup=-1, rows=2, x_as="quantise", unroll=2, k=1280, bias=True)
        yield case(fmt, lanes=-1, subgroup=-1, act="silu_mul", m=2, x_as="norm")
    # several rows: chunks that fill the lanes or do not; as many sums as lanes, fewer, more, an odd number
    for fmt in ("Q4_K", "Q6_K", "Q4_0", "IQ4_XS", "IQ2_XS"):
        for ahead, stage in ((0, 1), (1, 0), (1, 1)):
            own = {"x_as": "ints", "k": 1280, "ahead": ahead, "stage": stage}
            yield case(fmt, lanes=16, wg=32, rows=2, m=3, m_tile=4, n=37, **own)
            yield case(fmt, lanes=8, rows=4, wg=32, m=8, m_tile=8, n=40, subgroup=-1, act="silu_mul", **own)
    for lanes, rows, m, k in (
        (4, 1, 2, 512), (8, 3, 2, 512), (16, 2, 4, 768), (64, 2, 8, 2048), (128, 1, 2, 4096),
    ):  # fmt: skip
        own = {"lanes": lanes, "rows": rows, "m": m - 1, "m_tile": m, "k": k, "wg": max(lanes, 64)}
        own |= {"n": 29, "x_as": "ints", "subgroup": -1, "ahead": 1, "residual": True}
        yield case("Q4_K", stage=1, **own)
        yield case("Q5_0", act="silu_mul", bias=True, **own)
    yield case("Q4_1", lanes=16, act="gelu_mul", bias=True, scale=0.25, softcap=0.5, n=41)
    yield case("Q4_0", lanes=32, rows=4, bias=True, residual=True, n=37, k=576)
    yield case("Q8_0", lanes=64, rows=1, residual=True, offset=24, m=9, m_tile=8)
    yield case("F16", lanes=8, rows=2, wg=32, fold=2, n=37)
    yield case("Q4_K", lanes=1, m=20, m_tile=8, act="silu_mul")
    yield case("Q4_0", lanes=-1, subgroup=-1, rows=4, x_as="norm", k=576, n=37, m=3, residual=True, wg=128)
    for m, x_as in (
        (1, "norm"),
        (3, "ints"),
    ):  # 8 groups of 4 or 16 rows: one chunk or four of what comes out
        bytes_of = {"act": "silu_mul", "m": m, "m_tile": m, "x_as": x_as, "out_as": "ints", "wg": 64}
        yield case("Q4_K", lanes=8, subgroup=-1, rows=4, n=96, **bytes_of)
        yield case("Q4_0", lanes=4, subgroup=-1, rows=2, n=160, k=288, fold=2, **bytes_of)
        yield case("Q6_K", lanes=16, subgroup=-1, rows=8, n=64, **bytes_of)
    bytes_of |= {"m_tile": 4, "ahead": 1, "stage": 1}
    yield case("Q4_K", lanes=8, subgroup=-1, rows=4, n=96, **bytes_of)
    yield case("Q6_K", lanes=16, subgroup=-1, rows=8, n=64, **bytes_of)
    mixed = {"lanes": 8, "rows": 2, "x_as": "norm", "bias": True, "n": 57}
    yield case("Q4_K", fmt2="Q6_K", n1=32, subgroup=-1, k=768, **mixed)
    yield case("Q5_0", fmt2="Q8_0", n1=16, k=288, unroll=2, fold=2, **mixed)
    of_bytes = {**mixed, "x_as": "ints", "m": 3, "m_tile": 4, "subgroup": -1, "k": 768, "ahead": 1}
    yield case("Q4_K", fmt2="Q6_K", n1=32, stage=1, **of_bytes)
    yield case("Q5_0", fmt2="Q8_0", n1=16, fold=2, **of_bytes)
    yield case("Q4_0", lanes=16, rows=4, x_as="norm", k=576, n=37, m=3, residual=True, wg=32)
    yield case("Q5_0", lanes=32, rows=2, x_as="quantise", k=576, n=37, offset=8, wg=64, fold=2)
    yield case("Q6_K", lanes=64, rows=2, x_as="quantise", k=2304, n=9, wg=128, subgroup=-1)
