"""What can be refused of a request before anything is computed for it: its content, and its length.

Counts come from geometry. Knows nothing of towers, caches or scheduling.
"""

from __future__ import annotations

from illava.errors import RequestError
from illava.plan import ReductionPlan
from illava.preprocess import VisualInput
from illava.requests import Request


def check_content(request: Request) -> None:
    """Refuse content that is not text and prepared media.

    Raises:
        RequestError: one string, an item of another type, or nothing to answer.
    """
    name, content = f"request {request.request_id!r}", request.content
    if isinstance(content, str):
        raise RequestError(
            f"{name}: its content is one string; give a tuple of media and text, as in (video, {content!r})"
        )
    for index, part in enumerate(content):
        if not isinstance(part, str | VisualInput):
            raise RequestError(
                f"{name}: item {index} of its content is a {type(part).__name__}; give text, or media from "
                "`load_preprocessor(model_id)`"
            )
    if not any(part.strip() if isinstance(part, str) else True for part in content):
        raise RequestError(f"{name} is empty; give it text, an image or a video")


def check_length(request: Request, plan: ReductionPlan, *, num_vision_tokens: int, max_positions: int) -> None:
    """Refuse media that cannot fit with the answer, whatever the text: no tower runs for them.

    In the geometric layout the media's places are those of the unreduced model. The released layout closes the gaps:
    there, as for what the text adds and for media that stage ``media`` makes smaller, `illava.engine.prompt.assemble`
    decides.

    Args:
        request: what is asked.
        plan: of the request.
        num_vision_tokens: visual tokens of the unreduced model.
        max_positions: of the decoder.

    Raises:
        RequestError: by how much, and what to lower.
    """
    num_new = request.sampling.max_new_tokens
    fixed = plan.layout == "geometric" and plan.at("media") is None
    if fixed and num_vision_tokens + num_new > max_positions:
        raise RequestError(
            f"request {request.request_id!r}: {num_vision_tokens} prompt places of its media and {num_new} new tokens "
            f"exceed the model's {max_positions} positions; send fewer frames or images, or lower max_new_tokens"
        )
