"""Draws at random from the tokens that top-p, top-k and min-p leave, by a number in [0, 1) for each row.

Tokens are taken by falling probability, equal ones by their ids. A row's draw is the token into whose share of the
cumulative probability the number falls. Its place is found among the `FIRST` most probable tokens, which alone are
sorted. Where these do not decide (their mass is below top-p, or a token beyond is as probable as the one drawn) the
whole row must be sorted. Which rows these are is known on the device, and the caller reads it.

Shape suffixes: R rows that are drawn at random, V vocabulary, K most probable tokens, N either of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 1024


def draw_nucleus(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_p_R: Tensor,
    draw_R: Tensor,
    limits_R2: Tensor | None,
    *,
    first: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token of each row: int64 [R], and whether it is certain: bool [R].

    The nucleus is the shortest prefix, by falling probability, that holds at least top_p of what min-p and top-k leave.

    Args:
        logits_RV: float32.
        temperature_R: their divisors.
        top_p_R: shares of the nuclei.
        draw_R: numbers in [0, 1).
        limits_R2: top-k, infinite for none, and min-p; None where no row has any.
        first: sort so many of the most probable tokens; None sorts all, and every draw is certain.
    """
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R[:, None]
    logits_RV = logits_RV.nan_to_num(0.0)  # a row that is not finite is reported, and must not break its neighbours
    probability_RV = logits_RV.softmax(-1)
    if first is None or first >= probability_RV.shape[-1]:
        probability_RN, order_RN = probability_RV.sort(dim=-1, descending=True, stable=True)
    else:
        probability_RN, order_RN = _most_probable(probability_RV, first)
    top_p_R1, sorted_RN = top_p_R[:, None], probability_RN
    if limits_R2 is not None:
        probability_RN, top_p_R1 = limited(probability_RN, top_p_R1, limits_R2)
    upto_RN = probability_RN.cumsum(-1)
    inside_RN = upto_RN - probability_RN < top_p_R1
    mass_R1 = (probability_RN * inside_RN).sum(-1, keepdim=True)
    is_whole = probability_RN.shape[-1] == probability_RV.shape[-1]
    if not is_whole:  # without a limit on it the nucleus is everything, and its mass is 1
        mass_R1 = mass_R1.where(~_takes_all(top_p_R1, limits_R2), 1.0)
    rank_R1 = (upto_RN <= draw_R[:, None] * mass_R1).sum(-1, keepdim=True)
    num_inside_R1 = inside_RN.sum(-1, keepdim=True)
    if limits_R2 is not None:
        num_inside_R1 = (inside_RN & (probability_RN > 0)).sum(-1, keepdim=True)
    last_R1 = num_inside_R1 - 1
    token_R = order_RN.gather(1, torch.minimum(rank_R1, last_R1)).squeeze(1)
    if is_whole:
        return token_R, torch.ones_like(token_R, dtype=torch.bool)
    drawn_R1 = sorted_RN.gather(1, torch.minimum(rank_R1, last_R1))
    knows_mass_R1 = _knows_mass(sorted_RN, upto_RN, top_p_R1, limits_R2) | (rank_R1 <= last_R1) & _takes_all(
        top_p_R1, limits_R2
    )
    return token_R, (knows_mass_R1 & (drawn_R1 > sorted_RN[:, -1:])).squeeze(1)


def _most_probable(probability_RV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens, in the order of a stable sort but for those as probable as the last."""
    chosen_RK = probability_RV.topk(num, dim=-1, sorted=False).indices.sort(dim=-1).values
    probability_RK, place_RK = probability_RV.gather(1, chosen_RK).sort(dim=-1, descending=True, stable=True)
    return probability_RK, chosen_RK.gather(1, place_RK)


def _takes_all(top_p_R1: Tensor, limits_R2: Tensor | None) -> Tensor:
    """Rows without top-p and limits."""
    all_R1 = top_p_R1 >= 1
    return all_R1 if limits_R2 is None else all_R1 & ~_is_limited(limits_R2)


def _knows_mass(sorted_RK: Tensor, upto_RK: Tensor, top_p_R1: Tensor, limits_R2: Tensor | None) -> Tensor:
    """Rows whose nucleus ends among the most probable tokens."""
    ends_R1 = upto_RK[:, -1:] >= top_p_R1
    if limits_R2 is None:
        return ends_R1
    top_k_R1, min_p_R1 = limits_R2.split(1, dim=-1)
    least_R1 = sorted_RK[:, -1:]
    # what a limit leaves is among them, or all the others are impossible, as under a grammar
    ends_here_R1 = (top_k_R1 <= sorted_RK.shape[-1]) | (least_R1 < min_p_R1 * sorted_RK[:, :1]) | (least_R1 == 0)
    return ends_here_R1 | (ends_R1 & ~_is_limited(limits_R2))


def _is_limited(limits_R2: Tensor) -> Tensor:
    top_k_R1, min_p_R1 = limits_R2.split(1, dim=-1)
    return (top_k_R1 < float("inf")) | (min_p_R1 > 0)


def limited(probability_RN: Tensor, top_p_R1: Tensor, limits_R2: Tensor) -> tuple[Tensor, Tensor]:
    """Set what min-p and top-k leave out to 0, and scale top-p to what they leave.

    A row without limits keeps its very numbers, so that it draws what it draws alone.
    """
    top_k_R1, min_p_R1 = limits_R2.split(1, dim=-1)
    rank_N = torch.arange(probability_RN.shape[-1], device=probability_RN.device)
    kept_RN = (rank_N < top_k_R1) & (probability_RN >= min_p_R1 * probability_RN[:, :1])
    probability_RN = probability_RN * kept_RN
    scaled_R1 = top_p_R1 * probability_RN.sum(-1, keepdim=True)
    return probability_RN, torch.where(_is_limited(limits_R2), scaled_R1, top_p_R1)
