"""Tiny models of every weight format, quantised by llama.cpp: on each device against float64 and llama.cpp.

Each step of the recorded greedy paths is one run over the prompt and the path so far, so that one step's
rounding does not decide the next one's input.
"""

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import reference
from probe import greedy, last_logits

from realm_web import dequant
from realm_web.engine import Engine
from realm_web.gguf import GGUFFile, parse
from realm_web.quants import FORMATS
from realm_web.tokenizer import Tokenizer

FILES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M"),
    *("Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_M", "IQ3_XXS", "IQ3_M", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4_MOE", "Q1_0", "Q2_0"),
)
OTHER_TYPES = {"IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S", "MXFP4_MOE": "MXFP4"}  # llama.cpp's name of a mixture

# Against float64 on the same weights, log-probabilities, keys and values in float32: sums of up to 512 terms
# in another order, through two layers
EXACT = 2e-5
# llama.cpp rounds activations to 8 bits: it is up to 0.112 (IQ2_M), 0.016 in the mean, from float64
ROUNDED, ROUNDED_MEAN = 0.15, 0.03
# Where its two best are closer than this, its path may be another, rightly
NEAR = 0.05


@dataclass(frozen=True)
class Step:
    """What was recorded after `tokens`: the best token, and log-probabilities by token."""

    tokens: tuple[int, ...]
    best: int
    top: dict[int, float]
    exact: np.ndarray  # log-probabilities in float64


def read(path: Path) -> tuple[GGUFFile, dict[str, np.ndarray]]:
    """A file and its weights, decoded by our oracles."""
    data = path.read_bytes()
    file = parse(data, len(data))
    weights = {}
    for name, info in file.tensors.items():
        raw = np.frombuffer(data, np.uint8, info.nbytes, info.offset).reshape(-1, info.format.block_bytes)
        weights[name] = dequant.dequantize(info.type_name, raw).reshape(info.shape[::-1]).astype(np.float64)
    return file, weights


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits, np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def recorded_steps(path: Path, cases: list[dict]) -> list[Step]:
    """The recorded steps with what comes before each of them.

    llama.cpp's server says nothing of a step whose token leaves a character unfinished. Where the recorded
    values are not those of float64, the best token must be such a one; it goes before.
    """
    file, weights = read(path)
    tokenizer = Tokenizer.from_metadata(file.metadata)
    steps = []
    for case in cases:
        tokens = tuple(case["prompt_ids"])
        n_hidden = 0
        for step in case["steps"]:
            top = dict(step["top"])
            while True:
                exact = log_softmax(reference.logits(weights, file.metadata, tokens)[-1])
                error = max(abs(exact[token] - value) for token, value in top.items())
                if error < ROUNDED:
                    break
                best = int(exact.argmax())
                text = tokenizer.token_bytes(best).decode(errors="ignore")
                assert not text, f"after {tokens}, {error:.2f} from float64, whose best is {text!r}"
                tokens, n_hidden = (*tokens, best), n_hidden + 1
            steps.append(Step(tokens, step["id"], top, exact))
            tokens = (*tokens, step["id"])
        assert len(case["steps"]) + n_hidden <= 6
    return steps


async def log_probabilities(path: Path, device: str, prompts: list[tuple[int, ...]]) -> list[np.ndarray]:
    engine = await Engine.open(path, device=device, context=64, max_seqs=1, max_rows=32, kv_type="f32")
    found = []
    for prompt in prompts:
        await greedy(engine, list(prompt))
        found.append(log_softmax(await last_logits(engine)))
    await engine.close()
    return found


@pytest.fixture(scope="module")
def golden(shared):
    return json.loads((shared / "goldens" / "tiny256.json").read_text())


@pytest.fixture(scope="module")
def steps_of(shared, golden):
    """Recorded steps by file name, computed once for all devices."""
    known: dict[str, list[Step]] = {}

    def steps(name: str) -> list[Step]:
        if name not in known:
            known[name] = recorded_steps(shared / "fixtures" / name, golden[name])
        return known[name]

    return steps


def test_every_fixture_is_in_the_list_and_every_format_but_nvfp4_in_a_fixture(shared, golden):
    assert {f"tiny256-{file}.gguf" for file in FILES} == golden.keys()
    assert golden.keys() == {path.name for path in (shared / "fixtures").glob("*.gguf")}
    types = {OTHER_TYPES.get(file, file.removesuffix("_M")) if file != "IQ1_M" else file for file in FILES}
    assert set(FORMATS) - types == {"NVFP4"}


@pytest.mark.parametrize("file", FILES)
def test_exact_arithmetic_gives_what_llama_cpp_recorded(steps_of, file):
    steps = steps_of(f"tiny256-{file}.gguf")
    errors = [abs(step.exact[token] - value) for step in steps for token, value in step.top.items()]
    assert max(errors) < ROUNDED and np.mean(errors) < ROUNDED_MEAN
    for step in steps:
        assert step.top[step.best] - step.top[int(step.exact.argmax())] < NEAR


@pytest.mark.parametrize("device", ["cpu", "webgpu"])
@pytest.mark.parametrize("file", FILES)
def test_log_probabilities_are_exact_and_llama_cpps(shared, steps_of, file, device):
    steps = steps_of(f"tiny256-{file}.gguf")
    path = shared / "fixtures" / f"tiny256-{file}.gguf"
    found = asyncio.run(log_probabilities(path, device, [step.tokens for step in steps]))
    for step, got in zip(steps, found, strict=True):
        error = np.abs(got - step.exact).max()
        assert error < EXACT, f"after {step.tokens}: {error:.2g} from float64"
        for token, value in step.top.items():
            assert abs(got[token] - value) < ROUNDED, f"after {step.tokens}, token {token}"
        assert step.top[step.best] - step.top[int(got.argmax())] < NEAR
