"""Does the arithmetic of token reduction: packed tokens, sparse mixing matrices, and their application to tensors.

Pure torch functions on packed tensors. Knows nothing of attention, of models or of which tokens are worth keeping.

Shape suffixes: T tokens packed end to end, S segments, K kept tokens, D channels, E edges, G mixed rows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from illava.host_copies import constant_on, device_cache, to_device


@dataclass(frozen=True, slots=True)
class Tokens:
    """Holds tokens of several segments, packed end to end without padding.

    Attributes:
        hidden_TD: residual stream.
        lengths: tokens per segment, host integers, ``sum(lengths) == T``. Counts that a plan fixes never need a
            device round trip, so they live on the host.
        coord_T3: int64 (frame, row, col) of each token; separators have row = col = -1.
    """

    hidden_TD: Tensor
    lengths: tuple[int, ...]
    coord_T3: Tensor


@dataclass(frozen=True, slots=True)
class Assignment:
    """A sparse mixing matrix [K, T]: the input tokens that each output token is made of.

    Row k is a copy of input ``kept_K[k]`` unless k occurs in ``target_G``; then it is the weighted sum of its edges
    (and only of these), at the coordinates of ``kept_K[k]``. Pruning has no edges, merging has one group per merged
    token, clustering one group per cluster, many-to-many several groups that share sources.

    Attributes:
        num_tokens: T, the length before.
        lengths: kept tokens per segment, host integers, ``sum(lengths) == K``.
        kept_K: int64, ascending: the input token whose coordinates each output token takes.
        source_E: int64 input tokens, grouped by row in the order of ``target_G``.
        weight_E: float32.
        target_G: int64 output rows that are mixtures, each once.
        size_G: int64 edges per mixed row, ``sum(size_G) == E``.
        group_size: E // G where all groups have the same size, else None; lets `merge` run as one product.
        keeps_content: the host knows that every input token is kept or a source, so that each has a representative.
    """

    num_tokens: int
    lengths: tuple[int, ...]
    kept_K: Tensor
    source_E: Tensor
    weight_E: Tensor
    target_G: Tensor
    size_G: Tensor
    group_size: int | None = None
    keeps_content: bool = False

    @property
    def num_kept(self) -> int:
        return self.kept_K.shape[0]

    def to(self, device: torch.device) -> Assignment:
        """The same on another device."""
        kept_K, source_E, weight_E, target_G, size_G = (
            to_device(value, device)
            for value in (self.kept_K, self.source_E, self.weight_E, self.target_G, self.size_G)
        )
        return replace(self, kept_K=kept_K, source_E=source_E, weight_E=weight_E, target_G=target_G, size_G=size_G)

    def matrix(self) -> Tensor:
        """The mixing matrix as a coalesced sparse COO tensor, [K, T] float32."""
        copied_K = torch.ones(self.num_kept, dtype=torch.bool, device=self.kept_K.device)
        copied_K[self.target_G] = False
        copy_row = copied_K.nonzero().squeeze(1)
        row = torch.cat([copy_row, self.target_G.repeat_interleave(self.size_G)])
        col = torch.cat([self.kept_K[copy_row], self.source_E])
        value = torch.cat([torch.ones_like(copy_row, dtype=torch.float32), self.weight_E])
        size = (self.num_kept, self.num_tokens)
        return torch.sparse_coo_tensor(torch.stack([row, col]), value, size, check_invariants=False).coalesce()


def prune(kept_K: Tensor, lengths: tuple[int, ...], num_tokens: int) -> Assignment:
    """Make the assignment that keeps ``kept_K`` (int64, ascending) unchanged and discards the rest."""
    none = kept_K.new_empty(0)
    return Assignment(num_tokens, lengths, kept_K, none, none.float(), none, none)


def identity(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Assignment:
    """Make the assignment that changes nothing."""
    total = sum(lengths)
    return prune(torch.arange(total, device=device), lengths, total)


def assign_to_representatives(representative_T: Tensor, lengths: tuple[int, ...]) -> Assignment:
    """Keep the cells that represent themselves; make every other cell an edge of weight 0 of its representative.

    Kept cells are unchanged; the edges say which kept cell shows the content of a dropped cell. A cell whose
    representative is -1 has none.
    """
    index_T = torch.arange(representative_T.shape[0], device=representative_T.device)
    is_kept_T = representative_T == index_T
    kept_K, owned_E = is_kept_T.nonzero().squeeze(1), (representative_T >= 0).nonzero().squeeze(1)
    row_E = torch.searchsorted(kept_K, representative_T[owned_E])
    source_E = owned_E[torch.argsort(row_E, stable=True)]
    kept = tuple(int(own_T.sum()) for own_T in is_kept_T.split(lengths))
    rows_K = torch.arange(kept_K.shape[0], device=representative_T.device)
    size_K = torch.bincount(row_E, minlength=kept_K.shape[0])
    return Assignment(representative_T.shape[0], kept, kept_K, source_E, is_kept_T[source_E].float(), rows_K, size_K)


def merge(assignment: Assignment, hidden_TD: Tensor) -> Tensor:
    """Apply the mixing matrix: [T, D] -> [K, D] in the input's dtype; mixtures are summed in float32."""
    out_KD = hidden_TD.index_select(0, assignment.kept_K)
    num_groups = assignment.target_G.shape[0]
    if num_groups == 0:
        return out_KD
    if assignment.group_size is not None:
        source_ED = hidden_TD.index_select(0, assignment.source_E).float()
        weight_G1m = assignment.weight_E.view(num_groups, 1, assignment.group_size)
        mixed_GD = torch.bmm(weight_G1m, source_ED.view(num_groups, assignment.group_size, -1)).squeeze(1)
    else:
        start_G = assignment.size_G.cumsum(0) - assignment.size_G
        mixed_GD = torch.nn.functional.embedding_bag(  # gathers, weighs and sums in one pass, with no host round trip
            assignment.source_E, hidden_TD.float(), start_G, mode="sum", per_sample_weights=assignment.weight_E
        )
    return out_KD.index_copy_(0, assignment.target_G, mixed_GD.to(out_KD.dtype))


