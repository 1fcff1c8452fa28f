"""Packed and paged attention against the plain softmax formula."""

import inspect

import pytest
import torch

from illava.attention import packed as attention
from illava.attention.backend import backend_name
from illava.attention.packed import chunk_attention, packed_attention, packed_attention_lse
from illava.errors import ModelLoadError
from tests.support.closeness import assert_close

pytestmark = pytest.mark.numeric


def plain(q_THd, k_TGd, v_TGd, lengths, *, causal, scale):
    share = q_THd.shape[1] // k_TGd.shape[1]
    k_THd, v_THd = k_TGd.repeat_interleave(share, 1), v_TGd.repeat_interleave(share, 1)
    out, start = torch.zeros_like(q_THd), 0
    for n in lengths:
        for i in range(start, start + n):
            last = i + 1 if causal else start + n
            for h in range(q_THd.shape[1]):
                weight = (k_THd[start:last, h] @ q_THd[i, h] * scale).softmax(0)
                out[i, h] = weight @ v_THd[start:last, h]
        start += n
    return out


def draw(num_tokens, num_heads, num_kv_heads, head_dim=8):
    torch.manual_seed(0)
    return [torch.randn(num_tokens, h, head_dim) for h in (num_heads, num_kv_heads, num_kv_heads)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(5,), (4, 4, 4), (3, 7, 1), (2, 2, 6, 6, 1)])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_packed_attention_is_softmax_within_each_segment(lengths, causal, num_kv_heads):
    q, k, v = draw(sum(lengths), 4, num_kv_heads)
    out = packed_attention(q, k, v, lengths, causal=causal, scale=0.3)
    assert_close(out, plain(q, k, v, lengths, causal=causal, scale=0.3))


