"""The kernel cases of scores and embeddings; `kernel_cases.cases` includes them."""

from collections.abc import Iterator

import numpy as np
from kernel_cases import EXACT, ST, SUM, Case, normal, step_words

from realm_web.step import NONE

SEQS = [(0, 9), (40, 1), (7, 60)]
N_ROWS = sum(n for _, n in SEQS)


def cases() -> Iterator[Case]:
    yield from select_cases()
    yield from score_cases()
    yield from pool_cases()


def step_with_targets(rng: np.random.Generator, n_vocab: int, share: float) -> np.ndarray:
    """A step of which about `share` of the rows have a target."""
    step = step_words(SEQS, rng=rng)
    targets = rng.integers(0, n_vocab, N_ROWS).astype(np.uint32)
    targets[rng.random(N_ROWS) >= share] = NONE
    step[ST.targets : ST.targets + N_ROWS] = targets
    return step


def select_cases() -> Iterator[Case]:
    for group_rows, n_groups, share in (
        (128, 1, 0.5),
        (32, 4, 0.7),
        (32, 4, 1.0),
        (7, 19, 0.5),
        (1, 128, 0.0),
    ):
        stride = -(-(ST.seqs + group_rows * ST.SEQ_WORDS) // 64) * 64

        def tensors(rng, n_groups=n_groups, stride=stride, share=share):
            step = step_with_targets(rng, 100, share)
            return [step, np.zeros((n_groups, stride), np.uint32), normal(rng, ST.max_rows)]

        consts = {
            "group_rows": group_rows, "n_groups": n_groups, "stride": stride, "each": 2, "st": ST
        }  # fmt: skip
        name = f"row_scores_select {n_groups} groups of {group_rows}, {share:.0%} of the rows"
        yield Case(name, "row_scores_select", consts, tensors, (1, 2), (1,), EXACT, dtype="u32")


def score_cases() -> Iterator[Case]:
    # rows of a multiple of 4 are read in fours
    for n_vocab, n_valid, wg, subgroup, spread in (
        (300, 300, 64, 0, 4),
        (300, 291, 64, -1, 4),
        (1000, 1000, 256, 0, 30),
        (1000, 1000, 256, -1, 30),
        (70_001, 70_000, 256, 0, 2),
        (70_004, 70_002, 256, -1, 2),
        (4, 3, 64, 0, 4),
    ):
        n_here = 8 if n_vocab > 10_000 else 20

        def tensors(rng, n_vocab=n_vocab, n_valid=n_valid, spread=spread, n_here=n_here):
            step = step_with_targets(rng, n_valid, 0.6)
            group = np.zeros(ST.seqs + 32 * ST.SEQ_WORDS, np.uint32)
            rows = np.flatnonzero(step[ST.targets : ST.targets + N_ROWS] != NONE)[5 : 5 + n_here]
            group[ST.N_ROWS] = group[ST.N_SEQS] = len(rows)
            group[ST.seqs + ST.LOGITS_ROW :: ST.SEQ_WORDS][: len(rows)] = rows
            logits = normal(rng, 32, n_vocab) * np.float32(spread)
            logits[:, n_valid:] = 1000  # columns of no token
            return [step, group, logits, normal(rng, ST.max_rows)]

        consts = {"n_vocab": n_vocab, "n_valid": n_valid, "wg": wg, "subgroup": subgroup, "st": ST}
        needs = ("subgroups",) if subgroup else ()
        name = f"row_scores {n_valid} of {n_vocab} columns, wg {wg}{' subgroups' * bool(subgroup)}"
        yield Case(name, "row_scores", consts, tensors, (3,), (32,), SUM, needs, subgroup)


def pool_cases() -> Iterator[Case]:
    for dim in (64, 288):

        def tensors(rng, dim=dim):
            step = step_words(SEQS, rng=rng)
            kinds = rng.permutation([ST.MEAN, ST.LAST, ST.CLS, ST.NO_POOL])[:3]
            step[ST.seqs + ST.POOL :: ST.SEQ_WORDS][:3] = kinds
            return [step, normal(rng, N_ROWS, dim), normal(rng, ST.max_seqs, dim) * 9, normal(rng, 3, dim)]

        yield Case(f"pool {dim}", "pool", {"dim": dim, "st": ST}, tensors, (2, 3), (-(-dim // 256), 3), SUM)
    for kind, word in (("mean", ST.MEAN), ("last", ST.LAST), ("cls", ST.CLS)):

        def alike(rng, word=word):
            step = step_words(SEQS, rng=rng)
            step[ST.seqs + ST.POOL :: ST.SEQ_WORDS][:3] = word
            return [step, normal(rng, N_ROWS, 96), normal(rng, ST.max_seqs, 96) * 9, normal(rng, 3, 96)]

        yield Case(f"pool {kind} 96", "pool", {"dim": 96, "st": ST}, alike, (2, 3), (1, 3), SUM)
