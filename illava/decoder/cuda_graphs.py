"""Captures decode steps as CUDA graphs, one per bucket of batch sizes, and replays them.

A composition of the running batch is copied into fixed tensors once; then every step is one replay. A graph's key is
its bucket, and whether keys have biases. `illava.decoder.decode` says what a step is, and why it may be replayed.

Shape suffixes: B requests, V vocabulary, R rows of a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from illava.attention.backend import kernels_on
from illava.decoder.decode import Embed, StaticInputs, Step, StepInputs, decode_step
from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import PagedCache
from illava.errors import ModelLoadError, is_out_of_memory

_DRAWN_ROWS = 3

Draw = Callable[[Tensor], Tensor]  # logits [B, V] -> int64 [R, B]: tokens, and R - 1 rows of what is told of them


class DecodeGraphs:
    """Holds the captured steps of one decoder over one cache.

    A step holds the greedy draw, too, whose tokens are the next step's input: a batch of greedy rows is replayed step
    after step without another operation. Other batches draw from the logits, and put their own tokens in their place.

    Args:
        decoder: its layers are captured.
        embed: word embeddings, captured too.
        cache: its pools are read and written.
        draw: the greedy draw.
        max_batch: the largest batch.

    Raises:
        ModelLoadError: no CUDA device, or its paged attention is the torch reference, which reads lengths on the host;
            or the decoder has experts, whose products have been captured on no GPU yet.
    """

    def __init__(self, decoder: Decoder, embed: Embed, cache: PagedCache, *, draw: Draw, max_batch: int) -> None:
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
        self._decoder, self._embed, self._cache, self._draw = decoder, embed, cache, draw
        self._max_batch = max_batch
        self._static = StaticInputs(decoder, cache, max_batch=max_batch, num_axes=decoder.num_position_axes)
        shape, device = (max_batch, decoder.num_tokens), decoder.device
        self._logits_BV = torch.empty(
            shape, dtype=decoder.dtype, device=device
        )  # of all buckets: one step runs at a time
        self._drawn_RB = torch.empty(_DRAWN_ROWS, max_batch, dtype=torch.int64, device=device)
        self._replay: dict[tuple[int, bool], Callable[[], None]] = {}
        self._recorder = _Recorder(device)

    def capture(self) -> None:
        """Capture every bucket over keys without biases, the largest first; the others are when a batch needs them.

        So memory runs out before any request is taken, and no request waits for a capture.

        Raises:
            ModelLoadError: it ran out; says what to lower.
        """
        try:
            for bucket in reversed(buckets(self._max_batch)):
                self._step_of(bucket, biased=False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise ModelLoadError(
                f"the device's memory ran out while decode steps of up to {self._max_batch} requests were captured, "
                f"beside a key/value pool of {self._cache.num_bytes / 1e9:.3g} GB: lower kv_cache_bytes or "
                "max_batch_requests, or pass decode_graphs=False, which is slower"
            ) from error

    def load(self, inputs: StepInputs) -> tuple[StepInputs, Step]:
        """Copy a composition into the fixed tensors; returns these tensors, and its step.

        The next replay of any bucket overwrites logits and draw, which is given for all rows: it is copied whole.
        """
        num_rows, biased = inputs.token_B.shape[0], inputs.blocks.num_biased_LB is not None
        replay = self._step_of(bucket_of(num_rows, self._max_batch), biased=biased)
        self._static.load(inputs)

        def step() -> tuple[Tensor, Tensor | None]:
            replay()
            return self._logits_BV[:num_rows], self._drawn_RB

        return self._static.rows(num_rows, biased=biased), step

    def _step_of(self, bucket: int, *, biased: bool) -> Callable[[], None]:
        if (bucket, biased) not in self._replay:
            self._static.clear()
            self._replay[bucket, biased] = self._recorder.record(partial(self._step, bucket, biased=biased))
        return self._replay[bucket, biased]

    def _step(self, bucket: int, *, biased: bool) -> None:
        inputs = self._static.rows(bucket, biased=biased)
        logits_BV = decode_step(self._decoder, self._embed, self._cache, inputs)
        drawn_RB = self._draw(logits_BV)
        inputs.token_B.copy_(drawn_RB[0])
        self._drawn_RB[:, :bucket] = drawn_RB
        self._logits_BV[:bucket] = logits_BV


class _Recorder:
    """Records work as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._pool = device, torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do it twice on a stream of its own, so that libraries compile and allocate; then capture it for replays."""
        current, warming = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        warming.wait_stream(current)
        with torch.cuda.stream(warming):
            for _ in range(2):
                work()
        current.wait_stream(warming)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


def can_capture(device: torch.device) -> bool:
    """Whether decode steps can be captured there."""
    return device.type == "cuda" and kernels_on(device) == "triton"


def captures_steps(decoder: Decoder) -> bool:
    """Whether this decoder's steps are captured unless a user says otherwise."""
    return can_capture(decoder.device) and not decoder.has_experts


def bucket_of(num_rows: int, max_batch: int) -> int:
    """Rows of the graph that serves a batch: the least of `buckets` that hold it."""
    return next(size for size in buckets(max_batch) if num_rows <= size)


@lru_cache(maxsize=8)
def buckets(max_batch: int) -> tuple[int, ...]:
    """Sizes that are captured, ascending: 1, 2, 4, multiples of 8 up to 64, of 16 up to 128, of 32; the last is the
    largest batch itself. Less than a quarter of the rows of a batch beyond 32 only fill up.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, max_batch + 32, 32)]
    return (*(size for size in sizes if size < max_batch), max_batch)
