"""Lets captured decode steps run on CPU: a replay does the step's operations again, over the same fixed tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from illava.attention.paged import paged_attention
from illava.decoder import cuda_graphs, decoder


class _Again:
    def __init__(self, device):
        pass

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def _by_device_lengths(q, k_pool, v_pool, table, length_B, *, num_biased_B=None, **options):
    """The kernel's stand-in: it reads counts on the device, where a captured step has them."""
    options |= {"host_lengths": length_B.tolist(), "host_starts": None}
    options["host_num_biased"] = None if num_biased_B is None else num_biased_B.tolist()
    return paged_attention(q, k_pool, v_pool, table, length_B, num_biased_B=num_biased_B, **options)


@contextmanager
def replayed_on_cpu() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda_graphs, "can_capture", return_value=True))
        stack.enter_context(mock.patch.object(cuda_graphs, "_Recorder", _Again))
        stack.enter_context(mock.patch.object(decoder, "paged_attention", _by_device_lengths))
        yield
