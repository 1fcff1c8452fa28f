"""Drops the lowest-scored tokens of each segment, whatever the score means."""

from __future__ import annotations

import torch
from torch import Tensor

from illava.host_copies import constant_on
from illava.tokens import Assignment, offsets, pad, prune, unpad


def prune_lowest(score_T: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Assignment:
    """Keep the ``kept[s]`` highest-scored tokens of each segment, in their order.

    Vectorised over segments of any lengths; counts are host integers, so nothing waits for the device. Of equal
    scores the earlier token is kept.

    Args:
        score_T: float, higher = keep; not NaN.
        lengths: tokens per segment.
        kept: tokens to keep per segment, ``0 <= kept[s] <= lengths[s]``.
    """
    keep_SN = rank_highest(score_T, lengths) < constant_on(kept, score_T.device)[:, None]
    kept_SN = torch.argsort((~keep_SN).byte(), dim=1, stable=True)  # kept first, in order
    return prune(unpad(kept_SN + offsets(lengths, score_T.device)[:, None], kept), kept, sum(lengths))


def rank_highest(score_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each token's rank in its segment, 0 = highest, ties to the earlier: int64 [S, N]; padding ranks last."""
    order_SN = torch.argsort(pad(score_T.float(), lengths, float("-inf")), dim=1, descending=True, stable=True)
    coord_SN = torch.arange(order_SN.shape[1], device=score_T.device).expand_as(order_SN)
    return torch.empty_like(order_SN).scatter_(1, order_SN, coord_SN)
