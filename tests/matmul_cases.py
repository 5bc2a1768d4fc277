"""The kernel cases of matrix products of many rows; `kernel_cases.cases` includes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from kernel_cases import FMA, HALF, ST, Case, normal, packed, step_words
from matrix_cases import STEP

from realm_web.quants import FORMATS, activation_words
from realm_web.runtime.cpu_kernels import put_bytes, to_bytes
from realm_web.step import NONE


def cases() -> Iterator[Case]:
    yield from tile_cases()
    yield from half_rows_cases()
    yield from units_cases()
    yield from sum_cases()


def tile_cases() -> Iterator[Case]:
    def case(fmt, m, n, k, x_as, act="", bias=False, residual=False, offset=0, per_seq=False, **tuning):
        rows = quantised if x_as == "ints" else lambda x: x
        consts, tensors, out, grid = _product(
            fmt, m, n, k, act, bias, residual, offset, tuning, lambda rng: [rows(normal(rng, m, k))], per_seq
        )
        name = (
            f"matmul {fmt} {m}x{n}x{k} {x_as}{' ' * bool(act) + act}{' per_seq' * per_seq} {_short(tuning)}"
        )
        return Case(name, "matmul", consts | {"x_as": x_as}, tensors, (2 + out,), grid, FMA)

    small = {"bm": 16, "bn": 64, "tm": 4, "tn": 4, "chunks": 1, "stages": 1, "splits": 1}
    for fmt in FORMATS:
        for x_as in ("ints", "f32") if FORMATS[fmt].is_quantised else ("f32",):
            chunks = 2 if x_as == "ints" else 1
            yield case(
                fmt, 20, 70, 256, x_as, bias=True, residual=True, offset=6, **small | {"chunks": chunks}
            )
    for fmt in ("Q4_1", "Q4_K", "Q6_K", "Q2_K"):
        for x_as in ("ints", "f32"):
            yield case(fmt, 70, 70, 256, x_as, "silu_mul", **small | {"bm": 64, "tm": 8})
            yield case(fmt, 32, 64, 512, x_as, **small | {"splits": 4, "stages": 2})
    yield case(
        "Q4_K", 32, 64, 512, "ints", "gelu_mul", **small | {"bm": 32, "tn": 8, "chunks": 4, "splits": 2}
    )
    yield case("Q4_K", 3, 70, 256, "ints", per_seq=True, **small)
    yield case("F16", 3, 70, 256, "f32", per_seq=True, **small | {"bn": 32})
    yield case("F16", 20, 70, 96, "f32", **small | {"bn": 32, "stages": 2})


def half_rows_cases() -> Iterator[Case]:
    for k, norm, gather, subgroup in (
        (64, False, False, 0), (1120, False, False, -1), (1120, True, False, 0), (64, True, True, -1),
    ):  # fmt: skip

        def tensors(rng, k=k, norm=norm, gather=gather):
            # with a norm squares must be float32; and no value below 1e-38, where its bits run out
            low, high = (-36, 18) if norm else (-30, 30)
            x = normal(rng, 6, k) * 10.0 ** rng.integers(low, high, (6, 1)).astype(np.float32)
            x[1] = 0
            step = step_words([(0, 3), (3, 1), (9, 1)], rng=rng)
            if gather:
                step[ST.seqs + ST.SEQ_WORDS + ST.LOGITS_ROW] = NONE
            weight = [normal(rng, k)] * norm
            return [step, x, *weight, np.zeros((6, k), np.float16), np.zeros(6, np.float32)]

        consts = {
            "k": k, "rows": 6, "norm": norm, "eps": 1e-6 if norm else 0.0, "gather": gather, "per_seq": False,
            "wg": 64, "subgroup": subgroup, "st": ST,
        }  # fmt: skip
        name = f"half_rows {k}{' normed' * norm}{' gather' * gather}{' subgroups' * bool(subgroup)}"
        needs = ("subgroups",) if subgroup else ()
        # packing may truncate instead of rounding (WGSL leaves it open): one unit of f16
        yield Case(name, "half_rows", consts, tensors, (2 + norm,), (6,), 1e-3, needs, subgroup, "f16")
        yield Case(name + " scale", "half_rows", consts, tensors, (3 + norm,), (6,), 0.0, needs, subgroup)


def _short(tuning: dict[str, int]) -> str:
    return " ".join(f"{name} {value}" for name, value in tuning.items() if (name, value) != ("splits", 1))


def _product(fmt, m, n, k, act, bias, residual, offset, tuning, x, per_seq=False):
    """Constants, tensors and the index of the output of a product whose rows `x(rng)` makes."""
    stride, n_weights, splits = n + offset, n * (2 if act else 1), tuning["splits"]
    m_pad, n_pad = -(-m // tuning["bm"]) * tuning["bm"], -(-n_weights // tuning["bn"]) * tuning["bn"]

    def tensors(rng):
        step = step_words([(0, 1), (2, m - 1)] if not per_seq else [(i, 1) for i in range(m)], rng=rng)
        rows = x(rng)
        weight = packed(fmt, n_weights, k, rng)
        if splits > 1:
            return [step, *rows, *weight, np.zeros((splits, m_pad, n_pad), np.float32)]
        return [step, *rows, *weight, *([normal(rng, stride)] * bias), normal(rng, m, stride)]

    consts = {
        "fmt": fmt, "k": k, "n": n, "act": act, "bias": bias, "residual": residual, "scale": 1.0,
        "softcap": 0.0, "out_stride": stride, "out_offset": offset, "per_seq": per_seq, "st": ST,
    }  # fmt: skip
    grid = (n_pad // tuning["bn"], m_pad // tuning["bm"], splits)
    return consts | tuning, tensors, FORMATS[fmt].n_bindings + (bias and splits == 1), grid


def units_cases() -> Iterator[Case]:
    def case(fmt, m, n, k, act="", bias=False, residual=False, offset=0, **tuning):
        def x(rng):
            rows = normal(rng, m, k).astype(np.float16)
            return [rows, 2.0 ** rng.integers(-9, 9, m).astype(np.float32)]

        consts, tensors, out, grid = _product(fmt, m, n, k, act, bias, residual, offset, tuning, x)
        consts |= {"rows": m}
        name = f"matmul_units {fmt} {m}x{n}x{k}{' ' * bool(act) + act} {_short(tuning)}"
        tolerance = FMA if fmt in ("F16", "BF16") else HALF  # the weights, too, become float16
        return Case(name, "matmul_units", consts, tensors, (3 + out,), grid, tolerance, ("subgroup_matrix",))

    tiles = {"bm": 32, "bn": 64, "sm": 32, "sn": 32, "chunks": 1, "stages": 1, "splits": 1, "turned": 0}
    for fmt in FORMATS:
        yield case(fmt, 20, 70, 256, bias=True, residual=True, offset=6, **tiles)
    for fmt in ("Q4_K", "Q6_K", "F16"):
        yield case(fmt, 70, 70, 256, "silu_mul", bias=True, **tiles | {"bm": 64, "chunks": 2})
        yield case(fmt, 32, 64, 512, **tiles | {"splits": 2, "stages": 2, "turned": 1})
        yield case(fmt, 32, 128, 512, **tiles | {"splits": 2, "chunks": 2, "turned": 1})
        yield case(
            fmt, 20, 70, 256, "silu_mul", bias=True, residual=True, **tiles | {"chunks": 2, "stages": 2}
        )
    yield case("Q4_1", 32, 64, 512, "gelu_mul", **tiles | {"splits": 4, "sm": 16})


def quantised(x: np.ndarray) -> np.ndarray:
    """Rows (m, k) as `lib/ints.wgsl` has them."""
    words = np.zeros((len(x), activation_words(x.shape[1])), np.uint32)
    put_bytes(words, slice(None), *to_bytes(x))
    return words


def sum_cases() -> Iterator[Case]:
    m, m_pad, words = 5, 16, activation_words

    def case(n, act, splits, *, scaled=False, made="", norm=False, kept=True, width=1, offset=0, wg=64):
        stride = -(-n * (2 if act else 1) // 64) * 64
        # what no softcap has brought near the middle between two bytes
        epilogue = {"scale": 0.5, "softcap": 3.0} if not made else {"scale": 1.0, "softcap": 0.0}

        def tensors(rng):
            step = step_words([(0, 2), (2, 3)], rng=rng)
            rows = [2.0 ** rng.integers(-3, 3, m + 1).astype(np.float32)] * scaled
            given = [normal(rng, n + offset), *[normal(rng, m + 1, n + offset)] * kept]
            given += [normal(rng, n)] * norm
            if made == "bytes":
                given += [np.zeros((m + 1, words(n)), np.uint32)]
            elif made == "halves":
                given += [np.zeros((m + 1, n), np.float16), np.zeros(m + 1, np.float32)]
            return [step, normal(rng, splits, m_pad, stride), *rows, *given]

        consts = {
            "n": n, "act": act, "bias": True, "residual": kept, **epilogue, "out_stride": n + offset,
            "out_offset": offset, "per_seq": False, "st": ST, "splits": splits, "m_pad": m_pad,
            "stride": stride, "group": 16, "scaled": scaled, "made": made, "norm": norm,
            "eps": 1e-5 if norm else 0.0, "kept": kept, "rows": m + 1, "width": width, "wg": wg,
            "subgroup": -1 if made else 0,
        }  # fmt: skip
        name = (
            f"matmul_sum {n} of {splits}{' ' * bool(act) + act}{' scaled' * scaled} by {width}"
            f"{' normed' * norm}"
        )
        grid = (1 if norm or made == "halves" else -(-n // (width * wg)), m + 1)
        needs, subgroup = (("subgroups",), -1) if made else ((), 0)

        def output(what, index, tolerance, dtype="f32"):
            return Case(
                name + what, "matmul_sum", consts, tensors, (index,), grid, tolerance, needs, subgroup, dtype
            )

        out = 3 + scaled
        if kept:
            yield output("", out, FMA)
        after = out + kept + norm
        if made == "bytes":
            yield output(" to bytes", after, STEP, f"bytes of {n}")
        elif made == "halves":
            yield output(" to halves", after, 1e-3, "f16")  # packing may truncate: one unit of f16
            yield output(" scale", after + 1, 0.0)

    yield from case(70, "", 2, offset=2)
    yield from case(70, "silu_mul", 3, scaled=True, offset=2)
    yield from case(72, "", 2, scaled=True, offset=4, width=4)
    yield from case(272, "gelu_mul", 3, width=4)
    yield from case(288, "silu_mul", 2, made="bytes", kept=False, width=4)
    yield from case(320, "", 2, made="bytes", norm=True, width=4)
    yield from case(64, "", 8, made="bytes", norm=True, width=4, scaled=True)
    yield from case(288, "silu_mul", 2, made="halves", kept=False, width=4, scaled=True)
    yield from case(320, "", 2, made="halves", norm=True, width=4, scaled=True)
