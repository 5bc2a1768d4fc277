"""Turning a stream of tokens into a stream of text: whole UTF-8 characters, and nothing of a stop string."""

import codecs
from collections.abc import Callable, Sequence

from realm_web.errors import RequestError


class StreamDecoder:
    """Text of one sequence, token by token. A character split over tokens comes out when it is complete.

    The pieces add up to what decoding all the bytes at once gives; malformed UTF-8 becomes U+FFFD.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left of an incomplete character. The decoder may then be used for another sequence."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class StopMatcher:
    """Passes text on up to the first stop string, however the text is cut into pieces.

    The first stop is the one that begins first in the whole text. Text that may still turn out to be the
    beginning of a stop is held back, so nothing of a stop leaks. Linear in the text (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise RequestError(f"stop: a list of strings is wanted, not the string {stops!r}")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop: {stop!r} is not a string of at least one character")
        self._stops = [_Automaton(stop) for stop in dict.fromkeys(stops)]
        self._held = ""
        self._begin = 0  # where the held text begins in the whole text
        self._found: int | None = None  # where the first complete stop so far begins
        self._hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop was reached; after that there is no more text."""
        if self._hit:
            return "", True
        self._held += text
        for stop in self._stops:
            found = stop.feed(text)
            if found is not None and (self._found is None or found < self._found):
                self._found = found
        # Where a stop may have begun that would come before the one found.
        pending = min((stop.begin for stop in self._stops), default=self._begin + len(self._held))
        self._hit = self._found is not None and self._found <= pending
        return self._release(self._found if self._hit else pending), self._hit

    def finish(self) -> str:
        """The held back text, once no more comes; cut where a stop had been found."""
        if self._hit:
            return ""
        self._hit = self._found is not None
        return self._release(self._begin + len(self._held) if self._found is None else self._found)

    def _release(self, end: int) -> str:
        safe, self._held = self._held[: end - self._begin], self._held[end - self._begin :]
        self._begin = end
        return safe


class _Automaton:
    """Finds one string in text that comes in pieces."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._matched = 0  # the longest suffix of the text so far that begins the string
        self._length = 0  # of the text so far
        self._shorter = [0] * len(stop)  # of a matched prefix, the next shorter one that also matches
        prefix = 0
        for i in range(1, len(stop)):
            while prefix and stop[i] != stop[prefix]:
                prefix = self._shorter[prefix - 1]
            prefix += stop[i] == stop[prefix]
            self._shorter[i] = prefix

    @property
    def begin(self) -> int:
        """Where in the text the string may have begun; the end of the text if it has not."""
        return self._length - self._matched

    def feed(self, text: str) -> int | None:
        """Where in the text the string begins, at its first complete occurrence."""
        found = None
        stop, matched = self._stop, self._matched
        for i, char in enumerate(text):
            while matched and char != stop[matched]:
                matched = self._shorter[matched - 1]
            matched += char == stop[matched]
            if matched == len(stop):
                if found is None:
                    found = self._length + i + 1 - matched
                matched = self._shorter[matched - 1]
        self._matched = matched
        self._length += len(text)
        return found
