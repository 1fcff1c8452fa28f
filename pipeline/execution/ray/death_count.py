"""How many deaths of actors in a row end a job. Knows nothing of actors, Ray or items."""

from __future__ import annotations

from pipeline.errors import ClusterError

_FEWEST = 8  # several items that end their actor may stand one behind another; each is a row after two or three deaths
_FEWEST_WHILE_STARTING = 4  # there no item can be the cause


class DeathCount:
    """Counts deaths of one kind of actor; too many without a success between them end the job.

    Args:
        what: the kind, for the message.
        num_actors: that work at a time.
    """

    def __init__(self, what: str, num_actors: int) -> None:
        self._what, self._num_actors = what, num_actors
        self._in_a_row = self._starting_in_a_row = 0

    def success(self) -> None:
        """One of them finished something."""
        self._in_a_row = self._starting_in_a_row = 0

    def one_more(self, reason: Exception, *, while_starting: bool) -> None:
        """One of them died.

        Raises:
            ClusterError: one too many.
        """
        self._in_a_row += 1
        self._starting_in_a_row += while_starting
        at_work, starting = max(_FEWEST, 3 * self._num_actors), max(_FEWEST_WHILE_STARTING, 2 * self._num_actors)
        if self._in_a_row >= at_work or self._starting_in_a_row >= starting:
            place = " while starting" if self._starting_in_a_row >= starting else ""
            raise ClusterError(
                f"{self._what} died {self._in_a_row} times in a row{place} without finishing anything; the last one "
                f"said: {reason}. Complete shards are published: mend the cause and run the same command again"
            )
