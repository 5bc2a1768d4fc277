"""The numpy twins of the kernels that score rows and pool them, as in `cpu_kernels.py`."""

from __future__ import annotations

import numpy as np

from realm_web.runtime.cpu_kernels import NONE, Twin, Views, records_of


def row_scores_select(c: dict, views: list[np.ndarray]) -> None:
    v, st, group_rows = Views(views), c["st"], c["group_rows"]
    step, groups, scores = v.u32(), v.u32(c["n_groups"], c["stride"]), v.f32()
    n = int(step[st.N_ROWS])
    missing = step[st.targets : st.targets + n] == NONE
    scores[:n][missing] = 0
    rows = np.flatnonzero(~missing)
    for g, group in enumerate(groups):
        here = rows[g * group_rows : (g + 1) * group_rows]
        group[st.N_ROWS] = group[st.N_SEQS] = len(here)
        records_of(group, st, st.LOGITS_ROW)[:] = here


def row_scores(c: dict, views: list[np.ndarray]) -> None:
    v, st = Views(views), c["st"]
    step, group, logits, scores = v.u32(), v.u32(), v.f32(-1, c["n_vocab"]), v.f32()
    rows = records_of(group, st, st.LOGITS_ROW).astype(np.int64)
    logits = logits[: len(rows)]
    if not len(rows):
        return
    top = logits[:, : c["n_valid"]].max(axis=1, keepdims=True)
    share = np.exp(logits[:, : c["n_valid"]] - top).sum(axis=1)
    targets = step[st.targets + rows].astype(np.int64)
    scores[rows] = logits[np.arange(len(rows)), targets] - top[:, 0] - np.log(share)


def pool(c: dict, views: list[np.ndarray]) -> None:
    v, st, dim = Views(views), c["st"], c["dim"]
    step, x, kept, out = v.u32(), v.f32(-1, dim), v.f32(-1, dim), v.f32(-1, dim)
    n = int(step[st.N_ROWS])
    row_seqs = step[st.row_seqs : st.row_seqs + n]
    columns = (records_of(step, st, word) for word in (st.POOL, st.SLOT, st.KV_LEN))
    for seq, (kind, slot, length) in enumerate(zip(*columns, strict=True)):
        rows = np.flatnonzero(row_seqs == seq)
        if kind == st.NO_POOL or not len(rows):
            continue
        if kind == st.LAST:
            out[seq] = x[rows[-1]]
            continue
        fresh = step[st.positions + rows[0]] == 0
        if kind == st.CLS:
            kept[slot] = out[seq] = x[rows[0]] if fresh else kept[slot]
            continue
        before = np.zeros((1, dim), np.float32) if fresh else kept[slot][None]
        kept[slot] = np.concatenate([before, x[rows]]).sum(axis=0)  # one after the other
        out[seq] = kept[slot] / np.float32(length)


TWINS: dict[str, Twin] = {"row_scores_select": row_scores_select, "row_scores": row_scores, "pool": pool}
