"""CLIP crop: keep the part of a picture that CLIP finds nearest to the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.reducers.base import ClipScorer, Evidence, EvidenceKind, Reducer, Stage, TextScorer

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class ClipCrop(Reducer):
    """Let only the box of cells that CLIP finds nearest to the request's text enter the tower.

    Over all boxes of at most floor(R C ``keep_ratio``) cells of an R x C frame or tile, the one whose relevances sum to
    most is kept, each frame and tile by itself; of equals the flattest, then the topmost, then the leftmost.

    Relevance of a patch p of CLIP's own tower: (1 + cos(v_p, t)) / 2, with v_p its last hidden state through the last
    norm and the visual projection, t the text's embedding; brought to the cells bilinearly.

    Attributes:
        keep_ratio: share of a frame's cells at most.
        scorer: folder or hub id of the model, and its commit.

    Source: "CLIP" of Table 4 in arXiv 2412.06263v1, which gives no formula; the box is ours.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})

    kind: Literal["clip_crop"] = "clip_crop"
    keep_ratio: float = Field(gt=0.0, lt=1.0)
    scorer: ClipScorer

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
