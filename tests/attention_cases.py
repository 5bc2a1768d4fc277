"""The kernel cases of attention, of rotation and of the pages; `kernel_cases.cases` includes them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from kernel_cases import FMA, ST, Case, normal, step_words


def cases() -> Iterator[Case]:
    yield from rope_cases()
    yield from attention_cases()


def rope_cases() -> Iterator[Case]:
    for n_heads, n_kv, hd, rot, neox, ring in (
        (4, 2, 64, 64, False, 0),
        (3, 1, 32, 32, True, 0),
        (2, 2, 80, 32, True, 5),
        (2, 1, 64, 48, False, 0),
        (2, 1, 64, 0, False, 0),
    ):

        def tensors(rng, n_heads=n_heads, n_kv=n_kv, hd=hd, rot=rot):
            step = step_words([(0, 3), (200, 1), (31, 2)], rng=rng)
            inverse = 10000.0 ** (-np.arange(rot // 2) * 2 / max(rot, 1))
            turns = (
                np.round(inverse / (2 * np.pi) * 2**32).astype(np.uint32) if rot else np.zeros(1, np.uint32)
            )
            pages = [np.zeros((64, n_kv, 16, hd), np.float16) for _ in range(2)]
            qkv = normal(rng, 8, (n_heads + 2 * n_kv) * hd)
            return [step, qkv, turns, np.zeros((8, n_heads * hd), np.float32), *pages]

        consts = {
            "n_heads": n_heads, "n_kv": n_kv, "head_dim": hd, "rot_dim": rot, "neox": neox,
            "magnitude": 1.0 if neox else 1.2, "block_size": 16, "ring": ring, "kv": "f16", "st": ST,
        }  # fmt: skip
        grid = (-(-(n_heads + 2 * n_kv) * hd // 128), 8)
        name = f"rope_store {n_heads}/{n_kv} heads of {hd}, {rot} {'neox' if neox else 'normal'}"
        name += " ring" * bool(ring)
        # sin and cos: WGSL allows 2^-11 absolute, adapters do about 1e-6; k and v are rounded to float16
        yield Case(name, "rope_store", consts, tensors, (3,), grid, 2e-5)
        yield Case(name + " cache", "rope_store", consts, tensors, (4, 5), grid, 6e-4, dtype="f16")

        def wide(rng, tensors=tensors):
            given = tensors(rng)
            return [*given[:4], *(page.astype(np.float32) for page in given[4:])]

        yield Case(name + " f32", "rope_store", consts | {"kv": "f32"}, wide, (4, 5), grid, 2e-5)


def attention_cases() -> Iterator[Case]:
    shapes = (
        (4, 2, 64, 1, 1, [(0, 1), (130, 1), (77, 1)], {}),
        (9, 3, 64, 1, 4, [(200, 1), (0, 1)], {}),
        (4, 2, 64, 4, 1, [(0, 9), (100, 6)], {}),
        (2, 1, 128, 2, 1, [(70, 3)], {}),
        (2, 2, 32, 8, 1, [(0, 20), (5, 1)], {}),
        (2, 1, 256, 1, 2, [(90, 1)], {}),
        (2, 2, 80, 2, 1, [(40, 5)], {}),
        (4, 2, 64, 1, 1, [(0, 1), (130, 1)], {"window": 40, "softcap": 5.0}),
        (4, 2, 64, 4, 1, [(0, 9), (100, 6)], {"window": 20, "sinks": True}),
        (4, 2, 64, 1, 3, [(250, 1), (3, 1)], {"window": 100, "ring": 8, "sinks": True}),
        (4, 2, 64, 2, 1, [(150, 9), (3, 2)], {"window": 33, "ring": 4}),
        (4, 2, 64, 2, 1, [(50, 9), (3, 2)], {"kv": "f32"}),
    )
    for n_heads, n_kv, hd, qt, splits, seqs, more in shapes:
        for subgroup in (0, -1):
            n_rows = sum(n for _, n in seqs)

            def tensors(
                rng, n_heads=n_heads, n_kv=n_kv, hd=hd, qt=qt, splits=splits, seqs=seqs, n_rows=n_rows,
                sinks="sinks" in more and splits == 1, kv=np.float32 if "kv" in more else np.float16,
            ):  # fmt: skip
                pages = [normal(rng, 64, n_kv, 16, hd).astype(kv) for _ in range(2)]
                out = (n_rows, n_heads, splits, hd + 2) if splits > 1 else (n_rows, n_heads * hd)
                step = step_words(seqs, rng=rng, qt=qt)
                extra = [normal(rng, n_heads)] * sinks
                return [
                    step,
                    normal(rng, n_rows, n_heads * hd) * 2,
                    *pages,
                    *extra,
                    np.zeros(out, np.float32),
                ]

            consts = {
                "n_heads": n_heads, "n_kv": n_kv, "head_dim": hd, "block_size": 16, "scale": hd**-0.5,
                "qt": qt, "splits": splits, "wg": 64, "subgroup": subgroup, "st": ST,
                "window": 0, "softcap": 0.0, "ring": 0, "kv": "f16", **more,
                "sinks": "sinks" in more and splits == 1,
            }  # fmt: skip
            tiles = sum(-(-n // qt) for _, n in seqs)
            name = f"attention {n_heads}/{n_kv} heads of {hd}, qt {qt}, splits {splits}"
            name += "".join(f" {key}" for key in more) + " subgroups" * bool(subgroup)
            needs = ("subgroups",) if subgroup else ()
            yield Case(
                name,
                "attention",
                consts,
                tensors,
                (4 + consts["sinks"],),
                (tiles, n_kv, splits),
                FMA,
                needs,
                subgroup,
            )

    def parts(rng):
        data = normal(rng, 3, 4, 5, 66)
        data[..., 65] = np.abs(data[..., 65]) + 0.5
        data[:, :, 4] = 0  # a split with nothing in it
        data[:, :, 4, 64] = -1e30
        return [step_words([(0, 3)], rng=rng), data, np.zeros((3, 256), np.float32)]

    def parts_and_sinks(rng):
        step, data, out = parts(rng)
        return [step, data, normal(rng, 4), out]

    consts = {"n_heads": 4, "head_dim": 64, "splits": 5, "sinks": False, "st": ST}
    yield Case("attention_merge", "attention_merge", consts, parts, (2,), (4, 3), 1e-5)
    consts = consts | {"sinks": True}
    yield Case("attention_merge sinks", "attention_merge", consts, parts_and_sinks, (3,), (4, 3), 1e-5)
