"""Fewer frames: the baseline that every reduction of a video must beat; evenly spread, or by what an encoder spent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from illava.reducers.base import Evidence, EvidenceKind, MediaKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens


class FewerFrames(Reducer):
    """Show the model an evenly spread subset of a video's frames, as if no others had been read.

    Of F frames n are kept: those numbered floor((i + 1/2) F / n), i = 0 .. n - 1. Where a temporal patch spans two
    frames (the Qwen families), a pair counts as one frame here. The prompt has no gaps: the model reads an ordinary
    video of n frames, with the frames' own times where it reads times. Images pass unchanged.

    With ``by: packets`` they are spread evenly not over time but over the bytes b_f that the file spends on what
    changes from frame f - 1 to frame f. A frame has a share p_f = min(1, c b_f), c such that all shares add up to n; it
    is kept where some i + 1/2 lies in [p_0 + .. + p_(f-1), p_0 + .. + p_f): systematic sampling with probability
    proportional to size. So exactly n frames are kept, none twice, still stretches give up theirs first, and frames of
    equal bytes are spread as without it. It costs nothing: a video's index holds the sizes of its packets, which
    readers of files know (``VisualInput.packet_bytes``). Frames without sizes are refused in words.

    Attributes:
        keep_ratio: share of the frames, n = max(1, round(F * keep_ratio)).
        num_frames: or n itself; a video that has no more frames is no error.
        by: None, or ``packets``.

    Source: a baseline of ours; Tables 4 to 9 of arXiv 2412.06263v1 do not have it. ``packets`` follows the budgets of
    MeToM (CVPR 2026; no code was published), which gives a group of pictures tokens by its mean packet; here a frame is
    kept or not, and key frames are discounted (`pipeline.loading.video_index.packet_bytes`).
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"media"})
    media_kinds: ClassVar[frozenset[MediaKind]] = frozenset({"video"})
    drops_cells: ClassVar[bool] = False

    kind: Literal["fewer_frames"] = "fewer_frames"
    keep_ratio: float | None = Field(default=None, gt=0.0, lt=1.0)
    num_frames: int | None = Field(default=None, ge=1)
    by: Literal["packets"] | None = None

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.keep_ratio is None) == (self.num_frames is None):
            raise ValueError("give exactly one of keep_ratio, num_frames")
        return self

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset() if self.by is None else frozenset({"packet_bytes"})

    def num_kept(self, num_tokens: int) -> None:
        """None: it counts frames, not tokens."""

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.tokens import prune

        sizes_T = tokens.coord_T3[:, 0] if self.by is None else evidence.measured("packet_bytes")
        kept_F, lengths = [], []
        for frame_N, sizes_N in zip(
            tokens.coord_T3[:, 0].split(tokens.lengths), sizes_T.split(tokens.lengths), strict=True
        ):
            frames, index_N = frame_N.unique(return_inverse=True)
            wanted = torch.zeros(len(frames), dtype=torch.bool, device=frame_N.device)
            wanted[list(self._chosen(self._weights(index_N, sizes_N, len(frames))))] = True
            kept_F.append(wanted[index_N])
            lengths.append(int(kept_F[-1].sum()))
        return prune(torch.cat(kept_F).nonzero().squeeze(1), tuple(lengths), sum(tokens.lengths))

    def _weights(self, index_N: Tensor, sizes_N: Tensor, num_frames: int) -> list[int]:
        """What each frame weighs: one as much as the other, or its bytes."""
        if self.by is None:
            return [1] * num_frames
        return sizes_N.new_zeros(num_frames).scatter_reduce(0, index_N, sizes_N, "amax").tolist()

    def _chosen(self, weights: Sequence[int]) -> tuple[int, ...]:
        """The frames that are kept, of frames of these weights; in whole numbers, so that no machine rounds apart."""
        num_frames = len(weights)
        if self.num_frames is not None:
            count = min(num_frames, self.num_frames)
        else:
            count = max(1, round(num_frames * (self.keep_ratio or 1.0)))
        shares, whole = _shares(weights, count)
        upto = [0, *accumulate(shares)]
        # The middles (2 i + 1) / 2 that lie below an end; each share is at most 1, so it holds one or none.
        below = [(2 * end + whole - 1) // (2 * whole) for end in upto]
        return tuple(frame for frame in range(num_frames) if below[frame + 1] > below[frame])


def _shares(weights: Sequence[int], count: int) -> tuple[list[int], int]:
    """Each frame's share of ``count``, as a numerator; and the denominator, which is the largest share.

    Frames whose share would exceed 1 have 1, and the others share the rest by their weights; equally where they have
    none.
    """
    full: set[int] = set()
    while True:
        rest = [0 if frame in full else weight for frame, weight in enumerate(weights)]
        if not any(rest):
            rest = [int(frame not in full) for frame in range(len(weights))]
        total, left = sum(rest), count - len(full)
        above = {frame for frame, weight in enumerate(rest) if weight * left > total}
        if not above:
            whole = total or 1  # 0 where every frame has 1
            return [whole if frame in full else weight * left for frame, weight in enumerate(rest)], whole
        full |= above
