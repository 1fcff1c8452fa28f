"""EVS: drop tokens that look like those of the previous frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_BITS = 20  # rows and columns stay below a million


class EVS(Reducer):
    """Keep the tokens of largest dissimilarity: 1 - cosine with the token at the same (row, col) one frame before.

    A token without a predecessor (first frame, separators) counts as entirely new. Where an earlier reduction left
    no token in the frame before, the last earlier frame that has one at this (row, col) is compared. For videos: the
    tiles of one image are no sequence. A segment is one visual input; frames are read from the tokens' coordinates.

    Attributes:
        keep_ratio: keep the round(n * keep_ratio) most dissimilar tokens of an input; of equals the earlier one.
        threshold: or drop every token whose cosine with its predecessor is at least this. Counts then depend on the
            data and cost one host synchronisation.

    Source: arXiv 2510.14624; vllm-project/vllm@094f117:vllm/multimodal/evs.py (``compute_retention_mask``). Written
    from the formula. Deviation: the count is the budget even where it is less than the first frame's tokens.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"decoder_input"})

    kind: Literal["evs"] = "evs"
    per: Literal["medium"] = "medium"
    keep_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    threshold: float | None = Field(default=None, ge=-1.0, le=1.0)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.keep_ratio is None) == (self.threshold is None):
            raise ValueError("give exactly one of keep_ratio, threshold")
        return self

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def num_kept(self, num_tokens: int) -> int | None:
        """The budget, or None where the threshold decides."""
        if self.keep_ratio is None:
            return None
        return max(round(num_tokens * self.keep_ratio), min(num_tokens, 1))

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest
        from illava.tokens import pad, prune

        novelty_T = _novelty(tokens)
        if self.threshold is None:
            kept = tuple(self.num_kept(n) or 0 for n in tokens.lengths)
            return prune_lowest(novelty_T, tokens.lengths, kept)
        new_T = novelty_T > 1 - self.threshold
        kept = tuple(pad(new_T.long(), tokens.lengths, 0).sum(1).tolist())
        return prune(new_T.nonzero().squeeze(1), kept, sum(tokens.lengths))


def _novelty(tokens: Tokens) -> Tensor:
    """1 - cosine with the predecessor at the same (row, col), float32 [T]; infinite without one."""
    import torch

    from illava.reducers.ops.similarity import unit, without_rounding

    device, total = tokens.hidden_TD.device, sum(tokens.lengths)
    segment_T = torch.arange(len(tokens.lengths), device=device).repeat_interleave(
        constant_on(tokens.lengths, device), output_size=total
    )
    frame_T, row_T, col_T = tokens.coord_T3.unbind(1)
    coord_T = (((segment_T << _BITS) | row_T.clamp(min=0)) << _BITS) | col_T.clamp(min=0)
    coord_T = torch.where(row_T < 0, -1 - torch.arange(total, device=device), coord_T)
    order_T = torch.argsort(frame_T, stable=True)
    order_T = order_T[torch.argsort(coord_T[order_T], stable=True)]  # by (row, col), then by frame
    unit_TD = unit(tokens.hidden_TD[order_T])
    novelty_T = torch.full((total,), float("inf"), device=device)
    same_T = coord_T[order_T[1:]] == coord_T[order_T[:-1]]
    cosine_T = without_rounding((unit_TD[1:] * unit_TD[:-1]).sum(1))
    return novelty_T.index_copy_(0, order_T[1:], torch.where(same_T, 1 - cosine_T, float("inf")))