def gather_kept(assignment: Assignment, value_T: Tensor) -> Tensor:
    """Gather the kept tokens' values (coordinates, ids): [T, ...] -> [K, ...]; a mixture takes its kept token's."""
    return value_T.index_select(0, assignment.kept_K)


def compose(first_KT: Tensor, then_MK: Tensor) -> Tensor:
    """Chain two mixing matrices (sparse, float32): ``then @ first``, [M, T]. Used for patch-to-token traces."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # the product goes through it inside
        return torch.sparse.mm(then_MK, first_KT).coalesce()


def cluster(into_T: Tensor, weight_T: Tensor, lengths: tuple[int, ...], kept: tuple[int, ...]) -> Assignment:
    """Make the assignment of a partition: each group becomes its weighted mean, at its representative's coordinates.

    Every token is an edge and every row a mixture (a group of one has weight exactly 1), so that the counts stay host
    integers whatever the grouping.

    Args:
        into_T: int64, the representative each token joins, in its own segment; a representative joins itself.
        weight_T: float32, positive; normalised here within each group.
        lengths: tokens per segment.
        kept: representatives per segment, host integers.
    """
    own_T = into_T == torch.arange(into_T.shape[0], device=into_T.device)
    kept_K = torch.argsort(~own_T, stable=True)[: sum(kept)]
    row_T = (torch.cumsum(own_T, 0) - 1).index_select(0, into_T)
    source_E = torch.argsort(row_T, stable=True)
    row_E = row_T[source_E]
    size_G = torch.zeros_like(kept_K).index_add_(0, row_T, torch.ones_like(row_T))
    weight_E = weight_T.float()[source_E]
    weight_E = weight_E / _group_sums(weight_E, size_G)[row_E]
    target_G = torch.arange(sum(kept), device=into_T.device)
    return Assignment(sum(lengths), kept, kept_K, source_E, weight_E, target_G, size_G, keeps_content=True)


def merged_sizes(assignment: Assignment, size_T: Tensor) -> Tensor:
    """How many original tokens are merged into each output token, float32 [K]: a mixture adds up all its sources."""
    size_K = gather_kept(assignment, size_T.float())
    if assignment.target_G.shape[0] == 0:
        return size_K
    edge_E = size_T.float().index_select(0, assignment.source_E)
    return size_K.index_copy_(0, assignment.target_G, _group_sums(edge_E, assignment.size_G))


def _group_sums(value_E: Tensor, size_G: Tensor) -> Tensor:
    """Sum of each group's edges: [E] -> [G]. ``unsafe`` leaves out checks that would wait for the device."""
    return torch.segment_reduce(value_E, "sum", lengths=size_G, axis=0, unsafe=True)


