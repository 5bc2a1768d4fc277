"""The numpy twins of the kernels for mixtures of experts, as in `cpu_kernels.py`."""

from __future__ import annotations

import numpy as np

from realm_web.runtime.cpu_kernels import ACTIVATIONS, Twin, Views, activations


def moe_route(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_used = Views(views), c["st"], c["n_used"]
    step, logits, routes = v.u32(), v.f32(-1, c["n_experts"]), v.u32(-1, n_used, 2)
    n = int(step[st.N_ROWS])
    logits = logits[:n]
    best = np.argsort(-logits, axis=1, kind="stable")[:, :n_used]  # ties: the lower id first
    chosen = np.take_along_axis(logits, best, axis=1)
    share = np.exp(chosen - chosen[:, :1])
    among = share if c["renormalise"] else np.exp(logits - chosen[:, :1])
    routes[:n, :, 0] = best
    routes[:n, :, 1] = (share / among.sum(axis=1, keepdims=True)).astype(np.float32).view(np.uint32)


def moe_matvec(c: dict, views: list[np.ndarray]) -> None:
    v, st, n, k, n_used = Views(views), c["st"], c["n"], c["k"], c["n_used"]
    per = n * (2 if c["act"] else 1)
    step = v.u32()
    m = int(step[st.N_ROWS])
    x, routes = activations(c, v, m * (n_used if c["weighted"] else 1)), v.u32(-1, n_used, 2)
    weight = v.weight(c["fmt"], c["n_here"] * per, k)
    bias = v.f32(c["n_experts"], per) if c["bias"] else None
    experts, shares = routes[:m, :, 0].astype(np.int64), routes[:m, :, 1].copy().view(np.float32)
    columns = slice(c["out_offset"], c["out_offset"] + n)
    out = v.f32(-1, c["out_stride"])
    if c["weighted"] and not c["residual"]:
        out[:m, columns] = 0
    first = c["first_expert"]
    for expert in np.unique(experts[(experts >= first) & (experts < first + c["n_here"])]):
        rows, places = np.nonzero(experts == expert)
        pairs = rows * n_used + places
        start = (int(expert) - first) * per
        y = x[pairs if c["weighted"] else rows] @ weight.rows(start, start + per).T
        if bias is not None:
            y = y + bias[expert]
        if c["weighted"]:
            out[rows, columns] += y * (shares[rows, places] * np.float32(c["scale"]))[:, None]
            continue
        if c["act"]:
            y = ACTIVATIONS[c["act"]](y[:, :n], y[:, n:])
        out[pairs, columns] = out[pairs, columns] + y if c["residual"] else y


TWINS: dict[str, Twin] = {"moe_route": moe_route, "moe_matvec": moe_matvec}
