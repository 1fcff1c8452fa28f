"""PyramidDrop: at the end of each decoder stage, keep a share of the visual tokens that the last token attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Scope, Stage

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class PyramidDrop(Reducer):
    """Before each of the step's layers keep the share ``keep_ratio`` of highest phi_j = mean_h A_h[last, j].

    A is the attention of the layer about to run, over the tokens there still are: its own queries and keys, computed
    once ahead of time. With three layers and 0.5 there are 1, 1/2, 1/4 and 1/8 of the tokens in the four stages. No
    merging. The paper's layers are 8, 16, 24 of 32 (preset ``pyramiddrop``), of 28 7, 14, 21 (``pyramiddrop-28``).

    Attributes:
        per: the scope that is ranked; the paper has one image a prompt.
        keep_ratio: share of a scope's tokens kept at each layer, n -> round(n * keep_ratio), one at least.

    Source: arXiv 2410.17247, section 3.3; Cooperx521/PyramidDrop@3f89f94:llava/model/modeling_llama_pdrop.py
    (``pdrop_rank_drop``). Written from the formula. Deviations: kept tokens keep their positions, the release renumbers
    them; a share is rounded where the release truncates a share of the first count; the query is the last prompt
    token, in the release the last token of the instruction.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"decoder_layer"})

    kind: Literal["pyramiddrop"] = "pyramiddrop"
    per: Scope = "prompt"
    keep_ratio: float = Field(default=0.5, gt=0.0, lt=1.0)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"own_layer_query_attention"})

    def num_kept(self, num_tokens: int) -> int:
        return max(round(num_tokens * self.keep_ratio), min(num_tokens, 1))

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.selection import prune_lowest

        score_T = evidence.measured("own_layer_query_attention")
        return prune_lowest(score_T, tokens.lengths, tuple(self.num_kept(n) for n in tokens.lengths))