def embed_in_batch(
    assignment: Assignment,
    index_N: Tensor,
    num_tokens: int,
    lengths: tuple[int, ...],
    *,
    dropped_X: Tensor | None = None,
) -> Assignment:
    """Embed an assignment over a subset of tokens in the whole packed batch; all other tokens are kept.

    Args:
        assignment: over the N tokens at ``index_N``.
        index_N: int64, ascending indices of that subset among ``num_tokens`` tokens.
        num_tokens: tokens of the whole batch.
        lengths: kept tokens per segment of the whole batch (host integers).
        dropped_X: int64, indices of other tokens that are discarded all the same.
    """
    keep_T = torch.ones(num_tokens, dtype=torch.bool, device=index_N.device)
    keep_T[index_N] = False
    keep_T[index_N.index_select(0, assignment.kept_K)] = True
    if dropped_X is not None:
        keep_T[dropped_X] = False
    # A stable sort brings the kept tokens to the front in order: no nonzero(), so no host round trip.
    kept_K = torch.argsort(~keep_T, stable=True)[: sum(lengths)]
    row_T = torch.cumsum(keep_T, 0) - 1
    target_G = row_T[index_N[assignment.kept_K[assignment.target_G]]]
    source_E = index_N.index_select(0, assignment.source_E)
    return replace(
        assignment, num_tokens=num_tokens, lengths=lengths, kept_K=kept_K, source_E=source_E, target_G=target_G
    )


@device_cache(64)
def ragged_index(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Flat int64 indices of the first ``lengths[s]`` cells of each row of an [S, width] table, kept on ``device``."""
    with torch.inference_mode(False):  # cached, and training may use what inference made
        parts = [torch.arange(n) + row * width for row, n in enumerate(lengths)]
        return to_device(torch.cat([torch.empty(0, dtype=torch.long), *parts]), device)


def pad(value_T: Tensor, lengths: tuple[int, ...], fill: float) -> Tensor:
    """Ragged [T, ...] -> [S, max(lengths), ...], short segments filled. A view where all lengths are equal."""
    width = max(lengths, default=0)
    shape = (len(lengths), width, *value_T.shape[1:])
    if all(n == width for n in lengths):
        return value_T.reshape(shape)
    padded = value_T.new_full((len(lengths) * width, *value_T.shape[1:]), fill)
    return padded.index_copy_(0, ragged_index(lengths, width, value_T.device), value_T).view(shape)


def unpad(value_SN: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """The first ``lengths[s]`` cells of each row, end to end: [S, N, ...] -> [sum(lengths), ...]."""
    return value_SN.flatten(0, 1).index_select(0, ragged_index(lengths, value_SN.shape[1], value_SN.device))


def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Start of each segment: int64 [S]."""
    return constant_on(list(accumulate(lengths, initial=0))[: len(lengths)], device, torch.long)
