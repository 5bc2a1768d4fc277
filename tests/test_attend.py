"""Attention as the models call it: whatever the split into rows, tiles and parts, the same as in float64."""

import asyncio
import re
from dataclasses import replace

import numpy as np
import pytest
from kernel_cases import normal, step_words
from probe import last_logits
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.kvcache import alloc_pages
from realm_web.models.config import kv_head_bytes
from realm_web.ops import HeadNorm, Recorder, Rope, attention, query_tile
from realm_web.ops.attend import divisor, row_shape, tile_shape
from realm_web.runtime import template
from realm_web.runtime.adapters import open_device
from realm_web.sampler import SamplingParams
from realm_web.step import StepLayout
from realm_web.tensor import Tensor

SIZE = 16
LAYOUT = StepLayout(max_rows=64, max_seqs=4, max_blocks=80)
N_HEADS, N_KV, HEAD_DIM = 4, 2, 32
SCALE, EPS = 0.2, 1e-5

# first position and rows of each sequence, the longest context
STEPS = {
    "one row": ([(3, 1)], 256),
    "rows of as many sequences, split": ([(0, 1), (300, 1), (1100, 1)], 1280),
    "few rows of one sequence": ([(250, 5)], 256),
    "few rows of one sequence, split": ([(600, 5)], 1280),
    "a prompt": ([(10, 50)], 256),
    "a prompt after much else": ([(900, 50)], 1280),
    "prompts beside sequences that decode": ([(700, 1), (300, 17), (0, 33), (12, 1)], 1280),
}


@pytest.fixture(scope="module", params=["subgroups", "no subgroups"])
def device(request):
    """The first adapter; it chooses as a hardware one does."""
    opened = asyncio.run(open_device("webgpu"))
    opened.info = replace(opened.info, adapter_type="DiscreteGPU")
    if request.param == "no subgroups":
        opened.features -= {"subgroups"}
    yield opened
    opened.close()


def upload(device, values: np.ndarray, label: str = "test") -> Tensor:
    tensor = Tensor.alloc(device, values.shape, "f32", label)
    device.write(tensor.buffer, values.tobytes())
    return tensor


