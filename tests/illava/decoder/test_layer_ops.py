"""The small operations of a layer and joined projections: what is fused, what is not, and that stock still runs.

The Triton kernels themselves: tests/support/kernels/interpreted.py, and on a GPU benchmarks/speed/gpu_correctness.py.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from illava.decoder import layer_ops
from illava.decoder.joined_linears import products
from illava.decoder.layer_ops import add_rms_norm, rms_norm, silu_mul
from tests.support.closeness import assert_close


class ShiftedRMSNorm(Qwen2RMSNorm):
    """A norm of another formula under a name that ends alike, as Gemma's is."""

    def forward(self, x):
        return super().forward(x) + 1


def linears(sizes, *, bias):
    return [nn.Linear(6, size, bias=bias).requires_grad_(False) for size in sizes]


@pytest.mark.parametrize("bias", [False, True])
def test_joined_layers_give_what_each_gives_and_become_views_of_one_weight(bias):
    layers, x = linears((8, 4, 4), bias=bias), torch.randn(5, 6)
    expected = [layer(x) for layer in layers]
    joined = products(layers, join=True)
    found = joined(x)
    for one, other, layer in zip(found, expected, layers, strict=True):
        assert_close(one, other)
        assert_close(layer(x), other)  # stock's own forward
    ends = [layer.weight.data_ptr() for layer in layers]
    assert [after - before for before, after in pairwise(ends)] == [8 * 6 * 4, 4 * 6 * 4]  # one behind the other
    layers[1].weight.data.zero_()  # no copy: the product computes with what is put into a layer
    assert torch.equal(joined(x)[1], torch.zeros(5, 4) if not bias else layers[1].bias.expand(5, 4))


def test_layers_that_are_not_alike_stay_apart():
    class Quantised(nn.Linear):
        pass

    plain = linears((8, 4), bias=False)
    for odd in (
        Quantised(6, 4, bias=False).requires_grad_(False),
        nn.Linear(6, 4, bias=False),
        *linears((4,), bias=True),
    ):
        before = plain[0].weight.data_ptr()
        products([*plain, odd], join=True)
        assert plain[0].weight.data_ptr() == before


@pytest.mark.parametrize("kind", [Qwen2RMSNorm, Qwen3RMSNorm, LlamaRMSNorm])
def test_the_borrowed_norms_are_known_by_their_formula(kind):
    assert layer_ops._is_rms_norm(kind)
    assert not layer_ops._is_rms_norm(ShiftedRMSNorm)
    assert not layer_ops._is_rms_norm(nn.LayerNorm)


def test_torch_s_own_norm_rounds_within_a_place_of_the_module():
    """What CUDA without Triton runs; on this CPU the same call."""
    norm, x = Qwen2RMSNorm(64).bfloat16(), (torch.randn(7, 64) * 3).bfloat16()
    own = nn.functional.rms_norm(x, (64,), norm.weight, norm.variance_epsilon)
    assert_close(own.float(), norm(x).float(), tolerance=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cpu_every_operation_is_the_borrowed_module_s(dtype):
    norm, activation = Qwen2RMSNorm(64).to(dtype), nn.SiLU()
    x, delta = torch.randn(2, 7, 64).to(dtype)
    assert torch.equal(rms_norm(norm, x), norm(x))
    total, normed = add_rms_norm(norm, x, delta)
    assert torch.equal(total, x + delta)
    assert torch.equal(normed, norm(x + delta))
    assert torch.equal(silu_mul(activation, x, delta), activation(x) * delta)
