"""Products of packed weights equal plain ones within bfloat16's rounding, and an owned weight is held once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from illava.decoder.onednn_linears import keep_packed_only, linear, serves
from tests.support.closeness import assert_close
from tests.support.processors import pretend_processor

if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    pytest.skip("torch has no bfloat16 products of oneDNN on this processor", allow_module_level=True)

# A result is rounded to 8 bits once, of a sum in float32: half a unit of the last is 2^-9 of an entry.
ROUNDING = 2**-8
AFTER = {
    "none": lambda y: y,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
}


@pytest.fixture(autouse=True)
def _native(monkeypatch, tmp_path):
    pretend_processor(monkeypatch, tmp_path, native_bfloat16=True)
    with torch.inference_mode():
        yield


def layer(bias=True, num_in=96, num_out=80):
    with torch.inference_mode(False):
        return nn.Linear(num_in, num_out, bias=bias).requires_grad_(False).bfloat16()


def exact(module, x):
    bias = None if module.bias is None else module.bias.double()
    return functional.linear(x.double(), module.weight.double(), bias)


@pytest.mark.parametrize("rows", [1, 2, 7, 65])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_what_follows_it_are_right_within_one_rounding(rows, bias):
    module, x = layer(bias), torch.randn(rows, 96).bfloat16()
    other = torch.randn(rows, 80).bfloat16()
    assert serves(module)
    y = exact(module, x)
    for activation, after in AFTER.items():
        assert_close(linear(module, x, activation=activation), after(y), tolerance=ROUNDING)
    assert_close(linear(module, x, times_TN=other), y * other, tolerance=ROUNDING)
    kept = other.clone()
    assert_close(linear(module, x, plus_TN=other), y + other, tolerance=ROUNDING)
    assert torch.equal(other, kept), "the residual stream is still read by others"


def test_a_row_is_the_same_alone_and_in_a_batch_within_one_rounding():
    module, x = layer(), torch.randn(9, 96).bfloat16()
    alone = torch.cat([linear(module, row) for row in x.split(1)])
    assert_close(linear(module, x), alone, tolerance=ROUNDING)


def test_a_weight_that_changed_is_packed_anew():
    module, x = layer(), torch.randn(3, 96).bfloat16()
    before = linear(module, x)
    with torch.inference_mode(False), torch.no_grad():
        module.weight.mul_(-1)
        module.bias.mul_(-1)
    assert torch.equal(linear(module, x), -before)


def test_an_owned_layer_keeps_one_copy_and_still_computes():
    module, x = layer(), torch.randn(3, 96).bfloat16()
    expected = exact(module, x)
    keep_packed_only(module)
    for _ in range(2):
        assert_close(linear(module, x), expected, tolerance=ROUNDING)
        assert module.weight.numel() == 0
    with pytest.raises(RuntimeError):
        module(x)


def test_others_run_as_they_are(monkeypatch, tmp_path):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(3, 96)
    with torch.inference_mode(False):
        wide, scaled = nn.Linear(96, 80), Scaled(96, 80).bfloat16()
    for module, given in ((wide, x), (scaled, x.bfloat16())):
        assert torch.equal(linear(module, given), module(given))
        with pytest.raises(ValueError, match="is not served by oneDNN here"):
            linear(module, given, activation="silu")
    plain = layer()
    with torch.inference_mode(False), torch.enable_grad():
        assert not serves(plain), "a packed product has no gradient"
    pretend_processor(monkeypatch, tmp_path, native_bfloat16=False)
    assert not serves(plain)
