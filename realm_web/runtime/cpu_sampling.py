"""The numpy twins of the kernels that choose tokens, as in `cpu_kernels.py`."""

from __future__ import annotations

import numpy as np

from realm_web.runtime.cpu_kernels import NONE, Twin, Views, record_float, records_of

LOWEST = np.float32(-3.4e38)


def adjust_logits(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab = Views(views), c["st"], c["n_vocab"]
    step, bias, counts, logits = v.u32(), v.f32(-1, n_vocab), v.u32(-1, n_vocab), v.f32(-1, n_vocab)
    for s, slot in enumerate(records_of(step, st, st.SLOT)):
        count, row = counts[slot], logits[s] + bias[slot]
        repetition, presence, frequency = (
            record_float(step, st, s, word) for word in (st.REPETITION, st.PRESENCE, st.FREQUENCY)
        )
        drawn = (count & 0x7FFFFFFF).astype(np.float32)
        row = np.where(count > 0, np.where(row > 0, row / repetition, row * repetition), row)
        logits[s] = row - frequency * drawn - np.where(drawn > 0, presence, 0)


def sample_partial(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab, parts = Views(views), c["st"], c["n_vocab"], c["parts"]
    step, logits, best = v.u32(), v.f32(-1, n_vocab), v.u32(-1, parts, 2)
    size = -(-n_vocab // parts)
    for s in range(int(step[st.N_SEQS])):
        for p in range(parts):
            row = logits[s, p * size : (p + 1) * size]
            row = np.where(row > LOWEST, row, LOWEST)
            if len(row) and row.max() > LOWEST:
                i = int(row.argmax())
                best[s, p] = row[i : i + 1].view(np.uint32)[0], p * size + i
            else:
                best[s, p] = LOWEST.view(np.uint32), NONE


def sample_draw(c: dict, views: list[np.ndarray]) -> None:
    v, st, n_vocab = Views(views), c["st"], c["n_vocab"]
    step, logits, best, drawn = v.u32(), v.f32(-1, n_vocab), v.u32(-1, c["parts"], 2), v.u32()
    for s in range(int(step[st.N_SEQS])):
        temperature = record_float(step, st, s, st.TEMPERATURE)
        if temperature <= 0:
            continue
        record = step[st.seqs + s * st.SEQ_WORDS :][: st.SEQ_WORDS]
        row = logits[s]
        top = best[s, :, 0].copy().view(np.float32).max()
        p = np.exp((row - top) * (np.float32(1) / temperature))
        mass = (p * (np.float32(2**30) / p.sum(dtype=np.float32))).astype(np.uint32).astype(np.int64)
        kept = p >= record_float(step, st, s, st.MIN_P)
        top_k, top_p = int(record[st.TOP_K]), record_float(step, st, s, st.TOP_P)
        if 0 < top_k < int(kept.sum()):
            kept &= row >= np.partition(row[kept], -top_k)[-top_k]
        if top_p < 1:
            goal = max(int(np.ceil(top_p * np.float32(mass[kept].sum()))), 1)
            order = np.argsort(-row, kind="stable")
            order = order[kept[order]]
            reached = int(np.searchsorted(np.cumsum(mass[order]), goal))
            kept &= row >= row[order[min(reached, len(order) - 1)]]
        mass[~kept] = 0
        sums = np.cumsum(mass)
        left = hash_u32(int(record[st.SEED]), int(record[st.DRAW_POSITION])) * int(sums[-1]) >> 32
        drawn[s] = np.searchsorted(sums, left, side="right")


def sample_final(c: dict, views: list[np.ndarray]) -> None:
    v, st = Views(views), c["st"]
    step, best, drawn, slots, out = v.u32(), v.u32(-1, c["parts"], 2), v.u32(), v.u32(), v.u32()
    counts = v.u32(-1, c["n_vocab"]) if c["counting"] else None
    for s in range(int(step[st.N_SEQS])):
        record = step[st.seqs + s * st.SEQ_WORDS :][: st.SEQ_WORDS]
        row = int(record[st.LOGITS_ROW])
        if row == NONE:
            continue
        token = int(drawn[s])
        if record_float(step, st, s, st.TEMPERATURE) <= 0:
            tops = best[s, :, 0].copy().view(np.float32)
            token = int(best[s, int(tops.argmax()), 1])
        slots[record[st.SLOT]] = out[s] = token
        if counts is not None and token < c["n_vocab"]:
            counts[record[st.SLOT], token] += 1
        if step[st.ADVANCE]:
            step[st.tokens + row] = token
            step[st.positions + row] += 1
            record[st.KV_LEN] += 1
            record[st.DRAW_POSITION] += 1


def hash_u32(seed: int, position: int) -> int:
    h = seed ^ (position * 0x9E3779B9) & NONE
    for _ in range(2):
        h = (h * 747796405 + 2891336453) & NONE
        w = (((h >> ((h >> 28) + 4)) ^ h) * 277803737) & NONE
        h = (w >> 22) ^ w
    return h


TWINS: dict[str, Twin] = {
    twin.__name__: twin for twin in (adjust_logits, sample_partial, sample_draw, sample_final)
}
