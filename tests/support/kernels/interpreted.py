"""The Triton kernels against their torch references, under Triton's interpreter; test_kernels.py runs this file.

The interpreter is chosen when triton is imported, which another test of the process may have done before.
"""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from illava.attention import triton_scores
from illava.attention.backend import kernels_on
from illava.attention.paged import paged_attention
from illava.attention.scores import attention_received, causal_attention_received
from illava.decoder import decoder as decoder_module
from illava.decoder import layer_ops, triton_layers
from illava.decoder.decode import StaticInputs, decode_step
from illava.decoder.kv_cache import PagedCache
from illava.decoder.layer_ops import add_rms_norm, rotate_and_write, silu_mul
from illava.engine.sampling import draw_greedy
from tests.illava.families import test_vlm_parity as tiled
from tests.illava.families.qwen import test_qwen_parity as native
from tests.support.closeness import assert_close
from tests.support.decoder_cases import composition, make_decoder
from tests.support.models.fused_logits import check_roundings, first_logits

CPU = torch.device("cpu")
HALF, ONE_ROUNDING = torch.float16, 2**-10  # of the largest value


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Kernels by default; `reference` of a call forces the other."""
    monkeypatch.setenv("ILLAVA_KERNELS", "triton")


def reference(function, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ILLAVA_KERNELS", "torch")
        kernels_on.cache_clear()
        result = function(*args, **kwargs)
    kernels_on.cache_clear()
    return result


def paged(lengths, *, heads, kv_heads, width, block_size, dtype=torch.float32):
    """Scattered blocks; whatever no request holds is NaN."""
    draw = torch.Generator().manual_seed(0)
    num_blocks = sum(-(-n // block_size) for n in lengths) + 2
    order = torch.randperm(num_blocks, generator=draw).tolist()
    pools = torch.full((2, num_blocks, block_size, kv_heads, width), float("nan"))
    table = torch.zeros(len(lengths), max(-(-n // block_size) for n in lengths) + 1, dtype=torch.int32)
    for row, n in enumerate(lengths):
        for i in range(n):
            if i % block_size == 0:
                table[row, i // block_size] = order.pop()
            pools[:, table[row, i // block_size], i % block_size] = torch.randn(2, kv_heads, width, generator=draw)
    q = torch.randn(len(lengths), heads, width, generator=draw)
    k_pool, v_pool = pools.to(dtype)
    length = torch.tensor(lengths, dtype=torch.int32)
    return (q.to(dtype), k_pool, v_pool, table, length), {"scale": width**-0.5, "host_lengths": lengths}


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width", "block_size"),
    [((1,), 4, 2, 8, 4), ((65, 3, 64), 7, 1, 16, 16), ((130, 1), 2, 2, 24, 16), ((2113,), 3, 1, 32, 16)],
    ids=["one key", "groups of seven", "odd width, no sharing", "two blocks in a split"],
)
def test_paged_decode_is_its_reference(lengths, heads, kv_heads, width, block_size):
    args, kwargs = paged(lengths, heads=heads, kv_heads=kv_heads, width=width, block_size=block_size)
    out = paged_attention(*args, **kwargs)
    assert_close(out, reference(paged_attention, *args, **kwargs))


def test_paged_decode_with_biased_keys_is_its_reference():
    """Only the prompt's keys have a bias: behind them, and in a request without, the pool of biases holds NaN."""
    lengths, num_biased = (130, 20, 65), (70, 0, 65)
    args, kwargs = paged(lengths, heads=4, kv_heads=2, width=16, block_size=8)
    table, bias_pool = args[3], torch.full(args[1].shape[:2], float("nan"))
    for row, n in enumerate(num_biased):
        for i in range(n):
            bias_pool[table[row, i // 8], i % 8] = (i * 7 % 13) / 3
    biases = {
        "bias_pool_PS": bias_pool,
        "num_biased_B": torch.tensor(num_biased, dtype=torch.int32),
        "host_num_biased": num_biased,
    }
    out, plain = paged_attention(*args, **kwargs, **biases), paged_attention(*args, **kwargs)
    assert_close(out, reference(paged_attention, *args, **kwargs, **biases))
    assert torch.equal(out[1], plain[1])
    assert (out[[0, 2]] - plain[[0, 2]]).abs().max() > 0.1


def test_paged_decode_in_half_precision_accumulates_in_float32():
    """Not in bfloat16: the interpreter of triton 3.9 multiplies its bits as integers."""
    args, kwargs = paged((700,), heads=2, kv_heads=1, width=16, block_size=16, dtype=torch.float16)
    exact = reference(paged_attention, *(x.float() if x.is_floating_point() else x for x in args), **kwargs)
    out = paged_attention(*args, **kwargs)
    assert out.dtype == torch.float16
    assert_close(out.float(), exact, tolerance=1e-3)


def test_a_row_does_not_depend_on_its_batch():
    (q, k_pool, v_pool, table, length), kwargs = paged((130, 7), heads=2, kv_heads=1, width=16, block_size=8)
    together = paged_attention(q, k_pool, v_pool, table, length, **kwargs)
    for row in range(2):
        own = slice(row, row + 1)
        alone = paged_attention(q[own], k_pool, v_pool, table[own], length[own], **kwargs)
        assert torch.equal(alone, together[own])


def qk(num_tokens, *, heads=2, key_heads=2, width=6):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(num_tokens, n, width, generator=draw) * 2 for n in (heads, key_heads))
    return q, k


@pytest.mark.parametrize("lengths", [(1,), (64, 65), (30, 30)])
def test_attention_received_is_its_reference(lengths):
    q, k = qk(sum(lengths))
    score = attention_received(q, k, lengths, scale=0.4)
    assert_close(score, reference(attention_received, q, k, lengths, scale=0.4))
    assert_close(torch.stack([part.sum() for part in score.split(lengths)]), torch.ones(len(lengths)))


def test_attention_received_with_a_bias_and_strided_keys_is_its_reference():
    q, k = qk(2 * 70)
    args, bias = (q[::2], k[::2], (40, 30)), torch.linspace(0, 2, 70)
    score = attention_received(*args, scale=0.4, key_bias_T=bias)
    expected = reference(attention_received, *args, scale=0.4, key_bias_T=bias)
    assert_close(score, expected)


def test_with_the_attention_s_log_sum_exps_the_first_pass_is_left_out(monkeypatch):
    lengths = (70, 30)
    q, k = qk(sum(lengths))
    expected = attention_received(q, k, lengths, scale=0.4)
    parts = zip(q.split(lengths), k.split(lengths), strict=True)
    maps = [torch.einsum("ihd,jhd->hij", qs, ks) * 0.4 for qs, ks in parts]
    lse = torch.cat([part.logsumexp(-1) for part in maps], 1)
    monkeypatch.setattr(triton_scores, "_log_sum_exp", None)
    for given in (lse, lse.t().contiguous().t()):
        assert_close(attention_received(q, k, lengths, scale=0.4, lse_HT=given), expected)


@pytest.mark.parametrize("normalised", [False, True])
def test_causal_attention_received_with_a_bias_is_its_reference(normalised):
    q, k = qk(100, key_heads=1)
    args = (q, k, (70, 30), torch.arange(100) // 30 % 3 - 1)
    kwargs = {"scale": 0.4, "normalised": normalised, "key_bias_T": torch.linspace(0, 2, 100)}
    score = causal_attention_received(*args, **kwargs)
    assert_close(score, reference(causal_attention_received, *args, **kwargs))


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("key_heads", [2, 1])
def test_causal_attention_received_is_its_reference(normalised, key_heads):
    lengths = (100, 20)
    q, k = qk(sum(lengths), key_heads=key_heads)
    scope = torch.arange(sum(lengths)) // 30 % 3 - 1  # text before, between and behind; scopes span blocks
    args, kwargs = (q, k, lengths, scope), {"scale": 0.4, "normalised": normalised}
    score = causal_attention_received(*args, **kwargs)
    assert (score[scope < 0] == 0).all()
    assert_close(score, reference(causal_attention_received, *args, **kwargs))


def test_flat_attention_scores_one_everywhere_when_normalised():
    scope = torch.zeros(100, dtype=torch.int64)
    q, k = torch.zeros(100, 2, 8), torch.zeros(100, 2, 8)
    score = causal_attention_received(q, k, (100,), scope, scale=1.0, normalised=True)
    assert_close(score, torch.ones(100))


@torch.inference_mode()
def test_a_step_over_fixed_tensors_gives_each_request_what_it_gets_alone():
    decoder, embed = make_decoder()
    (cache, inputs), (reference_cache, reference_inputs) = (composition((3, 70)) for _ in range(2))
    static = StaticInputs(decoder, cache, max_batch=8, num_axes=1)
    static.load(inputs)
    logits = decode_step(decoder, embed, cache, static.rows(4))[:2]
    expected = reference(decode_step, decoder, embed, reference_cache, reference_inputs)
    assert_close(logits, expected)
    held = cache.num_blocks  # the null block alone may differ: rows without a request wrote there
    assert_close(cache.k_pool_PSGd[:held], reference_cache.k_pool_PSGd[:held])


# In float16 alone: the interpreter cuts float32 down to bfloat16, where the compiler rounds.


@pytest.mark.parametrize("width", [32, 40])
def test_a_norm_with_its_residual_is_its_reference(width):
    norm = Qwen2RMSNorm(width, eps=1e-6).to(HALF)
    norm.weight.data = torch.rand(width).to(HALF) + 0.5
    x, delta = torch.randn(2, 5, width).to(HALF) * 3
    for given in (delta, None):
        total, normed = add_rms_norm(norm, x, given)
        expected_total, expected = reference(add_rms_norm, norm, x, given)
        assert torch.equal(total, expected_total)
        assert_close(normed.float(), expected.float(), tolerance=ONE_ROUNDING)


def test_rotation_with_the_write_is_its_reference():
    """Of strided queries, keys and values, as one product gives them; what no token writes stays."""
    heads, groups, width = 6, 2, 24
    joined = torch.randn(5, (heads + 2 * groups) * width).to(HALF)
    angle = torch.rand(5, 1, width // 2).repeat(1, 1, 2) * 6
    rotary, slots = (angle.cos().to(HALF), angle.sin().to(HALF)), torch.tensor([9, 0, 3, 11, 4])

    def run(write):
        parts = joined.clone().split([heads * width, groups * width, groups * width], -1)
        q, k, v = (part.unflatten(-1, (-1, width)) for part in parts)
        cache = PagedCache(
            num_layers=1, num_kv_heads=groups, head_dim=width, num_blocks=3, block_size=4, dtype=HALF, device=CPU
        )
        cache.k_pool_PSGd.fill_(7), cache.v_pool_PSGd.fill_(8)
        q, k = rotate_and_write(q, k, v, rotary, (cache, slots) if write else None)
        return q, k, cache.k_pool_PSGd, cache.v_pool_PSGd

    for write in (True, False):
        for found, expected in zip(run(write), reference(run, write), strict=True):
            assert_close(found.float(), expected.float(), tolerance=ONE_ROUNDING)


def test_gate_times_up_is_its_reference():
    gate, up = (torch.randn(3, 2 * 1100).to(HALF) * 4).split(1100, -1)
    found, expected = silu_mul(nn.SiLU(), gate, up), reference(silu_mul, nn.SiLU(), gate, up)
    assert_close(found.float(), expected.float(), tolerance=ONE_ROUNDING)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [1, 64, 1500, 70_000])
def test_a_greedy_draw_is_its_reference(num_tokens):
    """Of equal logits the first one; in half precision many are equal. A row that is not finite harms no other."""
    logits = torch.randn(6, num_tokens).half()
    logits[1, num_tokens // 3 :] = logits[1].max() + 1
    logits[3, -1], logits[4, 0], logits[5, num_tokens // 2] = float("nan"), float("-inf"), float("inf")
    found, expected = draw_greedy(logits), reference(draw_greedy, logits)
    assert torch.equal(found[1], expected[1])
    assert found[1].tolist() == [1, 1, 1, 0, 0, 0]
    assert torch.equal(found[0, :3], expected[0, :3])
    assert ((found[0] >= 0) & (found[0] < num_tokens)).all()
    assert_close(*(drawn[2, :3].int().view(torch.float32) for drawn in (found, expected)))


def test_a_step_in_half_precision_is_near_the_references():
    """Rounded as the borrowed model rounds; what is left is the order of sums and single roundings."""
    decoder, embed = make_decoder(dtype=torch.float16)
    logits = []
    for step in (decode_step, partial(reference, decode_step)):
        cache, inputs = composition((3, 70), dtype=torch.float16)
        logits.append(step(decoder, embed, cache, inputs).float())
    assert_close(logits[0], logits[1], tolerance=1e-2)


@pytest.mark.parametrize(
    ("model_type", "stock_inputs"),
    [("llava_onevision", tiled.stock_inputs), ("qwen3_vl", native.stock_inputs)],
    ids=["llava_onevision", "qwen3_vl"],
)
def test_a_whole_model_over_fused_layers_is_stock_up_to_roundings(model_type, stock_inputs, tmp_path, monkeypatch):
    launched = Counter()

    def fuse(vlm):
        monkeypatch.setattr(layer_ops, "fuses", lambda x: x.dtype == HALF)
        monkeypatch.setattr(decoder_module, "_CPU_ROWS", 10**6)  # beyond which a CPU's shortcut would run the MLP
        for name in ("add_norm", "rotate_and_write", "silu_mul"):
            monkeypatch.setattr(triton_layers, name, counted(name, getattr(triton_layers, name)))

    def counted(name, function):
        def run(*args):
            launched[name] += 1
            return function(*args)

        return run

    monkeypatch.setenv("ILLAVA_KERNELS", "torch")  # the layers alone: attention is tested above
    kernels_on.cache_clear()
    found = first_logits(model_type, tmp_path, HALF, stock_inputs, fuse)
    check_roundings(*found, bound=2**-7)  # float16 has three bits more than bfloat16
    assert min(launched[name] for name in ("add_norm", "rotate_and_write", "silu_mul")) >= 3
