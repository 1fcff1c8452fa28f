"""ToMe: merge the most similar pairs between two halves of the tokens (bipartite soft matching)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.errors import PlanError
from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class ToMe(Budget, Reducer):
    """Merge the r best edges from A, the tokens at even indices, into B, the tokens at odd indices.

    The metric is the mean over heads of the keys. Each a has one edge, to the b of largest cosine similarity; the r
    edges of largest similarity merge: b becomes the size-weighted mean of itself and every a that points at it. Kept
    tokens keep their order, a mixture has the coordinates of b. At most |A| = ceil(n / 2) tokens can go in one step.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; here a ``keep_ratio`` is at least 0.5.
        proportional_attention: every block of the tower behind this one adds the log of a token's size to the scores of
            its key, so that a merged token weighs as much as the patches it is made of (eq. 1 of the paper); all exact
            scores measured there follow. In ``vision_block`` only.

    Source: arXiv 2210.09461; facebookresearch/ToMe, ``tome/merge.py``. Written from the formula. Deviations: order is
    restored (the release appends B behind A); all of A may merge where n is odd; a larger cut is refused instead of
    silently capped; segments carry no CLS token, so none is protected; proportional attention is an option.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_layer"})

    kind: Literal["tome"] = "tome"
    keep_ratio: float | None = Field(default=None, ge=0.5, lt=1.0)
    proportional_attention: bool = False

    @property
    def biases_attention(self) -> bool:
        return self.proportional_attention

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"keys", "sizes"})

    def num_kept(self, num_tokens: int) -> int:
        """n - r.

        Raises:
            PlanError: r is more than half of n.
        """
        kept = super().num_kept(num_tokens)
        if num_tokens - kept > (num_tokens + 1) // 2:
            raise PlanError(
                f"tome can merge at most half of {num_tokens} tokens in one step, not {num_tokens - kept}: "
                "spread the cut over more layers"
            )
        return kept

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.tokens import cluster, identity

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        if kept == tokens.lengths:
            return identity(kept, tokens.hidden_TD.device)
        into_T = _match(evidence.measured("keys"), tokens.lengths, kept)
        return cluster(into_T, evidence.sizes(tokens), tokens.lengths, kept)


def _match(keys_THd: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """The token that each token joins, int64 [T]: its b for the merged ones of A, itself for all others."""
    import torch

    from illava.reducers.ops.selection import rank_highest
    from illava.reducers.ops.similarity import inside, nearest, unit_keys
    from illava.tokens import offsets, pad, unpad

    device, width = keys_THd.device, max(lengths)
    metric_SND = pad(unit_keys(keys_THd), lengths, 0.0)
    inside_SN = inside(lengths, width, device)
    bias_SB = torch.zeros(inside_SN[:, 1::2].shape, device=device).masked_fill_(~inside_SN[:, 1::2], float("-inf"))
    best_SA, index_SA = nearest(metric_SND[:, 0::2], metric_SND[:, 1::2], bias_SB)
    best_SA = best_SA.masked_fill(~inside_SN[:, 0::2], float("-inf"))

    num_a = best_SA.shape[1]
    rank_SA = rank_highest(best_SA.flatten(), (num_a,) * len(lengths))
    coord_SA = torch.arange(num_a, device=device).expand_as(rank_SA)
    removed_S1 = constant_on([n - k for n, k in zip(lengths, kept, strict=True)], device)[:, None]
    into_SN = torch.arange(width, device=device).repeat(len(lengths), 1)
    into_SN[:, 0::2] = torch.where(rank_SA < removed_S1, 2 * index_SA + 1, 2 * coord_SA)
    return unpad(into_SN + offsets(lengths, device)[:, None], lengths)
