"""Scores and pooled hidden states, as whole operations, against float64 on every device."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import reference
from kernel_cases import normal, packed
from tiny import write_tiny

from realm_web.engine import Engine
from realm_web.ops import Recorder, pool, row_scores, score
from realm_web.quants import FORMATS
from realm_web.runtime.adapters import open_device
from realm_web.step import NONE, StepLayout, sampling_words, sequence_record
from realm_web.tensor import Shard, Tensor, Weight

EPS = 1e-5
DIM = 64
LAYOUT = StepLayout(max_rows=128, max_seqs=4, max_blocks=1)
PARAMS = sampling_words(
    temperature=0, top_k=0, top_p=1, min_p=0, repetition=1, presence=0, frequency=0
)  # fmt: skip


@pytest.fixture(scope="module", params=["cpu", "webgpu", "webgpu without subgroups", "webgpu as a GPU"])
def device(request):
    """A software rasteriser has variants of its own, so it is taken for a GPU, too."""
    opened = asyncio.run(open_device(request.param.split()[0]))
    if "without" in request.param:
        opened.features -= {"subgroups"}
    if "as a GPU" in request.param:
        opened.info = replace(opened.info, adapter_type="DiscreteGPU")
    yield opened
    opened.close()


def pack(seqs, *, pools=(), targets=()) -> bytes:
    """A step of these sequences: (slot, first position, number of rows)."""
    records = [
        sequence_record(slot=slot, kv_len=first + n, logits_row=NONE, draw_position=0, seed=0, params=PARAMS)
        for slot, first, n in seqs
    ]
    words = np.frombuffer(
        LAYOUT.pack(
            tokens=[0] * sum(n for _, _, n in seqs),
            positions=[first + i for _, first, n in seqs for i in range(n)],
            row_seqs=[s for s, (_, _, n) in enumerate(seqs) for _ in range(n)],
            records=records,
            tiles=[],
            advance=False,
            targets=targets,
        ),
        np.uint32,
    ).copy()
    for s, kind in enumerate(pools):
        words[LAYOUT.seqs + s * LAYOUT.SEQ_WORDS + LAYOUT.POOL] = kind
    return words.tobytes()


def tensor(device, values: np.ndarray) -> Tensor:
    made = Tensor.alloc(device, values.shape, "f32", "test")
    device.write(made.buffer, values.tobytes())
    return made


def dense(device, values: np.ndarray, shards: int) -> Weight:
    """A float32 weight in so many shards."""
    n, k = values.shape
    step = -(-n // shards)
    parts = [values[first : first + step] for first in range(0, n, step)]
    views = [tensor(device, part) for part in parts]
    rows = [
        Shard(i * step, len(part), (view,)) for i, (part, view) in enumerate(zip(parts, views, strict=True))
    ]
    return Weight(FORMATS["F32"], n, k, "output", tuple(rows))


def recorder(device, n_rows: int, n_seqs: int, *, exact: bool = True) -> Recorder:
    step, slots = device.alloc(4 * LAYOUT.n_words, "step"), device.alloc(16, "slots")
    program = device.program("test")
    return Recorder(
        device, program, LAYOUT, device.view(step), device.view(slots), n_rows, n_seqs, 1, 1, {}, exact=exact
    )  # fmt: skip


def run(r: Recorder, words: bytes, out: Tensor) -> np.ndarray:
    async def submit() -> bytes:
        await r.device.compile()
        r.device.write(r.step.buffer, words)
        r.device.submit(r.program)
        return await r.device.read(out.buffer)

    size = int(np.prod(out.shape))
    return np.frombuffer(asyncio.run(submit()), np.float32)[:size].reshape(out.shape)


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("room", [1 << 26, 20_000, 1], ids=["one group", "several groups", "row by row"])
@pytest.mark.parametrize("n_rows", [1, 5, 70])
def test_scores_are_the_log_softmax_at_the_targets(device, n_rows, room, monkeypatch):
    monkeypatch.setattr(score, "LOGITS_BYTES", room)
    rng = np.random.default_rng(n_rows)
    n_vocab, n_valid, scale, softcap = 150, 141, 0.5, 7.0
    x, norm, weight = normal(rng, n_rows, DIM), normal(rng, DIM), normal(rng, n_vocab, DIM)
    targets = rng.integers(0, n_valid, n_rows)
    targets[rng.random(n_rows) < 0.3] = NONE

    r = recorder(device, next(b for b in (1, 8, 128) if b >= n_rows), 2)
    out = tensor(device, normal(rng, LAYOUT.max_rows))
    given = tensor(device, np.concatenate([x, normal(rng, r.n_rows - n_rows, DIM)]))
    row_scores(
        r, given, tensor(device, norm), dense(device, weight, 2), out, eps=EPS, scale=scale, softcap=softcap,
        n_valid=n_valid,
    )  # fmt: skip
    got = run(r, pack([(1, 0, n_rows)], targets=targets.tolist()), out)[:n_rows]

    logits = np.tanh(scale * normed(x, norm) @ weight.T.astype(np.float64) / softcap) * softcap
    logits = logits[:, :n_valid]
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for row, target in enumerate(targets):
        # float32 products of 64 terms; on a GPU the tiles of a product may be rounded to f16 (11 bits)
        bound = 2e-5 if device.info.is_cpu else 2e-2
        assert got[row] == pytest.approx(0 if target == NONE else wanted[row, target], abs=bound)


@pytest.mark.parametrize("exact", [True, False], ids=["floats", "bytes"])
def test_rows_of_a_quantised_output_are_scored_as_its_logits_say(device, exact, monkeypatch):
    monkeypatch.setattr(score, "LOGITS_BYTES", 32 * 4 * 96)  # four groups, two of them empty
    rng = np.random.default_rng(4)
    n_rows, n_vocab = 40, 96
    parts = packed("Q8_0", n_vocab, DIM, rng)
    views = tuple(tensor(device, part.view(np.float32)) for part in parts)
    weight = Weight(FORMATS["Q8_0"], n_vocab, DIM, "output", (Shard(0, n_vocab, views),))
    x, norm = normal(rng, n_rows, DIM), np.full(DIM, 0.1, np.float32)
    targets = rng.integers(0, n_vocab, n_rows).tolist()
    sums = np.zeros(n_rows)
    # log-probabilities of all tokens, one target at a time, are those of a distribution
    r = recorder(device, 128, 1, exact=exact)
    out = tensor(device, np.zeros(LAYOUT.max_rows, np.float32))
    given = tensor(device, np.concatenate([x, normal(rng, 128 - n_rows, DIM)]))
    row_scores(
        r, given, tensor(device, norm), weight, out, eps=EPS, scale=1.0, softcap=0.0, n_valid=n_vocab
    )  # fmt: skip
    for token in range(n_vocab):
        sums += np.exp(run(r, pack([(0, 0, n_rows)], targets=[token] * n_rows), out)[:n_rows])
    assert sums == pytest.approx(np.ones(n_rows), abs=1e-5)
    assert run(r, pack([(0, 0, n_rows)], targets=targets), out)[:n_rows].max() < 0


@pytest.mark.parametrize("pieces", [[40], [1, 39], [20, 7, 13]], ids=str)
def test_a_pooled_prompt_is_the_same_in_one_step_or_in_several(device, pieces):
    rng = np.random.default_rng(5)
    kinds = [LAYOUT.MEAN, LAYOUT.LAST, LAYOUT.CLS]
    x, norm = normal(rng, 3, sum(pieces), DIM), normal(rng, DIM)
    wanted = [normed(x[0], norm).mean(axis=0), normed(x[1], norm)[-1], normed(x[2], norm)[0]]

    r = recorder(device, LAYOUT.max_rows, 4)
    given = Tensor.alloc(device, (LAYOUT.max_rows, DIM), "f32", "x")
    kept = tensor(device, normal(rng, LAYOUT.max_seqs, DIM))  # of those that had the slots before
    out = tensor(device, np.zeros((4, DIM), np.float32))
    pool(r, given, tensor(device, norm), kept, out, eps=EPS)
    done = 0
    for turn, n in enumerate(pieces):
        # in another order each time, after a sequence that is not pooled
        order = [(which + turn) % 3 for which in range(3)]
        rows = [normal(rng, 2, DIM), *(x[which, done : done + n] for which in order)]
        device.write(given.buffer, np.concatenate(rows).tobytes())
        seqs = [(3, 5, 2), *((which, done, n) for which in order)]
        pools = [LAYOUT.NO_POOL, *(kinds[which] for which in order)]
        got = run(r, pack(seqs, pools=pools), out)
        done += n
    for place, which in enumerate(order, 1):
        assert got[place] == pytest.approx(wanted[which], abs=2e-5)


@pytest.mark.parametrize("max_rows", [512, 8])
def test_a_text_is_scored_and_embedded_as_exact_arithmetic_says(tmp_path, max_rows):
    tiny = write_tiny(tmp_path / "tiny.gguf", context=64)
    ids = np.random.default_rng(6).integers(0, 256, 40).tolist()

    async def ask():
        engine = await Engine.open(tiny.path, device="cpu", max_rows=max_rows)
        found = await asyncio.gather(
            engine.score(ids),
            engine.score(ids, first=21),
            *(engine.embed(ids, pooling=kind, normalize=False) for kind in ("mean", "last", "cls")),
            engine.embed(ids),
        )
        await engine.close()
        return found

    scores, half, *embeddings, unit = asyncio.run(ask())
    logits = reference.logits(tiny.weights, tiny.metadata, ids)
    wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    # float32, but for keys and values in float16 (11 bits)
    assert scores.token_ids == tuple(ids) and scores.logprobs[0] is None
    assert scores.logprobs[1:] == pytest.approx(
        [wanted[i, token] for i, token in enumerate(ids[1:])], abs=3e-3
    )
    assert half.logprobs[:21] == (None,) * 21
    assert half.logprobs[21:] == pytest.approx(scores.logprobs[21:], abs=1e-5)
    states = reference.hidden(tiny.weights, tiny.metadata, ids)
    for got, exact in zip(embeddings, (states.mean(axis=0), states[-1], states[0]), strict=True):
        assert list(got) == pytest.approx(exact, abs=3e-3)
    mean = states.mean(axis=0)
    assert list(unit) == pytest.approx(mean / np.linalg.norm(mean), abs=3e-3)
