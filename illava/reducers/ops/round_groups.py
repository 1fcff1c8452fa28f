"""Sums points by their groups, several segments side by side, in an order that does not depend on what else is there.

Shape suffixes: S segments, N points of the longest segment, K groups of each, T points and G groups of all segments, X
channels or other points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Groups:
    """Holds which points are in each group of a round, and their shares of its weight.

    Attributes:
        order_T: int64, points of all segments by group, in their order within it.
        begin_G: int64, where each group begins there; of every segment there is one group more, of what is no point.
        share_T: float32, the points' shares in that order.
        weight_SK: float32, weights of the groups; 1 where there is none.
    """

    order_T: Tensor
    begin_G: Tensor
    share_T: Tensor
    weight_SK: Tensor

    @classmethod
    def of(cls, number_SN: Tensor, weight_SN: Tensor, width: int) -> Groups:
        """The groups of one round; points behind a segment's end are of group ``width``."""
        num_segments, device = len(number_SN), number_SN.device
        row_S1 = (width + 1) * torch.arange(num_segments, device=device)[:, None]
        label_T, order_T = (number_SN + row_S1).flatten().sort(stable=True)
        bound_X = torch.searchsorted(label_T, torch.arange(num_segments * (width + 1) + 1, device=device))
        weight_T = weight_SN.flatten()[order_T]
        size_G = bound_X[1:] - bound_X[:-1]
        total_G = torch.segment_reduce(weight_T, "sum", lengths=size_G, axis=0, unsafe=True)
        weight_SK = total_G.unflatten(0, (num_segments, -1))[:, :width]
        return cls(order_T, bound_X[:-1], weight_T / total_G[label_T], weight_SK.masked_fill(weight_SK == 0, 1.0))

    def means(self, value_SNX: Tensor) -> Tensor:
        """Weighted mean of each group, [S, K, X]; 0 where there is none. Sums run in the order of points, always."""
        mean_GX = torch.nn.functional.embedding_bag(  # gathers, weighs and sums in one pass
            self.order_T,
            value_SNX.flatten(0, 1).contiguous(),
            self.begin_G,
            mode="sum",
            per_sample_weights=self.share_T,
        )
        return mean_GX.unflatten(0, (len(value_SNX), -1))[:, : self.weight_SK.shape[1]]
