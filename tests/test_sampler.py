"""Sampling parameters and the host twin: validation, each filter against sorting, the distribution drawn."""

import dataclasses
import math
import pickle
from collections import Counter

import pytest
from chi_square import assert_like_expected
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm_web.errors import RequestError
from realm_web.sampler import (
    SamplingParams,
    adjust_logits,
    draw,
    hash_u32,
    mask_words,
    sample_reference,
    token_masses,
)

NAN, INF = math.nan, math.inf

# Halves make ties likely; the others are what a model gives.
LOGITS = st.lists(
    st.one_of(st.integers(-8, 8).map(lambda n: n / 2), st.floats(-20, 20, width=32)), min_size=1, max_size=30
)
FILTERS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.just(0), st.integers(0, 40)),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)


# ---- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *(
            (field, value, f"{field} is {value!r}: give a number")
            for field in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "presence_penalty",
                "frequency_penalty",
            )
            for value in (NAN, INF, -INF, -2.5, 100.5, "0.5", None, True, 1j, [1])
        ),
        ("temperature", -0.1, "temperature is -0.1: give a number from 0 to 100"),
        ("temperature", 10**400, f"temperature is 1{'0' * 76}...: give a number from 0 to 100"),
        ("top_p", 0, "top_p is 0: give a number above 0 and up to 1"),
        ("top_p", 1.01, "top_p is 1.01: give a number above 0 and up to 1"),
        ("min_p", 1.01, "min_p is 1.01: give a number from 0 to 1"),
        ("repetition_penalty", 0, "repetition_penalty is 0: give a number from 0.01 to 100"),
        ("presence_penalty", 2.1, "presence_penalty is 2.1: give a number from -2 to 2"),
        *(
            (field, value, f"{field} is {value!r}: give a whole number from")
            for field in ("top_k", "seed", "max_tokens")
            for value in (-1, 1.0, NAN, "1", True, 2**32)
        ),
        ("top_k", None, "top_k is None: give a whole number from 0 to 2147483647"),
        ("max_tokens", 0, "max_tokens is 0: give a whole number from 1 to 2147483647 or none"),
        ("top_p", "a" * 1000, f"top_p is '{'a' * 76}...: give a number"),
        ("n", 0, "n is 0: give a whole number from 1 to 64"),
        ("n", 65, "n is 65: give a whole number from 1 to 64"),
        ("n", True, "n is True: give a whole number"),
        ("logprobs", 5, "logprobs is 5: give true or false"),
        ("top_logprobs", 21, "top_logprobs is 21: give a whole number from 0 to 20"),
        ("top_logprobs", 3, "top_logprobs is 3 without logprobs: set logprobs to true"),
        ("min_tokens", -1, "min_tokens is -1: give a whole number from 0"),
        ("min_tokens", None, "min_tokens is None: give a whole number from 0"),
        ("response_format", "json", "response_format is 'json': give an object"),
        ("response_format", {"type": "yaml"}, "response_format has the type 'yaml': use text, json_object"),
        ("response_format", {"type": "regex"}, "response_format.regex is None: give a string"),
        ("ignore_eos", 1, "ignore_eos is 1: give true or false"),
        ("ignore_eos", "yes", "ignore_eos is 'yes': give true or false"),
        ("stop", 7, "stop is 7: give a list"),
        ("stop", b"end", "stop is b'end': give a list"),
        ("stop", None, "stop is None: give a list"),
        ("stop", "", "stop holds '': give strings that are not empty"),
        ("stop", ["end", ""], "stop holds '': give strings that are not empty"),
        ("stop", ["end", 7], "stop holds 7: give strings that are not empty"),
        ("stop_token_ids", 7, "stop_token_ids is 7: give a list"),
        ("stop_token_ids", "7", "stop_token_ids is '7': give a list"),
        ("stop_token_ids", [7, -1], "stop_token_ids is -1: give a whole number from 0 to 2147483647"),
        ("stop_token_ids", [7.0], "stop_token_ids is 7.0: give a whole number"),
        ("stop_token_ids", [True], "stop_token_ids is True: give a whole number"),
        ("logit_bias", [(1, 2)], "logit_bias is [(1, 2)]: give a mapping of token id to bias"),
        ("logit_bias", None, "logit_bias is None: give a mapping of token id to bias"),
        ("logit_bias", {"7": 1}, "logit_bias is '7': give a whole number from 0 to 2147483647"),
        ("logit_bias", {-7: 1}, "logit_bias is -7: give a whole number"),
        ("logit_bias", {7: 100.1}, "logit_bias of token 7 is 100.1: give a number from -100 to 100"),
        ("logit_bias", {7: -101}, "logit_bias of token 7 is -101: give a number from -100 to 100"),
        ("logit_bias", {7: NAN}, "logit_bias of token 7 is nan: give a number from -100 to 100"),
        ("logit_bias", {7: -INF}, "logit_bias of token 7 is -inf: give a number from -100 to 100"),
        ("logit_bias", {7: "ban"}, "logit_bias of token 7 is 'ban': give a number from -100 to 100"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_field_value_and_range(field, value, message):
    with pytest.raises(RequestError) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(message)


def test_a_number_of_more_digits_than_python_prints_is_an_error_like_the_others():
    huge = 1 << 20_000
    for field, value in (("seed", huge), ("temperature", huge), ("logit_bias", {0: huge})):
        with pytest.raises(RequestError, match="far too large a number: give"):
            SamplingParams(**{field: value})
    with pytest.raises(RequestError, match="stop holds far too large a number"):
        SamplingParams(stop=[[huge]])


def test_the_ends_of_every_range_are_allowed():
    SamplingParams(
        temperature=100,
        top_k=2**31 - 1,
        top_p=1,
        min_p=1,
        repetition_penalty=100,
        presence_penalty=2,
        frequency_penalty=-2,
        logit_bias={0: -100, 2**31 - 1: 100},
        seed=2**32 - 1,
        max_tokens=1,
        stop_token_ids=(0,),
        n=64,
        logprobs=True,
        top_logprobs=20,
        min_tokens=1,
    )
    SamplingParams(min_p=0, repetition_penalty=0.01, presence_penalty=-2, frequency_penalty=2, seed=0)


def test_the_defaults_change_nothing_about_the_distribution():
    params = SamplingParams()
    assert not params.greedy and not params.penalizes
    assert adjust_logits([1.0, -2.0], params, [0], [1]) == [1.0, -2.0]
    assert token_masses([1.0, 1.0], params) == [1 << 29, 1 << 29]


def test_values_are_stored_in_one_form_and_cannot_change():
    bias = {7: 1}
    params = SamplingParams(temperature=1, top_p=1, stop="end", stop_token_ids=[1, 2], logit_bias=bias)
    bias[8] = 2
    assert (type(params.temperature), type(params.top_p)) == (float, float)
    assert params.stop == ("end",) and params.stop_token_ids == (1, 2)
    assert params.logit_bias == {7: 1.0}
    assert hash(params) == hash(dataclasses.replace(params))
    assert pickle.loads(pickle.dumps(params)) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 1


def test_fewer_tokens_allowed_than_asked_for_is_an_error():
    SamplingParams(min_tokens=3, max_tokens=3)
    with pytest.raises(RequestError, match="min_tokens is 4 and max_tokens 3: give no more"):
        SamplingParams(min_tokens=4, max_tokens=3)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "json_object"}),
        ({"type": "regex", "regex": "a+"}, {"type": "regex", "regex": "a+"}),
        (
            {"type": "json_schema", "json_schema": {"name": object(), "schema": {"type": "array"}}},
            {"type": "json_schema", "json_schema": {"schema": {"type": "array"}}},
        ),
    ],
)
def test_of_a_response_format_what_was_checked_is_kept_and_nothing_else(given, kept):
    params = SamplingParams(response_format=given)
    assert params.response_format == kept and params.structured == (kept is not None)
    if kept and "json_schema" in kept:
        given["json_schema"]["schema"]["type"] = "object"
        assert params.response_format == kept
    assert hash(params) == hash(dataclasses.replace(params)) and dataclasses.replace(params) == params


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def holding_itself():
    schema = {}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (nested(70), "nested more than 64 deep"),
        (nested(100_000), "nested more than 64 deep"),
        (holding_itself(), "nested more than 64 deep"),
        ({"enum": ["x" * 200_000]}, "200,0.. characters as JSON: 131,072 are the limit"),
        ({"anyOf": [{}] * 5000}, "more than 2,000 subschemas"),
        ({"minimum": NAN}, "cannot be written as JSON"),
        ({"const": b"x"}, "cannot be written as JSON"),
    ],
)
def test_a_hostile_schema_is_an_error_of_the_request(schema, message):
    with pytest.raises(RequestError, match=message):
        SamplingParams(response_format={"type": "json_schema", "json_schema": {"schema": schema}})


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (0.0, True), (1e-5, True), (1e-4, False)])
def test_temperature_zero_or_next_to_it_is_greedy(temperature, greedy):
    params = SamplingParams(temperature=temperature)
    assert params.greedy == greedy
    assert (params.temperature == 0) == greedy


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_each_penalty_makes_the_logits_depend_on_the_tokens_so_far(name):
    assert SamplingParams(**{name: 1.5}).penalizes


