"""DivPrune: keep the tokens that lie farthest apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_ROUNDING = 1e-6  # of a distance in float32; two tokens that are each other's nearest have one distance, computed twice


class DivPrune(Budget, Reducer):
    """Keep hidden states of greedy max-min diversity under the distance 1 - cosine.

    The first pick is the token whose nearest neighbour is farthest; every next pick is the token farthest from its
    nearest pick. Distances that rounding cannot tell apart are a tie, which the earlier token wins.

    No n x n map: the first pick compares a block of tokens at a time, a later one only with the newest pick, which
    costs k products of all tokens with one.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; ``num_merged`` counts the dropped tokens.

    Source: arXiv 2503.02175 (repository vbdi/divprune), written from the formula. Deviation: picks are put back into
    their original order.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["divprune"] = "divprune"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest
        from illava.reducers.ops.similarity import unit
        from illava.tokens import pad, unpad

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        unit_SND = pad(unit(tokens.hidden_TD), tokens.lengths, 0.0)
        picked_SN = _pick_apart(unit_SND, tokens.lengths, kept)
        return prune_lowest(unpad(picked_SN.float(), tokens.lengths), tokens.lengths, kept)


def _pick_apart(unit_SND: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """bool [S, N]: the picks. Short segments stop picking when they have theirs."""
    import torch

    from illava.reducers.ops.similarity import inside, nearest_other

    inside_SN = inside(lengths, unit_SND.shape[1], unit_SND.device)
    picked_SN = torch.zeros_like(inside_SN)
    kept_S1 = constant_on(kept, unit_SND.device)[:, None]
    gap_SN = 1 - nearest_other(unit_SND, inside_SN)  # distance to the nearest other token, later to the nearest pick
    for step in range(max(kept, default=0)):
        gap_SN = gap_SN.masked_fill(picked_SN | ~inside_SN, float("-inf"))
        tied_SN = gap_SN >= gap_SN.amax(1, keepdim=True) - _ROUNDING
        pick_S1 = tied_SN.byte().argmax(1, keepdim=True)
        picked_SN.scatter_(1, pick_S1, picked_SN.gather(1, pick_S1) | (step < kept_S1))
        pick_SD1 = unit_SND.gather(1, pick_S1[:, :, None].expand(-1, -1, unit_SND.shape[2])).transpose(1, 2)
        distance_SN = 1 - torch.bmm(unit_SND, pick_SD1).squeeze(2)
        gap_SN = distance_SN if step == 0 else torch.minimum(gap_SN, distance_SN)
    return picked_SN
