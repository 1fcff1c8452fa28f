"""FlashVID: pick diverse tokens of each frame, and merge the others along trees that run through time."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class FlashVID(Reducer):
    """Keep k tokens of a video: picks that stay as they are, and means of trees of the others.

    1. Each frame picks its share of round(pick_share k) tokens by greedy max-min diversity. The distance of a token i
       from another is (1 - cosine) a_i, with a_i the attention it received; under ``event_relevance`` also times
       r_i = max(0, mean over frames c of <x_i, mean of frame c>). The first pick is the token whose nearest neighbour
       is farthest; each next one is farthest from its nearest pick.
    2. Of the other tokens, one joins the token most like it in the frame before, if that is no pick and their cosine
       is above ``threshold``: trees, whose root is their earliest token. If fewer roots than places remained, only the
       joins of largest cosine are made.
    3. Each frame's roots are clustered to its share of the k - picks left places by density peaks over k nearest
       neighbours (DPC-kNN): density exp(-mean squared distance to the 7 nearest), centres of largest density x
       distance to a denser one, each root to its nearest centre. A cluster becomes the mean of its trees' means, at its
       centre's coordinates.

    For videos: the tiles of one image are no sequence, though they count as frames here. A segment is one visual input.
    Newlines join no tree. Loops over segments and frames, since counts of trees depend on the data; so it waits for the
    device. All pairs of a frame's tokens are compared at once. Ties go to the earlier token.

    Attributes:
        keep_ratio: k = round(n * keep_ratio) tokens of a visual input.
        pick_share: of them, how many are picks; the source's alpha.
        threshold: cosine above which a token joins one of the frame before.
        event_relevance: the source's second version of the distance; on the tiny demo model's clips, whose moving
            things are unlike their frames' means, it lost many answers, and the first few.

    Source: arXiv 2602.08024; Fanziyang-v/FlashVID@3efef7e:flashvid/utils.py. Written from the formula. Deviations: the
    video is one segment (no cuts where its frames change); attention is that of the tower's last block, since few
    towers have a CLS token; exactly k tokens remain, picks and clusters being shared out to frames by Sainte-Lague
    where the source rounds up in each; with fewer clusters than frames all frames' roots are clustered together; a
    tie of densities goes to the earlier root, where the source adds noise; no second pruning inside the LLM.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"decoder_input"})

    kind: Literal["flashvid"] = "flashvid"
    per: Literal["medium"] = "medium"
    keep_ratio: float = Field(gt=0.0, lt=1.0)
    pick_share: float = Field(default=0.7, ge=0.0, le=1.0)
    threshold: float = Field(default=0.8, ge=-1.0, le=1.0)
    event_relevance: bool = False

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"attention_received"})

    def num_kept(self, num_tokens: int) -> int:
        """round(n * keep_ratio), at least one."""
        return max(round(num_tokens * self.keep_ratio), min(num_tokens, 1))

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.frame_trees import into_trees, visual_of
        from illava.tokens import cluster

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        into, weights, start = [], [], 0
        parts = zip(
            tokens.hidden_TD.float().split(tokens.lengths),
            tokens.coord_T3.split(tokens.lengths),
            evidence.measured("attention_received").float().split(tokens.lengths),
            kept,
            strict=True,
        )
        for hidden_ND, coord_N3, attention_N, num_kept in parts:
            visual = visual_of(hidden_ND, coord_N3, attention_N, relevance=self.event_relevance)
            into_N, weight_N = into_trees(
                visual, num_kept, num_picks=round(num_kept * self.pick_share), threshold=self.threshold
            )
            into.append(into_N + start)
            weights.append(weight_N)
            start += len(into_N)
        return cluster(torch.cat(into), torch.cat(weights), tokens.lengths, kept)
