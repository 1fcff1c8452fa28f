"""`budget: auto`: one knob, and the plan it stands for, item by item.

`{budget: auto, epsilon: E}` asks for the fewest tokens whose un-merge error stays under E (`reducers.bounded_error`),
of every medium by itself. What an item's pictures are (`media.content`) chooses one of these plans:

- ``document``: half the error, E / 2; the tower runs whole, for glyphs need it.
- ``image``: the error E.
- ``video``: what stands still, to the last bit of a pixel, enters the tower once; then the error E.

Torch-free. Knows no model.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from illava.plan import ReductionPlan
from illava.requests import ContentKind

DOCUMENT_TOLERANCE = 0.5  # of epsilon


@lru_cache(maxsize=64)
def plan_for(content: ContentKind, epsilon: float) -> ReductionPlan:
    """The plan of an item of this kind."""
    tolerance = epsilon * DOCUMENT_TOLERANCE if content == "document" else epsilon
    bound = {"stage": "decoder_input", "reducer": {"kind": "bounded_error", "epsilon": tolerance}}
    steps: list[dict[str, Any]] = [bound]
    if content == "video":
        steps.insert(0, {"stage": "media", "reducer": {"kind": "pixel_dedup"}})
    return ReductionPlan.model_validate({"steps": steps})
