"""Follows one turn about an item's media to its last answer: candidates, a second pass, and tries after a loop.

The worker submits the requests that it is given here, and brings back their answers in any order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from illava.requests import Generation, Message, Request, SamplingParams, derive_seed
from pipeline.config.schema import JobConfig
from pipeline.execution.rows import of_candidates, of_second_pass, of_two_tries
from pipeline.tasks.asking import request_of
from pipeline.tasks.sampling import after_a_loop

if TYPE_CHECKING:
    from illava.preprocess import VisualInput


@dataclass(slots=True)
class _Asked:
    """A request in the model; ``looped`` is its first answer, where that was a loop and the request is tried again."""

    place: int
    request: Request
    looped: Generation | None = None


class Passes:
    """Asks one turn in all the passes that a job wants.

    Args:
        config: the job.
        item_id: names the requests; candidates behind the first one have names of their own.
        content: the item's turn.
        sampling: by which it is answered.
    """

    def __init__(
        self,
        config: JobConfig,
        item_id: str,
        content: tuple[str | VisualInput, ...],
        sampling: SamplingParams,
    ) -> None:
        self._config, self._num_retries = config, 0
        task = config.task
        names = [item_id, *(f"{item_id}\x1fcandidate {n + 1}" for n in range(1, task.candidates or 1))]
        self._asked = {
            name: _Asked(
                place,
                request_of(task, name, content, sampling, reduction_id=item_id, keep_encoding=task.refine is not None),
            )
            for place, name in enumerate(names)
        }
        self._answers: dict[int, Generation] = {}  # of each place, in the order of their ends
        self._draft: Generation | None = None

    @property
    def in_flight(self) -> list[Request]:
        """The requests that were asked and not answered; at first, all that are to be submitted."""
        return [asked.request for asked in self._asked.values()]

    def take(self, generation: Generation) -> list[Request]:
        """Take an answer; returns the requests to be submitted for it. The turn ends when none is in flight."""
        asked = self._asked.pop(generation.request_id)
        if self._tries_again(asked, generation):
            again = replace(asked.request, sampling=after_a_loop(asked.request.sampling))
            self._num_retries += 1
            return self._ask(_Asked(asked.place, again, generation))
        answer = generation if asked.looped is None else of_two_tries(asked.looped, generation)
        if self._config.task.refine is not None and self._draft is None and answer.error is None:
            self._draft = answer
            return self._ask(_Asked(asked.place, self._second(asked.request, answer)))
        self._answers[asked.place] = answer
        return []

    def pop_retries(self) -> int:
        """Return the number of tries after a loop since the last call."""
        retries, self._num_retries = self._num_retries, 0
        return retries

    def result(self) -> tuple[Generation, tuple[str, ...], tuple[str, ...]]:
        """Return the turn's answer with the counts of all passes, the texts of its candidates, and its drafts."""
        drafts = () if self._draft is None else (self._draft.text,)
        if self._config.task.candidates is None:
            [answer] = self._answers.values()
            return (answer if self._draft is None else of_second_pass(self._draft, answer)), (), drafts
        answers = [self._answers[place] for place in sorted(self._answers)]
        failed = next((one for one in answers if one.error is not None), None)
        whole = of_candidates(failed or answers[0], list(self._answers.values()))
        return whole, () if failed else tuple(one.text for one in answers), drafts

    def _ask(self, asked: _Asked) -> list[Request]:
        self._asked[asked.request.request_id] = asked
        return [asked.request]

    def _tries_again(self, asked: _Asked, generation: Generation) -> bool:
        looped = generation.finish_reason == "loop" and self._config.sampling.on_loop == "retry"
        return looped and asked.looped is None

    def _second(self, first: Request, draft: Generation) -> Request:
        """The second pass: the first turn and its answer go before it, and its media are encoded already."""
        refine = self._config.task.refine
        if refine is None:
            raise RuntimeError("a second pass that the job does not ask for")
        history = (*first.history, Message("user", first.content), Message("assistant", (draft.text,)))
        sampling = replace(first.sampling, seed=derive_seed(first.sampling.seed, "refine"))
        return replace(
            first,
            content=(refine.prompt,),
            history=history,
            sampling=sampling,
            keep_encoding=False,
            encoding=draft.encoding,
        )
