"""Packed and paged attention against the plain softmax formula."""

import inspect

import pytest
import torch

from illava.attention import packed as attention
from illava.attention.packed import backend_name, packed_attention
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
    return plain(query, key, value, bounds.diff().tolist(), causal=is_causal, scale=query.shape[-1] ** -0.5)


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


def test_the_installed_torch_speaks_one_of_the_two_dialects():
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    assert ("window_size" in names) or ("is_causal" in names)
    assert list(names)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
