"""Sampling parameters and the host twin of the sampler that runs on the device.

The device draws in integers, so that the same seed gives the same token on every backend: probabilities
become masses of 2**-30, the filters are thresholds, and the draw is one integer comparison.
`sample_reference` states that algorithm in plain Python and is the oracle for every device kernel. In order
(the order of vLLM): logit bias, penalties, token mask, temperature, min-p, top-k, top-p, draw.

This module knows neither a device nor a request; it does not choose a seed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate

from .errors import RequestError
from .grammar import read_response_format

MASS_BITS = 30  # one is 2**30: the sum of all masses still fits a u32
GREEDY_BELOW = 1e-4  # a lower temperature cannot be told from zero and would overflow f32 in logit / T
MAX_CHOICES = 64
MAX_TOP_LOGPROBS = 20
_U32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends; every field is checked on creation.

    The defaults sample from the model's own distribution: each filter is off. Token ids are only checked
    for being ids at all: call `check_vocabulary` once the vocabulary is known.

    >>> SamplingParams(temperature=0).greedy
    True
    """

    temperature: float = 1.0  # 0 is greedy, as is anything below 1e-4 (stored as 0.0)
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens that together have this probability
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest
    repetition_penalty: float = 1.0  # over prompt and output: logit > 0 is divided, others multiplied
    presence_penalty: float = 0.0  # subtracted once from the logit of every token of the output
    frequency_penalty: float = 0.0  # subtracted once for every occurrence in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)  # added before the penalties
    seed: int | None = None  # None: the engine picks one
    max_tokens: int | None = None  # None: until the context is full
    min_tokens: int = 0  # so many are drawn before a token may end the answer
    stop: tuple[str, ...] = ()  # the text ends before the first of these strings
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # go on after the model's end-of-generation tokens
    n: int = 1  # answers to one prompt, each with random numbers of its own
    logprobs: bool = False  # of the tokens drawn, under the model's own distribution
    top_logprobs: int = 0  # and of so many of the likeliest tokens beside each
    response_format: Mapping[str, object] | None = field(default=None, hash=False)  # see `grammar`

    def __post_init__(self) -> None:
        self._store("temperature", self._number("temperature", 0.0, 100.0))
        self._store("top_p", self._number("top_p", 0.0, 1.0, open_low=True))
        self._store("min_p", self._number("min_p", 0.0, 1.0))
        self._store("repetition_penalty", self._number("repetition_penalty", 0.01, 100.0))
        self._store("presence_penalty", self._number("presence_penalty", -2.0, 2.0))
        self._store("frequency_penalty", self._number("frequency_penalty", -2.0, 2.0))
        self._integer("top_k", 0, 2**31 - 1)
        self._integer("seed", 0, _U32, optional=True)
        self._integer("max_tokens", 1, 2**31 - 1, optional=True)
        self._integer("min_tokens", 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens} and max_tokens {self.max_tokens}: "
                "give no more for the first than for the second"
            )
        self._integer("n", 1, MAX_CHOICES)
        self._integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
        for name in ("ignore_eos", "logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {_short(getattr(self, name))}: give true or false")
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs} without logprobs: set logprobs to true")
        if self.temperature < GREEDY_BELOW:
            self._store("temperature", 0.0)
        self._check_stops()
        self._check_logit_bias()
        self._check_response_format()

    @classmethod
    def from_mapping(cls, options: Mapping[str, object]) -> SamplingParams:
        """Parameters from outside (JSON, a command line); a RequestError names an unknown key."""
        allowed = [f.name for f in fields(cls)]
        unknown = [name for name in options if name not in allowed]
        if unknown:
            raise RequestError(f"unknown sampling parameter {_short(unknown[0])}: use {', '.join(allowed)}")
        return cls(**options)  # type: ignore[arg-type]

    @property
    def greedy(self) -> bool:
        """Take the most likely token, ties to the lowest id; filters and seed are without effect."""
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def structured(self) -> bool:
        """Whether a grammar says which tokens may follow."""
        return self.response_format is not None

    def check_vocabulary(self, n_vocab: int) -> None:
        """RequestError when logit_bias or stop_token_ids name a token outside of the vocabulary."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            for token_id in ids:
                if token_id >= n_vocab:
                    raise RequestError(
                        f"{name} names token {token_id}: this model has tokens 0 to {n_vocab - 1}"
                    )

    def _store(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _number(self, name: str, low: float, high: float, *, open_low: bool = False) -> float:
        return _number(name, getattr(self, name), low, high, open_low=open_low)

    def _integer(self, name: str, low: int, high: int, *, optional: bool = False) -> None:
        value = getattr(self, name)
        if value is None and optional:
            return
        _integer(name, value, low, high, or_none=" or none" if optional else "")

    def _check_stops(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else _sequence("stop", self.stop)
        for text in stops:
            if not isinstance(text, str) or not text:
                raise RequestError(f"stop holds {_short(text)}: give strings that are not empty")
        self._store("stop", stops)
        stop_ids = _sequence("stop_token_ids", self.stop_token_ids)
        for token_id in stop_ids:
            _integer("stop_token_ids", token_id, 0, 2**31 - 1)
        self._store("stop_token_ids", stop_ids)

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias is {_short(self.logit_bias)}: give a mapping of token id to bias")
        bias = {}
        for token_id, value in self.logit_bias.items():
            _integer("logit_bias", token_id, 0, 2**31 - 1)
            bias[token_id] = _number(f"logit_bias of token {token_id}", value, -100.0, 100.0)
        self._store("logit_bias", bias)

    def _check_response_format(self) -> None:
        """Keep what was checked, and none of the caller's objects."""
        constraint = read_response_format(self.response_format)
        if constraint is None:
            self._store("response_format", None)
            return
        kind = self.response_format["type"]
        kept: dict[str, object] = {"type": kind}
        if kind == "json_schema":
            kept[kind] = {"schema": json.loads(constraint.text)}
        elif kind != "json_object":
            kept[kind] = constraint.text
        self._store("response_format", kept)


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is {_short(value)}: give a number {_range(low, high, open_low)}")
    # Written so that NaN fails it; an int too large for a float fails the comparison, not the conversion.
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise RequestError(f"{name} is {_short(value)}: give a number {_range(low, high, open_low)}")
    return float(value)


