"""SCOPE: keep salient tokens that together cover the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class SCOPE(Budget, Reducer):
    """Pick greedily by saliency x coverage gain: a pick maximises a_j^alpha sum_i max(0, cos(x_i, x_j) - c_i).

    c_i is the largest cosine of token i with a pick so far, 0 before the first. Ties go to the earlier token.

    The formula needs all pairs: an n x n map of cosines, read once a pick.

    Attributes:
        saliency: a_j: ``attention_received``, or ``cls_attention`` for towers with a CLS token (the paper's choice).
        alpha: exponent of the saliency.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; ``num_merged`` counts the dropped tokens.

    Source: arXiv 2510.24214; kinredon/SCOPE@a01b98f:scope/clip_encoder.py (``SCOPE``, COMBINED = multi). Written from
    the formula. Deviation: picks are put back into their original order.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input"})

    kind: Literal["scope"] = "scope"
    saliency: Literal["attention_received", "cls_attention"] = "attention_received"
    alpha: float = Field(default=1.0, ge=0.0)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({self.saliency})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest
        from illava.reducers.ops.similarity import unit
        from illava.tokens import pad, unpad

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        unit_SND = pad(unit(tokens.hidden_TD), tokens.lengths, 0.0)
        weight_SN = pad(evidence.measured(self.saliency).float() ** self.alpha, tokens.lengths, 0.0)
        picked_SN = _pick_covering(unit_SND, weight_SN, tokens.lengths, kept)
        return prune_lowest(unpad(picked_SN.float(), tokens.lengths), tokens.lengths, kept)


def _pick_covering(unit_SND: Tensor, weight_SN: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """bool [S, N]: the picks. Padding is a zero vector: nothing covers it and it covers nothing."""
    import torch

    from illava.reducers.ops.similarity import inside

    inside_SN = inside(lengths, unit_SND.shape[1], unit_SND.device)
    picked_SN = torch.zeros_like(inside_SN)
    kept_S1 = constant_on(kept, unit_SND.device)[:, None]
    cosine_SNN = torch.bmm(unit_SND, unit_SND.transpose(1, 2))
    covered_SN = unit_SND.new_zeros(inside_SN.shape)
    for step in range(max(kept, default=0)):
        gain_SN = (cosine_SNN - covered_SN[:, None]).relu_().sum(2)  # symmetric: row j holds candidate j
        gain_SN = (gain_SN * weight_SN).masked_fill(picked_SN | ~inside_SN, float("-inf"))
        pick_S1 = gain_SN.argmax(1, keepdim=True)
        picked_SN.scatter_(1, pick_S1, picked_SN.gather(1, pick_S1) | (step < kept_S1))
        row_SN = cosine_SNN.gather(1, pick_S1[:, :, None].expand(-1, -1, cosine_SNN.shape[2])).squeeze(1)
        covered_SN = torch.maximum(covered_SN, row_SN)
    return picked_SN
