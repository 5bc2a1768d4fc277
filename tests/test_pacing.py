"""The depth that is found for devices of any speed."""

import pytest

from realm_web.pacing import Pacing


def settled(step: float, latency: float, host: float = 0.0, maximum: int = 16) -> Pacing:
    pacing, now = Pacing(maximum), 0.0
    for _ in range(400):
        now += max(step, host, latency / pacing.depth)
        pacing.arrive(now)
    return pacing


@pytest.mark.parametrize(
    ("step", "latency", "host", "depth"),
    [
        (1.0, 0.1, 0.0, 2),  # results come at once: two overlap the host's work
        (1.0, 4.2, 0.0, 8),
        (1.0, 100.0, 0.0, 16),  # a browser that polls every 100 ms
        (1.0, 4.2, 3.0, 2),  # the host is the limit: more in flight would only be wasted
    ],
)
def test_as_many_steps_as_pay(step, latency, host, depth):
    assert settled(step, latency, host).depth == depth


def test_a_device_that_cannot_overlap_stays_at_one():
    assert settled(1.0, 9.0, maximum=1).depth == 1


def test_pauses_between_answers_are_no_measurements():
    pacing, now = Pacing(16), 0.0
    for answer in range(60):
        now += 1000.0
        pacing.pause()
        for _ in range(20):
            now += max(1.0, 4.2 / pacing.depth)
            pacing.arrive(now)
        assert pacing.depth <= 8, answer
    assert pacing.depth >= 4