def test_lengths_must_cover_the_tokens():
    q, k, v = draw(6, 2, 2)
    with pytest.raises(ValueError, match="5 tokens"):
        packed_attention(q, k, v, (2, 3), causal=True, scale=1.0)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def word(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return lambda given: monkeypatch.setenv("ILLAVA_ATTENTION", given)


def test_a_word_chooses_the_backend(word):
    for given in ("varlen", "cudnn", "sdpa", "math"):
        word(given)
        assert backend_name(GPU, torch.bfloat16, 72) == given
    for given in ("sdpa", "math"):
        word(given)
        assert backend_name(CPU, torch.float32, 20) == given


@pytest.mark.parametrize(
    ("given", "where", "reason"),
    [
        ("flash", (CPU, torch.float32), "'flash' is not one of auto, varlen, cudnn, sdpa, math"),
        ("varlen", (CPU, torch.bfloat16), "no FlashAttention for cpu; unset it, or set it to auto, sdpa or math"),
        ("cudnn", (GPU, torch.float32), "takes float16 and bfloat16, not float32"),
        ("varlen", (GPU, torch.bfloat16, 20), "multiples of 8 up to 256, not 20"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_in_words(word, given, where, reason):
    word(given)
    with pytest.raises(ModelLoadError, match=reason):
        backend_name(*where)


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_formula_is_the_same_attention(word, causal):
    q, k, v = draw(11, 4, 2)
    expected = packed_attention(q, k, v, (3, 7, 1), causal=causal, scale=0.3)
    expected_chunk = chunk_attention(q[:4], k, v, (1, 3), (5, 6), scale=0.3)
    word("math")
    assert_close(packed_attention(q, k, v, (3, 7, 1), causal=causal, scale=0.3), expected)
    assert_close(chunk_attention(q[:4], k, v, (1, 3), (5, 6), scale=0.3), expected_chunk)


def test_cudnn_serves_segments_of_one_length_and_flash_attention_the_others(word, monkeypatch):
    """Which kernel runs; that cuDNN computes this is checked where CUDA is (tests/gpu)."""
    calls = []

    def dense(q, k, v, **kwargs):
        calls.append(("cudnn", tuple(q.shape)))
        return q

    monkeypatch.setattr(attention, "backend_name", lambda *_: "cudnn")
    monkeypatch.setattr(attention, "check_cudnn", lambda *_: None)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", dense)
    monkeypatch.setattr(attention, "_varlen_arguments", lambda *_: frozenset())
    monkeypatch.setattr(attention, "_varlen", lambda q, k, v, lengths, **_: (calls.append(("varlen", lengths)), None))
    q, k, v = draw(6, 4, 2)
    for lengths in ((3, 3), (6,), (2, 4)):
        packed_attention(q, k, v, lengths, causal=True, scale=0.3)
    chunk_attention(q[:2], k, v, (2,), (6,), scale=0.3)
    assert calls == [("cudnn", (2, 4, 3, 8)), ("cudnn", (1, 4, 6, 8)), ("varlen", (2, 4)), ("varlen", (2,))]


def test_backend_is_chosen_by_what_the_kernel_can_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda")
    assert backend_name(torch.device("cpu"), torch.bfloat16) == "sdpa"
    assert backend_name(gpu, torch.bfloat16, 72) == "varlen"
    assert backend_name(gpu, torch.float32, 64) == "sdpa"
    assert backend_name(gpu, torch.bfloat16, 20) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert backend_name(gpu, torch.float16, 64) == "sdpa"


def varlen_2_10(*qkv_and_bounds, is_causal=False, return_aux=None):
    query, key, value, bounds = qkv_and_bounds[:4]
    assert query.shape[1] == key.shape[1]
    out = plain(query, key, value, bounds.diff().tolist(), causal=is_causal, scale=query.shape[-1] ** -0.5)
    return out if return_aux is None else (out, torch.zeros(query.shape[1], query.shape[0]))


def varlen_2_13(*qkv_and_bounds, scale=None, window_size=(-1, -1), enable_gqa=False, num_splits=None):
    query, key, value, bounds = qkv_and_bounds[:4]
    assert enable_gqa or query.shape[1] == key.shape[1]
    if num_splits is not None:
        raise RuntimeError("num_splits needs FlashAttention 3")
    return plain(query, key, value, bounds.diff().tolist(), causal=window_size == (-1, 0), scale=scale)


@pytest.mark.parametrize("installed", [varlen_2_10, varlen_2_13])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_called_in_the_words_of_the_installed_torch(installed, causal, monkeypatch):
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(module, "varlen_attn", installed)
    monkeypatch.setattr(attention, "backend_name", lambda *_: "varlen")
    q, k, v = draw(9, 4, 2)
    out = packed_attention(q, k, v, (4, 5), causal=causal, scale=0.3)
    assert_close(out, plain(q, k, v, (4, 5), causal=causal, scale=0.3))


def test_log_sum_exps_are_taken_from_the_packed_kernel_and_their_shape_is_checked(monkeypatch):
    import torch.nn.attention.varlen as module

    def told(*qkv_and_bounds, scale=None, window_size=(-1, -1), return_aux=None):
        out = varlen_2_13(*qkv_and_bounds, scale=scale, window_size=window_size)
        return (out, shaped(torch.arange(36.0).view(4, 9))) if return_aux is not None and return_aux.lse else out

    monkeypatch.setattr(module, "varlen_attn", told)
    monkeypatch.setattr(attention, "backend_name", lambda *_: "varlen")
    monkeypatch.setattr(attention, "_varlen_arguments", lambda *_: frozenset(inspect.signature(told).parameters))
    q, k, v = draw(9, 4, 4)
    shaped = torch.clone
    out, lse_HT = packed_attention_lse(q, k, v, (4, 5), causal=False, scale=0.3)
    assert_close(out, plain(q, k, v, (4, 5), causal=False, scale=0.3))
    assert torch.equal(lse_HT, torch.arange(36.0).view(4, 9))
    shaped = torch.t
    with pytest.raises(RuntimeError, match=r"shape \[9, 4\], not \[heads, tokens\]; set ILLAVA_ATTENTION=sdpa"):
        packed_attention_lse(q, k, v, (4, 5), causal=False, scale=0.3)


def test_the_installed_torch_speaks_one_of_the_two_dialects():
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    assert ("window_size" in names) or ("is_causal" in names)
    assert list(names)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
