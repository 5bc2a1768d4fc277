"""The kernel cases of sampling; `kernel_cases.cases` includes them."""

from collections.abc import Iterator

import numpy as np
from kernel_cases import EXACT, ST, Case, normal, step_words

from realm_web.step import NONE


def cases() -> Iterator[Case]:
    seqs = [(0, 3), (9, 1), (4, 2)]

    def adjust(rng):
        bias = np.where(rng.random((4, 300)) < 0.1, normal(rng, 4, 300) * 5, 0).astype(np.float32)
        counts = np.where(rng.random((4, 300)) < 0.3, rng.integers(0, 4, (4, 300)), 0).astype(np.uint32)
        counts |= (rng.random((4, 300)) < 0.2).astype(np.uint32) << 31
        return [step_words(seqs, rng=rng), bias, counts, normal(rng, 3, 300) * 4]

    yield Case("adjust_logits", "adjust_logits", {"n_vocab": 300, "st": ST}, adjust, (3,), (5, 3), 1e-6)

    def logits_with_ties(rng):
        return (np.round(normal(rng, 3, 1000) * 8) / 2).astype(np.float32)

    for wg in (64, 256):

        def tensors(rng):
            return [step_words(seqs, rng=rng), logits_with_ties(rng), np.zeros((3, 8, 2), np.uint32)]

        consts = {"n_vocab": 1000, "parts": 8, "wg": wg, "st": ST}
        yield Case(
            f"sample_partial wg {wg}", "sample_partial", consts, tensors, (2,), (8, 3), EXACT, dtype="u32"
        )
        for name, params in {
            "temperature": {"temperature": 0.7},
            "top-k": {"temperature": 1.0, "top_k": 7},
            "top-p": {"temperature": 1.5, "top_p": 0.6},
            "min-p": {"temperature": 1.0, "min_p": 0.1},
            "all": {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
            "one": {"temperature": 0.5, "top_k": 1},
        }.items():

            def draw(rng, params=params):
                logits = logits_with_ties(rng) + normal(rng, 3, 1000) * np.float32(0.01)
                best = np.zeros((3, 8, 2), np.uint32)
                best[:, 0, 0] = logits.max(axis=1).view(np.uint32)
                best[:, 1:, 0] = np.float32(-3.4e38).view(np.uint32)
                return [step_words(seqs, rng=rng, **params), logits, best, np.zeros(3, np.uint32)]

            # the drawn tokens of fixed seeds: equal unless a draw lands within rounding (2^-30) of a boundary
            yield Case(
                f"sample_draw {name} wg {wg}", "sample_draw", consts, draw, (3,), (3,), EXACT, dtype="u32"
            )
    for temperature, counting in ((0.0, False), (1.0, False), (0.0, True)):

        def final(rng, temperature=temperature, counting=counting):
            best = np.zeros((3, 8, 2), np.uint32)
            best[..., 0] = normal(rng, 3, 8).view(np.uint32)
            best[..., 1] = rng.integers(0, 50, (3, 8))
            step = step_words(seqs, rng=rng, temperature=temperature, advance=True)
            step[ST.seqs + ST.SEQ_WORDS + ST.LOGITS_ROW] = NONE
            drawn = rng.integers(0, 50, 3).astype(np.uint32)
            counts = [rng.integers(0, 3, (4, 50)).astype(np.uint32)] * counting
            return [step, best, drawn, np.zeros(4, np.uint32), np.zeros(3, np.uint32), *counts]

        consts = {"n_vocab": 50, "parts": 8, "counting": counting, "st": ST}
        name = f"sample_final {'greedy' if temperature == 0 else 'drawn'}{' counting' * counting}"
        yield Case(name, "sample_final", consts, final, (0, 3, 4, *[5] * counting), (1,), EXACT, dtype="u32")