def test_from_mapping_takes_every_field_and_names_an_unknown_one_with_the_allowed():
    assert SamplingParams.from_mapping({"top_k": 3, "stop": ["x"]}) == SamplingParams(top_k=3, stop=("x",))
    with pytest.raises(
        RequestError, match=r"unknown sampling parameter 'topk': use temperature, top_k, .*eos"
    ):
        SamplingParams.from_mapping({"topk": 3})


@pytest.mark.parametrize("params", [{"logit_bias": {10: 1}}, {"stop_token_ids": (3, 10)}])
def test_ids_outside_of_the_vocabulary_are_an_error_once_it_is_known(params):
    sampling = SamplingParams(**params)
    sampling.check_vocabulary(11)
    with pytest.raises(
        RequestError, match=f"{next(iter(params))} names token 10: this model has tokens 0 to 9"
    ):
        sampling.check_vocabulary(10)


# ---- random bits -------------------------------------------------------------------------------------------


def pcg(v: int) -> int:
    """pcg_hash as it is printed in the paper, on integers cut to 32 bits where they are stored."""
    state = v * 747796405 + 2891336453 & 0xFFFFFFFF
    word = ((state >> ((state >> 28) + 4)) ^ state) * 277803737 & 0xFFFFFFFF
    return (word >> 22) ^ word


