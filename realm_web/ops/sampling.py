"""From logits to tokens."""

from __future__ import annotations

from realm_web.ops.recorder import Recorder
from realm_web.tensor import Tensor

SAMPLE_PARTS = 64


def adjust_logits(r: Recorder, logits: Tensor, bias: Tensor, counts: Tensor) -> None:
    n_vocab = logits.shape[-1]
    kernel = r.device.kernel("adjust_logits", n_vocab=n_vocab, st=r.layout)
    r.add(kernel, (r.step, bias, counts, logits), (-(-n_vocab // 64), r.n_seqs))


def sample(r: Recorder, logits: Tensor, out: Tensor, *, draw: bool, counts: Tensor | None) -> None:
    """Token ids of the sequences into `out` and the slots. Without `draw` all of them must be greedy."""
    n_vocab = logits.shape[-1]
    wg = 64 if r.device.info.is_cpu else 256
    parts = 8 if r.device.info.is_cpu else SAMPLE_PARTS
    best = r.scratch("best", r.n_seqs, parts, 2)
    drawn = r.scratch("drawn", r.n_seqs)
    consts = {"n_vocab": n_vocab, "parts": parts, "st": r.layout}
    partial = r.device.kernel("sample_partial", **consts, wg=wg)
    r.add(partial, (r.step, logits, best), (parts, r.n_seqs))
    if draw:
        kernel = r.device.kernel("sample_draw", **consts, wg=wg)
        r.add(kernel, (r.step, logits, best, drawn), (r.n_seqs,))
    final = r.device.kernel("sample_final", **consts, counting=counts is not None)
    extra = () if counts is None else (counts,)
    r.add(final, (r.step, best, drawn, r.slots, out, *extra), (1,))
