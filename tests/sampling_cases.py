"""The kernel cases of sampling; `kernel_cases.cases` includes them."""

from collections.abc import Iterator

import numpy as np
from kernel_cases import EXACT, FMA, ST, Case, normal, step_words

from realm_web.runtime import cpu_sampling
from realm_web.step import NONE

N_VOCAB, N_VALID, SLICE, LISTED = 1000, 991, 128, 500
PARTS = -(-N_VALID // SLICE)
SEQS = [(0, 3), (9, 1), (4, 2)]
FILTERS = {  # temperatures whose inverse is exact: a last bit more would put ties into the next bin
    "temperature": {"temperature": 0.5},
    "top-k": {"temperature": 1.0, "top_k": 7},
    "top-p": {"temperature": 2.0, "top_p": 0.6},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "all": {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "one": {"temperature": 0.5, "top_k": 1},
    "flat": {"temperature": 64.0, "top_k": 600, "top_p": 0.7},
}


def cases() -> Iterator[Case]:
    yield from partial_cases()
    yield from draw_cases()
    yield from final_cases()
    yield from logprob_cases()


def consts_of(**more) -> dict:
    return {"n_vocab": N_VOCAB, "n_valid": N_VALID, "slice": SLICE, "parts": PARTS, "wg": 64, "st": ST} | more


def logits_with_ties(rng) -> np.ndarray:
    return (np.round(normal(rng, 3, N_VOCAB) * 8) / 2).astype(np.float32)


def far_apart(rng) -> np.ndarray:
    """Logits of which each outweighs all lower ones, so that sums of exponentials are exact."""
    return (500 * rng.permuted(np.tile(np.arange(N_VOCAB), (3, 1)), axis=1)).astype(np.float32)


def partial_cases() -> Iterator[Case]:
    """Exact, but for one case with a sum of many terms, in which the ids are too small to be seen."""

    def tensors(rng, draw, adjust, masked, rounded):
        step = step_words(SEQS, rng=rng, temperature=0.8)
        records = step[ST.seqs : ST.tokens].reshape(-1, ST.SEQ_WORDS)
        records[1, ST.MASK_UNTIL], records[2, ST.MASK_UNTIL] = records[1, ST.DRAW_POSITION], NONE
        logits = logits_with_ties(rng) if rounded else far_apart(rng)
        if not rounded:
            penalties = np.array([2, 1000, 500], np.float32)
            records[:, ST.REPETITION : ST.FREQUENCY + 1] = penalties.view(np.uint32)
        bias = np.where(rng.random((4, N_VOCAB)) < 0.1, rng.integers(-40, 40, (4, N_VOCAB)) * 500, 0)
        counts = np.where(rng.random((4, N_VOCAB)) < 0.3, rng.integers(0, 4, (4, N_VOCAB)), 0)
        counts = counts.astype(np.uint32) | (rng.random((4, N_VOCAB)) < 0.2).astype(np.uint32) << 31
        mask = rng.integers(0, 2**32, (4, -(-N_VOCAB // 32)), dtype=np.uint32)
        mask[3, 8:] = 0  # whole parts without a token
        made = [step, logits, np.zeros((3, PARTS, 4), np.uint32)]
        if draw:
            made.append(rng.integers(0, 9, (3, cpu_sampling.N_BINS, 2)).astype(np.uint32))
            made += [np.zeros((3, N_VOCAB), np.float32)] * (adjust or masked)
        return [*made, *[bias.astype(np.float32), counts] * adjust, *[mask] * masked]

    for draw, adjust, masked, rounded, wg in (
        (False, False, False, False, 64),
        (False, True, True, False, 64),
        (True, False, False, False, 256),
        (True, True, False, False, 64),
        (True, False, True, False, 64),
        (True, True, True, False, 256),
        (True, True, False, True, 64),
        (True, False, False, True, 256),
    ):

        def made(rng, given=(draw, adjust, masked, rounded)):
            return tensors(rng, *given)

        outputs = (2, *(3,) * (draw and not rounded), *(4,) * (draw and (adjust or masked)))
        name = f"sample_partial wg {wg}{' draw' * draw}{' adjust' * adjust}{' mask' * masked}"
        consts = consts_of(draw=draw, adjust=adjust, masked=masked) | {"wg": wg}
        tolerance, dtype = (1e-6, "f32") if rounded else (EXACT, "u32")
        yield Case(
            name + " rounded" * rounded,
            "sample_partial",
            consts,
            made,
            outputs,
            (PARTS, 3),
            tolerance,
            dtype=dtype,
        )


def run(name: str, consts: dict, *tensors: np.ndarray) -> None:
    """The twin of a kernel, in place: what comes before the kernel of the case."""
    cpu_sampling.TWINS[name](consts, [tensor.reshape(-1).view(np.uint8) for tensor in tensors])


def draw_cases() -> Iterator[Case]:
    consts = consts_of(listed=LISTED, groups=3)

    def tensors(rng, params, until, ties, listed):
        """Bindings of `until`, after the kernels before it have run."""
        logits = logits_with_ties(rng)
        if not ties:
            logits += normal(rng, 3, N_VOCAB) * np.float32(0.01)
        step = step_words(SEQS, rng=rng, **params)
        parts, bins = np.zeros((3, PARTS, 4), np.uint32), np.zeros((3, cpu_sampling.N_BINS, 2), np.uint32)
        list_ = np.zeros((3, 1 + PARTS + listed), np.uint32)
        run(
            "sample_partial",
            consts | {"draw": True, "adjust": False, "masked": False},
            step,
            logits,
            parts,
            bins,
        )
        for name in ("sample_bins", "sample_gather"):
            if until == name:
                break
            run(name, consts | {"listed": listed}, step, logits, parts, bins, list_)
        given = [step, logits, parts, bins, list_]
        if until == "sample_final":
            given += [np.zeros(4, np.uint32), np.zeros(3, np.uint32)]
        return given

    for wg in (64, 256):
        for name, params in FILTERS.items():
            for ties in (False, True) if wg == 64 else (False,):

                def made(until, params=params, ties=ties, listed=LISTED):
                    return lambda rng: tensors(rng, params, until, ties, listed)

                c = consts | {"wg": wg}
                kind = f"{name} wg {wg}{' ties' * ties}"
                # masses differ by the rounding of exp; the order of the list is left to the device
                for kernel, output in (("sample_bins", 3), ("sample_gather", 4)):
                    if name == "one" and kernel == "sample_gather":
                        continue  # nothing but a list
                    yield Case(
                        f"{kernel} {kind}", kernel, c, made(kernel), (output,), (3, 3), FMA, dtype="count"
                    )
                # the tokens of fixed seeds: equal unless a draw lands within rounding (2^-30) of a boundary
                c = c | {"draw": True, "counting": False}
                final = made("sample_final")
                yield Case(f"sample_final {kind}", "sample_final", c, final, (5, 6), (3,), EXACT, dtype="u32")
                if name in ("top-p", "all"):
                    c = c | {"listed": 3}  # too short: the kernel looks at all tokens
                    yield Case(
                        f"sample_final {kind}, list too short", "sample_final", c,
                        made("sample_final", listed=3), (5, 6), (3,), EXACT, dtype="u32",
                    )  # fmt: skip


def final_cases() -> Iterator[Case]:
    for parts, wg, counting in ((8, 64, False), (8, 64, True), (300, 256, True)):

        def tensors(rng, parts=parts, counting=counting):
            best = np.zeros((3, parts, 4), np.uint32)
            best[..., 0] = np.round(normal(rng, 3, parts)).astype(np.float32).view(np.uint32)  # ties
            best[..., 1] = np.sort(rng.permuted(np.tile(np.arange(400), (3, 1)), axis=1)[:, :parts], axis=1)
            best[2, :, 0], best[2, :, 1] = np.float32(-3.4e38).view(np.uint32), NONE  # nothing may be chosen
            step = step_words(SEQS, rng=rng, advance=True)
            step[ST.seqs + ST.SEQ_WORDS + ST.LOGITS_ROW] = NONE
            counts = [rng.integers(0, 3, (4, 400)).astype(np.uint32)] * counting
            return [step, best, np.zeros(4, np.uint32), np.zeros(3, np.uint32), *counts]

        consts = consts_of(listed=LISTED, draw=False, counting=counting)
        consts |= {"n_vocab": 400, "parts": parts, "wg": wg}
        name = f"sample_final greedy, {parts} parts{' counting' * counting}"
        outputs = (0, 2, 3, *[4] * counting)
        yield Case(name, "sample_final", consts, tensors, outputs, (3,), EXACT, dtype="u32")


def logprob_cases() -> Iterator[Case]:
    """In float32 the ids are too small to be seen, so they have cases where nothing is rounded."""

    def tensors(rng, slice_, kind):
        step = step_words(SEQS, rng=rng)
        wanted = step[ST.seqs + ST.TOP_LOGPROBS : ST.tokens : ST.SEQ_WORDS]
        wanted[:3] = 1, 0, 21
        logits = logits_with_ties(rng)
        if kind == "ids":
            logits = far_apart(rng)
        if kind == "ties":
            logits = np.where(rng.random((3, N_VOCAB)) < 2**-9, 200, 0).astype(np.float32)
        return [step, logits, np.zeros((3, -(-N_VALID // slice_), 42), np.uint32)]

    for wg, slice_ in ((64, 128), (256, 1000), (64, 4)):
        parts = -(-N_VALID // slice_)
        consts = consts_of() | {"wg": wg, "slice": slice_, "parts": parts}
        for kind in ("values", "ids", "ties"):

            def top(rng, slice_=slice_, kind=kind):
                return tensors(rng, slice_, kind)

            def merged(rng, top=top, consts=consts):
                step, logits, tops = top(rng)
                run("sample_top", consts, step, logits, tops)
                slots = np.array([NONE, 7, 8, 990], np.uint32)  # of the third, which has slot 3; the first 1
                return [step, logits, tops, slots, np.zeros((3, 41), np.uint32)]

            name = f"{kind} wg {wg}, slices of {slice_}"
            rounded, exact = (FMA, "f32"), (EXACT, "u32")
            if slice_ >= 20 or kind != "values":  # parts of fewer tokens hold ids that are no float32
                tolerance, dtype = rounded if kind == "values" else exact
                yield Case(
                    f"sample_top {name}", "sample_top", consts, top, (2,), (parts, 3), tolerance, dtype=dtype
                )
            tolerance, dtype = exact if kind == "ids" else rounded
            yield Case(
                f"sample_logprobs {name}",
                "sample_logprobs",
                consts,
                merged,
                (4,),
                (3,),
                tolerance,
                dtype=dtype,
            )
