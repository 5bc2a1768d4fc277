"""The kernels that choose tokens, as `ops.sample` records them, against the host twin."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from chi_square import assert_like_expected

from realm_web.ops import Recorder, sample
from realm_web.ops.sampling import LISTED, LOGPROB_WORDS
from realm_web.runtime.adapters import open_device
from realm_web.sampler import SamplingParams, adjust_logits, mask_words, sample_reference, token_masses
from realm_web.step import NONE, StepLayout, sampling_words, sequence_record
from realm_web.tensor import Tensor

LOGPROBS_AT = 4096  # in the buffer that is read back; aligned for every adapter


@dataclass
class Ask:
    """One sequence of a batch."""

    params: SamplingParams
    seed: int = 0
    position: int = 10
    prompt_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    allowed: set[int] | None = None
    mask_until: int = NONE

    def expected(self, logits: np.ndarray) -> int:
        """The host twin's token for the logits (n_valid,)."""
        return sample_reference(
            logits.tolist(), self.params, prompt_ids=self.prompt_ids, output_ids=self.output_ids,
            seed=self.seed, position=self.position, allowed=self.allowed,
        )  # fmt: skip


class Sampling:
    """A recorded program of nothing but sampling, for any number of runs on given logits."""

    def __init__(
        self, device, logits: np.ndarray, asks: list[Ask], *, n_valid: int = 0, advance: bool = False
    ):
        self.device, self.asks, self.advance = device, asks, advance
        n, self.n_vocab = logits.shape
        self.layout = StepLayout(n, n, 1)
        self.step = device.alloc(4 * self.layout.n_words, "step")
        self.out = device.alloc(LOGPROBS_AT + 4 * LOGPROB_WORDS * n, "out")
        self.logits = self._tensor(logits)
        adjust = any(ask.params.penalizes or ask.params.logit_bias for ask in asks)
        masked = any(ask.allowed is not None for ask in asks)
        self.bias, self.counts = self._adjustments() if adjust else (None, None)
        self.logprobs = any(ask.params.logprobs for ask in asks)
        self.program = device.program("sampling")
        slots = device.alloc(4 * n, "slots")
        recorder = Recorder(
            device, self.program, self.layout, device.view(self.step), device.view(slots), n, n, 1, 1, {}
        )
        sample(
            recorder, self.logits, device.view(self.out, 0, LOGPROBS_AT),
            draw=not all(ask.params.greedy for ask in asks), bias=self.bias, counts=self.counts,
            mask=self._mask() if masked else None,
            logprobs=device.view(self.out, LOGPROBS_AT) if self.logprobs else None, n_valid=n_valid,
        )  # fmt: skip
        asyncio.run(device.compile())
        self.write()

    def _tensor(self, data: np.ndarray) -> Tensor:
        tensor = Tensor.alloc(self.device, data.shape, "f32", "given")
        self.device.write(tensor.buffer, data.tobytes())
        return tensor

    def _adjustments(self) -> tuple[Tensor, Tensor]:
        bias = np.zeros((len(self.asks), self.n_vocab), np.float32)
        counts = np.zeros((len(self.asks), self.n_vocab), np.uint32)
        for slot, ask in enumerate(self.asks):
            bias[slot, list(ask.params.logit_bias)] = list(ask.params.logit_bias.values())
            counts[slot, ask.prompt_ids] = 1 << 31
            np.add.at(counts[slot], ask.output_ids, 1)
        self.given_counts = counts.tobytes()
        return self._tensor(bias), self._tensor(counts)

    def _mask(self) -> Tensor:
        rows = [mask_words(self.n_vocab, allowed=ask.allowed) for ask in self.asks]
        return self._tensor(np.frombuffer(b"".join(rows), np.uint32).reshape(len(rows), -1))

    def write(self, position: int | None = None) -> None:
        """The step buffer, and the counts as they were."""
        records = [
            sequence_record(
                slot=i, kv_len=1, logits_row=i, seed=ask.seed,
                draw_position=ask.position if position is None else position,
                params=sampling_words(
                    temperature=ask.params.temperature, top_k=ask.params.top_k, top_p=ask.params.top_p,
                    min_p=ask.params.min_p, repetition=ask.params.repetition_penalty,
                    presence=ask.params.presence_penalty, frequency=ask.params.frequency_penalty,
                ),
                mask_until=0 if ask.allowed is None else ask.mask_until,
                top_logprobs=ask.params.top_logprobs + 1 if ask.params.logprobs else 0,
            )
            for i, ask in enumerate(self.asks)
        ]  # fmt: skip
        n = len(records)
        words = self.layout.pack(
            tokens=[0] * n,
            positions=[0] * n,
            row_seqs=range(n),
            records=records,
            tiles=[],
            advance=self.advance,
        )
        self.device.write(self.step, words)
        if self.counts is not None:
            self.device.write(self.counts.buffer, self.given_counts)

    def run(self) -> list[int]:
        self.device.submit(self.program)
        data = asyncio.run(self.device.read(self.out, 0, 4 * len(self.asks)))
        return np.frombuffer(data, np.uint32).tolist()

    def read_logprobs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the tokens (n,), ids (n, 20) and theirs (n, 20)."""
        data = asyncio.run(self.device.read(self.out, LOGPROBS_AT, 4 * LOGPROB_WORDS * len(self.asks)))
        words = np.frombuffer(data, np.uint32).reshape(-1, LOGPROB_WORDS)
        floats = words.view(np.float32)
        return floats[:, 0], words[:, 1:21], floats[:, 21:]


@pytest.fixture(scope="module", params=["webgpu", "cpu"])
def device(request):
    opened = asyncio.run(open_device(request.param))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def gpu():
    opened = asyncio.run(open_device("webgpu"))
    yield opened
    opened.close()


SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top-k": {"top_k": 12},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "min-p": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    "bias": {"logit_bias": {0: -100, 11: 2.5, 249: 6}},
    "mask": {"temperature": 1.5},
    "all": {
        "temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
        "frequency_penalty": 0.3, "logit_bias": {3: 1.5},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_20_000_draws_on_the_device_follow_the_exact_distribution_of_the_host_twin(gpu, name):
    n_seqs, n_vocab, n_draws = 1000, 250, 20_000
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal(n_vocab + 7) * 1.7).astype(np.float32)
    logits[n_vocab:] = 20  # rows that the tokenizer does not have
    params = SamplingParams(**SETTINGS[name])
    context = {"prompt_ids": [1, 3, 200], "output_ids": [0, 0, 4, 77]} if name in ("penalties", "all") else {}
    allowed = set(range(0, n_vocab, 3)) if name in ("mask", "all") else None
    asks = [Ask(params, seed=977 * i, allowed=allowed, **context) for i in range(n_seqs)]
    sampling = Sampling(gpu, np.tile(logits, (n_seqs, 1)), asks, n_valid=n_vocab)
    counts = Counter()
    for position in range(n_draws // n_seqs):
        sampling.write(position)
        counts.update(sampling.run())

    adjusted = adjust_logits(
        logits[:n_vocab].tolist(), params, context.get("prompt_ids", []), context.get("output_ids", [])
    )
    if allowed is not None:
        adjusted = [x if i in allowed else -np.inf for i, x in enumerate(adjusted)]
    masses = token_masses(adjusted, params)
    expected = {i: n_draws * mass / sum(masses) for i, mass in enumerate(masses) if mass}
    assert set(counts) <= set(expected)
    rare = {i for i, e in expected.items() if e < 5}
    ids = [i for i in expected if i not in rare]
    assert len(ids) > 10
    pooled = sum(expected[i] for i in rare)
    more = ([sum(counts[i] for i in rare)], [pooled]) if pooled >= 5 else ([], [])
    assert_like_expected([counts[i] for i in ids] + more[0], [expected[i] for i in ids] + more[1])


def random_ask(rng, n_vocab: int) -> Ask:
    def maybe(value, off):
        return value if rng.random() < 0.6 else off

    return Ask(
        SamplingParams(
            temperature=maybe(float(rng.uniform(0.3, 3)), 0.0),
            top_k=maybe(int(rng.integers(1, 200)), 0),
            top_p=maybe(float(rng.uniform(0.1, 1)), 1.0),
            min_p=maybe(float(rng.uniform(0, 0.2)), 0.0),
            repetition_penalty=maybe(1.5, 1.0),
            presence_penalty=maybe(0.5, 0.0),
            frequency_penalty=maybe(-0.25, 0.0),
            logit_bias={int(i): 4.0 for i in rng.integers(0, n_vocab, 3)},
        ),
        seed=int(rng.integers(2**32)),
        position=int(rng.integers(1, 5000)),
        prompt_ids=rng.integers(0, n_vocab, 30).tolist(),
        output_ids=rng.integers(0, n_vocab, 30).tolist(),
        allowed=maybe(set(np.flatnonzero(rng.random(n_vocab) < 0.3).tolist()), None),
    )


@pytest.mark.parametrize("n_vocab", [5, 31, 2048, 5003])
def test_mixed_sequences_of_a_batch_get_the_tokens_of_the_host_twin(device, n_vocab):
    # the twin counts in float64: equal but where a draw lands within rounding of a boundary
    rng = np.random.default_rng(n_vocab)
    n_valid = max(1, n_vocab - 3)
    logits = (rng.standard_normal((16, n_vocab)) * 3).astype(np.float32)
    logits[:4] = np.round(logits[:4])  # ties
    logits[:, n_valid:] = 100
    asks = [random_ask(rng, n_valid) for _ in logits]
    for ask in asks:
        if ask.allowed is not None and n_valid < 100:
            ask.allowed |= {0, 1}
    sampling = Sampling(device, logits, asks, n_valid=n_valid)
    assert sampling.run() == [ask.expected(row[:n_valid]) for ask, row in zip(asks, logits, strict=True)]


@pytest.mark.parametrize("params", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 4500, "top_p": 0.7}])
def test_more_ties_than_the_list_of_undecided_tokens_holds_are_all_kept(device, params):
    n_vocab = LISTED + 1500
    logits = np.zeros((2, n_vocab), np.float32)
    logits[1, ::2] = -0.5
    asks = [Ask(SamplingParams(**params), seed=seed) for seed in (1, 2)]
    drawn = Sampling(device, logits, asks).run()
    assert drawn == [ask.expected(row) for ask, row in zip(asks, logits, strict=True)]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_mask_that_allows_nothing_gives_no_token_to_that_sequence_alone(device, temperature):
    logits = np.random.default_rng(1).standard_normal((3, 100)).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=9 * temperature, logit_bias={5: 1})
    asks = [Ask(params), Ask(params, allowed=set()), Ask(params, allowed={41})]
    drawn = Sampling(device, logits, asks).run()
    assert drawn == [asks[0].expected(logits[0]), NONE, 41]


@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_no_numbers_give_no_token(device, temperature):
    logits = np.full((2, 100), np.nan, np.float32)
    logits[1, 7] = 0.5
    params = SamplingParams(temperature=temperature, top_p=0.9)
    assert Sampling(device, logits, [Ask(params), Ask(params)]).run()[0] == NONE


def test_a_mask_ends_at_its_position_while_the_device_runs_on_by_itself(device):
    logits = np.zeros((2, 64), np.float32)
    logits[:, 9] = 5
    params = SamplingParams(temperature=0)
    others = set(range(64)) - {9}
    asks = [Ask(params, position=10, allowed=others, mask_until=12), Ask(params, position=10)]
    sampling = Sampling(device, logits, asks, advance=True)
    assert [sampling.run() for _ in range(4)] == [[0, 9], [0, 9], [9, 9], [9, 9]]


@pytest.mark.parametrize("n_vocab", [12, 300, 5003])
def test_log_probabilities_are_of_the_logits_as_the_model_gave_them(device, n_vocab):
    rng = np.random.default_rng(n_vocab)
    logits = (rng.standard_normal((5, n_vocab)) * 4).astype(np.float32)
    logits[1] = np.round(logits[1] / 4)  # ties: the lower id first
    n_valid = n_vocab - 2
    logits[:, n_valid:] = 50
    asks = [
        Ask(SamplingParams(temperature=0, logprobs=True)),
        Ask(SamplingParams(logprobs=True, top_logprobs=20, top_k=3), seed=8),
        Ask(SamplingParams(logprobs=True, top_logprobs=2, logit_bias={1: 50}), allowed=set(range(n_valid))),
        Ask(SamplingParams(temperature=0)),
        Ask(SamplingParams(temperature=0, logprobs=True), allowed={4}),
    ]
    sampling = Sampling(device, logits, asks, n_valid=n_valid)
    tokens = sampling.run()
    assert tokens[2] == 1 and tokens[4] == 4
    chosen, ids, best = sampling.read_logprobs()
    for i, row in enumerate(logits[:, :n_valid].astype(np.float64)):
        if not asks[i].params.logprobs:
            assert not chosen[i] and not ids[i].any()
            continue
        wanted = row - row.max() - np.log(np.exp(row - row.max()).sum())
        order = np.argsort(-wanted, kind="stable")[:20]
        assert ids[i, : len(order)].tolist() == order.tolist()
        assert (ids[i, len(order) :] == NONE).all()
        assert chosen[i] == pytest.approx(wanted[tokens[i]], abs=1e-5)
        np.testing.assert_allclose(best[i, : len(order)], wanted[order], atol=1e-5)
