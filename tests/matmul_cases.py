"""The kernel cases of matrix products of many rows; `kernel_cases.cases` includes them."""

from __future__ import annotations

from collections.abc import Iterator

from kernel_cases import FMA, HALF, SHAPES, ST, Case, linear_tensors

from realm_web.quants import FORMATS


def cases() -> Iterator[Case]:
    for fmt in FORMATS:
        for f16 in (False, True) if fmt in SHAPES else (False,):
            for bm, m, act, residual in ((32, 20, "", True), (64, 70, "silu_mul", False)):
                if act and fmt not in ("Q4_1", "Q4_K", "Q6_K"):
                    continue
                n, k, offset = 70, 256, 6
                tensors, out = linear_tensors(fmt, n, k, m, act, residual, residual, n + offset)
                consts = {
                    "fmt": fmt, "k": k, "n": n, "act": act, "bias": residual, "residual": residual,
                    "scale": 1.0, "softcap": 0.0,
                    "out_stride": n + offset, "out_offset": offset, "bm": bm, "f16": f16, "st": ST,
                }  # fmt: skip
                name = f"matmul {fmt} {m}x{n}x{k} bm {bm}{' f16' * f16}{' ' * bool(act) + act}"
                grid = (-(-n // (32 if act else 64)), -(-m // bm))
                tolerance = HALF if f16 else FMA
                yield Case(name, "matmul", consts, tensors, (out,), grid, tolerance, ("f16",) * f16)
