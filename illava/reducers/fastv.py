"""FastV: before decoder layer K, keep the visual tokens that the prompt's last token attends to most."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Scope, Stage
from illava.reducers.budget import Budget

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class FastV(Budget, Reducer):
    """Keep the tokens of highest phi_j = mean_h A_h[last, j], attention of layer K - 1; no merging.

    The paper's setting is ``layers: [2], keep_ratio: 0.5``, ranked over all visual tokens of the prompt.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`; ``num_merged`` counts the dropped tokens.

    Source: arXiv 2403.06764; pkunlp-icler/FastV. Written from the formula. Deviation: kept tokens keep their positions.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"decoder_layer"})

    kind: Literal["fastv"] = "fastv"
    per: Scope = "prompt"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"last_query_attention"})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest

        score_T = evidence.measured("last_query_attention")
        return prune_lowest(score_T, tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths))
