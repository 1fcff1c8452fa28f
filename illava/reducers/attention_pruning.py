"""Attention pruning, the ablation of the paper's Table 4: iLLaVA's score without the merged token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.reducers.base import AttentionScore, Evidence, EvidenceKind, Reducer, Stage, score_evidence
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class AttentionPruning(Budget, Reducer):
    """Drop the r tokens of lowest score, S_j = (1 / HN) sum_h sum_i A_h[i, j]; no new token.

    Attributes:
        score: what ranks tokens before a decoder layer, as in `ILLaVA`; elsewhere the attention received.
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; ``num_merged`` counts the dropped tokens.

    Source: arXiv 2412.06263v1, section 4.3 ("attention pruning" of Table 4), written from the formula.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["attention_pruning"] = "attention_pruning"
    score: AttentionScore = "paper"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({score_evidence(self.score, stage)})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest

        score_T = evidence.measured(score_evidence(self.score, stage))
        return prune_lowest(score_T, tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths))
