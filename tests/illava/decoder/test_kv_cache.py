"""Block accounting of the key/value pool."""

import random

import pytest
import torch

from illava.decoder.kv_cache import PagedCache


def make_cache(num_blocks=60, block_size=4, num_layers=3):
    return PagedCache(
        num_layers=num_layers, num_kv_heads=1, head_dim=2, num_blocks=num_blocks, block_size=block_size,
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip


def test_admission_takes_the_sum_over_layers_of_pages():
    cache = make_cache()
    cache.admit("a", [9, 9, 4])
    assert cache.num_free_blocks == 60 - (3 + 3 + 1)
    cache.admit("b", [1, 0, 0])
    assert cache.num_free_blocks == 60 - 7 - 1
    cache.check()
    cache.free("a")
    cache.free("a")
    assert cache.num_free_blocks == 59
    cache.check()


def test_admission_beyond_the_pool_changes_nothing():
    cache = make_cache(num_blocks=5)
    with pytest.raises(MemoryError, match="needs 6 blocks, 5 are free"):
        cache.admit("a", [8, 8, 8])
    assert cache.num_free_blocks == 5
    cache.check()


def test_no_block_is_lost_or_shared_whatever_the_order():
    cache, held, rng = make_cache(num_blocks=200), {}, random.Random(0)
    for step in range(300):
        if held and rng.random() < 0.45:
            cache.free(held.pop(rng.choice(list(held)))[0])
        else:
            lengths = sorted((rng.randint(1, 40) for _ in range(3)), reverse=True)
            if cache.num_blocks_for(lengths) <= cache.num_free_blocks:
                cache.admit(step, lengths)
                held[step] = step, lengths
                if rng.random() < 0.3:
                    held[step] = step, [max(1, n // 2) for n in lengths]
                    cache.trim(step, held[step][1])
        cache.check()
        taken = sum(cache.num_blocks_for(lengths) for _, lengths in held.values())
        assert cache.num_free_blocks == 200 - taken


def test_the_check_sees_a_block_given_back_twice():
    cache = make_cache()
    cache.admit("a", [4, 4, 4])
    cache._give_back(cache._blocks_of["a"].blocks())
    with pytest.raises(RuntimeError, match="60 blocks"):
        cache.check()


def test_what_is_written_is_found_through_the_tables():
    cache = make_cache()
    cache.admit("gone", [7, 7, 7])
    cache.admit("a", [6, 6, 3])
    cache.free("gone")
    cache.admit("b", [9, 9, 9])
    blocks = cache.batch(["a", "b"], [[5, 5, 2], [8, 8, 8]])
    for layer, lengths in enumerate([(5, 8), (5, 8), (2, 8)]):
        slots = cache.prompt_slots(blocks.table_LBM[layer], lengths)
        tag = torch.arange(sum(lengths)) + 100.0 * layer
        cache.write(slots, tag[:, None, None].expand(-1, 1, 2), -tag[:, None, None].expand(-1, 1, 2))
    blocks.grow()
    assert blocks.host_lengths == [[6, 9], [6, 9], [3, 9]]
    assert blocks.length_LB.tolist() == blocks.host_lengths
    for layer, slots in enumerate(cache.last_slots(blocks)):
        tag = torch.tensor([1000.0 + layer, 2000.0 + layer])[:, None, None].expand(-1, 1, 2)
        cache.write(slots, tag, -tag)
    for layer, (first, second) in enumerate([(5, 8), (5, 8), (2, 8)]):
        for row, (start, n) in enumerate([(0, first), (first, second)]):
            keys = cache.k_pool_PSGd[blocks.table_LBM[layer, row].long()].view(-1, 2)[: n + 1, 0]
            expected = [100.0 * layer + start + i for i in range(n)] + [1000.0 * (row + 1) + layer]
            assert keys.tolist() == expected


def test_what_two_owners_have_in_common_is_shared_by_blocks_and_the_rest_copied():
    """Layers may have different numbers in common; the second owner's writes never reach the first one's blocks."""
    cache = make_cache()
    prefix_lengths, lengths = [9, 9, 4], [13, 13, 6]
    cache.admit("a", lengths)
    first = cache.batch(["a"], [prefix_lengths])
    for layer, n in enumerate(prefix_lengths):
        tag = (100.0 * layer + torch.arange(n))[:, None, None].expand(-1, 1, 2)
        cache.write(cache.prompt_slots(first.table_LBM[layer], (n,)), tag, -tag)
    free = cache.num_free_blocks
    cache.admit("b", lengths, prefix_from="a", prefix_lengths=prefix_lengths)
    assert free - cache.num_free_blocks == (4 - 2) + (4 - 2) + (2 - 1)
    cache.check()
    both = cache.batch(["a", "b"], [prefix_lengths, prefix_lengths])
    assert (both.table_LBM[:, 0] != both.table_LBM[:, 1]).sum(1).tolist()[0] == 2
    for layer, n in enumerate(prefix_lengths):
        slots = cache.span_slots(both.table_LBM[layer], ((1, n, n + 1),))
        cache.write(slots, torch.full((1, 1, 2), -7.0), torch.full((1, 1, 2), 7.0))
        for row in (0, 1):
            keys, values = cache.read(cache.span_slots(both.table_LBM[layer], ((row, 0, n),)))
            assert keys[:, 0, 0].tolist() == [100.0 * layer + i for i in range(n)]
            assert torch.equal(values, -keys)
    cache.free("a")
    cache.free("b")
    assert cache.num_free_blocks == 60
    with pytest.raises(ValueError, match="none of its own"):
        cache.admit("c", [4, 4, 4], prefix_from="b", prefix_lengths=[4, 4, 4])


def starts(cache, owners):
    """Of each layer, the flat place where each owner's blocks begin; -1 where they do not lie end to end."""
    return cache.batch(owners, [[1] * cache.num_layers] * len(owners)).host_starts


def test_a_pool_that_has_served_other_batches_serves_the_next_as_the_first_one():
    """Lengths change from batch to batch (plans, clips) and requests end in any order: rows are still alike."""
    cache, rng = make_cache(num_blocks=200), random.Random(0)
    for lengths in [[30, 30, 30], [30, 12, 7], [9, 9, 9], [22, 5, 5]] * 3:
        owners = list("abcdefgh")
        for owner in owners:
            cache.admit(owner, lengths)
        needed = cache.block_size * cache.num_blocks_for(lengths)
        assert starts(cache, owners)[0][0] == 0
        for of_layer in starts(cache, owners):
            assert of_layer == [of_layer[0] + n * needed for n in range(8)]
        for owner in rng.sample(owners, 8):
            cache.free(owner)
            cache.check()


def test_blocks_lie_in_pieces_only_where_no_run_of_free_ones_is_long_enough():
    cache = make_cache(num_blocks=18)
    for owner in "abc":
        cache.admit(owner, [8, 8, 8])  # six blocks each
    cache.free("a")
    cache.free("c")  # twelve are free, six before b and six behind it
    cache.admit("layers", [16, 12, 4])  # no run holds eight; one each holds the first layer and the second
    assert starts(cache, ["layers"]) == [[0], [48], [16]]
    cache.admit("pieces", [0, 4, 12])  # one block is left before b, three behind it: they hold all of it
    assert starts(cache, ["pieces"])[1:] == [[20], [60]]
    cache.check()
    cache.free("pieces")
    cache.admit("in two", [0, 0, 16])
    assert starts(cache, ["in two"])[2] == [-1]
    cache.check()
    assert cache.num_free_blocks == 0


def test_a_request_is_not_scattered_over_holes_where_one_run_holds_all_of_it():
    cache = make_cache(num_blocks=40)
    for owner in ("hole", "stays"):
        cache.admit(owner, [12, 12, 12])
    cache.free("hole")  # nine blocks
    for owner in "ab":
        cache.admit(owner, [20, 12, 8])  # ten, of which any layer would fit the hole
    assert starts(cache, "ab") == [[72, 112], [92, 132], [104, 144]]
