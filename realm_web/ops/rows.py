"""What happens to each row by itself: embedding, norms, gates, and the short convolution."""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import Device, View
from realm_web.tensor import Tensor, Weight


@dataclass(frozen=True)
class State:
    """What a short convolution keeps of each slot's sequence: its last `length` values, (length, dim) f32."""

    values: View
    length: int
    stride: int  # elements from one slot to the next


def embed(r: Recorder, weight: Weight, out: Tensor, scale: float = 1.0) -> None:
    for shard in weight.shards:
        kernel = r.device.kernel(
            "embed", fmt=weight.fmt.name, dim=weight.k, first_row=shard.first_row,
            n_shard_rows=shard.n_rows, scale=scale, st=r.layout,
        )  # fmt: skip
        threads = r.n_rows * weight.k // 32
        r.add(
            kernel,
            (r.step, r.slots, *shard.parts, out),
            (-(-threads // 64),),
            f"embed {weight.label}",
        )


def row_threads(device: Device, dim: int) -> int:
    """Threads of a workgroup that has a row to itself: a vector of 4 for each, if there may be so many."""
    if device.info.is_cpu:
        return 64
    return max(64, min(1 << (dim // 4 - 1).bit_length(), 1024, device.limits.max_invocations))


def rmsnorm(
    r: Recorder, x: Tensor, weight: Tensor, out: Tensor, eps: float, *,
    gather: bool = False, residual: bool = False, ints: bool = False,
    then: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """out = norm(x) * weight, or += with residual. gather: out's rows are those that draw a token.

    With `ints` out's rows are bytes and scales, `activation_words(dim)` of them. `then`: a weight and rows of
    bytes for the norm of what becomes of out.
    """
    dim = x.shape[-1]
    kernel = r.device.kernel(
        "rmsnorm", dim=dim, eps=eps, gather=gather, residual=residual, ints=ints,
        then=then is not None, wg=row_threads(r.device, dim), subgroup=r.device.subgroup_size, st=r.layout,
    )  # fmt: skip
    r.add(kernel, (r.step, x, weight, out, *(then or ())), (r.n_seqs if gather else r.n_rows,))


def gated(r: Recorder, x: Tensor, out: Tensor, act: str) -> None:
    """out = act(gate) * up, where x holds gate and up side by side."""
    n, dim = out.shape
    kernel = r.device.kernel("gated", act=act, dim=dim, times=n // r.n_rows, st=r.layout)
    r.add(kernel, (r.step, x, out), (-(-n * dim // 256),))


def qk_norm(r: Recorder, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> None:
    """Norm q and k in place, each over all of its heads."""
    kernel = r.device.kernel(
        "qk_norm", len_q=q_weight.shape[0], len_k=k_weight.shape[0], stride=qkv.shape[-1], eps=eps, wg=256,
        subgroup=r.device.subgroup_size, st=r.layout,
    )  # fmt: skip
    r.add(kernel, (r.step, qkv, q_weight, k_weight), (2, r.n_rows))


def short_conv(r: Recorder, bcx: Tensor, weight: Tensor, state: State, out: Tensor) -> None:
    """out = c * conv(b * x) by channel, over the state and this step's rows; moves the state on."""
    dim, l_cache = weight.shape
    consts = {"dim": dim, "l_cache": l_cache, "stride": state.stride, "st": r.layout}
    kernel = r.device.kernel("short_conv", **consts)
    r.add(kernel, (r.step, bcx, weight, state.values, out), (-(-dim // 256), r.n_rows))
