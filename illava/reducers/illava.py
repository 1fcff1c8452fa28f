"""iLLaVA: merge the least attended tokens into one weighted mean.

Source: arXiv 2412.06263v1, section 3; hulianyuyy/iLLaVA@4068149 (read for the settings, written from the formula).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.host_copies import constant_on
from illava.reducers.base import AttentionScore, Evidence, EvidenceKind, Reducer, Stage, score_evidence
from illava.reducers.budget import Budget
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class ILLaVA(ProportionalAttention, Budget, Reducer):
    """Merge the r + 1 least attended tokens of a scope into one; r fewer tokens remain.

    With t_0 .. t_r the tokens of lowest score, ascending, the new token is sum_m w_m x[t_m] with
    w_m = (r + 1 - m) / ((r + 1)(r + 2) / 2), with the coordinates of t_r; all others keep value and order.

    Attributes:
        score: what ranks tokens at decoder stages. ``paper``: attention received from the scope's own tokens.
            ``causal_normalised``: the same divided by what flat causal attention would give. ``released``: the last
            prompt token's attention. In the vision tower, and at decoder_input (which has seen no decoder layer, so
            the tower's last attention is used), all three are the attention received.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.
        proportional_attention: see `ProportionalAttention`.

    Deviation from the release: batches of any size and dtype; the new token is summed in float32.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["illava"] = "illava"
    score: AttentionScore = "paper"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({score_evidence(self.score, stage)})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        score_T = evidence.measured(score_evidence(self.score, stage))
        return merge_least(score_T, tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths))


def merge_least(score_T: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Assignment:
    """Merge each segment's lowest-scored tokens into one so that ``kept[s]`` remain.

    Vectorised over segments of any lengths; counts are host integers, so nothing waits for the device. Ties go to
    the earlier token (stable sort).

    Args:
        score_T: float, higher = keep.
        lengths: tokens per segment.
        kept: tokens to keep per segment, ``1 <= kept[s] <= lengths[s]`` (0 only for an empty segment).
    """
    import torch

    from illava.tokens import Assignment, offsets, pad, ragged_index

    device, num_segments, width = score_T.device, len(lengths), max(lengths, default=0)
    removed = tuple(n - k for n, k in zip(lengths, kept, strict=True))
    sizes = tuple(r + 1 if r else 0 for r in removed)  # a segment that loses nothing mixes nothing
    start_S1 = offsets(lengths, device)[:, None]
    removed_S1 = constant_on(removed, device, torch.long)[:, None]

    order_SN = torch.argsort(pad(score_T.float(), lengths, float("inf")), dim=1, stable=True)
    rank_SN = torch.empty_like(order_SN).scatter_(1, order_SN, torch.arange(width, device=device).expand_as(order_SN))
    kept_SN = torch.argsort((rank_SN < removed_S1).byte(), dim=1, stable=True)  # kept first, in order
    kept_K = (kept_SN + start_S1).flatten()[ragged_index(kept, width, device)]
    source_E = (order_SN + start_S1).flatten()[ragged_index(sizes, width, device)]

    # w_m = (r + 1 - m) / ((r + 1)(r + 2) / 2): the least attended weighs most
    weight_SN = (removed_S1 + 1 - torch.arange(width, device=device)).float()
    weight_SN = weight_SN / ((removed_S1 + 1) * (removed_S1 + 2) / 2)
    weight_E = weight_SN.flatten()[ragged_index(sizes, width, device)]

    merging = [s for s in range(num_segments) if removed[s]]
    merging_G = constant_on(merging, device, torch.long)
    coord_G = order_SN[merging_G].gather(1, removed_S1[merging_G]).squeeze(1)  # t_r
    before_G = (rank_SN < removed_S1)[merging_G].long().cumsum(1).gather(1, coord_G[:, None]).squeeze(1)
    target_G = coord_G - before_G + offsets(kept, device)[merging_G]
    size_G = constant_on([sizes[s] for s in merging], device, torch.long)
    uniform = len({sizes[s] for s in merging}) == 1
    group_size = sizes[merging[0]] if uniform else None
    return Assignment(sum(lengths), kept, kept_K, source_E, weight_E, target_G, size_G, group_size, keeps_content=True)
