"""What is read off the final hidden states of prompts: log-probabilities of given tokens, and embeddings."""

from __future__ import annotations

from dataclasses import replace

from realm_web.ops.matrices import linear
from realm_web.ops.recorder import Recorder
from realm_web.ops.rows import rmsnorm
from realm_web.runtime.device import View
from realm_web.tensor import Tensor, Weight

LOGITS_BYTES = 64 << 20  # of the rows whose logits are there at a time
HEADER_ALIGNMENT = 64  # words: bindings may begin at multiples of 256 bytes


def row_scores(
    r: Recorder,
    x: Tensor,
    norm: Tensor,
    output: Weight,
    out: View,
    *,
    eps: float,
    scale: float,
    softcap: float,
    n_valid: int,
) -> None:
    """out[row] (n_rows,) f32: the natural log-probability of each row's target; 0 where it has none.

    x (n_rows, dim) are the final hidden states before their `norm`; the softmax is over the first n_valid
    columns. The logits of all rows at once would be too many, so the rows with a target are gathered into
    groups, and each group is a small step of its own.
    """
    n_vocab = output.n
    group_rows = rows_per_group(r, n_vocab)
    n_groups = -(-r.n_rows // group_rows)
    words = r.layout.seqs + group_rows * r.layout.SEQ_WORDS
    stride = -(-words // HEADER_ALIGNMENT) * HEADER_ALIGNMENT
    groups = r.scratch("score groups", n_groups, stride)
    select = r.device.kernel(
        "row_scores_select", group_rows=group_rows, n_groups=n_groups, stride=stride,
        each=-(-r.n_rows // 64), st=r.layout,
    )  # fmt: skip
    r.add(select, (r.step, groups, out), (1,))
    logits = r.scratch("score logits", group_rows, n_vocab)
    normed = r.scratch("score rows", group_rows, x.shape[-1])
    kernel = r.device.kernel(
        "row_scores", n_vocab=n_vocab, n_valid=n_valid, wg=64 if r.device.info.is_cpu else 256,
        subgroup=r.device.subgroup_size, st=r.layout,
    )  # fmt: skip
    for i in range(n_groups):
        header = View(groups.buffer, 4 * stride * i, 4 * stride)
        group = replace(r, step=header, n_rows=group_rows, n_seqs=group_rows)
        rmsnorm(group, x, norm, normed, eps, gather=True)
        linear(group, normed, output, logits, scale=scale, softcap=softcap)
        r.add(kernel, (r.step, header, logits, out), (group_rows,), nbytes=logits.nbytes)


def rows_per_group(r: Recorder, n_vocab: int) -> int:
    """How many rows have their logits in memory at a time; in whole tiles of a product where one fits."""
    room = min(LOGITS_BYTES, r.device.limits.max_binding, r.device.limits.max_buffer)
    rows = max(1, room // (4 * n_vocab))
    return min(r.n_rows, rows if rows < 32 else rows // 32 * 32)


def pool(r: Recorder, x: Tensor, norm: Tensor, kept: Tensor, out: View, *, eps: float) -> None:
    """out (n_seqs, dim) f32: the normed rows of each sequence pooled as its record's POOL says.

    A prompt may come in several steps: `kept` (max_seqs, dim) f32 holds what there is of it so far, and
    begins anew at position 0. After the last of them `out` is the mean (or last, or first row) of all; it is
    not normalised to a length. Rows of sequences that are not pooled stay as they are.
    """
    dim = x.shape[-1]
    normed = r.scratch("pooled rows", r.n_rows, dim)
    rmsnorm(r, x, norm, normed, eps)
    kernel = r.device.kernel("pool", dim=dim, st=r.layout)
    r.add(kernel, (r.step, normed, kept, out), (-(-dim // 256), r.n_seqs), nbytes=normed.nbytes)
