"""Shows what a model attends to, layer by layer, on the patches of one request: for pictures, never for a reduction.

The unreduced model answers with one token while a probe records its attention. In the tower that is the attention
received; in the language model it is the last prompt token's attention to each visual token, mapped back to the patches
that the token is made of.

Shape suffixes: T packed tokens, K visual tokens of a request, P patches of a request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from illava.engine.engine import Engine
from illava.requests import Request, SamplingParams, TokenTrace

if TYPE_CHECKING:
    from illava.vlm import VLM


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """The attention of one layer, on the patches.

    Attributes:
        stage: ``vision_block`` or ``decoder_layer``.
        layer: 0-based. Windowed blocks of a tower, and the decoder's last layer, cannot be shown.
        value_P: float32, in the order of the trace's patches: attention received, mean over heads and queries of the
            patch's tile or frame; or the last prompt token's attention to the token that holds most of the patch.
    """

    stage: str
    layer: int
    value_P: Tensor


def attention_maps(vlm: VLM, request: Request) -> tuple[TokenTrace, list[AttentionMap]]:
    """Run a request through the unreduced model; returns its trace, and its attention layer by layer.

    Args:
        vlm: without requests of its own in flight.
        request: with at least one visual input; its sampling is not used.

    Raises:
        ILLaVAError: the model cannot answer the request.
        RuntimeError: requests given to ``vlm.submit`` are still running.
    """
    if vlm.has_work:
        raise RuntimeError("submitted requests are still running: step() until has_work is false")
    seen: list[tuple[str, int, Tensor]] = []
    one = replace(request, sampling=SamplingParams(max_new_tokens=1), trace=True)

    def probe(stage: str, layer: int, score_T: Tensor, /) -> None:
        seen.append((stage, layer, score_T.float().cpu()))

    (done,) = Engine(vlm.family, vlm.engine.cache, vlm.engine.config, probe=probe).generate([one])
    if done.error is not None:
        raise done.error
    if done.trace is None:
        raise RuntimeError(f"request {request.request_id!r} was answered without the trace it asked for")
    trace, found = done.trace, []
    of_token_KP = trace.matrix()
    visual_P = trace.patch_coords[:, 0]
    given_order_P = torch.argsort(visual_P, stable=True)  # the trace follows the template
    for stage, layer, score_T in seen:
        value_P = torch.empty(visual_P.shape[0])
        if stage == "vision_block":
            value_P[given_order_P] = score_T
        else:
            value_P = _to_patches(of_token_KP, score_T)
        found.append(AttentionMap(stage, layer, value_P))
    return trace, found


def _to_patches(of_token_KP: Tensor, score_K: Tensor) -> Tensor:
    """The score of the token in which each patch weighs most; 0 for a patch that is in no token."""
    (token_E, patch_E), weight_E = of_token_KP.indices(), of_token_KP.values()
    order_E = torch.argsort(weight_E, stable=True)  # of equal columns the last write stays: the heaviest
    value = torch.zeros(of_token_KP.shape[1])
    for token, patch in zip(token_E[order_E].tolist(), patch_E[order_E].tolist(), strict=True):
        value[patch] = score_K[token]
    return value
