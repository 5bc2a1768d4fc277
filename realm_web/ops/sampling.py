"""From logits to tokens, and to the log-probabilities of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from realm_web.ops.recorder import Recorder
from realm_web.runtime.device import View
from realm_web.tensor import Tensor


@dataclass(frozen=True)
class Shape:
    """How the work is cut. Slices do not depend on the batch, so neither do sums, nor tokens."""

    wg: int  # threads
    slice: int  # tokens of a part of the vocabulary
    top_slice: int  # the same for log-probabilities
    workgroups: int  # of all sequences together, in the passes that begin with work of their own


GPU = Shape(wg=256, slice=1024, top_slice=4096, workgroups=512)
SOFTWARE = Shape(wg=64, slice=2048, top_slice=2048, workgroups=16)
LISTED = 4064  # tokens of one sequence that the filters decide on one by one without another pass over all
BINS = 512
LOGPROB_WORDS = 41  # log-probability of the token, 20 ids, 20 log-probabilities


def sample(
    r: Recorder,
    logits: Tensor,
    out: View,
    *,
    draw: bool,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    mask: Tensor | None = None,
    logprobs: View | None = None,
    n_valid: int = 0,
) -> None:
    """Token ids of the sequences into `out` (n_seqs,) u32 and into the slots; NONE where none may be chosen.

    Without `draw` all sequences must be greedy. `bias` and `counts` (max_seqs, n_vocab), both or neither,
    hold the logit bias and the tokens so far of each slot; `mask` (max_seqs, ceil(n_vocab / 32)) u32 the
    tokens that a slot may take. `logprobs` (n_seqs, 41) u32 gets `LOGPROB_WORDS` words for each sequence that
    asks. Ids from `n_valid` on (0: n_vocab) are never chosen. The logits stay as they are.
    """
    device, n_vocab = r.device, logits.shape[-1]
    n_valid = n_valid or n_vocab
    shape = SOFTWARE if device.info.is_cpu else GPU
    wg, n_parts = shape.wg, -(-n_valid // shape.slice)
    nbytes = 4 * n_valid * r.n_seqs
    adjust, masked = counts is not None, mask is not None
    parts = r.scratch("sampling parts", r.n_seqs, n_parts, 4)
    consts = {
        "n_vocab": n_vocab, "n_valid": n_valid, "slice": shape.slice, "parts": n_parts, "wg": wg,
        "st": r.layout,
    }  # fmt: skip

    extra: list[View] = []
    adjusted = logits
    if draw:
        bins = r.scratch("sampling bins", r.n_seqs, BINS, 2)
        extra.append(bins)
        if adjust or masked:
            adjusted = r.scratch("adjusted logits", *logits.shape)
            extra.append(adjusted)
    if adjust:
        extra += [bias, counts]
    if masked:
        extra.append(mask)
    partial = device.kernel("sample_partial", **consts, draw=draw, adjust=adjust, masked=masked)
    r.add(partial, (r.step, logits, parts, *extra), (n_parts, r.n_seqs), nbytes=nbytes)

    counting = (counts,) if adjust else ()
    final = device.kernel("sample_final", **consts, listed=LISTED, draw=draw, counting=adjust)
    if draw:
        listed = r.scratch("sampling list", r.n_seqs, 1 + n_parts + LISTED)
        groups = max(1, min(n_parts, shape.workgroups // r.n_seqs))
        for name in ("sample_bins", "sample_gather"):
            kernel = device.kernel(name, **consts, groups=groups, listed=LISTED)
            r.add(kernel, (r.step, adjusted, parts, bins, listed), (groups, r.n_seqs), nbytes=nbytes)
        views = (r.step, adjusted, parts, bins, listed, r.slots, out, *counting)
    else:
        views = (r.step, parts, r.slots, out, *counting)
    r.add(final, views, (r.n_seqs,))
    if logprobs is not None:
        n_tops = -(-n_valid // shape.top_slice)
        tops = r.scratch("likeliest tokens", r.n_seqs, n_tops, 42)
        consts |= {"slice": shape.top_slice, "parts": n_tops}
        r.add(
            device.kernel("sample_top", **consts), (r.step, logits, tops), (n_tops, r.n_seqs), nbytes=nbytes
        )
        kernel = device.kernel("sample_logprobs", n_vocab=n_vocab, parts=n_tops, wg=wg, st=r.layout)
        r.add(kernel, (r.step, logits, tops, r.slots, logprobs), (r.n_seqs,))
