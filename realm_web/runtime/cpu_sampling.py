"""The numpy twins of the kernels that choose tokens, as in `cpu_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from realm_web.runtime.cpu_kernels import NONE, Twin, Views, record_float

LOWEST = np.float32(-3.4e38)
N_BINS = 512
N_TOP = 20


def sample_partial(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab, n_valid = Views(views), c["st"], c["n_vocab"], c["n_valid"]
    step, logits, parts = v.u32(), v.f32(-1, n_vocab), v.u32(-1, c["parts"], 4)
    bins = v.u32(-1, N_BINS, 2) if c["draw"] else None
    adjusted = v.f32(-1, n_vocab) if c["draw"] and (c["adjust"] or c["masked"]) else None
    bias, counts = (v.f32(-1, n_vocab), v.u32(-1, n_vocab)) if c["adjust"] else (None, None)
    mask = v.u32(-1, -(-n_vocab // 32)) if c["masked"] else None
    for s, record in _sampled(step, st):
        slot = record[st.SLOT]
        row = logits[s, :n_valid]
        if counts is not None:
            row = _adjusted(step, st, s, row, bias[slot, :n_valid], counts[slot, :n_valid])
        if mask is not None and record[st.DRAW_POSITION] < record[st.MASK_UNTIL]:
            allowed = np.unpackbits(mask[slot].view(np.uint8), bitorder="little")[:n_valid]
            row = np.where(allowed, row, LOWEST)
        if adjusted is not None:
            adjusted[s, :n_valid] = row
        if bins is not None:
            bins[s] = 0
        inverse = np.float32(1) / max(record_float(step, st, s, st.TEMPERATURE), np.float32(1e-6))
        for p in range(c["parts"]):
            here = row[p * c["slice"] : (p + 1) * c["slice"]]
            counted = here > LOWEST
            top, token, total, low = LOWEST, NONE, np.float32(0), np.float32(3.4e38)
            if counted.any():
                i = int(np.where(counted, here, LOWEST).argmax())
                top, token, low = here[i], p * c["slice"] + i, here[counted].min()
                total = np.exp((here[counted] - top) * inverse).sum(dtype=np.float32)
            parts[s, p] = _bits(top), token, 0, 0
            if c["draw"]:
                parts[s, p, 2:] = _bits(total), _bits(low)


def _adjusted(
    step: np.ndarray, st: Any, seq: int, row: np.ndarray, bias: np.ndarray, count: np.ndarray
) -> np.ndarray:
    repetition, presence, frequency = (
        record_float(step, st, seq, word) for word in (st.REPETITION, st.PRESENCE, st.FREQUENCY)
    )
    row = row + bias
    row = np.where(count > 0, np.where(row > 0, row / repetition, row * repetition), row)
    drawn = (count & 0x7FFFFFFF).astype(np.float32)
    return row - frequency * drawn - np.where(drawn > 0, presence, np.float32(0))


def sample_bins(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab = Views(views), c["st"], c["n_vocab"]
    step, logits, parts = v.u32(), v.f32(-1, n_vocab), v.u32(-1, c["parts"], 4)
    bins, listed = v.u32(-1, N_BINS, 2), v.u32(-1, 1 + c["parts"] + c["listed"])
    for s, record in _sampled(step, st):
        if _draws(step, st, s) and _filters(step, st, s):
            listed[s, 0] = 0
            mass, bin_ = _masses(c, step, s, logits[s, : c["n_valid"]], parts[s])
            if record[st.TOP_K]:
                bins[s, :, 0] += np.bincount(bin_[mass > 0], minlength=N_BINS).astype(np.uint32)
            bins[s, :, 1] += np.bincount(bin_, weights=mass, minlength=N_BINS).astype(np.uint32)


def sample_gather(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab = Views(views), c["st"], c["n_vocab"]
    step, logits, parts = v.u32(), v.f32(-1, n_vocab), v.u32(-1, c["parts"], 4)
    bins, listed = v.u32(-1, N_BINS, 2), v.u32(-1, 1 + c["parts"] + c["listed"])
    for s, record in _sampled(step, st):
        if not _draws(step, st, s):
            continue
        mass, bin_ = _masses(c, step, s, logits[s, : c["n_valid"]], parts[s])
        cut_k = first = last = N_BINS
        if _filters(step, st, s):
            upto = np.cumsum(bins[s], axis=0, dtype=np.int64)
            if record[st.TOP_K]:
                cut_k = int(np.searchsorted(upto[:, 0], record[st.TOP_K]))
            top_p = record_float(step, st, s, st.TOP_P)
            if top_p < 1:
                least = upto[cut_k - 1, 1] if cut_k else 0
                most = upto[min(cut_k, N_BINS - 1), 1]
                first, last = (int(np.searchsorted(upto[:, 1], _goal(top_p, m))) for m in (least, most))
        stays = np.where(bin_ < min(cut_k, first), mass, 0)
        listed[s, 1 : 1 + c["parts"]] = _by_part(c, stays)
        unsure = (mass > 0) & (bin_ >= min(cut_k, first))
        ids = np.flatnonzero(unsure & ((bin_ == cut_k) | ((bin_ >= first) & (bin_ <= last))))
        if _filters(step, st, s):
            listed[s, 0] = len(ids)
            listed[s, 1 + c["parts"] :][: len(ids)] = ids[: c["listed"]]


def sample_final(c: dict, views: list[np.ndarray]) -> None:
    """Decides over all tokens at once: needs neither bins nor list."""
    v, st, n_vocab, draw = Views(views), c["st"], c["n_vocab"], c["draw"]
    step = v.u32()
    logits = v.f32(-1, n_vocab) if draw else None
    parts = v.u32(-1, c["parts"], 4)
    if draw:
        v.u32(), v.u32()
    slots, out = v.u32(), v.u32()
    counts = v.u32(-1, n_vocab) if c["counting"] else None
    for s, record in _sampled(step, st):
        tops = parts[s, :, 0].copy().view(np.float32)
        token = int(parts[s, int(tops.argmax()), 1])
        if draw and _draws(step, st, s):
            token = _drawn(c, step, s, record, logits[s, : c["n_valid"]], parts[s])
        slots[record[st.SLOT]] = out[s] = token
        if counts is not None and token < n_vocab:
            counts[record[st.SLOT], token] += 1
        if step[st.ADVANCE]:
            row = int(record[st.LOGITS_ROW])
            step[st.tokens + row] = token
            step[st.positions + row] += 1
            record[st.KV_LEN] += 1
            record[st.DRAW_POSITION] += 1


def _drawn(c: dict, step: np.ndarray, s: int, record: np.ndarray, row: np.ndarray, parts: np.ndarray) -> int:
    st = c["st"]
    mass, _ = _masses(c, step, s, row, parts)
    kept = mass > 0
    top_k, top_p = int(record[st.TOP_K]), record_float(step, st, s, st.TOP_P)
    if 0 < top_k < int(kept.sum()):
        kept &= row >= np.partition(row[kept], -top_k)[-top_k]
    if top_p < 1 and kept.any():
        goal = _goal(top_p, mass[kept].sum())
        order = np.argsort(-row, kind="stable")
        order = order[kept[order]]
        reached = int(np.searchsorted(np.cumsum(mass[order]), goal))
        kept &= row >= row[order[min(reached, len(order) - 1)]]
    sums = np.cumsum(np.where(kept, mass, 0))
    left = hash_u32(int(record[st.SEED]), int(record[st.DRAW_POSITION])) * int(sums[-1]) >> 32
    return int(np.searchsorted(sums, left, side="right")) if sums[-1] else NONE


def sample_top(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab = Views(views), c["st"], c["n_vocab"]
    step, logits, tops = v.u32(), v.f32(-1, n_vocab), v.u32(-1, c["parts"], 2 + 2 * N_TOP)
    for s, record in _sampled(step, st):
        if not record[st.TOP_LOGPROBS]:
            continue
        for p in range(c["parts"]):
            start = p * c["slice"]
            here = logits[s, start : min(start + c["slice"], c["n_valid"])]
            ids = np.argsort(-here, kind="stable")[:N_TOP]
            ids = ids[here[ids] > LOWEST]
            largest = here[ids[0]] if len(ids) else LOWEST
            total = np.exp(here[here > LOWEST] - largest).sum(dtype=np.float32)
            tops[s, p, :2] = _bits(largest), _bits(total)
            pairs = tops[s, p, 2:].reshape(N_TOP, 2)
            pairs[:] = _bits(LOWEST), NONE
            pairs[: len(ids), 0], pairs[: len(ids), 1] = here[ids].view(np.uint32), ids + start


def sample_logprobs(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab = Views(views), c["st"], c["n_vocab"]
    step, logits, tops = v.u32(), v.f32(-1, n_vocab), v.u32(-1, c["parts"], 2 + 2 * N_TOP)
    slots, logprobs = v.u32(), v.u32(-1, 1 + 2 * N_TOP)
    for s, record in _sampled(step, st):
        if not record[st.TOP_LOGPROBS]:
            continue
        largest, total = (tops[s, :, i].copy().view(np.float32) for i in range(2))
        normaliser = largest.max() + np.log((total * np.exp(largest - largest.max())).sum())
        pairs = tops[s, :, 2:].reshape(-1, 2)
        values = pairs[:, 0].copy().view(np.float32)
        best = np.lexsort((pairs[:, 1], -values))[:N_TOP]
        logprobs[s, 1 : 1 + N_TOP] = pairs[best, 1]
        shown = np.where(pairs[best, 1] == NONE, LOWEST, values[best] - normaliser)
        logprobs[s, 1 + N_TOP :] = shown.astype(np.float32).view(np.uint32)
        token = int(slots[record[st.SLOT]])
        logprobs[s, 0] = _bits(logits[s, token] - normaliser if token < n_vocab else LOWEST)


def hash_u32(seed: int, position: int) -> int:
    h = seed ^ (position * 0x9E3779B9) & NONE
    for _ in range(2):
        h = (h * 747796405 + 2891336453) & NONE
        w = (((h >> ((h >> 28) + 4)) ^ h) * 277803737) & NONE
        h = (w >> 22) ^ w
    return h


def _sampled(step: np.ndarray, st: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Index and record of every sequence that gets a token in this step."""
    for s in range(int(step[st.N_SEQS])):
        record = step[st.seqs + s * st.SEQ_WORDS :][: st.SEQ_WORDS]
        if record[st.LOGITS_ROW] != NONE:
            yield s, record


