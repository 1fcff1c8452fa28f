"""Finds answers that repeat themselves: on the host, token by token, without looking at the text.

A loop is a suffix of exactly equal periods. Lines that differ in one token have no such period, so a table, a list or
code is none, however alike its lines are.
"""

from __future__ import annotations

MAX_PERIOD = 64  # tokens
MIN_PERIODS = 4  # where loop_tokens holds fewer of the longest period, the longest period is shorter
MIN_LOOP_TOKENS = 8


class LoopDetector:
    """Watches the tokens of one answer.

    A token costs as many steps as it stood in the last `MAX_PERIOD` tokens, so ordinary text costs next to nothing.

    Args:
        loop_tokens: length of a suffix that is a loop.
    """

    def __init__(self, loop_tokens: int) -> None:
        self._loop_tokens = loop_tokens
        self._max_period = min(MAX_PERIOD, loop_tokens // MIN_PERIODS)
        self._num_tokens = 0
        self._places: dict[int, list[int]] = {}  # of each token, where it stood within the longest period
        self._equal: dict[int, int] = {}  # period -> how many of the last tokens equal the token one period before

    def add(self, token_id: int) -> None:
        """Take the answer's next token."""
        here, self._num_tokens = self._num_tokens, self._num_tokens + 1
        places = [place for place in self._places.get(token_id, ()) if here - place <= self._max_period]
        self._equal = {here - place: self._equal.get(here - place, 0) + 1 for place in places}
        self._places[token_id] = [*places, here]

    @property
    def num_unique(self) -> int | None:
        """The number of tokens up to the end of the first period; None where the answer is no loop."""
        looping = [(period, equal) for period, equal in self._equal.items() if period + equal >= self._loop_tokens]
        if not looping:
            return None
        _, equal = min(looping)
        return self._num_tokens - equal
