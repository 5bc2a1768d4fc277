"""Pearson's test, for counts of what was drawn."""

import math
from collections.abc import Sequence


def assert_like_expected(counts: Sequence[float], expected: Sequence[float]) -> None:
    """Chi-square at about one in a million; what is expected is never below 5 but where it is 0."""
    assert all(count == 0 for count, e in zip(counts, expected, strict=True) if e == 0)
    terms = [(count - e) ** 2 / e for count, e in zip(counts, expected, strict=True) if e]
    n = len(terms) - 1
    if n:
        # Wilson-Hilferty: the cube root of chi-square over n is near normal; 4.75 sigma
        assert sum(terms) < n * (1 - 2 / (9 * n) + 4.75 * math.sqrt(2 / (9 * n))) ** 3
