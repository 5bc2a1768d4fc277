"""What one rendering of a stranger's template may take, and what it has taken so far.

Knows no template language: it counts steps, looks at the clock, and weighs values before they are made.
"""

import time
from collections.abc import ItemsView, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from itertools import chain
from typing import Any

from realm_web.errors import RequestError

_OBJECT_BYTES = 32


@dataclass(frozen=True)
class Limits:
    """A template of 40 KB and a prompt of megabytes fit well; a hostile template ends within seconds."""

    source_chars: int = 256 * 1024
    source_tokens: int = 20_000
    depth: int = 100  # of nested expressions, blocks and values: all of them are walked by recursion
    value_bytes: int = 8 << 20  # of one value, or the output; twice the size of the input is added
    memory_bytes: int = 64 << 20  # of all values made; 64 times the size of the input is added
    steps: int = 1_000_000
    seconds: float = 2.0
    call_depth: int = 64
    pieces: int = 1 << 18  # into which one text may be split
    int_bits: int = 256


class Meter:
    """Every method raises RequestError where a limit is passed."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.begin({})

    def begin(self, variables: Mapping[str, Any]) -> None:
        """Starts a rendering with these variables."""
        self.call_depth = 0
        self._steps = 0
        self._made_bytes = 0
        self._deadline = time.monotonic() + self.limits.seconds
        # Weight and height by id, with the value to keep the id taken. A template changes no container.
        self._measured: dict[int, tuple[int, int, object]] = {}
        self._value_bytes = self._memory_bytes = 1 << 62  # the input is the caller's own business
        weight = self.weigh(dict(variables))
        self._value_bytes = self.limits.value_bytes + 2 * weight
        self._memory_bytes = self.limits.memory_bytes + 64 * weight

    def step(self) -> bool:
        """Counts a step. True, so that it fits into any condition."""
        self._steps += 1
        if self._steps > self.limits.steps:
            raise refusal(f"takes more than {self.limits.steps} steps")
        if time.monotonic() > self._deadline:
            raise refusal(f"takes longer than {self.limits.seconds} s")
        return True

    def room(self, n_bytes: int) -> None:
        """Refuses a value of this size, before it is made."""
        if n_bytes > self._value_bytes:
            raise refusal(f"makes a value of more than {self._value_bytes >> 20} MiB")

    def made(self, value: Any) -> Any:
        """Accounts for a new value, and gives it back."""
        if isinstance(value, str):
            size = text_bytes(value)
            self.room(size)
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
            size = 8 * len(value) + 64
        elif isinstance(value, int):
            self.bits(value.bit_length())
            return value
        else:
            return value
        self._made_bytes += size
        if self._made_bytes > self._memory_bytes:
            raise refusal(f"takes more than {self._memory_bytes >> 20} MiB of memory")
        return value

    def bits(self, n_bits: int) -> None:
        """Refuses an integer of this size, before it is made."""
        if n_bits > self.limits.int_bits:
            raise refusal(f"makes a number of more than {self.limits.int_bits} bits")

    def enter_call(self) -> None:
        self.step()
        if self.call_depth >= self.limits.call_depth:
            raise refusal(f"nests calls deeper than {self.limits.call_depth}")
        self.call_depth += 1

    def weigh(self, value: Any) -> int:
        """About the bytes that `value` has when written out, shared parts as often as they occur in it.

        Bounding this and the depth of nesting bounds comparing, hashing and printing the value as well.
        """
        return self._measure(value)[0]

    def _measure(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            return _OBJECT_BYTES + text_bytes(value), 0
        if isinstance(value, int):
            return _OBJECT_BYTES + value.bit_length() // 3, 0
        if not isinstance(value, (list, tuple, dict, KeysView, ValuesView, ItemsView)):
            return _OBJECT_BYTES, 0
        if id(value) in self._measured:
            return self._measured[id(value)][:2]
        weight, height = _OBJECT_BYTES, 0
        for child in chain(value, value.values()) if isinstance(value, dict) else value:
            child_weight, child_height = self._measure(child)
            weight += child_weight
            height = max(height, child_height + 1)
            self.room(weight)
            if height > self.limits.depth:
                raise refusal(f"nests values deeper than {self.limits.depth}")
        self._measured[id(value)] = (weight, height, value)
        return weight, height


def refusal(what: str) -> RequestError:
    """The error for a template that does `what`."""
    return RequestError(f"chat template: {what}")


def text_bytes(text: str) -> int:
    """Upper bound of what the text takes in memory, without looking at it."""
    return len(text) if text.isascii() else 4 * len(text)
