"""A decode step over fixed tensors may be replayed: the same operations on the same places whatever the batch.

The Triton launches are recorded, not run; what they compute is tested in tests/support/kernels/interpreted.py.
"""

from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from illava.attention import paged as paged_attention
from illava.decoder.decode import StaticInputs, decode_step
from tests.support.decoder_cases import composition, make_decoder

READS_BACK = {"_local_scalar_dense", "item", "nonzero", "_unique2", "masked_select", "is_nonzero", "equal"}


def described(value):
    return (tuple(value.shape), value.stride()) if isinstance(value, torch.Tensor) else value


class Operations(TorchDispatchMode):
    """What a stretch of work asks of the device: operations, shapes and strides in and out, and plain arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.append((func._opname, *(str(tree_map(described, part)) for part in (args, kwargs, result))))
        return result

    def kernel(self, name):
        """Stands for a Triton kernel: a launch is one more operation, with its grid."""
        operations = self

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **meta: operations.seen.append((name, grid, str(tree_map(described, args)), meta))

        return Kernel()


def fixed_step(operations, lengths, monkeypatch, *, biased=False):
    """One recorded step of a bucket of four, and where its inputs lie."""
    from illava.attention import triton_paged as paged_decode

    decoder, embed = make_decoder()
    cache, inputs = composition(lengths)
    if biased:
        cache.write_bias(torch.arange(3), torch.ones(3))
        num_biased = [[1] * len(lengths)] * 2
        blocks = replace(inputs.blocks, num_biased_LB=torch.tensor(num_biased), host_num_biased=num_biased)
        inputs = replace(inputs, blocks=blocks)
    static = StaticInputs(decoder, cache, max_batch=8, num_axes=1)
    static.load(inputs)
    monkeypatch.setattr(paged_attention, "kernels_on", lambda device: "triton")
    for name in ("_attend_split", "_join_splits"):
        monkeypatch.setattr(paged_decode, name, operations.kernel(name))
    places = [value.data_ptr() for value in vars(static).values() if isinstance(value, torch.Tensor)]
    with operations:
        decode_step(decoder, embed, cache, static.rows(4, biased=biased))
    assert places == [value.data_ptr() for value in vars(static).values() if isinstance(value, torch.Tensor)]
    assert static._position_PB[0, : len(lengths)].tolist() == [n + 1 for n in lengths]
    assert static._length_LB[0, : len(lengths)].tolist() == [n + 1 for n in lengths]
    return operations.seen


@torch.inference_mode()
def test_a_fixed_step_is_the_same_operations_for_every_batch_and_reads_nothing_back(monkeypatch):
    first, second = (fixed_step(Operations(), lengths, monkeypatch) for lengths in ((3,), (130, 20, 65)))
    assert first == second
    names = [name for name, *_ in first]
    assert names.count("_attend_split") == names.count("_join_splits") == 2
    assert len(names) > 50
    assert not READS_BACK & set(names)


@torch.inference_mode()
def test_a_step_over_biased_keys_is_the_same_operations(monkeypatch):
    """The kernel reads one number more a key; the step does nothing more, and writes no bias."""
    plain = fixed_step(Operations(), (130, 20, 65), monkeypatch)
    biased, again = (fixed_step(Operations(), lengths, monkeypatch, biased=True) for lengths in ((3,), (130, 20, 65)))
    assert biased == again
    views = {"slice", "select"}
    plain, biased = ([own for own in seen if own[0] not in views] for seen in (plain, biased))
    assert [name for name, *_ in plain] == [name for name, *_ in biased]
    others = [[own for own in seen if own[0] != "_attend_split"] for seen in (plain, biased)]
    assert others[0] == others[1]
    told = [[own[-1]["BIASED"] for own in seen if own[0] == "_attend_split"] for seen in (plain, biased)]
    assert told == [[False] * 2, [True] * 2]


@torch.inference_mode()
def test_the_twin_is_seen_to_depend_on_lengths():
    """That the recorder can fail: the reference gathers as many blocks as a request holds."""
    decoder, embed = make_decoder()
    traces = []
    for lengths in ((3,), (130,)):
        cache, inputs = composition(lengths)
        with Operations() as operations:
            decode_step(decoder, embed, cache, inputs)
        traces.append(operations.seen)
    assert traces[0] != traces[1]


@torch.inference_mode()
def test_rows_that_fill_a_bucket_write_to_the_null_block_only():
    decoder, _ = make_decoder()
    cache, inputs = composition((3,))
    static = StaticInputs(decoder, cache, max_batch=8, num_axes=1)
    static.load(inputs)
    blocks = static.rows(4).blocks
    for _ in range(20):  # beyond the first block of a table
        blocks.grow()
        slot_LB = cache.last_slots(blocks)
        assert (slot_LB[:, 1:] // cache.block_size == cache.num_blocks).all()
    assert cache.k_pool_PSGd.shape[0] == cache.num_blocks + 1
