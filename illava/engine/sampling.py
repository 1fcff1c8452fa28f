"""Draws the next token of every row of a batch: greedy, temperature, top-p.

A row's draw depends on its own logits and on hash(seed, request_id, step) alone, never on a shared generator or on the
other rows.

Shape suffixes: B rows, R rows that are drawn at random, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava.errors import RequestError
from illava.requests import SamplingParams, derive_seed


def check_sampling(params: SamplingParams) -> None:
    """Refuse parameters out of bounds.

    Raises:
        RequestError: names the value and its bounds.
    """
    if params.max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be at least 1; got {params.max_new_tokens}")
    if not 0 <= params.min_new_tokens <= params.max_new_tokens:
        raise RequestError(
            f"min_new_tokens must lie in 0 .. max_new_tokens ({params.max_new_tokens}); got {params.min_new_tokens}"
        )
    if not 0.0 <= params.temperature < float("inf"):
        raise RequestError(f"temperature must be 0 (greedy) or a positive number; got {params.temperature}")
    if not 0.0 < params.top_p <= 1.0:
        raise RequestError(f"top_p must lie in (0, 1]; got {params.top_p}")


def uniform_draw(seed: int, request_id: str, step: int) -> float:
    """The number in [0, 1) that decides a request's token number ``step``."""
    return (derive_seed(seed, request_id, step) >> 10) / 2**53


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """Holds how the rows of a batch are drawn, as long as the batch has this composition.

    Attributes:
        params: parameters of each row.
        random: rows that are drawn at random.
        index_R: these rows, on the device.
        wanted_R2: float32 temperature and top-p of these rows, on the device.
    """

    params: tuple[SamplingParams, ...]
    random: tuple[int, ...]
    index_R: Tensor
    wanted_R2: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> SamplingBatch:
        """Make the batch of rows with these parameters."""
        random = tuple(row for row, own in enumerate(params) if own.temperature > 0)
        wanted = [[params[row].temperature, params[row].top_p] for row in random]
        index_R, wanted_R2 = torch.tensor(random, dtype=torch.long), torch.tensor(wanted).view(-1, 2)
        return cls(tuple(params), random, index_R.to(device), wanted_R2.to(device))

    def draws(self, steps: Sequence[tuple[str, int]]) -> list[float]:
        """The numbers that decide for the random rows; ``steps`` gives every row's request id and step."""
        return [uniform_draw(self.params[row].seed, *steps[row]) for row in self.random]


def draw_tokens(logits_BV: Tensor, batch: SamplingBatch, draws: Sequence[float]) -> Tensor:
    """Draw the next token of each row, and tell whether its logits were finite: int64 [2, B], without a host sync.

    If a row wants log-probabilities, a third row has those of all drawn tokens, as the bits of a float32.

    Args:
        logits_BV: any float dtype.
        batch: how the same rows are drawn.
        draws: a number in [0, 1) for each random row.
    """
    logits_BV = logits_BV.float()
    finite_B = logits_BV.isfinite().all(-1)
    token_B = logits_BV.argmax(-1)
    if batch.random:
        draw_R = torch.tensor(draws, dtype=torch.float32).to(logits_BV.device, non_blocking=True)
        temperature_R, top_p_R = batch.wanted_R2[:, 0], batch.wanted_R2[:, 1]
        chosen_R = _nucleus(logits_BV.index_select(0, batch.index_R), temperature_R, top_p_R, draw_R)
        token_B = token_B.index_copy(0, batch.index_R, chosen_R)
    drawn = [token_B, finite_B.long()]
    if any(own.logprobs for own in batch.params):
        logprob_B = logits_BV.gather(1, token_B[:, None]).squeeze(1) - logits_BV.logsumexp(-1)
        drawn.append(logprob_B.view(torch.int32).long())
    return torch.stack(drawn)


def _nucleus(logits_RV: Tensor, temperature_R: Tensor, top_p_R: Tensor, draw_R: Tensor) -> Tensor:
    """The token into whose interval of the nucleus' cumulative probability the draw falls: int64 [R].

    The nucleus is the shortest prefix, by falling probability, that holds at least top_p.
    """
    logits_RV = (logits_RV - logits_RV.amax(-1, keepdim=True)) / temperature_R[:, None]
    logits_RV = logits_RV.nan_to_num(0.0)  # a row that is not finite is reported, and must not break its neighbours
    probability_RV, order_RV = logits_RV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    upto_RV = probability_RV.cumsum(-1)
    inside_RV = upto_RV - probability_RV < top_p_R[:, None]
    mass_R1 = (probability_RV * inside_RV).sum(-1, keepdim=True)
    rank_R1 = (upto_RV <= draw_R[:, None] * mass_R1).sum(-1, keepdim=True)
    rank_R1 = torch.minimum(rank_R1, inside_RV.sum(-1, keepdim=True) - 1)
    return order_RV.gather(1, rank_R1).squeeze(1)
