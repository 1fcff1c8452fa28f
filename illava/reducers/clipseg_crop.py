"""CLIPSeg crop: keep the part of a picture that CLIPSeg segments for the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import ClipSegScorer, Evidence, EvidenceKind, Reducer, Stage, TextScorer

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class ClipSegCrop(Reducer):
    """Let only the box of cells that CLIPSeg segments for the request's text enter the tower.

    Over all boxes of at most floor(R C ``keep_ratio``) cells of an R x C frame or tile, the one whose relevances sum to
    most is kept, each frame and tile by itself; of equals the flattest, then the topmost, then the leftmost.

    Relevance of a pixel: the logistic of CLIPSeg's logit for the text; a cell's is the mean around its middle, weighted
    by a triangle that reaches to its neighbours' middles (bilinear with antialiasing).

    Attributes:
        keep_ratio: share of a frame's cells at most.
        scorer: folder or hub id of the model, and its commit.

    Source: "CLIPSeg" of Table 4 in arXiv 2412.06263v1, which gives no formula; the box is ours.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})

    kind: Literal["clipseg_crop"] = "clipseg_crop"
    keep_ratio: float = Field(gt=0.0, lt=1.0)
    scorer: ClipSegScorer

    @property
    def text_scorer(self) -> TextScorer:
        """See `Reducer.text_scorer`."""
        return self.scorer

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"text_relevance"})

    def num_kept(self, num_tokens: int) -> None:
        """None: a box has the shape that the relevances give it."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.reducers.ops.boxes import crop

        return crop(tokens, evidence.measured("text_relevance"), self.keep_ratio)