def _draws(step: np.ndarray, st: Any, seq: int) -> bool:
    return record_float(step, st, seq, st.TEMPERATURE) > 0


def _filters(step: np.ndarray, st: Any, seq: int) -> bool:
    top_k = step[st.seqs + seq * st.SEQ_WORDS + st.TOP_K]
    return bool(top_k > 0 or record_float(step, st, seq, st.TOP_P) < 1)


def _goal(top_p: np.float32, kept: Any) -> int:
    return max(int(np.ceil(top_p * np.float32(kept))), 1)


def _by_part(c: dict, mass: np.ndarray) -> np.ndarray:
    return np.add.reduceat(mass, np.arange(c["parts"]) * c["slice"]).astype(np.uint32)


def _masses(
    c: dict, step: np.ndarray, s: int, row: np.ndarray, parts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mass in units of 2**-30 after min-p, and bin, of every token: two (n_valid,) of int64."""
    st = c["st"]
    inverse = np.float32(1) / record_float(step, st, s, st.TEMPERATURE)
    tops, sums, lows = (parts[:, i].copy().view(np.float32) for i in (0, 2, 3))
    top = tops.max()
    whole = (sums * np.exp((tops - top) * inverse)).sum(dtype=np.float32)
    row = np.where(row > LOWEST, row, LOWEST)
    p = np.exp((row - top) * inverse)
    kept = (p >= record_float(step, st, s, st.MIN_P)) & (row > LOWEST)
    mass = np.where(kept & (whole > 0), p * (np.float32(2**30) / np.maximum(whole, np.float32(1e-30))), 0)
    span = np.clip((top - lows.min()) * inverse, np.float32(1e-6), np.float32(21))
    per_bin = np.exp2(np.float32(9) - np.frexp(span)[1])  # 256 to 512 bins over the span
    bins = np.clip((top - row) * inverse * per_bin, np.float32(0), np.float32(N_BINS - 1))
    return mass.astype(np.int64), bins.astype(np.int64)


def _bits(value: Any) -> np.uint32:
    return np.float32(value).view(np.uint32)


TWINS: dict[str, Twin] = {
    twin.__name__: twin
    for twin in (sample_partial, sample_bins, sample_gather, sample_final, sample_top, sample_logprobs)
}
