"""Computes exact attention scores without an N x N map: attention received, its causal forms, the last query's.

Attention after the softmax is formed for a block of queries at a time, summed over the block, and dropped; memory holds
a block times N at most. Products, softmax and sums are float32 whatever the input's dtype. This module is the
definition and the torch reference; `illava.attention.triton_scores` computes the same where `kernels_on` says so. Where
the attention gave each query's log-sum-exp, the softmax begins with that, and the kernel leaves out its first pass.

Shape suffixes: T tokens packed end to end, S segments of equal length N, H query heads, J key heads, G query heads per
key head, d head width, B queries of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from illava.attention.backend import kernels_on
from illava.attention.packed import with_key_bias

# Measured at 729 tokens, 16 heads, d 72, one CPU core: blocks of 256 queries that stay in the L2 cache take 16 ms an
# image, small blocks or buffers beyond the cache 23 ms. A GPU wants few large launches instead.
_BLOCK_QUERIES = 256
_CPU_BUFFER_NUMEL = 2**18
_DEVICE_BUFFER_NUMEL = 2**26


def attention_received(
    q_THd: Tensor,
    k_THd: Tensor,
    lengths: tuple[int, ...],
    *,
    scale: float,
    key_bias_T: Tensor | None = None,
    lse_HT: Tensor | None = None,
) -> Tensor:
    """Attention that each token receives within its segment, without a mask: float32 [T].

    S_j = 1 / (H N) sum over heads h and queries i of softmax_j(scale q_hi . k_hj); the query i = j is included.
    Segments of equal length are computed together.

    Args:
        q_THd: queries of the scored attention, [T, H, d].
        k_THd: keys, [T, H, d].
        lengths: tokens per segment, host integers.
        scale: factor of the scores, as in the model's own attention.
        key_bias_T: float32, what that attention adds to every score of a key; see
            `illava.attention.packed.with_key_bias`.
        lse_HT: float32 log-sum-exps of that attention's scores, as `illava.attention.packed.packed_attention_lse` gives
            them; None computes them here.

    Source: arXiv 2412.06263v1, eq. 2; hulianyuyy/iLLaVA@4068149 averages over queries (i = j included).
    """
    if key_bias_T is not None:
        q_THd, k_THd = with_key_bias(q_THd, k_THd, key_bias_T, scale=scale)
    if kernels_on(q_THd.device) == "triton":
        from illava.attention.triton_scores import received

        return received(q_THd, k_THd, lengths, scale=scale, lse_HT=lse_HT)
    if not lengths:
        return q_THd.new_empty(0, dtype=torch.float32)
    if len(set(lengths)) == 1:
        shape = (len(lengths), lengths[0], *q_THd.shape[1:])
        lse_HSN = None if lse_HT is None else lse_HT.unflatten(1, shape[:2])
        return _received(q_THd.view(shape), k_THd.view(shape), scale, lse_HSN).flatten()
    q_parts, k_parts = q_THd.split(lengths), k_THd.split(lengths)
    lse_parts = None if lse_HT is None else lse_HT.split(lengths, 1)
    score_parts: list[Tensor] = [q_THd.new_empty(0)] * len(lengths)
    for length in set(lengths):
        group = [s for s, n in enumerate(lengths) if n == length]
        q_SNHd, k_SNHd = (torch.stack([parts[s] for s in group]) for parts in (q_parts, k_parts))
        lse_HSN = None if lse_parts is None else torch.stack([lse_parts[s] for s in group], 1)
        score_SN = _received(q_SNHd, k_SNHd, scale, lse_HSN)
        for s, score_N in zip(group, score_SN, strict=True):
            score_parts[s] = score_N
    return torch.cat(score_parts)


def causal_attention_received(
    q_THd: Tensor,
    k_TJd: Tensor,
    lengths: tuple[int, ...],
    scope_T: Tensor,
    *,
    scale: float,
    normalised: bool,
    key_bias_T: Tensor | None = None,
) -> Tensor:
    """Attention that each scoped token receives from its own scope under a causal mask: float32 [T].

    A is the softmax over all keys that a query sees in its request, text included; only queries of the token's own
    scope are counted. Plain: S_j = mean over heads and over the scope's queries i of A_ij (0 where i < j).
    Normalised: the head mean of sum_i A_ij divided by sum_{i >= j} 1 / n_i, n_i the keys query i sees, so that flat
    attention gives 1 everywhere.

    Args:
        q_THd: queries of packed requests, [T, H, d].
        k_TJd: keys, [T, J, d], J dividing H (grouped-query attention).
        lengths: tokens per request, host integers.
        scope_T: int64 scope of each token, -1 for tokens that are neither scored nor asked (text); their score is 0.
        scale: factor of the scores.
        normalised: divide the causal mask's bias out.
        key_bias_T: as in `attention_received`.

    Source: arXiv 2412.06263v1, eq. 2 (plain); the normalised form is ours.
    """
    if key_bias_T is not None:
        q_THd, k_TJd = with_key_bias(q_THd, k_TJd, key_bias_T, scale=scale)
    if kernels_on(q_THd.device) == "triton":
        from illava.attention.triton_scores import causal_received

        return causal_received(q_THd, k_TJd, lengths, scope_T, scale=scale, normalised=normalised)
    parts = zip(q_THd.split(lengths), k_TJd.split(lengths), scope_T.split(lengths), strict=True)
    scores = [_causal_received(q_NHd, k_NJd, scope_N, scale, normalised) for q_NHd, k_NJd, scope_N in parts]
    return torch.cat(scores)


def last_query_attention(
    q_THd: Tensor, k_TJd: Tensor, lengths: tuple[int, ...], *, scale: float, key_bias_T: Tensor | None = None
) -> Tensor:
    """Attention of each segment's last token to each of its tokens, mean over heads: float32 [T].

    Args: see `one_query_attention`.

    Source: FastV, arXiv 2403.06764; the score of hulianyuyy/iLLaVA@4068149 for LLaVA-OneVision.
    """
    return one_query_attention(q_THd, k_TJd, lengths, query=-1, scale=scale, key_bias_T=key_bias_T)


def one_query_attention(
    q_THd: Tensor,
    k_TJd: Tensor,
    lengths: tuple[int, ...],
    *,
    query: int,
    scale: float,
    key_bias_T: Tensor | None = None,
) -> Tensor:
    """Attention of one token of each segment to each of its tokens, mean over heads: float32 [T].

    Args:
        q_THd: queries of packed segments, [T, H, d].
        k_TJd: keys, [T, J, d], J dividing H.
        lengths: tokens per segment, host integers.
        query: which token asks: -1 the last; 0 the first, which is CLS in a tower that has one.
        scale: factor of the scores.
        key_bias_T: as in `attention_received`.
    """
    if key_bias_T is not None:
        q_THd, k_TJd = with_key_bias(q_THd, k_TJd, key_bias_T, scale=scale)
    num_key_heads = k_TJd.shape[1]
    scores = []
    for q_NHd, k_NJd in zip(q_THd.split(lengths), k_TJd.split(lengths), strict=True):
        q_JGd = q_NHd[query].float().view(num_key_heads, -1, q_NHd.shape[-1]) * scale
        logit_JGN = torch.bmm(q_JGd, k_NJd.float().permute(1, 2, 0))
        scores.append(logit_JGN.softmax(-1).mean((0, 1)))
    return torch.cat(scores)


def _received(q_SNHd: Tensor, k_SNHd: Tensor, scale: float, lse_HSN: Tensor | None) -> Tensor:
    """[S, N]. Loops over heads, query blocks, and as many segments at once as the buffer holds."""
    num_segments, num_tokens, num_heads, _ = q_SNHd.shape
    sum_SN = torch.zeros(num_segments, num_tokens, dtype=torch.float32, device=q_SNHd.device)
    for segments in _chunks(num_segments, min(num_tokens, _BLOCK_QUERIES) * num_tokens, q_SNHd.device):
        for head in range(num_heads):  # views with a stride: no copy of q or k into head-major order
            k_SdN = k_SNHd[segments, :, head].float().transpose(1, 2)
            for start in range(0, num_tokens, _BLOCK_QUERIES):
                q_SBd = q_SNHd[segments, start : start + _BLOCK_QUERIES, head].float() * scale
                logit_SBN = torch.bmm(q_SBd, k_SdN)
                if lse_HSN is None:
                    attention_SBN = logit_SBN.softmax(-1)
                else:
                    lse_SB = lse_HSN[head, segments, start : start + _BLOCK_QUERIES]
                    attention_SBN = logit_SBN.sub_(lse_SB[..., None]).exp_()
                sum_SN[segments] += attention_SBN.sum(1)
    return sum_SN / (num_heads * num_tokens)


def _causal_received(q_NHd: Tensor, k_NJd: Tensor, scope_N: Tensor, scale: float, normalised: bool) -> Tensor:
    """[N] for one request. Queries outside every scope are weighted 0, so that nothing waits for the device."""
    num_tokens, num_heads, width = q_NHd.shape
    num_key_heads = k_NJd.shape[1]
    num_groups = num_heads // num_key_heads
    step = max(1, _BLOCK_QUERIES // num_groups)
    device = q_NHd.device
    index_N = torch.arange(num_tokens, device=device)
    sum_N, bias_N, scope_size_N = (torch.zeros(num_tokens, dtype=torch.float32, device=device) for _ in range(3))
    for start in range(0, num_tokens, step):
        stop = min(start + step, num_tokens)
        row_B = index_N[start:stop]
        hidden_BN = index_N[None, :stop] > row_B[:, None]
        same_BN = (scope_N[start:stop, None] == scope_N[None]) & (scope_N[start:stop, None] >= 0)
        scope_size_N += same_BN.sum(0)
        counted_BN = (same_BN[:, :stop] & ~hidden_BN).float()
        bias_N[:stop] += (counted_BN / (row_B[:, None] + 1)).sum(0)
        q_BJGd = q_NHd[start:stop].view(stop - start, num_key_heads, num_groups, width)
        for heads in _chunks(num_key_heads, num_groups * (stop - start) * stop, device):
            q_JGBd = q_BJGd[:, heads].permute(1, 2, 0, 3).float() * scale
            k_JdN = k_NJd[:stop, heads].permute(1, 2, 0).float()
            logit_JGBN = torch.bmm(q_JGBd.flatten(1, 2), k_JdN).unflatten(1, (num_groups, -1))
            attention_JGBN = logit_JGBN.masked_fill_(hidden_BN, float("-inf")).softmax(-1)
            sum_N[:stop] += (attention_JGBN.sum((0, 1)) * counted_BN).sum(0)
    divisor_N = bias_N if normalised else scope_size_N
    return sum_N / (num_heads * torch.where(divisor_N > 0, divisor_N, 1.0))


def _chunks(count: int, numel_each: int, device: torch.device) -> Iterator[slice]:
    """Slices over ``count`` such that each one's buffer of ``numel_each`` floats a member stays within bounds."""
    bound = _CPU_BUFFER_NUMEL if device.type == "cpu" else _DEVICE_BUFFER_NUMEL
    step = max(1, bound // max(1, numel_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
