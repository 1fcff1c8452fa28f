"""Ward: merge tokens by agglomeration, so that what is merged lies as close together as the budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage, score_evidence
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_GRID = 2**12  # steps of a channel of a unit vector: sums of products of such numbers are exact in float32
_LEAST_SHARE = 1e-6  # of the mean attention; a token that nothing attends to still has a weight
_RESOLUTION = 2**16


class Ward(Budget, Reducer):
    """Join the two groups of tokens whose union adds least to the squared error, until the budget is met.

    Joining a and b adds w_a w_b / (w_a + w_b) |x_a - x_b|^2 to the error of replacing every token by its group's mean.
    At first every token is a group: x_a its hidden state, scaled to length one; w_a its size, how many of the stage's
    first tokens it stands for. A joined group has the sum of the weights and the weighted mean of the x. In the end
    each group becomes the weighted mean of its members' hidden states, with the coordinates of the member nearest to
    that mean.

    The joins of least cost are made a sixteenth of the groups at a time, in rounds of equal factors, three or more;
    a round compares groups with their nearest ones alone. The whole error is within a few per cent of one join a round.
    Ties go to the earlier token. At most 1,024 rows of the n x n map of costs are in memory at a time.

    Attributes:
        alpha: above 0, w_a is scaled by (attention received / its mean)^alpha, so that joins of attended tokens cost
            more; before a decoder layer, by the attention received divided by what flat causal attention would give.
        proportional_attention: as in ToMe: every block of the tower behind a ``vision_block`` step adds the log of a
            token's size to the scores of its key. None: it does. At other stages there are no such blocks.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.

    Source: ours. The criterion is that of Ward 1963 (Journal of the American Statistical Association 58, 236-244);
    attention by log size is ToMe's (arXiv 2210.09461).
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["ward"] = "ward"
    alpha: float = Field(default=0.0, ge=0.0, le=2.0)
    proportional_attention: bool | None = None

    @property
    def biases_attention(self) -> bool:
        return self.proportional_attention is not False

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        sizes: frozenset[EvidenceKind] = frozenset({"sizes"})
        return sizes | {score_evidence("causal_normalised", stage)} if self.alpha else sizes

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.similarity import unit
        from illava.tokens import cluster, identity

        lengths, kept = tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths)
        if kept == lengths:
            return identity(kept, tokens.hidden_TD.device)
        weight_T = evidence.sizes(tokens)
        if self.alpha:
            score_T = evidence.measured(score_evidence("causal_normalised", stage))
            weight_T = weight_T * _relative(score_T, lengths).pow(self.alpha)
        unit_TD = unit(tokens.hidden_TD).mul_(_GRID).round_().div_(_GRID)
        return cluster(_representatives(unit_TD, weight_T, lengths, kept), weight_T, lengths, kept)


def _relative(score_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Scores divided by the mean of their segment, and at least `_LEAST_SHARE`: [T]."""
    from illava.reducers.ops.similarity import inside
    from illava.tokens import pad, unpad

    score_SN = pad(score_T.float(), lengths, 0.0)
    count_S1 = inside(lengths, score_SN.shape[1], score_SN.device).sum(1, keepdim=True)
    share_SN = score_SN * count_S1 / score_SN.sum(1, keepdim=True).clamp(min=1e-30)
    return unpad(share_SN.clamp(min=_LEAST_SHARE), lengths)


def _representatives(unit_TD: Tensor, weight_T: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """The representative that each token joins: the member of its group that is nearest to the group's mean."""
    import torch

    from illava.reducers.ops.agglomeration import agglomerate
    from illava.reducers.ops.similarity import group_mean, nearest_member
    from illava.tokens import pad, unpad

    group_SN = agglomerate(pad(unit_TD, lengths, 0.0), pad(weight_T, lengths, 1.0), lengths, kept)
    row_S1 = max(kept) * torch.arange(len(lengths), device=unit_TD.device)[:, None]
    group_T = unpad(group_SN + row_S1, lengths)
    mean_GD = group_mean(unit_TD, weight_T, group_T, len(lengths) * max(kept))
    distance_T = (unit_TD - mean_GD[group_T]).square().sum(1)
    # Rounded: both of a pair are equally far; the earlier one shall represent it whatever the last bit.
    return nearest_member(group_T, -distance_T.mul(_RESOLUTION).round())
