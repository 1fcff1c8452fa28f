"""Fewer frames: the baseline that every reduction of a video must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from illava.reducers.base import Evidence, EvidenceKind, MediaKind, Reducer, Stage

if TYPE_CHECKING:
    from illava.tokens import Assignment, Tokens


class FewerFrames(Reducer):
    """Show the model an evenly spread subset of a video's frames, as if no others had been read.

    Of F frames n are kept: those numbered floor((i + 1/2) F / n), i = 0 .. n - 1. Where a temporal patch spans two
    frames (the Qwen families), a pair counts as one frame here. The prompt has no gaps: the model reads an ordinary
    video of n frames, with the frames' own times where it reads times. Images pass unchanged.

    Attributes:
        keep_ratio: share of the frames, n = max(1, round(F * keep_ratio)).
        num_frames: or n itself; a video that has no more frames is no error.

    Source: a baseline of ours; Tables 4 to 9 of arXiv 2412.06263v1 do not have it.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})
    media_kinds: ClassVar[frozenset[MediaKind]] = frozenset({"video"})
    drops_cells: ClassVar[bool] = False

    kind: Literal["fewer_frames"] = "fewer_frames"
    keep_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    num_frames: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.keep_ratio is None) == (self.num_frames is None):
            raise ValueError("give exactly one of keep_ratio, num_frames")
        return self

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def num_kept(self, num_tokens: int) -> None:
        """None: it counts frames, not tokens."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.tokens import prune

        kept_F, lengths = [], []
        for frame_N in tokens.coord_T3[:, 0].split(tokens.lengths):
            frames, index_N = frame_N.unique(return_inverse=True)
            wanted = torch.zeros(len(frames), dtype=torch.bool, device=frame_N.device)
            wanted[list(self._chosen(len(frames)))] = True
            kept_F.append(wanted[index_N])
            lengths.append(int(kept_F[-1].sum()))
        return prune(torch.cat(kept_F).nonzero().squeeze(1), tuple(lengths), sum(tokens.lengths))

    def _chosen(self, num_frames: int) -> tuple[int, ...]:
        """The frames, of so many, that are kept."""
        if self.num_frames is not None:
            count = min(num_frames, self.num_frames)
        else:
            count = max(1, round(num_frames * (self.keep_ratio or 1.0)))
        return tuple((2 * i + 1) * num_frames // (2 * count) for i in range(count))
