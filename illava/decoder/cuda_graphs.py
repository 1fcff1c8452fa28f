"""Captures decode steps as CUDA graphs, one per bucket of batch sizes, and replays them.

A composition of the running batch is copied into fixed tensors once; then every step is one replay. A graph's key is
its bucket, and whether keys have biases. `illava.decoder.decode` says what a step is, and why it may be replayed.

Shape suffixes: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from illava.attention.backend import kernels_on
from illava.decoder.decode import Embed, StaticInputs, StepInputs, decode_step
from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import PagedCache
from illava.errors import ModelLoadError


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits_BV: Tensor


class DecodeGraphs:
    """Holds the captured steps of one decoder over one cache; captures a bucket when a batch first needs it.

    Args:
        decoder: its layers are captured.
        embed: word embeddings, captured too.
        cache: its pools are read and written.
        max_batch: the largest batch.

    Raises:
        ModelLoadError: no CUDA device, or its paged attention is the torch reference, which reads lengths on the host;
            or the decoder has experts, whose products have been captured on no GPU yet.
    """

    def __init__(self, decoder: Decoder, embed: Embed, cache: PagedCache, *, max_batch: int) -> None:
        if not can_capture(decoder.device):
            raise ModelLoadError(
                f"decode steps cannot be captured on {decoder.device}: that takes CUDA and the Triton kernels, and "
                f"{kernels_on(decoder.device)} serves there; pass decode_graphs=None or False"
            )
        if decoder.has_experts:
            raise ModelLoadError(
                "decode steps of a mixture of experts are not captured: how many rows an expert gets is known on the "
                "device alone; pass decode_graphs=None or False"
            )
        self._decoder, self._embed, self._cache, self._max_batch = decoder, embed, cache, max_batch
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._static: StaticInputs | None = None
        self._pool = torch.cuda.graph_pool_handle()

    def load(self, inputs: StepInputs) -> tuple[StepInputs, Callable[[], Tensor]]:
        """Copy a composition into the fixed tensors; returns these tensors, and a step that gives logits [B, V].

        The next replay of any bucket overwrites the logits.
        """
        if self._static is None:
            num_axes = inputs.position_PB.shape[0]
            self._static = StaticInputs(self._decoder, self._cache, max_batch=self._max_batch, num_axes=num_axes)
        num_rows = inputs.token_B.shape[0]
        bucket, biased = bucket_of(num_rows, self._max_batch), inputs.blocks.num_biased_LB is not None
        captured = self._captured.get((bucket, biased))
        if captured is None:
            captured = self._captured[bucket, biased] = self._capture(self._static, bucket, biased=biased)
        self._static.load(inputs)

        def step() -> Tensor:
            captured.graph.replay()
            return captured.logits_BV[:num_rows]

        return self._static.rows(num_rows, biased=biased), step

    def _capture(self, static: StaticInputs, bucket: int, *, biased: bool) -> _Captured:
        """Run two steps on a stream of their own, so that libraries compile and allocate; then capture one."""
        inputs, current, warming = static.rows(bucket, biased=biased), torch.cuda.current_stream(), torch.cuda.Stream()
        static.clear()
        warming.wait_stream(current)
        with torch.cuda.stream(warming):
            for _ in range(2):
                decode_step(self._decoder, self._embed, self._cache, inputs)
        current.wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_BV = decode_step(self._decoder, self._embed, self._cache, inputs)
        return _Captured(graph, logits_BV)


def can_capture(device: torch.device) -> bool:
    """Whether decode steps can be captured there."""
    return device.type == "cuda" and kernels_on(device) == "triton"


def captures_steps(decoder: Decoder) -> bool:
    """Whether this decoder's steps are captured unless a user says otherwise."""
    return can_capture(decoder.device) and not decoder.has_experts


def bucket_of(num_rows: int, max_batch: int) -> int:
    """Rows of the graph that serves a batch: 1, 2, 4, then multiples of 8, the largest batch at most."""
    return min(next((size for size in (1, 2, 4) if num_rows <= size), -(-num_rows // 8) * 8), max_batch)
