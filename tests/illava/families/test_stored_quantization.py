"""Checkpoints that are stored quantised give their plain twin's logits within the format's rounding; none is cast."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations import compressed_tensors, finegrained_fp8
from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from illava import VLM
from illava.families import load_family, quantization
from illava.weight_files import count_stored
from tests.support.closeness import FLOAT32, assert_close
from tests.support.models.quantised_models import READ, make_quantised
from tests.support.models.text_logits import text_logits

# Of the largest weight that shares a scale: half a step of 3 mantissa bits, of 127 steps, of 7 steps.
STEP = {
    "fp8": 2**-4,
    "fp8-tensor": 2**-4,
    "compressed-fp8": 2**-4,
    "compressed-int8": 0.5 / 127,
    "compressed-int4": 0.5 / 7,
}
# Of the logits' norm: twice what was seen of four random layers, each of whose products multiplies the rounding.
LOGITS = {"fp8": 0.35, "fp8-tensor": 0.35, "compressed-fp8": 0.35, "compressed-int8": 0.05, "compressed-int4": 0.6}
KEPT = ("fp8", "fp8-tensor", "compressed-fp8")


@pytest.fixture(scope="module")
def folders(onevision_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("quantised")
    return {name: make_quantised(onevision_folder, root / name, name) for name in READ}


@pytest.fixture(scope="module")
def twin(onevision_folder):
    return load_family(str(onevision_folder), dtype=torch.float32, device="cpu")


def load(folder, dtype=torch.float32):
    return load_family(str(folder), dtype=dtype, device="cpu")


def layers_of(family) -> dict[str, torch.nn.Module]:
    names = [name for name, _ in family.decoder.layers[0].named_modules() if name.endswith("_proj")]
    return {f"{n}.{name}": layer.get_submodule(name) for n, layer in enumerate(family.decoder.layers) for name in names}


@pytest.mark.parametrize("name", READ)
def test_a_checkpoint_agrees_with_its_plain_twin(folders, twin, name):
    """On this CPU, which has no product for them, the weights are dequantised; `VLM.backends` says so."""
    vlm = VLM.from_pretrained(str(folders[name]), dtype="float32", device="cpu", kv_cache_bytes=1 << 20)
    plain = layers_of(twin)
    for key, layer in layers_of(vlm.family).items():
        assert type(layer) is torch.nn.Linear
        expected = plain[key].weight
        assert (layer.weight - expected).abs().max() <= 1.01 * STEP[name] * expected.abs().max(), key
        assert not torch.equal(layer.weight, expected)
    assert re.fullmatch(
        rf"float32, dequantized from (float|int)\d \({READ[name][1]['quant_method']}\)", vlm.backends["weights"]
    )
    got, expected = text_logits(vlm.family), text_logits(twin)
    assert (got - expected).norm() < LOGITS[name] * expected.norm()


@pytest.mark.parametrize("name", ["fp8", "compressed-int4"])
def test_what_is_not_quantised_has_the_asked_dtype(folders, name):
    family = load(folders[name], torch.bfloat16)
    assert {p.dtype for layer in family.decoder.layers for p in layer.parameters()} == {torch.bfloat16}
    assert {p.dtype for block in family.tower._blocks for p in block.parameters()} == {torch.bfloat16}
    assert family.decoder.dtype == family.decoder.lm_head.weight.dtype == torch.bfloat16


def reference_product(x, weight, scale, block_size=None, bias=None, *_):
    """What the FP8 kernels compute, without their rounding of ``x``."""
    plain = weight.float()
    if block_size is not None:
        scale = scale.repeat_interleave(block_size[0], 0).repeat_interleave(block_size[1], 1)
    return torch.nn.functional.linear(x, (plain * scale).to(x.dtype), bias)


def row_product(x, weight_t, *, scale_a, scale_b, out_dtype, bias=None):
    product = (x.float() * scale_a) @ (weight_t.float() * scale_b)
    return (product if bias is None else product + bias).to(out_dtype)


@pytest.fixture
def fp8_card(monkeypatch):
    """As on a card of compute capability 8.9 with the package `kernels`, whose products are computed here."""
    monkeypatch.setattr(quantization, "computes_float8", lambda device: True)
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(
        CompressedTensorsHfQuantizer,
        "validate_environment",
        lambda self, *_, **__: setattr(self, "use_fp8_kernel", True),
    )
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", reference_product)
    monkeypatch.setattr(compressed_tensors, "_scaled_mm_rowwise", row_product)


def scaled(layer) -> Tensor:
    return reference_product(torch.eye(layer.in_features), layer.weight, layer.weight_scale_inv, layer.block_size).T


@pytest.mark.parametrize("name", KEPT)
def test_kept_weights_are_the_files_own_numbers(folders, twin, fp8_card, name):
    """They were cast to the model's dtype without their scales once: 688 times too large, no error, fluent nonsense."""
    family = load(folders[name])
    stored = {
        key: value
        for key, value in load_file(folders[name] / "model.safetensors").items()
        if value.dtype == torch.float8_e4m3fn
    }
    assert len(stored) == 28
    for (key, layer), (_, value) in zip(sorted(layers_of(family).items()), sorted(stored.items()), strict=True):
        assert layer.weight.dtype == torch.float8_e4m3fn, key
        assert torch.equal(layer.weight.view(torch.uint8), value.view(torch.uint8)), key
        assert {p.dtype for n, p in layer.named_parameters() if "scale" in n} == {torch.float32}
    assert {p.dtype for layer in family.decoder.layers for n, p in layer.named_parameters() if "norm" in n} == {
        torch.float32
    }
    assert family.weights == f"float8 ({READ[name][1]['quant_method']}), as stored"
    got, expected = text_logits(family), text_logits(twin)
    assert (got - expected).norm() < LOGITS[name] * expected.norm()


def test_kept_and_dequantised_blocks_are_the_same_model(folders, fp8_card, monkeypatch):
    kept = text_logits(load(folders["fp8"]))
    monkeypatch.setattr(quantization, "computes_float8", lambda device: False)
    assert_close(kept, text_logits(load(folders["fp8"])), tolerance=2 * FLOAT32)


def test_blocks_are_dequantised_where_no_kernels_are_installed(folders, fp8_card, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: object() if name != "kernels" else None)
    assert load(folders["fp8"]).weights == "float32, dequantized from float8 (fp8)"


@pytest.mark.parametrize("name", READ)
def test_counted_values_are_those_of_the_plain_twin(folders, onevision_folder, name):
    from illava.model_files import load_model_files

    scheme = load_model_files(str(folders[name])).stored_scheme
    got, plain = count_stored(folders[name], scheme), count_stored(onevision_folder)
    assert (got.linear_values, got.linear_rows, got.other_values) == (
        plain.linear_values,
        plain.linear_rows,
        plain.other_values,
    )
    assert got.stored_bytes < plain.stored_bytes
