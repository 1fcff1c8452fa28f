"""Decides on the host, token by token, whether an answer ends; and which of its tokens and characters are its text.

An answer ends by a stop token, a stop text, a loop, or its length. Nothing here touches the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from illava.engine.loop_detector import LoopDetector
from illava.requests import FinishReason, SamplingParams

DecodeText = Callable[[Sequence[int]], str]

_TOKENS_PER_CHARACTER = 4  # bytes of UTF-8; a token is one byte at least


class AnswerEnd:
    """Watches one answer.

    Args:
        sampling: as the request asks.
    """

    def __init__(self, sampling: SamplingParams) -> None:
        self._sampling = sampling
        self._loop = None if sampling.loop_tokens is None else LoopDetector(sampling.loop_tokens)
        self._tail = _TOKENS_PER_CHARACTER * (max(map(len, sampling.stop), default=0) + 1)
        self._num_spoken: int | None = None  # tokens that the text is made of; None for all
        self._text: str | None = None  # cut before a stop text

    def reason(
        self, token_ids: Sequence[int], stop_token_ids: frozenset[int], decode_text: DecodeText
    ) -> FinishReason | None:
        """Look at an answer's newest token; returns why it ends the answer, or None."""
        sampling, num_drawn = self._sampling, len(token_ids)
        if self._loop is not None:
            self._loop.add(token_ids[-1])
        if num_drawn < sampling.min_new_tokens:
            return None
        if token_ids[-1] in stop_token_ids:
            self._num_spoken = num_drawn - 1
            return "stop"
        if sampling.stop and self._meets_stop(token_ids, decode_text):
            return "stop"
        ends = num_drawn >= sampling.max_new_tokens
        if (ends or sampling.on_loop != "keep") and self._loops():
            return "loop"
        return "length" if ends else None

    def text(self, token_ids: Sequence[int], decode_text: DecodeText) -> str:
        """Return the text of an answer that ended."""
        if self._text is not None:
            return self._text
        return decode_text(token_ids if self._num_spoken is None else token_ids[: self._num_spoken])

    def _loops(self) -> bool:
        num_unique = None if self._loop is None else self._loop.num_unique
        if num_unique is not None and self._sampling.on_loop == "cut":
            self._num_spoken = num_unique
        return num_unique is not None

    def _meets_stop(self, token_ids: Sequence[int], decode_text: DecodeText) -> bool:
        """Whether a stop text stands in the answer. Most tokens are judged by the text of the last few alone."""
        tail = decode_text(token_ids[-self._tail :])
        if not any(text in tail for text in self._sampling.stop):
            return False
        whole = decode_text(token_ids)
        found = [place for text in self._sampling.stop if (place := whole.find(text)) >= 0]
        if not found:  # the tail began within a character
            return False
        self._text = whole[: min(found)]
        return True
