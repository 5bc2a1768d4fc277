"""The kernel cases of attention, of rotation and of the pages; `kernel_cases.cases` includes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from kernel_cases import EXACT, FMA, ST, Case, normal, step_words
from matrix_cases import STEP

from realm_web.quants import activation_words

SIZE = 16  # tokens of a page
N_BLOCKS = 64

# query heads, kv heads, head_dim, dimensions that rotate, neox, more constants
ROPES = (
    (4, 2, 64, 64, False, {}),
    (3, 1, 32, 32, True, {}),
    (2, 2, 80, 32, True, {"ring": 5}),
    (2, 1, 64, 48, False, {"norm": True}),
    (2, 1, 128, 128, True, {"norm": True}),
    (2, 1, 64, 0, False, {}),
)

# query heads, kv heads, head_dim, splits, (first position, rows) of each sequence, more constants
ROWS = (
    (4, 2, 64, 1, [(0, 1), (130, 1), (77, 1)], {}),
    (4, 2, 64, 1, [(3, 5), (130, 2)], {"nq": 1}),
    (9, 3, 64, 4, [(200, 1), (0, 1)], {}),
    (2, 1, 256, 2, [(90, 1)], {"lanes": 16}),
    (8, 1, 32, 1, [(40, 1)], {"lanes": 2, "batch": 1}),
    (2, 2, 80, 1, [(40, 1)], {}),
    (4, 2, 64, 1, [(0, 1), (130, 1)], {"window": 40, "softcap": 5.0}),
    (4, 2, 64, 3, [(250, 1), (3, 1)], {"window": 100, "ring": 8, "sinks": True}),
    (2, 1, 64, 1, [(50, 1), (3, 1)], {"sinks": True, "kv": "f32"}),
    (4, 2, 64, 3, [(0, 9), (200, 1), (100, 5)], {"rows": "single"}),
    (4, 2, 64, 1, [(140, 1), (31, 1)], {"kv": "q8_0"}),
    (2, 2, 80, 2, [(140, 1), (15, 1)], {"kv": "q8_0", "wg": 128}),
    (4, 1, 128, 2, [(150, 1), (3, 1)], {"lanes": 8, "batch": 8, "room": 512}),
    (3, 1, 64, 2, [(150, 1), (3, 1)], {"lanes": 8, "batch": 8, "room": 576}),
    (6, 1, 32, 1, [(150, 1)], {"lanes": 4, "batch": 4, "kv": "q8_0"}),
    (4, 2, 64, 1, [(0, 1), (130, 1), (77, 1)], {"to_bytes": True}),
    (9, 3, 96, 1, [(60, 1), (3, 1)], {"to_bytes": True, "kv": "f32", "sinks": True, "room": 288}),
)

# the same, of which the row's own key and value are made in the kernel; and what rotates, neox
FUSED = (
    (4, 2, 64, 1, [(0, 1), (130, 1), (77, 1)], {"rot_dim": 64, "neox": False}),
    (4, 2, 64, 3, [(0, 1), (130, 1), (95, 1)], {"rot_dim": 64, "neox": True, "norm": True, "nq": 1}),
    (9, 3, 64, 4, [(200, 1), (15, 1)], {"rot_dim": 48, "neox": False, "norm": True, "kv": "f32"}),
    (2, 2, 80, 1, [(40, 1), (16, 1)], {"rot_dim": 0, "neox": True, "kv": "q8_0"}),
    (4, 2, 128, 1, [(40, 1), (16, 1)], {"rot_dim": 128, "neox": True, "kv": "f32", "to_bytes": True}),
    (4, 2, 128, 2, [(70, 1)], {"rot_dim": 128, "neox": True, "kv": "q8_0"}),
    (4, 1, 32, 3, [(250, 1)], {"rot_dim": 32, "neox": False, "lanes": 4, "batch": 4}),
    (1, 1, 64, 2, [(130, 1)], {"rot_dim": 64, "neox": False, "batch": 1, "room": 64}),
    (4, 2, 64, 2, [(250, 1), (3, 1)], {"rot_dim": 64, "neox": True, "window": 100, "ring": 8, "sinks": True}),
)

# the same of tiles; splits are the rows per tile
TILES = (
    (4, 2, 64, 16, [(0, 9), (100, 26)], {}),
    (2, 1, 128, 8, [(70, 3)], {"mr": 2, "nr": 8}),
    (2, 1, 80, 8, [(70, 9)], {"tn": 16, "mr": 2}),
    (2, 2, 32, 8, [(0, 20), (5, 1)], {"tm": 4, "mr": 2}),
    (2, 2, 80, 5, [(40, 5)], {"mr": 1}),
    (6, 2, 256, 4, [(40, 5)], {"mr": 2}),
    (4, 2, 64, 8, [(0, 9), (100, 6), (30, 1)], {"window": 20, "sinks": True, "skip": True, "mr": 2, "nq": 1}),
    (4, 2, 64, 8, [(150, 9), (3, 2)], {"window": 33, "ring": 6, "mr": 2, "softcap": 5.0}),
    (4, 2, 64, 8, [(50, 9), (3, 2)], {"kv": "f32", "mr": 2}),
    (4, 2, 96, 8, [(50, 9), (3, 2)], {"kv": "q8_0", "mr": 2, "keys": 8}),
    (4, 2, 64, 16, [(100, 26), (30, 1)], {"splits": 3, "share": 32, "skip": True}),
    (4, 2, 80, 8, [(200, 12)], {"splits": 2, "share": 16, "window": 100, "mr": 2}),
)


def cases() -> Iterator[Case]:
    yield from rope_cases()
    for of, shapes in ((row_cases, ROWS), (row_cases, FUSED), (tile_cases, TILES)):
        for shape in shapes:
            for subgroup in (-1,) if shape[-1].get("to_bytes") else (0, -1):
                yield from of(*shape, subgroup)
    yield from merge_cases()


def pages(rng: np.random.Generator, kv: str, n_kv: int, hd: int) -> list[np.ndarray]:
    """Random keys and values."""
    shape = (N_BLOCKS, n_kv, SIZE, hd)
    if kv != "q8_0":
        return [normal(rng, *shape).astype(np.float16 if kv == "f16" else np.float32) for _ in range(2)]
    made = []
    for _ in range(2):
        values = rng.integers(-127, 128, shape, dtype=np.int8).reshape(N_BLOCKS, n_kv, -1)
        scales = rng.uniform(0.005, 0.02, (N_BLOCKS, n_kv, SIZE * 2 * -(-hd // 64))).astype(np.float16)
        made.append(np.concatenate([values.view(np.uint8), scales.view(np.uint8)], axis=-1))
    return made


def turns_of(rot_dim: int) -> np.ndarray:
    inverse = 10000.0 ** (-np.arange(rot_dim // 2) * 2 / max(rot_dim, 1))
    return np.round(inverse / (2 * np.pi) * 2**32).astype(np.uint32) if rot_dim else np.zeros(1, np.uint32)


def named(kernel: str, n_heads: int, n_kv: int, hd: int, more: dict[str, Any]) -> str:
    return f"{kernel} {n_heads}/{n_kv} heads of {hd}" + "".join(f" {k} {v}" for k, v in more.items())


def rope_cases() -> Iterator[Case]:
    for n_heads, n_kv, hd, rot, neox, more in ROPES:
        norm = more.get("norm", False)

        def tensors(rng, kv="f16", n_heads=n_heads, n_kv=n_kv, hd=hd, rot=rot, norm=norm):
            step = step_words([(0, 3), (200, 1), (31, 2)], rng=rng)
            zeros = [np.zeros_like(page) for page in pages(rng, kv, n_kv, hd)]
            qkv = normal(rng, 8, (n_heads + 2 * n_kv) * hd)
            weights = [normal(rng, hd) for _ in range(2 * norm)]
            return [step, qkv, turns_of(rot), *weights, np.zeros((8, n_heads * hd), np.float32), *zeros]

        consts = {
            "n_heads": n_heads, "n_kv": n_kv, "head_dim": hd, "rot_dim": rot, "neox": neox,
            "magnitude": 1.0 if neox else 1.2, "norm": norm, "eps": 1e-5, "block_size": SIZE, "ring": 0,
            "kv": "f16", "subgroup": 0, "st": ST, **more,
        }  # fmt: skip
        grid, queries, outputs = (n_heads + 2 * n_kv, 8), (3 + 2 * norm,), (4 + 2 * norm, 5 + 2 * norm)
        name = named("rope_store", n_heads, n_kv, hd, {"rot": rot, "neox": neox, **more})
        # sin and cos: WGSL allows 2^-11 absolute, adapters do about 1e-6; k and v are rounded to float16
        yield Case(name, "rope_store", consts, tensors, queries, grid, 2e-5)
        yield Case(name + " cache", "rope_store", consts, tensors, outputs, grid, 6e-4, dtype="f16")
        if norm:
            consts = consts | {"subgroup": -1}
            yield Case(
                name + " subgroups",
                "rope_store",
                consts,
                tensors,
                queries,
                grid,
                2e-5,
                ("subgroups",),
                -1,
            )
            continue

        def wide(rng, tensors=tensors):
            return tensors(rng, "f32")

        def bytes_(rng, tensors=tensors):
            return tensors(rng, "q8_0")

        outputs = (4, 5)
        yield Case(name + " f32", "rope_store", consts | {"kv": "f32"}, wide, outputs, grid, 2e-5)
        if not rot:  # nothing that rounds differently before the values are made bytes
            consts = consts | {"kv": "q8_0"}
            yield Case(name + " q8_0", "rope_store", consts, bytes_, outputs, grid, EXACT, dtype="u32")


def row_cases(n_heads, n_kv, hd, splits, seqs, more, subgroup) -> Iterator[Case]:
    n_rows = sum(n for _, n in seqs)
    fused, norm = "rot_dim" in more, more.get("norm", False)
    consts = {
        "n_heads": n_heads, "n_kv": n_kv, "head_dim": hd, "block_size": SIZE, "scale": hd**-0.5,
        "window": 0, "softcap": 0.0, "ring": 0, "kv": "f16", "fused": fused, "rows": "all",
        "splits": splits, "share": 2 * SIZE, "sure": n_rows == 1, "to_bytes": False,
        "nq": n_heads // n_kv, "wg": 64, "lanes": 8, "batch": 2, "room": 1024,
        "subgroup": subgroup, "st": ST, **more,
    }  # fmt: skip
    consts |= {"sinks": "sinks" in more and splits == 1}
    if fused:
        consts |= {"norm": norm, "eps": 1e-5, "magnitude": 1.1}

    def tensors(rng):
        step = step_words(seqs, rng=rng, qt=4 if consts["rows"] == "single" else 1)
        if consts["to_bytes"]:
            out = (n_rows, activation_words(n_heads * hd))
        else:
            out = (n_rows, n_heads, splits, hd + 4) if splits > 1 else (n_rows, n_heads * hd)
        extra = [normal(rng, n_heads)] * consts["sinks"]
        if fused:
            given = [normal(rng, n_rows, (n_heads + 2 * n_kv) * hd), turns_of(more["rot_dim"])]
            given += [normal(rng, hd) for _ in range(2 * norm)]
        else:
            given = [normal(rng, n_rows, n_heads * hd) * 2]
        return [step, *given, *pages(rng, consts["kv"], n_kv, hd), *extra, np.zeros(out, np.float32)]

    name = named("attention", n_heads, n_kv, hd, {"splits": splits, **more}) + " subgroups" * bool(subgroup)
    grid = (n_rows, n_heads // consts["nq"], splits)
    needs = ("subgroups",) if subgroup else ()
    first = 2 + fused + 2 * norm  # the keys
    out = first + 2 + consts["sinks"]
    # A key that is rotated here may round to the neighbouring float16, as sines differ in their last bits,
    # and its score and the output with it.
    rotates = fused and more["rot_dim"]
    tolerance = 6e-4 if rotates and consts["kv"] == "f16" else FMA
    dtype = "f32"
    if consts["to_bytes"]:
        tolerance, dtype = STEP, f"bytes of {n_heads * hd}"
    yield Case(name, "attention", consts, tensors, (out,), grid, tolerance, needs, subgroup, dtype)
    if fused and consts["kv"] != "q8_0":
        kv = consts["kv"]
        tolerance = 6e-4 if kv == "f16" else FMA  # float16 rounds
        outputs = (first, first + 1)
        yield Case(
            name + " cache", "attention", consts, tensors, outputs, grid, tolerance, needs, subgroup, kv
        )
    elif fused and not more["rot_dim"]:
        outputs = (first, first + 1)
        yield Case(
            name + " cache", "attention", consts, tensors, outputs, grid, EXACT, needs, subgroup, "u32"
        )


def tile_cases(n_heads, n_kv, hd, qt, seqs, more, subgroup) -> Iterator[Case]:
    n_rows = sum(n for _, n in seqs)
    consts = {
        "n_heads": n_heads, "n_kv": n_kv, "head_dim": hd, "block_size": SIZE, "scale": hd**-0.5,
        "window": 0, "softcap": 0.0, "ring": 0, "sinks": False, "kv": "f16", "skip": False,
        "qt": qt, "nq": n_heads // n_kv, "tm": 8, "tn": 8, "mr": 4, "nr": 4, "keys": 16, "splits": 1,
        "share": SIZE, "subgroup": subgroup, "st": ST,
        **more,
    }  # fmt: skip

    def tensors(rng):
        step = step_words(seqs, rng=rng, qt=qt)
        extra = [normal(rng, n_heads)] * consts["sinks"]
        splits = consts["splits"]
        out = (n_rows, n_heads, splits, hd + 4) if splits > 1 else (n_rows, n_heads * hd)
        q = normal(rng, n_rows, n_heads * hd) * 2
        return [step, q, *pages(rng, consts["kv"], n_kv, hd), *extra, np.zeros(out, np.float32)]

    name = named("attention_tiles", n_heads, n_kv, hd, {"qt": qt, **more}) + " subgroups" * bool(subgroup)
    grid = (sum(-(-n // qt) for _, n in seqs) + 1, n_heads // consts["nq"], consts["splits"])
    needs = ("subgroups",) if subgroup else ()
    outputs = (4 + consts["sinks"],)
    yield Case(name, "attention_tiles", consts, tensors, outputs, grid, FMA, needs, subgroup)


def merge_cases() -> Iterator[Case]:
    for splits, hd, seqs, more in (
        (5, 64, [(200, 3)], {}),
        (5, 64, [(130, 1), (0, 1), (70, 1)], {"sinks": True}),
        (3, 80, [(0, 9), (250, 1), (8, 1)], {"rows": "single", "window": 100}),
        (4, 64, [(100, 9), (240, 1), (8, 7)], {"rows": "tiles", "qt": 4, "skip": True, "sinks": True}),
        (16, 256, [(255, 1)], {}),
        (5, 64, [(130, 1), (0, 1), (70, 1)], {"sinks": True, "to_bytes": True}),
    ):
        n_rows = sum(n for _, n in seqs)
        consts = {
            "n_heads": 4, "head_dim": hd, "block_size": SIZE, "window": 0, "rows": "all", "qt": 1,
            "skip": False, "splits": splits, "share": SIZE, "sinks": False, "sure": n_rows == 1,
            "to_bytes": False, "wg": 128, "st": ST, **more,
        }  # fmt: skip

        def tensors(rng, consts=consts, splits=splits, hd=hd, seqs=seqs, n_rows=n_rows):
            parts = normal(rng, n_rows, 4, splits, hd + 4)
            parts[..., hd + 1] = np.abs(parts[..., hd + 1]) + 0.5
            step = step_words(seqs, rng=rng, qt=4)
            extra = [normal(rng, 4)] * consts["sinks"]
            width = activation_words(4 * hd) if consts["to_bytes"] else 4 * hd
            return [step, parts, *extra, np.zeros((n_rows, width), np.float32)]

        name = f"attention_merge {splits} splits, heads of {hd}" + "".join(f" {k}" for k in more)
        outputs = (2 + consts["sinks"],)
        grid = (4, consts["qt"] * n_rows)
        if consts["to_bytes"]:
            dtype = f"bytes of {4 * hd}"
            yield Case(
                name, "attention_merge", consts, tensors, outputs, grid, STEP, ("subgroups",), -1, dtype
            )
        else:
            yield Case(name, "attention_merge", consts, tensors, outputs, grid, 1e-5)