def _integer(name: str, value: object, low: int, high: int, or_none: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {_short(value)}: give a whole number from {low} to {high}{or_none}")


def _sequence(name: str, value: object) -> tuple:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RequestError(f"{name} is {_short(value)}: give a list")
    return tuple(value)


def _range(low: float, high: float, open_low: bool) -> str:
    return f"above {low:g} and up to {high:g}" if open_low else f"from {low:g} to {high:g}"


def _short(value: object) -> str:
    """repr for one line of an error, whatever was given."""
    try:
        text = repr(value)
    except ValueError:  # an int, or a list with one, beyond sys.get_int_max_str_digits()
        return "far too large a number"
    return text if len(text) <= 80 else f"{text[:77]}..."


def hash_u32(seed: int, position: int) -> int:
    """The 32 random bits that draw the token at `position`: two rounds of PCG-RXS-M-XS over u32.

    Jarzynski and Olano, "Hash Functions for GPU Rendering" (JCGT 2020), `pcg_hash`.
    """
    h = (seed ^ (position * 0x9E3779B9)) & _U32
    for _ in range(2):
        h = (h * 747796405 + 2891336453) & _U32
        w = (((h >> ((h >> 28) + 4)) ^ h) * 277803737) & _U32
        h = (w >> 22) ^ w
    return h


def mask_words(n_vocab: int, *, allowed: Iterable[int] | None = None, banned: Iterable[int] = ()) -> bytes:
    """A row of the token mask: ceil(n_vocab / 32) little-endian u32 words, bit set = may be drawn.

    Without `allowed` all tokens but the `banned` may be.

    >>> mask_words(40, allowed=[0, 33]).hex(), mask_words(8, banned=[7]).hex()
    ('0100000002000000', '7f000000')
    """
    n_bytes = -(-n_vocab // 32) * 4
    if allowed is None:
        words = bytearray(((1 << n_vocab) - 1).to_bytes(n_bytes, "little"))
    else:
        words = bytearray(n_bytes)
        for token_id in allowed:
            words[token_id >> 3] |= 1 << (token_id & 7)
    for token_id in banned:
        words[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(words)


def adjust_logits(
    logits: Sequence[float], params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int]
) -> list[float]:
    """The logits after logit bias, repetition penalty, then frequency and presence penalty."""
    adjusted = list(logits)
    for token_id, bias in params.logit_bias.items():
        adjusted[token_id] += bias
    if params.repetition_penalty != 1.0:
        for token_id in {*prompt_ids, *output_ids}:
            x = adjusted[token_id]
            adjusted[token_id] = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
    for token_id, count in Counter(output_ids).items():
        adjusted[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return adjusted


def token_masses(logits: Sequence[float], params: SamplingParams) -> list[int]:
    """Integer mass of every token after temperature, min-p, top-k and top-p; dropped tokens have 0.

    `logits` are adjusted ones, `params` not greedy. The masses of the kept tokens are their shares, in units
    of 2**-30, of the distribution before the filters; the draw normalises them.
    """
    largest = max(logits)
    shares = [math.exp((x - largest) / params.temperature) for x in logits]
    whole = sum(shares)
    masses = [math.floor(share / whole * (1 << MASS_BITS)) for share in shares]

    kept = [share >= params.min_p for share in shares]
    if 0 < params.top_k < len(logits):
        threshold = sorted(logits, reverse=True)[params.top_k - 1]
        kept = [keep and x >= threshold for keep, x in zip(kept, logits, strict=True)]
    masses = [mass if keep else 0 for mass, keep in zip(masses, kept, strict=True)]
    if params.top_p < 1.0:
        threshold = _top_p_threshold(logits, masses, params.top_p)
        masses = [mass if x >= threshold else 0 for mass, x in zip(masses, logits, strict=True)]
    return masses


def _top_p_threshold(logits: Sequence[float], masses: Sequence[int], top_p: float) -> float:
    """The logit down to which the masses sum to at least top_p of their total."""
    wanted = math.ceil(top_p * sum(masses))
    likeliest = sorted(zip(logits, masses, strict=True), reverse=True)
    sums = accumulate(mass for _, mass in likeliest)
    return next(logit for (logit, _), reached in zip(likeliest, sums, strict=True) if reached >= wanted)


def draw(masses: Sequence[int], bits: int) -> int:
    """The first token, in the order of ids, whose running sum of masses exceeds bits/2**32 of the total."""
    r = (bits * sum(masses)) >> 32
    running = 0
    for token_id, mass in enumerate(masses):
        running += mass
        if running > r:
            return token_id
    raise ValueError("all masses are zero: there is no token to draw")


def sample_reference(
    logits: Sequence[float],
    params: SamplingParams,
    *,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    seed: int,
    position: int,
    allowed: Container[int] | None = None,
) -> int:
    """The token at index `position` of a sequence, drawn from the model's `logits` (n_vocab,) for it.

    `position` is the number of tokens before it, `allowed` the tokens whose bits are set in the mask. Raises
    ValueError when a logit is NaN or the largest is not finite: which no working model produces, but a mask
    that leaves nothing does.
    """
    adjusted = adjust_logits(logits, params, prompt_ids, output_ids)
    if allowed is not None:
        adjusted = [x if i in allowed else -math.inf for i, x in enumerate(adjusted)]
    largest = max(adjusted)
    if any(math.isnan(x) for x in adjusted) or not math.isfinite(largest):
        raise ValueError(f"the logits for position {position} hold NaN or have no finite maximum")
    if params.greedy:
        return adjusted.index(largest)
    return draw(token_masses(adjusted, params), hash_u32(seed, position))