def rotated(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """NEOX rotation of x (n_rows, heads, HEAD_DIM) in float64."""
    half = HEAD_DIM // 2
    angle = (positions[:, None] * 10000.0 ** (-np.arange(half) / half))[:, None, :]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("window", [0, 40], ids=["whole context", "window"])
@pytest.mark.parametrize("step", STEPS)
def test_rows_attend_to_what_their_sequences_have_in_the_pages(device, step, window):
    seqs, context = STEPS[step]
    rng = np.random.default_rng(len(step))
    n_rows, n_seqs = sum(n for _, n in seqs), len(seqs)
    bucket = 64 if n_rows > 8 else n_rows
    qt = query_tile(device, N_HEADS // N_KV, HEAD_DIM) if bucket > 8 else 1
    words = step_words(seqs, rng=rng, qt=qt, st=LAYOUT)
    tables = words[LAYOUT.tables :][: 4 * 80].reshape(4, 80)
    qkv, norms = normal(rng, bucket, N_HEADS + 2 * N_KV, HEAD_DIM), normal(rng, 2, HEAD_DIM)
    old = np.full((2, 320, N_KV, SIZE, HEAD_DIM), np.nan, np.float32)  # what others may have left there
    for table, (first, _) in zip(tables, seqs, strict=False):
        for p in range(first):
            old[:, table[p // SIZE], :, p % SIZE] = normal(rng, 2, N_KV, HEAD_DIM)
    sinks = normal(rng, N_HEADS)

    buffer = device.alloc(4 * LAYOUT.n_words, "step")
    device.write(buffer, words.tobytes())
    program = device.program("test")
    r = Recorder(
        device, program, LAYOUT, device.view(buffer), device.view(buffer), bucket, n_seqs, qt, context, {},
        alone=n_rows == n_seqs,
    )  # fmt: skip
    pages = alloc_pages(
        device, N_KV, HEAD_DIM, n_blocks=320, block_size=SIZE, dtype="f32", ring=0, max_seqs=4
    )
    for tensor, values in zip((pages.k, pages.v), old, strict=True):
        device.write(tensor.buffer, values.tobytes())
    half = HEAD_DIM // 2
    turns = np.round(10000.0 ** (-np.arange(half) / half) / (2 * np.pi) * 2**32).astype(np.uint32)
    rope = Rope(upload(device, turns.view(np.float32)), 1.0, HEAD_DIM, True)
    out = upload(device, np.zeros((bucket, N_HEADS * HEAD_DIM), np.float32))
    attention(
        r, upload(device, qkv), rope, pages, out, n_heads=N_HEADS, scale=SCALE, window=window,
        norm=HeadNorm(upload(device, norms[0]), upload(device, norms[1]), EPS), sinks=upload(device, sinks),
    )  # fmt: skip

    async def run():
        await device.compile()
        device.submit(program)
        return await device.read(out.buffer, 0, 4 * n_rows * N_HEADS * HEAD_DIM)

    got = np.frombuffer(asyncio.run(run()), np.float32).reshape(n_rows, N_HEADS, HEAD_DIM)
    want = expected(seqs, qkv.astype(np.float64), norms, old, tables, sinks, window)
    assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()
    if r.alone and context == 256:
        assert len(program.steps) == 1


def expected(seqs, qkv, norms, old, tables, sinks, window) -> np.ndarray:
    want, row0 = [], 0
    for s, (first, n) in enumerate(seqs):
        positions = np.arange(first, first + n)
        heads = qkv[row0 : row0 + n]
        q = rotated(normed(heads[:, :N_HEADS], norms[0]), positions)
        k = rotated(normed(heads[:, N_HEADS : N_HEADS + N_KV], norms[1]), positions)
        blocks = tables[s, : -(-first // SIZE)]
        before = old[:, blocks].transpose(0, 2, 1, 3, 4).reshape(2, N_KV, -1, HEAD_DIM)[:, :, :first]
        keys = np.concatenate([before[0], k.transpose(1, 0, 2)], axis=1)  # (n_kv, first + n, head_dim)
        values = np.concatenate([before[1], heads[:, N_HEADS + N_KV :].transpose(1, 0, 2)], axis=1)
        for i, position in enumerate(positions):
            low = max(0, position + 1 - window) if window else 0
            for h in range(N_HEADS):
                kv = h // (N_HEADS // N_KV)
                scores = SCALE * keys[kv, low : position + 1] @ q[i, h]
                weights = np.exp(np.append(scores, sinks[h]) - max(scores.max(), sinks[h]))
                want.append(weights[:-1] @ values[kv, low : position + 1] / weights.sum())
        row0 += n
    return np.array(want).reshape(-1, N_HEADS, HEAD_DIM)


class Pretended:
    """What the choice of variants asks of a device."""

    def __init__(self, subgroup_size: int, max_shared: int, is_cpu: bool):
        self.subgroup_size = subgroup_size
        self.limits = type("Limits", (), {"max_shared": max_shared})
        self.info = type("Info", (), {"is_cpu": is_cpu})


@pytest.mark.parametrize("is_cpu", [False, True])
@pytest.mark.parametrize("max_shared", [16384, 32768, 49152])
@pytest.mark.parametrize("subgroup", [0, 4, 8, 32, 64])
def test_variants_keep_to_the_memory_of_a_workgroup(subgroup, max_shared, is_cpu):
    device = Pretended(subgroup, max_shared, is_cpu)
    for head_dim, group in (
        (8, 1),
        (8, 7),
        (64, 3),
        (64, 8),
        (80, 2),
        (128, 4),
        (128, 16),
        (256, 4),
        (512, 8),
    ):
        common = {
            "n_heads": group, "n_kv": 1, "head_dim": head_dim, "block_size": 32, "kv": "q8_0", "scale": 1.0,
            "softcap": 0.0, "window": 0, "ring": 0, "sinks": False, "st": LAYOUT,
        }  # fmt: skip
        rows = row_shape(device, group, head_dim)
        fused = {"rot_dim": head_dim, "neox": True, "magnitude": 1.0, "norm": True, "eps": EPS}
        consts = {**common, **fused, **rows, "fused": True, "rows": "all", "splits": 4, "share": 64}
        consts |= {"sure": False, "to_bytes": True}
        assert workgroup_bytes("attention", consts) <= max_shared, (head_dim, group, rows)
        tile = tile_shape(device, head_dim)
        nq = divisor(group, tile["tm"] * tile["mr"])
        qt = query_tile(device, group, head_dim)
        assert qt * nq <= tile["tm"] * tile["mr"] and tile["tn"] * tile["nr"] % tile["keys"] == 0
        consts = {**common, **tile, "skip": False, "qt": qt, "nq": nq, "splits": 4, "share": 64}
        assert workgroup_bytes("attention_tiles", consts | {"subgroup": subgroup}) <= max_shared, (
            head_dim,
            group,
            tile,
        )


def workgroup_bytes(kernel: str, consts: dict) -> int:
    code = template.render(kernel, consts).code
    arrays = re.findall(r"var<workgroup> \w+: array<(f32|vec2<f32>|vec4<f32>), (\d+)>", code)
    assert len(arrays) == code.count("var<workgroup>")
    return sum({"f32": 4, "vec2<f32>": 8, "vec4<f32>": 16}[kind] * int(n) for kind, n in arrays)


def test_bytes_of_heads_are_those_of_whole_words():
    assert [kv_head_bytes(kind, 128) for kind in ("f32", "f16", "q8_0")] == [512, 256, 136]
    assert kv_head_bytes("q8_0", 80) == 80 + 8


@pytest.mark.parametrize("device", ["cpu", "webgpu"])
def test_keys_and_values_in_8_bits_change_the_logits_little(tmp_path, device):
    path = write_tiny(tmp_path / "tiny.gguf", context=256, seed=3).path
    prompt = [(7 * i * i + 3 * i) % 300 for i in range(75)]

    async def logits(kv_type):
        engine = await Engine.open(path, device=device, kv_type=kv_type, max_rows=32)
        try:
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            ids = [i async for chunk in engine.generate(prompt, params) for i in chunk.token_ids]
            return ids, await last_logits(engine), sum(p.k.nbytes for p in engine.runner.memory)
        finally:
            await engine.close()

    ids, exact, nbytes = asyncio.run(logits("f32"))
    same, rounded, fewer = asyncio.run(logits("q8_0"))
    assert ids[0] == same[0]
    assert 0 < np.abs(rounded - exact).max() < 0.02 * np.abs(exact).max()  # a value is rounded by 0.4 %
    assert fewer < 0.4 * nbytes
