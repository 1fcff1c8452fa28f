"""VidCom2: keep more tokens of frames that differ from the rest of the video."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
_TEMPERATURE = 0.01


class VidCom2(Reducer):
    """Keep unusual tokens, and more of them in unusual frames.

    On the half of the channels with the lowest variance over the input, L2-normalised to y:
    v_t = sum_a exp(-|y_t - mean of the input|^2 / 2a) and f_t likewise with the mean of t's frame,
    a = 1/8, 1/4, 1/2, 1, 2. A frame's share p = softmax over frames of (-mean v) / 0.01 gives it the quota
    n_frame * base * (1 + p - mean p), at most n_frame, with base = k / n. Each frame keeps its tokens of lowest v + f.

    A segment is one visual input; frames are read from the tokens' coordinates. Each frame keeps at least one token as
    long as k is no less than the number of frames. Finding the frames costs one host synchronisation.

    Attributes:
        keep_ratio: k = round(n * keep_ratio) tokens of a visual input.

    Source: arXiv 2505.14454; xuyang-liu16/VidCom2@d31b156:token_compressor/vidcom2/vidcom2.py. Written from the
    formula. Deviation: quotas are rounded together (Sainte-Lague: the r-th token of a frame, from 0, has priority
    (r + 1/2) / quota) so that exactly k tokens remain; there each frame rounds for itself.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"decoder_input"})

    kind: Literal["vidcom2"] = "vidcom2"
    per: Literal["medium"] = "medium"
    keep_ratio: float = Field(gt=0.0, lt=1.0)

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset()

    def num_kept(self, num_tokens: int) -> int:
        """round(n * keep_ratio), at least one."""
        return max(round(num_tokens * self.keep_ratio), min(num_tokens, 1))

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        import torch

        from illava.reducers.ops.selection import prune_lowest
        from illava.reducers.ops.similarity import group_mean

        device, total, num_media = tokens.hidden_TD.device, sum(tokens.lengths), len(tokens.lengths)
        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        input_T = torch.arange(num_media, device=device).repeat_interleave(
            constant_on(tokens.lengths, device), output_size=total
        )
        pairs_T2 = torch.stack([input_T, tokens.coord_T3[:, 0]], 1)
        pairs_F2, frame_T = torch.unique(pairs_T2, dim=0, return_inverse=True)
        num_frames = pairs_F2.shape[0]

        usual_T, frame_usual_T = _likeness(tokens.hidden_TD, input_T, num_media, frame_T, num_frames)
        ones_T = torch.ones_like(usual_T)
        unusual_F = -group_mean(usual_T[:, None], ones_T, frame_T, num_frames).squeeze(1)
        size_F = torch.zeros_like(unusual_F).index_add_(0, frame_T, ones_T)
        base_S = constant_on([k / max(n, 1) for k, n in zip(kept, tokens.lengths, strict=True)], device)
        quota_F = _quotas(unusual_F, size_F, pairs_F2[:, 0], base_S)
        rank_T = _rank_in_group(usual_T + frame_usual_T, frame_T)
        priority_T = torch.where(rank_T == 0, -1.0, (rank_T + 0.5) / quota_F[frame_T])
        return prune_lowest(-priority_T, tokens.lengths, kept)


def _likeness(
    hidden_TD: Tensor, input_T: Tensor, num_media: int, frame_T: Tensor, num_frames: int
) -> tuple[Tensor, Tensor]:
    """How like its input's mean, and how like its frame's mean, each token is: float32 [T], higher = more usual."""
    import torch

    from illava.reducers.ops.similarity import group_mean, unit

    value_TD = hidden_TD.float()
    ones_T = value_TD.new_ones(value_TD.shape[0])
    spread_TD = value_TD - group_mean(value_TD, ones_T, input_T, num_media)[input_T]
    variance_SD = group_mean(spread_TD.square(), ones_T, input_T, num_media)
    quiet_SC = torch.argsort(variance_SD, dim=1, stable=True)[:, : value_TD.shape[1] // 2]
    quiet_SD = torch.zeros_like(variance_SD).scatter_(1, quiet_SC, 1.0)
    unit_TD = unit(value_TD * quiet_SD[input_T])

    def likeness(label_T: Tensor, num_groups: int) -> Tensor:
        centre_GD = group_mean(unit_TD, ones_T, label_T, num_groups)
        distance_T1 = (unit_TD - centre_GD[label_T]).square().sum(1, keepdim=True)
        return torch.exp(-distance_T1 / (2 * constant_on(_WIDTHS, distance_T1.device))).sum(1)

    return likeness(input_T, num_media), likeness(frame_T, num_frames)


def _quotas(unusual_F: Tensor, size_F: Tensor, input_F: Tensor, base_S: Tensor) -> Tensor:
    """Tokens each frame is due, float32 [F]: n_frame * base * (1 + p - mean p), at most n_frame."""
    import torch

    top_S = torch.full_like(base_S, float("-inf")).scatter_reduce_(0, input_F, unusual_F, "amax")
    weight_F = torch.exp((unusual_F - top_S[input_F]) / _TEMPERATURE)
    total_S = torch.zeros_like(base_S).index_add_(0, input_F, weight_F)
    frames_S = torch.zeros_like(base_S).index_add_(0, input_F, torch.ones_like(weight_F))
    share_F = weight_F / total_S[input_F] - 1 / frames_S[input_F]
    return size_F * (base_S[input_F] * (1 + share_F)).clamp(max=1.0)


def _rank_in_group(score_T: Tensor, label_T: Tensor) -> Tensor:
    """Rank of each token in its group, 0 = lowest score, ties to the earlier: int64 [T]."""
    import torch

    order_T = torch.argsort(score_T, stable=True)
    order_T = order_T[torch.argsort(label_T[order_T], stable=True)]
    sorted_T = label_T[order_T]
    first_T = torch.ones_like(sorted_T, dtype=torch.bool)
    first_T[1:] = sorted_T[1:] != sorted_T[:-1]
    coord_T = torch.arange(label_T.shape[0], device=label_T.device)
    start_T = torch.where(first_T, coord_T, 0).cummax(0).values
    return torch.empty_like(order_T).index_copy_(0, order_T, coord_T - start_T)
