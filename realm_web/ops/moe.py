"""Products with the experts that a router chose for each row."""

from __future__ import annotations

from realm_web.ops.activations import Activations
from realm_web.ops.matrices import Matvec
from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import Device
from realm_web.tensor import Tensor, Weight


def choose_experts(device: Device) -> Matvec:
    """For the matrices of chosen experts, of which every row of x has its own."""
    size = device.subgroup_size
    lanes = 1 if device.info.is_cpu else size or 16
    return Matvec(lanes=lanes, rows=1, wg=max(64, lanes), m_tile=1, subgroup=size if lanes == size else 0)


def route(r: Recorder, logits: Tensor, routes: Tensor, *, renormalise: bool) -> None:
    """The best experts of each row and their weights: routes (n_rows, n_used, 2)."""
    n_experts = logits.shape[-1]
    kernel = r.device.kernel(
        "moe_route", n_experts=n_experts, n_used=routes.shape[1], renormalise=renormalise,
        wg=32 if n_experts <= 32 else 128, st=r.layout,
    )  # fmt: skip
    r.add(kernel, (r.step, logits, routes), (r.n_rows,))


def experts(
    r: Recorder,
    x: Tensor | Activations,
    weight: Weight,
    routes: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    act: str = "",
    weighted: bool = False,
    residual: bool = False,
    scale: float = 1.0,
    out_offset: int = 0,
) -> None:
    """Products of each row of x with its experts: a row of `out` for each of them.

    With `weighted` x has a row for each of them, and out their weighted sum. An expert has
    `weight.unit` rows.
    """
    n_used, halves = routes.shape[1], 2 if act else 1
    x, ints = Activations.of(x), r.ints and weight.fmt.is_quantised
    given = x.bytes(r) if ints else x.floats(r)
    n = weight.unit // halves
    for i, shard in enumerate(weight.shards):
        consts = {
            "fmt": weight.fmt.name, "k": weight.k, "n": n, "act": act, "bias": bias is not None,
            "weighted": weighted, "residual": residual or (weighted and i > 0), "scale": scale,
            "n_used": n_used, "n_experts": weight.n // weight.unit,
            "first_expert": shard.first_row // weight.unit, "n_here": shard.n_rows // weight.unit,
            "out_stride": out.shape[-1], "out_offset": out_offset,
            "x_as": "ints" if ints else "f32", "st": r.layout,
        }  # fmt: skip
        tuning = choose_experts(r.device)
        grid, fold = tuning.grid(r.device, n, r.n_rows * (1 if weighted else n_used))
        kernel = r.device.kernel(
            "moe_matvec", **consts, lanes=tuning.lanes, rows=tuning.rows, wg=tuning.wg,
            subgroup=tuning.subgroup, grid_x=fold,
        )  # fmt: skip
        views = (r.step, given, routes, *shard.parts, *([bias] if bias else []), out)
        r.add(kernel, views, grid, f"{kernel.name} {weight.label}")
