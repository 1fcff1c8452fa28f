"""Upper bounds of seconds on a machine that others use too."""

from __future__ import annotations

from collections.abc import Callable

_TRIES = 3


def holds_in_one_of_three(attempt: Callable[[int], None]) -> None:
    """Call ``attempt`` with 0, 1, 2 until it raises no AssertionError; raise the last.

    A busy machine holds a process for longer than any bound now and then, and so fails one attempt; seconds that are
    accounted wrongly fail all three. Only what takes too long is tried again: assert all else outside.
    """
    for number in range(_TRIES):
        try:
            return attempt(number)
        except AssertionError:
            if number == _TRIES - 1:
                raise
    return None
