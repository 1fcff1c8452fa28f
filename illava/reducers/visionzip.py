"""VisionZip: keep the most attended tokens, and merge the rest into a few contextual ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class VisionZip(ProportionalAttention, Budget, Reducer):
    """Keep k tokens: D dominant and C contextual ones.

    Dominant: the D of highest saliency, unchanged. Of the M others in their order, tokens 0, s, 2 s, ... (C of them,
    s = floor(M / C)) are contextual; every other one joins the contextual token of largest key cosine (keys averaged
    over heads), and each contextual token becomes the mean of its group, itself included.

    No n x n map: others against contextual tokens, a block at a time.

    Attributes:
        saliency: ``attention_received``, or ``cls_attention`` for towers with a CLS token, as in the paper.
        contextual_share: C = max(1, round(k * contextual_share)); the paper keeps 54 + 10 of 64.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.
        proportional_attention: see `ProportionalAttention`.

    Source: arXiv 2412.04467; dvlab-research/VisionZip, read as Fanziyang-v/VisionZip@0247897:visionzip/clip_encoder.py.
    Written from the formula. Deviations: original order is restored (there: dominant, then contextual); the CLS token
    is not among the tokens.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output"})

    kind: Literal["visionzip"] = "visionzip"
    saliency: Literal["attention_received", "cls_attention"] = "attention_received"
    contextual_share: float = Field(default=10 / 64, gt=0.0, le=1.0)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({self.saliency, "keys"})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.tokens import cluster, identity

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        if kept == tokens.lengths:
            return identity(kept, tokens.hidden_TD.device)
        contextual = tuple(min(k, max(1, round(k * self.contextual_share))) for k in kept)
        score_T, keys_THd = evidence.measured(self.saliency), evidence.measured("keys")
        into_T = _contextual(score_T, keys_THd, tokens.lengths, kept, contextual)
        return cluster(into_T, score_T.new_ones(score_T.shape), tokens.lengths, kept)


def _contextual(
    score_T: Tensor, keys_THd: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...], contextual: tuple[int, ...]
) -> Tensor:
    """The token that each one joins, int64 [T]: its contextual token for the others, itself for all kept ones."""
    import torch

    from illava.reducers.ops.selection import rank_highest
    from illava.reducers.ops.similarity import inside, nearest, unit_keys
    from illava.tokens import offsets, pad, unpad

    device, width = score_T.device, max(lengths)
    others = tuple(n - k + c for n, k, c in zip(lengths, kept, contextual, strict=True))
    others_S1, contextual_S1 = (constant_on(n, device)[:, None] for n in (others, contextual))
    dominant_S1 = constant_on([k - c for k, c in zip(kept, contextual, strict=True)], device)[:, None]
    is_dominant_SN = rank_highest(score_T, lengths) < dominant_S1
    other_SN = torch.argsort(is_dominant_SN.byte(), dim=1, stable=True)  # the others first, in order
    coord_SN = torch.arange(width, device=device).expand_as(other_SN)

    step_S1 = (others_S1 // contextual_S1.clamp(min=1)).clamp(min=1)
    which_SC = (torch.arange(max(contextual), device=device) * step_S1).clamp(max=width - 1)
    target_SC = other_SN.gather(1, which_SC)
    key_SND = pad(unit_keys(keys_THd), lengths, 0.0)
    key_SCD = key_SND.gather(1, target_SC[..., None].expand(-1, -1, key_SND.shape[2]))
    bias_SC = torch.zeros(target_SC.shape, device=device)
    bias_SC.masked_fill_(~inside(contextual, max(contextual), device), float("-inf"))
    joined_SN = target_SC.gather(1, nearest(key_SND, key_SCD, bias_SC)[1])

    into_SN = torch.where(is_dominant_SN, coord_SN, joined_SN)
    start_S1 = offsets(lengths, device)[:, None]
    into_T = unpad(into_SN + start_S1, lengths)
    target_T = unpad(target_SC + start_S1, contextual)
    return into_T.index_copy_(0, target_T, target_T)  # a contextual token stays itself, whatever it resembles
