"""The answers to one item's requests as one answer. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from illava.requests import Generation, Timing, TokenUsage

if TYPE_CHECKING:
    from illava.requests import FinishReason


def joined(generations: Sequence[Generation]) -> Generation:
    """Texts a blank line apart, counts and seconds summed; an error only where there is no answer at all.

    Args:
        generations: of requests that ran one after the other, the waits between them in their ``queue_s``.
    """
    if len(generations) == 1:
        return generations[0]
    answered = [generation for generation in generations if generation.error is None]
    usages = [generation.usage for generation in generations if generation.usage is not None]
    cut = any(generation.finish_reason == "length" for generation in answered)
    reason: FinishReason = "length" if cut else "stop"
    return Generation(
        request_id=generations[0].request_id,
        text="\n\n".join(generation.text for generation in answered),
        token_ids=tuple(token for generation in answered for token in generation.token_ids),
        finish_reason=reason if answered else None,
        usage=TokenUsage(*(sum(getattr(u, name) for u in usages) for name in _COUNTS)) if usages else None,
        timing=Timing(*(sum(getattr(g.timing, f.name) for g in generations) for f in fields(Timing))),
        error=None if answered else generations[0].error,
    )


_COUNTS = tuple(f.name for f in fields(TokenUsage) if f.name.startswith("num_"))
