"""Paged attention in torch against the softmax formula: scattered blocks, blocks end to end, equally spaced rows."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from illava import VLM, ReductionPlan, Request, SamplingParams, load_preprocessor
from illava.attention.paged import paged_attention
from illava.decoder.kv_cache import PagedCache
from illava.plan import EMPTY_PLAN
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric

BLOCK_SIZE, NUM_KV_HEADS, WIDTH, NUM_BLOCKS = 4, 2, 8, 40


def drawn(tables, lengths):
    """Queries, pools that hold NaN but for the requests' keys, table, lengths; and what plain softmax gives."""
    torch.manual_seed(0)
    q = torch.randn(len(lengths), 4, WIDTH)
    pools = torch.full((2, NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, WIDTH), float("nan"))
    table, expected = torch.zeros(len(lengths), max(map(len, tables)), dtype=torch.int32), torch.empty_like(q)
    for row, n in enumerate(lengths):
        table[row, : len(tables[row])] = torch.tensor(tables[row])
        own = torch.randn(2, n, NUM_KV_HEADS, WIDTH)
        for i in range(n):
            pools[:, tables[row][i // BLOCK_SIZE], i % BLOCK_SIZE] = own[:, i]
        for head in range(4):
            k, v = own[:, :, head // 2]
            expected[row, head] = (k @ q[row, head] * 0.5).softmax(0) @ v
    return (q, *pools, table, torch.tensor(lengths, dtype=torch.int32)), expected


def places(tables):
    """Where the reference may begin to read in place."""
    return [t[0] * BLOCK_SIZE if t == list(range(t[0], t[0] + len(t))) else -1 for t in tables]


class Calls(TorchDispatchMode):
    """What was called, and how many keys attention read."""

    def __init__(self):
        super().__init__()
        self.names, self.num_keys = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._opname)
        if "scaled_dot_product" in func._opname:
            self.num_keys += args[1].shape[0] * args[1].shape[2]
        return func(*args, **(kwargs or {}))

    def count(self, word):
        return sum(word in name for name in self.names)


@pytest.mark.parametrize(
    ("tables", "lengths", "attended", "gathered"),
    [
        ([[7, 2, 9], [4], [11, 1]], (9, 1, 8), 3, 4),
        ([[7, 2, 9], [4, 1, 0], [11, 5, 3]], (9, 9, 9), 1, 2),
        ([[3, 4, 5], [9, 10, 11], [15, 16, 17]], (9, 9, 9), 1, 0),
        ([[15, 16, 17], [9, 10, 11], [3, 4, 5]], (9, 9, 9), 3, 0),
        ([[3, 4, 5], [9, 10, 11], [30, 31, 32]], (9, 9, 9), 2, 0),
        ([[3, 4, 5], [9, 10], [20, 1], [30]], (9, 5, 5, 2), 4, 2),
    ],
    ids=["scattered", "scattered, equal", "alike", "alike, backwards", "unevenly spaced", "mixed"],
)
def test_each_row_is_softmax_over_its_own_keys(tables, lengths, attended, gathered):
    args, expected = drawn(tables, lengths)
    with Calls() as calls:
        out = paged_attention(*args, scale=0.5, host_lengths=lengths, host_starts=places(tables))
    assert_close(out, expected)
    assert (calls.count("scaled_dot_product"), calls.count("index_select")) == (attended, gathered)
    unknown = paged_attention(*args, scale=0.5, host_lengths=lengths)
    assert_close(unknown, expected)


def test_the_cache_knows_whose_blocks_lie_end_to_end():
    cache = PagedCache(
        num_layers=2, num_kv_heads=1, head_dim=2, num_blocks=16, block_size=BLOCK_SIZE,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    for owner in "abc":
        cache.admit(owner, [8, 8])  # two blocks in each of two layers
    assert cache.batch("abc", [[5, 5]] * 3).host_starts == [[0, 16, 32], [8, 24, 40]]
    cache.free("a")
    cache.admit("c2", [8, 8])
    cache.free("c")
    cache.free("c2")  # free are now four blocks before b, and eight behind it
    cache.admit("d", [20, 20])
    starts = cache.batch("d", [[9, 9]]).host_starts
    tables = cache.batch("d", [[9, 9]]).table_LBM[:, 0].tolist()
    assert starts == [[start] for start in places(tables)]
    assert [-1] in starts
    cache.admit("e", [4, 4])
    cache.trim("d", [4, 4])  # one block a layer is left, which is always in place
    assert -1 not in [start for layer in cache.batch("d", [[3, 3]]).host_starts for start in layer]


def test_a_reduced_request_reads_fewer_keys_by_the_same_operations(onevision_folder):
    """A plan costs a decode step nothing: per layer the same calls, over less; nothing is gathered on either side."""
    family = VLM.from_pretrained(str(onevision_folder)).family
    steps = [
        {"stage": "vision_block", "layers": [2, 3], "reducer": {"kind": "illava", "num_merged": 6}},
        {"stage": "decoder_layer", "layers": [2], "reducer": {"kind": "illava", "keep_ratio": 0.5, "per": "prompt"}},
    ]
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 48, 64, 3), dtype=np.uint8)
    videos, sampling = map(load_preprocessor(str(onevision_folder)).video, frames), SamplingParams(6, min_new_tokens=6)
    requests = [Request(str(n), (video, "What happens?"), sampling) for n, video in enumerate(videos)]
    seen = []
    for plan in (EMPTY_PLAN, ReductionPlan.model_validate({"steps": steps})):
        vlm = VLM(family, kv_cache_bytes=8 << 20)
        for request in requests:
            vlm.submit(request, plan=plan)
        vlm.step()
        held = sum(n + len(state.token_ids) for state in vlm.engine._running for n in state.lengths)
        with Calls() as calls:
            vlm.step()
        assert calls.num_keys == held
        seen.append(calls)
    empty, reduced = seen
    assert reduced.names == empty.names
    assert reduced.num_keys < empty.num_keys
    assert empty.count("scaled_dot_product") == family.decoder.num_layers
    assert empty.count("index_select") == 0