def test_the_hash_is_pcg_twice():
    assert pcg(0) == 129708002  # the value that the published shader gives
    assert hash_u32(0, 0) == pcg(pcg(0))
    assert hash_u32(5, 1) == pcg(pcg(5 ^ 0x9E3779B9))
    assert hash_u32(2**32 - 1, 2**20) == pcg(pcg(0xFFFFFFFF ^ (2**20 * 0x9E3779B9 & 0xFFFFFFFF)))


@pytest.mark.parametrize("inputs", [[(7, i) for i in range(20_000)], [(i, 7) for i in range(20_000)]])
def test_the_hash_is_uniform_over_positions_and_over_seeds(inputs):
    bits = [hash_u32(*pair) for pair in inputs]
    for shift in (0, 8, 16, 24):
        counts = Counter(b >> shift & 0xFF for b in bits)
        assert_like_expected([counts[i] for i in range(256)], [len(bits) / 256] * 256)


# ---- filters against sorting -------------------------------------------------------------------------------


def sorted_masses(logits, params):
    """The filters as one would state them: sort, cut, and take in what ties with the last one kept."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    shares = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    whole = sum(shares)
    masses = [math.floor(share / whole * 2**30) for share in shares]
    kept = [i for i in order if shares[i] >= params.min_p]
    if params.top_k:
        kept = with_ties(logits, kept, params.top_k)
    if params.top_p < 1:
        total = sum(masses[i] for i in kept)
        n = next(
            n for n in range(1, len(kept) + 1) if sum(masses[i] for i in kept[:n]) >= params.top_p * total
        )
        kept = with_ties(logits, kept, n)
    return [masses[i] if i in kept else 0 for i in range(len(logits))]


def with_ties(logits, order, n):
    return order[:n] + [i for i in order[n:] if logits[i] == logits[order[n - 1]]]


@given(LOGITS, FILTERS)
@settings(max_examples=500, deadline=None)
@example([1.0, 1.0, 1.0], SamplingParams(top_k=1))
@example([1.0, 1.0, 0.0], SamplingParams(top_p=0.01))
@example([3.0, 1.0, 1.0], SamplingParams(top_k=2, top_p=0.95, min_p=0.01))
def test_the_filters_together_keep_what_sorting_keeps(logits, params):
    assert token_masses(logits, params) == sorted_masses(logits, params)


def kept_ids(logits, **params):
    return {i for i, mass in enumerate(token_masses(logits, SamplingParams(**params))) if mass}


def test_top_k_keeps_the_k_likeliest_and_ties_with_the_last():
    logits = [0.0, 3.0, 1.0, 2.0, 1.0]
    assert kept_ids(logits, top_k=2) == {1, 3}
    assert kept_ids(logits, top_k=3) == {1, 2, 3, 4}
    assert kept_ids(logits, top_k=99) == kept_ids(logits, top_k=0) == {0, 1, 2, 3, 4}


def test_min_p_keeps_what_is_at_least_that_share_of_the_likeliest():
    logits = [math.log(x) for x in (8.0, 4.0, 2.0, 1.0)]
    assert kept_ids(logits, min_p=0.24) == {0, 1, 2}
    assert kept_ids(logits, min_p=0.26) == {0, 1}
    assert kept_ids(logits, min_p=1) == {0}
    assert kept_ids(logits, min_p=0.26, temperature=2) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_likeliest_that_reach_it_among_what_the_others_left():
    logits = [math.log(x) for x in (0.5, 0.25, 0.15, 0.1)]
    assert kept_ids(logits, top_p=0.49) == {0}
    assert kept_ids(logits, top_p=0.51) == {0, 1}
    assert kept_ids(logits, top_p=0.76) == {0, 1, 2}
    assert kept_ids(logits, top_p=0.66, top_k=2) == {0}  # 0.5 of the 0.75 left
    assert kept_ids(logits, top_p=0.68, top_k=2) == {0, 1}


def test_reaching_top_p_exactly_is_enough_and_half_a_unit_of_mass_more_is_not():
    logits = [1.0, 0.0, -1.0]
    masses = token_masses(logits, SamplingParams())
    total = sum(masses)
    assert masses[0] / total * total == masses[0]
    assert kept_ids(logits, top_p=masses[0] / total) == {0}
    assert kept_ids(logits, top_p=(masses[0] + 0.5) / total) == {0, 1}


@given(LOGITS, FILTERS)
def test_the_likeliest_token_survives_every_filter_and_masses_fit_a_u32(logits, params):
    masses = token_masses(logits, params)
    assert masses[logits.index(max(logits))] > 0
    assert sum(masses) <= 1 << 30


def test_logits_far_apart_neither_overflow_nor_divide_by_zero():
    params = SamplingParams(temperature=1e-4)
    assert token_masses([1e30, -1e30, -INF], params) == [1 << 30, 0, 0]
    assert (
        sample_reference([1e30, -1e30, -INF], params, prompt_ids=[], output_ids=[], seed=1, position=1) == 0
    )


# ---- penalties ---------------------------------------------------------------------------------------------


def test_repetition_looks_at_prompt_and_output_once_and_pushes_down_on_both_sides_of_zero():
    params = SamplingParams(repetition_penalty=2.0)
    assert adjust_logits([4.0, -4.0, 4.0, 0.0], params, [0, 0, 1], [1, 3]) == [2.0, -8.0, 4.0, 0.0]


def test_presence_and_frequency_look_at_the_output_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert adjust_logits([1.0, 1.0, 1.0], params, [0, 0], [1, 1, 1, 2]) == [1.0, -0.25, 0.25]


def test_logit_bias_is_added_before_the_penalties():
    params = SamplingParams(logit_bias={0: 3, 1: -100}, repetition_penalty=2.0)
    assert adjust_logits([-1.0, 5.0], params, [0], []) == [1.0, -95.0]


@given(
    LOGITS,
    st.lists(st.integers(0, 29), max_size=8),
    st.lists(st.integers(0, 29), max_size=8),
    st.floats(0.5, 2),
    st.floats(-2, 2),
    st.floats(-2, 2),
)
def test_penalties_are_those_of_the_formula_token_by_token(
    logits, prompt, output, repetition, presence, frequency
):
    prompt, output = [i % len(logits) for i in prompt], [i % len(logits) for i in output]
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    given_logits = list(logits)
    adjusted = adjust_logits(logits, params, prompt, output)
    assert logits == given_logits
    for i, x in enumerate(logits):
        if i in prompt + output:
            x = x / repetition if x > 0 else x * repetition
        x -= frequency * output.count(i) + presence * (i in output)
        assert adjusted[i] == pytest.approx(x, abs=1e-12)


# ---- masks -------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.data())
def test_a_row_of_the_mask_has_a_bit_for_every_token_that_may_be_drawn(n_vocab, data):
    ids = st.sets(st.integers(0, n_vocab - 1))
    allowed, banned = data.draw(st.one_of(st.none(), ids)), data.draw(ids)
    words = mask_words(n_vocab, allowed=allowed, banned=banned)
    assert len(words) == 4 * -(-n_vocab // 32)
    bits = int.from_bytes(words, "little")
    may = set(range(n_vocab)) if allowed is None else allowed
    assert {i for i in range(8 * len(words)) if bits >> i & 1} == may - banned


@pytest.mark.parametrize("temperature", [0, 1])
def test_only_allowed_tokens_are_drawn_and_a_mask_without_any_is_an_error(temperature):
    params, logits = SamplingParams(temperature=temperature, top_k=2), [5.0, 4.0, 3.0, 3.0, 1.0]
    drawn = {sample(logits, params, position=i, allowed={2, 3, 4}) for i in range(50)}
    assert drawn == ({2, 3} if temperature else {2})
    with pytest.raises(ValueError, match="have no finite maximum"):
        sample(logits, params, allowed=())


# ---- the draw ----------------------------------------------------------------------------------------------


def sample(logits, params, *, seed=0, position=0, prompt_ids=(), output_ids=(), allowed=None):
    return sample_reference(
        logits, params, prompt_ids=prompt_ids, output_ids=output_ids, seed=seed, position=position,
        allowed=allowed,
    )  # fmt: skip


def test_greedy_takes_the_largest_logit_and_of_ties_the_lowest_id():
    greedy = SamplingParams(temperature=0, top_k=1, top_p=0.1, min_p=1)
    assert sample([1.0, 3.0, 2.0, 3.0], greedy) == 1
    assert {sample([2.0, 2.0, 2.0], greedy, seed=seed) for seed in range(20)} == {0}
    assert sample([1.0, 3.0], SamplingParams(temperature=0, logit_bias={1: -100})) == 0


@given(LOGITS, st.integers(0, 2**32 - 1), st.integers(0, 2**20))
def test_keeping_one_token_is_greedy_where_nothing_ties(logits, seed, position):
    logits = list(dict.fromkeys(logits))
    assert sample(logits, SamplingParams(top_k=1), seed=seed, position=position) == sample(
        logits, SamplingParams(temperature=0)
    )


@given(st.lists(st.integers(0, 2**26), min_size=1, max_size=16).filter(any), st.integers(0, 2**32 - 1))
@example([0, 5, 0], 0)
@example([0, 5, 0], 2**32 - 1)
@example([2**30], 2**32 - 1)
def test_the_draw_is_a_point_on_the_line_of_masses_in_the_order_of_ids(masses, bits):
    point = sum(masses) * bits // 2**32
    token = draw(masses, bits)
    assert sum(masses[:token]) <= point < sum(masses[: token + 1])


def test_every_token_gets_its_exact_share_of_the_random_bits():
    masses = [1, 0, 3, 4]
    assert Counter(draw(masses, i << 24) for i in range(256)) == {0: 32, 2: 96, 3: 128}


def test_a_draw_from_nothing_is_an_error():
    with pytest.raises(ValueError, match="all masses are zero"):
        draw([0, 0], 5)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[0.0, NAN], [NAN, 0.0], [-INF, -INF], [INF, 0.0]])
def test_logits_that_no_working_model_gives_are_an_error(logits, temperature):
    with pytest.raises(ValueError, match="position 9 hold NaN or have no finite maximum"):
        sample(logits, SamplingParams(temperature=temperature), position=9)


def test_a_draw_depends_on_seed_and_position_alone():
    logits = [0.0] * 1000
    draws = [sample(logits, SamplingParams(), seed=3, position=i) for i in range(100)]
    assert draws == [sample(logits, SamplingParams(), seed=3, position=i) for i in range(100)]
    assert len(set(draws)) > 80
    assert draws != [sample(logits, SamplingParams(), seed=4, position=i) for i in range(100)]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.8},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
        {"logit_bias": {0: -100, 11: 2.5}},
    ],
    ids=lambda params: "-".join(params) or "plain",
)
def test_20_000_draws_follow_the_filtered_distribution(params):
    logits = [2.0, 1.5, 1.5, 1.0, 0.5, 0.25, 0.0, -0.5, -0.5, -1.0, -2.0, -1.5]
    sampling = SamplingParams(**params)
    context = {"prompt_ids": [1, 3], "output_ids": [0, 0, 4]}
    n = 20_000
    counts = Counter(sample(logits, sampling, seed=11, position=i, **context) for i in range(n))

    adjusted = adjust_logits(logits, sampling, *context.values())
    weights = sorted_masses(adjusted, sampling)
    expected = [n * weight / sum(weights) for weight in weights]
    expected = [e if e > 1e-6 else 0 for e in expected]
    assert_like_expected([counts[i] for i in range(len(logits))], expected)
