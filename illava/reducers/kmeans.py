"""k-means: replace tokens by the means of clusters of similar tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from illava.host_copies import constant_on
from illava.reducers.base import Evidence, EvidenceKind, Reducer, Stage
from illava.reducers.budget import Budget
from illava.reducers.proportional import ProportionalAttention

if TYPE_CHECKING:
    from torch import Tensor

    from illava.tokens import Assignment, Tokens

_NUM_ITERATIONS = 5
_RESOLUTION = 2**16


class KMeans(ProportionalAttention, Budget, Reducer):
    """Run five Lloyd iterations on L2-normalised tokens from evenly spaced centres; k clusters give k tokens.

    The first centres are tokens floor((i + 1/2) n / k). An iteration assigns each token to its nearest centre
    (Euclidean) and makes each centre the size-weighted mean of its members. In the end each cluster becomes the
    size-weighted mean of its members' hidden states, with the coordinates of the member nearest to the centre. An empty
    cluster takes the token farthest from its own centre that represents no cluster, so k tokens always remain.

    No n x n map: distances to the k centres, a block of tokens at a time.

    Attributes:
        per, num_merged, keep_ratio, keep_per_frame: see `Budget`.
        proportional_attention: see `ProportionalAttention`.

    Source: "k-means" of Tables 4 and 7 in arXiv 2412.06263v1, which gives the number of iterations only.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({"vision_block", "vision_output", "decoder_input", "decoder_layer"})

    kind: Literal["kmeans"] = "kmeans"

    def evidence(self, stage: Stage) -> frozenset[EvidenceKind]:
        return frozenset({"sizes"})

    def assign(self, tokens: Tokens, evidence: Evidence, stage: Stage) -> Assignment:
        from illava.tokens import cluster, identity

        kept = tuple(self.num_kept(n) for n in tokens.lengths)
        if kept == tokens.lengths:
            return identity(kept, tokens.hidden_TD.device)
        size_T = evidence.sizes(tokens)
        label_T, closeness_T = _lloyd(tokens, size_T, kept)
        return cluster(_representatives(label_T, closeness_T, tokens.lengths, kept), size_T, tokens.lengths, kept)


def _lloyd(tokens: Tokens, size_T: Tensor, kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Each token's cluster, int64 [T] numbered across segments, and its closeness to that cluster's centre."""
    import torch

    from illava.reducers.ops.similarity import group_mean, inside, nearest, unit
    from illava.tokens import pad, unpad

    lengths, device, width = tokens.lengths, tokens.hidden_TD.device, max(kept)
    num_segments = len(lengths)
    unit_TD = unit(tokens.hidden_TD)
    unit_SND = pad(unit_TD, lengths, 0.0)
    lengths_S1, kept_S1 = (constant_on(n, device)[:, None] for n in (lengths, kept))
    first_SC = (2 * torch.arange(width, device=device) + 1) * lengths_S1 // (2 * kept_S1).clamp(min=1)
    last_S1 = (lengths_S1 - 1).clamp(min=0)
    centre_SCD = unit_SND.gather(1, first_SC.clamp(max=last_S1)[..., None].expand(-1, -1, unit_SND.shape[2]))
    outside_SC = ~inside(kept, width, device)
    row_S1 = width * torch.arange(num_segments, device=device)[:, None]

    for _ in range(_NUM_ITERATIONS):
        # argmin |x - c|^2 = argmax x . c - |c|^2 / 2
        bias_SC = (centre_SCD.square().sum(-1) / -2).masked_fill(outside_SC, float("-inf"))
        label_T = unpad(nearest(unit_SND, centre_SCD, bias_SC)[1] + row_S1, lengths)
        mean_SCD = group_mean(unit_TD, size_T, label_T, num_segments * width).view_as(centre_SCD)
        count_SC = torch.zeros(num_segments * width, device=device).index_add_(0, label_T, torch.ones_like(size_T))
        centre_SCD = torch.where(count_SC.view(num_segments, width, 1) > 0, mean_SCD, centre_SCD)
    offset_TD = unit_TD - centre_SCD.flatten(0, 1)[label_T]
    # Rounded: both members of a pair are equally far; the earlier one shall represent it whatever the last bit.
    return label_T, -offset_TD.square().sum(-1).mul(_RESOLUTION).round()


def _representatives(label_T: Tensor, closeness_T: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Tensor:
    """The representative that each token joins; one token alone for each empty cluster, the farthest first."""
    import torch

    from illava.reducers.ops.selection import rank_highest
    from illava.reducers.ops.similarity import nearest_member
    from illava.tokens import pad, unpad

    index_T = torch.arange(label_T.shape[0], device=label_T.device)
    into_T = nearest_member(label_T, closeness_T)
    own_SN = pad((into_T == index_T).long(), lengths, 0)
    empty_S1 = constant_on(kept, label_T.device)[:, None] - own_SN.sum(1, keepdim=True)
    distance_T = (-closeness_T).masked_fill(into_T == index_T, -1.0)  # representatives come last
    return torch.where(unpad(rank_highest(distance_T, lengths) < empty_S1, lengths), index_T, into_T)
