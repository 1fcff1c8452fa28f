"""Draws greedily in Triton: token, whether all logits are finite, and log-probability, reading the logits once.

A row is cut into `_NUM_SPLITS` splits by the vocabulary alone, so a row's draw does not depend on its batch. Of equal
logits the first is drawn. `illava.engine.sampling.draw_greedy` is the reference.

Shape suffixes: B requests, V vocabulary, C splits of it; in kernels N tokens of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUM_SPLITS = 64
_BLOCK = 1024


def draw_greedy(logits_BV: Tensor) -> Tensor:
    """Tokens, whether logits were finite, and the bits of float32 log-probabilities: int64 [3, B]."""
    (num_rows, num_tokens), device = logits_BV.shape, logits_BV.device
    logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    top_BC, mass_BC = (torch.empty(num_rows, _NUM_SPLITS, dtype=torch.float32, device=device) for _ in range(2))
    token_BC, odd_BC = (torch.empty(num_rows, _NUM_SPLITS, dtype=torch.int32, device=device) for _ in range(2))
    drawn_3B = torch.empty(3, num_rows, dtype=torch.int64, device=device)
    _greedy_split[(num_rows, _NUM_SPLITS)](
        logits_BV, top_BC, mass_BC, token_BC, odd_BC, logits_BV.stride(0),
        NUM_TOKENS=num_tokens, SPLITS=_NUM_SPLITS, BLOCK=_BLOCK,
    )  # fmt: skip
    _greedy_join[(num_rows,)](
        top_BC, mass_BC, token_BC, odd_BC, drawn_3B, num_rows, NUM_TOKENS=num_tokens, SPLITS=_NUM_SPLITS
    )
    return drawn_3B


@triton.jit
def _greedy_split(
    logits, top, mass, token, odd, stride_b,
    NUM_TOKENS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One split of one row: its largest logit and the first place of it, sum of exponentials, what is not finite."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length: tl.constexpr = (NUM_TOKENS + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    best, total, num_odd = float("-inf"), 0.0, 0
    place = tl.full((), NUM_TOKENS, tl.int32)
    for start in range(split * length, tl.minimum((split + 1) * length, NUM_TOKENS), BLOCK):
        token_N = start + tl.arange(0, BLOCK)
        valid_N = token_N < NUM_TOKENS
        logit_N = tl.load(logits + row * stride_b + token_N, mask=valid_N, other=float("-inf")).to(tl.float32)
        num_odd += tl.sum((valid_N & ((tl.abs(logit_N) < float("inf")) == 0)).to(tl.int32), 0)
        largest = tl.max(logit_N, 0)
        place = tl.where(largest > best, tl.min(tl.where(logit_N == largest, token_N, NUM_TOKENS), 0), place)
        new_best = tl.maximum(best, largest)
        total = total * tl.exp(best - new_best) + tl.sum(tl.exp(logit_N - new_best), 0)
        best = new_best
    at = row * SPLITS + split
    tl.store(top + at, best)
    tl.store(mass + at, total)
    tl.store(token + at, place)
    tl.store(odd + at, num_odd)


@triton.jit
def _greedy_join(top, mass, token, odd, drawn, num_rows, NUM_TOKENS: tl.constexpr, SPLITS: tl.constexpr):
    """Join the splits of one row. One that is not finite gets some token, too: a step that is queued may read it."""
    row, split_C = tl.program_id(0), tl.arange(0, SPLITS)
    at_C = row.to(tl.int64) * SPLITS + split_C
    top_C = tl.load(top + at_C)
    best = tl.max(top_C, 0)
    place = tl.min(tl.where(top_C == best, tl.load(token + at_C), NUM_TOKENS), 0)
    share_C = tl.where(top_C > float("-inf"), tl.load(mass + at_C) * tl.exp(top_C - best), 0.0)
    logprob = -tl.log(tl.sum(share_C, 0))
    num_odd = tl.sum(tl.load(odd + at_C), 0)
    tl.store(drawn + row, tl.minimum(place, NUM_TOKENS - 1).to(tl.int64))
    tl.store(drawn + num_rows + row, (num_odd == 0).to(tl.int64))
    tl.store(drawn + 2 * num_rows + row, logprob.to(tl.int32, bitcast=True).to(tl.int64))
