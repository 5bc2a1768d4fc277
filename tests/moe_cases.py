"""The kernel cases of mixtures of experts; `kernel_cases.cases` includes them."""

from collections.abc import Iterator

import numpy as np
from kernel_cases import EXACT, FMA, ST, SUM, Case, normal, packed, step_words
from matrix_cases import in_bytes

from realm_web.quants import FORMATS


def cases() -> Iterator[Case]:
    yield from route_cases()
    yield from matvec_cases()


def route_cases() -> Iterator[Case]:
    shapes = ((5, 1, 32, False), (32, 4, 32, True), (128, 8, 128, False), (300, 8, 64, True))
    for n_experts, n_used, wg, renormalise in shapes:

        def tensors(rng, n_experts=n_experts, n_used=n_used):
            logits = normal(rng, 7, n_experts) * 3
            logits[1] = np.round(logits[1])  # ties
            logits[2] *= 30  # all but the first weigh nothing
            return [step_words([(0, 5), (3, 1)], rng=rng), logits, np.zeros((7, n_used, 2), np.float32)]

        consts = {"n_experts": n_experts, "n_used": n_used, "renormalise": renormalise, "wg": wg, "st": ST}
        name = f"moe_route {n_used} of {n_experts}{' renormalised' * renormalise}"
        # as float32 the ids are too small to be seen, hence a case for them alone
        yield Case(name + " weights", "moe_route", consts, tensors, (2,), (7,), SUM)
        yield Case(
            name + " experts", "moe_route", consts, _experts_only(tensors), (2,), (7,), EXACT, dtype="u32"
        )


def _experts_only(tensors):
    """Logits so far apart that the best has all of the weight, and the order is all that shows."""

    def made(rng):
        step, logits, routes = tensors(rng)
        order = np.argsort(np.argsort(logits, axis=1), axis=1)
        return [step, (200 * order).astype(np.float32), routes.view(np.uint32)]

    return made


def matvec_cases() -> Iterator[Case]:
    def case(fmt, *, n=40, k=256, m=3, act="", bias=False, weighted=False, residual=False, scale=1.0,
             n_used=2, n_experts=5, here=None, offset=0, lanes=1, rows=1, wg=64, subgroup=0,
             fold=0, x_as="f32"):  # fmt: skip
        per = n * (2 if act else 1)
        first, n_here = here or (0, n_experts)

        def tensors(rng):
            routes = np.zeros((m, n_used, 2), np.uint32)
            routes[..., 0] = np.argsort(rng.random((m, n_experts)), axis=1)[:, :n_used]
            routes[..., 1] = rng.random((m, n_used), dtype=np.float32).view(np.uint32)
            x = normal(rng, m * n_used if weighted else m, k)
            x = in_bytes(x) if x_as == "ints" else x
            out = normal(rng, m if weighted else m * n_used, n + offset)
            extra = [normal(rng, n_experts, per) * 5] * bias
            return [step_words([(0, m)], rng=rng), x, routes, *packed(fmt, n_here * per, k, rng), *extra, out]

        consts = {
            "fmt": fmt, "k": k, "n": n, "act": act, "bias": bias, "weighted": weighted, "residual": residual,
            "scale": scale, "n_used": n_used, "n_experts": n_experts, "first_expert": first, "n_here": n_here,
            "out_stride": n + offset, "out_offset": offset, "lanes": lanes, "rows": rows, "wg": wg,
            "subgroup": subgroup, "grid_x": fold, "x_as": x_as, "st": ST,
        }  # fmt: skip
        name = (
            f"moe_matvec {fmt} {n_used} of {n_experts} {n}x{k} m {m} lanes {lanes} rows {rows} wg {wg}"
            f"{' subgroups' * bool(subgroup)}{' ' * bool(act) + act}{' bias' * bias}{' weighted' * weighted}"
            f"{' residual' * residual}{' sharded' * bool(here)}{' fold' * bool(fold)}"
            f"{' from bytes' * (x_as == 'ints')}"
        )
        outputs = (3 + FORMATS[fmt].n_bindings + bias,)
        grid = (fold, m if weighted else m * n_used, 1)
        needs = ("subgroups",) * bool(subgroup)
        return Case(name, "moe_matvec", consts, tensors, outputs, grid, FMA, needs, subgroup)

    for fmt in FORMATS:
        yield case(fmt, act="silu_mul")
        yield case(fmt, lanes=16, weighted=True, residual=True)
    for fmt in ("Q4_0", "Q4_K", "Q6_K", "MXFP4", "IQ2_S"):
        yield case(fmt, act="silu_mul", x_as="ints", lanes=16, rows=2)
        yield case(fmt, weighted=True, residual=True, x_as="ints", here=(1, 3))
    oai = {"act": "swiglu_oai", "bias": True}
    yield case("Q8_0", **oai)
    yield case("Q8_0", **oai, lanes=32, rows=2, n=37, k=96)
    yield case("Q4_1", offset=24, bias=True, lanes=16, residual=True)
    yield case("F16", weighted=True, bias=True, scale=0.5, lanes=64, n=37, n_used=3)
    yield case("Q4_K", act="gelu_mul", here=(1, 3), lanes=16, m=9)
    yield case("Q4_0", weighted=True, bias=True, residual=True, here=(2, 2), lanes=16, m=9)
    yield case("Q4_0", weighted=True, bias=True, residual=True, here=(2, 2), m=9, fold=2, wg=8)
    for lanes, wg in ((-1, 64), (64, 128)):  # -1: the device's subgroup size
        yield case("Q4_K", **oai, lanes=lanes, wg=wg, subgroup=-1, rows=2, n=37)
        yield case("Q4_0", weighted=True, residual=True, lanes=lanes, wg=wg, subgroup=-1, here=(1, 2), k=96)
